"""What takes hours and is no part of `make test`: kills, fuzzed operators and files, a long run, sanitizers.

``python -m tests.soak [PART ...] [--kills 200] …`` does each part until its count is reached, goes on where it stopped,
and writes ``results.md`` beside this file.  A part begins anew where the code that it tries has changed since.
"""

import argparse
import datetime
import functools
import hashlib
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import measure
from rfsr_ext.files import save_text
from tests.soak import sanitizers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STATE = ROOT / "build/soak/state.json"
SAVE_EVERY = 5  # seconds
SANITIZED = 2500  # calls of one process, which takes a minute to build and to load
# The operators stand alone (sanitizers.py copies them without the rest); what else is tried is tried with everything.
OPERATORS = ("csrc", "rfsr_ext/ops", "tests/soak/operators.py", "tests/soak/sanitizers.py", "tests/soak/threads.h")
PROGRAM = ("csrc", "rfsr_ext", "tests/soak")


class Part(NamedTuple):
    """``run(first, last)`` does trials in one go and raises AssertionError if one fails."""

    run: Callable[[int, int], None]
    count: int
    at_once: int
    what: str
    tried: tuple[str, ...] = PROGRAM


def trials(module: str, first: int, last: int) -> None:
    for i in range(first, last):
        importlib.import_module(f"tests.soak.{module}").trial(i)


def held(first: int, last: int) -> None:
    """In a process of its own, as the switch is read once."""
    narrow = "import torch; assert torch.backends.cpu.get_cpu_capability() == 'AVX2'"
    sanitizers.run_calls(first, last, narrow, [sys.executable], ROOT, {"ATEN_CPU_CAPABILITY": "avx2"})


def long_run(first: int, last: int) -> None:
    """One run of so many iterations, in a folder of its own from which it goes on.

    In a process of its own: what other parts have left in the memory of this one is not to be measured.
    """
    folder = STATE.parent / f"run-{last}-{fingerprint(PROGRAM)[:8]}"
    command = [sys.executable, "-m", "tests.soak.memory", str(last), str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-1500:]


PARTS = {
    "kills": Part(functools.partial(trials, "kills"), 200, 1, "processes killed at random, training, saving, "
                  "upscaling, sampling, degrading by turns: nothing finished is lost, the end is the same to the bit"),
    "operators": Part(functools.partial(trials, "operators"), 100_000, 1, "calls of the losses against fp64, values "
                      "and gradients", OPERATORS),
    "avx2": Part(held, 100_000, 5000, "the same calls under ATEN_CPU_CAPABILITY=avx2", OPERATORS),
    "files": Part(functools.partial(trials, "inputs"), 1000, 1, "damaged pictures, checkpoints, configurations, model "
                  "folders and weight files: read right or refused in one sentence"),
    "iterations": Part(long_run, 36_000, 36_000, "iterations of a tiny model in one process, as many as a day holds "
                       "of the mini model's: memory stays flat"),
    "address": Part(functools.partial(sanitizers.run, "address"), 10_000, SANITIZED, "calls of the CPU kernels under "
                    "AddressSanitizer and UBSan", OPERATORS),
    "thread": Part(functools.partial(sanitizers.run, "thread"), 10_000, SANITIZED, "calls of the CPU kernels on four "
                   "threads under ThreadSanitizer", OPERATORS),
}  # fmt: skip


@functools.cache
def fingerprint(tried: tuple[str, ...]) -> str:
    """Of the code that is tried and that tries it."""
    digest = hashlib.sha256(torch.__version__.encode())
    for name in tried:
        for path in sorted((ROOT / name).rglob("*")) or [ROOT / name]:
            if path.suffix in (".py", ".h", ".cpp", ".yaml"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def commit() -> str:
    changed = git("status", "--porcelain", "rfsr_ext", "csrc", "tests/soak/*.py", "tests/soak/*.h")
    return f"{git('rev-parse', '--short=12', 'HEAD')}{' with changes' if changed else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    for name, part in PARTS.items():
        parser.add_argument(f"--{name}", type=int, default=part.count, help=f"{part.what} ({part.count} by default)")
    options = parser.parse_args()
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"part must be one of {', '.join(PARTS)}, got {name!r}")
    state = json.loads(STATE.read_text()) if STATE.is_file() else {}
    for name in options.parts or PARTS:
        soak(name, getattr(options, name), state)
        write(state)
    if failed := sum(len(entry["failures"]) for entry in state.values()):
        raise SystemExit(f"{failed} failures, see {STATE}")


def soak(name: str, count: int, state: dict) -> None:
    part = PARTS[name]
    if state.get(name, {}).get("fingerprint") != (current := fingerprint(part.tried)):
        state[name] = {"fingerprint": current, "done": 0, "failures": {}, "seconds": 0.0}
    entry = state[name]
    entry["asked"] = count
    began = saved = time.monotonic()
    earlier = entry["seconds"]
    while entry["done"] < count:
        first = entry["done"]
        last = count if part.run is long_run else min(count, first + part.at_once)
        try:
            part.run(first, last)
        except Exception as error:  # the next one is tried all the same
            entry["failures"][str(first)] = f"{type(error).__name__}: {error}"
            print(f"{name} {first}: {entry['failures'][str(first)]}", flush=True)
        entry |= {"done": last, "seconds": earlier + time.monotonic() - began}
        if time.monotonic() - saved > SAVE_EVERY or last == count:
            saved = time.monotonic()
            entry |= {"commit": commit(), "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}"}
            save_text(STATE, json.dumps(state, indent=1))
            write(state)
            print(f"{name}: {last} of {count}, {len(entry['failures'])} failures", flush=True)


def write(state: dict) -> None:
    """The table, of whatever was done so far."""
    lines = [
        "# What was soaked",
        "",
        "`make soak` writes this table. Trial i of a part is a function of i alone, so that a failure can be had",
        "again: `python -m tests.soak.operators 17 18`.",
        "",
        "| part | what | done | of | failures | minutes | commit | when (UTC) |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for name, part in PARTS.items():
        entry = state.get(name)
        if entry is None or "commit" not in entry:
            lines.append(f"| {name} | {part.what} | 0 | {part.count} | – | – | – | – |")
            continue
        lines.append(
            f"| {name} | {part.what} | {entry['done']} | {part.count} | {len(entry['failures'])} | "
            f"{entry['seconds'] / 60:.1f} | {entry['commit']} | {entry['date']} |"
        )
    failures = [f"* {name} {i}: {said}" for name, entry in state.items() for i, said in entry["failures"].items()]
    lines += [
        "",
        f"{measure.processor()}; Python {platform.python_version()}, torch {torch.__version__}.",
    ]
    if failures:
        lines += ["", "Failures:", "", *failures]
    save_text(HERE / "results.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
