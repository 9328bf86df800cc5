"""Training data that no disk here holds: shards read over the network, as WebDataset tar files or Parquet.

Hugging Face `datasets` reads them, not `webdataset` itself: both read the same tar files, but `datasets` is released
every few weeks (5.2 in November 2026; webdataset 1.0.2 and its random-access part wids 0.1.11 are of early 2025), reads
Parquet and ``hf://`` addresses as well, leaves pictures undecoded on request, so that this module decodes them like all
others, and splits a stream by shards, which is all that is needed of it.

Shards are dealt to *lanes*.  Sample i of a run is entry ``i // lanes`` of lane ``i % lanes``, over and over when the
lane ends, so that a sample is a function of ``(seed, index)`` and of the shards alone, like all others.  With lanes a
multiple of ``batch_size · num_workers`` each loader process of each training process reads lanes of its own; with
another number samples are the same, but some shards are read by several of them.  Entries come in the order of the
shards, so shuffle when writing them.  After an interruption the very next sample follows; to get there each lane is
read again up to it, undecoded.
"""

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from rfsr_ext.data.check import size_fault
from rfsr_ext.data.datasets import Sample
from rfsr_ext.data.degradation import Degradation
from rfsr_ext.data.images import read_image, to_tensor
from rfsr_ext.files import decode_text

__all__ = ["StreamedImages"]

logger = logging.getLogger(__name__)

_PROMPTS = ("txt", "text", "caption", "prompt")  # names of the column that holds it
_KINDS = {".tar": "webdataset", ".parquet": "parquet"}
_RECENT = (
    2  # entries kept of each lane, so that a sample after one that a neighbor stood in for costs no second reading
)


class StreamedImages(Dataset):
    """Random crops of sharp images in shards; see the module for their order.

    An image that cannot be used is skipped and counted; the next one of its lane stands in.

    Args:
        files: where the shards are, one address or several, with wildcards: ``.tar`` in WebDataset's layout (``0.jpg``,
            ``0.txt`` …) or ``.parquet`` with a column of images and one of ``txt``, ``text``, ``caption`` or
            ``prompt``.
        size: side of the sharp crop in pixels.
        seed: of crops and degradations.
        degradation: makes the low-resolution image.
        lanes: no more than there are shards.

    Raises:
        ModuleNotFoundError: without the package datasets.
        FileNotFoundError: if there are no such files.
        ValueError: if the files are of another kind, hold no images, or are fewer than the lanes.
    """

    def __init__(
        self, files: str | list[str], size: int, seed: int = 0, degradation: Degradation | None = None, lanes: int = 1
    ):
        self.size, self.seed, self.lanes = size, seed, lanes
        self.degradation = degradation or Degradation()
        if size % self.degradation.scale:
            raise ValueError(f"size must be a multiple of the scale {self.degradation.scale}, got {size}")
        self.shards, self.image, self.prompt = _open([files] if isinstance(files, str) else files)
        if not 1 <= lanes <= self.shards.num_shards:
            raise ValueError(f"lanes must be at least 1 and at most the {self.shards.num_shards} shards, got {lanes}")
        self._lanes: dict[int, _Lane] = {}
        self._skipped = torch.zeros(257, dtype=torch.int64).share_memory_()  # a place for each loader process

    @property
    def skipped(self) -> int:
        """How often an image could not be used, in all loader processes."""
        return int(self._skipped.sum())

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Sample:
        position, number = divmod(index, self.lanes)
        if number not in self._lanes:
            shards = self.shards.shard(num_shards=self.lanes, index=number)
            self._lanes[number] = _Lane(functools.partial(_entries, shards))
        rng = np.random.default_rng((self.seed, index))
        place, flip = rng.random(2), rng.random() < 0.5
        for step in range(1000):
            entry = self._lanes[number][position + step]
            try:
                crop = read_image(_content(entry[self.image]), lambda height, width: self._box(place, height, width))
                break
            except OSError as error:
                worker = get_worker_info()
                self._skipped[256 if worker is None else worker.id] += 1
                logger.warning("skipped %s: %s (%d skipped so far)", entry.get("__key__", index), error, self.skipped)
        else:
            raise ValueError(f"lane {number} has 1000 entries in a row that are no usable image; look at its shards")
        gt = to_tensor(crop[:, ::-1] if flip else crop)
        lr, (gt,) = self.degradation(gt[None], [(self.seed, index)])
        return Sample(gt=gt, lr=lr[0], prompt=str(entry[self.prompt] or "").strip() if self.prompt else "")

    def _box(self, place: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
        if fault := size_fault([(height, width)], self.size, 1):
            raise OSError(fault)
        top, left = (int(at * (n - self.size + 1)) for at, n in zip(place, (height, width), strict=True))
        return top, left, self.size, self.size


class _Lane:
    """Entries by their position, read forwards from what ``begin`` gives; beyond the end it begins anew."""

    def __init__(self, begin: Callable[[], Iterator[dict]]):
        self.begin, self.entries = begin, begin()
        self.position = 0  # of the next entry to be read
        self.length: int | None = None
        self.recent: OrderedDict[int, dict] = OrderedDict()

    def __getitem__(self, position: int) -> dict:
        while True:
            wanted = position if self.length is None else position % self.length
            if wanted in self.recent:
                return self.recent[wanted]
            if wanted < self.position:
                self.entries, self.position = self.begin(), 0
            try:
                entry = next(self.entries)
            except StopIteration:
                if not self.position:
                    raise ValueError("a lane must hold at least one image, got shards that are empty") from None
                self.length, self.entries, self.position = self.position, self.begin(), 0
                continue
            self.recent[self.position] = entry
            self.position += 1
            if len(self.recent) > _RECENT:
                self.recent.popitem(last=False)


def _entries(shards: Any) -> Iterator[dict]:
    """All entries of some shards; plain iteration would split them over loader processes once more."""
    for batch in shards.iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


def _open(files: list[str]) -> tuple[Any, str, str | None]:
    """The stream of all shards, and the names of its columns of images and of prompts."""
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError("streamed data needs the package datasets; pip install 'rfsr_ext[stream]'") from None
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    WebDataset.DECODERS |= dict.fromkeys(("txt", "text"), _text)  # theirs takes UTF-8 alone
    kinds = {kind for file in files for ending, kind in _KINDS.items() if file.endswith(ending)}
    if len(kinds) != 1 or not all(file.endswith(tuple(_KINDS)) for file in files):
        raise ValueError(f"files must all end in .tar or all in .parquet, got {', '.join(files)}")
    try:
        shards = datasets.load_dataset(kinds.pop(), data_files=files, split="train", streaming=True)
    except (FileNotFoundError, IndexError) as error:  # the latter where a wildcard stands for nothing
        raise FileNotFoundError(f"no shards at {', '.join(files)}; give the address of some") from error
    columns = shards.features or {}
    images = [name for name, feature in columns.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise ValueError(
            f"shards must have a column of images, got {', '.join(columns) or 'none'} in {', '.join(files)}"
        )
    for name in images:
        shards = shards.cast_column(name, datasets.Image(decode=False))
    return shards, images[0], next((name for name in _PROMPTS if name in columns), None)


def _text(data: bytes) -> str:
    """A prompt in any encoding; what is no text is said and passed over, as its picture is good."""
    try:
        return decode_text(data)
    except ValueError as error:
        logger.warning("a prompt of the shards cannot be read as text (%s) and is left empty", error)
        return ""


def _content(image: Any) -> bytes:
    """A picture's file.

    Raises:
        OSError: if the entry has none.
    """
    content = (image or {}).get("bytes")
    if not content:
        raise OSError("the entry has no image")
    return content
