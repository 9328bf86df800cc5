"""The generic base model: any Stable-Diffusion-like U-Net with a ControlNet, made of diffusers parts.

Saved as an ordinary diffusers folder that `diffusers.StableDiffusionControlNetPipeline.from_pretrained` opens; the few
facts diffusers has no place for (scale and recipe) lie beside it in ``isr_config.json``.
"""

import logging
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.schedulers import SchedulerMixin
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from rfsr_ext.models.base import Condition, ISRModel, Recipe, Tagger
from rfsr_ext.models.folders import (
    open_part,
    open_plain_part,
    read_config,
    read_index,
    require_classes,
    write_folder,
)

__all__ = ["ControlNetISRModel", "open_tokenizer_and_scheduler"]

logger = logging.getLogger(__name__)

_PIPELINE = "StableDiffusionControlNetPipeline"


class ControlNetISRModel(ISRModel):
    """Image super-resolution with a ControlNet over a latent diffusion model.

    The ControlNet sees the enlarged LR image as ``controlnet_cond``, the U-Net the prompt.

    Args:
        vae, text_encoder, tokenizer, unet, controlnet, scheduler: the diffusers parts.
        scale: output size over input size.
        recipe: the authors' values.
        trained: see `ISRModel`; all of U-Net and ControlNet by default, as in the paper. ``{"controlnet": ""}`` or
            ``{"unet": "attentions", "controlnet": ""}`` train less.
        tagger: see `ISRModel`.

    Raises:
        ValueError: if the parts do not fit each other, or the scheduler cannot serve.
    """

    kind: ClassVar[str] = "controlnet"  # what load_model knows it by
    classes: ClassVar[dict[str, type]] = {  # of the networks in its folder
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "unet": UNet2DConditionModel,
        "controlnet": ControlNetModel,
    }
    optional: ClassVar[frozenset[str]] = frozenset()  # which of them a folder may lack
    arguments: ClassVar[frozenset[str]] = frozenset({"tagger"})  # of the class, that from_pretrained passes on
    opens: ClassVar[str] = "Stable Diffusion 1.x and 2.x with a ControlNet"
    conditioning_channels: ClassVar[int] = 3  # of what `control` gives to the ControlNet
    _said_cut: bool = False

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        scheduler: SchedulerMixin,
        scale: int = 4,
        recipe: Recipe | None = None,
        trained: dict[str, str] | None = None,
        tagger: Tagger | None = None,
    ):
        self.networks = {"vae": vae, "text_encoder": text_encoder, "unet": unet, "controlnet": controlnet}
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.trained = {"unet": "", "controlnet": ""} if trained is None else trained
        self.scale, self.recipe, self.tagger = scale, recipe or Recipe(), tagger
        # read once: wrapped modules (several processes, adapters) have no config
        self.latent_channels = unet.config.in_channels
        self.scaling_factor = vae.config.scaling_factor
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = self.vae_scale_factor * 2 ** (len(unet.config.block_out_channels) - 1)
        for name, wanted, given in (
            ("vae latent_channels", unet.config.in_channels, vae.config.latent_channels),
            ("controlnet in_channels", unet.config.in_channels, controlnet.config.in_channels),
            ("controlnet conditioning_channels", self.conditioning_channels, controlnet.config.conditioning_channels),
            ("text_encoder hidden_size", unet.config.cross_attention_dim, text_encoder.config.hidden_size),
        ):
            if wanted != given:
                raise ValueError(f"{name} must be {wanted} to fit the unet, got {given}; give parts of one model")
        super().__init__()

    @property
    def vae(self) -> nn.Module:
        return self.networks["vae"]

    @property
    def text_encoder(self) -> nn.Module:
        return self.networks["text_encoder"]

    @property
    def unet(self) -> nn.Module:
        return self.networks["unet"]

    @property
    def controlnet(self) -> nn.Module:
        return self.networks["controlnet"]

    # -- conditioning ---------------------------------------------------------------------------------------------

    def control(self, image: Tensor) -> dict[str, Tensor]:
        return {"controlnet_cond": image}

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.encode_prompts(prompts)}

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompts to ``[N, L, D]``; gradients reach the text encoder where its parameters ask for them.

        That one is longer than the text encoder takes, and cut, is said once.
        """
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        if not self._said_cut and tokens.attention_mask.all(1).any():  # full, or more than that
            given = max(len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids)
            if given > (most := tokens.input_ids.shape[1]):
                self._said_cut = True
                logger.warning("a prompt of %d tokens is cut to the %d that the text encoder takes", given, most)
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    # -- networks -------------------------------------------------------------------------------------------------

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        timestep = torch.as_tensor(timestep, device=latents.device).expand(latents.shape[0])
        down_residuals, mid_residual = self.controlnet(
            latents,
            timestep,
            **condition.shared,
            **condition.spatial,
            return_dict=False,
        )
        return self.unet(
            latents,
            timestep,
            **condition.shared,
            down_block_additional_residuals=down_residuals,
            mid_block_additional_residual=mid_residual,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images.to(self.dtype) * 2 - 1).latent_dist.mode() * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.scaling_factor, return_dict=False)[0] / 2 + 0.5

    # -- storage --------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Write an ordinary diffusers folder plus ``isr_config.json``, see `rfsr_ext.models.folders.write_folder`."""
        parts = {**self.networks, "tokenizer": self.tokenizer, "scheduler": self.scheduler}
        others: dict[str, Any] = dict.fromkeys(("feature_extractor", "image_encoder", "safety_checker"), [None, None])
        config = {"model": self.kind, "scale": self.scale, "trained": self.trained, "recipe": self.recipe.to_dict()}
        others["requires_safety_checker"] = False
        write_folder(path, _PIPELINE, parts, others, config | self.settings())

    def settings(self) -> dict[str, Any]:
        """What a subclass wants to find again in ``isr_config.json``: arguments of its class, as JSON."""
        return {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        controlnet: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        scale: int | None = None,
        trained: dict[str, str] | None = None,
        **recipe,
    ) -> Self:
        """Open a diffusers folder on disk; nothing is downloaded.

        Args:
            path: a folder that `save_pretrained` wrote, or any folder of a Stable Diffusion model with a ControlNet.
            controlnet: the ControlNet's own folder, for a Stable Diffusion folder that holds none.
            torch_dtype: of all networks.
            scale, trained: as in the class; those of ``isr_config.json`` by default, else the class's own.
            recipe: fields of `Recipe` that replace those of ``isr_config.json``, such as ``start="noise"``; and what
                the class itself takes besides, such as ``tagger=``.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if it holds another kind of model, or weights are missing, unknown or damaged.
            TypeError: for a recipe field that does not exist.
        """
        path = Path(path)
        stored = read_config(path, cls)
        own = {name: stored.pop(name, None) for name in ("scale", "trained", "recipe")}
        scale = next((given for given in (scale, own["scale"]) if given is not None), 4)
        trained = own["trained"] if trained is None else trained
        given = {name: recipe.pop(name, None) for name in cls.arguments}
        stored |= {name: value for name, value in given.items() if value is not None}
        merged = Recipe().replace(**(own["recipe"] or {})).replace(**recipe)
        parts = cls._open_parts(path, controlnet, torch_dtype)
        return cls(**parts, scale=scale, recipe=merged, trained=trained, **stored)

    @classmethod
    def _open_parts(cls, path: Path, controlnet: str | Path | None, dtype: torch.dtype) -> dict[str, Any]:
        found = read_index(path)
        if controlnet is None and found.get("controlnet") is None:
            raise ValueError(
                f"model folder {str(path)!r} is a {found['_class_name']} without ControlNet; give its folder as "
                f"controlnet=, or a {_PIPELINE} folder"
            )
        places = {
            name: Path(controlnet) if name == "controlnet" and controlnet is not None else path / name
            for name in cls.classes
            if name not in cls.optional or found.get(name) is not None
        }
        inside = {name: cls.classes[name] for name, place in places.items() if place == path / name}
        require_classes(path, inside, f"this class opens {cls.opens}")
        parts: dict[str, Any] = {n: open_part(cls.classes[n], place, dtype, n) for n, place in places.items()}
        return parts | open_tokenizer_and_scheduler(path)


def open_tokenizer_and_scheduler(path: Path) -> dict[str, Any]:
    """The two parts of a Stable Diffusion folder that are no networks.

    Raises:
        ValueError: if the scheduler is none of diffusers.
    """
    scheduler = read_index(path).get("scheduler")
    if not hasattr(diffusers, scheduler or ""):
        raise ValueError(f"scheduler in {str(path)!r} must be one of diffusers, got {scheduler}")
    return {
        "tokenizer": open_plain_part(CLIPTokenizer, path / "tokenizer"),
        "scheduler": open_plain_part(getattr(diffusers, scheduler or ""), path / "scheduler"),
    }
