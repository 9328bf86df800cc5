"""Training and evaluation samples, each a pure function of ``(seed, index)``.

Because sample ``i`` is always the same crop with the same degradation, a run that is resumed, or split over several
processes, sees exactly the data an uninterrupted single process would have seen; no random state has to be saved.
"""

import hashlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from rfsr_ext.data.check import Report, check_root, size_fault
from rfsr_ext.data.dead_leaves import dead_leaves
from rfsr_ext.data.degradation import Degradation
from rfsr_ext.data.distortions import distort
from rfsr_ext.data.folders import Entry, Root
from rfsr_ext.data.images import read_image, resize, to_tensor
from rfsr_ext.data.photographs import PACKAGED, PHOTOGRAPHS, load_photograph
from rfsr_ext.data.prompts import read_prompt

__all__ = ["CheckedSamples", "DistortedCrops", "ImageFolder", "PhotographCrops", "Sample", "evaluation_crops"]

logger = logging.getLogger(__name__)

_PYRAMID = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)  # photographs are cropped at these scales, each computed once
HEADERS = 10_000  # files of a root looked at before the start; of more, a sample: it must take seconds
_NAMED = 20  # files skipped before the start that are named one by one
_FLAT = 0.04  # crops whose brightness varies less than this show a background; they teach and measure nothing


class Sample(TypedDict):
    """``gt`` ``[3, H, W]`` and ``lr`` ``[3, H/scale, W/scale]`` float32 in [0, 1], and the ``prompt``."""

    gt: torch.Tensor
    lr: torch.Tensor
    prompt: str


