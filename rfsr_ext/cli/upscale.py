"""``rfsr upscale``: files in, files out."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image

from rfsr_ext.cli.config import check_target, choose_device
from rfsr_ext.cli.errors import disk_is_full, sentence
from rfsr_ext.data.folders import NOT_READ
from rfsr_ext.data.images import SUFFIXES, read_header, read_image_and_alpha, resize, to_image, to_tensor, to_uint8
from rfsr_ext.files import make_folder, replace_file
from rfsr_ext.memory import available
from rfsr_ext.models import ISRModel, load_model
from rfsr_ext.processes import is_main, join, split_map
from rfsr_ext.sampling import upscale
from rfsr_ext.sampling.upscale import result_bytes, tiling

__all__ = ["find_images", "upscale_files"]

logger = logging.getLogger(__name__)

COLOR_FIXES = ("recipe", "wavelet", "adain", "none")


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Folders are replaced by the pictures in them, and what else they hold is said; a file given twice counts once."""
    found: dict[Path, Path] = {}
    for path in paths:
        inside = [path]
        if path.is_dir():
            listed = sorted(path.iterdir())
            entries = [p for p in listed if not p.name.startswith(".")]
            hidden = [p for p in listed if p.name.startswith(".")]  # such as macOS's ._a.jpg, which is no picture
            inside = [p for p in entries if p.is_file() and p.suffix.lower() in SUFFIXES]
            others = Counter("folders" if p.is_dir() else p.suffix.lower() for p in entries)
            others["hidden files"] = sum(p.suffix.lower() in SUFFIXES for p in hidden)
            passed_over = {
                kind: n for kind, n in others.items() if n and kind in NOT_READ | {"folders", "hidden files"}
            }
            if passed_over and is_main():
                logger.warning(
                    "not looked into in %s: %s",
                    path,
                    ", ".join(f"{n} {kind}" for kind, n in sorted(passed_over.items())),
                )
            if not inside:
                raise ValueError(f"folder {str(path)!r} has no picture ({', '.join(sorted(SUFFIXES))})")
        for image in inside:
            found.setdefault(image.resolve(), image)
    return list(found.values())


def _targets(images: Sequence[Path], output: Path, scale: int, overwrite: bool) -> dict[Path, Path]:
    """Each image's result ``output/<name>_x<scale>.png``; two never share one, and none replaces a file unasked."""
    targets: dict[Path, Path] = {}
    sources: dict[str, Path] = {}
    inputs = {image.resolve() for image in images}
    for image in images:
        target = output / f"{image.stem}_x{scale}.png"
        other = sources.setdefault(target.name.casefold(), image)
        if other != image:
            raise ValueError(
                f"{str(other)!r} and {str(image)!r} would both become {str(target)!r}; "
                "upscale them one after the other into different folders (--output)"
            )
        if target.resolve() in inputs:
            raise ValueError(
                f"the result of {str(image)!r} would replace {str(target)!r}, which is to be upscaled too; "
                "give another folder (--output)"
            )
        targets[image] = check_target(target, overwrite)
    return targets


def _say_memory(path: Path, model: ISRModel) -> None:
    """Say what a picture's result will need, if that is much.

    Raises:
        ValueError: if there is not as much.
    """
    header = read_header(path)
    size = f"{header.width * model.scale}x{header.height * model.scale} pixels"
    need, there = result_bytes(model, header.height, header.width), available()
    if there is not None and need > there:
        raise ValueError(
            f"its result of {size} needs {need / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB are free; give a "
            "smaller picture, or parts of it"
        )
    if need > 1e9:
        typer.echo(f"{path}: the result of {size} will need {need / 1e9:.1f} GB of memory beside the model", err=True)


def upscale_files(
    paths: Sequence[Path],
    model: str,
    output: Path,
    prompt: str = "",
    steps: int | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    color_fix: str = "recipe",
    seed: int = 0,
    overwrite: bool = False,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    model_options: dict[str, Any] | None = None,
    device: str | None = None,
) -> None:
    """Upscale files and the pictures in folders to ``output/<name>_x<scale>.png``.

    Colors are sRGB.  Opacity is upscaled by itself, bicubically, and put back.  A file that cannot be upscaled, for
    whatever reason, is named and left out.  Several processes share the files among them.

    Raises:
        ValueError: before any work if an option is wrong or two results would have one name; at the end if a file was
            left out.
        FileExistsError: before any work if a result exists and may not be overwritten.
    """
    if color_fix not in COLOR_FIXES:
        raise ValueError(f"--color-fix must be one of {', '.join(COLOR_FIXES)}, got {color_fix!r}")
    device = choose_device(device)
    images = find_images(paths)
    join()  # each has a GPU of its own from here on
    isr = load_model(model, **(model_options or {})).to(device)
    tiling(isr, tile, overlap)  # refused before any work
    targets = _targets(images, output, isr.scale, overwrite)
    make_folder(output)

    def make(path: Path) -> bool:
        """Whether there is a result; a line says so, or why not."""
        target = targets[path]
        try:
            _say_memory(path, isr)
            image, alpha = read_image_and_alpha(path)
            result = to_image(
                upscale(
                    isr, to_tensor(image), prompt, seed=seed, tile=tile, overlap=overlap, num_inference_steps=steps,
                    color_fix=None if color_fix == "none" else color_fix, guidance_scale=guidance_scale,
                    negative_prompt=negative_prompt, progress=is_main(),
                )
            )  # fmt: skip
            if alpha is not None:
                result = np.concatenate([result, to_uint8(resize(alpha, result.shape[:2]))], axis=-1)
            with replace_file(target) as aside:
                Image.fromarray(result).save(aside, format="PNG")
        except Exception as error:
            if disk_is_full(error):
                raise
            logger.debug("%s", path, exc_info=True)
            typer.echo(f"skipped {path}: {sentence(error)}", err=True)
            return False
        typer.echo(f"{path} {image.shape[1]}x{image.shape[0]} → {target} {result.shape[1]}x{result.shape[0]}")
        return True

    done = zip(targets, split_map(make, list(targets), progress=False), strict=True)
    left_out = [str(path) for path, there in done if not there]
    if left_out and is_main():
        raise ValueError(f"{len(left_out)} of {len(targets)} files could not be upscaled: {', '.join(left_out)}")
