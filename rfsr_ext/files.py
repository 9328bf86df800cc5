"""Writing to disk so that nothing is ever half written, aside first, then one rename; text in whatever encoding."""

import codecs
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "check_unheld",
    "decode_text",
    "disk_errors",
    "escape_name",
    "load_tensors",
    "lock_folder",
    "make_folder",
    "not_ours",
    "replace_file",
    "replace_folder",
    "save_table",
    "save_tensors",
    "save_text",
    "sha256",
]

logger = logging.getLogger(__name__)

MANIFEST = ".rfsr.json"  # in a folder that `replace_folder` wrote: the names of those of its files that are ours
LOCK = ".rfsr.lock"  # in a folder that a run writes into; the operating system's lock on it counts, not its being there
_STAGE = ".rfsr.partial."

_locks: set[int] = set()  # descriptors that hold a lock


@contextlib.contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    """A descriptor to lock; forked processes close it, or a loader process would keep the lock of a killed run."""
    descriptor = os.open(path, flags, 0o644)
    _locks.add(descriptor)
    try:
        yield descriptor
    finally:
        if descriptor in _locks:
            _locks.remove(descriptor)
            os.close(descriptor)


def _close_locks() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_locks)


def _sync(path: Path) -> None:
    """Force a file's or a folder's content to disk, so that the rename cannot overtake it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Give errors of writing the name of what was to be written, and those of safetensors their type, `OSError`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        code = re.search(r"os error (\d+)", str(error))  # as Rust words it
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextlib.contextmanager
def _new_name() -> Iterator[None]:
    """Say what it is when a file or folder cannot be made because "there is no such file": /proc, say, takes none.

    Raises:
        PermissionError: instead of `FileNotFoundError`.
    """
    try:
        yield
    except FileNotFoundError as error:
        folder = os.path.dirname(error.filename) or os.curdir
        raise PermissionError(f"nothing new can be written into {folder!r}; give another folder") from None


def _mkdir(path: Path) -> None:
    if path.parts[:1] == ("~",):  # as from "--output=~/x", and whoever removes such a folder may remove the real one
        raise ValueError(f"{str(path)!r} begins with a '~' that no shell has written out; give the whole path")
    try:
        with _new_name():
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir())
        raise NotADirectoryError(f"{str(path)!r} must be a folder, but {str(file)!r} is a file; give another") from None


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; when the block ends well it takes the place of ``path``, else nothing has changed."""
    path = Path(path)
    _mkdir(path.parent)
    with _new_name():
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".partial")
    os.close(descriptor)
    aside = Path(name)
    try:
        with disk_errors(path):
            yield aside
            _sync(aside)
        aside.chmod(0o644)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def make_folder(path: str | Path) -> Path:
    """Make a folder if need be and try to write there, so that it is known before the work whether results can be kept.

    Raises:
        NotADirectoryError: if there is a file of that name, or of the name of a folder it would be in.
        OSError: if nothing can be written there.
    """
    path = Path(path)
    _mkdir(path)
    try:
        with _new_name():
            tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise
    return path


