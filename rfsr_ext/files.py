"""Writing to disk so that nothing is ever half written: aside first, then one rename."""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["load_tensors", "lock_folder", "replace_file", "replace_folder", "save_tensors"]

logger = logging.getLogger(__name__)

LOCK = ".rfsr.lock"  # in a folder that a run writes into; the operating system's lock on it counts, not its being there
_locks: set[int] = set()  # descriptors of the locks this process holds


def _close_locks() -> None:
    """A forked loader process must not keep the lock of a run that was killed."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


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


@contextlib.contextmanager
def lock_folder(path: str | Path) -> Iterator[None]:
    """Hold a folder, made if need be, for as long as the block lasts: nobody else who asks can have it meanwhile.

    The operating system holds the lock, so that it ends with the process, however that ends.  Of several processes that
    train together only the main one asks.  The small file that carries the lock stays.

    Raises:
        RuntimeError: if another run holds the folder; its process and host are named.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise RuntimeError(
            f"folder {str(path)!r} is in use by another run ({holder or 'just started'}); "
            "wait until that has ended, or give another folder"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("folder %s cannot be locked (%s); start no second run into it", path, error.strerror)
    _locks.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if descriptor in _locks:  # not in a forked child, which has closed it
            _locks.remove(descriptor)
            os.ftruncate(descriptor, 0)
            os.close(descriptor)


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
