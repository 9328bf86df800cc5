"""Settings of a training run: read from YAML, checked before anything is loaded.

`RunConfig` is what every method of training shares; a method adds its own keys in a subclass, as `RFSRConfig` does.
The description of a key stands in its field, and `rfsr config show` prints it.
"""

import contextlib
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from rfsr_ext.data import Degradation, Root
from rfsr_ext.data.degradation import DEGRADATIONS
from rfsr_ext.importing import did_you_mean, require
from rfsr_ext.presets import read_settings
from rfsr_ext.rewards import WeightedReward

__all__ = ["RFSRConfig", "RunConfig", "Settings", "create_degradation", "read_values"]

# What version 0.1 called things, and what to write now.
_OLD_KEYS = {
    "regularization": "write style_loss: gram, kl or none",
    "lambda_regularization": "write lambda_style",
    "structure_timesteps": "write structure_window with window_unit: timesteps",
    "reward_timesteps": "write reward_window with window_unit: timesteps",
}
_OLD_VALUES = {"dwt-ll": "haar-ll", "gram-kl": "gram"}

Text = Annotated[str, Field(pattern=r"\S")]
Count = Annotated[int, Field(ge=1, le=10**9)]
Pixels = Annotated[int, Field(ge=8, le=2**14, multiple_of=4)]  # LR images are 4 times smaller
Measured = Annotated[int, Field(ge=32, le=2**14, multiple_of=4)]  # the judge takes no smaller ones
Weight = Annotated[float, Field(ge=0, le=1e12)]  # far below the largest number of single precision
Edge = Annotated[float, AfterValidator(lambda value: int(value) if value.is_integer() else value)]
Window = tuple[Edge, Edge]
View = Annotated[str, BeforeValidator(lambda view: str(view) if isinstance(view, (int, float)) else view)]


class _Unusable(AssertionError):
    """A value of another kind than the field's: pydantic counts it among its own errors, and `_sentence` words it."""