class CheckedSamples(Dataset):
    """Samples of somebody's own data set, of which each that no loss could be right for is refused.

    Args:
        dataset: `Sample` s by index.
        size: side of ``gt`` in pixels.
        scale: how many times larger than ``lr`` it is.

    Raises:
        ValueError: when a sample is asked for, naming it, the key, and what it should hold.
    """

    def __init__(self, dataset: Dataset, size: int, scale: int):
        self.dataset = dataset
        self.sides = {"gt": size, "lr": size // scale}

    def __getitem__(self, index: int) -> Sample:
        try:
            sample = self.dataset[index]
        except (LookupError, NotImplementedError) as error:
            raise ValueError(
                f"dataset must give a sample for every index that training asks for, got {error!r} for {index}; let "
                "it begin again (index % length), or train for fewer iterations"
            ) from error
        try:
            self._check(sample)
        except ValueError as error:
            raise ValueError(f"sample {index} of the dataset: {error}") from None
        return sample

    def _check(self, sample: Any) -> None:
        missing = [key for key in Sample.__annotations__ if not isinstance(sample, Mapping) or key not in sample]
        if missing:
            raise ValueError(f"it must have gt, lr and prompt, got one without {' and '.join(missing)}")
        for key, side in self.sides.items():
            image = sample[key]
            if not isinstance(image, torch.Tensor) or image.dtype != torch.float32:
                raise ValueError(f"{key} must be a float32 tensor, got {getattr(image, 'dtype', type(image).__name__)}")
            if image.shape != (3, side, side):
                raise ValueError(f"{key} must be [3, {side}, {side}] (crop_size, scale), got {list(image.shape)}")
            low, high = image.min().item(), image.max().item()
            if not (low >= 0 and high <= 1):  # also catches NaN
                raise ValueError(f"{key} must be in [0, 1], got values from {low:g} to {high:g}")
        if not isinstance(sample["prompt"], str):
            raise ValueError(f"prompt must be text, got {type(sample['prompt']).__name__}; without one it is ''")


def _dihedral(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        image = image[:, ::-1]
    return np.rot90(image, int(rng.integers(4)))


def _recolor(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn the hue by any angle, change saturation, tint and gamma.

    A dozen photographs hold too few colors: a model that sees no others learns them by heart instead of reading them
    off its low-resolution input (tried: held-out photographs came out in the colors of the training set).
    """
    axis = np.full(3, 1 / np.sqrt(3))
    cross = np.cross(np.eye(3), axis)
    angle, saturation = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2)
    gray = np.outer(axis, axis)
    turn = gray + saturation * (np.cos(angle) * (np.eye(3) - gray) + np.sin(angle) * cross)
    tint = rng.uniform(0.6, 1.15) * rng.uniform(0.5, 1.0, 3) ** rng.uniform(0, 1)
    return (np.clip(image @ turn.T * tint, 0, 1) ** rng.uniform(0.8, 1.25)).astype(np.float32)


def _random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random crop; of four tries, the first that shows more than a flat background."""
    for _ in range(4):
        top = rng.integers(image.shape[0] - size + 1)
        left = rng.integers(image.shape[1] - size + 1)
        crop = image[top : top + size, left : left + size]
        if not _is_flat(crop):
            break
    return crop


def _level(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The photograph at one size of its pyramid; at its own it is not copied."""
    return image if size == image.shape[:2] else resize(image, size, Image.Resampling.LANCZOS).clip(0, 1)


@cache
def _pyramid(name: str, folder: Path | None) -> list[np.ndarray]:
    """The photograph at the sizes that it is cropped at, kept: data sets of several crop sizes share it."""
    image = load_photograph(name, folder)
    return [_level(image, (round(image.shape[0] * scale), round(image.shape[1] * scale))) for scale in _PYRAMID]


def _is_flat(image: np.ndarray) -> bool:
    return image.mean(axis=-1).std() < _FLAT


def _tags(name: str) -> tuple[str, ...]:
    return (PHOTOGRAPHS.get(name) or PACKAGED[name]).tags


class PhotographCrops(Dataset):
    """Endless random crops of photographs, mixed with dead leaves.

    Args:
        names: photographs to crop (see `rfsr_ext.data.photographs`).
        size: side of the sharp crop in pixels, a multiple of the degradation's scale.
        seed: of the whole sequence.
        dead_leaves_share: share of samples that are dead-leaves images, with an empty prompt.
        empty_prompt_share: share of photographs whose prompt is left empty.
        degradation: makes the low-resolution image.
        recolor: shuffle and change colors.
        length: what ``len`` says; any non-negative index is valid.
        folder: where `PACKAGED` photographs are, see `load_photograph`.
    """

    def __init__(
        self,
        names: list[str],
        size: int,
        seed: int = 0,
        dead_leaves_share: float = 0.2,
        empty_prompt_share: float = 0.1,
        degradation: Degradation | None = None,
        recolor: bool = True,
        length: int = 1_000_000,
        folder: Path | None = None,
    ):
        self.size, self.seed, self.length = size, seed, length
        self.dead_leaves_share, self.empty_prompt_share = dead_leaves_share, empty_prompt_share
        self.degradation = degradation or Degradation()
        self.recolor = recolor
        if size % self.degradation.scale:
            raise ValueError(f"size must be a multiple of the scale {self.degradation.scale}, got {size}")
        self.levels = []
        for name in names:
            pyramid = _pyramid(name, folder)
            levels = [level for level in pyramid if min(level.shape[:2]) >= size]
            if not levels:
                raise ValueError(f"size must fit into photograph {name!r} of {pyramid[0].shape[:2]} pixels, got {size}")
            self.levels.append((name, levels))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, index))
        if rng.random() < self.dead_leaves_share:
            gt, prompt = dead_leaves(self.size, rng), ""
        else:
            name, levels = self.levels[rng.integers(len(self.levels))]
            gt = _dihedral(_random_crop(levels[rng.integers(len(levels))], self.size, rng), rng)
            gt = _recolor(gt, rng) if self.recolor else gt
            tags = _tags(name)
            kept = sorted(rng.choice(len(tags), rng.integers(1, len(tags) + 1), replace=False))
            prompt = "" if rng.random() < self.empty_prompt_share else ", ".join(tags[i] for i in kept)
        lr, gt = self.degradation.degrade(np.ascontiguousarray(gt), rng)
        return Sample(gt=to_tensor(gt), lr=to_tensor(lr), prompt=prompt)


class DistortedCrops(Dataset):
    """A crop and several distorted versions of it: ``images`` ``[variants, 3, size, size]``, the first one untouched.

    Args:
        crops: where the sharp crops come from.
        kinds: which of `rfsr_ext.data.distortions.DISTORTIONS` may be applied.
        variants: how many versions, the untouched one included.
    """

    def __init__(self, crops: PhotographCrops, kinds: Iterable[str], variants: int = 4):
        self.crops, self.kinds, self.variants = crops, list(kinds), variants

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> dict:
        sample = self.crops[index]
        rng = np.random.default_rng((self.crops.seed, index, 1))
        image = np.moveaxis(sample["gt"].numpy(), 0, -1)
        versions = [image, *(distort(image, self.kinds, rng) for _ in range(self.variants - 1))]
        return {"images": torch.stack([to_tensor(version) for version in versions]), "prompt": sample["prompt"]}


class ImageFolder(Dataset):
    """Random crops of folders of sharp images, or of pairs of LR images and their ground truths.

    ``name.txt`` beside ``name.png`` holds the prompt, if there is one.  Files that are no images, are truncated or
    smaller than the crop, and pairs of other sizes than ``scale`` demands, are skipped and counted in ``skipped``,
    whichever loader process meets them; another image is drawn instead, so that training goes on.  A prompt that is no
    text is skipped and counted there as well; its image stays, with an empty prompt.  What is not looked into, such as
    pictures of other endings and hidden files, is counted by kind in ``passed_over``.  Transparent pixels are white.

    Which image, crop and degradation make a sample is drawn from ``(seed, index)`` alone, an image that cannot be used
    being drawn anew, so that a sample is the same whenever a fault is found: before the start or in training.

    Args:
        roots: a folder, searched recursively, a `Root`, or several of them.
        size: side of the sharp crop in pixels.
        seed: of the sequence of crops.
        degradation: makes the low-resolution image; its scale is also that of pairs.

    Raises:
        FileNotFoundError: if there is no such folder, or no usable image in one of them.
        ValueError: if the size is no multiple of the scale, or a picture could have two partners.
    """

    def __init__(
        self,
        roots: str | Path | Root | Sequence[str | Path | Root],
        size: int,
        seed: int = 0,
        degradation: Degradation | None = None,
    ):
        roots = [roots] if isinstance(roots, (str, Path, Root)) else list(roots)
        self.roots = [root if isinstance(root, Root) else Root(os.fspath(root)) for root in roots]
        self.size, self.seed = size, seed
        self.degradation = degradation or Degradation()
        if not roots:
            raise ValueError("roots must name at least one folder, got none")
        if size % self.degradation.scale:
            raise ValueError(f"size must be a multiple of the scale {self.degradation.scale}, got {size}")
        self.entries: list[Entry] = []
        self.passed_over: Counter = Counter()
        self._unusable: dict[str, str] = {}
        weights = []
        for root in self.roots:
            report = check_root(root, size, self.degradation.scale, decode=False, at_most=HEADERS)
            report.require_images(size)
            _log(report)
            self._unusable |= report.faults
            self.passed_over += report.listing.passed_over
            self.entries += report.listing.entries
            weights += [root.weight] * len(report.listing.entries)
        self._cumulative = np.cumsum(weights)
        # That a file cannot be decoded shows late, in some loader process: all of them share these flags.
        self._broken, self._no_text = (torch.zeros(len(self.entries), dtype=torch.bool).share_memory_() for _ in "ab")
        for k, entry in enumerate(self.entries):
            self._broken[k] = entry.gt in self._unusable

    def fingerprint(self) -> str:
        """Changes with the pictures' names and number, on which every sample depends."""
        return hashlib.sha256(os.fsencode("\0".join(entry.gt for entry in self.entries))).hexdigest()

    @property
    def skipped(self) -> dict[Path, str]:
        """Files left out so far, with the reason."""
        # of a copy: `nonzero` counts first and collects then, and fails if another process raises a flag between
        broken, no_text = (flags.clone().nonzero().flatten().tolist() for flags in (self._broken, self._no_text))
        found = {self.entries[k].gt: "cannot be decoded" for k in broken}
        found |= {str(self.entries[k].prompt): "cannot be read as text" for k in no_text}
        return {Path(path): reason for path, reason in (found | self._unusable).items()}

    def _skip(self, flags: torch.Tensor, k: int, path: str, reason: str) -> None:
        if not flags[k]:
            flags[k] = True
            logger.warning("skipped %s: %s (%d skipped so far)", path, reason, len(self.skipped))

    def _draw(self, rng: np.random.Generator) -> Iterator[int]:
        """Numbers of images in the order in which they are tried: at random by weight, in the end every one."""
        for _ in range(100):
            last = int(np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1], side="right"))
            yield last
        yield from ((last + step) % len(self.entries) for step in range(len(self.entries)))

    def _read(self, k: int, place: np.ndarray) -> list[np.ndarray]:
        """The crop of a sharp image at a place in [0, 1)², and that of its LR image if it has one."""
        entry, scale, sizes = self.entries[k], self.degradation.scale, []

        def box(height: int, width: int, side: int, unit: int) -> tuple[int, int, int, int]:
            sizes.append((height, width))
            if fault := size_fault(sizes, self.size, scale):
                raise OSError(fault)
            top, left = (
                int(at * ((n - side) // unit + 1)) * unit for at, n in zip(place, (height, width), strict=True)
            )
            return top, left, side, side

        gt = read_image(entry.gt, lambda height, width: box(height, width, self.size, scale if entry.lr else 1))
        if entry.lr is None:
            return [gt]
        return [gt, read_image(entry.lr, lambda height, width: box(height, width, self.size // scale, 1))]

    def _load(self, rng: np.random.Generator, place: np.ndarray) -> tuple[int, list[np.ndarray]]:
        """The first image of those drawn that can be read: its number and crops."""
        for k in self._draw(rng):
            if self._broken[k]:
                continue
            try:
                return k, self._read(k, place)
            except OSError as error:
                self._skip(self._broken, k, self.entries[k].gt, f"cannot be decoded ({error})")
        raise FileNotFoundError(
            f"data folder {' and '.join(repr(str(root)) for root in self.roots)} has no image left that can be decoded"
        )

    def _prompt(self, k: int) -> str:
        path = self.entries[k].prompt
        try:
            return read_prompt(path) if path is not None else ""
        except (OSError, ValueError) as error:
            self._skip(self._no_text, k, str(path), f"cannot be read as text ({error})")
        return ""

    def __len__(self) -> int:
        return len(self.entries) - int(self._broken.sum())

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, index))
        place, flip = rng.random(2), rng.random() < 0.5
        k, images = self._load(rng, place)
        gt, *lr = (to_tensor(image[:, ::-1] if flip else image) for image in images)
        if not lr:
            lr, (gt,) = self.degradation(gt[None], [(self.seed, index)])
        return Sample(gt=gt, lr=lr[0], prompt=self._prompt(k))


def _log(report: Report) -> None:
    """What was found in a root: a line for each of the first faults, then one line for all."""
    faults, found = report.faults, len(report.listing.entries)
    for path, reason in list(faults.items())[:_NAMED]:
        logger.warning("skipped %s: %s", path, reason)
    if len(faults) > _NAMED:
        logger.warning("skipped %d more in %s; rfsr data check names them", len(faults) - _NAMED, report.root)
    passed_over = ", ".join(f"{count} {kind}" for kind, count in sorted(report.listing.passed_over.items()))
    if passed_over:
        logger.warning("not looked into in %s: %s", report.root, passed_over)
    sample = f" (looked at {len(report.looked_at)})" if len(report.looked_at) < found else ""
    logger.info("data %s: %d images%s, %d skipped, %d crops", report.root, found, sample, len(faults), report.crops)


def evaluation_crops(
    names: list[str],
    size: int,
    count: int,
    seed: int = 0,
    degradation: Degradation | None = None,
    folder: Path | None = None,
    called: str = "count",
) -> list[Sample]:
    """A fixed set of crops for measuring: a regular grid over each photograph at 0.4, 0.65 and full scale.

    Flat backgrounds are left out.  Photographs take turns, so that any ``count`` holds about as many crops of each; the
    degradation of a crop depends on ``seed`` and on its place alone.

    ``folder`` is where `PACKAGED` photographs are, see `load_photograph`; ``called`` is what an error calls ``count``.

    Raises:
        ValueError: if the photographs hold fewer than ``count`` crops of this size.
    """
    degradation = degradation or Degradation()
    columns = []
    for name in names:
        image = load_photograph(name, folder)
        crops = []
        for scale in (0.4, 0.65, 1.0):
            shape = (round(image.shape[0] * scale), round(image.shape[1] * scale))
            level = _level(image, shape)
            tops, lefts = ((n % size // 2 + size * np.arange(n // size)) for n in shape)
            for top, left in itertools.product(tops, lefts):
                crop = level[top : top + size, left : left + size]
                if not _is_flat(crop):
                    crops.append((f"{seed} {name} {scale} {top} {left}", crop))
        order = np.random.default_rng(0).permutation(len(crops))
        columns.append([(name, *crops[i]) for i in order])
    turns = [column[i] for i in range(max(map(len, columns))) for column in columns if i < len(column)]
    if len(turns) < count:
        raise ValueError(f"{called} must be at most {len(turns)} for crops of {size} pixels, got {count}")
    samples = []
    for name, key, gt in turns[:count]:
        gt = np.ascontiguousarray(gt)
        digest = hashlib.sha256(key.encode()).digest()[:8]
        lr, gt = degradation.degrade(gt, np.random.default_rng(int.from_bytes(digest, "little")))
        samples.append(Sample(gt=to_tensor(gt), lr=to_tensor(lr), prompt=", ".join(_tags(name))))
    return samples
