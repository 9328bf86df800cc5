"""What is drawn for one image: every parameter of both rounds, before any pixel is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rfsr_ext.data.degradation.kernels import FAMILIES, Kernel

if TYPE_CHECKING:
    from rfsr_ext.data.degradation.settings import Degradation, Round

__all__ = ["MODES", "Choices", "RoundChoices", "draw"]

MODES = ("area", "bilinear", "bicubic")


@dataclass(frozen=True)
class RoundChoices:
    """One round for one image.

    Attributes:
        kernel: of the blur; None for no blur.
        resize: factor, of the image's sides in the first round and of the final ones in the second.
        mode: of the resizing.
        noise: ``gaussian`` or ``poisson``.
        strength: standard deviation in gray levels of 255 of Gaussian noise, factor of Poisson noise.
        gray: one noise for all three channels.
        quality: of the JPEG.
    """

    kernel: Kernel | None
    resize: float
    mode: str
    noise: str
    strength: float
    gray: bool
    quality: int


@dataclass(frozen=True)
class Choices:
    """Both rounds, and how the second ends: resized to the final size and filtered before its JPEG, or after it."""

    first: RoundChoices
    second: RoundChoices
    final_mode: str
    final_kernel: Kernel | None
    jpeg_last: bool


def draw(settings: Degradation, rng: np.random.Generator) -> Choices:
    """The choices for one image; the generator's next numbers are the noise."""
    assert settings.second is not None
    first, second = (_draw_round(part, settings.kernel_size, rng) for part in (settings.first, settings.second))
    kernel = None
    if rng.random() < settings.final_sinc_prob:
        kernel = Kernel("sinc", _draw_size(settings.kernel_size, rng), cutoff=rng.uniform(math.pi / 3, math.pi))
    return Choices(
        first,
        second,
        final_mode=MODES[rng.integers(len(MODES))],
        final_kernel=kernel,
        jpeg_last=rng.random() < 0.5,
    )


def _draw_round(settings: Round, sizes: tuple[int, int], rng: np.random.Generator) -> RoundChoices:
    kernel = _draw_kernel(settings, sizes, rng) if rng.random() < settings.blur_prob else None
    direction = _draw_index(settings.resize_prob, rng)
    low, high = settings.resize_range
    resize = rng.uniform(1, high) if direction == 0 else rng.uniform(low, 1) if direction == 1 else 1.0
    mode = MODES[rng.integers(len(MODES))]
    noise = "gaussian" if rng.random() < settings.gaussian_noise_prob else "poisson"
    strength = rng.uniform(*(settings.noise_range if noise == "gaussian" else settings.poisson_scale_range))
    gray = rng.random() < settings.gray_noise_prob
    low, high = settings.jpeg_range
    return RoundChoices(kernel, resize, mode, noise, strength, gray, int(rng.integers(low, high + 1)))


def _draw_kernel(settings: Round, sizes: tuple[int, int], rng: np.random.Generator) -> Kernel:
    size = _draw_size(sizes, rng)
    if rng.random() < settings.sinc_prob:
        return Kernel("sinc", size, cutoff=rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
    family = FAMILIES[_draw_index(settings.kernel_prob, rng)]
    sigma, theta = rng.uniform(*settings.blur_sigma), 0.0
    axes = (sigma, sigma)
    if family.endswith("aniso"):
        axes, theta = (sigma, rng.uniform(*settings.blur_sigma)), rng.uniform(-math.pi, math.pi)
    beta = 1.0
    if not family.startswith(("iso", "aniso")):
        low, high = settings.betag_range if family.startswith("generalized") else settings.betap_range
        beta = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    return Kernel(family, size, axes, theta, beta)


def _draw_size(sizes: tuple[int, int], rng: np.random.Generator) -> int:
    return sizes[0] + 2 * int(rng.integers((sizes[1] - sizes[0]) // 2 + 1))


def _draw_index(probabilities: tuple[float, ...], rng: np.random.Generator) -> int:
    """An index with these probabilities, by adding them up in order."""
    level = rng.random() * math.fsum(probabilities)
    for index, probability in enumerate(probabilities):
        level -= probability
        if level < 0:
            return index
    return max(i for i, probability in enumerate(probabilities) if probability > 0)
