"""The generic base model: any Stable-Diffusion-like U-Net with a ControlNet, made of diffusers parts.

Saved as an ordinary diffusers folder that `diffusers.StableDiffusionControlNetPipeline.from_pretrained` opens; the few
facts diffusers has no place for (scale, start latent, steps) lie beside it in ``isr_config.json``.
"""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from rfsr_ext.files import replace_folder
from rfsr_ext.models.base import Condition

__all__ = ["ControlNetISRModel"]

_CONFIG_NAME = "isr_config.json"
_STARTS = ("lr", "noise")


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Opening or writing a folder takes a second and would show two progress bars."""
    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def _pipeline_class() -> type:
    """diffusers' pipeline, which brings image processors not used here; without torchvision each would warn."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        from diffusers import StableDiffusionControlNetPipeline
    finally:
        transformers_logging.set_verbosity(level)
    return StableDiffusionControlNetPipeline


class ControlNetISRModel:
    """Image super-resolution with a ControlNet over a latent diffusion model; satisfies `rfsr_ext.models.ISRModel`.

    Args:
        vae, text_encoder, tokenizer, unet, controlnet, scheduler: the diffusers parts.
        scale: output size over input size.
        num_inference_steps: sampling steps.
        start: x_T is the encoded, upscaled LR image noised to the first timestep ("lr", as SeeSR does), or pure noise
            ("noise", as DiffBIR does).
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
        num_inference_steps: int = 50,
        start: str = "lr",
    ):
        if start not in _STARTS:
            raise ValueError(f"start must be one of {_STARTS}, got {start!r}")
        self.vae, self.text_encoder, self.tokenizer = vae.eval(), text_encoder.eval(), tokenizer
        self.unet, self.controlnet, self.scheduler = unet.eval(), controlnet.eval(), scheduler
        self.scale, self.num_inference_steps, self.start = scale, num_inference_steps, start
        # read once: wrapped modules (several processes, adapters) have no config
        self.latent_channels = unet.config.in_channels
        self.scaling_factor = vae.config.scaling_factor
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = self.vae_scale_factor * 2 ** (len(unet.config.block_out_channels) - 1)
        for module in self._modules().values():
            module.requires_grad_(False)

    def _modules(self) -> dict[str, nn.Module]:
        return {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "unet": self.unet,
            "controlnet": self.controlnet,
        }

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        for module in self._modules().values():
            nn.Module.to(module, device=device, dtype=dtype)  # diffusers' own warns of a cast that is meant
        return self

    # -- conditioning ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_condition(self, lr: Tensor, prompts: list[str]) -> Condition:
        """Upscale ``lr`` bicubically for the ControlNet and embed the prompts.

        Args:
            lr: ``[N, 3, h, w]`` in [0, 1]; ``scale·h`` and ``scale·w`` must be multiples of ``multiple``.
            prompts: N prompts.

        Raises:
            ValueError: if a shape, the value range or the number of prompts is wrong, or a value is not finite.
        """
        if lr.ndim != 4 or lr.shape[1] != 3:
            raise ValueError(f"lr must have shape [N, 3, h, w], got {list(lr.shape)}")
        if not lr.is_floating_point():
            raise TypeError(f"lr must be floating point in [0, 1], got {lr.dtype}; divide 8-bit images by 255")
        if len(prompts) != lr.shape[0]:
            raise ValueError(f"prompts must hold one prompt per image of lr ({lr.shape[0]}), got {len(prompts)}")
        height, width = lr.shape[2] * self.scale, lr.shape[3] * self.scale
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"lr must be a multiple of {self.multiple // self.scale} pixels high and wide, got "
                f"{lr.shape[2]}x{lr.shape[3]}; rfsr_ext.sampling.upscale pads images of any size"
            )
        lr = lr.to(self.device, self.dtype)
        if lr.numel() and not (lr.min() >= 0 and lr.max() <= 1):  # also catches NaN
            raise ValueError(
                f"lr must be finite and in [0, 1], got values from {lr.min().item():g} to {lr.max().item():g}"
            )
        upscaled = F.interpolate(lr, scale_factor=self.scale, mode="bicubic").clamp(0, 1)
        return Condition(upscaled, self.encode_prompts(prompts), list(prompts))

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

    def initial_latents(self, condition: Condition, timestep: Tensor, generator=None) -> Tensor:
        height, width = (n // self.vae_scale_factor for n in condition.controlnet_cond.shape[-2:])
        shape = (len(condition), self.latent_channels, height, width)
        noise = randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        if self.start == "noise":
            return noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(self.encode(condition.controlnet_cond), noise, timestep.reshape(1).cpu())

    # -- denoising ------------------------------------------------------------------------------------------------

    def predict_noise(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """``[N, C, h, w]`` latents and a scalar or ``[N]`` timestep to the network's output."""
        timestep = torch.as_tensor(timestep, device=latents.device).expand(latents.shape[0])
        down_residuals, mid_residual = self.controlnet(
            latents,
            timestep,
            encoder_hidden_states=condition.prompt_embeds,
            controlnet_cond=condition.controlnet_cond,
            return_dict=False,
        )
        return self.unet(
            latents,
            timestep,
            encoder_hidden_states=condition.prompt_embeds,
            down_block_additional_residuals=down_residuals,
            mid_block_additional_residual=mid_residual,
            return_dict=False,
        )[0]

    def pred_original_sample(self, model_output: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """z_0 from the network's output: (z_t − σ_t ε)/α_t for noise, α_t z_t − σ_t v for velocity."""
        alpha_bar = self.scheduler.alphas_cumprod[torch.as_tensor(timestep).cpu()].to(latents.device, latents.dtype)
        alpha, sigma = (x.reshape(-1, 1, 1, 1) for x in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return (latents - sigma * model_output) / alpha
        if prediction_type == "v_prediction":
            return alpha * latents - sigma * model_output
        if prediction_type == "sample":
            return model_output
        raise ValueError(f"scheduler prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")

    # -- pixels ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images.to(self.dtype) * 2 - 1).latent_dist.mode() * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.scaling_factor, return_dict=False)[0] / 2 + 0.5

    # -- training -------------------------------------------------------------------------------------------------

    def trainable_groups(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "controlnet": self.controlnet}

    def set_trainable_groups(self, groups: dict[str, nn.Module]) -> None:
        self.unet, self.controlnet = groups["unet"], groups["controlnet"]

    def reference(self) -> Self:
        twin = copy.copy(self)
        twin.set_trainable_groups(
            {
                name: copy.deepcopy(module).requires_grad_(False).eval()
                for name, module in self.trainable_groups().items()
            }
        )
        return twin

    # -- storage --------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Write an ordinary diffusers folder plus ``isr_config.json``; an older folder is replaced in one step."""
        pipeline = _pipeline_class()(
            **self._modules(),
            tokenizer=self.tokenizer,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        config = {"scale": self.scale, "num_inference_steps": self.num_inference_steps, "start": self.start}
        with replace_folder(path) as folder:
            with _no_bars():
                pipeline.save_pretrained(folder)
            (folder / _CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path, torch_dtype: torch.dtype = torch.float32) -> Self:
        """Open a folder that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: if it is no such folder.
        """
        path = Path(path)
        config = path / _CONFIG_NAME
        if not config.is_file():
            raise FileNotFoundError(f"model folder {str(path)!r} has no {_CONFIG_NAME}; give a folder written by rfsr")
        with _no_bars():
            pipeline = _pipeline_class().from_pretrained(path, safety_checker=None, local_files_only=True)
        parts = {name: pipeline.components[name] for name in
                 ("vae", "text_encoder", "tokenizer", "unet", "controlnet", "scheduler")}  # fmt: skip
        model = cls(**parts, **json.loads(config.read_text()))
        return model.to(model.device, torch_dtype)  # diffusers' own argument for it changes its name between releases
