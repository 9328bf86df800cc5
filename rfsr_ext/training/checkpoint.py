"""What a run must remember, and the files it is kept in: one safetensors file a checkpoint, whole or absent."""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rfsr_ext.files import load_tensors, save_tensors

__all__ = ["CheckpointFolder", "TrainingState", "cut_like", "whole"]

# What stands in a checkpoint beside its tensors.
_FACTS = {"iteration": int, "config": dict, "fingerprint": str, "history": list, "seconds": float, "method": dict,
          "held_out": dict, "optimizer_steps": dict, "scalers": dict}  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    """A tensor cut over processes, put together on each one's CPU (all must ask together); any other as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor on the device of ``other``, and cut over processes if that is."""
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def _step(value: Tensor) -> Tensor | int:
    """An optimizer's count of steps as it keeps it: PyTorch's a tensor on the CPU, bitsandbytes' a whole number."""
    return value.clone() if value.is_floating_point() else int(value)


class TrainingState:
    """Trained parameters of several named networks, the optimizer's moments, the moving average and the loss scale.

    Only parameters that require a gradient count; frozen ones belong to the base model.

    Args:
        networks: by name.
        optimizer: an Adam-like optimizer over their parameters.
        ema_decay: decay of the exponential moving average; as in diffusers it ramps up as (1+k)/(10+k).
        scaler: of the loss, whose state is a few numbers and not among `tensors`; None for a loss as it is.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        ema_decay: float,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.parameters: dict[str, nn.Parameter] = {
            f"{network}.{name}": parameter
            for network, module in networks.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer, self.scaler = optimizer, scaler or torch.amp.GradScaler(enabled=False)
        self.ema = EMAModel(self.parameters.values(), decay=ema_decay)

    def tensors(self) -> dict[str, Tensor]:
        """All of the state; names start with ``parameters.``, ``ema.`` or ``optimizer.<key>.``.

        Where parameters are cut over processes, all of them must call this together.
        """
        tensors = {f"parameters.{name}": whole(parameter) for name, parameter in self.parameters.items()}
        tensors |= {f"ema.{name}": whole(shadow) for name, shadow in self.ema_tensors().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = whole(torch.as_tensor(value))
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], optimizer_steps: int) -> None:
        """Take over what `tensors` gave after this many optimizer steps.

        Raises:
            ValueError: if the tensors are those of other networks; nothing is changed then.
        """
        for name, parameter in self.parameters.items():
            for kind in ("parameters", "ema"):
                found = tensors.get(f"{kind}.{name}")
                if found is None or found.shape != parameter.shape:
                    what = "nothing" if found is None else list(found.shape)
                    raise ValueError(
                        f"checkpoint is of another model: {kind}.{name} must have shape {list(parameter.shape)}, "
                        f"got {what}"
                    )
        known = {f"{kind}.{name}" for name in self.parameters for kind in ("parameters", "ema")}
        strange = [name for name in tensors if not name.startswith("optimizer.") and name not in known]
        if strange:
            raise ValueError(
                f"checkpoint is of another model: it has {len(strange)} unknown tensors such as {strange[0]}"
            )
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, key, parameter_name = name.split(".", 2)
                moments.setdefault(parameter_name, {})[key] = tensor
        keys = {key for found in moments.values() for key in found}
        for name, found in moments.items():
            shape = self.parameters[name].shape if name in self.parameters else None
            if found.keys() != keys or any(value.shape != shape for key, value in found.items() if key != "step"):
                raise ValueError(f"checkpoint is damaged: what it holds of the optimizer does not fit {name}")
        for (name, parameter), shadow in zip(self.parameters.items(), self.ema.shadow_params, strict=True):
            parameter.copy_(cut_like(tensors[f"parameters.{name}"], parameter))
            shadow.copy_(cut_like(tensors[f"ema.{name}"], shadow))
            if name in moments:
                self.optimizer.state[parameter] = {
                    key: _step(value) if key == "step" else cut_like(value, parameter)
                    for key, value in moments[name].items()
                }
        self.ema.optimization_step = optimizer_steps

    def ema_tensors(self) -> dict[str, Tensor]:
        """The moving average by parameter name (``network.parameter``)."""
        return dict(zip(self.parameters, self.ema.shadow_params, strict=True))


def _iteration(path: Path) -> int:
    return int(path.stem.partition("-")[2])


class CheckpointFolder:
    """``iteration-000100.safetensors`` files in one folder.

    A checkpoint is written aside and renamed, so a run killed at any moment leaves whole files only.  It is *confirmed*
    once a loss was finite ``patience`` iterations after it: the step that destroys the weights is itself taken after a
    good loss, and may be followed by some that are finite and large.  Old ones are removed when a newer one is
    confirmed, never before.

    Args:
        folder: created when first needed.
        keep: how many of the newest that are confirmed to keep.
        patience: iterations in which weights that are of no use may still give a finite loss.
    """

    def __init__(self, folder: str | Path, keep: int = 2, patience: int = 1):
        self.folder, self.keep, self.patience = Path(folder), keep, patience
        self._unconfirmed: list[Path] = []

    def paths(self) -> list[Path]:
        """Checkpoints, oldest first."""
        found = (p for p in self.folder.glob("iteration-*.safetensors") if re.fullmatch(r"iteration-\d{6,}", p.stem))
        return sorted(found, key=_iteration)

    def save(self, iteration: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Path:
        """Write one; it is not confirmed yet."""
        path = self.folder / f"iteration-{iteration:06d}.safetensors"
        save_tensors(path, tensors, metadata | {"iteration": iteration})
        self._unconfirmed.append(path)
        return path

    def confirm(self, iteration: int | None = None) -> None:
        """The loss of that iteration was finite, or the run has ended well: what is confirmed by it is good.

        Those beyond ``keep`` are removed then, with whatever a killed run left half written.
        """
        waiting = [p for p in self._unconfirmed if iteration is not None and _iteration(p) > iteration - self.patience]
        if len(waiting) < len(self._unconfirmed):
            self._unconfirmed = waiting
            good = [path for path in self.paths() if path not in waiting]
            for old in [*good[: -self.keep], *self.folder.glob(".*.partial")]:
                old.unlink(missing_ok=True)

    def reject(self) -> None:
        """The run has lost its weights: remove what is not confirmed, so that a resumed run begins before it."""
        for path in self._unconfirmed:
            path.unlink(missing_ok=True)
        self._unconfirmed = []

    def load_newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint, or None if there is none; it counts as not confirmed, with those shortly before it.

        Raises:
            ValueError: if it is damaged.
        """
        paths = self.paths()
        if not paths:
            return None
        found = load_tensors(paths[-1])
        facts, number = found[1], _iteration(paths[-1])
        wrong = [name for name, kind in _FACTS.items() if type(facts.get(name)) is not kind]
        if not wrong and not facts["iteration"] == len(facts["history"]) == number:
            wrong = ["iteration"]
        if wrong:
            raise ValueError(
                f"checkpoint {str(paths[-1])!r} is damaged (its {wrong[0]}); delete it to go on from the one before"
            )
        # but for the oldest: a run that ended well and is made longer does not lose all that it has
        self._unconfirmed = [p for p in paths[1:] if _iteration(p) > number - self.patience] or paths[-1:]
        return found
