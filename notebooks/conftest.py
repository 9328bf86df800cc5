"""``pytest --nbval notebooks``: run every notebook, compare words exactly and numbers nearly, and close nbval's gaps.

The stored outputs come from one machine and are checked on another, whose rounding differs.  So two texts agree if they
have the same words in the same lines and their numbers are near (`agree`).  Pictures lie in ``text/html`` and are not
compared; their descriptions in ``text/plain``, with the plotted numbers, are.

nbval alone passes a cell that was stored without being run, an unknown magic, a mistyped marker, and an error announced
but not raised; here they fail.  It waits for the whole time-out when a kernel has died; here that takes a second.  More
items are added: after each exercise its cell is run again with the solution (``solutions/``) in the stub's
place, and at the end every exercise must have had one, and the notebook stayed within its budget.

The budget measures the notebook and not the machine: processor time is divided by that of one evaluation of the mini
model's networks, timed in the same kernel after the last cell.  Seconds would not do: the same notebook takes several
times as many on an older processor.  Waiting threads sleep (OMP_WAIT_POLICY), because on cores that others use too they
would burn more processor time than the work itself.
"""

import ast
import os
import re
import time
from pathlib import Path
from queue import Empty

import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile, comment_markers, metadata_tags

EVALUATIONS, MEMORY = 10_000, 2.4e9  # what notebooks/README.md says of each, with head-room for other machines
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the kernels, which start later
CALIBRATION = """
import time, torch
from rfsr_ext.models import load_model
def seconds_per_evaluation():
    model, best = load_model("mini"), float("inf")
    with torch.no_grad():
        condition = model.condition(torch.zeros(1, 3, 16, 16), [""])
        latents = torch.zeros(1, model.latent_channels, 16, 16)
        for _ in range(12):
            start = time.process_time()
            for _ in range(5):
                model.predict(latents, torch.tensor(500), condition)
            best = min(best, (time.process_time() - start) / 5)
    print(best)
seconds_per_evaluation()
"""
_ROUNDING = 1e-6  # numbers in scientific notation up to here are rounding errors
_NUMBER = re.compile(r" ?[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def _near(stored: str, fresh: str) -> bool:
    """Within 3 % or the last digits printed: 2 units, or 1 of a whole number."""
    a, b = (float(text.replace("−", "-")) for text in (stored, fresh))
    digits, _, exponent = stored.partition("e")
    if exponent and (a == 0 or max(abs(a), abs(b)) <= _ROUNDING):
        return abs(b) <= _ROUNDING
    units = 2 if "." in digits or exponent else 1
    last = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(a - b) <= max(units * last, 0.03 * abs(a)) * (1 + 1e-9)


def agree(stored: str, fresh: str) -> bool:
    """Whether two outputs have the same words and lines, and numbers that are near."""
    stored, fresh = (re.sub(" +", " ", text) for text in (stored, fresh))
    if _NUMBER.sub("#", stored) != _NUMBER.sub("#", fresh):
        return False
    return all(map(_near, _NUMBER.findall(stored), _NUMBER.findall(fresh)))


class Text(str):
    """A stored output; equal to a fresh one that agrees with it."""

    __hash__ = str.__hash__

    def __eq__(self, fresh):
        return agree(self, fresh)

    def __ne__(self, fresh):
        return not agree(self, fresh)


def exercise_number(code: str) -> int | None:
    """Which exercise a cell asks; None if it asks none."""
    asked = re.search(r"^exercise\((\d+), ", code, re.MULTILINE)
    return int(asked[1]) if asked and "raise NotImplementedError" in code else None


def solutions_of(notebook: Path) -> dict[int, str]:
    """The parts of a notebook's solutions file by number of the exercise; none if there is no file."""
    path = notebook.parent / "solutions" / f"{notebook.stem}.py"
    parts = re.split(r"^# %% Exercise (\d+)\n", path.read_text() if path.exists() else "", flags=re.MULTILINE)
    return dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))


def check_solutions(notebook: Path, codes: list[str]) -> None:
    """Fail if a notebook has an exercise without solution, or its solutions file one without exercise."""
    asked = [number for number in map(exercise_number, codes) if number]
    if asked != list(found := solutions_of(notebook)):
        raise ValueError(f"{notebook.name} must have a solution for each of its exercises {asked}, got {list(found)}")


def solved(stub: str, solution: str) -> str:
    """The stub's cell as a reader fills it in: what raises NotImplementedError gives way to the solution."""
    lines, answer = stub.splitlines(), ast.parse(solution).body
    stubs = [node for node in ast.parse(stub).body if "raise NotImplementedError" in ast.unparse(node)]
    names = {getattr(node, "name", None) for node in stubs}
    if not names or not names <= {getattr(node, "name", "") for node in answer}:
        raise ValueError(f"the solution must define the functions that the stub leaves open, {sorted(map(str, names))}")
    for node in reversed(stubs):
        lines[node.lineno - 1 : node.end_lineno] = [solution] if node is stubs[0] else []
    return "\n".join(lines)


