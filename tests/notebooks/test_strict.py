"""The run of the notebooks (notebooks/conftest.py): what counts as the same output, and that no cell passes unseen."""

import importlib.util
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("notebooks_conftest", ROOT / "notebooks" / "conftest.py")
strict = importlib.util.module_from_spec(spec)
spec.loader.exec_module(strict)

CHECK = "✓ LL · {}\n"


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("score 0.42 · 26.3 dB", "score 0.43 · 26.5 dB"),
        ("fine energy 11.6", "fine energy 11.9"),
        ("61440 bytes", "61500 bytes"),
        ("LL 30 %, LH 25 %", "LL 31 %, LH 24 %"),
        ("size 8.1e-05", "size 8.3e-05"),
        ("adjoint off by 1.8e-15", "adjoint off by 0.0e+00"),
        ("change    0.01 dB", "change   -0.01 dB"),
        ("change −0.01 dB", "change +0.01 dB"),
        ("first   9.99", "first  10.02"),
        (CHECK.format("within 1e-06"), CHECK.format("within 1e-06")),
    ],
)
def test_other_rounding_agrees(stored, fresh):
    assert strict.agree(stored, fresh)
    assert strict.Text(stored) == fresh


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("score 0.42", "Score 0.42"),
        ("score 0.42", "score"),
        ("score 0.42 dB", "score 0.42 0.42 dB"),
        ("a 1\nb 2\n", "a 1\n"),
        ("a 1\nb 2\n", "a 1 b 2\n"),
        ("fine energy 11.6", "fine energy 12.8"),
        ("score 0.500", "score 0.550"),
        ("PSNR 26.3", "PSNR 28.9"),
        ("61440 bytes", "67584 bytes"),
        ("size 8.1e-05", "size 8.9e-05"),
        ("step 20", "step 22"),
        ("adjoint off by 1.8e-15", "adjoint off by 2.0e-04"),
        ("nothing 0.0e+00", "nothing 1.0e-01"),
        ("balance 0.30", "balance -0.30"),
        ("loss 0.12", "loss nan"),
        (CHECK.format("within 1e-06"), CHECK.format("within 1e-04")),
        (CHECK.format("exact"), CHECK.format("within 1e-06")),
    ],
)
def test_other_words_lines_and_numbers_do_not(stored, fresh):
    assert not strict.agree(stored, fresh)
    assert strict.Text(stored) != fresh


STUB = """\
def double(x):
    raise NotImplementedError  # any whole number


def verify():
    assert double(4) == 8


exercise(1, verify)"""
SOLUTION = """\
# Twice a number.
def double(x):
    return 2 * x  # for any number
"""


def test_a_solution_takes_the_place_of_its_stub():
    text = strict.solved(STUB, SOLUTION)
    assert "NotImplementedError" not in text and text.count("exercise(") == 1 and "# for any number" in text
    said = []
    exec(text, {"exercise": lambda number, verify: said.append((number, verify()))})
    assert said == [(1, None)]


@pytest.mark.parametrize("solution", ["# nothing", SOLUTION.replace("double", "triple")])
def test_a_solution_must_define_what_the_stub_leaves_open(solution):
    with pytest.raises(ValueError, match="double"):
        strict.solved(STUB, solution)


@pytest.mark.parametrize("parts", [(), (2,), (1, 2), (2, 1)])
def test_every_exercise_has_a_solution_and_every_solution_an_exercise(parts, tmp_path):
    (tmp_path / "solutions").mkdir()
    notebook, file = tmp_path / "x.ipynb", tmp_path / "solutions" / "x.py"
    file.write_text('"""Solutions."""\n\n\n# %% Exercise 1\n' + SOLUTION)
    strict.check_solutions(notebook, ["import math", STUB])
    assert strict.solutions_of(notebook) == {1: SOLUTION}
    file.write_text("".join(f"# %% Exercise {number}\n{SOLUTION}" for number in parts))
    with pytest.raises(ValueError, match=r"x.ipynb must have a solution for each of its exercises \[1\], got"):
        strict.check_solutions(notebook, ["import math", STUB])


def cell(source, *outputs, count=1, tags=()):
    return new_code_cell(source, outputs=list(outputs), execution_count=count, metadata={"tags": list(tags)})


def out(text):
    return new_output("stream", name="stdout", text=text)


def raised(name, value):
    return new_output("error", ename=name, evalue=value, traceback=[])


