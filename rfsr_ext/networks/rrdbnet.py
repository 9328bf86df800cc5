"""RRDBNet, the convolutional network of ESRGAN; as BSRNet (BSRGAN) the first stage of DiffBIR v2."""

import re

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

__all__ = ["DenseBlock", "RRDBNet"]


class DenseBlock(nn.Module):
    """Five convolutions that each see all features before them; a fifth of the last one's is added."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        for k in range(1, 6):
            inputs, outputs = channels + (k - 1) * growth, growth if k < 5 else channels
            setattr(self, f"conv{k}", nn.Conv2d(inputs, outputs, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            features.append(F.leaky_relu(convolution(torch.cat(features, dim=1)), 0.2))
        return x + 0.2 * self.conv5(torch.cat(features, dim=1))


class _RRDB(nn.Module):
    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.RDB1, self.RDB2, self.RDB3 = (DenseBlock(channels, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.RDB3(self.RDB2(self.RDB1(x)))


class RRDBNet(ModelMixin, ConfigMixin):
    """Residual-in-residual dense blocks, then nearest-neighbor enlargement with convolutions (ESRGAN, 2018).

    Names are those of BSRGAN's files (``BSRNet.pth``, ``BSRGAN.pth``), which KAIR and DiffBIR v2 read.

    Args:
        in_channels, out_channels: 3 for color images.
        channels: features of every block.
        num_blocks: residual-in-residual dense blocks.
        growth: features that each convolution in a block adds.
        scale: output size over input size, 2 or 4.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: int = 64,
        num_blocks: int = 23,
        growth: int = 32,
        scale: int = 4,
    ):
        super().__init__()
        self.conv_first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(_RRDB(channels, growth) for _ in range(num_blocks)))
        self.trunk_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.upconv1 = nn.Conv2d(channels, channels, 3, padding=1)
        if scale == 4:
            self.upconv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.HRconv = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_last = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 3, h, w]`` in [0, 1] to ``[N, 3, scale·h, scale·w]``, nominally in [0, 1], not clamped."""
        features = self.conv_first(x)
        features = features + self.trunk_conv(self.RRDB_trunk(features))
        for convolution in (self.upconv1, self.upconv2) if self.config.scale == 4 else (self.upconv1,):
            features = F.leaky_relu(convolution(F.interpolate(features, scale_factor=2.0, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.HRconv(features), 0.2))

    @staticmethod
    def config_of(tensors: dict[str, Tensor]) -> dict[str, int]:
        """The configuration of a file's tensors, from their names and shapes.

        Raises:
            ValueError: if they are not of this architecture.
        """
        try:
            first, last = tensors["conv_first.weight"].shape, tensors["conv_last.weight"].shape
            growth = tensors["RRDB_trunk.0.RDB1.conv1.weight"].shape[0]
        except KeyError as error:
            raise ValueError(f"an RRDBNet must have a tensor {error}, got a file without it") from None
        blocks = [int(found[1]) for name in tensors if (found := re.match(r"RRDB_trunk\.(\d+)\.", name))]
        return {
            "in_channels": first[1],
            "out_channels": last[0],
            "channels": first[0],
            "num_blocks": max(blocks) + 1,
            "growth": growth,
            "scale": 4 if "upconv2.weight" in tensors else 2,
        }
