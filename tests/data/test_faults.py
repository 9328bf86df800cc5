"""What people's data folders hold besides good pictures, fault by fault.

Each is skipped and counted, passed over and counted, converted as documented, or refused before training; none ends a
training, and nothing is silently another picture than the one a viewer shows.
"""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch.utils.data import DataLoader

from rfsr_ext.data import Degradation, ImageFolder, Root
from rfsr_ext.data.images import read_image

SIZE = 16
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 20, 3), np.uint8)
SMOOTH = np.kron(RNG.integers(40, 216, (3, 5, 3), np.uint8), np.ones((8, 4, 1), np.uint8))  # survives a JPEG
DEGRADATION = Degradation.preset("mini")


def encoded(pixels=PIXELS, kind="png", mode=None, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, content, crc=None):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body) if crc is None else crc)


def png(pixels, color, depth=8, before=b"", size=None, data=None, header_crc=None):
    """A PNG written by hand: what Pillow does not write, or should not."""
    height, width = size or pixels.shape[:2]
    rows = b"" if pixels is None else b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, color, 0, 0, 0), header_crc)
    data = chunk(b"IDAT", zlib.compress(rows)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + head + before + data + chunk(b"IEND", b"")


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def cut(data, share=0.5):
    return data[: int(len(data) * share)]


def jpeg(**options):
    return encoded(SMOOTH, "jpeg", quality=95, subsampling=0, **options)


def flipped(data):
    """One bit of the pixels is another, which the checksum alone shows: nothing is compressed here."""
    at = data.index(b"IDAT") + 200
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def marked(old, new):
    """A JPEG with one marker or field changed."""
    data = jpeg()
    assert old in data
    return data.replace(old, new, 1)


DEEP = np.arange(24 * 20, dtype=np.uint32).reshape(24, 20) * 136  # up to 65 144
DEEP_RGB = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], -1)
ALPHA = np.concatenate([PIXELS, np.where(np.arange(20) < 10, 0, 255)[None, :, None].repeat(24, 0).astype(np.uint8)], -1)
ON_WHITE = np.where(ALPHA[..., 3:] == 0, 255, PIXELS)
LEFT = np.arange(20)[None, :, None] < 10
GRAY = PIXELS[..., :1].repeat(3, -1)


def tiff(**options):
    return encoded(kind="tiff", **options)


def paletted():
    """Colors of a palette of 16."""
    return Image.fromarray(PIXELS).quantize(16)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cmyk():
    """Without a profile black is one minus the channels' sum, no ink white."""
    ink = np.zeros((24, 20, 4), np.uint8)
    ink[:, 10:] = (0, 255, 255, 0)  # red
    return Image.frombytes("CMYK", (20, 24), ink.tobytes())


WHITE_RED = np.full((24, 20, 3), 255, np.uint8)
WHITE_RED[:, 10:, 1:] = 0

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

