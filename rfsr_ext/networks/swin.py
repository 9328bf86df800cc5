"""The Swin Transformer (Liu et al., arXiv 2103.14030) under the names of its first implementation.

It stands here, in a hundred lines, because neither library serves: transformers renamed the parameters of its own
between the releases this package works with, so that a folder saved with one would not open with another, and each
release of torchvision demands one torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Mlp", "Swin", "from_windows", "shift_mask", "to_windows"]


def to_windows(x: Tensor, side: int) -> Tensor:
    """``[N, H, W, C]`` to ``[N, windows, side², C]``, row by row."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // side, side, width // side, side, channels)
    return x.transpose(2, 3).reshape(batch, -1, side * side, channels)


def from_windows(windows: Tensor, height: int, width: int, side: int) -> Tensor:
    """The inverse of `to_windows`."""
    batch, _, _, channels = windows.shape
    x = windows.view(batch, height // side, width // side, side, side, channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


def shift_mask(height: int, width: int, side: int, device: torch.device | None = None) -> Tensor:
    """0, or −100 between tokens that only a shift by half a window made neighbors: ``[windows, side², side²]``."""

    def part(length: int) -> Tensor:
        place = torch.arange(length, device=device)
        return (place >= length - side).int() + (place >= length - side // 2).int()

    parts = to_windows((3 * part(height)[:, None] + part(width))[None, ..., None], side)[0, ..., 0]
    return torch.where(parts[:, :, None] == parts[:, None, :], 0.0, -100.0)


class WindowAttention(nn.Module):
    """Attention within windows of ``side × side`` tokens, with a learned bias for each offset between two of them."""

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads, self.side = heads, side
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def _bias(self) -> Tensor:
        """``[heads, side², side²]``: row and column of the table are the offset of query and key, from −side + 1."""
        place = torch.arange(self.side, device=self.relative_position_bias_table.device)
        offset = place[:, None] - place + self.side - 1
        index = (2 * self.side - 1) * offset[:, None, :, None] + offset[None, :, None, :]
        return self.relative_position_bias_table[index.flatten()].view(self.side**2, self.side**2, -1).permute(2, 0, 1)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """``[N, windows, side², C]``; ``mask`` ``[windows, side², side²]`` is added to the scores."""
        batch, count, length, width = windows.shape
        query, key, value = (
            x.transpose(2, 3).flatten(1, 2)  # windows and heads are one dimension: the mask then has no batch
            for x in self.qkv(windows).view(batch, count, length, 3, self.heads, -1).unbind(3)
        )
        bias = self._bias().expand(count, -1, -1, -1)
        if mask is not None:
            bias = bias + mask[:, None].to(bias.dtype)
        x = F.scaled_dot_product_attention(query, key, value, bias.flatten(0, 1))
        return self.proj(x.view(batch, count, self.heads, length, -1).transpose(2, 3).flatten(3))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, under the names of Swin's first implementation."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention in windows, every other block's shifted by half of one, and an MLP; tokens ``[N, H, W, C]``."""

    def __init__(self, width: int, heads: int, side: int, shift: int, mlp_ratio: float):
        super().__init__()
        self.side, self.shift = side, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, side)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        shifted = self.norm1(x).roll((-self.shift, -self.shift), (1, 2))
        mask = shift_mask(height, width, self.side, x.device) if self.shift else None
        attended = self.attn(to_windows(shifted, self.side), mask)
        x = x + from_windows(attended, height, width, self.side).roll((self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Every 2 × 2 tokens to one of twice the width."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class Stage(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, side: int, resolution: int, mlp_ratio: float, last: bool):
        super().__init__()
        shift = side // 2 if resolution > side else 0  # the only window of its image cannot be shifted
        side = min(side, resolution)
        self.blocks = nn.ModuleList(Block(width, heads, side, shift * (i % 2), mlp_ratio) for i in range(depth))
        self.downsample = None if last else PatchMerging(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """Images ``[N, 3, S, S]`` to tokens ``[N, (S / (patch_size · 2^(stages − 1)))², embed_dim · 2^(stages − 1)]``.

    Without the classifier and, as it never trains here, without dropout and stochastic depth.

    Args:
        image_size: S.
        patch_size: pixels per token of the first stage, in each direction.
        embed_dim: width of the first stage; each stage doubles it and halves the sides.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: side of a window in tokens; of a stage with fewer tokens than that, all of them.
        mlp_ratio: hidden width of the MLPs over their width.

    Raises:
        ValueError: if the image cannot be cut into patches, or a stage not into windows.
    """

    def __init__(
        self,
        image_size: int = 384,
        patch_size: int = 4,
        embed_dim: int = 192,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (6, 12, 24, 48),
        window_size: int = 12,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.image_size = image_size
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            resolution, rest = divmod(image_size, patch_size * 2**stage)
            if rest or (resolution > window_size and resolution % window_size):
                raise ValueError(
                    f"image_size must give every stage whole windows of {window_size} tokens, got {image_size}, which "
                    f"gives stage {stage + 1} {image_size / (patch_size * 2**stage):g}"
                )
            width, last = embed_dim * 2**stage, stage == len(depths) - 1
            self.layers.append(Stage(width, depth, heads, window_size, resolution, mlp_ratio, last))
        self.norm = nn.LayerNorm(self.num_features)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images must be {self.image_size}x{self.image_size}, got {images.shape[-2]}x{images.shape[-1]}"
            )
        x = self.patch_embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).flatten(1, 2)
