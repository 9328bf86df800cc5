"""``rfsr data``: looking at training data before hours are spent, and making LR images that others can make as well."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer

from rfsr_ext.cli.config import choose_device
from rfsr_ext.data import Degradation, Root
from rfsr_ext.data.check import Report, check_root, modes
from rfsr_ext.data.degraded import degrade_folder, read_manifest
from rfsr_ext.data.tags import tag_folder
from rfsr_ext.processes import is_main, join

__all__ = ["check_data", "degrade_data", "tag_data"]

_NAMED = 50  # of each kind of fault


def shown(path: object) -> str:
    """A path that any terminal can print: what is not UTF-8 and what ends a line is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def check_data(
    folders: Sequence[Path], pairs: tuple[Path, Path] | None, config: str | None, size: int, scale: int, headers: bool
) -> None:
    """Print what each folder holds, and those of a configuration, which also says the sizes.

    Raises:
        ValueError: if there is no folder; at the end, if a file will not be used or a folder yields nothing.
        FileNotFoundError: if a folder does not exist.
    """
    roots = [Root(str(folder)) for folder in folders]
    if pairs is not None:
        roots.append(Root(lr=str(pairs[0]), gt=str(pairs[1])))
    if config is not None:
        from rfsr_ext.training import load_config  # here, because folders need none of what it imports
        from rfsr_ext.training.config import create_degradation
        from rfsr_ext.training.setup import data_roots

        settings = load_config(config)
        roots += data_roots(settings)
        size, scale = settings.crop_size, create_degradation(settings.degradation).scale
    if not roots:
        raise ValueError("give at least one folder, --pairs or a --config with folders")
    faults, empty = 0, []
    for root in roots:
        report = check_root(root, size, scale, decode=not headers)
        _print(report, size, headers)
        faults += len(report.faults)
        if not report.headers:
            empty.append(shown(root))
    if empty:
        crops = f" for crops of {size}x{size} pixels (--crop-size)" if size else ""
        raise ValueError(f"no usable image{crops} in {', '.join(empty)}")
    if faults:
        raise ValueError(f"{faults} files will not be used; the reasons stand above")


