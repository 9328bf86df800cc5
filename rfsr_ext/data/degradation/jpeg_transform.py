"""JPEG without the file: what libjpeg loses, computed for a batch on any device, to the bit.

Huffman coding loses nothing, so that it is left out.  Everything else is libjpeg's own integer arithmetic (baseline,
4:2:0, "islow" transform, "fancy" upsampling), in which every product is exact in float64 or int32: the result does not
depend on the order of sums, and so not on the device.

The public code's DiffJPEG is not that: it neither rounds to 8 bits nor smooths the halved colors.  On a photograph of
256 × 256 pixels it is 35.5, 37.2 and 41.7 dB from libjpeg at the qualities 30, 60 and 95, where libjpeg is 31.2, 33.4
and 39.4 dB from the original.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["jpeg"]

# The one-dimensional DCT in units of 2⁻¹³.  Loeffler, Ligtenberg and Moschytz build it of twelve rounded constants, so
# that an entry is not always the nearest integer to its cosine.
_DCT = [
    [8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192],
    [11363, 9633, 6437, 2260, -2260, -6437, -9633, -11363],
    [10703, 4433, -4433, -10703, -10703, -4433, 4433, 10703],
    [9633, -2259, -11362, -6436, 6436, 11362, 2259, -9633],
    [8192, -8192, -8192, 8192, 8192, -8192, -8192, 8192],
    [6437, -11362, 2261, 9633, -9633, -2261, 11362, -6437],
    [4433, -10704, 10704, -4433, -4433, 10704, -10704, 4433],
    [2260, -6436, 9633, -11363, 11363, -9633, 6436, -2260],
]
# Quantization of quality 50, ITU-T T.81 annex K.
_LUMA = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]
_CHROMA = [
    [17, 18, 24, 47, 99, 99, 99, 99],
    [18, 21, 26, 66, 99, 99, 99, 99],
    [24, 26, 56, 99, 99, 99, 99, 99],
    [47, 66, 99, 99, 99, 99, 99, 99],
    *[[99] * 8] * 4,
]
# Of red, green and blue to Y, Cb and Cr, in units of 2⁻¹⁶.
_TO_YCC = [[19595, 38470, 7471], [-11059, -21709, 32768], [32768, -27439, -5329]]


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Write and read images as baseline JPEG.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1]; rounded to 8 bits.
        quality: ``[N]`` whole numbers from 1 to 100.

    Returns:
        ``[N, 3, H, W]`` float32 in [0, 1], 8 bits deep: what Pillow reads from the file it writes.
    """
    height, width = images.shape[2:]
    rgb = (images.clamp(0, 1) * 255).round().int()
    rgb = F.pad(rgb, (0, -width % 16))
    rgb[..., width:] = rgb[..., width - 1 : width]
    luma, cb, cr = (r * rgb[:, 0] + g * rgb[:, 1] + b * rgb[:, 2] for r, g, b in _TO_YCC)
    luma = (luma + (1 << 15)) >> 16
    cb, cr = ((chroma + (128 << 16) + (1 << 15) - 1) >> 16 for chroma in (cb, cr))
    quality = quality.to(images.device).int()
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)[:, None, None]
    tables = [((torch.tensor(t, device=images.device) * percent + 50) // 100).clamp(1, 255) for t in (_LUMA, _CHROMA)]
    luma = _coded(luma, tables[0])[:, :height, :width]
    cb, cr = (
        _enlarged(_coded(_halved(chroma), tables[1])[:, : -(-height // 2), : -(-width // 2)])[:, :height, :width] - 128
        for chroma in (cb, cr)
    )
    half = 1 << 15
    red = luma + ((91881 * cr + half) >> 16)
    green = luma + ((-22554 * cb - 46802 * cr + half) >> 16)
    blue = luma + ((116130 * cb + half) >> 16)
    return torch.stack([red, green, blue], dim=1).clamp(0, 255).float() / 255


def _rows_repeated(plane: Tensor, multiple: int) -> Tensor:
    """The last row repeated up to a multiple."""
    missing = -plane.shape[1] % multiple
    return torch.cat([plane, plane[:, -1:].expand(-1, missing, -1)], dim=1) if missing else plane


def _halved(plane: Tensor) -> Tensor:
    """Means of 2 × 2; halves are rounded down and up in turn."""
    plane = _rows_repeated(plane, 2)
    total = plane[:, ::2, ::2] + plane[:, ::2, 1::2] + plane[:, 1::2, ::2] + plane[:, 1::2, 1::2]
    return (total + 1 + torch.arange(total.shape[2], device=plane.device, dtype=torch.int32) % 2) >> 2


def _enlarged(plane: Tensor) -> Tensor:
    """Twice the size by a triangle filter, of weights 9, 3, 3 and 1; narrow ones by repetition, as libjpeg has it."""
    if plane.shape[2] < 3:
        return plane.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    above, below = (torch.cat(rows, dim=1) for rows in ((plane[:, :1], plane[:, :-1]), (plane[:, 1:], plane[:, -1:])))
    tall = torch.stack([3 * plane + above, 3 * plane + below], dim=2).flatten(1, 2)
    left, right = (torch.cat(c, dim=2) for c in ((tall[..., :1], tall[..., :-1]), (tall[..., 1:], tall[..., -1:])))
    return torch.stack([(3 * tall + left + 8) >> 4, (3 * tall + right + 7) >> 4], dim=3).flatten(2, 3)


def _coded(plane: Tensor, table: Tensor) -> Tensor:
    """``[N, h, w]`` through transform, quantization and back."""
    plane = _rows_repeated(plane, 8)
    n, h, w = plane.shape
    blocks = plane.view(n, h // 8, 8, w // 8, 8).permute(0, 1, 3, 2, 4).double() - 128
    dct = torch.tensor(_DCT, device=plane.device, dtype=torch.float64)
    blocks = _shifted(dct @ _shifted(blocks @ dct.T, 11), 15)
    step = 8.0 * table[:, None, None]
    blocks = blocks.sign() * ((blocks.abs() + (step / 2).floor()) / step).floor() * (step / 8)
    blocks = _shifted(_shifted(dct.T @ blocks, 11) @ dct, 18) + 128
    return blocks.clamp(0, 255).int().permute(0, 1, 3, 2, 4).reshape(n, h, w)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Over 2^bits, rounded to the nearest integer, halves up."""
    return ((x + (1 << (bits - 1))) / (1 << bits)).floor()
