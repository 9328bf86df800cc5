"""Folders of pictures that are made one after another, with a list of what each was made from.

A run that was interrupted goes on where it stopped, the same run again has nothing to do, and two people can compare
their files without exchanging them.
"""

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import PIL.features

from rfsr_ext.files import lock_folder, not_ours, replace_file, save_text, sha256

__all__ = ["MANIFEST", "Manifest", "versions", "write_hashed"]

MANIFEST = "manifest.json"
_EVERY = 5  # seconds between two writings of the list; what was made since the last one is made again after a kill


def versions() -> dict[str, str]:
    """What pixels may depend on."""
    codec = PIL.features.version("libjpeg_turbo") or PIL.features.version("jpg")
    packages = {name: version(name) for name in ("rfsr_ext", "torch", "numpy", "scipy", "pillow")}
    return packages | {"libjpeg": f"{codec}", "machine": platform.machine()}


def write_hashed(path: Path, write: Callable[[Path], Any]) -> str:
    """Have ``write`` make a file, which is there whole or not at all; gives its SHA-256."""
    with replace_file(path) as aside:
        write(aside)
        return sha256(aside)


class Manifest:
    """The list of a folder's files, ``manifest.json``, to be used in a ``with`` block; nobody else writes meanwhile.

    Of several processes that fill a folder together the main one holds it.

    It holds ``settings``, by which all files were made, and for each of ``files`` its SHA-256 and ``facts`` of its own.

    Args:
        folder: made if need be.
        settings: plain values.
        names: paths within the folder of all files that are to be made.

    Raises:
        ValueError: if the folder holds files that were made with other settings.
        FileExistsError: if a file of one of these names was not made by an earlier run.
        RuntimeError: if another run holds the folder.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], names: list[str]):
        self.folder, self.settings, self.names = Path(folder), json.loads(json.dumps(settings)), names
        self.files: dict[str, dict[str, Any] | None] = {}
        self._written = time.monotonic()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock_folder(self.folder))
            self.files = self._read()
            for name in self.names:
                if name not in self.files and os.path.lexists(self.folder / name):
                    raise not_ours(self.folder, name)
            self.files = dict.fromkeys(self.names) | self.files  # before the first file: from here on all are ours
            self._write()
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        with self._lock:
            self._write()

    def _read(self) -> dict[str, dict[str, Any] | None]:
        path = self.folder / MANIFEST
        if not os.path.lexists(path):
            return {}
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            settings, files = dict(written["settings"]), dict(written["files"])
        except (OSError, ValueError, TypeError, KeyError):
            raise not_ours(self.folder, MANIFEST) from None
        keys = settings.keys() | self.settings.keys()
        if other := sorted(key for key in keys if settings.get(key) != self.settings.get(key)):
            raise ValueError(
                f"folder {str(self.folder)!r} holds files that were made with another {' and another '.join(other)}; "
                "give another folder"
            )
        return files

    def _write(self) -> None:
        written = {"settings": self.settings, "files": self.files}
        save_text(self.folder / MANIFEST, json.dumps(written, indent=1, sort_keys=True) + "\n")
        self._written = time.monotonic()

    def has(self, name: str, facts: Mapping[str, Any]) -> bool:
        """Whether a file is there, as it was written, with these among its facts.

        Raises:
            FileExistsError: if it was changed since, so that it must not be made anew.
        """
        path, record = self.folder / name, self.files[name]
        if record is None or not path.exists():
            return False
        if sha256(path) != record["sha256"]:
            raise FileExistsError(f"{str(path)!r} was changed after rfsr wrote it; move it away or give another folder")
        return json.loads(json.dumps(facts)).items() <= record["facts"].items()

    def add(self, name: str, facts: Mapping[str, Any], write: Callable[[Path], Any]) -> None:
        """Make a file: ``write`` gets a path; it is in the folder whole or not at all."""
        self.record(name, facts, write_hashed(self.folder / name, write))

    def record(self, name: str, facts: Mapping[str, Any], digest: str) -> None:
        """Take a file into the list that `write_hashed` has made, in this process or in another."""
        self.files[name] = {"sha256": digest, "facts": dict(facts)}
        if time.monotonic() - self._written > _EVERY:
            self._write()
