"""Ways an image can look wrong, each with a severity from 0 to 1: what the rewards and the judge learn from.

The first group is what a low-resolution input suffers; the second is what a generator does to please a reward: too much
sharpening, ringing, texture that was never there, painterly flattening, speckle.
"""

from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter, median_filter

from rfsr_ext.data.images import jpeg, resize

__all__ = ["DISTORTIONS", "INPUT_FAULTS", "distort"]


def _blur(image, severity, rng):
    sigma = 0.3 + 2.2 * severity
    return gaussian_filter(image, (sigma, sigma, 0))


def _downscale(image, severity, rng):
    size = max(4, round(image.shape[0] / (1 + 4 * severity)))
    return resize(resize(image, (size, size)), image.shape[:2])


def _noise(image, severity, rng):
    sigma = 0.01 + 0.12 * severity
    noise = rng.normal(0, sigma, image.shape).astype(np.float32)
    if rng.random() < 0.5:  # as coarse as a generator's noise
        noise = gaussian_filter(noise, (0.8, 0.8, 0)) * 2.5
    return image + noise


def _jpeg(image, severity, rng):
    return jpeg(image, round(60 - 52 * severity))


def _sharpen(image, severity, rng):
    sigma = rng.uniform(0.7, 1.8)
    return image + (0.5 + 4 * severity) * (image - gaussian_filter(image, (sigma, sigma, 0)))


def _ringing(image, severity, rng):
    """An ideal low-pass leaves Gibbs waves beside every edge; boosting its upper band makes them stand out."""
    spectrum = np.fft.fft2(image, axes=(0, 1))
    fy, fx = np.meshgrid(*(np.fft.fftfreq(n) for n in image.shape[:2]), indexing="ij")
    radius, cutoff = np.hypot(fy, fx), rng.uniform(0.14, 0.35)
    gain = 1 + 3 * severity * np.exp(-(((radius - cutoff * 0.85) / 0.05) ** 2))
    gain = np.where(radius > cutoff, 1 - min(1, 0.4 + severity), gain)
    return np.fft.ifft2(spectrum * gain[..., None], axes=(0, 1)).real.astype(np.float32)


def _texture(image, severity, rng):
    """Stripes or grain laid over the picture, strongest where it is busy already."""
    y, x = np.mgrid[0 : image.shape[0], 0 : image.shape[1]].astype(np.float32)
    if rng.random() < 0.5:
        angle = rng.uniform(0, np.pi) + 0.5 * gaussian_filter(rng.normal(size=image.shape[:2]), 8) * 8
        pattern = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / rng.uniform(2.2, 7))
    else:
        fine = rng.normal(size=image.shape[:2]).astype(np.float32)
        pattern = gaussian_filter(fine, rng.uniform(0.5, 1)) - gaussian_filter(fine, 2)
        pattern = pattern / (pattern.std() + 1e-6)
    busy = gaussian_filter(np.abs(image - gaussian_filter(image, (2, 2, 0))).mean(-1), 2)
    weight = 0.4 + busy / (busy.max() + 1e-6)
    return image + ((0.02 + 0.12 * severity) * weight * pattern)[..., None].astype(np.float32)


def _paint(image, severity, rng):
    size = 3 + 2 * round(2 * severity)
    flat = median_filter(image, (size, size, 1))
    return flat + (0.3 + severity) * (flat - gaussian_filter(flat, (1.5, 1.5, 0)))


def _speckle(image, severity, rng):
    """Colored blotches as large as a latent, or smaller: what is left of the noise that a sampler started from."""
    sigma = rng.uniform(0.6, 2)
    blotches = gaussian_filter(rng.normal(size=image.shape), (sigma, sigma, 0))
    return image + ((0.008 + 0.05 * severity) / blotches.std() * blotches).astype(np.float32)


INPUT_FAULTS: dict[str, Callable] = {"blur": _blur, "downscale": _downscale, "noise": _noise, "jpeg": _jpeg}
DISTORTIONS: dict[str, Callable] = INPUT_FAULTS | {
    "sharpen": _sharpen, "ringing": _ringing, "texture": _texture, "paint": _paint,
    "speckle": _speckle,
}  # fmt: skip


def distort(image: np.ndarray, kinds: list[str], rng: np.random.Generator) -> np.ndarray:
    """Apply one or two random distortions of these kinds, at random severities, to ``[H, W, 3]`` in [0, 1]."""
    for kind in rng.choice(kinds, size=1 if rng.random() < 0.6 else 2, replace=False):
        image = np.clip(DISTORTIONS[kind](image, rng.random(), rng), 0, 1).astype(np.float32)
    return image
