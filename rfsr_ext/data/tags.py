"""Prompts for a folder of pictures, once, by whatever can say what a picture shows."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from rfsr_ext.data.folders import list_files
from rfsr_ext.data.images import read_image, to_tensor
from rfsr_ext.files import replace_file

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
    passed over, so the same call goes on after an interruption.

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
    result, taken = Tagged(), set()
    for picture in tqdm(pictures, desc="tag", unit="image", disable=not progress):
        target = f"{os.path.splitext(picture)[0]}.txt"
        if target in taken:
            result.shared.append(picture)
            continue
        if os.path.lexists(target) and not overwrite:
            taken.add(target)
            result.kept.append(picture)
            continue
        try:
            image = to_tensor(read_image(picture))[None]
        except OSError as error:
            result.skipped[picture] = f"cannot be read as an image ({error})"
            continue
        text = tagger(image)
        if not isinstance(text, list) or len(text) != 1 or not isinstance(text[0], str):
            raise ValueError(f"tagger must give a list of one text for one image, got {text!r}")
        with replace_file(target) as aside:
            aside.write_text(f"{' '.join(text[0].split())}\n", encoding="utf-8")
        taken.add(target)
        result.written.append(target)
    return result
