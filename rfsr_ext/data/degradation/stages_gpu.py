"""The same stages as tensors ``[3, H, W]``, for a GPU; random numbers are the CPU's, so that they are the same."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor

from rfsr_ext.data.degradation import jpeg_transform
from rfsr_ext.data.degradation.poisson import alias_table, column_bits, levels_power, offsets

__all__ = ["add_gaussian_noise", "add_poisson_noise", "as_float", "blur", "jpeg", "resize", "round_to_8_bits"]


def as_float(mask: Tensor) -> Tensor:
    """True to 1.0."""
    return mask.float()


def blur(image: Tensor, weights: np.ndarray) -> Tensor:
    """As `stages_cpu.blur`."""
    size, margin = len(weights), len(weights) // 2
    height, width = image.shape[1:]
    # numpy's reflection also serves margins wider than the image
    down, across = (
        torch.from_numpy(np.pad(np.arange(side), margin, mode="reflect")).to(image.device) for side in (height, width)
    )
    shape = tuple(next_fast_len(side + 2 * margin, real=True) for side in (height, width))
    kernel = torch.zeros(shape, device=image.device)
    kernel[:size, :size] = torch.from_numpy(weights.astype(np.float32))
    response = torch.fft.rfft2(kernel.roll((-margin, -margin), dims=(0, 1))).real
    blurred = torch.fft.irfft2(torch.fft.rfft2(image[:, down][:, :, across], shape) * response, shape)
    return blurred[:, margin : margin + height, margin : margin + width]


def resize(image: Tensor, size: tuple[int, int], mode: str, scale: float | None = None) -> Tensor:
    """As `stages_cpu.resize`."""
    if size == tuple(image.shape[1:]) and scale in (None, 1):
        return image
    if scale is not None and all(int(side * scale) for side in image.shape[1:]):
        return F.interpolate(image[None], scale_factor=scale, mode=mode)[0]
    return F.interpolate(image[None], size, mode=mode)[0]


def add_gaussian_noise(image: Tensor, strength: float, gray: bool, rng: np.random.Generator) -> Tensor:
    """As `stages_cpu.add_gaussian_noise`."""
    shape = (1, *image.shape[1:]) if gray else tuple(image.shape)
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(image.device)
    return (image + noise * (strength / 255)).clamp(0, 1)


def add_poisson_noise(image: Tensor, strength: float, gray: bool, rng: np.random.Generator) -> Tensor:
    """As `stages_cpu.add_poisson_noise`."""
    source = (0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2])[None] if gray else image
    levels = (source.clamp(0, 1) * 255).round().long()
    power = levels_power(int(torch.count_nonzero(torch.bincount(levels.flatten(), minlength=256))))
    # PyTorch has next to no arithmetic for uint32, so that 64 bits hold the numbers
    numbers, table = (
        torch.from_numpy(array.astype(np.int64)).to(image.device)
        for array in (rng.integers(0, 2**32, tuple(levels.shape), dtype=np.uint32), alias_table(power))
    )
    bits = column_bits(power)
    columns = numbers & ((1 << bits) - 1)
    entries = table[(levels << bits) + columns]
    counts = torch.where(numbers >> bits < entries >> bits, columns, entries & ((1 << bits) - 1))
    noise = counts.float() / power + torch.from_numpy(offsets(power)).to(image.device)[levels]
    return (image + noise * strength).clamp(0, 1)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """As `stages_cpu.jpeg`, without the file."""
    return jpeg_transform.jpeg(image[None], torch.tensor([quality]))[0]


def round_to_8_bits(image: Tensor) -> Tensor:
    """The nearest of 256 levels."""
    return (image.clamp(0, 1) * 255).round() / 255
