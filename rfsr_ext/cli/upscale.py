"""``rfsr upscale``: files in, files out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from rfsr_ext.data.images import read_image, to_tensor, to_uint8
from rfsr_ext.files import replace_file
from rfsr_ext.models import load_model
from rfsr_ext.sampling import upscale

__all__ = ["upscale_files"]


def upscale_files(
    paths: Sequence[Path],
    model: str,
    output: Path,
    prompt: str,
    steps: int | None,
    tile: int,
    color_fix: str | None,
    seed: int,
) -> None:
    """Upscale each file to ``output/<name>_x<scale>.png``; files that cannot be read are named and left out.

    Raises:
        ValueError: at the end, if a file could not be read.
    """
    isr = load_model(model)
    unreadable = []
    for path in paths:
        try:
            image = read_image(path)
        except OSError as error:
            typer.echo(f"skipped {path}: {error}", err=True)
            unreadable.append(str(path))
            continue
        result = upscale(
            isr, to_tensor(image), prompt, seed=seed, tile=tile, num_inference_steps=steps, color_fix=color_fix
        )
        target = output / f"{path.stem}_x{isr.scale}.png"
        with replace_file(target) as aside:
            Image.fromarray(to_uint8(np.moveaxis(result.cpu().numpy(), 0, -1))).save(aside, format="PNG")
        typer.echo(f"{path} {image.shape[1]}x{image.shape[0]} → {target} {result.shape[2]}x{result.shape[1]}")
    if unreadable:
        raise ValueError(
            f"{len(unreadable)} of {len(paths)} files could not be read as images: {', '.join(unreadable)}"
        )
