"""Where training pictures lie: folders as people unpack DIV2K, Flickr2K, OST, FFHQ or LSDIR, and pairs of them.

Folders are searched recursively and in the order of their names, so that "the first 10 000" are the same everywhere.
Links to folders are followed, and no folder is entered twice, however links lead to it.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rfsr_ext.data.images import SUFFIXES
from rfsr_ext.data.pairs import match

__all__ = ["NOT_READ", "Entry", "Listing", "Root", "list_files", "list_root"]

# What no data set means by its pictures: thumbnails of a NAS, macOS's copies; names that begin with a dot besides.
_NOT_DATA = {"@eadir", "__macosx"}
# Endings of pictures that are not read.
NOT_READ = {".avif", ".dng", ".exr", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".tga"}
_ARCHIVES = {".7z", ".gz", ".lmdb", ".rar", ".tar", ".tgz", ".zip"}  # a data set that was not unpacked


@dataclass(frozen=True)
class Root:
    """A folder of sharp images, or two folders of pairs.

    Attributes:
        path: folder of sharp images; their LR images are made in training.
        lr, gt: instead of it, folders of LR images and of their ground truths, or one folder of both, see
            `rfsr_ext.data.pairs.match`.
        weight: how often an image of this root is drawn, compared with one of a root of weight 1.
        limit: the first so many of the sorted list of its images alone; all by default.

    Raises:
        ValueError: if it names neither a folder nor two, or a number is wrong.
    """

    path: str | None = None
    lr: str | None = None
    gt: str | None = None
    weight: float = 1.0
    limit: int | None = None

    def __post_init__(self):
        if (self.path is None) == (self.lr is None) or (self.lr is None) != (self.gt is None):
            given = {key: value for key in ("path", "lr", "gt") if (value := getattr(self, key)) is not None}
            raise ValueError(f"it must have a path, or lr and gt, got {given or 'neither'}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight must be above 0, got {self.weight}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")

    def __str__(self) -> str:
        return str(self.path) if self.lr is None else f"{self.lr} and {self.gt}"


class Entry(NamedTuple):
    """One image to train on: paths of the sharp image, of its LR image (None: to be made) and of its prompt."""

    gt: str
    lr: str | None = None
    prompt: str | None = None


@dataclass
class Listing:
    """What a root holds.

    Attributes:
        entries: images by sorted names, no more than the root's limit.
        unpaired: pictures of either folder that have no partner, with the reason.
        passed_over: how many things of what kind were not looked into.
    """

    entries: list[Entry] = field(default_factory=list)
    unpaired: dict[str, str] = field(default_factory=dict)
    passed_over: Counter = field(default_factory=Counter)


def list_root(root: Root) -> Listing:
    """Find a root's images by their names alone; no file is opened.

    A file ``name.txt`` beside ``name.png`` is its prompt (for pairs beside the ground truth, or else beside the LR
    image).

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if a picture could have two partners.
    """
    listing = Listing()
    if root.path is not None:
        images, texts = list_files(root.path, listing.passed_over)
        listing.entries = [Entry(path, None, _prompt(path, texts)) for path in images]
    else:
        assert root.lr is not None and root.gt is not None
        lr, texts = list_files(root.lr, listing.passed_over)
        gt, more = (lr, texts) if _same(root.lr, root.gt) else list_files(root.gt, listing.passed_over)
        pairs, listing.unpaired = match((root.lr, lr), (root.gt, gt))
        listing.entries = [Entry(b, a, _prompt(b, more) or _prompt(a, texts)) for a, b in pairs]
    listing.entries = listing.entries[: root.limit]
    return listing


def list_files(folder: str, passed_over: Counter) -> tuple[list[str], set[str]]:
    """Pictures in a folder and in those below it, by sorted names, and all files that may be prompts.

    Args:
        folder: where to look.
        passed_over: counts what was not looked into.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise FileNotFoundError(f"data folder {str(folder)!r} {what}; give a folder of images")
    images, texts = [], set()
    for path in _walk(os.fspath(folder), set(), passed_over):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in SUFFIXES:
            images.append(path)
        elif suffix == ".txt":
            texts.add(path)
        elif suffix in NOT_READ | _ARCHIVES:
            passed_over[suffix] += 1
    return images, texts


def _walk(folder: str, seen: set[tuple[int, int]], passed_over: Counter) -> Iterator[str]:
    """Files below a folder, names in sorted order, each folder entered once."""
    try:
        status = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        passed_over["folders that cannot be read"] += 1
        return
    if (status.st_dev, status.st_ino) in seen:
        passed_over["links to folders seen already"] += 1
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _NOT_DATA:
            passed_over["hidden files and folders"] += 1
        elif os.path.isdir(entry.path):  # not entry.is_dir(), which raises an error for a link to itself
            yield from _walk(entry.path, seen, passed_over)
        elif os.path.isfile(entry.path):
            yield entry.path
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            passed_over["links to nothing, or no files"] += 1


def _prompt(path: str, texts: set[str]) -> str | None:
    text = f"{os.path.splitext(path)[0]}.txt"
    return text if text in texts else None


def _same(a: str, b: str) -> bool:
    return Path(a).resolve() == Path(b).resolve()
