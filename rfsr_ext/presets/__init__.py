"""Ready-made settings, as YAML, and how settings are read: one of these by name, or a file of the user's."""

import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from rfsr_ext.files import decode_text

__all__ = ["read_settings", "read_yaml"]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without two surprises, a date that is no text and a key that counts where it stands last; and ``~/`` is
    the home folder, which no shell writes out in a file or in ``--set output_dir=~/runs``, unless quotes say otherwise.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"key {key.value!r} stands twice, in lines {lines[key.value]} and {line}; keep one")
            lines[key.value] = line
        return node


_Loader.add_implicit_resolver("!home", re.compile("~/"), ["~"])
_Loader.add_constructor("!home", lambda loader, node: os.path.expanduser(node.value))


def read_yaml(text: str) -> Any:
    """What YAML says, in a file or on the command line.

    Raises:
        yaml.YAMLError, ValueError: if it is none, or says something twice.
    """
    return yaml.load(text, _Loader)  # noqa: S506 - derived from the safe one


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
        return read_yaml(decode_text(data)), name
    except (yaml.YAMLError, ValueError) as error:  # also bytes that are no text, and numbers of thousands of digits
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
