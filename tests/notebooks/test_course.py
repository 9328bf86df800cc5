"""The course: notebooks in step with their sources, run whole, linked, described, small, and by the house rules."""

import ast
import base64
import importlib.util
import re
import shutil
import statistics
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2] / "notebooks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"notebooks_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, strict = load("build"), load("conftest")

TAGS = {"nbval-ignore-output"}
LARGE = ("10",)  # trains beside a frozen copy, by hand and with the package
FORBIDDEN = {
    r"^\s*[%!]": "a magic or shell command",
    r"^\S.*;$": "a semicolon that hides the output, which nbval shows",
    r"(?i)#.*(nbval|pytest_validate)": "a marker in a comment; use tags",
    r"\binteract\(|clear_output|display_id|Output\(": "output that nbval cannot follow; use explore()",
    r"plt\.|pyplot": "a figure without description; use panels() and show()",
    r"urlopen|requests\.|hf_hub|urlretrieve": "the network",
    r"sys\.path|os\.chdir": "a change of where things are found; helpers come from the installed package",
}
HEDGES = (
    r"(?i)\b(simply|obviously|clearly|basically|trivial(ly)?|of course|needless to say|as we (all )?know|note that|"
    r"it is important|arguably|somewhat|hopefully|in a sense|sort of|delve|leverag\w+|seamless\w*|powerful|"
    r"cutting[- ]edge|state[- ]of[- ]the[- ]art|game[- ]chang\w+)\b"
)


@pytest.fixture(params=build.SOURCES, ids=lambda source: source.stem)
def source(request):
    return request.param