def pytest_collectstart(collector):
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += ("stderr", "text/html")  # stderr: warnings of other releases of the libraries


class Extra(pytest.Item):
    """An item beside nbval's own."""

    def repr_failure(self, excinfo):
        return str(excinfo.value)

    def reportinfo(self):
        return self.path, None, f"{self.path.name}: {self.name}"


class Solved(Extra):
    """A stub with its solution in its place says "correct"."""

    def __init__(self, *, stub, solution, **options):
        super().__init__(**options)
        self.stub, self.solution = stub, solution

    def runtest(self):
        said = []
        reply = self.parent.kernel.kc.execute_interactive(
            solved(self.stub, self.solution), store_history=False, allow_stdin=False, timeout=600,
            output_hook=lambda message: said.append(message["content"].get("text", "")),
        )  # fmt: skip
        verdicts = re.findall(r"^exercise \d+: .*$", "".join(said), re.MULTILINE)
        correct = verdicts and all(verdict.endswith(": correct") for verdict in verdicts)
        assert correct and reply["content"]["status"] == "ok", f"with its solution it says {said}"


class Solutions(Extra):
    """Exercises and solutions belong together."""

    def runtest(self):
        check_solutions(self.path, [cell.source for cell in self.parent.nb.cells if cell.cell_type == "code"])


class Budget(Extra):
    """After the last cell: what the kernel and its children have used."""

    def runtest(self):
        assert self.parent.kernel.is_alive(), "the kernel is dead"
        process = Path("/proc", str(self.parent.kernel.km.provisioner.pid))
        times = (process / "stat").read_text().rpartition(")")[2].split()[11:15]
        seconds = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        peak = int(re.search(r"VmHWM:\s+(\d+)", (process / "status").read_text())[1]) * 1024
        said = {"stdout": "", "stderr": ""}

        def hear(message: dict) -> None:
            content = message["content"]
            if "text" in content:
                said[content.get("name", "stderr")] += content["text"]

        reply = self.parent.kernel.kc.execute_interactive(
            CALIBRATION, store_history=False, allow_stdin=False, timeout=600, output_hook=hear
        )
        assert reply["content"]["status"] == "ok", f"the mini model could not be timed: {reply['content']}"
        check_budget(seconds, float(said["stdout"]), peak)


def check_budget(seconds: float, seconds_per_evaluation: float, peak: float) -> None:
    """Fail if a notebook's processor time, counted in evaluations of the mini model, or its memory is too large."""
    evaluations = seconds / seconds_per_evaluation
    assert evaluations <= EVALUATIONS, (
        f"used the processor time of {evaluations:.0f} evaluations of the mini model, allowed {EVALUATIONS} "
        f"({seconds:.0f} s, {1000 * seconds_per_evaluation:.1f} ms each)"
    )
    assert peak <= MEMORY, f"used {peak / 1e9:.2f} GB of memory, allowed {MEMORY / 1e9:.1f}"


_collect, _runtest, _get_message = IPyNbFile.collect, IPyNbCell.runtest, RunningKernel.get_message


def collect(self):
    solutions = solutions_of(self.path)
    for item in _collect(self):
        yield item
        if (number := exercise_number(item.cell.source)) in solutions:
            yield Solved.from_parent(
                self, name=f"{item.name} solved", stub=item.cell.source, solution=solutions[number]
            )
    yield Solutions.from_parent(self, name="solutions")
    yield Budget.from_parent(self, name="budget")


def runtest(self):
    if self.cell.execution_count is None:
        self.raise_cell_error("this cell was stored without being run")
    if unknown := set(self.cell.metadata.get("tags", ())) - set(metadata_tags):
        self.raise_cell_error(f"unknown tags {sorted(unknown)}")
    for comment in re.findall(r"^\s*#+\s*(.*(?:nbval|pytest_validate).*?)\s*$", self.cell.source, re.I | re.M):
        if comment not in comment_markers:
            self.raise_cell_error(f"unknown marker {comment!r}")
    _runtest(self)
    status = self.parent.kernel.reply["status"]
    if status == "error" and not self.options["check_exception"]:
        self.raise_cell_error("the kernel reports an error, perhaps of an unknown magic")
    if status == "ok" and self.options["check_exception"]:
        self.raise_cell_error("this cell is tagged to raise an exception and raised none")


def get_message(self, stream, timeout=None):
    end = time.monotonic() + (float("inf") if timeout is None else timeout)
    while True:
        try:
            message = _get_message(self, stream, timeout=min(1, max(0, end - time.monotonic())))
        except Empty:
            if not self.is_alive():
                raise RuntimeError("the kernel died while it ran this cell") from None
            if time.monotonic() >= end:
                raise
        else:
            if message["msg_type"] == "execute_reply":
                self.reply = message["content"]
            return message


def sanitize(self, text):
    return Text(text) if isinstance(text, str) else text


IPyNbFile.collect, IPyNbCell.runtest, RunningKernel.get_message = collect, runtest, get_message
IPyNbCell.sanitize = sanitize
