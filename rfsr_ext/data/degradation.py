"""How a low-resolution image is made from a sharp one: blur, downsample, noise, JPEG.

A small relative of the Real-ESRGAN pipeline the paper trains with: one round instead of two, with milder ranges,
because the images here are 64 to 128 pixels wide.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

__all__ = ["Degradation", "from_uint8", "jpeg", "resize", "to_uint8"]

_FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """``[H, W, 3]`` in [0, 1] to 8 bits, rounded."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def from_uint8(image: np.ndarray) -> np.ndarray:
    """``[H, W, 3]`` of 8 bits to float32 in [0, 1]."""
    return np.asarray(image, np.float32) / 255


def resize(image: np.ndarray, size: tuple[int, int], resample=Image.Resampling.BICUBIC) -> np.ndarray:
    """Resize ``[H, W, C]`` float32 to ``size = (height, width)`` by Pillow's antialiased filters, unrounded."""
    height, width = size
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(channel)).resize((width, height), resample))
        for channel in np.moveaxis(image, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Write ``[H, W, 3]`` in [0, 1] as JPEG of this quality and read it back."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, "JPEG", quality=int(quality))
    return from_uint8(Image.open(buffer))


@dataclass(frozen=True)
class Degradation:
    """Random blur, ×``scale`` downsampling, noise and JPEG, each drawn uniformly from its range.

    Attributes:
        scale: how many times smaller the result is.
        blur: standard deviation of the Gaussian blur, in pixels of the sharp image.
        noise: standard deviation of the Gaussian noise, in grey levels of 255, added after downsampling.
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
        return jpeg(image, rng.integers(self.jpeg_quality[0], self.jpeg_quality[1] + 1))
