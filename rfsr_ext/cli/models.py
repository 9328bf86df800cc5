"""``rfsr models``: which published models are here, what they are made of, and one of them written as our folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from rfsr_ext.cli.config import print_table
from rfsr_ext.models import load_model
from rfsr_ext.models.catalog import PUBLISHED, WantedFile, find_files, weights_folder

__all__ = ["convert_model", "list_published"]


def _complete(files: dict[WantedFile, Path | None]) -> bool:
    return all(place for file, place in files.items() if not file.optional)


def list_published(name: str | None, weights: Path | None, base: Path | None, as_json: bool) -> None:
    """Print a line for each published model, or all about one.

    Raises:
        ValueError: if there is none of that name.
    """
    if name is not None and name not in PUBLISHED:
        raise ValueError(f"name must be one of {', '.join(PUBLISHED)}, got {name!r}")
    found = {n: find_files(n, weights, base) for n in ([name] if name else PUBLISHED)}
    if as_json:
        rows = [
            {"name": n, **{k: v for k, v in asdict(PUBLISHED[n]).items() if k != "files"}, "found": _complete(files),
             "files": [{**asdict(file), "found": str(place) if place else None} for file, place in files.items()]}
            for n, files in found.items()
        ]  # fmt: skip
        typer.echo(json.dumps(rows, indent=2))
    elif name:
        _describe(name, found[name], weights, base)
    else:
        table = [("name", "here", "parameters", "license", "model")]
        for n, files in found.items():
            model = PUBLISHED[n]
            held = sum(place is not None for file, place in files.items() if not file.optional)
            wanted = sum(not file.optional for file in files)
            here = "yes" if held == wanted else f"{held} of {wanted}"
            table.append((n, here, f"{model.parameters / 1e9:.2f} B", model.license, f"{model.title}, {model.paper}"))
        print_table(table)
        typer.echo("\n`rfsr models NAME` lists the files of one; put them into a folder of its name in RFSR_WEIGHTS.")


def _describe(name: str, files: dict[WantedFile, Path | None], weights: Path | None, base: Path | None) -> None:
    model, folder = PUBLISHED[name], weights or weights_folder(name)
    typer.echo(
        f"{model.title} (arXiv {model.paper}), {model.parameters / 1e9:.2f} B parameters; license: {model.license}"
    )
    typer.echo(f"looked for in {folder}:" if folder else "looked for nowhere: give --weights, or set RFSR_WEIGHTS:")
    for file, place in files.items():
        state = f"here, {place}" if place else "missing, may be" if file.optional else "MISSING"
        note = " (or give --base)" if file.base and not place else ""
        typer.echo(f"  {file.path}: {state}{note}\n      {file.what}; from: {file.source}")
    given = "".join(f" --{key} {value}" for key, value in (("weights", weights or "DIR"), ("base", base)) if value)
    typer.echo(f"\nrfsr upscale photo.jpg --model {name}{given}")
    if model.preset:
        typer.echo(f"rfsr train {model.preset} --set model_options='{{weights: {weights or 'DIR'}}}' --set data=FOLDER")


def convert_model(name: str, output: Path, options: dict[str, Any]) -> None:
    """Open a published model and write it as a folder of ours.

    Raises:
        ValueError: if there is none of that name, or a file is damaged or another model's.
        FileNotFoundError: if a file is missing.
        FileExistsError: if ``output`` holds something else.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name must be one of {', '.join(PUBLISHED)}, got {name!r}")
    load_model(name, **options).save_pretrained(output)
    typer.echo(f"{PUBLISHED[name].title}: {output}; rfsr upscale photo.jpg --model {output}")
