"""A folder of LR images made from sharp ones, so that whoever makes it again has the same files to the byte.

What is promised: the LR files are the same byte by byte on every x86-64 processor with the same versions of rfsr_ext,
NumPy, SciPy and Pillow (with its libjpeg), because the degradation is (see `rfsr_ext.data.Degradation`) and because
they are written without compression, whose result depends on the zlib at hand.  They are made on the CPU for that
reason.  Of the ground truths, which are compressed, the pixels are the same.  The manifest holds the versions and the
SHA-256 of every LR file and of all pixels; with other versions compare these.
"""

import functools
import hashlib
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from rfsr_ext.data.datasets import ImageFolder, Sample
from rfsr_ext.data.degradation import Degradation
from rfsr_ext.data.folders import Root, list_root
from rfsr_ext.data.images import read_image, to_image, to_tensor
from rfsr_ext.data.manifest import MANIFEST, Manifest, versions
from rfsr_ext.files import sha256

__all__ = ["degrade_folder", "read_manifest", "write_plain_png"]


def degrade_folder(
    root: Root,
    degradation: Degradation,
    seed: int,
    output: str | Path,
    crops: int | None = None,
    size: int = 512,
    progress: bool = True,
) -> dict[str, str]:
    """Write ``lr/NAME.png`` and ``gt/NAME.png`` for every image of a folder into another, and ``manifest.json``.

    Image k of the sorted list is degraded with the seed ``(seed, k)``; its ground truth is cut on the right and below
    to a multiple of the scale, and sharpened if the degradation says so.  A run that was interrupted goes on; files
    that are there are not made again, and no file that did not come this way is overwritten.

    Args:
        root: sharp images.
        degradation: how they are degraded.
        seed: of the choices and the noise.
        output: folder to write to.
        crops: instead of whole images, so many random crops, those that training would see with this seed.
        size: their side in pixels.
        progress: show a progress bar.

    Returns:
        For each image that could not be read why.

    Raises:
        FileNotFoundError: if there is no image.
        ValueError: if ``output`` lies in the folder of images.
        ValueError, FileExistsError, RuntimeError: see `Manifest`.
    """
    entries = list_root(root).entries
    if not entries:
        raise FileNotFoundError(f"folder {str(root)!r} has no picture to degrade")
    if Path(output).resolve().is_relative_to(Path(str(root.path)).resolve()):
        raise ValueError(
            f"output {str(output)!r} must lie outside of {str(root)!r}, which is searched recursively, or what is made "
            "would count among its pictures; give another folder"
        )
    sources = [os.path.relpath(entry.gt, root.path) for entry in entries]
    settings = {
        "degradation": degradation.to_dict(),
        "seed": seed,
        "crops": crops and {"count": crops, "size": size},
        "images": hashlib.sha256("\0".join(sources).encode("utf-8", "surrogateescape")).hexdigest(),
        "versions": versions(),
    }
    if crops is None:
        names = [f"{os.path.splitext(source)[0]}.png" for source in sources]
    else:
        dataset = ImageFolder(root, size, seed, degradation)
        names = [f"{i:06}.png" for i in range(crops)]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"folder {str(root)!r} must hold one picture called {twice[:-4]!r}, got two; move one away")
    skipped = {}
    with Manifest(output, settings, [f"{kind}/{name}" for name in names for kind in _KINDS]) as manifest:
        for k, name in enumerate(tqdm(names, "degrade", unit="image", disable=not progress)):
            facts: dict[str, Any] = {"index": k}
            try:
                if crops is None:
                    facts |= {"source": sources[k], "source_sha256": sha256(entries[k].gt)}
                if all(
                    [manifest.has(f"{kind}/{name}", facts) for kind in _KINDS]
                ):  # also of what is not to be replaced
                    continue
                sample = _whole(entries[k].gt, degradation, (seed, k)) if crops is None else dataset[k]
            except FileExistsError:
                raise
            except OSError as error:
                skipped[entries[k].gt] = error.strerror or str(error)
                continue
            for kind, write in _KINDS.items():
                image = to_image(sample["lr" if kind == "lr" else "gt"])
                pixels = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
                manifest.add(f"{kind}/{name}", facts | {"pixels_sha256": pixels}, functools.partial(write, image=image))
    return skipped


def _whole(path: str, degradation: Degradation, seed: tuple[int, int]) -> Sample:
    """A whole picture, cut to a multiple of the scale, and its LR image."""
    gt = to_tensor(read_image(path))
    height, width = (n // degradation.scale * degradation.scale for n in gt.shape[1:])
    if not height * width:
        raise OSError(f"it is {gt.shape[2]}x{gt.shape[1]} pixels, too small for scale {degradation.scale}")
    lr, gt = degradation(gt[None, :, :height, :width].contiguous(), [seed])
    return Sample(gt=gt[0], lr=lr[0], prompt="")


def write_plain_png(path: Path, image: np.ndarray) -> None:
    """An uncompressed PNG of ``[H, W, 3]`` 8-bit pixels, the same bytes whatever wrote it (RFC 1950, 1951, 2083)."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # filter 0: as they are
    blocks = [rows[i : i + 65535] for i in range(0, len(rows), 65535)]
    stored = b"".join(
        struct.pack("<B2H", block is blocks[-1], len(block), len(block) ^ 0xFFFF) + block for block in blocks
    )
    parts = {
        b"IHDR": struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0),
        b"IDAT": b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(rows)),
        b"IEND": b"",
    }
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in parts.items():
            file.write(struct.pack(">I", len(content)) + name + content)
            file.write(struct.pack(">I", zlib.crc32(name + content)))


def _write_png(path: Path, image: np.ndarray) -> None:
    Image.fromarray(image).save(path, format="PNG")


_KINDS = {"lr": write_plain_png, "gt": _write_png}


def read_manifest(path: str | Path) -> dict[str, Any]:
    """A manifest that `degrade_folder` wrote, in a folder or by its own name.

    Raises:
        ValueError: if it is none.
    """
    path = Path(path) / MANIFEST if Path(path).is_dir() else Path(path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        Degradation.from_dict(manifest["settings"]["degradation"])
        manifest["files"], manifest["settings"]["seed"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is no manifest of rfsr data degrade ({error}); give another") from None
    return manifest
