"""SwinIR as DiffBIR's first stage: it removes degradations and keeps the image's size."""

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from rfsr_ext.networks.swin import Mlp, from_windows, shift_mask, to_windows

__all__ = ["SwinIR"]

_FEATURES = 64  # of the reconstruction, in every SwinIR
_MEAN = (0.4488, 0.4371, 0.4040)  # of the training images; subtracted from what comes in, added to what goes out


class _WindowAttention(nn.Module):
    def __init__(self, width: int, window_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, heads))
        rows, columns = torch.meshgrid(torch.arange(window_size), torch.arange(window_size), indexing="ij")
        down, right = (n.flatten()[:, None] - n.flatten() + window_size - 1 for n in (rows, columns))
        self.register_buffer("relative_position_index", down * (2 * window_size - 1) + right)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        n, windows, length, width = x.shape
        q, k, v = self.qkv(x).view(n, windows, length, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            bias = bias + mask[:, None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(x.transpose(2, 3).reshape(n, windows, length, width))


class _Block(nn.Module):
    """Attention in windows, in every second block over an image shifted by half a window, then an MLP."""

    def __init__(self, width: int, heads: int, window_size: int, shifted: bool, hidden: int, img_size: int):
        super().__init__()
        self.window_size, self.shifted, self.img_size = window_size, shifted, img_size
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _WindowAttention(width, window_size, heads)
        self.mlp = Mlp(width, hidden)
        self.register_buffer("attn_mask", shift_mask(img_size, img_size, window_size) if shifted else None)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        shift = self.window_size // 2 if self.shifted else 0
        mask = self.attn_mask
        if self.shifted and (height, width) != (self.img_size, self.img_size):
            mask = shift_mask(height, width, self.window_size).to(x)
        shifted = torch.roll(self.norm1(x), (-shift, -shift), dims=(1, 2))
        attended = from_windows(self.attn(to_windows(shifted, self.window_size), mask), height, width, self.window_size)
        x = x + torch.roll(attended, (shift, shift), dims=(1, 2))
        return x + self.mlp(self.norm2(x))


class _Group(nn.Module):
    def __init__(self, blocks: list[_Block]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Layer(nn.Module):
    def __init__(self, width: int, blocks: list[_Block]):
        super().__init__()
        self.residual_group = _Group(blocks)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.residual_group(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _PatchEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class SwinIR(ModelMixin, ConfigMixin):
    """SwinIR (Liang et al., arXiv 2108.10257) between a pixel unshuffle and as large an enlargement.

    Pixels are folded into channels ``scale`` times in each direction, transformed by windows, and enlarged again by
    nearest neighbors and convolutions.  Names are those of ``general_swinir_v1.ckpt``, with its buffers.

    Args:
        embed_dim: features of the transformer.
        depths, num_heads: blocks, and heads of each of them, layer by layer.
        window_size: of attention, in features.
        hidden_dim: of the MLPs.
        scale: of the unshuffle: 2, 4 or 8.
        img_size: side in features for which the masks of shifted windows are stored; others are made when needed.
    """

    @register_to_config
    def __init__(
        self,
        embed_dim: int = 180,
        depths: tuple[int, ...] = (6,) * 8,
        num_heads: tuple[int, ...] = (6,) * 8,
        window_size: int = 8,
        hidden_dim: int = 360,
        scale: int = 8,
        img_size: int = 64,
    ):
        super().__init__()
        self.conv_first = nn.Sequential(nn.PixelUnshuffle(scale), nn.Conv2d(3 * scale**2, embed_dim, 3, padding=1))
        self.patch_embed = _PatchEmbed(embed_dim)
        shifts = img_size > window_size
        self.layers = nn.ModuleList(
            _Layer(
                embed_dim,
                [
                    _Block(embed_dim, heads, window_size, shifts and k % 2 == 1, hidden_dim, img_size)
                    for k in range(depth)
                ],
            )
            for depth, heads in zip(depths, num_heads, strict=True)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, _FEATURES, 3, padding=1), nn.LeakyReLU())
        self._enlarging = [f"conv_up{k + 1}" for k in range(int(math.log2(scale)))]
        for name in self._enlarging:
            setattr(self, name, nn.Conv2d(_FEATURES, _FEATURES, 3, padding=1))
        self.conv_hr = nn.Conv2d(_FEATURES, _FEATURES, 3, padding=1)
        self.conv_last = nn.Conv2d(_FEATURES, 3, 3, padding=1)

    @property
    def multiple(self) -> int:
        """Pixels of one window; other sizes are padded with black below and to the right, as DiffBIR does."""
        return self.config.window_size * self.config.scale

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [0, 1] to images of the same size, nominally in [0, 1], not clamped."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        mean = x.new_tensor(_MEAN).view(3, 1, 1)
        first = self.conv_first(x - mean)
        features = self.patch_embed(first.permute(0, 2, 3, 1))
        for layer in self.layers:
            features = layer(features)
        features = self.conv_after_body(self.norm(features).permute(0, 3, 1, 2)) + first
        features = self.conv_before_upsample(features)
        for name in self._enlarging:
            enlarged = F.interpolate(features, scale_factor=2.0, mode="nearest")
            features = F.leaky_relu(getattr(self, name)(enlarged), 0.2)
        x = self.conv_last(F.leaky_relu(self.conv_hr(features), 0.2)) + mean
        return x[..., :height, :width]

    @staticmethod
    def config_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The configuration of a file's tensors, from their names and shapes.

        Raises:
            ValueError: if they are not of this architecture.
        """
        blocks: dict[int, int] = {}
        for name in tensors:
            if found := re.match(r"layers\.(\d+)\.residual_group\.blocks\.(\d+)\.", name):
                layer, block = int(found[1]), int(found[2])
                blocks[layer] = max(blocks.get(layer, 0), block + 1)
        start = "layers.{}.residual_group.blocks.0."
        try:
            tables = [
                tensors[start.format(k) + "attn.relative_position_bias_table"].shape
                for k in range(max(blocks, default=0) + 1)
            ]
            window = (math.isqrt(tables[0][0]) + 1) // 2
            masks = [t.shape[0] for name, t in tensors.items() if name.endswith(".attn_mask")]
            return {
                "embed_dim": tensors["conv_first.1.weight"].shape[0],
                "depths": [blocks[k] for k in sorted(blocks)],
                "num_heads": [table[1] for table in tables],
                "window_size": window,
                "hidden_dim": tensors[start.format(0) + "mlp.fc1.weight"].shape[0],
                "scale": math.isqrt(tensors["conv_first.1.weight"].shape[1] // 3),
                "img_size": window * math.isqrt(masks[0]) if masks else window,
            }
        except KeyError as error:
            raise ValueError(
                f"SwinIR with a pixel unshuffle must have a tensor {error}, got a file without it"
            ) from None
