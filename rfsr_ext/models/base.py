"""What RFSR asks of a diffusion super-resolution model: the protocol every base model satisfies."""

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["Condition", "ISRModel"]


@dataclass(frozen=True)
class Condition:
    """Everything a denoising step is conditioned on, encoded once per batch.

    Attributes:
        controlnet_cond: the LR image upscaled to the output size, ``[N, 3, H, W]`` in [0, 1] (paper: I_lr, c_v).
        prompt_embeds: text embedding ``[N, L, D]`` (paper: c_t), or None for a model without text.
        prompts: the prompts themselves; text-conditioned rewards score against them.
    """

    controlnet_cond: Tensor
    prompt_embeds: Tensor | None
    prompts: list[str]

    def __len__(self) -> int:
        return self.controlnet_cond.shape[0]

    def __getitem__(self, part: slice) -> "Condition":
        embeds = None if self.prompt_embeds is None else self.prompt_embeds[part]
        return Condition(self.controlnet_cond[part], embeds, self.prompts[part])


@runtime_checkable
class ISRModel(Protocol):
    """A latent diffusion model that turns a low-resolution image into a sharp one ``scale`` times its size.

    Attributes:
        scheduler: a diffusers scheduler; `rfsr_ext.sampling` works on copies, this one is never stepped.
        num_inference_steps: how many sampling steps the model is meant for.
        scale: output size over input size.
        multiple: output height and width must be multiples of this many pixels.
        device: where it computes.
    """

    scheduler: object
    num_inference_steps: int
    scale: int
    multiple: int

    @property
    def device(self) -> torch.device: ...

    def encode_condition(self, lr: Tensor, prompts: list[str]) -> Condition:
        """``lr`` ``[N, 3, h, w]`` in [0, 1] and one prompt per image, without gradient."""

    def initial_latents(self, condition: Condition, timestep: Tensor, generator) -> Tensor:
        """The latents x_T the rollout starts from; ``generator`` is one `torch.Generator` or a list, one per image."""

    def predict_noise(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The scheduler's ``model_output`` (noise or velocity, as its ``prediction_type`` says) for z_t and t."""

    def pred_original_sample(self, model_output: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """The z_0 estimate that ``model_output`` implies at z_t."""

    def encode(self, images: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1] to latents, without gradient."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images ``[N, 3, H, W]``, nominally in [0, 1], not clamped; differentiable."""

    def trainable_groups(self) -> dict[str, nn.Module]:
        """The modules fine-tuning changes, by name: for the paper ``unet`` and ``controlnet``."""

    def set_trainable_groups(self, groups: dict[str, nn.Module]) -> None:
        """Put other modules in their place, such as ones wrapped for several processes."""

    def reference(self) -> Self:
        """A frozen copy with its own trainable groups and everything else shared (paper: G_θ′ of eq. 6)."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move every module, in place."""

    def save_pretrained(self, path) -> None:
        """Write a folder that ``from_pretrained`` of the same class opens; nothing half written is ever left."""