class _Values(BaseModel):
    """Takes values as YAML 1.1 reads them, and takes only keys it knows and finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info) -> Any:
        return _as_meant(value, _leaves(cls.model_fields[info.field_name].annotation))


class RewardTerm(_Values):
    """One reward of a configuration; see `rfsr_ext.rewards.WeightedReward`, whose fields these are."""

    weight: Weight
    cap: Annotated[float, Field(ge=-1e12, le=1e12)] | None = None
    steps: tuple[Count, Count] | None = None
    views: tuple[View, ...] = ("1",)
    tags: Literal["mean", "worst"] | None = None
    normalize: bool = False
    offload: bool = False


class DataRoot(_Values):
    """One folder of the training data, or two of pairs; see `rfsr_ext.data.Root`, whose fields these are."""

    path: Text | None = None
    lr: Text | None = None
    gt: Text | None = None
    weight: Annotated[float, Field(gt=0, le=1e12)] = 1.0
    limit: Count | None = None


class StreamRoot(_Values):
    """Shards instead of folders; see `rfsr_ext.data.stream`."""

    stream: Text
    lanes: Count = 1


class Settings(_Values):
    """What a YAML file or one of ``presets`` says, checked key by key before anything is loaded.

    Raises:
        ValueError: for the first key that is not known (the nearest valid one is named) or whose value is no use, in
            one sentence.
    """

    presets: ClassVar[tuple[str, ...]] = ()
    presets_folder: ClassVar[str] = ""  # in `rfsr_ext.presets`

    def __init__(self, **values: Any):
        values = {key: _without_paths(value) for key, value in values.items()}
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_sentence(type(self), error, values)) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Self:
        """Check names and values and fill in the defaults; ``source`` begins the sentence of an error.

        Raises:
            ValueError: see the class.
        """
        try:
            return cls(**{str(key): value for key, value in values.items()})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a YAML file, or one of ``presets``; ``overrides`` win over what it says.

        Raises:
            FileNotFoundError: if there is neither a file nor a preset of that name.
            ValueError: if the file is no YAML mapping, or a key or value is wrong.
        """
        return cls.from_dict(*read_values(path, cls.presets, overrides, cls.presets_folder))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they may stand in YAML or JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.model_dump().items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked again."""
        return type(self)(**self.to_dict() | changes)


class RunConfig(Settings):
    """The settings that every method of training shares; a method subclasses it with keys and ``presets`` of its own.

    Raises:
        ValueError: see `Settings`.
    """

    # What may differ between the runs before and after an interruption.
    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"iterations", "max_seconds", "learning_rate", "max_skipped", "output_dir", "checkpoint_every",
         "keep_checkpoints", "validate_every", "num_workers", "prefetch_factor", "gradient_checkpointing",
         "offload_reference"}
    )  # fmt: skip
    method: Text = Field("own", description="the method that trains, by its name")
    model: Text = Field(
        "mini",
        description='"mini", a published model that `rfsr models` lists, a folder of a saved model, or '
        "package.module:Name of a function that returns an ISRModel; {name: seesr, weights: DIR} gives options, too",
    )
    model_options: dict[str, Any] = Field(
        {},
        description="of a published model where its files are, {weights: DIR, base: DIR}, and of any what its folder "
        "does not say: {scale: 2, start: noise, num_inference_steps: 20, guidance_scale: 4, controlnet: its_folder/, "
        "torch_dtype: bfloat16, trained: {unet: attentions}}",
    )
    data: str | list[Any] | dict[str, Any] = Field(
        "photographs",
        description='"photographs" (those of scikit-image and scikit-learn), a folder of sharp images, a list of '
        "folders, each a path or a mapping such as {path: FFHQ/, weight: 0.5, limit: 10000} or, of ready-made pairs, "
        "{lr: LR/, gt: HR/}, {stream: hf://datasets/NAME/*.tar, lanes: 32} of shards that no disk here holds, or "
        "package.module:Name of a function that takes this configuration and returns a dataset of Sample",
    )
    degradation: str | dict[str, Any] = Field(
        "realesrgan-a",
        description="how LR images are made from sharp ones: realesrgan-a (PASD, SeeSR, RFSR), realesrgan-b (harsher, "
        "sharpened ground truth), realesrgan-c (milder blur), mini (one round, for small crops), or changes to one of "
        "them such as {preset: realesrgan-a, scale: 2, first: {jpeg_range: [30, 95]}}; pairs need its scale alone",
    )
    crop_size: Pixels = Field(512, description="side of the training crops in pixels")
    batch_size: Annotated[int, Field(ge=1, le=2**16)] = Field(
        8, description="images per optimizer step, over all processes and accumulation steps"
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=2**16)] = Field(
        1, description="parts into which a batch is cut, one after the other, to save memory"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations of denoiser and decoder in the backward pass to save memory"
    )
    iterations: Annotated[int, Field(ge=1, le=10**7)] = Field(10_000, description="optimizer steps of the whole run")
    max_seconds: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None,
        description="end the run as if its iterations were done after so many seconds, interruptions left out; how far "
        "it comes then depends on the machine; null for no limit",
    )
    optimizer: Literal["adam", "adam-8bit"] = Field(
        "adam", description="adam, or adam-8bit, which keeps its two moments in a quarter of the memory (bitsandbytes)"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(5e-6, description="of Adam")
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="β1 and β2 of Adam"
    )
    weight_decay: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="apart from the gradient, as in AdamW")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="of the moving average of the weights")
    max_grad_norm: Annotated[float, Field(gt=0, le=1e12)] | None = Field(
        1.0, description="gradients longer than this are clipped to it; null for no clipping"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no",
        description="no, bf16, or fp16, which scales the loss (column loss_scale); losses and the weights that are "
        "trained stay float32",
    )
    max_skipped: Count = Field(
        10, description="stop after this many iterations in a row without a finite loss and gradient"
    )
    validate_every: Count = Field(500, description="iterations between two measurements on the held-out crops")
    validation_crops: Count = Field(8, description="number of held-out crops")
    validation_size: Measured = Field(512, description="side of the held-out crops in pixels")
    checkpoint_every: Count = Field(500, description="iterations between two checkpoints, from which a run resumes")
    keep_checkpoints: Count = Field(2, description="number of checkpoints kept, the newest")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of data, noise and drawn steps")
    num_workers: Annotated[int, Field(ge=0, le=256)] = Field(0, description="data-loading processes")
    prefetch_factor: Annotated[int, Field(ge=1, le=256)] = Field(2, description="batches that each of them holds ready")
    output_dir: Text = Field("runs/rfsr", description="folder for everything the run writes")
    lora_rank: Annotated[int, Field(ge=0, le=4096)] = Field(
        0,
        description="0 trains all weights; otherwise adapters of this rank, whose base model is the reference; they "
        "stay float32 when model_options {torch_dtype: bfloat16} holds all else in half precision",
    )
    lora_targets: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"), description="names of the modules that get adapters"
    )

    @model_validator(mode="before")
    @classmethod
    def _name_of_model(cls, values: Any) -> Any:
        """``model: {name: seesr, weights: DIR}`` is ``model: seesr`` with ``model_options: {weights: DIR}``."""
        if not isinstance(values, dict) or not isinstance(values.get("model"), Mapping):
            return values
        options = dict(values["model"])
        if not isinstance(name := options.pop("name", None), str):
            raise ValueError(
                f"model must be a name or such as {{name: seesr, weights: DIR}}, got {_shown(values['model'])}"
            )
        return {**values, "model": name, "model_options": options | dict(values.get("model_options") or {})}

    @field_validator("data", mode="before")
    @classmethod
    def _check_data(cls, data: Any) -> str | list[str | dict[str, Any]] | dict[str, Any]:
        if isinstance(data, Mapping) and "stream" in data:
            return _valid(StreamRoot, {str(k): value for k, value in data.items()}, lambda name: f"data.{name}")
        roots = [data] if isinstance(data, Mapping) else data
        if isinstance(roots, (list, tuple)) and roots:
            return [_check_root(f"data[{i}]", root) for i, root in enumerate(roots)]
        if isinstance(data, str) and data.strip():
            return data
        raise ValueError(
            "data must be a folder, a list of folders, each a path or a mapping such as {path: FFHQ/, limit: 10000} or "
            f"{{lr: LR/, gt: HR/}}, photographs, or package.module:Name, got {_shown(data)}"
        )

    @field_validator("degradation", mode="before")
    @classmethod
    def _check_degradation(cls, degradation: Any) -> str | dict[str, Any]:
        preset = degradation.get("preset") if isinstance(degradation, Mapping) else degradation
        if preset not in DEGRADATIONS:
            raise ValueError(
                f"degradation must be {', '.join(DEGRADATIONS)}, or a mapping of one of them and changes, such as "
                f"{{preset: realesrgan-a, scale: 2}}, got {_shown(degradation)}"
            )
        create_degradation(degradation)  # for its checks alone
        return dict(degradation) if isinstance(degradation, Mapping) else degradation

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size must be a multiple of gradient_accumulation_steps ({self.gradient_accumulation_steps}), "
                f"got {self.batch_size}"
            )
        return self

    def check_packages(self) -> None:
        """Refuse what cannot run here, before anything is loaded.

        Raises:
            ModuleNotFoundError: if a setting needs a package that is not installed.
        """
        if self.lora_rank:
            require("peft", "lora_rank", "pip install 'rfsr_ext[lora]'")
        if self.optimizer == "adam-8bit":
            require("bitsandbytes", "optimizer adam-8bit", "pip install 'rfsr_ext[8bit]', or write adam")

    def differs(self, other: Mapping[str, Any]) -> list[str]:
        """Keys in which a run with ``other`` would give another result, for deciding whether it can be resumed."""
        mine = self.to_dict()
        return sorted(key for key in mine if key not in self.free_on_resume and mine[key] != other.get(key))


class RFSRConfig(RunConfig):
    """Every setting of `RFSRTrainer`; the defaults are the paper's (section 4.1).

    Raises:
        ValueError: see `RunConfig`.
    """

    presets = ("mini", "paper", "paper-seesr", "paper-pasd", "paper-diffbir", "paper-diffbir-tag")

    method: Literal["rfsr"] = Field("rfsr", description="the method that trains: rfsr")
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="sampling steps of the rollout; null takes the model's own"
    )
    points_per_rollout: Annotated[int, Field(ge=1, le=1000)] = Field(
        1,
        description="iterations in a row that train on one batch, at as many steps of its trajectory, which goes on "
        "from each to the next; 1 is the paper's; iterations and checkpoint_every must be multiples of it",
    )
    guidance_scale: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="of classifier-free guidance in the rollout; null for none"
    )
    negative_prompt: str = Field("", description="of classifier-free guidance")
    structure_window: Window | None = Field(
        (1, 20), description="where the structure loss acts, [first, last] in window_unit, ends included; null: nowhere"
    )
    reward_window: Window | None = Field(
        (41, 50), description="where rewards and style loss act, [first, last] in window_unit; null: nowhere"
    )
    window_unit: Literal["steps", "timesteps", "noise"] = Field(
        "steps",
        description="of both windows: steps (from 1), timesteps (0 to 1000) or noise (the share σ² / (α² + σ²))",
    )
    allow_overlap: bool = Field(
        False, description="let both windows cover a step, which then gets all losses (Table 2, third row)"
    )
    structure_loss: Literal["haar-ll", "l1", "none"] = Field(
        "haar-ll", description="haar-ll (eq. 2), l1 or none (Table 5)"
    )
    structure_level: Annotated[int, Field(ge=1, le=8)] = Field(
        1,
        description="of the LL band that haar-ll compares: 1 is the paper's; 2 leaves free all that a low-resolution "
        "image of a quarter of the side does not hold. Each level doubles the band's values, and with them the loss",
    )
    lambda_structure: Weight = Field(5e-4, description="weight of the structure loss, λ_dwt")
    rewards: dict[str, Any] = Field(
        {"clipiqa": 5e-5, "image-reward": 5e-5},
        description="by reward name or package.module:Name of a function that returns a Reward: its weight (λ_clipiqa, "
        "λ_iw of eq. 5), or a mapping such as {weight: 5.0e-6, cap: 2, steps: [45, 50]} (see WeightedReward)",
    )
    balance_rewards: bool = Field(
        False, description="bring the rewards' image gradients to one norm before they are weighed"
    )
    style_loss: Literal["gram", "kl", "none"] = Field(
        "gram", description="gram (eq. 6), kl (mean squared change of the predicted noise) or none (Table 4)"
    )
    lambda_style: Weight = Field(5e-5, description="weight of the style loss, λ_r")
    frozen_dtype: Literal["bfloat16", "float16"] | None = Field(
        None,
        description="hold the large weights of networks that are not trained (VAE, text encoder, reference, rewards) "
        "in bfloat16 or float16; null as they are loaded, and so they are saved in any case",
    )
    offload_reference: bool = Field(
        False, description="keep the frozen reference on the CPU except while it is used; with lora_rank there is none"
    )
    vgg_weights: Literal["imagenet", "random"] = Field(
        "imagenet", description="of VGG19 in the Gram loss: imagenet, or random, a stand-in that needs no file"
    )
    max_psnr_drop: Annotated[float, Field(ge=-100, le=100)] = Field(
        1.0, description='a checkpoint is "best" only if its held-out PSNR is at most this many dB below the base model'
    )

    @field_validator("rewards", mode="before")
    @classmethod
    def _check_rewards(cls, rewards: Any) -> dict[str, float | dict[str, Any]]:
        if not isinstance(rewards, Mapping) or not all(str(name).strip() for name in rewards):
            raise _Unusable
        return {str(name): _check_reward(f"rewards.{name}", term) for name, term in rewards.items()}

    @model_validator(mode="after")
    def _check_points(self) -> Self:
        for name in ("iterations", "checkpoint_every"):  # no checkpoint then stands in the middle of a trajectory
            if getattr(self, name) % self.points_per_rollout:
                raise ValueError(
                    f"{name} must be a multiple of points_per_rollout ({self.points_per_rollout}), got "
                    f"{getattr(self, name)}"
                )
        if self.points_per_rollout > 1 and self.max_seconds is not None:
            raise ValueError(
                f"max_seconds must be null with points_per_rollout above 1, because it may end a run in the middle of "
                f"a trajectory, got {self.max_seconds:g}"
            )
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        for name in ("structure_window", "reward_window"):
            window = getattr(self, name)
            low, high, wanted = {
                "steps": (1, self.num_inference_steps or 1000, "whole sampling steps"),
                "timesteps": (0, 1000, "timesteps"),
                "noise": (0, 1, "noise shares"),
            }[self.window_unit]
            if window is None:
                continue
            whole = self.window_unit != "steps" or all(isinstance(edge, int) for edge in window)
            if not (whole and low <= window[0] <= window[1] <= high):
                raise ValueError(
                    f"{name} must be [first, last], {wanted} from {low} to {high} in order, got {list(window)} "
                    f"(window_unit: {self.window_unit})"
                )
        structure = self.structure_window if self.structure_loss != "none" else None
        if structure is None and self.reward_window is None:
            raise ValueError(
                "structure_window with a structure_loss, or reward_window, must be given, because without both nothing "
                "is trained, got neither"
            )
        if structure and self.reward_window and not self.allow_overlap:
            # Sampling steps rise in time, timesteps and noise fall, so the structure window is the upper one there.
            # Whether two ranges that only touch share a step, the sampler's own timesteps say.
            if self.window_unit == "steps":
                apart = structure[1] < self.reward_window[0]
            else:
                apart = self.reward_window[1] <= structure[0]
            if not apart:
                raise ValueError(
                    f"structure_window must end before reward_window begins in sampling, got {list(structure)} and "
                    f"{list(self.reward_window)} (window_unit: {self.window_unit}); set allow_overlap to give steps "
                    "both losses"
                )
        return self


def read_values(
    path: str | Path, presets: Sequence[str], overrides: Mapping[str, Any] | None = None, folder: str = ""
) -> tuple[dict[str, Any], str]:
    """What a YAML file or a preset says, with ``overrides``, and what an error should call it.

    Raises:
        FileNotFoundError: if there is neither a file nor a preset of that name.
        ValueError: if the file is no YAML mapping.
    """
    values, source = read_settings(path, presets, "config", folder)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold 'key: value' lines, got a {type(values).__name__}")
    return values | dict(overrides or {}), source


def create_degradation(degradation: str | Mapping[str, Any]) -> Degradation:
    """What a configuration's ``degradation`` says: a preset by name, or a mapping of its name and changes."""
    if isinstance(degradation, str):
        return Degradation.preset(degradation)
    changes = {str(key): value for key, value in degradation.items() if key != "preset"}
    try:
        return Degradation.preset(degradation["preset"], **changes)
    except ValueError as error:
        raise ValueError(f"degradation: {error}") from None


