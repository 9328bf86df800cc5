"""Prompts that lie beside pictures as ``name.txt``, tags or a caption."""

from pathlib import Path

from rfsr_ext.files import decode_text

__all__ = ["read_prompt"]


def read_prompt(path: str | Path) -> str:
    """A text in any encoding that `decode_text` knows.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no text.
    """
    return decode_text(Path(path).read_bytes()).strip()
