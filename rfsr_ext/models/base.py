"""What RFSR asks of a diffusion super-resolution model, and the code that is the same for every one of them."""

import copy
import dataclasses
import hashlib
import math
import numbers
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from rfsr_ext.models.process import NonUniformProcess, Process, check_scheduler

__all__ = ["Condition", "ISRModel", "Recipe", "Tagger", "fingerprint"]

Tagger = Callable[[Tensor], list[str]]
"""Images ``[N, 3, h, w]`` in [0, 1] to a prompt for each, such as "cat, fur"."""

_STARTS = ("lr", "noise")
_NOISINGS = ("plain", "to-start")
_SPACINGS = ("uniform", "ccsr-v1", "ccsr-v2")
_COLOR_FIXES = ("wavelet", "adain", None)
_UNITS = ("steps", "timesteps", "noise")
_WHOLE = {"num_inference_steps": (1, 1000), "start_timestep": (0, 1000), "tile": (1, 2**20), "overlap": (0, 2**20),
          "min_side": (0, 2**20)}  # fmt: skip


def _number(name: str, value: Any, low: int, high: int, whole: bool = True) -> Any:
    """It, if it is a number within the bounds; NaN is within none."""
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high
    if not good or (whole and value != int(value)):
        raise ValueError(f"{name} must be a {'whole ' * whole}number from {low} to {high}, got {str(value)[:40]}")
    return int(value) if whole else value


@dataclass(frozen=True)
class Condition:
    """Everything a denoising step is conditioned on, encoded once per batch.

    Tensors are sorted by what tiled sampling does with them.

    Attributes:
        image: what the result is compared with and takes its colors from, ``[N, 3, H, W]`` nominally in [0, 1] at the
            output's size: the enlarged LR image (paper: I_lr), or what a first stage made of it (DiffBIR).
        prompts: one per image; rewards with text score against them.
        spatial: tensors that tiles cut, by the name the network gives them: a control image ``[N, 3, H, W]`` or
            a control latent ``[N, C, h, w]``.
        shared: tensors that all tiles share, batch first: text embeddings, pooled text, image tokens, guidance.
        negative: the condition of classifier-free guidance, or None.
    """

    image: Tensor
    prompts: list[str]
    spatial: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    negative: "Condition | None" = None

    def __len__(self) -> int:
        return self.image.shape[0]

    def __getitem__(self, part: slice) -> "Condition":
        """A part of the batch."""
        return Condition(
            self.image[part],
            self.prompts[part],
            {name: x[part] for name, x in self.spatial.items()},
            {name: x[part] for name, x in self.shared.items()},
            None if self.negative is None else self.negative[part],
        )

    def tiles(self, cut: Callable[[Tensor], Tensor], count: int) -> "Condition":
        """The condition of ``count`` tiles of the only image; ``cut`` takes a spatial tensor to a batch of tiles."""
        return Condition(
            cut(self.image),
            self.prompts * count,
            {name: cut(x) for name, x in self.spatial.items()},
            {name: x.expand(count, *x.shape[1:]) for name, x in self.shared.items()},
            None if self.negative is None else self.negative.tiles(cut, count),
        )


