"""What a file's numbers mean: color profiles and transparency, against closed forms that share no code with Pillow."""

import io
import logging
import struct

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from rfsr_ext.data import load_photograph
from rfsr_ext.data.images import (
    _warn,
    from_uint8,
    read_header,
    read_image,
    read_image_and_alpha,
    to_image,
    to_tensor,
    to_uint8,
)

D50 = np.array([0.9642, 1.0, 0.8249])  # ICC's own white


def white(x, y):
    return np.array([x / y, 1, (1 - x - y) / y])


def to_d50(primaries, xy):
    """Linear RGB to XYZ under D50: primaries scaled to the white, then Bradford's adaptation (ICC.1:2022, annex E)."""
    matrix = np.array([white(x, y) for x, y in primaries]).T
    matrix = matrix * np.linalg.solve(matrix, white(*xy))
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gain = (bradford @ D50) / (bradford @ white(*xy))
    return np.linalg.inv(bradford) @ (gain[:, None] * bradford) @ matrix


def srgb_decode(x):
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def srgb_encode(x):
    x = x.clip(0)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


SRGB = to_d50([(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)], (0.3127, 0.3290))
SPACES = {  # linear RGB to XYZ under D50, decoding, encoding
    "Display P3": (
        to_d50([(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)], (0.3127, 0.3290)), srgb_decode, srgb_encode,
    ),
    "Adobe RGB": (
        to_d50([(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)], (0.3127, 0.3290)),
        lambda x: x ** (563 / 256), lambda x: x.clip(0) ** (256 / 563),
    ),
    "ProPhoto": (
        to_d50([(0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)], (0.3457, 0.3585)),
        lambda x: x**1.8, lambda x: x.clip(0) ** (1 / 1.8),
    ),
}  # fmt: skip


def profile(decode, matrix=None):
    """An ICC profile of version 2 (ICC.1:2001-04): three primaries and a curve, or only a curve for gray."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    table = np.round(decode(np.linspace(0, 1, 4096)) * 65535).astype(">u2").tobytes()
    curve = b"curv\0\0\0\0" + struct.pack(">I", 4096) + table
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(D50),
    }
    if matrix is None:
        tags[b"kTRC"] = curve
    else:
        tags |= {f"{c}XYZ".encode(): xyz(matrix[:, i]) for i, c in enumerate("rgb")}
        tags |= {f"{c}TRC".encode(): curve for c in "rgb"}
    offset, index, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        index += name + struct.pack(">2I", offset + len(data), len(content))
        data += content
    space = b"GRAY" if matrix is None else b"RGB "
    head = struct.pack(">I4sI4s4s4s", offset + len(data), b"\0\0\0\0", 0x02100000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(D50)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + data


def psnr(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2))


@pytest.fixture(scope="module")
def photograph():
    return from_uint8(to_uint8(load_photograph("coffee")[100:260, 150:360]))  # the cup


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_a_picture_with_a_profile_reads_as_its_srgb_twin(tmp_path, photograph, space, suffix):
    matrix, decode, encode = SPACES[space]
    other = encode(srgb_decode(photograph) @ SRGB.T @ np.linalg.inv(matrix).T)
    options = {"lossless": True} if suffix == "webp" else {}
    icc = profile(decode, matrix)
    Image.fromarray(to_uint8(other)).save(tmp_path / f"photo.{suffix}", icc_profile=icc, **options)
    image = read_image(tmp_path / f"photo.{suffix}")
    assert image.dtype == np.float32 and image.shape == photograph.shape
    assert psnr(image, photograph) > 48 > 35 > psnr(to_uint8(other) / 255, photograph)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(("space", "index", "icc"), [(65535, "R03", False), (1, "R03", False), (65535, "R98", False),
                                                     (65535, "R03", True)])  # fmt: skip
def test_exif_alone_says_adobe_rgb(tmp_path, photograph, suffix, space, index, icc):
    """As cameras mark it (DCF 2.0, section 4.5); a profile in the file wins."""
    matrix, _, encode = SPACES["Adobe RGB"]
    other = to_uint8(encode(srgb_decode(photograph) @ SRGB.T @ np.linalg.inv(matrix).T))
    exif = Image.Exif()
    exif[0x0112] = 1  # Pillow writes nothing if there is nothing at the first level
    exif.get_ifd(ExifTags.IFD.Exif)[0xA001] = space
    exif.get_ifd(ExifTags.IFD.Exif)[0xA005] = {1: index}
    options = {"icc_profile": profile(srgb_decode, SRGB)} if icc else {}
    options |= {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(other).save(tmp_path / f"photo.{suffix}", exif=exif, **options)
    meant = photograph if (space, index, icc) == (65535, "R03", False) else other / 255
    assert psnr(read_image(tmp_path / f"photo.{suffix}"), meant) > 45


def png(pixels, *chunks):
    """A PNG with more chunks: pairs of a name and numbers."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    for name, numbers in chunks:
        info.add(name, struct.pack(f">{len(numbers)}I", *numbers))
    image.save(buffer, "png", pnginfo=info)
    return buffer.getvalue()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize(("gamma", "meant"), [(100_000, 1), (55_556, 1 / 1.8), (45_455, None), (0, None)])
