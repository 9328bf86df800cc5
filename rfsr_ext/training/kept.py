"""What is kept of long work, so that it goes on where it stopped and is never taken for other work."""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rfsr_ext.data import Sample
from rfsr_ext.files import save_text

__all__ = ["count_seconds", "find_result", "read_seconds", "samples_digest"]


def samples_digest(samples: Sequence[Sample]) -> str:
    """Tells one list of samples from another: a SHA-256 over prompts, sizes and pixels."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample["prompt"], list(sample["gt"].shape), list(sample["lr"].shape))).encode())
        for key in ("gt", "lr"):
            digest.update(sample[key].contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_result(path: Path, settings: Mapping[str, Any]) -> pd.DataFrame | None:
    """The table that was written for the same settings; None if there is none yet: until then the work is unfinished.

    The settings are written beside the table, in a JSON file, when they are first asked for, so that what is unfinished
    is not gone on with by others either.

    Args:
        path: of the table, a CSV file.
        settings: plain values, everything the table depends on.

    Raises:
        ValueError: if it was made, or begun, with other settings, or nobody knows with which.
    """
    note, settings = path.with_suffix(".json"), json.loads(json.dumps(settings, default=str))  # as they will be read
    if not path.is_file() and not note.is_file():
        save_text(note, json.dumps(settings, indent=2) + "\n")
        return None
    try:
        made = dict(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{str(path)!r} does not say what it was measured with; give another folder") from None
    for key in sorted(settings.keys() | made.keys()):
        then, now = made.get(key), settings.get(key)
        if then != now:
            digest = re.fullmatch("[0-9a-f]{64}", str(now))  # which tells a reader nothing
            values = "" if digest else f" {then!r}, now {now!r}"
            raise ValueError(
                f"{str(path)!r} was made with other settings ({key}{values}); "
                "give another folder, or delete that of this run to make it anew"
            )
    return pd.read_csv(path, keep_default_na=False, float_precision="round_trip") if path.is_file() else None


@contextlib.contextmanager
def count_seconds(path: Path, every: float = 5.0) -> Iterator[None]:
    """Add the seconds that the block takes to those in a file, of a process that is killed up to the last writing.

    Args:
        path: of the file, which holds a number.
        every: seconds between two writings.
    """
    before, began, ended = read_seconds(path), time.monotonic(), threading.Event()

    def write() -> None:
        save_text(path, f"{before + time.monotonic() - began:.3f}\n")

    def watch() -> None:
        while not ended.wait(every):
            write()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write()


def read_seconds(path: Path) -> float:
    """What `count_seconds` has counted in this file; 0 if there is none."""
    return float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0
