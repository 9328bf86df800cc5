"""The generic base model: any Stable-Diffusion-like U-Net with a ControlNet, made of diffusers parts.

Saved as an ordinary diffusers folder that `diffusers.StableDiffusionControlNetPipeline.from_pretrained` opens; the few
facts diffusers has no place for (scale and recipe) lie beside it in ``isr_config.json``.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from rfsr_ext.files import replace_folder
from rfsr_ext.models.base import Condition, ISRModel, Recipe

__all__ = ["ISR_CONFIG", "ControlNetISRModel"]

ISR_CONFIG = "isr_config.json"
"""The file in a model's folder that holds what diffusers has no place for."""

_PIPELINE = "StableDiffusionControlNetPipeline"
_NETWORKS = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "unet": UNet2DConditionModel,
    "controlnet": ControlNetModel,
}


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Opening or writing a folder takes a second and would show progress bars."""
    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


class ControlNetISRModel(ISRModel):
    """Image super-resolution with a ControlNet over a latent diffusion model.

    The ControlNet sees the enlarged LR image as ``controlnet_cond``, the U-Net the prompt.

    Args:
        vae, text_encoder, tokenizer, unet, controlnet, scheduler: the diffusers parts.
        scale: output size over input size.
        recipe: the authors' values.
        trained: see `ISRModel`; all of U-Net and ControlNet by default, as in the paper. ``{"controlnet": ""}`` or
            ``{"unet": "attentions", "controlnet": ""}`` train less.

    Raises:
        ValueError: if the parts do not fit each other, or the scheduler cannot serve.
    """

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
    ):
        self.networks = {"vae": vae, "text_encoder": text_encoder, "unet": unet, "controlnet": controlnet}
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.trained = {"unet": "", "controlnet": ""} if trained is None else dict(trained)
        self.scale, self.recipe = scale, recipe or Recipe()
        # read once: wrapped modules (several processes, adapters) have no config
        self.latent_channels = unet.config.in_channels
        self.scaling_factor = vae.config.scaling_factor
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = self.vae_scale_factor * 2 ** (len(unet.config.block_out_channels) - 1)
        for name, wanted, given in (
            ("vae latent_channels", unet.config.in_channels, vae.config.latent_channels),
            ("controlnet in_channels", unet.config.in_channels, controlnet.config.in_channels),
            ("controlnet conditioning_channels", 3, controlnet.config.conditioning_channels),
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

    @torch.no_grad()
    def condition(self, lr: Tensor, prompts: list[str], negative_prompts: list[str] | None = None) -> Condition:
        """Enlarge ``lr`` bicubically for the ControlNet and embed the prompts; see `ISRModel.condition`."""
        self.check_lr(lr, prompts, negative_prompts)
        lr = lr.to(self.device, self.dtype)
        image = F.interpolate(lr, scale_factor=self.scale, mode="bicubic").clamp(0, 1)
        spatial = {"controlnet_cond": image}

        def conditioned_on(texts: list[str], negative: Condition | None) -> Condition:
            shared = {"encoder_hidden_states": self.encode_prompts(texts)}
            return Condition(image, list(texts), spatial, shared, negative)

        negative = None if negative_prompts is None else conditioned_on(negative_prompts, None)
        return conditioned_on(prompts, negative)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompts to ``[N, L, D]``; gradients reach the text encoder where its parameters ask for them."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    # -- networks -------------------------------------------------------------------------------------------------

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        timestep = torch.as_tensor(timestep, device=latents.device).expand(latents.shape[0])
        text = condition.shared["encoder_hidden_states"]
        down_residuals, mid_residual = self.controlnet(
            latents,
            timestep,
            encoder_hidden_states=text,
            controlnet_cond=condition.spatial["controlnet_cond"],
            return_dict=False,
        )
        return self.unet(
            latents,
            timestep,
            encoder_hidden_states=text,
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
        """Write an ordinary diffusers folder plus ``isr_config.json``, complete or not at all.

        What else lies in the folder stays (see `rfsr_ext.files.replace_folder`).
        """
        parts = {**self.networks, "tokenizer": self.tokenizer, "scheduler": self.scheduler}
        index: dict[str, Any] = {"_class_name": _PIPELINE, "_diffusers_version": diffusers.__version__}
        for name, part in parts.items():
            index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
        index |= {"feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None]}
        index["requires_safety_checker"] = False
        config = {"model": "controlnet", "scale": self.scale, "trained": self.trained, "recipe": self.recipe.to_dict()}
        with replace_folder(path) as folder, _no_bars():
            for name, part in parts.items():
                part.save_pretrained(folder / name)
            for name, values in (("model_index.json", index), (ISR_CONFIG, config)):
                (folder / name).write_text(json.dumps(values, indent=2, sort_keys=name != ISR_CONFIG) + "\n")

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
            recipe: fields of `Recipe` that replace those of ``isr_config.json``, such as ``start="noise"``.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if it holds another kind of model.
            TypeError: for a recipe field that does not exist.
        """
        path = Path(path)
        config = path / ISR_CONFIG
        stored: dict[str, Any] = json.loads(config.read_text()) if config.is_file() else {}
        known = {f.name for f in dataclasses.fields(Recipe)}
        for name in recipe:
            if name not in known:
                raise TypeError(f"recipe field must be one of {', '.join(sorted(known))}, got {name!r}")
        classes = _read_index(path, own_controlnet=controlnet is None)
        with _no_bars():
            parts: dict[str, Any] = {}
            for name, kind in _NETWORKS.items():
                folder = Path(controlnet) if name == "controlnet" and controlnet is not None else path / name
                if not folder.is_dir():
                    raise FileNotFoundError(
                        f"{name} folder {str(folder)!r} does not exist; give a complete model folder"
                    )
                parts[name] = kind.from_pretrained(folder, local_files_only=True)
            parts["tokenizer"] = CLIPTokenizer.from_pretrained(path / "tokenizer", local_files_only=True)
            parts["scheduler"] = getattr(diffusers, classes["scheduler"]).from_pretrained(path / "scheduler")
        merged = Recipe(**(stored.get("recipe", {}) | recipe))
        scale = stored.get("scale", 4) if scale is None else scale
        model = cls(**parts, scale=scale, recipe=merged, trained=stored.get("trained") if trained is None else trained)
        return model.to(model.device, torch_dtype)  # diffusers' own argument for it changes its name between releases