@dataclass(frozen=True)
class Recipe:
    """How a model's authors use it; every value can be overridden where it is used.

    Attributes:
        num_inference_steps: sampling steps.
        start: x_T is the encoded enlarged LR image noised to the first timestep ("lr", SeeSR), or pure noise ("noise",
            DiffBIR).
        guidance_scale: of classifier-free guidance at inference; 1 is none.
        added_prompt: appended to every prompt at inference, such as "clean, high-resolution, 8k".
        negative_prompt: of classifier-free guidance.
        temperature: of the noise in x_T, a factor: 1 as trained; with less the result has less texture and is nearer to
            the truth.
        start_timestep: with "lr" the timestep whose noise is added; None for the first one of the trajectory.
        noising: what the network was trained on: z_t = α_t z_0 + σ_t ε ("plain"), or states on the straight way from
            z_0 to where "lr" starts ("to-start"), see `ISRModel.training_noise`. It matters where x_T is more LR image
            than noise: α_T / σ_T is 0.07 in Stable Diffusion and 8 in the mini model.
        spacing: of the timesteps: "uniform", or "ccsr-v1" or "ccsr-v2" for one leap to ``t_max``, steps to ``t_min``
            and the estimate there, see `rfsr_ext.models.NonUniformProcess`.
        t_max, t_min: shares of the schedule, where ``spacing`` is one of CCSR's.
        color_fix: of upscaling, "wavelet", "adain" or None.
        tile, overlap: of upscaling in tiles, in pixels of the result.
        min_side: a result with a shorter side is made from an LR image enlarged to reach it, and made smaller again.
        structure_window, reward_window: which steps get which loss, in ``window_unit``; None for none.
        window_unit: "steps", "timesteps" or "noise", see `rfsr_ext.sampling.TimestepWindows`.

    Raises:
        ValueError: if a value is out of range.
    """

    num_inference_steps: int = 50
    start: str = "lr"
    guidance_scale: float = 1.0
    added_prompt: str = ""
    negative_prompt: str = ""
    temperature: float = 1.0
    start_timestep: int | None = None
    noising: str = "plain"
    spacing: str = "uniform"
    t_max: float = 2 / 3
    t_min: float = 1 / 3
    color_fix: str | None = "wavelet"
    tile: int = 512
    overlap: int = 128
    min_side: int = 0
    structure_window: tuple[float, float] | None = (1, 20)
    reward_window: tuple[float, float] | None = (41, 50)
    window_unit: str = "steps"

    def __post_init__(self):
        for name, options in (
            ("start", _STARTS), ("noising", _NOISINGS), ("spacing", _SPACINGS), ("color_fix", _COLOR_FIXES),
            ("window_unit", _UNITS),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in options:
                raise ValueError(f"{name} must be one of {', '.join(map(str, options))}, got {value!r}")
        for name, (low, high) in _WHOLE.items():
            if name != "start_timestep" or self.start_timestep is not None:
                object.__setattr__(self, name, _number(name, getattr(self, name), low, high))
        _number("guidance_scale", self.guidance_scale, 0, 100, whole=False)
        _number("temperature", self.temperature, 0, 100, whole=False)
        for name in ("t_max", "t_min"):
            _number(name, getattr(self, name), 0, 1, whole=False)
        for name in ("added_prompt", "negative_prompt"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {value!r}")
        if self.noising == "to-start" and (self.start != "lr" or self.start_timestep is not None):
            raise ValueError(
                "noising must be plain where sampling does not start from the LR image at its first timestep, got "
                "to-start; give start: lr and start_timestep: null"
            )
        if self.overlap >= self.tile:
            raise ValueError(f"overlap must be smaller than tile, got overlap {self.overlap} and tile {self.tile}")
        for name in ("structure_window", "reward_window"):  # JSON has lists only
            if (window := getattr(self, name)) is None:
                continue
            if not isinstance(window, (list, tuple)) or len(window) != 2:
                raise ValueError(f"{name} must be [first, last] or null, got {window!r}")
            edges = tuple(_number(name, edge, 0, 1000, whole=False) for edge in window)
            object.__setattr__(self, name, edges)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they may stand in JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked again.

        Raises:
            TypeError: for a field that does not exist.
            ValueError: if a value is out of range.
        """
        known = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise TypeError(f"recipe field must be one of {', '.join(sorted(known))}, got {name!r}")
        return dataclasses.replace(self, **changes)


class ISRModel(ABC):
    """A latent diffusion model that turns a low-resolution image into a sharp one ``scale`` times its size.

    A subclass sets the attributes, then calls ``super().__init__()``, and says what differs between models: `predict`,
    `encode` and `decode`; of what networks are conditioned on `control`, `embed` and `embed_image`, and `first_stage`
    where more than an enlargement comes first; `timestep_options` where the scheduler wants more than a number of
    steps.  Latents are ``[N, C, h, w]`` everywhere but inside `predict`.

    Attributes:
        networks: every network by name.  Trainers put wrapped ones (adapters, several processes) in their place here.
        trained: what fine-tuning changes by default: by network a regular expression that the names of its parameters
            are searched for, "" for all of them.  The paper trains ``{"unet": "", "controlnet": ""}``.
        recipe: the authors' values.
        scheduler: a diffusers scheduler, never stepped; see `rfsr_ext.models.Process`.
        scale: output size over input size.
        multiple: output height and width must be multiples of this many pixels.
        latent_channels: channels of the latents.
        vae_scale_factor: pixels per latent, in each direction.
        tagger: says what an image shows; it is not among the networks and not saved.

    Raises:
        ValueError: if the scheduler cannot serve, ``scale`` is no whole number from 1 to 64, or ``trained`` names an
            unknown network or has no regular expression for it.
    """

    networks: dict[str, nn.Module]
    trained: dict[str, str]
    recipe: Recipe
    scheduler: Any
    scale: int
    multiple: int
    latent_channels: int
    vae_scale_factor: int
    tagger: Tagger | None = None

    def __init__(self):
        check_scheduler(self.scheduler)
        self.scale = _number("scale", self.scale, 1, 64)
        if not isinstance(self.trained, Mapping):
            raise ValueError(f"trained must be a mapping of networks to patterns of names, got {self.trained!r}")
        self.trained = dict(self.trained)
        for name, pattern in self.trained.items():
            if name not in self.networks:
                raise ValueError(f"trained must name networks among {', '.join(self.networks)}, got {name!r}")
            try:
                re.compile(pattern)
            except (re.error, TypeError):
                raise ValueError(f"trained must give {name} a regular expression, got {pattern!r}") from None
        for network in self.networks.values():
            network.eval().requires_grad_(False)
        if self.recipe.spacing != "uniform":
            self.process()  # refuses shares and schedulers that cannot serve

    # -- what differs between models ------------------------------------------------------------------------------

    def first_stage(self, lr: Tensor) -> Tensor:
        """The image ``[N, 3, scale·h, scale·w]`` that the result is a better version of: ``lr`` enlarged.

        It is nominally in [0, 1]; a network's need not be clamped.
        """
        return F.interpolate(lr, scale_factor=self.scale, mode="bicubic").clamp(0, 1)

    def control(self, image: Tensor) -> dict[str, Tensor]:
        """What networks see of that image, for `Condition.spatial`; of a large image only a tile is given."""
        return {}

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        """What networks see of the prompts, for `Condition.shared`."""
        return {}

    def embed_image(self, lr: Tensor) -> dict[str, Tensor]:
        """What networks see of the whole LR image, whatever the prompt, for `Condition.shared`: image tokens."""
        return {}

    def describe(self, lr: Tensor) -> list[str]:
        """A prompt for each image, from the tagger; "" where there is none."""
        if self.tagger is None:
            return [""] * len(lr)
        texts = list(self.tagger(lr))
        if len(texts) != len(lr):
            raise ValueError(f"tagger must give one text per image ({len(lr)}), got {len(texts)}")
        return texts

    @abstractmethod
    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The network's output (noise, velocity, z_0 or flow, as the scheduler's ``prediction_type`` says).

        ``latents`` ``[N, C, h, w]`` are scaled for the network already; ``timestep`` is a scalar or ``[N]``.
        """

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1] to latents, without gradient."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images ``[N, 3, H, W]``, nominally in [0, 1], not clamped; differentiable."""

    def timestep_options(self, num_inference_steps: int, size: tuple[int, int]) -> dict[str, Any]:
        """What the scheduler's ``set_timesteps`` wants besides the number of steps, for images of this size."""
        return {}

    # -- what is the same for all ---------------------------------------------------------------------------------

    def process(self, num_inference_steps: int | None = None, size: tuple[int, int] | None = None) -> Process:
        """A fresh noise process for one trajectory, spaced as the recipe says.

        ``size`` is the height and width in pixels of what the network sees at once, by which some models choose their
        noise levels (FLUX); None for the recipe's tile.
        """
        recipe = self.recipe
        steps = recipe.num_inference_steps if num_inference_steps is None else num_inference_steps
        options = self.timestep_options(steps, size or (recipe.tile, recipe.tile))
        if recipe.spacing == "uniform":
            return Process(self.scheduler, steps, **options)
        version = recipe.spacing.removeprefix("ccsr-")
        start = recipe.start_timestep
        return NonUniformProcess(self.scheduler, steps, recipe.t_max, recipe.t_min, version, start, **options)

    @torch.no_grad()
    def condition(self, lr: Tensor, prompts: list[str], negative_prompts: list[str] | None = None) -> Condition:
        """``lr`` ``[N, 3, h, w]`` in [0, 1] and one prompt per image, without gradient.

        With ``negative_prompts``, one per image, the condition holds a second one for classifier-free guidance.

        Raises:
            TypeError, ValueError: as `check_lr` does.
        """
        self.check_lr(lr, prompts, negative_prompts)
        lr = lr.to(self.device, self.dtype)
        image = self.first_stage(lr)
        spatial, tokens = self.control(image), self.embed_image(lr)

        def under(texts: list[str], negative: Condition | None) -> Condition:
            return Condition(image, list(texts), spatial, self.embed(texts) | tokens, negative)

        return under(prompts, None if negative_prompts is None else under(negative_prompts, None))

    @property
    def unit(self) -> int:
        """Pixels of which both sides of an output are a multiple if it is not padded."""
        return math.lcm(self.scale, self.multiple)

    def check_size(self, size: int, called: str) -> None:
        """Refuse crops that would have to be padded.

        Args:
            size: a side of theirs in pixels, of the output's scale.
            called: what the caller named it.

        Raises:
            ValueError: if ``size`` is no multiple of `unit`.
        """
        if size % self.unit:
            raise ValueError(f"{called} must be a multiple of {self.unit} for this model, got {size}")

    def check_lr(self, lr: Tensor, prompts: list[str], negative_prompts: list[str] | None = None) -> None:
        """Refuse what no model can take.

        Raises:
            TypeError: if ``lr`` is not floating point, or prompts are one text.
            ValueError: if a shape, the value range or the number of prompts is wrong, or a value is not finite.
        """
        if lr.ndim != 4 or lr.shape[1] != 3:
            raise ValueError(f"lr must have shape [N, 3, h, w], got {list(lr.shape)}")
        if not lr.is_floating_point():
            raise TypeError(f"lr must be floating point in [0, 1], got {lr.dtype}; divide 8-bit images by 255")
        for name, texts in (("prompts", prompts), ("negative_prompts", negative_prompts)):
            if isinstance(texts, str):  # which has a length, too
                raise TypeError(f"{name} must be a list of one prompt per image of lr, got the text {texts!r}")
            if texts is not None and len(texts) != lr.shape[0]:
                raise ValueError(f"{name} must hold one prompt per image of lr ({lr.shape[0]}), got {len(texts)}")
        unit = self.unit // self.scale
        if any(n % unit for n in lr.shape[2:]):
            raise ValueError(
                f"lr must be a multiple of {unit} pixels high and wide, got "
                f"{lr.shape[2]}x{lr.shape[3]}; rfsr_ext.sampling.upscale pads images of any size"
            )
        if lr.numel() and not (lr.min() >= 0 and lr.max() <= 1):  # also catches NaN
            raise ValueError(
                f"lr must be finite and in [0, 1], got values from {lr.min().item():g} to {lr.max().item():g}"
            )

    def initial_latents(self, condition: Condition, process: Process, generator=None) -> Tensor:
        """x_T, which a rollout starts from; ``generator`` is one `torch.Generator` or a list, one per image."""
        height, width = (n // self.vae_scale_factor for n in condition.image.shape[-2:])
        shape = (len(condition), self.latent_channels, height, width)
        noise = randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype) * self.recipe.temperature
        if self.recipe.start == "noise":
            return noise * process.init_noise_sigma
        start = process.timesteps[0] if self.recipe.start_timestep is None else self.recipe.start_timestep
        return process.add_noise(self.encode(condition.image), noise, start)

    def training_noise(self, latents: Tensor, noise: Tensor, condition: Condition, process: Process) -> Tensor:
        """The noise that takes z_0 to states like those that sampling passes through.

        It is ``noise`` itself, or where the recipe's ``noising`` is "to-start"::

            temperature · ε + (z_LR − z_0) α_T / σ_T

        With it and one z_0 estimate throughout, DDIM's states are z_t = α_t z_0 + σ_t · this, from x_T on.
        """
        if self.recipe.noising == "plain":
            return noise
        return process.noise_towards(self.encode(condition.image), latents, self.recipe.temperature * noise)

    @property
    def _denoiser(self) -> nn.Parameter:
        return next(self.networks[next(iter(self.trained))].parameters())

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents: that of the first network in ``trained``."""
        return self._denoiser.dtype

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move every network, in place."""
        for network in self.networks.values():
            nn.Module.to(network, device=device, dtype=dtype)  # diffusers' own warns of a cast that is meant
        return self

    def trainable_networks(self) -> dict[str, nn.Module]:
        """The networks named in ``trained``, as they are in ``networks`` now."""
        return {name: self.networks[name] for name in self.trained}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What fine-tuning changes, by ``network.parameter``."""
        return {
            f"{network}.{name}": parameter
            for network, pattern in self.trained.items()
            for name, parameter in self.networks[network].named_parameters()
            if re.search(pattern, name)
        }

    def unfreeze(self) -> Self:
        """Let exactly the trained parameters ask for gradients.

        Raises:
            ValueError: if a pattern of ``trained`` matches no parameter.
        """
        for network in self.networks.values():
            network.requires_grad_(False)
        found = self.trained_parameters()
        for network, pattern in self.trained.items():
            if not any(name.startswith(f"{network}.") for name in found):
                raise ValueError(f"trained[{network!r}] must match a parameter of that network, got {pattern!r}")
        for parameter in found.values():
            parameter.requires_grad_(True)
        return self

    def enable_gradient_checkpointing(self) -> Self:
        """Recompute activations in the backward pass instead of keeping them, in every network of diffusers.

        Gradients stay the same, a backward pass takes about one forward pass longer, and passes without gradient are as
        before.  To be called before adapters are added.

        Raises:
            ValueError: if no network can.
        """
        found = [m for m in self.networks.values() if getattr(m, "_supports_gradient_checkpointing", False)]
        if not found:
            raise ValueError(
                f"gradient_checkpointing must be false for a {type(self).__name__}, because none of its networks is "
                "a diffusers model that supports it, got true"
            )
        for network in found:
            network.enable_gradient_checkpointing()  # diffusers' own, non-reentrant
        return self

    def reference(self) -> Self:
        """A frozen copy with trained networks of its own and everything else shared (paper: G_θ′ of eq. 6)."""
        twin = copy.copy(self)
        frozen = {n: copy.deepcopy(m).requires_grad_(False).eval() for n, m in self.trainable_networks().items()}
        twin.networks = self.networks | frozen
        return twin

    def fingerprint(self) -> str:
        """Tells one model from another, see `fingerprint`."""
        return fingerprint(self.networks)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that `rfsr_ext.models.load_model` opens; models that can be saved override it.

        Raises:
            TypeError: if this model cannot be saved.
        """
        raise TypeError(f"{type(self).__name__} cannot be saved; define save_pretrained(path) in it")


def fingerprint(networks: Mapping[str, nn.Module]) -> str:
    """A SHA-256 over names, shapes and the first values of all parameters."""
    digest = hashlib.sha256()
    for network, module in networks.items():
        for name, parameter in module.named_parameters():
            digest.update(f"{network}.{name}{list(parameter.shape)}".encode())
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()