def test_gamma_of_a_png(depth, gamma, meant, caplog):
    """By the PNG specification (12.1): light is the number to the power of 1 / gAMA."""
    values = np.linspace(0, np.iinfo(depth).max, 256).astype(depth).reshape(16, 16)
    numbers = values / np.iinfo(depth).max
    _warn.cache_clear()  # it says each sentence once
    expected = numbers if meant is None else srgb_encode(numbers ** (1 / meant))
    found = read_image(png(values, (b"gAMA", [gamma])))
    np.testing.assert_allclose(found, np.stack([expected] * 3, -1), atol=1e-4)
    assert ("its gamma of 0 cannot be meant" in caplog.text) == (gamma == 0)


def test_an_icc_profile_and_srgb_win_over_gamma(caplog):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    plain, both = read_image(png(values)), io.BytesIO()
    _warn.cache_clear()
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", struct.pack(">I", 100_000))
    Image.fromarray(values).save(both, "png", icc_profile=profile(srgb_decode), pnginfo=info)
    np.testing.assert_allclose(read_image(both.getvalue()), plain, atol=1.6 / 255)
    colors = [31_270, 32_900, 68_000, 32_000, 26_500, 69_000, 15_000, 6_000]  # Display P3
    np.testing.assert_array_equal(read_image(png(values, (b"cHRM", colors))), plain)
    assert "its chunk cHRM names other colors than sRGB's" in caplog.text


@pytest.mark.parametrize("mode", ["L", "LA", "RGB"])
def test_gray_profiles(tmp_path, mode):
    """A profile for gray, on whatever mode the file has."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    icc = profile(lambda x: x**1.8)
    Image.fromarray(values).convert(mode).save(tmp_path / "gray.png", icc_profile=icc)
    expected = srgb_encode((values / 255) ** 1.8)
    np.testing.assert_allclose(read_image(tmp_path / "gray.png"), np.stack([expected] * 3, -1), atol=1.6 / 255)


def test_a_gray_profile_at_16_bits(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "deep.png", icc_profile=profile(lambda x: x**1.8))
    expected = srgb_encode((values / 65535) ** 1.8)
    np.testing.assert_allclose(read_image(tmp_path / "deep.png"), np.stack([expected] * 3, -1), atol=1.6 / 255)


@pytest.mark.parametrize("embedded", [True, False])
def test_a_tiff_in_cielab(tmp_path, embedded, caplog):
    """L* takes 0 to 255, a* and b* are signed bytes (TIFF 6.0, section 23); white is D50's."""
    wanted = np.random.default_rng(0).random((16, 16, 3)) * 0.4 + 0.3
    ratio = srgb_decode(wanted) @ SRGB.T / D50
    x, y, z = np.moveaxis(np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / 3 / (6 / 29) ** 2 + 4 / 29), -1, 0)
    lab = np.stack([(116 * y - 16) * 2.55, 500 * (x - y), 200 * (y - z)], -1).round().astype(np.int16).astype(np.uint8)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes() if embedded else None
    Image.frombytes("LAB", (16, 16), lab.tobytes()).save(tmp_path / "print.tif", icc_profile=icc)
    np.testing.assert_allclose(read_image(tmp_path / "print.tif"), wanted, atol=4 / 255)
    assert not caplog.records


def test_a_profile_survives_the_rotation(tmp_path, photograph):
    matrix, decode, encode = SPACES["Display P3"]
    other = encode(srgb_decode(photograph) @ SRGB.T @ np.linalg.inv(matrix).T)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(to_uint8(other)).save(tmp_path / "turned.png", icc_profile=profile(decode, matrix), exif=exif)
    assert psnr(read_image(tmp_path / "turned.png"), np.rot90(photograph, -1)) > 48


