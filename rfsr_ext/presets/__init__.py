"""Ready-made settings, as YAML, and how settings are read: one of these by name, or a file of the user's."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from rfsr_ext.files import decode_text

__all__ = ["read_settings"]


def read_settings(source: str | Path, presets: Sequence[str], what: str, folder: str = "") -> tuple[Any, str]:
    """What a preset or a YAML file says, and what an error should call it.

    Args:
        source: one of ``presets``, else a file.
        presets: names.
        what: what the settings are for, in the sentence of an error.
        folder: of the presets, in this one.

    Raises:
        FileNotFoundError: if it is neither.
        ValueError: if it is no YAML.
    """
    if str(source) in presets:
        name, data = f"preset {source}", resources.files(__name__).joinpath(folder, f"{source}.yaml").read_bytes()
    elif Path(source).is_file():
        name, data = str(source), Path(source).read_bytes()
    else:
        raise FileNotFoundError(f"{what} {str(source)!r} is neither a file nor one of the presets {', '.join(presets)}")
    try:
        return yaml.safe_load(decode_text(data)), name
    except (yaml.YAMLError, ValueError) as error:  # also bytes that are no text, and impossible dates
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
