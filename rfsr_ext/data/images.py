"""Pictures as float32 sRGB arrays ``[H, W, 3]`` in [0, 1]: reading files, 8 bits and back, resizing, JPEG."""

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile
from scipy.ndimage import distance_transform_edt

__all__ = [
    "SUFFIXES",
    "Box",
    "Header",
    "from_uint8",
    "jpeg",
    "read_header",
    "read_image",
    "read_image_and_alpha",
    "resize",
    "to_image",
    "to_tensor",
    "to_uint8",
]

logger = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}  # of files in a folder that count as pictures

Box = Callable[[int, int], tuple[int, int, int, int]]
"""From a picture's height and width to the part ``(top, left, height, width)`` of it."""


class Header(NamedTuple):
    """Size of the upright picture, mode and format as Pillow names them, and whether further frames or pages follow."""

    height: int
    width: int
    mode: str
    format: str
    more_frames: bool


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
    channels, height, width = tensor.shape
    result = np.empty((height, width, channels), np.uint8)
    for rows in (slice(top, top + 256) for top in range(0, height, 256)):  # a copy of it all may be too much
        result[rows] = to_uint8(np.moveaxis(tensor[:, rows].detach().float().cpu().numpy(), 0, -1))
    return result


def read_image(path: str | Path | bytes, box: Box | None = None) -> np.ndarray:
    """Decode a file of any kind Pillow reads; what is transparent lies on white.

    The picture is upright as its EXIF orientation asks, and converted to sRGB if it has an ICC profile of other colors
    (Display P3, Adobe RGB, CMYK …), EXIF that calls it Adobe RGB, or a PNG's gamma; gray images repeat their channel;
    of several frames or pages the first counts.  Gray of 16 bits keeps its depth, other colors of 16 bits keep their
    upper eight, as Pillow reads them.

    Args:
        path: the file, or its content.
        box: called with the upright picture's height and width, gives the part ``(top, left, height, width)`` to read.
            The pixels are those of the whole picture, which is decoded whole, so that damage anywhere in a file is an
            error whatever the part; only the part is turned, converted and made floating point, which takes most of
            the time of a large picture.  (What decoding less would save: ``benchmarks/results/reading-*.md``.  JPEG's
            draft mode gives other pixels, as it scales.)

    Raises:
        OSError: if the file cannot be read or decoded as an image, or holds numbers without a known white.
    """
    image, alpha = _read(path, box, bleed=False)
    return image if alpha is None else (image * alpha + (1 - alpha)).astype(np.float32)


def read_image_and_alpha(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The same with opacity ``[H, W, 1]`` in [0, 1] by itself, None if the picture is opaque everywhere.

    Pixels of opacity 0, whose color means nothing, get that of the nearest pixel which shows.
    """
    return _read(path, None, bleed=True)


def read_header(path: str | Path) -> Header:
    """What the beginning of a file says of its picture; nothing is decoded.

    Raises:
        OSError: if the file cannot be read or does not begin as an image.
    """
    with _decoding(), Image.open(path) as file:
        width, height = file.size
        # PNG may hold its orientation behind the pixels, where Pillow would decode them to reach it
        turned = (file.format not in ("PNG", "TIFF") or "exif" in file.info) and _orientation(file) >= 5
        height, width = (width, height) if turned else (height, width)
        return Header(height, width, file.mode, file.format or "", getattr(file, "is_animated", False))


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Whatever a decoder makes of a damaged file is an `OSError`: Pillow's raise a dozen other kinds as well."""
    try:
        yield
    except OSError:
        raise
    except MemoryError as error:
        raise OSError("it needs more memory than there is") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise OSError(f"it has more than the {most:.0f} million pixels that are read; give parts of it") from error
    except Exception as error:
        raise OSError(str(error) or type(error).__name__) from error


def _orientation(file: Image.Image) -> int:
    """As EXIF counts, 1 (upright) to 8; what is no such number counts as upright."""
    value = file.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in _TURNS else 1


# By EXIF orientation: what brings the stored picture upright.
_TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(file: Image.Image, box: Box | None) -> Image.Image:
    """The picture, or a part of it, turned as its orientation asks; only that part is turned."""
    if isinstance(file, ImageFile.ImageFile) and file.format == "TIFF":
        file.filename = ""  # else Pillow maps an uncompressed one into memory and confuses the sides of a turned one
    file.load()  # some formats turn themselves, others have their orientation at the end
    turn = _TURNS[_orientation(file)]
    image: Image.Image = file
    if box is not None:
        width, height = file.size if turn is None or turn.name in _KEEP_SIDES else file.size[::-1]
        top, left, high, wide = box(height, width)
        image = file.crop(_stored((left, top, left + wide, top + high), (width, height), turn))
    return image if turn is None else image.transpose(turn)


_KEEP_SIDES = {"FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM"}


def _stored(box: tuple[int, int, int, int], size: tuple[int, int], turn: Image.Transpose | None):
    """Where a box ``(left, top, right, bottom)`` of the upright picture of this size lies in the stored one."""
    (left, top, right, bottom), (width, height) = box, size
    rows, columns = (top, bottom), (left, right)
    up, across = (height - bottom, height - top), (width - right, width - left)  # counted from the other side
    x, y = {
        None: (columns, rows),
        "FLIP_LEFT_RIGHT": (across, rows),
        "ROTATE_180": (across, up),
        "FLIP_TOP_BOTTOM": (columns, up),
        "TRANSPOSE": (rows, columns),
        "ROTATE_270": (rows, across),
        "TRANSVERSE": (up, across),
        "ROTATE_90": (up, columns),
    }[None if turn is None else turn.name]
    return x[0], y[0], x[1], y[1]


def _read(path: str | Path | bytes, box: Box | None, bleed: bool) -> tuple[np.ndarray, np.ndarray | None]:
    def opened() -> ImageFile.ImageFile:
        return Image.open(io.BytesIO(path) if isinstance(path, bytes) else path)

    with _decoding(), opened() as file:
        is_png = file.format == "PNG"
        if is_png:  # Pillow compares the checksums of the pixels on request alone, of a file opened for that
            with opened() as same:
                same.verify()
        image = _upright(file, box)
        name = "a streamed picture" if isinstance(path, bytes) else path
        if image.mode.startswith("I;16") or (image.mode == "I" and is_png):
            # 16-bit gray, which Pillow's own conversion would clip at 255
            gray = np.asarray(image).astype(np.float32).clip(0, 65535) / 65535
            if profile := file.info.get("icc_profile"):  # by way of the 8-bit levels, the most that ImageCms takes
                ramp = _to_srgb(Image.frombytes("L", (256, 1), bytes(range(256))), profile, name)
                gray = np.interp(gray, np.arange(256) / 255, np.asarray(ramp)[0, :, 0] / 255).astype(np.float32)
            gray = _from_gamma(gray, file, name)
            return np.repeat(gray[..., None], 3, axis=-1), None
        if image.mode in ("I", "F"):
            kind = {"I": "32-bit", "F": "floating-point"}[image.mode]
            raise OSError(f"it holds {kind} numbers, whose white is not known; save it with 8 or 16 bits")
        colors = from_uint8(np.asarray(_to_srgb(image, file.info.get("icc_profile"), name)))
        colors = _from_adobe_rgb(colors) if _is_adobe_rgb(file) else _from_gamma(colors, file, name)
        if not image.has_transparency_data:
            return colors, None
        alpha = from_uint8(np.asarray(image.convert("RGBA").getchannel("A")))
    if alpha.min() == 1:
        return colors, None
    if bleed and alpha.max() > 0:
        rows, columns = np.asarray(distance_transform_edt(alpha == 0, return_distances=False, return_indices=True))
        colors = colors[rows, columns]
    return colors, alpha[..., None]


@functools.cache
def _warn(sentence: str) -> None:
    """Once, however often a file is read."""
    logger.warning("%s", sentence)


_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}  # of Pillow, by the color space of an ICC profile


