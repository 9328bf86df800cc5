"""A ControlNet whose control image is given as latents (DiffBIR, CCSR v1)."""

import functools

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

__all__ = ["LatentControlNetModel"]


class _NoEmbedding(nn.Module):
    """Stands where the stock ControlNet embeds a control image and adds that to its first features."""

    def forward(self, controlnet_cond: Tensor) -> Tensor:
        return controlnet_cond.new_zeros(())


class LatentControlNetModel(ControlNetModel):
    """diffusers' ControlNet whose first convolution sees z_t and the control latents side by side.

    h_0 = conv_in(cat[z_t, c]), so ``conv_in`` has ``in_channels + conditioning_channels`` inputs and nothing embeds a
    control image (DiffBIR, arXiv 2308.15070, section 3.2: IRControlNet).  Everything else is the stock ControlNet.

    Args:
        in_channels: of z_t.
        conditioning_channels: of the control latents c, which have z_t's height and width.
        kwargs: as for `diffusers.ControlNetModel`.
    """

    @functools.wraps(ControlNetModel.__init__)  # diffusers reads the names of the configuration off the signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        first, config = self.conv_in, self.config
        channels = config.in_channels + config.conditioning_channels
        self.conv_in = nn.Conv2d(channels, first.out_channels, first.kernel_size, padding=first.padding)
        self.controlnet_cond_embedding = _NoEmbedding()

    def forward(self, sample: Tensor, timestep, encoder_hidden_states: Tensor, controlnet_cond: Tensor, **kwargs):
        """As the stock ControlNet's; ``controlnet_cond`` are latents ``[N, C, h, w]``."""
        sample = torch.cat([sample, controlnet_cond], dim=1)
        return super().forward(sample, timestep, encoder_hidden_states, controlnet_cond, **kwargs)
