"""Prompts for a folder of pictures, once, by whatever can say what a picture shows."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rfsr_ext.data.folders import list_files
from rfsr_ext.data.images import read_image, to_tensor
from rfsr_ext.files import save_text
from rfsr_ext.processes import split_map

__all__ = ["Tagged", "tag_folder"]


@dataclass
class Tagged:
    """What became of a folder's pictures.

    Attributes:
        written: files of tags that are new.
        kept: pictures that had one already.
        shared: pictures that differ from an earlier one in the ending alone, whose file of tags is theirs too.
        skipped: pictures that cannot be read, with the reason.
    """

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def tag_folder(
    folder: str | Path, tagger: Callable[[Tensor], list[str]], overwrite: bool = False, progress: bool = True
) -> Tagged:
    """Write what each picture shows into ``name.txt`` beside ``name.png``, where training looks for prompts.

    Folders are searched as training searches them.  Each file is complete or not there, and a picture that has one is
    passed over, so the same call goes on after an interruption.  Several processes share the files among them.

    Args:
        folder: searched recursively.
        tagger: takes one image ``[1, 3, H, W]`` in [0, 1] to a list of one text, such as `RAM.tags` of
            `rfsr_ext.networks.ram`.
        overwrite: replace files that exist.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: if there is no such folder, or no picture in it.
        ValueError: if the tagger gives something else.
        OSError: if a file cannot be written.
    """
    pictures, _ = list_files(str(folder), Counter())
    if not pictures:
        raise FileNotFoundError(f"data folder {str(folder)!r} has no picture; give a folder of images")
    result = Tagged()
    sources: dict[str, list[str]] = {}  # by file of tags
    for picture in pictures:
        sources.setdefault(f"{os.path.splitext(picture)[0]}.txt", []).append(picture)
    for target in [] if overwrite else [target for target in sources if os.path.lexists(target)]:
        first, *others = sources.pop(target)
        result.kept.append(first)
        result.shared += others

    def write(target: str) -> tuple[str | None, dict[str, str]]:
        """The first picture that can be read is the one that gives the tags; which it is, and why others are not."""
        skipped = {}
        for picture in sources[target]:
            try:
                image = to_tensor(read_image(picture))[None]
            except OSError as error:
                skipped[picture] = f"cannot be read as an image ({error})"
                continue
            text = tagger(image)
            if not isinstance(text, list) or len(text) != 1 or not isinstance(text[0], str):
                raise ValueError(f"tagger must give a list of one text for one image, got {text!r}")
            save_text(target, f"{' '.join(text[0].split())}\n")
            return picture, skipped
        return None, skipped

    targets = list(sources)
    for target, (source, skipped) in zip(targets, split_map(write, targets, "tag", progress=progress), strict=True):
        result.skipped |= skipped
        if source is not None:
            result.written.append(target)
            result.shared += [picture for picture in sources[target] if picture != source and picture not in skipped]
    return result