@pytest.mark.parametrize("icc", [b"no profile", b"", profile(srgb_decode, SRGB)[:300]])
def test_a_broken_profile_is_said_and_passed_over(tmp_path, photograph, icc, caplog):
    Image.fromarray(to_uint8(photograph)).save(tmp_path / "photo.png", icc_profile=icc)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), photograph)
    assert [record.message.startswith(f"{tmp_path / 'photo.png'}: its color profile") for record in caplog.records] == (
        [True] if icc else []
    )


def test_transparency_lies_on_white(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (7, 9, 4), np.uint8)
    pixels[:3, :4, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "logo.png")
    alpha = pixels[..., 3:] / 255
    np.testing.assert_allclose(read_image(tmp_path / "logo.png"), pixels[..., :3] / 255 * alpha + 1 - alpha, atol=1e-6)
    image, opacity = read_image_and_alpha(tmp_path / "logo.png")
    np.testing.assert_allclose(opacity, alpha, atol=1e-6)
    shows = pixels[..., 3] > 0
    np.testing.assert_allclose(image[shows], pixels[shows][:, :3] / 255, atol=1e-6)
    np.testing.assert_array_equal(image[0, [0, 3]], image[[3, 0], [0, 4]])  # of the nearest that shows
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    assert read_image_and_alpha(tmp_path / "opaque.png")[1] is None
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "nothing.png")
    assert (read_image(tmp_path / "nothing.png") == 1).all() and read_image_and_alpha(tmp_path / "nothing.png")[
        1
    ].max() == 0


@pytest.mark.parametrize("mode", ["P", "LA", "RGB", "1", "L"])
def test_every_way_to_say_transparent(tmp_path, mode):
    """A palette entry, a color or a channel."""
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 4, 8))
    image = image.convert(mode)
    if mode == "LA":
        image.putalpha(Image.fromarray(np.repeat(np.uint8([[255] * 4 + [0] * 4]), 8, 0)))
        image.save(tmp_path / "x.png")
    else:
        black = {"RGB": (0, 0, 0), "P": image.getpixel((7, 0))}.get(mode, 0)
        image.save(tmp_path / "x.png", transparency=black)
    colors, alpha = read_image_and_alpha(tmp_path / "x.png")
    np.testing.assert_array_equal(alpha[..., 0], np.repeat([[1.0] * 4 + [0.0] * 4], 8, 0))
    assert (colors == 1).all() and (read_image(tmp_path / "x.png") == 1).all()


def test_to_image_is_the_inverse_of_to_tensor(photograph):
    np.testing.assert_array_equal(to_image(to_tensor(photograph)), to_uint8(photograph))
    assert to_image(torch.tensor([-1.0, 0.5, 2.0]).reshape(3, 1, 1).half()).tolist() == [[[0, 128, 255]]]


def upright(pixels, orientation):
    """By the words of EXIF 2.32: which visual sides the 0th row and the 0th column are."""
    pixels = pixels if orientation < 5 else pixels.swapaxes(0, 1)
    row, column = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[
        orientation
    ]
    return np.ascontiguousarray(pixels[::row, ::column])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_part_is_that_of_the_whole_picture(tmp_path, orientation, suffix):
    """However the file is turned, and with a color profile and transparency."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = orientation
    pixels = rng.integers(0, 256, (30, 44, 3 if suffix == "jpg" else 4), np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, icc_profile=profile(*SPACES["Display P3"][1::-1]))
    whole = read_image(path)
    assert whole.shape == ((30, 44, 3) if orientation < 5 else (44, 30, 3))
    Image.fromarray(upright(pixels, orientation)).save(path, icc_profile=profile(*SPACES["Display P3"][1::-1]))
    if suffix in ("png", "tif"):
        np.testing.assert_array_equal(read_image(path), whole)
    Image.fromarray(pixels).save(path, exif=exif, icc_profile=profile(*SPACES["Display P3"][1::-1]))
    assert read_header(path)[:2] == whole.shape[:2]
    part = read_image(path, lambda height, width: (height - 23, width - 21, 20, 17))
    np.testing.assert_array_equal(part, whole[-23:-3, -21:-4])