# name of the file: its content and the reason for which it is skipped
SKIPPED = {
    "truncated.png": (cut(encoded()), "cannot be decoded"),
    "truncated.jpg": (cut(jpeg()), "cannot be"),
    "truncated.webp": (cut(encoded(kind="webp", lossless=True)), "cannot be"),
    "truncated.bmp": (cut(encoded(kind="bmp")), "cannot be"),
    "truncated.tif": (cut(tiff(compression="tiff_lzw")), "cannot be"),
    "header_only.png": (encoded()[:40], "cannot be"),
    "last_byte_missing.jpg": (cut(jpeg(), 0.97), "cannot be decoded"),
    "empty.png": (b"", "cannot be read as an image"),
    "one_byte.jpg": (b"\xff", "cannot be read as an image"),
    "zeros.jpg": (bytes(5000), "cannot be read as an image"),
    "text.png": (b"this is no image\n", "cannot be read as an image"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "cannot be read as an image"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "cannot be read"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "cannot be"),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read as an image"),
    "one_bit.png": (flipped(encoded(compress_level=0)), "cannot be decoded"),
    "bad_header_checksum.png": (png(PIXELS, 2, header_crc=1), "cannot be read as an image"),
    "bad_stream.png": (png(PIXELS, 2, data=chunk(b"IDAT", b"no zlib stream at all")), "cannot be decoded"),
    "no_data.png": (png(PIXELS, 2, data=b""), "cannot be"),
    "no_sides.png": (png(None, 2, size=(0, 0)), "cannot be"),
    "bomb.png": (png(None, 0, size=(20_000, 10_000)), "cannot be read as an image (it has more than the 179"),
    "text_bomb.png": (
        png(PIXELS, 2, before=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21)))),
        "cannot be read as an image (Decompressed data too large",
    ),
    "no_scan.jpg": (b"\xff\xd8\xff\xd9", "cannot be"),
    "twelve_bits.jpg": (marked(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "cannot be"),
    "lossless.jpg": (marked(b"\xff\xc0\x00\x11", b"\xff\xc3\x00\x11"), "cannot be"),
    "bad_tables.jpg": (marked(b"\xff\xc4", b"\xff\xcc"), "cannot be"),
    "riff.webp": (b"RIFF\x20\0\0\0WEBPVP8 " + bytes(20), "cannot be"),
    "float.tif": (saved(Image.fromarray(np.ones((24, 20), np.float32)), "tiff"), "cannot be decoded"),
    "whole_32.tif": (saved(Image.fromarray(DEEP.astype(np.int32)), "tiff"), "cannot be decoded"),
    "compression.tif": (tiff().replace(b"\3\1\3\0\1\0\0\0\1\0", b"\3\1\3\0\1\0\0\0\x63\x77"), "cannot be"),
    "small.png": (encoded(PIXELS[:15]), "is 20x15 pixels, the crop needs 16"),
    "one_row.png": (encoded(PIXELS[:1]), "is 20x1 pixels, the crop needs 16"),
    "one_pixel.gif.png": (encoded(PIXELS[:1, :1], "gif"), "is 1x1 pixels, the crop needs 16"),
}  # fmt: skip