def _check_reward(key: str, term: Any) -> float | dict[str, Any]:
    """A weight, or those of `RewardTerm`'s keys that are given."""
    if not isinstance(term, Mapping):
        return _valid(RewardTerm, {"weight": term}, lambda _: key)["weight"]
    if "weight" not in term and RewardTerm.model_fields.keys() >= term.keys():
        raise ValueError(f"{key} must have a weight, got {_shown(dict(term))}")
    options = _valid(RewardTerm, {str(name): value for name, value in term.items()}, lambda name: f"{key}.{name}")
    try:
        WeightedReward(None, **options)  # for its checks alone; the reward is loaded later
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _check_root(key: str, root: Any) -> str | dict[str, Any]:
    """A path, or those of `DataRoot`'s keys that are given."""
    if isinstance(root, str) and root.strip():
        return root
    if not isinstance(root, Mapping):
        raise ValueError(f"{key} must be a path or a mapping with path, or with lr and gt, got {_shown(root)}")
    options = _valid(DataRoot, {str(name): value for name, value in root.items()}, lambda name: f"{key}.{name}")
    try:
        Root(**options)  # for its checks alone; the folders are looked into later
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return options


def _valid(model: type[_Values], options: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    try:
        return model.model_validate(options).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ValueError(_sentence(model, error, options, rename)) from None


# -- reading values ---------------------------------------------------------------------------------------------------


def _leaves(annotation: Any) -> set[Any]:
    """The types and words inside an annotation such as ``tuple[float, float] | None``."""
    parts = get_args(annotation)
    if not parts or isinstance(annotation, str):
        return {annotation}
    return set().union(*(_leaves(part) for part in parts))


def _as_meant(value: Any, leaves: set[Any]) -> Any:
    """What YAML 1.1 read, as it was meant: ``no`` and ``off`` are words where words stand, 5e-6 and 1e4 are numbers."""
    if isinstance(value, (list, tuple)):
        return [_as_meant(item, leaves) for item in value]
    if isinstance(value, bool):
        if Any in leaves or bool in leaves:
            return value
        for word in ("no", "none"):
            if value is False and word in leaves:
                return word
        raise _Unusable
    if leaves & {int, float} and not leaves & {str, Any}:
        return _number(value)
    if bool in leaves and Any not in leaves:
        raise _Unusable
    return value


def _without_paths(value: Any) -> Any:
    """Paths as text, wherever they stand: nothing else of a configuration is for one machine's Python alone."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def _number(value: Any) -> Any:
    """Text or another library's number as Python's; anything else as it is, for pydantic to judge."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


# -- one sentence for what is wrong -----------------------------------------------------------------------------------


def _sentence(
    model: type[BaseModel], error: ValidationError, values: Mapping[str, Any], rename: Callable[[str], str] = str
) -> str:
    """The first error of pydantic's: which key (as ``rename`` gives its path), what was wanted, what was given."""
    errors = error.errors(include_url=False)
    unknown = [str(entry["loc"][0]) for entry in errors if entry["type"] == "extra_forbidden"]
    if unknown:
        key, known = unknown[0], list(model.model_fields)
        advice = _OLD_KEYS.get(key) or did_you_mean(key, known) or f"valid are {', '.join(known)}"
        return f"unknown key {rename(key)!r}; {advice}"
    first = errors[0]
    if first["type"] == "value_error":  # one of ours, which is a sentence
        return str(first["ctx"]["error"])
    key = str(first["loc"][0])
    given = values[key]
    schema = model.model_json_schema()["properties"][key]
    sentence = f"{rename(key)} must be {_wanted(schema)}, got {_shown(given)}"
    if schema.get("type") == "string" and not schema.keys() & {"enum", "const"} and isinstance(given, (int, float)):
        sentence += "; in quotes it is text"
    words = [word for part in (schema, *schema.get("anyOf", ())) for word in part.get("enum", ())]
    if not words or not isinstance(given, str):
        return sentence
    now = _OLD_VALUES.get(given)
    advice = f"write {now}" if now in words else did_you_mean(given, words)
    return f"{sentence}; {advice}" if advice else sentence


def _wanted(schema: Mapping[str, Any]) -> str:
    """A field's JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_wanted(part) for part in schema["anyOf"])
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        *others, last = schema["enum"]
        return f"{', '.join(others)} or {last}"
    kind = schema["type"]
    if kind == "array":
        pair = schema.get("prefixItems")
        return f"[a, b], each {_wanted(pair[0])}" if pair else f"a list of {_wanted(schema['items'])}"
    if kind == "string" and "pattern" in schema:
        return "text that is not empty"
    words = {"integer": "a whole number", "number": "a finite number", "boolean": "true or false", "null": "null",
             "string": "text", "object": "a mapping of names to weights or options"}[kind]  # fmt: skip
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
              "multipleOf": "a multiple of"}  # fmt: skip
    limits = ", ".join(f"{word} {schema[bound]:.10g}" for bound, word in bounds.items() if bound in schema)
    return f"{words} ({limits})" if limits else words


def _shown(value: Any) -> str:
    """A value in one short line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}..."