def _to_srgb(image: Image.Image, profile: bytes | None, path: str | Path) -> Image.Image:
    """Convert by the embedded profile; a profile that cannot be used is said, and the numbers are taken for sRGB."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            mode = _MODES.get(source.profile.xcolor_space)
            if mode is None or (mode != image.mode and {mode, image.mode} & {"CMYK", "LAB"}):
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
            _warn(f"{path}: its color profile cannot be used and is passed over ({error})")
    return image.convert("RGB")


_SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # of white, red, green, blue, as cHRM has them


def _from_gamma(colors: np.ndarray, file: Image.Image, path: str | Path) -> np.ndarray:
    """Convert by a PNG's chunk gAMA (its numbers are light to the power of it), unless an ICC profile or sRGB decides.

    One near 1/2.2 is that of sRGB.  Other primaries in cHRM are said and passed over.
    """
    gamma = file.info.get("gamma")
    if file.format != "PNG" or "icc_profile" in file.info or "srgb" in file.info:
        return colors
    if not np.allclose(file.info.get("chromaticity", _SRGB_PRIMARIES), _SRGB_PRIMARIES, atol=0.01):
        _warn(f"{path}: its chunk cHRM names other colors than sRGB's and is passed over; embed an ICC profile")
    if gamma is None or abs(gamma - 1 / 2.2) < 0.02:
        return colors
    if not 0.1 <= gamma <= 10:
        _warn(f"{path}: its gamma of {gamma:g} cannot be meant and is passed over")
        return colors
    return _encode(colors ** (1 / gamma))


def _encode(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to sRGB's numbers."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055).astype(np.float32)


def _is_adobe_rgb(file: ImageFile.ImageFile) -> bool:
    """Whether EXIF says so and nothing else decides: other colors than sRGB's, and an "option file" (DCF 2.0)."""
    if file.info.get("icc_profile") or "srgb" in file.info or file.mode == "CMYK":
        return False
    with contextlib.suppress(Exception):  # whatever Pillow makes of damaged EXIF; the picture itself is whole
        exif = file.getexif()
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
        return space == 65535 and exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == "R03"
    return False


# Linear Adobe RGB (1998) to linear sRGB: both have the same white, red and blue.
_ADOBE_TO_SRGB = np.array([[1.398356, -0.398356, 0], [0, 1, 0], [0, -0.042933, 1.042933]], np.float32)


def _from_adobe_rgb(colors: np.ndarray) -> np.ndarray:
    """Colors beyond sRGB's become its nearest by channel."""
    return _encode((colors ** (563 / 256) @ _ADOBE_TO_SRGB.T).clip(0, 1))


def resize(image: np.ndarray, size: tuple[int, int], resample=Image.Resampling.BICUBIC) -> np.ndarray:
    """Resize ``[H, W, C]`` float32 to ``size = (height, width)`` by Pillow's antialiased filters, unrounded."""
    height, width = size
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(channel)).resize((width, height), resample))
        for channel in np.moveaxis(image, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def jpeg(image: np.ndarray, quality: int, subsampling: str = "4:2:0") -> np.ndarray:
    """Write ``[H, W, 3]`` in [0, 1] as JPEG of this quality and subsampling of colors, and read it back."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return from_uint8(np.asarray(Image.open(buffer)))
