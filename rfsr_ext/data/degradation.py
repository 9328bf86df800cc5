"""How a low-resolution image is made from a sharp one: blur, downsample, noise, JPEG.

A small relative of the Real-ESRGAN pipeline the paper trains with: one round instead of two, with milder ranges,
because the images here are 64 to 128 pixels wide.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from rfsr_ext.data.images import jpeg, resize

__all__ = ["Degradation"]

_FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Degradation:
    """Random blur, ×``scale`` downsampling, noise and JPEG, each drawn uniformly from its range.

    Attributes:
        scale: how many times smaller the result is.
        blur: standard deviation of the Gaussian blur, in pixels of the sharp image.
        noise: standard deviation of the Gaussian noise, in gray levels of 255, added after downsampling.
        jpeg_quality: libjpeg quality, both ends included.
    """

    scale: int = 4
    blur: tuple[float, float] = (0.2, 1.6)
    noise: tuple[float, float] = (0.0, 5.0)
    jpeg_quality: tuple[int, int] = (70, 95)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``[H, W, 3]`` in [0, 1], H and W multiples of ``scale``, to ``[H/scale, W/scale, 3]``, 8 bits deep."""
        height, width = image.shape[:2]
        sigma = rng.uniform(*self.blur)
        image = gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
        image = resize(image, (height // self.scale, width // self.scale), _FILTERS[rng.integers(len(_FILTERS))])
        image = image + rng.normal(0, rng.uniform(*self.noise) / 255, image.shape).astype(np.float32)
        return jpeg(image, int(rng.integers(self.jpeg_quality[0], self.jpeg_quality[1] + 1)))
