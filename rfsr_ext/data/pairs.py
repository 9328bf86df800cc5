"""Which LR image belongs to which ground truth, by their names.

Data sets name pairs in different ways::

    DIV2K, Flickr2K   0801x4.png, 0801x4m.png          0801.png
    RealSR            Canon_001_LR4.png                Canon_001_HR.png      (both in one folder)
    DRealSR           panasonic_101_x1.png             panasonic_101_x4.png
    StableSR's crops  0801_pch_00001.png               0801_pch_00001.png
"""

import os
import re
from collections.abc import Sequence

__all__ = ["match"]

# What a name says of its resolution, at its end.
_LR = re.compile(r"(?:[ _-]?(?:LR|LQ)(?:[_-]?x?\d+)?|[ _-]?x\d+[mdw]?\d?)$", re.IGNORECASE)
_GT = re.compile(r"(?:[ _-]?(?:HR|GT|HQ)(?:[_-]?x?\d+)?|[ _-]x\d+)$", re.IGNORECASE)

Folder = tuple[str, Sequence[str]]


def match(lr: Folder, gt: Folder) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Pair the files of two folders.

    Two files belong together if their paths within their folders are the same but for the ending; those that are left
    do if they are so without what they say of their resolution (see above).  In one folder of both, names must say what
    they are.

    Args:
        lr, gt: a folder and the paths of the files in it; the same folder twice if it holds both.

    Returns:
        Pairs ``(lr, gt)``, sorted by the ground truths' paths, and for each file without a partner why.

    Raises:
        ValueError: if two files of one folder have the same partner, or the same name.
    """
    if list(lr[1]) == list(gt[1]):
        lr = lr[0], [path for path in lr[1] if _is_lr(path)]
        gt = gt[0], [path for path in gt[1] if not _is_lr(path)]
    left, right = (_by_name(folder, None) for folder in (lr, gt))
    pairs = [(left.pop(name), right.pop(name)) for name in sorted(left.keys() & right.keys())]
    left = _by_name((lr[0], list(left.values())), _LR)
    right = _by_name((gt[0], list(right.values())), _GT)
    pairs += [(left.pop(name), right.pop(name)) for name in sorted(left.keys() & right.keys())]
    unpaired = {path: f"has no ground truth in {gt[0]}" for path in left.values()}
    unpaired |= {path: f"has no LR image in {lr[0]}" for path in right.values()}
    return sorted(pairs, key=lambda pair: pair[1]), unpaired


def _is_lr(path: str) -> bool:
    stem = os.path.splitext(os.path.basename(path))[0]
    return re.search(r"(?:LR|LQ)(?:[_-]?x?\d+)?$", stem, re.IGNORECASE) is not None


def _by_name(folder: Folder, mark: re.Pattern | None) -> dict[str, str]:
    """Paths by their names within the folder, without ending and without ``mark``."""
    root, paths = folder
    found: dict[str, str] = {}
    for path in paths:
        name = os.path.splitext(os.path.relpath(path, root))[0]
        if mark is not None:
            name = mark.sub("", name) or name
        if name in found:
            names = " and ".join(sorted(os.path.relpath(p, root) for p in (found[name], path)))
            raise ValueError(f"folder {root!r} must hold one picture called {name!r}, got {names}; move one away")
        found[name] = path
    return found