# name of the file: its content, the picture that a viewer shows, and by how much it may differ
CONVERTED = {
    "rgb.png": (encoded(), PIXELS, 0),
    "gray.png": (encoded(PIXELS[..., 0]), GRAY, 0),
    "gray.jpg": (encoded(SMOOTH[..., 0], "jpeg", quality=95), SMOOTH[..., :1].repeat(3, -1), 12),
    "two_levels.png": (
        encoded(np.where(PIXELS[..., 0] > 99, 255, 0).astype(np.uint8), mode="1"), np.where(GRAY > 99, 255, 0), 0
    ),
    "palette.png": (saved(paletted(), "png"), np.asarray(paletted().convert("RGB")), 0),
    "palette.bmp": (saved(paletted(), "bmp"), np.asarray(paletted().convert("RGB")), 0),
    "palette_with_a_hole.png": (
        saved(paletted(), "png", transparency=3),
        np.where(np.asarray(paletted())[..., None] == 3, 255, np.asarray(paletted().convert("RGB"))), 0,
    ),
    "alpha.png": (encoded(ALPHA), ON_WHITE, 0),
    "alpha.webp": (encoded(ALPHA, "webp", lossless=True, exact=True), ON_WHITE, 0),
    "alpha.tif": (encoded(ALPHA, "tiff"), ON_WHITE, 0),
    "gray_with_alpha.png": (encoded(ALPHA[..., ::3].copy()), np.where(ALPHA[..., 3:] == 0, 255, GRAY), 0),
    "one_color_is_none.png": (
        encoded(np.where(LEFT, PIXELS[0, 0], PIXELS), transparency=tuple(map(int, PIXELS[0, 0]))),
        np.where(LEFT, 255, PIXELS), 0,
    ),
    "cmyk.jpg": (saved(cmyk(), "jpeg", quality=95, subsampling=0), WHITE_RED, 12),
    "cmyk.tif": (saved(cmyk(), "tiff"), WHITE_RED, 0),
    "deep_gray.png": (png(DEEP, 0, 16), DEEP[..., None] / 257, 0.01),
    "deep_gray.tif": (saved(Image.fromarray(DEEP.astype(np.uint16)), "tiff"), DEEP[..., None] / 257, 0.01),
    "deep_gray_turned_round.tif": (
        saved(Image.fromarray(DEEP.astype(np.uint16)), "tiff", exif=exif(3)), DEEP[::-1, ::-1, None] / 257, 0.01,
    ),
    "deep_big_endian.tif": (
        saved(Image.frombytes("I;16B", (20, 24), DEEP.astype(">u2").tobytes()), "tiff"), DEEP[..., None] / 257, 0.01,
    ),
    "deep_colors.png": (png(DEEP_RGB.reshape(24, -1), 2, 16, size=(24, 20)), DEEP_RGB // 256, 0),
    "turned.jpg": (jpeg(exif=exif(6)), np.rot90(SMOOTH, -1), 12),
    "upside_down.jpg": (jpeg(exif=exif(3)), np.rot90(SMOOTH, 2), 12),
    "mirrored.png": (encoded(exif=exif(2)), PIXELS[:, ::-1], 0),
    "turned.webp": (encoded(kind="webp", lossless=True, exif=exif(8)), np.rot90(PIXELS), 0),
    "turned.tif": (tiff(exif=exif(6)), np.rot90(PIXELS, -1), 0),
    "turned_packed.tif": (tiff(exif=exif(6), compression="tiff_lzw"), np.rot90(PIXELS, -1), 0),
    "no_orientation.jpg": (jpeg(exif=exif(9)), SMOOTH, 12),
    "broken_exif.jpg": (jpeg(exif=b"Exif\0\0garbage"), SMOOTH, 12),
    "profile.png": (encoded(icc_profile=SRGB), PIXELS, 1),
    "broken_profile.png": (encoded(icc_profile=b"no profile"), PIXELS, 0),
    "animated.png": (
        encoded(save_all=True, append_images=[Image.fromarray(SMOOTH)], default_image=True), PIXELS, 0,
    ),
    "animated.webp": (
        encoded(kind="webp", lossless=True, save_all=True, append_images=[Image.fromarray(SMOOTH)]), PIXELS, 0,
    ),
    "pages.tif": (tiff(save_all=True, append_images=[Image.fromarray(SMOOTH)]), PIXELS, 0),
    "two_views.jpg": (
        encoded(SMOOTH, "mpo", quality=95, subsampling=0, save_all=True, append_images=[Image.fromarray(PIXELS)]),
        SMOOTH, 12,
    ),
    "jpeg_inside.png": (jpeg(), SMOOTH, 12),
    "png_inside.jpg": (encoded(), PIXELS, 0),
    "gif_inside.png": (saved(paletted(), "gif"), np.asarray(paletted().convert("RGB")), 0),
    "SHOUTED.PNG": (encoded(), PIXELS, 0),
    "progressive.jpg": (jpeg(progressive=True), SMOOTH, 12),
    "more_behind_it.jpg": (jpeg() + b"trailing bytes of a careless copy", SMOOTH, 12),
    "more_behind_it.png": (encoded() + bytes(100), PIXELS, 0),
    "größer 写真 📷.png": (encoded(), PIXELS, 0),
    "two\nlines 'and' \"quotes\" %s {x}.png": (encoded(), PIXELS, 0),
    " -rf.png": (encoded(), PIXELS, 0),
    "n" * 240 + ".png": (encoded(), PIXELS, 0),
    os.fsdecode(b"latin-1 \xe9\xff.png"): (encoded(), PIXELS, 0),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(SMOOTH).save(tmp_path / "good.png")
    return tmp_path


def train(dataset, count=12):
    """What training does with a dataset, and what must hold of every sample."""
    for i in range(count):
        sample = dataset[i]
        assert sample["gt"].shape == (3, SIZE, SIZE) and sample["lr"].shape == (3, SIZE // 4, SIZE // 4)
        assert sample["gt"].min() >= 0 and sample["gt"].max() <= 1
    return dataset


def opened(roots, count=12):
    return train(ImageFolder(roots, SIZE, degradation=DEGRADATION), count)


def test_there_are_enough_of_them():
    assert len(SKIPPED) + len(CONVERTED) >= 75


@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_and_counted(folder, name, caplog):
    content, reason = SKIPPED[name]
    (folder / name).write_bytes(content)
    dataset = opened(folder)
    assert [path.name for path in dataset.skipped] == [name] and len(dataset) == 1
    assert dataset.skipped[folder / name].startswith(reason)
    assert name in caplog.text


@pytest.mark.parametrize("name", CONVERTED, ids=lambda name: ascii(name)[:40])
def test_converted(folder, name):
    content, shown, tolerance = CONVERTED[name]
    (folder / "good.png").unlink()
    (folder / name).write_bytes(content)
    dataset = opened(folder, 3)
    assert not dataset.skipped and not dataset.passed_over
    image = read_image(dataset.entries[0].gt)
    assert image.shape[:2] == shown.shape[:2] and image.dtype == np.float32
    assert np.abs(image * 255 - shown).max() <= tolerance + 1e-4
    gt = dataset[0]["gt"].movedim(0, -1).numpy()
    places = [
        window[top : top + SIZE, left : left + SIZE]
        for window in (image, image[:, ::-1])
        for top in range(image.shape[0] - SIZE + 1) for left in range(image.shape[1] - SIZE + 1)
    ]  # fmt: skip
    assert any(np.array_equal(gt, place) for place in places)  # a sample is a part of the picture that is shown


def test_all_at_once_with_loader_processes(folder):
    """Every fault in one training: it goes on, each is counted once and all samples come of good files."""
    for kind in ("skipped", "converted"):
        (folder / kind).mkdir()
    (folder / "good.png").rename(folder / "skipped" / "good.png")
    for name, (content, _) in SKIPPED.items():
        (folder / "skipped" / name).write_bytes(content)
    for name, (content, _, _) in CONVERTED.items():
        (folder / "converted" / name).write_bytes(content)
    roots = [Root(str(folder / "skipped"), weight=5), Root(str(folder / "converted"))]
    dataset = ImageFolder(roots, SIZE, degradation=DEGRADATION)
    loader = DataLoader(dataset, batch_size=8, sampler=range(80), num_workers=2)
    assert sum(len(batch["gt"]) for batch in loader) == 80
    assert {path.name for path in dataset.skipped} <= SKIPPED.keys()
    train(dataset, 100)
    assert {path.name for path in dataset.skipped} == SKIPPED.keys()
    assert len(dataset) == 1 + len(CONVERTED)


def fifo(folder):
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever


def unreadable(folder):
    (folder / "disk_error.png").symlink_to("/proc/self/mem")  # a file whose reading fails, also for root


def folder_called_like_a_picture(folder):
    (folder / "x.png").mkdir()


def loop(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "again").symlink_to(folder)


def to_itself(folder):
    (folder / "self.png").symlink_to("self.png")


def dangling(folder):
    (folder / "gone.png").symlink_to("nowhere.png")


def apple(folder):
    (folder / "._good.png").write_bytes(b"\0\5\x16\7" + bytes(200))
    (folder / ".DS_Store").touch()
    (folder / "__MACOSX").mkdir()


def thumbnails(folder):
    for name in ("@eaDir", ".thumbnails"):
        (folder / name).mkdir()
        (folder / name / "good.png").write_bytes(encoded())


def other_pictures(folder):
    for name in ("a.heic", "b.gif", "c.JXL", "d.zip", "Thumbs.db", "notes.md"):
        (folder / name).touch()


@pytest.mark.parametrize(
    ("make", "passed_over"),
    [
        (fifo, {"links to nothing, or no files": 1}),
        (folder_called_like_a_picture, {}),
        (loop, {"links to folders seen already": 1}),
        (to_itself, {"links to nothing, or no files": 1}),
        (dangling, {"links to nothing, or no files": 1}),
        (apple, {"hidden files and folders": 3}),
        (thumbnails, {"hidden files and folders": 2}),
        (other_pictures, {".heic": 1, ".gif": 1, ".jxl": 1, ".zip": 1}),
    ],
)
def test_passed_over_and_counted(folder, make, passed_over):
    make(folder)
    dataset = opened(folder)
    assert dataset.passed_over == passed_over and not dataset.skipped and len(dataset) == 1


def test_a_picture_in_a_folder_called_like_one(folder):
    (folder / "x.png").mkdir()
    (folder / "x.png" / "y.png").write_bytes(encoded())
    assert len(opened(folder)) == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no /proc here")
def test_a_file_that_cannot_be_read(folder):
    unreadable(folder)
    assert [path.name for path in opened(folder).skipped] == ["disk_error.png"]


def lost(path):
    path.unlink()


def shrunk(path):
    path.write_bytes(encoded(PIXELS[:4]))


def cut_off(path):
    path.write_bytes(encoded()[:60])


def turned_into_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [lost, shrunk, cut_off, turned_into_a_folder])
def test_files_that_change_after_the_start(folder, change):
    (folder / "other.png").write_bytes(encoded())
    dataset = ImageFolder(folder, SIZE, degradation=DEGRADATION)
    change(folder / "other.png")
    assert {path.name for path in train(dataset).skipped} == {"other.png"}


def no_text(folder):
    (folder / "good.txt").write_bytes(bytes(range(256)))


def lost_text(folder):
    (folder / "good.txt").symlink_to("nowhere.txt")


def folder_as_text(folder):
    (folder / "good.txt").mkdir()


def empty_text(folder):
    (folder / "good.txt").touch()


def bom(folder):
    (folder / "good.txt").write_bytes("\ufeffa cat\r\n".encode())


def utf16(folder):
    (folder / "good.txt").write_bytes("a cat".encode("utf-16"))


@pytest.mark.parametrize(
    ("make", "prompt", "skipped"),
    [(no_text, "", 1), (lost_text, "", 0), (folder_as_text, "", 0), (empty_text, "", 0), (bom, "a cat", 0),
     (utf16, "a cat", 0)],
)  # fmt: skip
def test_prompts(folder, make, prompt, skipped):
    make(folder)
    dataset = opened(folder)
    assert dataset[0]["prompt"] == prompt and len(dataset.skipped) == skipped and len(dataset) == 1


# name of the LR file and of the ground truth: their sides, and the reason for which the pair is skipped
PAIRS = {
    "one_pixel_off": ((6, 5), (24, 21), "is 21x24 pixels, must be 4 times its LR image, which is 5x6"),
    "same_size": ((24, 20), (24, 20), "is 20x24 pixels, must be 4 times its LR image, which is 20x24"),  # RealSR V1
    "other_scale": ((12, 10), (24, 20), "is 20x24 pixels, must be 4 times its LR image, which is 10x12"),
    "turned": ((5, 6), (24, 20), "is 20x24 pixels, must be 4 times its LR image, which is 6x5"),
    "small": ((3, 5), (12, 20), "is 20x12 pixels, the crop needs 16"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_do_not_fit(folder, name):
    lr, gt, reason = PAIRS[name]
    for kind, sides in {"lr": ((6, 5), lr), "gt": ((24, 20), gt)}.items():
        (folder / kind).mkdir()
        for file, (height, width) in zip(("good", name), sides, strict=True):
            (folder / kind / f"{file}.png").write_bytes(encoded(np.resize(PIXELS, (height, width, 3))))
    dataset = opened(Root(lr=str(folder / "lr"), gt=str(folder / "gt")))
    assert dataset.skipped == {folder / "gt" / f"{name}.png": reason}


def test_both_pictures_of_a_pair_are_turned_upright(folder):
    """A camera that wrote the orientation into both files, or an editor that turned one of them for good."""
    turned = np.rot90(PIXELS, -1)
    for kind in ("lr", "gt"):
        (folder / kind).mkdir()
    (folder / "gt" / "a.png").write_bytes(encoded(exif=exif(6)))
    (folder / "lr" / "a.png").write_bytes(encoded(np.ascontiguousarray(turned[::4, ::4])))
    dataset = opened(Root(lr=str(folder / "lr"), gt=str(folder / "gt")))
    assert not dataset.skipped
    sample = next(
        sample for sample in map(dataset.__getitem__, range(50)) if not torch.equal(sample["gt"], dataset[0]["gt"])
    )
    first = {0: 0, 3: 3}
    assert any(torch.equal(sample["lr"], sample["gt"][:, ::4, k::4]) for k in first)


@pytest.mark.parametrize("kind", ["nothing", "file", "empty", "only_faults"])
def test_roots_that_are_refused(folder, kind):
    path = folder / "root"
    if kind == "file":
        path.touch()
    elif kind != "nothing":
        path.mkdir()
    if kind == "only_faults":
        (path / "text.png").write_bytes(b"text")
    with pytest.raises(FileNotFoundError, match=f"data folder '{path}' (does not exist|is a file|has no usable image)"):
        ImageFolder([folder, path], SIZE)


def raise_and_lower(flags):
    while True:
        flags[::3] = True
        flags[::3] = False


def test_faults_are_listed_while_another_process_finds_some(folder):
    """Flags are raised by other processes at any moment, also while they are counted."""
    dataset = ImageFolder(folder, SIZE, degradation=DEGRADATION)
    dataset.entries *= 300_000  # so many that counting takes a while
    dataset._broken = torch.zeros(300_000, dtype=torch.bool).share_memory_()
    fork = torch.multiprocessing.get_context("fork")
    other = fork.Process(target=raise_and_lower, args=(dataset._broken,), daemon=True)
    other.start()
    try:
        while not dataset._broken.any():  # until it is at work
            assert other.is_alive()
        found = {len(dataset.skipped) for _ in range(60)}
    finally:
        other.kill()
        other.join()
    assert found <= {0, 1}  # they are all one file
