"""Writing to disk so that nothing is ever half written: aside first, then one rename."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["load_tensors", "replace_file", "replace_folder", "save_tensors"]


def _sync(path: Path) -> None:
    """Force a file's or a folder's content to disk, so that the rename cannot overtake it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Safetensors reports a full disk in an exception of its own; callers should see the `OSError` it is."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; when the block ends well it takes the place of ``path``, else nothing has changed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(descriptor)
    aside = Path(name)
    try:
        with _disk_errors(path):
            yield aside
        _sync(aside)
        aside.chmod(0o644)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it takes the place of ``path``, else nothing has changed.

    A folder cannot be swapped in one system call; the old one is moved aside first and comes back if the swap fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    old = aside.with_suffix(".old")
    try:
        with _disk_errors(path):
            yield aside
        for file in (p for p in aside.rglob("*") if p.is_file()):
            _sync(file)
        aside.chmod(0o755)
        if path.exists():
            path.rename(old)
        try:
            aside.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write a safetensors file with JSON metadata, aside first and then by one rename."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replace_file(path) as aside:
        save_file(contiguous, aside, metadata={"json": json.dumps(metadata or {})})


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        ValueError: if the file is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("json", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is not a whole safetensors file ({error}); delete it or give another"
        ) from error