def _print(report: Report, size: int, headers: bool) -> None:
    images = "pairs" if report.root.path is None else "images"
    typer.echo(f"{shown(report.root)}: {len(report.headers)} of {len(report.listing.entries)} {images} can be used")
    if report.headers:
        heights, widths = np.array([header[:2] for header in report.headers]).T
        middle = np.argsort(heights * widths, kind="stable")[len(heights) // 2]
        typer.echo(
            f"  sizes: {widths.min()} to {widths.max()} wide, {heights.min()} to {heights.max()} high, median "
            f"{widths[middle]}x{heights[middle]}"
        )
        typer.echo(f"  channels: {', '.join(f'{count} {mode}' for mode, count in modes(report.headers).most_common())}")
        if size:
            typer.echo(f"  crops of {size}x{size} side by side: {report.crops}")
    if more := sum(header.more_frames for header in report.headers):
        typer.echo(f"  more than one frame or page, of which the first is read: {more}")
    if prompts := sum(entry.prompt is not None for entry in report.listing.entries):
        typer.echo(f"  prompts: {prompts}")
    for kind, count in sorted(report.listing.passed_over.items()):
        typer.echo(f"  not looked into: {count} {kind}")
    _list("the same file more than once", [" = ".join(map(shown, group)) for group in report.duplicates])
    _list("not used", [f"{shown(path)}: {reason}" for path, reason in report.faults.items()])
    if headers:
        typer.echo("  (headers alone; without --headers files are read whole)")


def _list(title: str, lines: list[str]) -> None:
    if lines:
        typer.echo(f"  {title}: {len(lines)}")
    for line in lines[:_NAMED]:
        typer.echo(f"    {line}")
    if len(lines) > _NAMED:
        typer.echo(f"    and {len(lines) - _NAMED} more")


def degrade_data(
    folder: Path,
    output: Path,
    preset: str,
    seed: int,
    changes: dict[str, Any],
    crops: int | None,
    size: int,
    limit: int | None,
    like: Path | None,
) -> None:
    """Make LR images, and compare them with somebody else's manifest if one is given.

    Raises:
        ValueError: if an option is wrong; at the end, if an image could not be read or differs from the manifest.
        FileNotFoundError: if there is nothing to degrade.
    """
    root = Root(str(folder), limit=limit)
    theirs = None if like is None else read_manifest(like)
    if theirs is None:
        degradation = Degradation.preset(preset, **changes)
    else:
        settings = theirs["settings"]
        degradation, seed = Degradation.from_dict(settings["degradation"]), settings["seed"]
        crops, size = (None, size) if settings["crops"] is None else settings["crops"].values()
    skipped = degrade_folder(root, degradation, seed, output, crops, size)
    mine = read_manifest(output)
    count = sum(name.startswith("lr/") and record is not None for name, record in mine["files"].items())
    typer.echo(f"{count} LR images in {output / 'lr'}, their ground truths in {output / 'gt'}")
    typer.echo(f"settings, versions and SHA-256 of each: {output / 'manifest.json'}")
    for path, reason in skipped.items():
        typer.echo(f"left out {shown(path)}: {reason}", err=True)
    if theirs is not None:
        _compare(mine, theirs)
    if skipped:
        raise ValueError(f"{len(skipped)} pictures could not be read: {', '.join(map(shown, skipped))}")


def _compare(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Say which LR files are those of a manifest."""
    wanted = {name: record for name, record in theirs["files"].items() if name.startswith("lr/") and record}
    found = {name: mine["files"].get(name) for name in wanted}
    differ = [name for name, record in found.items() if record is None or record["sha256"] != wanted[name]["sha256"]]
    typer.echo(f"{len(wanted) - len(differ)} of {len(wanted)} LR files are those of the manifest to the byte")
    if not differ:
        return
    other = [
        name for name in differ
        if found[name] and found[name]["facts"].get("source_sha256") != wanted[name]["facts"].get("source_sha256")
    ]  # fmt: skip
    was, now = theirs["settings"]["versions"], mine["settings"]["versions"]
    reasons = [f"{key} was {was[key]}, is {now.get(key)}" for key in was if was[key] != now.get(key)]
    reasons += [f"{len(other)} of their sources are other files"] if other else []
    some = ", ".join(map(shown, differ[:5])) + (" …" if len(differ) > 5 else "")
    raise ValueError(
        f"{len(differ)} LR files differ from the manifest: {some} ({'; '.join(reasons) or 'same versions and sources'})"
    )


def tag_data(folder: Path, tagger: str, weights: Path | None, device: str, overwrite: bool) -> None:
    """Write tags beside the pictures of a folder; several processes share them.

    Raises:
        ValueError: if there is no such device or tagger; at the end, if a picture could not be read.
        FileNotFoundError: if there is no picture, or a file of the tagger is missing.
    """
    from rfsr_ext.networks.taggers import load_tagger  # diffusers and transformers, which the other commands go without

    if not folder.is_dir():  # before gigabytes are read
        raise FileNotFoundError(f"data folder {shown(folder)!r} does not exist; give a folder of images")
    device = choose_device(device)
    join()  # each has a GPU of its own from here on
    result = tag_folder(folder, load_tagger(tagger, weights, device), overwrite)
    if not is_main():
        return
    typer.echo(f"{len(result.written)} files of tags are new, {len(result.kept)} pictures had one")
    if result.shared:
        typer.echo(f"{len(result.shared)} pictures share one with a picture of the same name and another ending")
    for path, reason in result.skipped.items():
        typer.echo(f"left out {shown(path)}: {reason}", err=True)
    if result.skipped:
        raise ValueError(f"{len(result.skipped)} pictures could not be read; the reasons stand above")