EXERCISE = cell("def exercise(n, verify):\n    verify()\n    print(f'exercise {n}: correct')")
OPEN = cell(STUB, raised("NotImplementedError", ""), tags=["raises-exception"])
SOLUTIONS = {  # of the notebooks below
    "passes_solution": "# %% Exercise 1\n" + SOLUTION,
    "fails_solution": "# %% Exercise 1\n" + SOLUTION.replace("2 * x", "3 * x"),
}
NOTEBOOKS = {
    "passes_rounding": [cell("print('score 0.43')", out("score 0.42\n"))],
    "passes_picture": [
        cell(
            "from IPython.display import display\ndisplay({'text/html': 'new', 'text/plain': '3 cats'}, raw=True)",
            new_output("display_data", {"text/html": "old", "text/plain": "3 cats"}),
        )
    ],
    "passes_announced_error": [
        cell("raise ValueError('no')", raised("ValueError", "no"), tags=["raises-exception"]),
    ],
    "passes_solution": [EXERCISE, OPEN],
    "fails_solution": [EXERCISE, OPEN],
    "fails_solution_missing": [EXERCISE, OPEN],
    "fails_words": [cell("print('score 0.42')", out("Score 0.42\n"))],
    "fails_number": [cell("print('score 0.50')", out("score 0.55\n"))],
    "fails_alt_text": [
        cell(
            "from IPython.display import display\ndisplay({'text/html': 'a', 'text/plain': '3 cats'}, raw=True)",
            new_output("display_data", {"text/html": "a", "text/plain": "3 dogs"}),
        )
    ],
    "fails_stripped": [cell("print(1)", count=None)],
    "fails_outputs_removed": [cell("print(1)")],
    "fails_unknown_magic": [cell("%notamagic")],
    "fails_mistyped_marker": [cell("# NBVAL_IGNORE_OUTPUTS\nprint(1)", out("1\n"))],
    "fails_mistyped_tag": [cell("print(1)", out("1\n"), tags=["nbval-ignore-outputs"])],
    "fails_announced_but_not_raised": [cell("x = 1", tags=["raises-exception"])],
    "fails_dead_kernel": [cell("import os\nos._exit(1)")],
    "fails_memory": [cell("x = b'x' * 2_500_000_000")],
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Which notebooks had a failure, and how long the dead kernel's tests took, from one run over all of them."""
    folder = tmp_path_factory.mktemp("notebooks")
    shutil.copy(ROOT / "notebooks" / "conftest.py", folder)
    (folder / "solutions").mkdir()
    for name, text in SOLUTIONS.items():
        (folder / "solutions" / f"{name}.py").write_text(text)
    for name, cells in NOTEBOOKS.items():
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=600",
         "--junitxml=verdicts.xml", "-o", "junit_family=xunit1", "-p", "no:cacheprovider",
         "-k", "not budget or passes_rounding or memory", "."],  # it takes seconds to measure what a notebook may take
        cwd=folder, env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}, text=True,
        capture_output=True,
    )  # fmt: skip
    cases = list(ET.parse(folder / "verdicts.xml").getroot().iter("testcase"))
    seconds = sum(float(case.get("time")) for case in cases if "fails_dead_kernel" in case.get("file"))
    failed = {Path(case.get("file")).stem for case in cases if len(case)}
    return failed, seconds, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_cell_passes_unseen(name, verdicts):
    failed, _, report = verdicts
    assert (name in failed) == name.startswith("fails"), report


@pytest.mark.slow
def test_a_dead_kernel_is_noticed_at_once(verdicts):
    _, seconds, report = verdicts
    assert "the kernel died while it ran this cell" in report
    assert seconds < 300, "waited for the time-out of the cell, 600 seconds"


@pytest.mark.parametrize("slower", [1, 4, 30])
def test_the_budget_is_the_notebooks_and_not_the_machines(slower):
    """A notebook that costs as much as our heaviest passes on any machine; three times as much passes on none."""
    cost, evaluation = 5000 * 0.02 * slower, 0.02 * slower
    strict.check_budget(cost, evaluation, 1e9)
    with pytest.raises(AssertionError, match="used the processor time of 15000 evaluations .* allowed 10000"):
        strict.check_budget(3 * cost, evaluation, 1e9)
    with pytest.raises(AssertionError, match=r"used 2.50 GB of memory, allowed 2.4"):
        strict.check_budget(cost, evaluation, 2.5e9)
