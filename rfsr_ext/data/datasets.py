"""Training and evaluation samples, each a pure function of ``(seed, index)``.

Because sample ``i`` is always the same crop with the same degradation, a run that is resumed, or split over several
processes, sees exactly the data an uninterrupted single process would have seen; no random state has to be saved.
"""

import codecs
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from rfsr_ext.data.dead_leaves import dead_leaves
from rfsr_ext.data.degradation import Degradation
from rfsr_ext.data.distortions import distort
from rfsr_ext.data.images import SUFFIXES, read_image, resize, to_tensor
from rfsr_ext.data.photographs import PHOTOGRAPHS, load_photograph

__all__ = ["DistortedCrops", "ImageFolder", "PhotographCrops", "Sample", "check_sample", "evaluation_crops"]

logger = logging.getLogger(__name__)

_PYRAMID = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)  # photographs are cropped at these scales, each computed once
_NOT_READ = {".avif", ".dng", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".tga"}  # pictures, too
_FLAT = 0.04  # crops whose brightness varies less than this show a background; they teach and measure nothing


class Sample(TypedDict):
    """``gt`` ``[3, H, W]`` and ``lr`` ``[3, H/scale, W/scale]`` float32 in [0, 1], and the ``prompt``."""

    gt: torch.Tensor
    lr: torch.Tensor
    prompt: str


def check_sample(sample: Sample, scale: int) -> None:
    """Refuse a sample of one's own data set that no loss could be right for.

    Raises:
        ValueError: naming the key and what it should hold.
    """
    for key in ("gt", "lr"):
        image = sample[key]
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(f"{key} must be floating point [3, H, W], got {image.dtype} {list(image.shape)}")
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(f"{key} must be in [0, 1], got values from {low:g} to {high:g}")
    wanted = [scale * n for n in sample["lr"].shape[1:]]
    if list(sample["gt"].shape[1:]) != wanted:
        raise ValueError(f"gt must be {scale} times the size of lr, {wanted}, got {list(sample['gt'].shape[1:])}")


def _dihedral(image: np.ndarray, rng: np.random.Generator, rotate: bool) -> np.ndarray:
    if rng.random() < 0.5:
        image = image[:, ::-1]
    return np.rot90(image, int(rng.integers(4))) if rotate else image


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


def _random_crop(image: np.ndarray, size: int, rng: np.random.Generator, tries: int = 1) -> np.ndarray:
    """A random crop; of several tries, the first that shows more than a flat background."""
    for _ in range(tries):
        top = rng.integers(image.shape[0] - size + 1)
        left = rng.integers(image.shape[1] - size + 1)
        crop = image[top : top + size, left : left + size]
        if not _is_flat(crop):
            break
    return crop


