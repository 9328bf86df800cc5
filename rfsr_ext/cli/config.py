"""``rfsr config show``: every setting with what it means; and what commands share of options and output."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from rfsr_ext.presets import read_yaml

__all__ = [
    "Set",
    "check_target",
    "choose_device",
    "model_options",
    "parse_pairs",
    "print_table",
    "show_config",
    "split_names",
]

Set = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, wins over the file; repeatable.")]


def parse_pairs(option: str, pairs: Sequence[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` pairs of a command-line option to a mapping, values read as YAML.

    Raises:
        ValueError: if a pair has no ``=`` or its value is no YAML.
    """
    overrides = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{option} must be KEY=VALUE, got {pair!r}")
        try:
            overrides[key.strip()] = read_yaml(value)
        except (yaml.YAMLError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{option} {key.strip()} must have a YAML value, got {value!r} ({reason})") from None
    return overrides


def split_names(names: str | None) -> tuple[str, ...] | None:
    """Comma-separated names, with or without spaces; None if none are given."""
    return tuple(name.strip() for name in names.split(",")) if names else None


def model_options(
    pairs: Sequence[str] | None, weights: Path | None = None, base: Path | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """Options of ``load_model`` from those of the command line; only what was given.

    Raises:
        ValueError: as `parse_pairs` does, or for another type.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    options = parse_pairs("--model-option", pairs)
    options |= {name: str(path) for name, path in (("weights", weights), ("base", base)) if path is not None}
    return options if dtype == "float32" else {**options, "torch_dtype": dtype}


def choose_device(given: str | None = None) -> str:
    """Where models compute: what ``--device`` says, else a GPU if there is one.

    Raises:
        ValueError: if torch finds no such device.
    """
    import torch  # here, because settings need none

    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = ["cpu"]
    if (kind := torch.accelerator.current_accelerator(check_available=True)) is not None:
        found += [kind.type, *(f"{kind.type}:{k}" for k in range(torch.accelerator.device_count()))]
    if given not in found:
        raise ValueError(f"--device must be one that torch finds here ({', '.join(found)}), got {given!r}; give one")
    return given


def check_target(path: Path, overwrite: bool) -> Path:
    """The path of a result, refused before the work if a file there would be replaced unasked.

    Raises:
        FileExistsError: as said.
    """
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists already; give another --output or --overwrite")
    return path


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows with their columns below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_config(path: str, overrides: dict[str, Any]) -> None:
    """Print the configuration that ``path`` and ``overrides`` make, as YAML that can be given to ``rfsr train``."""
    from rfsr_ext.training import load_config  # here, because `parse_pairs` needs none of what it imports

    config = load_config(path, overrides)
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")  # else YAML's escapes
    for key, value in config.to_dict().items():
        typer.echo(f"# {type(config).model_fields[key].description}")
        typer.echo(
            yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=unicode, width=10**6).strip()[1:-1]
        )
