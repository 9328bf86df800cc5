"""What is in the folders one wants to train on, and why some of it will not be used: known before hours are spent."""

import itertools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tqdm import tqdm

from rfsr_ext.data.folders import Entry, Listing, Root, list_root
from rfsr_ext.data.images import SUFFIXES, Header, read_header, read_image
from rfsr_ext.data.prompts import read_prompt
from rfsr_ext.files import sha256

__all__ = ["Report", "check_root", "modes", "size_fault"]

logger = logging.getLogger(__name__)

_THREADS = 8  # reading headers is waiting for disks, above all for those of a network


@dataclass
class Report:
    """What `check_root` found.

    Attributes:
        root: what was looked at.
        listing: its images, pictures without a partner and what was passed over.
        looked_at: numbers of those entries whose files were opened: all of them, or a sample.
        headers: of the ground truths (or sharp images) that can be used.
        skipped: why an entry, by its number, will not be used.
        prompts: why a prompt, by its entry's number, will not be used.
        duplicates: sharp images of the same content.
        crops: how many crops lie side by side in the images that can be used.
    """

    root: Root
    listing: Listing
    looked_at: Sequence[int]
    headers: list[Header] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    prompts: dict[int, str] = field(default_factory=dict)
    duplicates: list[list[str]] = field(default_factory=list)
    crops: int = 0

    @property
    def faults(self) -> dict[str, str]:
        """Why a file is not used, by its path."""
        entries = self.listing.entries
        return (
            {entries[k].gt: reason for k, reason in self.skipped.items()}
            | {str(entries[k].prompt): reason for k, reason in self.prompts.items()}
            | self.listing.unpaired
        )

    def require_images(self, size: int) -> None:
        """Refuse a root that yields nothing.

        Raises:
            FileNotFoundError: naming it and what was found instead.
        """
        if self.headers:
            return
        listing = self.listing
        passed_over = ", ".join(f"{count} {kind}" for kind, count in sorted(listing.passed_over.items()))
        unpaired = f"{len(listing.unpaired)} without a partner, " if self.root.path is None else ""
        pictures = "pairs" if self.root.path is None else "image files"
        raise FileNotFoundError(
            f"data folder {str(self.root)!r} has no usable image: {len(listing.entries)} {pictures} found, "
            f"{unpaired}{len(self.skipped)} skipped, {passed_over or 'nothing'} not looked into; wanted "
            f"{', '.join(sorted(SUFFIXES))} of at least {size}x{size} pixels"
        )


def check_root(
    root: Root, size: int, scale: int = 4, *, decode: bool = True, at_most: int | None = None, progress: bool = True
) -> Report:
    """Look at the images of a root as training would.

    Args:
        root: the folder, or two of pairs.
        size: side of the training crops in pixels; 0 for whole pictures of any size.
        scale: how many times larger the ground truths of pairs must be.
        decode: read every picture and prompt whole and look for duplicates, which finds every fault; else headers alone
            are read, which takes seconds.
        at_most: look at no more than so many images, evenly spread over the list, unless none of these can be used.
        progress: show a progress bar after the first seconds.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if a picture could have two partners.
    """
    listing = list_root(root)
    entries = listing.entries
    count = len(entries)
    chosen = range(count) if at_most is None or count <= at_most else [i * count // at_most for i in range(at_most)]
    report = Report(root, listing, chosen)

    def look(k: int) -> Header | OSError:
        try:
            return _look(entries[k], size, scale, decode)
        except OSError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(look, chosen)
        for k, header in zip(
            chosen, tqdm(found, f"check {root}", len(chosen), delay=2, leave=False, disable=not progress), strict=True
        ):
            if isinstance(header, OSError):
                report.skipped[k] = _words(header)
            else:
                report.headers.append(header)
                report.crops += (header.height // size) * (header.width // size) if size else 0
    if not report.headers and len(chosen) < count:  # perhaps the sample had bad luck
        return check_root(root, size, scale, decode=decode, progress=progress)
    if decode:
        report.prompts = {k: reason for k in chosen if (reason := _prompt_fault(entries[k].prompt))}
        report.duplicates = _duplicates(entries[k].gt for k in chosen if k not in report.skipped)
    return report


def size_fault(sizes: Sequence[tuple[int, int]], size: int, scale: int) -> str | None:
    """What is wrong with the height and width of an image, or with those of a ground truth and its LR image."""
    gt = sizes[0]
    if min(gt) < size:
        return f"is {gt[1]}x{gt[0]} pixels, the crop needs {size}"
    if any(gt != (scale * height, scale * width) for height, width in sizes[1:]):
        return f"is {gt[1]}x{gt[0]} pixels, must be {scale} times its LR image, which is {sizes[1][1]}x{sizes[1][0]}"
    return None


def _look(entry: Entry, size: int, scale: int, decode: bool) -> Header:
    """The header of an image that can be used.

    Raises:
        OSError: saying why it cannot.
    """
    headers = []
    for path in filter(None, (entry.gt, entry.lr)):
        which = "" if path == entry.gt else "has an LR image that "
        try:
            headers.append(read_header(path))
        except OSError as error:
            raise OSError(f"{which}cannot be read as an image ({_words(error)})") from error
    sizes = [(header.height, header.width) for header in headers]
    if fault := size_fault(sizes, size, scale):
        raise OSError(fault)
    if decode:
        for path in filter(None, (entry.gt, entry.lr)):
            which = "" if path == entry.gt else "has an LR image that "
            try:
                read_image(path, lambda height, width: (0, 0, min(height, 8), min(width, 8)))  # decodes it whole
            except OSError as error:
                raise OSError(f"{which}cannot be decoded ({_words(error)})") from error
    return headers[0]


def _words(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _prompt_fault(path: str | None) -> str | None:
    try:
        read_prompt(path) if path is not None else None
    except (OSError, ValueError) as error:
        return f"cannot be read as text ({error})"
    return None


def _duplicates(paths: Iterable[str]) -> list[list[str]]:
    """Groups of files with the same bytes; only those of the same length are read."""
    by_length = defaultdict(list)
    for path in paths:
        by_length[os.path.getsize(path)].append(path)
    by_content = defaultdict(list)
    for path in itertools.chain.from_iterable(group for group in by_length.values() if len(group) > 1):
        by_content[sha256(path)].append(path)
    return [group for group in by_content.values() if len(group) > 1]


def modes(headers: Sequence[Header]) -> Counter:
    """How many pictures have which channels and format."""
    return Counter(f"{header.mode} {header.format}" for header in headers)
