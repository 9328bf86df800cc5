"""Models run on pairs of LR images and ground truths: RealSR, DRealSR, or what `rfsr data degrade` made."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image
from torch import Tensor

from rfsr_ext.data import Root
from rfsr_ext.data.check import check_root
from rfsr_ext.data.folders import Entry
from rfsr_ext.data.images import from_uint8, to_image, to_tensor
from rfsr_ext.data.manifest import Manifest, versions, write_hashed
from rfsr_ext.data.prompts import read_prompt
from rfsr_ext.evaluation.folders import measure_pictures, read_picture
from rfsr_ext.evaluation.measure import enlarge_bicubic
from rfsr_ext.files import escape_name, sha256
from rfsr_ext.metrics.suite import Suite
from rfsr_ext.models import ISRModel
from rfsr_ext.processes import from_main, is_main, split_map
from rfsr_ext.sampling import upscale

__all__ = ["PairResult", "evaluate_pairs", "evaluate_pairs_bicubic"]


@dataclass(frozen=True)
class PairResult:
    """What `evaluate_pairs` found.

    Attributes:
        frame: one row per picture and seed: ``model``, ``image`` (the ground truth's path within its folder, without
            ending), ``preset``, one column per metric, and ``seed``.
        left_out: why a picture was left out, by its path.
        folders: where the pictures are, one folder per seed.
        references: ground truths by image.
    """

    frame: pd.DataFrame
    left_out: dict[str, str]
    folders: list[Path]
    references: dict[str, Path]


def evaluate_pairs(
    model: ISRModel, root: Root, suite: Suite, pictures: str | Path, seeds: Sequence[int] = (0,), name: str = "model"
) -> PairResult:
    """Upscale the LR image of every pair by `rfsr_ext.sampling.upscale`, keep the pictures and measure them.

    Pictures are written as 8-bit PNG to ``pictures/NAME-seedS/`` and measured as they were written.  Those that are
    there already are not made again, provided that the model, the seed, the LR image and its prompt (``name.txt``
    beside it or beside the ground truth) are the same; no file that did not come this way is overwritten.  Several
    processes share the pictures among them, and each gets the whole result.

    Args:
        model: makes the pictures; every ground truth must be ``model.scale`` times its LR image.
        root: the two folders.
        suite: metrics.
        pictures: folder for the pictures.
        seeds: of the noise.
        name: what the column ``model`` says.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if no pair fits the model, or not one picture could be measured; see also `Manifest`.
    """
    entries, left_out = _fitting(root, model.scale, name)
    frames, folders, references = [], [], {}
    label = re.sub(r"[^\w.-]+", "_", name).strip("_.")
    for seed in seeds:
        folder = Path(pictures) / f"{label}-seed{seed}"
        made, failed = _upscale(model, entries, folder, seed, name)
        truths = {image: Path(entries[image].gt) for image in made}
        if not made:
            path, reason = next(iter(failed.items()))
            raise ValueError(f"not one of {len(entries)} LR images could be upscaled; {path}: {reason}")
        result = measure_pictures(made, suite, truths, name, str(root.gt))
        frames.append(result.frame.assign(seed=seed))
        folders.append(folder)
        references |= truths
        left_out |= failed | {str(path): reason for path, reason in result.broken.items()}
    return PairResult(pd.concat(frames, ignore_index=True), left_out, folders, references)


def evaluate_pairs_bicubic(root: Root, scale: int, suite: Suite, name: str = "bicubic") -> pd.DataFrame:
    """The same table for bicubic enlargement in 8 bits, the floor any model must beat; its ``seed`` is `pandas.NA`.

    Raises:
        FileNotFoundError, ValueError: as `evaluate_pairs`.
    """

    def enlarged(path: Path) -> Tensor:
        return to_tensor(from_uint8(to_image(enlarge_bicubic(read_picture(path)[None], scale)[0])))

    entries, _ = _fitting(root, scale, name)
    truths = {image: Path(entry.gt) for image, entry in entries.items()}
    pictures = {image: Path(str(entry.lr)) for image, entry in entries.items()}
    return measure_pictures(pictures, suite, truths, name, str(root.gt), enlarged).frame.assign(seed=pd.NA)


def _fitting(root: Root, scale: int, name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Pairs of this scale by image, and why others are left out.

    Raises:
        ValueError: if there is none.
    """
    report = check_root(root, 0, scale, decode=False)
    if not report.headers:
        path, reason = next(iter(report.faults.items()), (str(root), "holds no picture"))
        raise ValueError(
            f"ground truths must be {scale} times as large as their LR images, which is the scale of {name}, and "
            f"none of {len(report.listing.entries)} pairs in {root} is so; {path} {reason}"
        )
    entries = {
        escape_name(os.path.splitext(os.path.relpath(entry.gt, root.gt))[0]): entry
        for k, entry in enumerate(report.listing.entries) if k not in report.skipped
    }  # fmt: skip
    return entries, report.faults


def _upscale(
    model: ISRModel, entries: Mapping[str, Entry], folder: Path, seed: int, name: str
) -> tuple[dict[str, Path], dict[str, str]]:
    """Pictures by image, and why an LR image could not be upscaled."""
    settings = {
        "model": name,
        "fingerprint": model.fingerprint(),
        "recipe": repr(model.recipe),
        "seed": seed,
        "versions": versions(),
    }
    with Manifest(folder, settings, [f"{image}.png" for image in entries]) if is_main() else nullcontext() as manifest:
        facts, todo, failed = from_main(({}, [], {}) if manifest is None else _plan(entries, manifest))

        def make(image: str) -> tuple[str | None, str]:
            """SHA-256 of the picture, or why there is none."""
            write = functools.partial(_write, model, entries[image], facts[image]["prompt"], seed)
            try:
                return write_hashed(folder / f"{image}.png", write), ""
            except (ValueError, RuntimeError, MemoryError, OSError) as error:
                return None, _reason(error)

        for image, (digest, reason) in zip(todo, split_map(make, todo, f"upscale {name}"), strict=True):
            if digest is None:
                failed[str(entries[image].lr)] = reason
            elif manifest is not None:
                manifest.record(f"{image}.png", facts[image], digest)
    made = {image: folder / f"{image}.png" for image in entries if str(entries[image].lr) not in failed}
    return made, failed


def _plan(
    entries: Mapping[str, Entry], manifest: Manifest
) -> tuple[dict[str, dict[str, str]], list[str], dict[str, str]]:
    """What each picture is made from, those that are to be made, and why LR images cannot be read."""
    facts: dict[str, dict[str, str]] = {}
    failed: dict[str, str] = {}
    for image, entry in entries.items():
        assert entry.lr is not None
        try:
            prompt = read_prompt(entry.prompt) if entry.prompt else ""
            facts[image] = {"lr_sha256": sha256(entry.lr), "prompt": prompt}
        except (ValueError, OSError) as error:
            failed[entry.lr] = _reason(error)
    return facts, [image for image in facts if not manifest.has(f"{image}.png", facts[image])], failed


def _write(model: ISRModel, entry: Entry, prompt: str, seed: int, path: Path) -> None:
    sr = upscale(model, read_picture(Path(str(entry.lr))), prompt, seed=seed, progress=False)
    Image.fromarray(to_image(sr)).save(path, format="PNG")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
