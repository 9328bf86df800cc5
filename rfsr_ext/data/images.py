"""Pictures as float32 arrays ``[H, W, 3]`` in [0, 1]: reading files, 8 bits and back, resizing, JPEG."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

__all__ = ["SUFFIXES", "from_uint8", "jpeg", "read_image", "resize", "to_tensor", "to_uint8"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}  # of files in a folder that count as pictures


def to_uint8(image: np.ndarray) -> np.ndarray:
    """``[H, W, 3]`` in [0, 1] to 8 bits, rounded."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def from_uint8(image: np.ndarray) -> np.ndarray:
    """``[H, W, 3]`` of 8 bits to float32 in [0, 1]."""
    return np.asarray(image, np.float32) / 255


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """``[H, W, 3]`` float32 to a contiguous ``[3, H, W]`` tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0), np.float32))


def read_image(path: str | Path) -> np.ndarray:
    """Decode a file of any kind Pillow reads, upright as its EXIF orientation asks; grey images repeat their channel.

    Raises:
        OSError: if the file cannot be read or decoded as an image, or holds numbers without a known white.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
                grey = np.asarray(image).astype(np.float32) / 65535
                return np.repeat(grey.clip(0, 1)[..., None], 3, axis=-1)
            if image.mode == "F":
                raise OSError("it holds floating-point numbers, whose white is not known; save it with 8 or 16 bits")
            return from_uint8(np.asarray(image.convert("RGB")))
    except OSError:
        raise
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow's decoders also raise
        raise OSError(str(error)) from error


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
