"""Pictures as float32 sRGB arrays ``[H, W, 3]`` in [0, 1]: reading files, 8 bits and back, resizing, JPEG."""

import io
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from scipy.ndimage import distance_transform_edt

__all__ = [
    "SUFFIXES",
    "from_uint8",
    "jpeg",
    "read_image",
    "read_image_and_alpha",
    "resize",
    "to_image",
    "to_tensor",
    "to_uint8",
]

logger = logging.getLogger(__name__)

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


def to_image(tensor: torch.Tensor) -> np.ndarray:
    """The inverse of `to_tensor`, in 8 bits: ``[3, H, W]`` in [0, 1] to ``[H, W, 3]``."""
    return to_uint8(np.moveaxis(tensor.detach().float().cpu().numpy(), 0, -1))


def read_image(path: str | Path) -> np.ndarray:
    """Decode a file of any kind Pillow reads; what is transparent lies on white.

    The picture is upright as its EXIF orientation asks, and converted to sRGB if it has an ICC profile of other colors
    (Display P3, Adobe RGB, CMYK …); gray images repeat their channel.

    Raises:
        OSError: if the file cannot be read or decoded as an image, or holds numbers without a known white.
    """
    image, alpha = read_image_and_alpha(path, bleed=False)
    return image if alpha is None else (image * alpha + (1 - alpha)).astype(np.float32)


def read_image_and_alpha(path: str | Path, bleed: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """The same with opacity ``[H, W, 1]`` in [0, 1] by itself, None if the picture is opaque everywhere.

    Args:
        path: the file.
        bleed: give pixels of opacity 0, whose color means nothing, that of the nearest pixel which shows.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16-bit gray, which Pillow's own conversion would clip at 255
                gray = np.asarray(image).astype(np.float32) / 65535
                return np.repeat(gray.clip(0, 1)[..., None], 3, axis=-1), None
            if image.mode == "F":
                raise OSError("it holds floating-point numbers, whose white is not known; save it with 8 or 16 bits")
            colors = from_uint8(np.asarray(_to_srgb(image, file.info.get("icc_profile"), path)))
            if not image.has_transparency_data:
                return colors, None
            alpha = from_uint8(np.asarray(image.convert("RGBA").getchannel("A")))
    except OSError:
        raise
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow's decoders also raise
        raise OSError(str(error)) from error
    if alpha.min() == 1:
        return colors, None
    if bleed and alpha.max() > 0:
        rows, columns = np.asarray(distance_transform_edt(alpha == 0, return_distances=False, return_indices=True))
        colors = colors[rows, columns]
    return colors, alpha[..., None]


_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of Pillow, by the color space of an ICC profile


def _to_srgb(image: Image.Image, profile: bytes | None, path: str | Path) -> Image.Image:
    """Convert by the embedded profile; a profile that cannot be used is said, and the numbers are taken for sRGB."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = _MODES.get(source.profile.xcolor_space)
            if mode is None or (mode == "CMYK") != (image.mode == "CMYK"):
                raise OSError(f"it is for {source.profile.xcolor_space.strip()}, the picture is {image.mode}")
            converted = ImageCms.profileToProfile(
                image if image.mode == mode else image.convert(mode),
                source,
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            assert converted is not None  # it is not done in place
            return converted
        except (ImageCms.PyCMSError, OSError) as error:
            logger.warning("%s: its color profile cannot be used and is passed over (%s)", path, error)
    return image.convert("RGB")


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
    Image.fromarray(to_uint8(image)).save(buffer, "JPEG", quality=quality)
    return from_uint8(np.asarray(Image.open(buffer)))