@contextlib.contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well its files are in ``path``, else nothing has changed.

    The folder keeps a list of the files that came this way, ``.rfsr.json``.  Files that an earlier call wrote make room
    for the new ones; every other file in the folder stays, and if a new file would take its place, nothing is written.

    Several files cannot be replaced in one system call.  All old ones are moved aside before the first new one comes,
    so that they are never mixed; they come back if that fails, after a process that was killed with the next call.

    Raises:
        FileExistsError: if a new file would replace one that did not come this way.
        NotADirectoryError: if ``path`` is a file.
    """
    is_new = not os.path.lexists(path)
    path = make_folder(path)
    with _open(path, os.O_RDONLY) as descriptor:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # whoever else replaces files of this folder waits
        for stage in path.glob(f"{_STAGE}*"):  # of a process that was killed
            _undo(stage, path)
            _discard(stage)
        stage = Path(tempfile.mkdtemp(dir=path, prefix=_STAGE))  # on the same file system, or files could not be moved
        new = stage / "new"
        try:
            new.mkdir()
            with disk_errors(path):
                yield new
            names = sorted(file.relative_to(new).as_posix() for file in new.rglob("*") if not file.is_dir())
            (new / MANIFEST).write_text(json.dumps({"files": names}, indent=2) + "\n", encoding="utf-8")
            names.append(MANIFEST)
            for name in names:
                (new / name).chmod(0o644)  # as `replace_file`; safetensors' are for nobody else to read
                _sync(new / name)
            _swap(stage, path, names)
        finally:
            _undo(stage, path)  # should this fail, what was moved aside stays there, and the next call tries again
            _discard(stage)
            if is_new:
                with contextlib.suppress(OSError):
                    path.rmdir()  # it is empty if nothing came of it


def _ours(path: Path) -> set[str]:
    """Files in a folder that `replace_folder` wrote; what its list says of files outside the folder does not count."""
    try:
        names = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {name: path / name for name in (*names, MANIFEST)}
    except (OSError, ValueError, TypeError, KeyError):  # there is no list, or it is not one of ours
        return set()
    inside = path.resolve()
    return {
        name for name, file in files.items()
        if (file.is_file() or file.is_symlink()) and file.parent.resolve().is_relative_to(inside)
    }  # fmt: skip


def not_ours(path: Path, name: str) -> FileExistsError:
    """What is wrong where a file of the user's own would be replaced."""
    return FileExistsError(
        f"folder {str(path)!r} holds a {name!r} that rfsr did not write; move it away or give another folder"
    )


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _swap(stage: Path, path: Path, names: list[str]) -> None:
    """Move our old files out and the new ones in; the list of them goes first and comes last."""
    ours = _ours(path)
    for name in names:
        for place in (name, *map(str, Path(name).parents)):
            is_folder = place != name and (path / place).is_dir()
            if os.path.lexists(path / place) and not is_folder and place not in ours:
                raise not_ours(path, place)
    for name in sorted(ours, key=lambda name: name != MANIFEST):
        _move(path / name, stage / "old" / name)
    for folder in sorted({path / parent for name in ours for parent in list(Path(name).parents)[:-1]}, reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()  # unless it holds something else
    for name in names[:-1]:
        _move(stage / "new" / name, path / name)
    for folder in {(path / name).parent for name in names}:
        _sync(folder)
    _move(stage / "new" / MANIFEST, path / MANIFEST)


def _undo(stage: Path, path: Path) -> None:
    """Put back what was before a swap that did not come to its end; else there is nothing to do."""
    new, old = stage / "new", stage / "old"
    try:
        names = json.loads((new / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError):  # the list is the first to be complete and the last to be moved
        return
    for name in names:
        if not os.path.lexists(new / name):
            _move(path / name, new / name)
    for file in [file for file in old.rglob("*") if file.is_symlink() or not file.is_dir()]:
        _move(file, path / file.relative_to(old))


def _discard(stage: Path) -> None:
    (stage / "new" / MANIFEST).unlink(missing_ok=True)  # from here on there is nothing to undo
    shutil.rmtree(stage, ignore_errors=True)


def check_unheld(path: str | Path, names: Sequence[str]) -> None:
    """Refuse a folder that no run has held before and that has one of the files or folders a run will write in it.

    Raises:
        FileExistsError: as said.
    """
    path = Path(path)
    if foreign := [name for name in names if os.path.lexists(path / name) and not (path / LOCK).exists()]:
        raise not_ours(path, foreign[0])


@contextlib.contextmanager
def lock_folder(path: str | Path, names: Sequence[str] = ()) -> Iterator[None]:
    """Hold a folder, made if need be, for as long as the block lasts: nobody else who asks can have it meanwhile.

    The operating system holds the lock, so that it ends with the process, however that ends.  Of several processes that
    train together only the main one asks.  The file that carries the lock, ``.rfsr.lock``, stays and tells a folder
    that a run has held before from any other.

    Args:
        path: the folder.
        names: what the run will write in it, see `check_unheld`.

    Raises:
        FileExistsError: see `check_unheld`.
        RuntimeError: if another run holds the folder; its process and host are named.
    """
    path = make_folder(path)
    check_unheld(path, names)
    with _open(path / LOCK, os.O_RDWR | os.O_CREAT) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            raise RuntimeError(
                f"folder {str(path)!r} is in use by another run ({holder or 'just started'}); "
                "wait until that has ended, or give another folder"
            ) from None
        except OSError as error:
            logger.warning("folder %s cannot be locked (%s); start no second run into it", path, error.strerror)
        with disk_errors(path / LOCK):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield


def save_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, aside first and then by one rename."""
    with replace_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def save_table(path: str | Path, table: "pd.DataFrame") -> None:
    """Write the rows of a table, aside first and then by one rename: as Parquet if the path ends so, else as CSV."""
    with replace_file(path) as aside:
        (table.to_parquet if Path(path).suffix == ".parquet" else table.to_csv)(aside, index=False)


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write a safetensors file with JSON metadata, aside first and then by one rename.

    Of tensors that share memory, which safetensors refuses, each is written by itself.
    """
    from safetensors.torch import save_file  # here, because the losses need this module where torch is alone

    contiguous, written = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        contiguous[name] = tensor.clone() if place in written else tensor
        written.add(place)
    with replace_file(path) as aside:
        save_file(contiguous, aside, metadata={"json": json.dumps(metadata or {})})


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        ValueError: if the file is not a whole safetensors file.
    """
    from safetensors import safe_open

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


def decode_text(data: bytes) -> str:
    """Text of a file that somebody wrote, on whatever system: in UTF-8, UTF-16 or UTF-32, else in code page 1252.

    A mark at the beginning says which; without one, UTF-16 shows by zeros in every other byte of what is mostly ASCII.

    Raises:
        ValueError: if it is no text.
    """
    zeros = [data[start::2].count(0) for start in (0, 1)]
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return data.decode("utf-32")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if 0 in zeros and max(zeros) > len(data) / 4:
        return data.decode("utf-16-le" if zeros[1] else "utf-16-be")
    if any(zeros):
        raise ValueError("it has zeros in it, as no text has")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252")


def escape_name(name: str) -> str:
    """A file's name as text that any table takes: bytes of it that are no UTF-8 are written out, as ``\\udcff``."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def sha256(path: str | Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
