"""``rfsr record``: which protocols there are, and one of them run on the published network."""

from pathlib import Path
from typing import Any

import torch
import typer

from rfsr_ext.cli.config import check_target, choose_device, print_table
from rfsr_ext.models.catalog import PUBLISHED
from rfsr_ext.recordings import FOLDERS, PROTOCOLS, record, recorded, write_recording

__all__ = ["list_protocols", "record_protocol"]


def list_protocols() -> None:
    """Print one line per protocol: whether it is recorded, what it lacks here, what it measures."""
    table = [("name", "recorded", "weights", "measures")]
    for name, protocol in PROTOCOLS.items():
        files = protocol.files()
        lacks = [file for file, place in files.items() if place is None]
        weights = f"missing: {', '.join(lacks[:2])}{' …' if lacks[2:] else ''}" if lacks else "here"
        table.append((name, _state(name), weights, protocol.measures))
    print_table(table)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, recordings are of this processor"
    typer.echo(f"\nGPU: {gpu}")
    typer.echo(f"recordings are looked for in {', '.join(map(str, FOLDERS))}")
    typer.echo("`rfsr weights` and `rfsr models NAME` say which files are wanted and where they are looked for.")


def _state(name: str) -> str:
    try:
        return "yes" if recorded(name) else "no"
    except ValueError:
        return "not usable"


def record_protocol(
    name: str, output: Path | None, overwrite: bool, options: dict[str, Any], device: str | None = None
) -> None:
    """Run a protocol on the published network and write its recording.

    Raises:
        ValueError: if there is no such protocol, or an option is not for it.
        FileNotFoundError, ModuleNotFoundError: if a file of weights or a package is missing.
        FileExistsError: before any work if there is a file and it may not be overwritten.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"name must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    if options and name not in PUBLISHED:
        raise ValueError(f"--weights, --base and --dtype are for published models, got them for {name}; leave them out")
    path = check_target(output or Path("recordings", f"{name}.json"), overwrite)
    device, protocol = choose_device(device), PROTOCOLS[name]
    network = protocol.load(**options).to(device)
    folders = {key: Path(options[key]) for key in ("weights", "base") if key in options}
    files = {file: place for file, place in protocol.files(**folders).items() if place is not None}
    recording = record(name, network, files, False, device, options.get("dtype", "float32"))
    write_recording(recording, path)
    typer.echo(f"{path}: {len(recording.rows)} rows; {recording.provenance}")