@pytest.fixture
def notebook(source):
    return nbformat.read(ROOT / f"{source.stem}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def tags(cell):
    return set(cell.metadata.get("tags", ()))


def html(cell):
    return "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def calls(cell, name):
    """Whether the cell calls the function ``name``."""
    nodes = ast.walk(ast.parse(cell.source))
    return any(isinstance(node, ast.Call) and getattr(node.func, "id", "") == name for node in nodes)


def test_every_source_has_its_notebook_and_no_notebook_is_without():
    assert {source.stem for source in build.SOURCES} == {path.stem for path in ROOT.glob("*.ipynb")}


def test_the_map_lists_the_whole_course_and_links_what_exists():
    stems = [source.stem for source in build.SOURCES]
    assert stems == [name for name in build.ORDER if name in stems], "notebooks are named in build.ORDER"
    cells = nbformat.read(ROOT / "00_start_here.ipynb", as_version=4).cells
    (contents,) = (cell.source for cell in cells if "| its promise |" in cell.source)
    assert all((f"({name}.ipynb)" if name in stems else f"`{name}`") in contents for name in build.ORDER)


def test_the_course_opens_with_a_picture_its_first_notebook_made():
    cells = nbformat.read(ROOT / "00_start_here.ipynb", as_version=4).cells
    assert f"]({build.COVER.name})" in cells[0].source
    made = next(html(cell) for cell in cells if cell.cell_type == "code" and "<img" in html(cell))
    assert base64.b64decode(re.search(r"base64,([^\"]+)", made)[1]) == build.COVER.read_bytes()


def test_a_notebook_has_the_cells_of_its_source(source, notebook):
    wanted = build.unrun(source)
    assert [(c.cell_type, c.source, c.metadata) for c in notebook.cells] == [
        (c.cell_type, c.source, c.metadata) for c in wanted.cells
    ], "run `make notebooks`, or with ONLY=--prose if no code has changed"


def test_it_was_run_from_top_to_bottom(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for output in (output for cell in code(notebook) for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert not re.search(r"\d+%\|", str(output)[:400]), "a progress bar"
    assert "widgets" not in notebook.metadata


def test_the_top_and_the_end_lead_the_reader(source, notebook):
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    assert re.match(rf"# {source.stem[:2]} · \S.*\n\n\*\*[^*]+\*\*\n", first), "title, then one promise in bold"
    assert re.search(r"minute|second", first), "say how long it takes"
    assert first.count("\n* ") >= 3, "list what the reader learns"
    assert build._links(source) in first and build._links(source) in last
    assert len(re.findall(r"^# ", text(notebook), re.M)) == 1, "one heading of level one"
    projects, summary = last.split("## Summary")
    assert len(re.findall(r"^\* ", projects.split("**Open projects.**")[1], re.M)) == 2
    assert 3 <= len(re.findall(r"^\* ", summary, re.M)) <= 7


def test_links_lead_somewhere(notebook):
    for target in re.findall(r"\]\(([^)#\s]+)", text(notebook)):
        assert re.match("https?://", target) or (ROOT / target).exists(), target


def test_prose_does_not_hedge(notebook):
    found = [text(notebook)[max(0, m.start() - 30) : m.end() + 30] for m in re.finditer(HEDGES, text(notebook))]
    assert not found
    assert text(notebook).count("**What to see.**") >= 3


def test_cells_are_few_and_short(source, notebook):
    parts = [cell.source for cell in code(notebook)]
    parts += strict.solutions_of(ROOT / f"{source.stem}.ipynb").values()  # which one reads as well
    lengths = [len(part.strip().splitlines()) for part in parts]
    assert 25 <= len(notebook.cells) <= 52
    assert statistics.median(lengths) <= 16 and max(lengths) <= 40
    for cell in code(notebook):
        assert tags(cell) <= TAGS
        for pattern, why in FORBIDDEN.items():
            assert not re.search(pattern, cell.source, re.MULTILINE), f"{why}: {cell.source}"
        if re.search(r"perf_counter|monotonic\(|\btime\(", cell.source):
            assert "nbval-ignore-output" in tags(cell) or not cell.outputs, f"a time is compared: {cell.source}"
    assert sum("nbval-ignore-output" in tags(cell) for cell in code(notebook)) <= 3


def test_figures_are_described_and_small(source, notebook):
    figures = [tag for cell in code(notebook) for tag in re.findall(r"<img [^>]*>", html(cell))]
    assert len(figures) >= 3
    for tag in figures:
        alt = re.search(r'alt="([^"]*)"', tag)[1]
        assert len(alt) >= 40 and re.search(r"\d", alt), alt
        assert len(base64.b64decode(re.search(r"base64,([^\"]+)", tag)[1])) <= 200_000
    assert not any("image/png" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs)
    assert (ROOT / f"{source.stem}.ipynb").stat().st_size <= 1_600_000


def test_a_slider_has_a_still_figure_below_it(notebook):
    cells = code(notebook)
    sliders = [number for number, cell in enumerate(cells) if calls(cell, "explore")]
    assert sliders
    for number in sliders:
        assert any("run this notebook to move it" in str(output) for output in cells[number].outputs)
        assert calls(cells[number + 1], "show"), "the next code cell shows the figure at one position"


def test_every_idea_is_checked_and_one_bug_is_caught(notebook):
    assert sum(cell.source.count("check(") for cell in code(notebook)) >= 8
    bugs = [cell for cell in code(notebook) if re.search(r"^caught\(", cell.source, re.MULTILINE)]
    assert bugs and all("caught: " in printed(cell) for cell in bugs)


def test_exercises_are_open_and_have_solutions(source, notebook):
    asked = {number: cell for cell in code(notebook) if (number := strict.exercise_number(cell.source))}
    solutions = strict.solutions_of(ROOT / f"{source.stem}.ipynb")
    assert list(asked) == list(solutions) == list(range(1, len(asked) + 1)) and 3 <= len(asked) <= 5
    assert f"[solutions/{source.name}](solutions/{source.name})" in text(notebook)
    assert f" {source.stem}.ipynb" in ast.get_docstring(ast.parse((ROOT / "solutions" / source.name).read_text()))
    for number, stub in asked.items():
        assert printed(stub) == f"exercise {number}: open\n"
        assert re.match("# .+\n", solutions[number]), "it begins with what is asked"
        open_ones = [n.name for n in ast.parse(stub.source).body if "raise NotImplementedError" in ast.unparse(n)]
        answers = [getattr(node, "name", "other code") for node in ast.parse(solutions[number]).body]
        assert answers == open_ones, "a solution defines what the stub leaves open, and nothing else"
        assert "NotImplementedError" not in strict.solved(stub.source, solutions[number])
    assert text(notebook).count("<details><summary>Hint</summary>") == len(asked)
    assert len(re.findall(r"^\*\*Exercise \d", text(notebook), re.M)) == len(asked)


def test_every_solutions_file_has_its_source():
    assert {path.name for path in (ROOT / "solutions").iterdir() if path.is_file()} == {s.name for s in build.SOURCES}


@pytest.fixture(scope="module")
def handout(tmp_path_factory):
    """The course for a class, written twice: the second time over what the first wrote."""
    folder = tmp_path_factory.mktemp("class") / "student"
    for _ in range(2):
        build.write_for_students(folder)
    return folder


def test_a_class_gets_every_notebook_without_outputs_and_solutions(handout):
    assert {path.stem for path in handout.glob("*.ipynb")} == set(build.ORDER)
    assert not (handout / "solutions").exists()
    for path in handout.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert not any(cell.outputs or cell.execution_count for cell in code(notebook))
        assert "Your teacher has the solutions." in text(notebook) and "solutions/" not in path.read_text()
        solved = strict.solutions_of(ROOT / path.name).values()
        bodies = [ast.unparse(node.body) for solution in solved for node in ast.parse(solution).body]
        written = "\n".join(ast.unparse(ast.parse(cell.source)) for cell in code(notebook))
        assert bodies and not any(body in written for body in bodies if "\n" in body)


def test_what_a_class_gets_is_complete(handout):
    for path in handout.glob("*.*"):
        if path.suffix in (".md", ".ipynb"):
            words = text(nbformat.read(path, as_version=4)) if path.suffix == ".ipynb" else path.read_text()
            for target in re.findall(r"\]\(([^)#\s]+)", words):
                assert re.match("https?://", target) or (handout / target).exists() and ".." not in target, target
            for file in re.findall(r"results/\w+\.\w+", path.read_text()):
                assert (handout / file).exists(), file


def test_what_a_class_gets_replaces_nothing_of_others(handout, tmp_path):
    shutil.copytree(handout, tmp_path / "own")
    notebook = tmp_path / "own" / "03_split_bands.ipynb"
    notebook.write_text(notebook.read_text().replace("raise NotImplementedError", "return 0.6", 1))
    with pytest.raises(FileExistsError, match="'03_split_bands.ipynb' that was not written here or has changed since"):
        build.write_for_students(tmp_path / "own")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="holds a 'thesis.txt'"):
        build.write_for_students(tmp_path / "others")
    assert [path.name for path in (tmp_path / "others").iterdir()] == ["thesis.txt"]


def test_the_table_of_the_course_is_in_step():
    readme = build.README.read_text()
    assert build.table({}) == readme, "run `make notebooks ONLY=--prose`"
    rows = re.findall(r"^\| \[(\w+)\]\S* \| (\d*) ?s? \| ([\d.]*)", readme, re.M)
    assert [name for name, *_ in rows] == [source.stem for source in build.SOURCES]
    for name, seconds, gigabytes in rows:
        assert seconds and gigabytes, f"{name} was not measured: run `make notebooks`"
        most = 1.6 if name[:2] in LARGE else 1.5
        assert int(seconds) <= 60 and float(gigabytes) <= most, f"{name} takes too long or too much memory"
    assert sum(int(seconds) for _, seconds, _ in rows) <= 40 * len(rows)