def _level(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The photograph at one size of its pyramid; at its own it is not copied."""
    return image if size == image.shape[:2] else resize(image, size, Image.Resampling.LANCZOS).clip(0, 1)


def _read_text(path: Path) -> str:
    """A text in UTF-8, in UTF-16 with its mark, or else in the Windows code page 1252.

    Raises:
        ValueError: if it is none of these.
    """
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("cp1252")
    if "\0" in text:
        raise ValueError("it has zeros in it")
    return text.strip()


def _is_flat(image: np.ndarray) -> bool:
    return image.mean(axis=-1).std() < _FLAT


class PhotographCrops(Dataset):
    """Endless random crops of the bundled photographs, mixed with dead leaves.

    Args:
        names: photographs to crop (see `rfsr_ext.data.photographs`).
        size: side of the sharp crop in pixels, a multiple of the degradation's scale.
        seed: of the whole sequence.
        dead_leaves_share: share of samples that are dead-leaves images, with an empty prompt.
        empty_prompt_share: share of photographs whose prompt is left empty.
        degradation: makes the low-resolution image.
        recolor: shuffle and change colors.
        length: what ``len`` says; any non-negative index is valid.
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
    ):
        self.size, self.seed, self.length = size, seed, length
        self.dead_leaves_share, self.empty_prompt_share = dead_leaves_share, empty_prompt_share
        self.degradation = degradation or Degradation()
        self.recolor = recolor
        if size % self.degradation.scale:
            raise ValueError(f"size must be a multiple of the scale {self.degradation.scale}, got {size}")
        self.levels = []
        for name in names:
            image = load_photograph(name)
            sizes = [(round(image.shape[0] * scale), round(image.shape[1] * scale)) for scale in _PYRAMID]
            levels = [_level(image, s) for s in sizes if min(s) >= size]
            if not levels:
                raise ValueError(f"size must fit into photograph {name!r} of {image.shape[:2]} pixels, got {size}")
            self.levels.append((name, levels))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, index))
        if rng.random() < self.dead_leaves_share:
            gt, prompt = dead_leaves(self.size, rng), ""
        else:
            name, levels = self.levels[rng.integers(len(self.levels))]
            gt = _dihedral(_random_crop(levels[rng.integers(len(levels))], self.size, rng, tries=4), rng, rotate=True)
            gt = _recolor(gt, rng) if self.recolor else gt
            tags = PHOTOGRAPHS[name].tags
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
    """Random crops of a folder of sharp images; ``name.txt`` beside ``name.png`` holds the prompt, if there is one.

    Files that are no images, are truncated or smaller than the crop are skipped and counted in ``skipped``, whichever
    loader process meets them; the next image of the folder stands in, so that training goes on.  A prompt that is no
    text is skipped and counted there as well; its image stays, with an empty prompt.  What is not looked into, pictures
    of other endings and links to folders, is counted by kind in ``passed_over``.  Transparent pixels are white.

    Args:
        root: folder, searched recursively.
        size: side of the sharp crop in pixels.
        seed: of the sequence of crops.
        degradation: makes the low-resolution image.

    Raises:
        FileNotFoundError: if there is no such folder, or no usable image in it.
    """

    def __init__(self, root: str | Path, size: int, seed: int = 0, degradation: Degradation | None = None):
        self.root, self.size, self.seed = Path(root), size, seed
        self.degradation = degradation or Degradation()
        self._unusable: dict[Path, str] = {}
        if size % self.degradation.scale:
            raise ValueError(f"size must be a multiple of the scale {self.degradation.scale}, got {size}")
        if not self.root.is_dir():
            raise FileNotFoundError(f"data folder {str(root)!r} does not exist; give a folder of images")
        everything = sorted(self.root.rglob("*"))
        candidates = [p for p in everything if p.suffix.lower() in SUFFIXES and p.is_file()]
        self.passed_over = Counter(
            "links to folders" if path.is_dir() else path.suffix.lower()
            for path in everything
            if path.suffix.lower() in _NOT_READ or (path.is_symlink() and path.is_dir())
        )
        passed_over = ", ".join(f"{count} {kind}" for kind, count in sorted(self.passed_over.items()))
        if passed_over:
            logger.warning("not looked into in %s: %s", root, passed_over)
        self.paths = [path for path in candidates if self._header_fits(path)]
        if not self.paths:
            raise FileNotFoundError(
                f"data folder {str(root)!r} has no usable image: {len(candidates)} image files found, "
                f"{len(self._unusable)} skipped, {passed_over or 'nothing'} not looked into; wanted "
                f"{', '.join(sorted(SUFFIXES))} of at least {size}x{size} pixels"
            )
        self.prompts = [self._prompt(path.with_suffix(".txt")) for path in self.paths]
        # that a file cannot be decoded shows late, in some loader process: all of them share these flags
        self._broken = torch.zeros(len(self.paths), dtype=torch.bool).share_memory_()

    @property
    def skipped(self) -> dict[Path, str]:
        """Files left out so far, with the reason."""
        broken = zip(self.paths, self._broken.tolist(), strict=True)
        return self._unusable | {path: "cannot be decoded" for path, flag in broken if flag}

    def _header_fits(self, path: Path) -> bool:
        try:
            with Image.open(path) as image:
                size = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self._unusable[path] = f"cannot be read as an image ({error})"
        else:
            if min(size) >= self.size:
                return True
            self._unusable[path] = f"is {size[0]}x{size[1]} pixels, the crop needs {self.size}"
        logger.warning("skipped %s: %s (%d skipped so far)", path, self._unusable[path], len(self._unusable))
        return False

    def _prompt(self, path: Path) -> str:
        try:
            return _read_text(path)
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            self._unusable[path] = f"cannot be read as text ({error})"
        logger.warning("skipped %s: %s (%d skipped so far)", path, self._unusable[path], len(self._unusable))
        return ""

    def _load(self, index: int) -> tuple[str, np.ndarray]:
        """Prompt and picture."""
        for step in range(len(self.paths)):
            k = (index + step) % len(self.paths)
            if self._broken[k]:
                continue
            try:
                return self.prompts[k], read_image(self.paths[k])
            except OSError as error:
                self._broken[k] = True
                reason = f"cannot be decoded ({error})"
                logger.warning("skipped %s: %s (%d skipped so far)", self.paths[k], reason, len(self.skipped))
        raise FileNotFoundError(f"data folder {str(self.root)!r} has no image left that can be decoded")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self.seed, index))
        prompt, image = self._load(int(rng.integers(len(self.paths))))
        gt = _dihedral(_random_crop(image, self.size, rng), rng, rotate=False)
        lr, gt = self.degradation.degrade(np.ascontiguousarray(gt), rng)
        return Sample(gt=to_tensor(gt), lr=to_tensor(lr), prompt=prompt)


def evaluation_crops(
    names: list[str], size: int, count: int, seed: int = 0, degradation: Degradation | None = None
) -> list[Sample]:
    """A fixed set of crops for measuring: a regular grid over each photograph at 0.4, 0.65 and full scale.

    Flat backgrounds are left out.  Photographs take turns, so that any ``count`` holds about as many crops of each; the
    degradation of a crop depends on ``seed`` and on its place alone.

    Raises:
        ValueError: if the photographs hold fewer than ``count`` crops of this size.
    """
    degradation = degradation or Degradation()
    columns = []
    for name in names:
        image = load_photograph(name)
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
        raise ValueError(f"count must be at most {len(turns)} for crops of {size} pixels, got {count}")
    samples = []
    for name, key, gt in turns[:count]:
        gt = np.ascontiguousarray(gt)
        digest = hashlib.sha256(key.encode()).digest()[:8]
        lr, gt = degradation.degrade(gt, np.random.default_rng(int.from_bytes(digest, "little")))
        samples.append(Sample(gt=to_tensor(gt), lr=to_tensor(lr), prompt=", ".join(PHOTOGRAPHS[name].tags)))
    return samples
