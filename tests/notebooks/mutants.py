"""Plant errors in the package, one at a time, and see which notebook notices: ``make mutants``.

``mutants.txt`` lists the errors. Each is put into a copy of the package; the notebooks named beside it run there with
``pytest --nbval`` until one fails. Only two things count: a comparison in the notebook that fails, and an output that
differs from the stored one. An error that stops a notebook in any other way is no fair test and is reported.

What was found is kept in ``notebooks/results/mutants.json``, so that an interrupted run goes on, and only errors whose
file or notebooks have changed are tried again. ``notebooks/mutants.md`` and the README's score are written from it.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE, README = (
    ROOT / name for name in ("notebooks/results/mutants.json", "notebooks/mutants.md", "README.md")
)
SCORE = re.compile(r"\d+ of \d+ planted errors")
_COLOR = re.compile(r"(?:\x1b|#x1B)\[[0-9;]*m")  # the second is how pytest's report writes the first


@dataclass(frozen=True)
class Mutant:
    """One error: its file in ``rfsr_ext/``, what is wrong, who may notice, the text before and after, why it may live.

    ``notebooks`` are numbers, in the order in which they are tried.
    """

    file: str
    name: str
    notebooks: list[str]
    old: str
    new: str
    reason: str

    def text(self) -> str:
        """The file with the error in it."""
        text = (ROOT / "rfsr_ext" / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name!r}: its text must stand once in {self.file}, got {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)

    def paths(self) -> list[Path]:
        """The notebooks there are; the others are still to be written."""
        return [path for number in self.notebooks for path in (ROOT / "notebooks").glob(f"{number}_*.ipynb")]

    def key(self, noticed_by: str | None) -> str:
        """Changes with the file, the error and code and solutions of the notebook that noticed, or all that did not."""
        asked = [path for path in self.paths() if noticed_by in (None, path.stem)]
        return _hash(self.text(), *map(_code, asked))


def read() -> list[Mutant]:
    """The entries of ``mutants.txt``."""
    found = []
    for entry in re.split(r"\n\s*\n", (ROOT / "tests/notebooks/mutants.txt").read_text().strip()):
        lines = [line for line in entry.splitlines() if not line.startswith("#")]
        if lines:
            file, name, notebooks = lines[0].split(" | ")
            old, new, reason = ("\n".join(s[2:] for s in lines[1:] if s[0] == mark) for mark in "-+?")
            found.append(Mutant(file, name, notebooks.split(), old, new, reason))
    return found


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _package() -> str:
    """Every line of the package, and the rules by which outputs are compared."""
    paths = sorted((ROOT / "rfsr_ext").rglob("*.py")), [ROOT / "notebooks/conftest.py"]
    return "\0".join(path.read_text() for group in paths for path in group)


def _code(path: Path) -> str:
    """What of a notebook can notice an error: its code cells, and the solutions that are run in place of stubs."""
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return "\0".join([*code, (path.parent / "solutions" / f"{path.stem}.py").read_text()])


def verdict(report: Path, output: str) -> tuple[str, str]:
    """What a run of pytest found: ("passed" | "noticed" | "stopped", where and how)."""
    for case in ET.parse(report).getroot().iter("testcase") if report.exists() else ():
        for failure in case:
            text, where = _COLOR.sub("", failure.text or ""), case.get("name").rpartition("::")[2].lower()
            if said := re.findall(r"^(?:Assertion|Gradcheck)Error:? ?(.*)$", text, re.MULTILINE):
                return "noticed", f"{where}: {said[-1] or 'an assertion'}"
            if "no check noticed the bug" in text:
                return "noticed", f"{where}: its planted bug is no longer caught"
            if "outputs differ" in text or "with its solution it says" in text:
                return "noticed", f"{where}: prints something else"
            return "stopped", f"{where}: {text.strip()[-300:]}"
    return ("passed", "") if report.exists() and " passed" in output else ("stopped", output[-300:])


def run(notebook: Path, file: str = "", text: str = "") -> tuple[str, str]:
    """Run a notebook in a copy of the package, with one file replaced."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("rfsr_ext", "notebooks"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__", "src"))
        if file:
            Path(folder, "rfsr_ext", file).write_text(text)
        # without the budget item: no error is planted to take time or memory
        command = ["-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "600", "-x", "-q",
                   "-k", "not budget", "-p", "no:cacheprovider", "--junitxml", "report.xml",
                   f"notebooks/{notebook.name}"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=os.environ | {"PYTHONPATH": folder}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return verdict(Path(folder, "report.xml"), done.stdout)


def try_out(mutant: Mutant, path: Path) -> dict:
    """Whether a notebook notices the mutant, and how."""
    started = time.monotonic()
    outcome, how = run(path, mutant.file, mutant.text())
    noticed_by = path.stem if outcome == "noticed" else None
    return {
        "key": mutant.key(noticed_by),
        "noticed_by": noticed_by,
        "how": how,
        "seconds": round(time.monotonic() - started),
    }


def _fresh(mutant: Mutant, results: dict) -> bool:
    """Whether what was found is of the package and the notebooks as they are."""
    found = results.get(mutant.name)
    return bool(found) and found["key"] == mutant.key(found["noticed_by"])


def page(mutants: list[Mutant], results: dict) -> tuple[str, str]:
    """The page with the table, and the score in words."""
    tried = [m for m in mutants if m.name in results and m.paths()]
    noticed = [m for m in tried if results[m.name]["noticed_by"]]
    missed = [m for m in tried if m not in noticed]
    score = f"{len(noticed)} of {len(tried)} planted errors"
    stale = sum(not _fresh(m, results) for m in tried)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "nbval"))
    lines = [
        "# Errors the notebooks notice",
        "",
        f"The notebooks notice **{score}** in the package ({len(noticed) / max(1, len(tried)):.0%}). `make mutants`",
        "plants each alone in a copy and runs notebooks until a comparison fails or an output differs from the stored",
        "one; crashes do not count. [`mutants.txt`](../tests/notebooks/mutants.txt) holds the changed lines.",
        *([f"{len(mutants) - len(tried)} more are listed and not tried yet."] if len(tried) < len(mutants) else []),
        *([f"{stale} of the {len(tried)} were last tried before package or notebooks changed."] if stale else []),
        "",
        f"{datetime.date.today()}, Python {platform.python_version()}, {versions}.",
        "",
        *(["## Not noticed", ""] if missed else []),
        *(f"* {m.name} (`{m.file}`): {m.reason or results[m.name]['how'] or 'no reason given yet'}" for m in missed),
        *([""] if missed else []),
        "## Noticed",
        "",
        "| file | error | notebook | how |",
        "|---|---|---|---|",
    ]
    for m in noticed:
        how = results[m.name]["how"].replace("|", "¦")
        by = results[m.name]["noticed_by"]
        lines.append(f"| `{m.file}` | {m.name} | [{by[:2]}]({by}.ipynb) | {how} |")
    return "\n".join(lines) + "\n", score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the file or of the words of the errors to try")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at once, each with one thread")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    mutants, end = read(), time.monotonic() + options.seconds
    results, sound = json.loads(RESULTS.read_text()) if RESULTS.exists() else ({}, {})
    results = {m.name: results[m.name] for m in mutants if m.name in results}

    chosen = [m for m in mutants if m.paths() and (options.only in m.name or options.only in m.file)]
    left = [m for m in chosen if not _fresh(m, results)]
    left.sort(key=lambda m: (m.name in results, m.notebooks[0] == "10", m.notebooks))  # new ones first, slow ones last
    for m in mutants:
        if not m.paths():
            print(f"waits for notebook {' or '.join(m.notebooks)}: {m.name}")
    package, unsound = _package(), {}

    def is_sound(path: Path) -> bool:
        """Without an error the notebook must pass, or anything would count as noticed."""
        key = _hash(package, _code(path))
        if sound.get(path.stem) != key and path.stem not in unsound:
            outcome, how = run(path)
            if outcome == "passed":
                sound[path.stem] = key
            else:
                unsound[path.stem] = how
            print(f"without an error {path.stem}: {outcome} {how}", flush=True)
        return path.stem not in unsound

    def try_one(m: Mutant) -> None:
        if time.monotonic() < end:
            for path in filter(is_sound, m.paths()):
                results[m.name] = try_out(m, path)
                if results[m.name]["how"]:
                    break
            else:
                if m.name not in results:
                    return
            found = results[m.name]
            said = found["noticed_by"] or ("STOPPED" if found["how"] else "NOT NOTICED")
            print(f"{said} ({found['seconds']} s): {m.file}, {m.name}; {found['how']}", flush=True)
            RESULTS.write_text(json.dumps([results, sound], indent=1) + "\n")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(try_one, left))
    text, score = page(mutants, results)
    PAGE.write_text(text)
    README.write_text(SCORE.sub(score, README.read_text()))
    print(score)
    if unsound:
        sys.exit(f"not used, because they fail without any error: {', '.join(unsound)}")


if __name__ == "__main__":
    main()
