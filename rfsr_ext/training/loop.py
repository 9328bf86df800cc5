"""The training loop: any `Method` on accelerate, seeded, resumable, and indifferent to what is trained."""

import contextlib
import copy
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rfsr_ext.files import disk_errors, lock_folder, save_table, save_text
from rfsr_ext.processes import process_state
from rfsr_ext.training.checkpoint import CheckpointFolder, TrainingState, whole
from rfsr_ext.training.config import RunConfig
from rfsr_ext.training.method import Method

__all__ = ["Loop", "Monitor", "NonFiniteLossError", "create_accelerator"]

logger = logging.getLogger(__name__)

_OWNED = ("config.json", "history.csv", "validation.csv", "model", "best", "checkpoints")  # what a run writes
_PATIENCE = 5  # iterations until a checkpoint is trusted, if a run does not end in fewer without a finite loss


class NonFiniteLossError(RuntimeError):
    """Too many iterations in a row had no finite loss or gradient; the last good checkpoint is intact."""


class Monitor(Protocol):
    """Held-out measurements, as the loop sees them; `rfsr_ext.training.held_out.HeldOut` is one."""

    measured: list[dict[str, Any]]

    def measure(self, iteration: int, log_images) -> bool:
        """Measure the weights as they stand, append a row to ``measured``, and say whether they are the best so far."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def create_accelerator(config: RunConfig, cpu: bool = False) -> Accelerator:
    """accelerate's `Accelerator` for a run.

    Its state is shared by the whole process; a second run, in a notebook say, may want another precision.  The loop
    accumulates gradients itself, so accelerate must not divide the loss, whatever its environment variables say.  Nor
    must it scale the loss: it has one scale for all players, keeps it in no checkpoint, and knows float16 on GPUs only.

    Raises:
        ValueError: if the processes cannot share a batch evenly, or were launched for what the loop cannot do: it takes
            the optimizers' steps and averages the weights itself, which DeepSpeed, Megatron and FSDP 1 keep to
            themselves.
        ModuleNotFoundError: see `RunConfig.check_packages`.
    """
    config.check_packages()
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise ValueError(
                "distributed_type must be MULTI_GPU, or FSDP (version 2), which cuts weights, gradients and optimizers "
                f"as ZeRO-3 does, got {engine}; see docs/many_gpus.md"
            )
    precision = "no" if config.mixed_precision == "fp16" else config.mixed_precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    process_state(cpu)
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=cpu,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with="tensorboard",
        project_dir=config.output_dir,
    )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        raise ValueError(
            f"FSDP must be of version 2 and on GPUs, got version {os.environ.get('FSDP_VERSION', 1)} on "
            f"{accelerator.device.type}; accelerate would do something else, see docs/many_gpus.md"
        )
    for key, refused, instead in (("mixed_precision", "fp16", "bf16"), ("optimizer", "adam-8bit", "adam")):
        # each process would scale by what overflows in its own part, and round the moments of its own part
        if accelerator.is_fsdp2 and getattr(config, key) == refused:
            raise ValueError(f"{key} must be {instead} where FSDP cuts the networks, got {refused}")
    if accelerator.is_fsdp2 and config.mixed_precision == "bf16":  # accelerate would add up gradients in bf16, too
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes ({accelerator.num_processes}) times "
            f"gradient_accumulation_steps ({config.gradient_accumulation_steps}), got {config.batch_size}"
        )
    return accelerator


class Loop:
    """Trains a method's networks; it knows nothing of images or rewards.

    Iteration k sees samples ``k·batch_size …`` of the dataset, cut over processes and accumulation steps.  A step is
    skipped if its loss or gradient is not finite.  Checkpoints hold everything; none is written while steps are being
    skipped.  Under float16 losses are scaled; a gradient that overflows under a finite loss lowers its player's scale,
    and the step is left out without counting as skipped, until the scale is down to 1.

    Args:
        config: the settings every method shares.
        method: what is trained.
        dataset: indexable by any non-negative integer; if it has a ``fingerprint()``, a run that goes on warns where
            that has changed.
        held_out: measures during training, or None.
        accelerator: by default a new one.
        name: of the progress bar.

    Attributes:
        seconds: spent so far, interruptions left out, with held-out measurements but the first and the last; a trainer
            may begin with those of what its method does before.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        dataset: Dataset,
        held_out: Monitor | None = None,
        accelerator: Accelerator | None = None,
        name: str = "train",
    ):
        self.config, self.method, self.dataset, self.held_out = config, method, dataset, held_out
        self.accelerator = accelerator or create_accelerator(config)
        self.folder, self.name = Path(config.output_dir), name
        self.fingerprint = method.fingerprint()
        self.data_fingerprint = dataset.fingerprint() if hasattr(dataset, "fingerprint") else None
        self.states: dict[str, TrainingState] = {}
        self.wrapped: dict[str, dict[str, nn.Module]] = {}
        self._whole: dict[str, dict[str, nn.Module]] = {}  # of sharded networks a twin on the CPU, for exports
        for player, networks in method.players.items():
            if not any(p.requires_grad for module in networks.values() for p in module.parameters()):
                raise ValueError(f"player {player!r} must have a parameter that asks for a gradient, got none")
            if self.accelerator.is_fsdp2:
                self._whole[player] = {name: copy.deepcopy(module).cpu() for name, module in networks.items()}
            self.wrapped[player] = {name: self._wrap(module) for name, module in networks.items()}
            # only now, because sharding puts other parameters in the place of a network's own
            parameters = [p for module in networks.values() for p in module.parameters() if p.requires_grad]
            optimizer = method.optimizer(player, parameters, config)
            scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=config.mixed_precision == "fp16")
            self.states[player] = TrainingState(networks, optimizer, config.ema_decay, scaler)
        self.checkpoints = CheckpointFolder(
            self.folder / "checkpoints", config.keep_checkpoints, min(config.max_skipped, _PATIENCE)
        )
        self.iteration = 0
        self.skipped_in_a_row = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []

    def _wrap(self, network: nn.Module) -> nn.Module:
        """A network as accelerate has it run on several processes.

        `Accelerator.prepare` takes one network with one optimizer under FSDP2 ("Only one model is supported"), and a
        player may have two; the function that it calls for the network itself knows no such limit.
        """
        return (fsdp2_prepare_model if self.accelerator.is_fsdp2 else Accelerator.prepare)(self.accelerator, network)

    # -- one iteration --------------------------------------------------------------------------------------------

    def _loader(self, first: int) -> DataLoader:
        """This process's parts of every batch from iteration ``first`` on: sample i of the run is always the same."""
        n, parts = self.config.batch_size, self.config.gradient_accumulation_steps
        share = n // self.accelerator.num_processes
        offset = self.accelerator.process_index * share
        indices = (k * n + offset + i for k in range(first, self.config.iterations) for i in range(share))
        workers = self.config.num_workers
        return DataLoader(
            self.dataset,
            share // parts,
            sampler=indices,
            num_workers=workers,
            prefetch_factor=self.config.prefetch_factor if workers else None,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _samples(self, iteration: int, part: int) -> range:
        n, parts = self.config.batch_size, self.config.gradient_accumulation_steps
        share = n // self.accelerator.num_processes
        first = iteration * n + self.accelerator.process_index * share + part * (share // parts)
        return range(first, first + share // parts)

    @contextlib.contextmanager
    def _installed(self, networks: dict[str, dict[str, nn.Module]]) -> Iterator[None]:
        """The method computes with these networks for as long as the block lasts, then with its own again."""
        for player, own in networks.items():
            self.method.install(player, own)
        try:
            yield
        finally:
            for player, own in self.method.players.items():
                self.method.install(player, own)

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _autocast(self) -> torch.autocast:
        """Not accelerate's, which follows the precision that the process' last `Accelerator` was made with."""
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.mixed_precision]
        return torch.autocast(self.accelerator.device.type, dtype, enabled=dtype is not None)

    def _backward(self, player: str, batches: Sequence[dict], iteration: int) -> dict[str, Tensor]:
        """Gradients of the mean loss over the parts of a batch, and the mean of what the method logs."""
        total: dict[str, Tensor] = {}
        for part, batch in enumerate(batches):
            last = part == len(batches) - 1
            with contextlib.ExitStack() as stack:
                if not last:  # processes exchange gradients once
                    for module in self.wrapped[player].values():
                        stack.enter_context(self.accelerator.no_sync(module))
                with self._autocast():
                    loss, logs = self.method.loss(player, batch, iteration, self._samples(iteration, part))
                self.accelerator.backward(self.states[player].scaler.scale(loss / len(batches)))
            for name, value in logs.items():
                total[name] = total.get(name, 0) + value / len(batches)
        return total

    def _train_step(self, batches: Sequence[dict], iteration: int) -> dict[str, Any]:
        """One step of every player."""
        row: dict[str, Any] = {"iteration": iteration + 1} | self.method.describe(iteration)
        skipped = False
        for player, state in self.states.items():
            prefix = "" if len(self.states) == 1 else f"{player}/"
            parameters, scale = list(state.parameters.values()), state.scaler.get_scale()
            with self._installed(self.wrapped):
                logs = self._backward(player, batches, iteration)
            state.scaler.unscale_(state.optimizer)
            limit = float("inf") if self.config.max_grad_norm is None else self.config.max_grad_norm
            norm = whole(nn.utils.clip_grad_norm_(parameters, limit))
            names = sorted(logs)
            values = self.accelerator.reduce(torch.stack([logs[name].detach().float() for name in names]), "mean")
            found = dict(zip(names, values.tolist(), strict=True)) | {"grad_norm": norm.item()}
            if state.scaler.is_enabled():
                found["loss_scale"] = scale
            state.scaler.update()
            overflowed = state.scaler.get_scale() < scale and scale > 1
            loss_is_finite = np.isfinite(found.get("loss", 0.0))
            if loss_is_finite and np.isfinite(found["grad_norm"]):
                factor = self.method.learning_rate_factor(player, iteration)
                for group in state.optimizer.param_groups:
                    group["lr"] = self.config.learning_rate * factor
                state.optimizer.step()
                state.ema.step(parameters)
            elif not (loss_is_finite and overflowed):
                skipped = True
                logger.warning(
                    "iteration %d: %sloss %s or its gradient is not finite, step skipped",
                    iteration + 1, prefix, found.get("loss"),
                )  # fmt: skip
            for other in self.states.values():  # a player's loss may reach another player's networks
                other.optimizer.zero_grad(set_to_none=True)
            row |= {f"{prefix}{name}": value for name, value in found.items()}
        row["skipped"] = skipped
        return row

    # -- the loop -------------------------------------------------------------------------------------------------

    @torch.enable_grad()  # a notebook may have turned gradients off for good
    def train(self, resume: bool = True) -> pd.DataFrame:
        """Train to ``config.iterations``, going on from the newest checkpoint in the run's folder if there is one.

        ``config.max_seconds`` may end the run before.  The weights are the moving averages afterwards.

        Returns:
            One row per iteration.

        Raises:
            NonFiniteLossError: after ``config.max_skipped`` iterations in a row without a finite loss, or if the run
                ends in skipped steps or in weights that are of no use.
            ValueError: if the checkpoint is of another model or method, or was made with other settings; or if
                ``max_seconds`` have gone by before the first iteration.
            RuntimeError: if another run holds the folder, or under `torch.inference_mode`.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "nothing can be trained under torch.inference_mode(); make the trainer outside of it, too"
            )
        main = self.accelerator.is_main_process
        with lock_folder(self.folder, _OWNED) if main else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()
            if resume:
                self._resume()
            elif self.checkpoints.paths():
                raise FileExistsError(
                    f"output_dir {str(self.folder)!r} holds checkpoints of a run; resume it or give another"
                )
            if main:
                self.accelerator.init_trackers("tensorboard")
                save_text(self.folder / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")
            try:
                self._run()
            except NonFiniteLossError:
                if main:
                    self.checkpoints.reject()
                raise
            if main:
                self.checkpoints.confirm()
            for state in self.states.values():
                state.ema.copy_to(list(state.parameters.values()))
            history = pd.DataFrame(self.history)
            self._export(self.folder / "model")
            if main:
                frames = {"history": history}
                if self.held_out is not None:
                    frames["validation"] = pd.DataFrame(self.held_out.measured)
                for name, frame in frames.items():
                    save_table(self.folder / f"{name}.csv", frame)
            self.accelerator.wait_for_everyone()
            if main and self.accelerator.trackers:
                with disk_errors(self.folder / "tensorboard"):  # end_training would end the process group as well
                    self.accelerator.get_tracker("tensorboard").finish()
            for player, networks in self._whole.items():
                self.method.install(player, networks)
        return history

    def _run(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        if self.held_out is not None and not self.held_out.measured:
            self._measure()
        loader = iter(self._loader(self.iteration))
        started = time.monotonic() - self.seconds
        progress = tqdm(
            total=None if config.max_seconds else config.iterations, initial=self.iteration, desc=self.name,
            disable=not main, unit="it", mininterval=0.5,
        )  # fmt: skip
        last = self._done()
        if last and not self.iteration:
            raise ValueError(
                f"max_seconds must leave time to train, but {self.seconds:.0f} s had gone by before the first "
                f"iteration, got {config.max_seconds:g}"
            )
        with contextlib.closing(progress):
            while not last:
                began = time.monotonic()
                batches = [self._to_device(next(loader)) for _ in range(config.gradient_accumulation_steps)]
                row = self._train_step(batches, self.iteration)
                self.iteration += 1
                self.seconds = time.monotonic() - started
                row["seconds"] = time.monotonic() - began
                self.history.append(row)
                self._count_skipped(row["skipped"])
                progress.update()
                shown = {k: f"{v:.4g}" for k, v in row.items() if k.endswith(("loss", "step"))}
                progress.set_postfix(shown, refresh=False)
                last = self._done()
                if main:
                    numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
                    scalars = {k: v for k, v in numbers.items() if k not in ("iteration", "skipped")}
                    self._log(scalars)
                if self.skipped_in_a_row:
                    if last:
                        raise NonFiniteLossError(self._advice("the run ended while steps were being skipped"))
                    continue
                if self.held_out is not None and (self.iteration % config.validate_every == 0 or last):
                    self._measure()
                if last and not self._sound():
                    raise NonFiniteLossError(self._advice("the last step left weights that are of no use"))
                if self.iteration % config.checkpoint_every == 0 or last:
                    self._checkpoint()

    def _done(self) -> bool:
        """Whether the run has had its iterations or its seconds; all processes say the same."""
        done = self.iteration >= self.config.iterations
        if self.config.max_seconds is not None:
            seconds = torch.tensor(self.seconds, device=self.accelerator.device)
            done |= self.accelerator.reduce(seconds, "mean").item() >= self.config.max_seconds
        return done

    def _sound(self) -> bool:
        """Whether the weights are finite, and every held-out number that was one still is.

        No loss comes after the last step that could tell.
        """
        weights = (w for s in self.states.values() for w in (*s.parameters.values(), *s.ema.shadow_params))
        sound = all(bool(whole(w.detach().isfinite().all())) for w in weights)
        if self.held_out is not None and self.held_out.measured:
            first, now = self.held_out.measured[0], self.held_out.measured[-1]
            sound &= all(np.isnan(first[key]) or not np.isnan(value) for key, value in now.items())
        return bool(self.accelerator.reduce(torch.tensor(float(sound), device=self.accelerator.device), "mean") == 1)

    def _count_skipped(self, skipped: bool) -> None:
        if not skipped:
            self.skipped_in_a_row = 0
            if self.accelerator.is_main_process:
                self.checkpoints.confirm(self.iteration)
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise NonFiniteLossError(
                self._advice(
                    f"stopped after {self.config.max_skipped} iterations in a row without a finite loss and gradient "
                    f"(max_skipped)"
                )
            )

    def _advice(self, what: str) -> str:
        return f"{what}; lower learning_rate and run again: it goes on from the last good checkpoint"

    # -- state ----------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        tensors = {f"{player}.{k}": v for player, state in self.states.items() for k, v in state.tensors().items()}
        if self.accelerator.is_main_process:
            metadata = {
                "config": self.config.to_dict(),
                "fingerprint": self.fingerprint,
                "data": self.data_fingerprint,
                "history": self.history,
                "seconds": self.seconds,
                "method": self.method.state_dict(),
                "held_out": self.held_out.state_dict() if self.held_out is not None else {},
                "optimizer_steps": {player: state.ema.optimization_step for player, state in self.states.items()},
                "scalers": {player: state.scaler.state_dict() for player, state in self.states.items()},
            }
            self.checkpoints.save(self.iteration, tensors, metadata)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = self.checkpoints.load_newest()
        newest = torch.tensor([found[1]["iteration"] if found else 0], device=self.accelerator.device)
        if len(seen := set(self.accelerator.gather(newest).tolist())) > 1:
            raise RuntimeError(
                f"output_dir {str(self.folder)!r} must be on a disk that all machines share, but its processes see "
                f"checkpoints of different iterations there ({', '.join(map(str, sorted(seen)))})"
            )
        if found is None:
            if self.iteration:
                raise RuntimeError("the run stopped before its first checkpoint; begin again with a new trainer")
            return
        for state in self.states.values():
            state.optimizer.zero_grad(set_to_none=True)  # of an interrupted iteration
        tensors, metadata = found
        folder = str(self.checkpoints.folder)
        if metadata.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"checkpoint in {folder!r} is of another base model than {self.config.model!r}; give that model or "
                f"another output_dir"
            )
        changed = self.config.differs(metadata["config"])
        if changed:
            raise ValueError(
                f"checkpoint in {folder!r} was made with other settings ({', '.join(changed)}); restore them or give "
                f"another output_dir"
            )
        if metadata["iteration"] > self.config.iterations:
            raise ValueError(
                f"iterations must be at least {metadata['iteration']}, which the run in {str(self.folder)!r} has done, "
                f"got {self.config.iterations}; give another output_dir for a shorter run"
            )
        try:
            self.method.load_state_dict(metadata["method"])
            for player, state in self.states.items():
                own = {k.removeprefix(f"{player}."): v for k, v in tensors.items() if k.startswith(f"{player}.")}
                state.load(own, metadata["optimizer_steps"][player])
                state.scaler.load_state_dict(metadata["scalers"][player])
            if self.held_out is not None:
                self.held_out.load_state_dict(metadata["held_out"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"checkpoint in {folder!r} is damaged ({error!r}); delete the newest and go on") from error
        self.iteration, self.history, self.seconds = metadata["iteration"], metadata["history"], metadata["seconds"]
        logger.info("going on from iteration %d", self.iteration)
        other = metadata.get("data", self.data_fingerprint) != self.data_fingerprint
        if other and self.accelerator.is_main_process:
            logger.warning("data has other pictures than when the run began; the samples from here on are others, too")

    # -- held-out measurements ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The networks with the moving average of their weights, for as long as the block lasts."""
        for state in self.states.values():
            state.ema.store(list(state.parameters.values()))
            state.ema.copy_to(list(state.parameters.values()))
        try:
            yield
        finally:
            for state in self.states.values():
                state.ema.restore(list(state.parameters.values()))

    def _export(self, folder: Path) -> None:
        """The method's export on the main process, from whole networks where they are sharded."""
        self._gather()
        if self.accelerator.is_main_process:
            with self._installed(self._whole):
                self.method.export(folder)

    @torch.no_grad()
    def _gather(self) -> None:
        """Load the twins of sharded networks with the weights as they stand; all processes must do it together."""
        for player, networks in self._whole.items():
            for name, network in networks.items():
                sharded = self.method.players[player][name].state_dict()
                network.load_state_dict({key: whole(value) for key, value in sharded.items()})

    def _measure(self) -> None:
        """Measure the averaged weights; keep them in ``best/`` if they are the best so far.

        One process measures, but where each has a part of the networks only, all must take part.
        """
        main = self.accelerator.is_main_process
        if main or self._whole:
            with self.averaged():
                if self.held_out.measure(self.iteration, self._log_images if main else None):
                    self._export(self.folder / "best")
        if main:
            row = {k: v for k, v in self.held_out.measured[-1].items() if k != "iteration"}
            self._log({f"held-out/{key}": value for key, value in row.items()})
        self.accelerator.wait_for_everyone()

    def _log_images(self, images: np.ndarray) -> None:
        """``[N, H, W, 3]`` images in [0, 1] for TensorBoard."""
        tracker = self.accelerator.get_tracker("tensorboard")
        with disk_errors(self.folder / "tensorboard"):
            tracker.log_images({"held-out": images}, step=self.iteration, dataformats="NHWC")

    def _log(self, values: dict[str, float]) -> None:
        """Numbers for TensorBoard, whose own errors do not say where a disk is full."""
        with disk_errors(self.folder / "tensorboard"):
            self.accelerator.log(values, step=self.iteration)
