"""Settings of an RFSR run: one flat dataclass, read from YAML, checked before anything is loaded."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml

from rfsr_ext.rewards import WeightedReward

__all__ = ["PRESETS", "RFSRConfig"]

PRESETS = ("mini", "paper")
_CHOICES = {
    "structure_loss": ("dwt-ll", "l1", "none"),
    "regularization": ("gram-kl", "kl", "none"),
    "vgg_weights": ("imagenet", "random"),
    "mixed_precision": ("no", "bf16"),
}
# what may differ between the runs before and after an interruption without changing the result
_FREE_ON_RESUME = {"iterations", "output_dir", "checkpoint_every", "keep_checkpoints", "validate_every", "num_workers"}


@dataclass(frozen=True)
class RFSRConfig:
    """Every setting of `RFSRTrainer`; the defaults are the paper's (section 4.1).

    Attributes:
        model: "mini", or a folder written by `ControlNetISRModel.save_pretrained`.
        data: "photographs" (those that ship with scikit-image and scikit-learn), or a folder of sharp images.
        crop_size: side of the training crops in pixels.
        batch_size: images per iteration, over all processes.
        num_inference_steps: sampling steps of the rollout; None takes the model's own.
        structure_window, reward_window: inclusive sampling steps ``[first, last]``, or None for none.
        structure_timesteps, reward_timesteps: the same as ranges of timesteps (0 … 1000); given instead of the steps.
        allow_overlap: let both windows cover a step, which then gets both losses (Table 2, third row).
        structure_loss: "dwt-ll" (eq. 2), "l1" or "none" (Table 5).
        lambda_structure: λ_dwt.
        rewards: by reward name a weight (λ_clipiqa, λ_iw of eq. 5), or a mapping of ``weight`` and any other field of
            `rfsr_ext.rewards.WeightedReward`: ``{image-reward: {weight: 5.0e-6, cap: 2, steps: [45, 50]}}``.
        balance_rewards: bring the rewards' image gradients to one norm before they are weighed.
        regularization: "gram-kl" (eq. 6), "kl" (mean squared change of the predicted noise) or "none" (Table 4).
        lambda_regularization: λ_r.
        vgg_weights: "imagenet", or "random" for a stand-in where the file is not on disk.
        lora_rank: 0 trains all of U-Net and ControlNet; otherwise adapters of this rank, whose base is the reference.
        lora_targets: names of the modules that get adapters.
        iterations, learning_rate, adam_betas, ema_decay, max_grad_norm: of Adam and of the moving average.
        mixed_precision: "no" or "bf16".
        max_skipped: stop after this many iterations in a row without a finite loss and gradient.
        validate_every, validation_crops, validation_size: how often and on what held-out crops to measure.
        max_psnr_drop: a checkpoint is only "best" if its held-out PSNR is at most this many dB below the base model's.
        checkpoint_every, keep_checkpoints: how often to save what a resumed run needs, and how many to keep.
        seed: of data, noise and drawn steps.
        num_workers: data-loading processes.
        output_dir: everything the run writes.
    """

    model: str = "mini"
    data: str = "photographs"
    crop_size: int = 512
    batch_size: int = 8
    num_inference_steps: int | None = None
    structure_window: tuple[int, int] | None = (1, 20)
    reward_window: tuple[int, int] | None = (41, 50)
    structure_timesteps: tuple[int, int] | None = None
    reward_timesteps: tuple[int, int] | None = None
    allow_overlap: bool = False
    structure_loss: str = "dwt-ll"
    lambda_structure: float = 5e-4
    rewards: dict[str, float | dict[str, Any]] = field(default_factory=lambda: {"clipiqa": 5e-5, "image-reward": 5e-5})
    balance_rewards: bool = False
    regularization: str = "gram-kl"
    lambda_regularization: float = 5e-5
    vgg_weights: str = "imagenet"
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
    iterations: int = 10_000
    learning_rate: float = 5e-6
    adam_betas: tuple[float, float] = (0.9, 0.999)
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    max_skipped: int = 10
    validate_every: int = 500
    validation_crops: int = 8
    validation_size: int = 512
    max_psnr_drop: float = 1.0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    seed: int = 0
    num_workers: int = 0
    output_dir: str = "runs/rfsr"

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {value!r}{_nearest(str(value), choices)}"
                )
        for name in ("crop_size", "batch_size", "iterations", "max_skipped", "checkpoint_every", "validate_every",
                     "keep_checkpoints", "validation_crops"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "lambda_structure", "lambda_regularization", "lora_rank", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> Self:
        """Check names and types of ``values`` and fill in the defaults.

        Raises:
            ValueError: for an unknown key (the nearest valid one is named) or a value of the wrong type.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        checked = {}
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"{source}: unknown key {key!r}{_nearest(key, known)}")
            checked[key] = _coerce(key, value, cls.__annotations__[key], source)
        return cls(**checked)

    @classmethod
    def load(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> Self:
        """Read a YAML file, or one of the presets ("mini", "paper"); ``overrides`` win over what it says.

        Raises:
            FileNotFoundError: if there is neither a file nor a preset of that name.
            ValueError: if the file is no YAML mapping, or a key or value is wrong.
        """
        if str(path) in PRESETS:
            text, source = resources.files("rfsr_ext.presets").joinpath(f"{path}.yaml").read_text(), f"preset {path}"
        elif Path(path).is_file():
            text, source = Path(path).read_text(encoding="utf-8"), str(path)
        else:
            raise FileNotFoundError(
                f"config {str(path)!r} is neither a file nor one of the presets {', '.join(PRESETS)}"
            )
        try:
            values = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{source} must hold 'key: value' lines, got a {type(values).__name__}")
        return cls.from_dict(values | (overrides or {}), source)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they may stand in YAML or JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked again."""
        return type(self).from_dict(self.to_dict() | changes)

    def differs(self, other: dict[str, Any]) -> list[str]:
        """Keys in which a run with ``other`` would give another result, for deciding whether it can be resumed."""
        mine = self.to_dict()
        return sorted(key for key in mine if key not in _FREE_ON_RESUME and mine[key] != other.get(key))


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(known)}"


def _coerce_reward(key: str, value: Any, source: str) -> float | dict[str, Any]:
    """A weight, or a mapping whose keys and values are those of `WeightedReward`."""
    if not isinstance(value, dict):
        return _coerce(key, value, "float", source)
    known = {f.name: f.type for f in dataclasses.fields(WeightedReward) if f.init and f.name != "reward"}
    for name in value:
        if name not in known:
            raise ValueError(f"{source}: unknown key {f'{key}.{name}'!r}{_nearest(str(name), known)}")
    if "weight" not in value:
        raise ValueError(f"{source}: {key} must have a weight, got {value!r}")
    checked = {name: _coerce(f"{key}.{name}", term, known[name], source) for name, term in value.items()}
    try:
        WeightedReward(None, **checked)  # for its checks alone; the reward is loaded later
    except ValueError as error:
        raise ValueError(f"{source}: {key}.{error}") from None
    return {name: list(term) if isinstance(term, tuple) else term for name, term in checked.items()}


def _coerce(key: str, value: Any, annotation: Any, source: str) -> Any:
    """A YAML value to the type of the field, or one sentence."""
    wanted = str(annotation).replace("<class '", "").replace("'>", "")
    optional = "None" in wanted
    if value is None and optional:
        return None
    if "dict" in wanted and isinstance(value, dict):
        return {str(name): _coerce_reward(f"{key}.{name}", term, source) for name, term in value.items()}
    try:
        if "tuple" in wanted:
            if isinstance(value, str) or not hasattr(value, "__len__"):
                raise TypeError
            if "..." not in wanted and len(value) != 2:
                raise TypeError
            kind = int if "int" in wanted else float if "float" in wanted else str
            return tuple(kind(item) for item in value)
        if "dict" in wanted:
            raise TypeError
        if wanted.startswith("bool"):
            if not isinstance(value, bool):
                raise TypeError
            return value
        if wanted.startswith("int"):
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise TypeError
            return int(float(value))
        if wanted.startswith("float"):
            return float(value)  # also "5e-6", which YAML 1.1 reads as a string
        if not isinstance(value, str):
            raise TypeError
        return value
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"{source}: {key} must be of type {wanted}, got {value!r}") from None
