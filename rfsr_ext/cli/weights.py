"""``rfsr weights``: which published files are here, and fetching one."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import typer

from rfsr_ext.cli.config import print_table
from rfsr_ext.weights.registry import FILES, fetch, find

__all__ = ["fetch_weights", "list_weights"]


def list_weights(as_json: bool) -> None:
    """Print one line, or one JSON object, per file."""
    found = {name: find(name) for name in FILES}
    if as_json:
        rows = [
            {"name": name, **asdict(file), "looked_for": [str(folder / file.file) for folder in file.places()],
             "found": str(found[name]) if found[name] else None}
            for name, file in FILES.items()
        ]  # fmt: skip
        typer.echo(json.dumps(rows, indent=2))
        return
    table = [("name", "here", "MiB", "sha256", "purpose", "file", "source", "license")]
    for name, file in FILES.items():
        size = f"{file.mib:.0f}" if file.mib else "?"
        here = "yes" if found[name] else "no"
        table.append((name, here, size, file.sha256[:8] or "?", file.purpose, file.file, file.source, file.license))
    print_table(table)
    typer.echo("\nlooked for, in this order:")
    places: dict[str, list[str]] = {}
    for name, file in FILES.items():
        places.setdefault(", then ".join(map(str, file.places())), []).append(name)
    for folders, names in places.items():
        typer.echo(f"  {folders}: {', '.join(names)}")
    typer.echo(f"\n{sum(map(bool, found.values()))} of {len(FILES)} files are here")


def fetch_weights(names: Sequence[str]) -> None:
    """Fetch and say where each file is."""
    for name in names:
        typer.echo(f"{name}: {fetch(name)}")
