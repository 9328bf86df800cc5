"""The stages on a CPU: arrays ``[3, H, W]``, float32 in [0, 1].

Nothing here depends on the number of threads or on the processor: NumPy's arithmetic is rounded element by element,
SciPy and Pillow are compiled for every x86-64 processor alike, and sums have one order.  PyTorch, whose sums have not,
is left out for that reason.
"""

from __future__ import annotations

import numpy as np
from scipy import fft

from rfsr_ext.data.degradation.poisson import alias_table, column_bits, levels_power, offsets
from rfsr_ext.data.degradation.resampling import matrix
from rfsr_ext.data.images import jpeg as jpeg_file

__all__ = ["add_gaussian_noise", "add_poisson_noise", "as_float", "blur", "jpeg", "resize", "round_to_8_bits"]


def as_float(mask: np.ndarray) -> np.ndarray:
    """True to 1.0."""
    return mask.astype(np.float32)


def blur(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Filter with ``[k, k]`` weights, symmetric about their center, the image reflected at its edges (not repeated).

    It is multiplied in the frequency domain, where its cost does not depend on the kernel.  There such weights are real
    numbers.  That matters: the product of two complex ones is rounded once or twice, as the processor has it.
    """
    margin = len(weights) // 2
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    rows, columns = (fft.next_fast_len(side + 2 * margin, real=True) for side in (height, width))
    response = _response(weights.astype(np.float32), rows, columns)
    spectrum = fft.rfft2(padded, (rows, columns))
    spectrum.real *= response
    spectrum.imag *= response
    blurred = fft.irfft2(spectrum, (rows, columns), overwrite_x=True)
    return np.ascontiguousarray(blurred[:, margin : margin + height, margin : margin + width])


def _response(weights: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The real transform of weights whose center is moved to the origin, ``[rows, columns // 2 + 1]``."""
    size, margin = len(weights), len(weights) // 2
    lines = np.zeros((size, columns), np.float32)
    lines[:, :size] = weights
    across = np.zeros((rows, columns // 2 + 1), np.complex64)
    across[:size] = fft.rfft(np.roll(lines, -margin, axis=1), axis=1)
    return fft.fft(np.roll(across, -margin, axis=0), axis=0).real


def resize(image: np.ndarray, size: tuple[int, int], mode: str, scale: float | None = None) -> np.ndarray:
    """`torch.nn.functional.interpolate` without antialiasing; ``scale``, if given, places the samples."""
    height, width = image.shape[1:]
    if size == (height, width) and scale in (None, 1):
        return image
    rows, columns = matrix(height, size[0], mode, scale), matrix(width, size[1], mode, scale)
    image = np.stack([rows @ channel for channel in image])
    return np.stack([np.ascontiguousarray((columns @ np.ascontiguousarray(channel.T)).T) for channel in image])


def add_gaussian_noise(image: np.ndarray, strength: float, gray: bool, rng: np.random.Generator) -> np.ndarray:
    """Standard deviation ``strength`` in levels of 255; clipped to [0, 1]."""
    shape = (1, *image.shape[1:]) if gray else image.shape
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise *= np.float32(strength / 255)
    return (image + noise).clip(0, 1)


def add_poisson_noise(image: np.ndarray, strength: float, gray: bool, rng: np.random.Generator) -> np.ndarray:
    """Photon noise ``strength · (Poisson(n x) / n - x)``; clipped to [0, 1].

    x is the image, or its gray version, rounded to 8 bits, and n the power of two not below its number of levels.
    """
    source = image
    if gray:
        source = (np.float32(0.2989) * image[0] + np.float32(0.587) * image[1] + np.float32(0.114) * image[2])[None]
    levels = np.rint(source.clip(0, 1) * 255).astype(np.int32)
    power = levels_power(int(np.count_nonzero(np.bincount(levels.ravel(), minlength=256))))
    numbers = rng.integers(0, 2**32, levels.shape, dtype=np.uint32)
    bits = column_bits(power)
    columns = (numbers & np.uint32((1 << bits) - 1)).astype(np.int32)
    entries = alias_table(power)[(levels << bits) + columns]
    own = numbers >> np.uint32(bits) < entries >> np.uint32(bits)
    counts = np.where(own, columns, entries & np.uint32((1 << bits) - 1))
    noise = counts.astype(np.float32) * np.float32(1 / power) + offsets(power)[levels]
    return (image + noise * np.float32(strength)).clip(0, 1)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Written by Pillow as a JPEG of this quality, 4:2:0, and read again."""
    return np.ascontiguousarray(np.moveaxis(jpeg_file(np.moveaxis(image, 0, -1), quality), -1, 0))


def round_to_8_bits(image: np.ndarray) -> np.ndarray:
    """The nearest of 256 levels."""
    return np.rint(image.clip(0, 1) * 255) / np.float32(255)
