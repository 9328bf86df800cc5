"""Measuring pictures that are already there: a folder of results, with or without a folder of ground truths."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from rfsr_ext.data.images import SUFFIXES, read_image, to_tensor
from rfsr_ext.files import escape_name
from rfsr_ext.metrics.suite import METRICS, Suite
from rfsr_ext.processes import split_map

__all__ = ["FolderResult", "best_and_worst", "evaluate_folder", "list_pictures", "measure_pictures", "read_picture"]


@dataclass(frozen=True)
class FolderResult:
    """What `evaluate_folder` found.

    Attributes:
        frame: one row per picture: ``model`` (the name given), ``image`` (the file's name without ending), ``preset``
            (`Preset.label`) and one column per metric; `summarize` and `compare` take it.
        broken: why a picture was left out, by path.
        pictures, references: paths by ``image``, of those that were measured.
    """

    frame: pd.DataFrame
    broken: dict[Path, str]
    pictures: dict[str, Path]
    references: dict[str, Path]


def list_pictures(folder: str | Path) -> dict[str, Path]:
    """Files of picture endings by their names without ending, sorted; ``_x4`` and the like at the end do not count.

    Bytes of a name that are no UTF-8 are written out.  Hidden files are passed over: macOS puts a ``._a.jpg`` beside
    ``a.jpg``.

    Raises:
        FileNotFoundError: if there is no such folder, or no such file in it.
        ValueError: if two files have the same name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"folder {str(folder)!r} {what}; give a folder of pictures")
    found: dict[str, Path] = {}
    files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    for path in sorted(p for p in files if p.suffix.lower() in SUFFIXES):
        name = escape_name(re.sub(r"_x\d+$", "", path.stem))  # what `rfsr upscale` appends
        if name in found:
            raise ValueError(
                f"folder {str(folder)!r} has two pictures called {name!r}: {found[name].name}, {path.name}"
            )
        found[name] = path
    if not found:
        raise FileNotFoundError(f"folder {str(folder)!r} has no picture ({', '.join(sorted(SUFFIXES))})")
    return found


def read_picture(path: Path) -> Tensor:
    """A file as ``[3, H, W]`` in [0, 1].

    Raises:
        OSError: if it cannot be read or decoded.
    """
    return to_tensor(read_image(path))


def evaluate_folder(
    folder: str | Path, suite: Suite, references: str | Path | None = None, name: str = ""
) -> FolderResult:
    """Measure every picture of a folder, of any sizes; what cannot be measured is named and the rest goes on.

    Args:
        folder: results; its own files, not those of folders in it.
        suite: metrics.
        references: folder of ground truths, matched by name without ending.
        name: what the column ``model`` says; the folder by default.

    Raises:
        FileNotFoundError: if a folder does not exist or has no picture.
        ValueError: if two files have the same name, or not one picture could be measured.
    """
    pictures = list_pictures(folder)
    truths = None if references is None else list_pictures(references)
    return measure_pictures(pictures, suite, truths, name or str(folder), str(references))


def measure_pictures(
    pictures: Mapping[str, Path],
    suite: Suite,
    truths: Mapping[str, Path] | None = None,
    name: str = "",
    references: str = "",
    read: Callable[[Path], Tensor] = read_picture,
) -> FolderResult:
    """Measure pictures, given by name as their ground truths are; what cannot be measured is named.

    Several processes share the pictures among them, and each gets the whole result.

    Args:
        pictures: results.
        suite: metrics.
        truths: ground truths; None for none.
        name: what the column ``model`` says.
        references: where the ground truths lie, for what is said of a missing one.
        read: gives the picture of a file, if it is not the file's own.

    Raises:
        ValueError: if not one picture could be measured.
    """

    def measure(image: str) -> dict[str, Any] | str:
        """A row of the table, or why there is none."""
        try:
            sr, gt = read(pictures[image]), None
            if truths is not None:
                if image not in truths:
                    raise ValueError(f"{references!r} has no picture called {image!r}")
                gt = read_picture(truths[image])
                if gt.shape != sr.shape:
                    height, width, high, wide = *sr.shape[1:], *gt.shape[1:]
                    raise ValueError(f"it has {height}x{width} pixels, its ground truth {high}x{wide}")
            values = suite(sr[None], None if gt is None else gt[None])
        except (OSError, ValueError) as error:
            return str(error)
        return {"model": name, "image": image, "preset": suite.preset.label} | {
            metric: column.item() for metric, column in values.items()
        }

    found = dict(zip(pictures, split_map(measure, list(pictures), f"evaluate {name}"), strict=True))
    rows = [row for row in found.values() if isinstance(row, dict)]
    broken = {pictures[image]: reason for image, reason in found.items() if isinstance(reason, str)}
    used = {row["image"]: pictures[row["image"]] for row in rows}
    if not rows:
        path, reason = next(iter(broken.items()))
        raise ValueError(f"not one of {len(pictures)} pictures in {name!r} could be measured; {path.name}: {reason}")
    truths = truths or {}
    return FolderResult(pd.DataFrame(rows), broken, used, {image: truths[image] for image in used if image in truths})


def best_and_worst(values: pd.Series, metric: str, count: int = 4) -> tuple[list[str], list[str]]:
    """The ``count`` best and the ``count`` worst images by their values of a metric, best and worst first.

    An image is never both: of fewer than twice as many, each side gets half.
    """
    ranked = values.dropna().sort_values(ascending=METRICS[metric].lower_better, kind="stable")
    count = min(count, (len(ranked) + 1) // 2)
    best = list(ranked.index[:count])
    return best, [image for image in ranked.index[::-1][:count] if image not in best]