def _read_index(path: Path, own_controlnet: bool) -> dict[str, str]:
    """The class of each part of a diffusers folder.

    Raises:
        FileNotFoundError, ValueError: one sentence for each way in which a folder is not what it should be.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"model folder {str(path)!r} does not exist; give a folder on disk or one of list_models()"
        )
    index = path / "model_index.json"
    if not index.is_file():
        what = "a file" if path.is_file() else "a folder without model_index.json"
        raise ValueError(
            f"model must be a diffusers folder (model_index.json, unet/, controlnet/ …), got {what}: {str(path)!r}"
        )
    entries = json.loads(index.read_text())
    classes = {name: value[1] for name, value in entries.items() if isinstance(value, list) and len(value) == 2}
    if own_controlnet and classes.get("controlnet") is None:
        raise ValueError(
            f"model folder {str(path)!r} is a {entries.get('_class_name')} without ControlNet; give its folder as "
            f"controlnet=, or a {_PIPELINE} folder"
        )
    for name, kind in _NETWORKS.items():
        if name != "controlnet" and classes.get(name) != kind.__name__:
            raise ValueError(
                f"{name} in {str(path)!r} must be a {kind.__name__}, got {classes.get(name)}; this class opens Stable "
                f"Diffusion 1.x and 2.x with a ControlNet"
            )
    if not hasattr(diffusers, classes.get("scheduler") or ""):
        raise ValueError(f"scheduler in {str(path)!r} must be one of diffusers, got {classes.get('scheduler')}")
    return classes
