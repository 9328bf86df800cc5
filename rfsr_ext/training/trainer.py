"""`RFSRTrainer`: the training loop on accelerate, with resumable checkpoints and held-out measurements."""

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rfsr_ext.data import Sample, evaluation_crops, photographs
from rfsr_ext.evaluation.measure import Scorer, evaluate
from rfsr_ext.files import replace_file
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.metrics.judge import Judge
from rfsr_ext.models import ISRModel, load_model
from rfsr_ext.rewards import WeightedReward
from rfsr_ext.sampling import generators
from rfsr_ext.training import setup
from rfsr_ext.training.checkpoint import CheckpointFolder, fingerprint
from rfsr_ext.training.config import RFSRConfig
from rfsr_ext.training.objective import RFSRObjective
from rfsr_ext.training.state import TrainingState

__all__ = ["NonFiniteLossError", "RFSRTrainer", "TrainingResult"]

logger = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """Too many iterations in a row had no finite loss or gradient; the last checkpoint is intact."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind.

    Attributes:
        model: the fine-tuned model, with the moving average of its weights.
        folder: the run's folder: ``model/`` (the end), ``best/`` (best held-out), ``history.csv``, ``checkpoints/``.
        history: one row per iteration.
        validation: one row per held-out measurement: means of fidelity, rewards and judges, and in ``reward`` what the
            rewards are worth together, see `RFSRTrainer`.
        best_iteration: of the weights in ``best/``, those with the highest held-out ``reward`` among the measurements
            whose PSNR is not more than ``max_psnr_drop`` below the base model's; 0 is the base model.
    """

    model: ISRModel
    folder: Path
    history: pd.DataFrame
    validation: pd.DataFrame
    best_iteration: int


