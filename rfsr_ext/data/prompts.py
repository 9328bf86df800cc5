"""Prompts that lie beside pictures as ``name.txt``, tags or a caption."""

import codecs
from pathlib import Path

__all__ = ["read_prompt"]


def read_prompt(path: str | Path) -> str:
    """A text in UTF-8, in UTF-16 with its mark, or else in the Windows code page 1252.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is none of these.
    """
    data = Path(path).read_bytes()
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
