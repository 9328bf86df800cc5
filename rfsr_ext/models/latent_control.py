"""Stable Diffusion with a ControlNet that sees latents beside z_t: what DiffBIR and CCSR v1 have in common."""

from typing import ClassVar

from diffusers import AutoencoderKL
from torch import Tensor

from rfsr_ext.models.controlnet import ControlNetISRModel
from rfsr_ext.networks.controlnet import LatentControlNetModel

__all__ = ["LatentControlNetISRModel"]


class LatentControlNetISRModel(ControlNetISRModel):
    """A `ControlNetISRModel` over `LatentControlNetModel`; the control is the first stage's picture as latents.

    Args:
        args, kwargs: as for `ControlNetISRModel`.
        cond_encoder: a VAE whose encoder makes the control latents, where it is not the model's own.
    """

    classes: ClassVar[dict[str, type]] = ControlNetISRModel.classes | {
        "controlnet": LatentControlNetModel,
        "cond_encoder": AutoencoderKL,
    }
    optional: ClassVar[frozenset[str]] = frozenset({"cond_encoder"})
    conditioning_channels: ClassVar[int] = 4

    def __init__(self, *args, cond_encoder: AutoencoderKL | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if cond_encoder is not None:
            self.networks["cond_encoder"] = cond_encoder.eval().requires_grad_(False)

    def control(self, image: Tensor) -> dict[str, Tensor]:
        """The image's latents, the posterior's mode."""
        encoder = self.networks.get("cond_encoder", self.vae)
        latents = encoder.encode(image.to(self.dtype) * 2 - 1).latent_dist.mode()
        return {"controlnet_cond": latents * self.scaling_factor}