class RFSRTrainer:
    """Fine-tunes any `ISRModel` by reward feedback learning as the paper describes (sections 3.2 to 3.5).

    Every part can be given; what is not given is built from ``config``.  All randomness of iteration k comes from
    ``(config.seed, k)``, so that a resumed run, or one on several processes, does what a single uninterrupted one does.

    Held-out measurements choose the best weights by Σ_k λ_k · mean(min(r_k, cap_k)).  The caps count as they do in
    training: a score beyond its cap is good enough, and to choose by the excess would choose whatever fools the reward
    most.  A standardised reward counts by how many standard deviations of the base model's held-out scores it has risen
    above their mean, and without its cap, which is relative to a running mean.  Views, tags, windows and balancing
    belong to training alone.

    Args:
        config: all settings.
        model: the pre-trained model; it is trained in place.
        dataset: samples as `rfsr_ext.data.Sample`, indexable by any non-negative integer.
        rewards: the weighted rewards.
        style_loss: the Gram distance of Gram-KL.
        validation: held-out samples, measured during training.
        judges: scorers by name that training never uses, higher is better; a warning appears when one of them has
            fallen since the base model while the held-out reward has risen, both by more than twice the standard error
            of the paired difference over images.
    """

    def __init__(
        self,
        config: RFSRConfig,
        model: ISRModel | None = None,
        *,
        dataset: Dataset | None = None,
        rewards: Sequence[WeightedReward] | None = None,
        style_loss: VGGGramLoss | None = None,
        validation: list[Sample] | None = None,
        judges: dict[str, Scorer] | None = None,
    ):
        self.config = config
        self.folder = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with="tensorboard",
            project_dir=self.folder,
        )
        if config.batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes ({self.accelerator.num_processes}), "
                f"got {config.batch_size}"
            )
        self.model = load_model(config.model) if model is None else model
        self.model.to(self.accelerator.device)
        if config.crop_size % self.model.multiple:
            raise ValueError(
                f"crop_size must be a multiple of {self.model.multiple} for this model, got {config.crop_size}"
            )
        self.windows = setup.build_windows(config, self.model)
        self.steps = self.windows.steps()
        self.rewards = setup.build_rewards(config.rewards) if rewards is None else list(rewards)
        if self.windows.reward and not self.rewards:
            raise ValueError("rewards must name at least one reward for a reward window, got none")
        regularized = config.style_loss != "none" and self.windows.reward is not None
        if not regularized:
            style_loss = None
        elif style_loss is None:
            style_loss = setup.style_loss(config)
        self.dataset = setup.build_dataset(config) if dataset is None else dataset
        self.validation = (
            evaluation_crops(photographs("validation"), config.validation_size, config.validation_crops)
            if validation is None
            else validation
        )
        self.judges = {"judge": Judge.from_pretrained().to(self.accelerator.device).score} if judges is None else judges

        self.base_fingerprint = fingerprint(self.model.trainable_groups())
        reference = self.model.reference() if regularized and not config.lora_rank else None
        if config.lora_rank:
            set_seed(config.seed)  # adapters start from random numbers
            setup.add_adapters(self.model, config.lora_rank, config.lora_targets)
        else:
            for module in self.model.trainable_groups().values():
                module.requires_grad_(True)
        self.groups = self.model.trainable_groups()
        parameters = [p for module in self.groups.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, config.learning_rate, betas=config.adam_betas)
        self.state = TrainingState(self.groups, self.optimizer, config.ema_decay)
        self.parameters = parameters
        prepared = self.accelerator.prepare(*self.groups.values())
        prepared = prepared if isinstance(prepared, (tuple, list)) else (prepared,)
        self.wrapped = dict(zip(self.groups, prepared, strict=True))

        for term in self.rewards:
            if not term.offload:
                term.reward.to(self.accelerator.device)
        self.objective = RFSRObjective(
            self.model,
            self.windows,
            structure_loss=setup.structure_loss(config.structure_loss),
            lambda_structure=config.lambda_structure,
            rewards=self.rewards,
            balance_rewards=config.balance_rewards,
            style_loss=style_loss.to(self.accelerator.device) if style_loss else None,
            kl=regularized and config.style_loss == "kl",
            lambda_regularization=config.lambda_style,
            reference=reference,
            disable_adapters=self._disable_adapters if config.lora_rank else None,
            num_inference_steps=config.num_inference_steps,
        )
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", config.keep_checkpoints)
        self.iteration = 0
        self.skipped_in_a_row = 0
        self.history: list[dict[str, Any]] = []
        self.measured: list[dict[str, Any]] = []
        self.best_iteration = 0
        self.scales: dict[str, tuple[float, float]] = {}  # mean and deviation of the base model's held-out scores
        self.base_scores: dict[str, list[float]] = {}  # its held-out reward and judges, image by image

    # -- one iteration --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _disable_adapters(self):
        with contextlib.ExitStack() as stack:
            for module in self.groups.values():
                stack.enter_context(module.disable_adapter())
            yield

    def _draw_step(self, iteration: int) -> int:
        """The sampling step of an iteration: uniform over both windows, the same on every process."""
        return int(np.random.default_rng((self.config.seed, iteration, 2)).choice(self.steps))

    def _window(self, step: int) -> str:
        inside = {"structure": self.windows.in_structure(step), "reward": self.windows.in_reward(step)}
        return " and ".join(name for name, is_inside in inside.items() if is_inside)

    def _loader(self, first: int) -> DataLoader:
        """This process's share of every batch from iteration ``first`` on: sample i of the run is always the same."""
        n, share = self.config.batch_size, self.config.batch_size // self.accelerator.num_processes
        offset = self.accelerator.process_index * share
        indices = [k * n + offset + i for k in range(first, self.config.iterations) for i in range(share)]
        return DataLoader(self.dataset, share, sampler=indices, num_workers=self.config.num_workers)

    def _train_step(self, batch: dict, iteration: int) -> dict[str, float]:
        config, share = self.config, len(batch["prompt"])
        step = self._draw_step(iteration)
        first = iteration * config.batch_size + self.accelerator.process_index * share
        noise = generators(config.seed, range(first, first + share))
        # without adapters to wrap again, the modules that run are the ones accelerate prepared
        self.model.set_trainable_groups(self.wrapped)
        try:
            with self.accelerator.autocast():
                loss, logs = self.objective(
                    batch["lr"].to(self.model.device), batch["gt"].to(self.model.device), batch["prompt"], step, noise
                )
            self.accelerator.backward(loss)
        finally:
            self.model.set_trainable_groups(self.groups)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        names = sorted(logs)
        values = self.accelerator.reduce(torch.stack([logs[name] for name in names]), reduction="mean")
        row = {"iteration": iteration + 1, "step": step, "window": self._window(step)}
        row |= dict(zip(names, values.tolist(), strict=True))
        row["grad_norm"] = norm.item()
        row["skipped"] = not (np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]))
        if row["skipped"]:
            self.skipped_in_a_row += 1
            logger.warning(
                "iteration %d: loss %s or its gradient is not finite, step skipped", iteration + 1, row["loss"]
            )
        else:
            self.skipped_in_a_row = 0
            self.optimizer.step()
            self.state.ema.step(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= config.max_skipped:
            raise NonFiniteLossError(
                f"stopped after {config.max_skipped} iterations in a row without a finite loss and gradient "
                f"(max_skipped); "
                f"lower learning_rate or the loss weights and resume from {self.checkpoints.folder}"
            )
        return row

    # -- the loop -------------------------------------------------------------------------------------------------

    def train(self, resume: bool = True) -> TrainingResult:
        """Train to ``config.iterations``, going on from the newest checkpoint in the run's folder if there is one.

        Raises:
            NonFiniteLossError: after ``config.max_skipped`` iterations in a row without a finite loss.
            ValueError: if the checkpoint is of another model or was made with other settings.
        """
        if resume:
            self._resume()
        elif self.checkpoints.paths():
            raise FileExistsError(
                f"output_dir {str(self.folder)!r} holds checkpoints of a run; resume it or give another"
            )
        main = self.accelerator.is_main_process
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.accelerator.init_trackers("tensorboard")
            with replace_file(self.folder / "config.json") as path:
                path.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        if not self.measured:
            self._validate()
        loader = iter(self._loader(self.iteration))
        progress = tqdm(total=self.config.iterations, initial=self.iteration, desc="RFSR", disable=not main, unit="it")
        while self.iteration < self.config.iterations:
            started = time.monotonic()
            row = self._train_step(next(loader), self.iteration)
            self.iteration += 1
            row["seconds"] = time.monotonic() - started
            self.history.append(row)
            progress.update()
            progress.set_postfix(st=row["step"], loss=f"{row['loss']:.4g}")
            last = self.iteration == self.config.iterations
            if main:
                scalars = {key: value for key, value in row.items() if key not in ("iteration", "window", "skipped")}
                self.accelerator.log(scalars, step=self.iteration)
            if self.iteration % self.config.validate_every == 0 or last:
                self._validate()
            if self.iteration % self.config.checkpoint_every == 0 or last:
                self._checkpoint()
        progress.close()
        return self._finish()

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.save(
                self.iteration,
                self.state.tensors(),
                {
                    "config": self.config.to_dict(),
                    "base_model": self.base_fingerprint,
                    "history": self.history,
                    "validation": self.measured,
                    "best_iteration": self.best_iteration,
                    "skipped_in_a_row": self.skipped_in_a_row,
                    "reward_statistics": {term.reward.name: term.statistics.state() for term in self.rewards},
                    "reward_scales": self.scales,
                    "base_scores": self.base_scores,
                    "optimizer_steps": self.state.ema.optimization_step,
                },
            )
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = self.checkpoints.load_newest()
        if found is None:
            return
        tensors, metadata = found
        if metadata.get("base_model") != self.base_fingerprint:
            raise ValueError(
                f"checkpoint in {str(self.checkpoints.folder)!r} is of another base model than {self.config.model!r}; "
                f"give that model or another output_dir"
            )
        changed = self.config.differs(metadata["config"])
        if changed:
            raise ValueError(
                f"checkpoint in {str(self.checkpoints.folder)!r} was made with other settings ({', '.join(changed)}); "
                f"restore them or give another output_dir"
            )
        statistics, names = metadata["reward_statistics"], [term.reward.name for term in self.rewards]
        if set(statistics) != set(names):
            raise ValueError(
                f"rewards must be those of the checkpoint in {str(self.checkpoints.folder)!r}, "
                f"{', '.join(statistics) or 'none'}, got {', '.join(names) or 'none'}"
            )
        self.state.load(tensors, metadata["optimizer_steps"])
        for term in self.rewards:
            term.statistics.load(statistics[term.reward.name])
        self.scales, self.base_scores = metadata["reward_scales"], metadata["base_scores"]
        self.iteration = metadata["iteration"]
        self.history, self.measured = metadata["history"], metadata["validation"]
        self.best_iteration, self.skipped_in_a_row = metadata["best_iteration"], metadata["skipped_in_a_row"]
        logger.info("going on from iteration %d", self.iteration)

    # -- held-out measurements ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _averaged(self):
        """The model with the moving average of its weights, for as long as the block lasts."""
        self.state.ema.store(self.parameters)
        self.state.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.state.ema.restore(self.parameters)

    def _validate(self) -> None:
        """Measure the averaged weights on the held-out samples; keep them if they are the best so far."""
        if self.accelerator.is_main_process:
            scorers = {term.reward.name: term.measure for term in self.rewards} | self.judges
            with self._averaged():
                frame = evaluate(
                    self.model, self.validation, scorers, seeds=(self.config.seed,),
                    batch_size=self.config.batch_size, num_inference_steps=self.config.num_inference_steps,
                    name="held-out",
                    on_images=self._log_images,
                )  # fmt: skip
                frame["reward"] = self._held_out_reward(frame)
                row = {"iteration": self.iteration} | frame.drop(
                    columns=["model", "image", "seed", "prompt"]
                ).mean().to_dict()
                self.measured.append(row)
                self._warn_of_hacking(frame)
                best = next(r for r in self.measured if r["iteration"] == self.best_iteration)
                kept = row["psnr"] >= self.measured[0]["psnr"] - self.config.max_psnr_drop
                if row is self.measured[0] or (kept and row["reward"] > best["reward"]):
                    self.best_iteration = self.iteration
                    self._export(self.folder / "best")
            self.accelerator.log(
                {f"held-out/{key}": value for key, value in row.items() if key != "iteration"}, step=self.iteration
            )
        self.accelerator.wait_for_everyone()

    def _held_out_reward(self, frame: pd.DataFrame) -> pd.Series:
        """Σ λ · min(r, cap) of every held-out image, see the class."""
        total = pd.Series(0.0, frame.index)
        for term in self.rewards:
            name, scores = term.reward.name, frame[term.reward.name].astype(float)
            if term.normalize:
                mean, deviation = self.scales.setdefault(name, (scores.mean(), scores.std(ddof=0) or 1.0))
                total += term.weight * (scores - mean) / deviation
            else:
                total += term.weight * scores.clip(upper=term.cap)
        return total

    def _log_images(self, indices: range, sr: Tensor) -> None:
        """The first batch of held-out samples as rows of (LR, SR, ground truth) in TensorBoard."""
        if indices.start:
            return
        samples = [self.validation[i] for i in indices]
        lr = F.interpolate(torch.stack([s["lr"] for s in samples]), scale_factor=self.model.scale, mode="nearest")
        rows = torch.cat([lr, sr.cpu(), torch.stack([s["gt"] for s in samples])], dim=3)
        tracker = self.accelerator.get_tracker("tensorboard")
        tracker.log_images({"held-out": np.moveaxis(rows.numpy(), 1, -1)}, step=self.iteration, dataformats="NHWC")

    def _warn_of_hacking(self, frame: pd.DataFrame) -> None:
        """Compare with the base model image by image: what may be chance is passed over."""
        now = {name: frame[name].astype(float).tolist() for name in ("reward", *self.judges)}
        first = self.base_scores = self.base_scores or now
        ratios = {name: _paired_ratio(first[name], now[name]) for name in now}
        change = {name: f"({np.mean(first[name]):.4g} to {np.mean(now[name]):.4g})" for name in now}
        for name in self.judges:
            if ratios["reward"] > 2 and ratios[name] < -2:
                logger.warning(
                    "iteration %d: the training reward has risen %s while the held-out %s has fallen %s; "
                    "this is what reward hacking looks like, so look at the images",
                    self.iteration, change["reward"], name, change[name],
                )  # fmt: skip

    def _export(self, folder: Path) -> None:
        """Save the model as it stands as an ordinary folder, adapters merged."""
        self.model.set_trainable_groups({name: setup.merge_adapters(m) for name, m in self.groups.items()})
        try:
            self.model.save_pretrained(folder)
        finally:
            self.model.set_trainable_groups(self.groups)

    def _finish(self) -> TrainingResult:
        self.state.ema.copy_to(self.parameters)
        history, validation = pd.DataFrame(self.history), pd.DataFrame(self.measured)
        if self.accelerator.is_main_process:
            self._export(self.folder / "model")
            for name, frame in (("history", history), ("validation", validation)):
                with replace_file(self.folder / f"{name}.csv") as path:
                    frame.to_csv(path, index=False)
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()
        self.model.set_trainable_groups({name: setup.merge_adapters(m) for name, m in self.groups.items()})
        for module in self.model.trainable_groups().values():
            module.requires_grad_(False)
        return TrainingResult(self.model, self.folder, history, validation, self.best_iteration)


def _paired_ratio(first: Sequence[float], now: Sequence[float]) -> float:
    """Mean difference over images in units of its standard error; not a number for a single image."""
    difference = pd.Series(now) - pd.Series(first)
    with np.errstate(divide="ignore", invalid="ignore"):
        return difference.mean() / difference.sem()
