"""Run the course's sources and store them as notebooks: ``make notebooks``, or ``python notebooks/build.py 02 03``.

``src/NN_verb_object.py`` (jupytext percent format) is what people edit and review; the notebook beside this file holds
the same cells, links to its neighbors, and outputs.  Each is replaced whole, and only if every cell ran.  What was
counted and measured goes into the table of ``README.md``.  Solutions to the exercises stand in ``solutions/``, which
people edit too.

``--prose`` runs nothing: it takes over new text into stored notebooks whose code is still that of their sources.
``--student FOLDER`` writes the course for a class, without outputs and solutions.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from rfsr_ext.files import replace_file, replace_folder

HERE = Path(__file__).resolve().parent
SOURCES = sorted((HERE / "src").glob("[0-9][0-9]_*.py"))
README = HERE / "README.md"
COVER = HERE / "before_after.webp"
ORDER = (
    "00_start_here", "01_make_such_a_model", "02_sample_by_hand", "03_split_bands", "04_see_when_bands_form",
    "05_keep_the_low_band", "06_ask_clip_iqa", "07_ask_image_reward", "08_hold_the_style", "09_hold_the_model",
    "10_train_by_window", "11_ablate_and_doubt", "12_measure_the_doubt", "13_fuse_the_kernels", "14_join_pytorch",
    "15_reuse_and_scale", "16_leave_less_to_chance", "17_learn_from_pairs", "18_open_other_models",
)  # fmt: skip
_TEACHER = "Your teacher has the solutions"
_WIDGET = "application/vnd.jupyter.widget-view+json"  # refers to a widget of a kernel that is gone


def title(source: Path) -> str:
    """The notebook's one level-one heading."""
    return re.search(r"^# # (.+)$", source.read_text(), re.MULTILINE)[1]


def promise(source: Path) -> str:
    """What it says in bold below its title, in one line."""
    return re.search(r"^# \*\*([^*]+)\*\*$", source.read_text(), re.MULTILINE)[1].replace("\n# ", " ")


def _links(source: Path) -> str:
    """Previous and next notebook, and the map of all."""
    place = SOURCES.index(source)
    links = [f"[map of the course]({ORDER[0]}.ipynb)"] if place > 1 else []
    if place:
        before = SOURCES[place - 1]
        links.insert(0, f"[← {title(before)}]({before.stem}.ipynb)")
    if place + 1 < len(SOURCES):
        after = SOURCES[place + 1]
        links.append(f"[{title(after)} →]({after.stem}.ipynb)")
    return " · ".join(links) or "the only notebook so far"


def _contents() -> str:
    """One line per notebook of the course: its title and promise, or that it is to come."""
    rows = ["| notebook | its promise |", "|---|---|"]
    sources = {source.stem: source for source in SOURCES}
    for name in ORDER:
        if name in sources:
            rows.append(f"| [{title(sources[name])}]({name}.ipynb) | {promise(sources[name])} |")
        else:
            rows.append(f"| `{name}` | in preparation |")
    return "\n".join(rows)


def unrun(source: Path, is_for_students: bool = False) -> nbformat.NotebookNode:
    """The notebook a source stands for, without outputs.

    A line ``NAVIGATION`` becomes links to the neighbors, ``CONTENTS`` the table of all notebooks, and ``SOLUTIONS``
    says where the solutions are.
    """
    solutions = f"Solutions are in [solutions/{source.name}](solutions/{source.name})"
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("NAVIGATION", _links(source)).replace("CONTENTS", _contents())
            cell.source = cell.source.replace("SOLUTIONS", _TEACHER if is_for_students else solutions)
    return notebook


def write_cover(notebook: nbformat.NotebookNode) -> None:
    """Write the first picture of notebook 00 as a file: its top shows it before any code has run."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    first = next(html for output in outputs if "<img" in (html := output.get("data", {}).get("text/html", "")))
    with replace_file(COVER) as path:
        path.write_bytes(base64.b64decode(re.search(r"data:image/webp;base64,([^\"]+)", first)[1]))


def store(notebook: nbformat.NotebookNode, source: Path) -> None:
    """Write a notebook beside this file, whole."""
    nbformat.validate(notebook)
    with replace_file(HERE / f"{source.stem}.ipynb") as path:
        nbformat.write(notebook, path)


def build(source: Path) -> tuple[str, str]:
    """Run one source in the notebooks' folder and store the notebook; returns its wall time and the kernel's memory."""
    notebook, started, peaks = unrun(source), time.monotonic(), []

    def weigh(**_):
        status = Path("/proc", str(client.km.provisioner.pid), "status").read_text()
        peaks.append(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024)

    client = NotebookClient(
        notebook, timeout=900, startup_timeout=600, kernel_name="python3", resources={"metadata": {"path": HERE}},
        record_timing=False, store_widget_state=False, coalesce_streams=True, on_cell_executed=weigh,
    )  # fmt: skip
    client.execute()
    seconds = time.monotonic() - started
    notebook.metadata.language_info = {"name": "python"}  # without the version of whoever ran it
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(_WIDGET, None)
    store(notebook, source)
    if source.stem == ORDER[0]:
        write_cover(notebook)
    return f"{seconds:.0f} s", f"{max(peaks) / 1e9:.2f} GB"


def take_prose(source: Path) -> bool:
    """Store the source's text with the outputs there are; False if its code is not what made them."""
    path, notebook = HERE / f"{source.stem}.ipynb", unrun(source)
    stored = nbformat.read(path, as_version=4).cells if path.exists() else []
    before, after = ([c for c in cells if c.cell_type == "code"] for cells in (stored, notebook.cells))
    if [c.source for c in before] != [c.source for c in after]:
        return False
    for cell, done in zip(after, before, strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    store(notebook, source)
    return True


def counts(source: Path) -> list[int]:
    """Words, cells, checks, widgets and exercises of a source."""
    cells = unrun(source).cells
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    nodes = [node for cell in cells if cell.cell_type == "code" for node in ast.walk(ast.parse(cell.source))]
    calls = [getattr(node.func, "id", "") for node in nodes if isinstance(node, ast.Call)]
    checks = calls.count("check") + sum(isinstance(node, ast.Assert) for node in nodes)
    return [words, len(cells), checks, calls.count("explore"), calls.count("exercise")]


def table(measured: dict[str, tuple[str, str]]) -> str:
    """The README with its table made anew; wall time and memory stay where nothing was measured."""
    text = README.read_text()
    before = {
        name: (wall, memory) for name, wall, memory in re.findall(r"^\| \[(\w+)\]\S* \| (.*?) \| (.*?) \|", text, re.M)
    }
    columns = "wall time", "memory", "words", "cells", "checks", "widgets", "exercises"
    rows = ["| notebook | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for source in SOURCES:
        cost = measured.get(source.stem) or before.get(source.stem) or ("", "")
        rows.append(
            f"| [{source.stem}]({source.stem}.ipynb) | " + " | ".join([*cost, *map(str, counts(source))]) + " |"
        )
    return re.sub(r"^\| notebook \|.*?(?=\n\n)", lambda _: "\n".join(rows), text, flags=re.M | re.S)


def _inside(text: str) -> str:
    """Markdown whose links out of this folder have become words."""

    def words(link: re.Match) -> str:
        label, path = link[1], link[2].removeprefix("../")
        return f"`{path}` of the repository" if label == path else f"{label} (`{path}` of the repository)"

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)]+)\)", words, text)


def student_files() -> dict[str, bytes]:
    """The course for a class, by name: notebooks without outputs and solutions, and what they read and link to."""
    readme = README.read_text().partition("\n## Teach")[0]
    for old, new in (
        ("and a solution in `solutions/`. Try before you look.", f"and a solution. {_TEACHER}."),
        ("can be read here as it is: the outputs are stored.", "shows its outputs when you run it."),
    ):
        if old not in readme:
            raise ValueError(f"README.md must say {old!r}, or change student_files()")
        readme = readme.replace(old, new)
    texts = {"README.md": readme, "paper_and_released_code.md": (HERE / "paper_and_released_code.md").read_text()}
    files = {name: _inside(text).encode() for name, text in texts.items()}
    for source in SOURCES:
        notebook = unrun(source, is_for_students=True)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = _inside(cell.source)
        files[f"{source.stem}.ipynb"] = nbformat.writes(notebook).encode() + b"\n"
    code = "".join(source.read_text() for source in SOURCES)
    read = [path for path in sorted(HERE.glob("results/*")) if f"results/{path.name}" in code]
    return files | {path.relative_to(HERE).as_posix(): path.read_bytes() for path in (COVER, *read)}


def write_for_students(folder: Path) -> None:
    """Write `student_files` into a folder that holds nothing else, except as an earlier call has written it."""
    record = ".student.json"  # what was written: names and hashes
    files = student_files()
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    known = json.loads((folder / record).read_text()) if (folder / record).exists() else {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_ours = name in (record, ".rfsr.json") or path.is_dir()
        if not is_ours and known.get(name) != hashlib.sha256(path.read_bytes()).hexdigest():
            raise FileExistsError(
                f"folder {str(folder)!r} holds a {name!r} that was not written here or has changed since; "
                "move it away or give another folder"
            )
    with replace_folder(folder) as new:
        for name, content in {**files, record: json.dumps(hashes, indent=1).encode() + b"\n"}.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="of the notebooks, such as 02; all by default")
    parser.add_argument("--prose", action="store_true", help="run nothing, only take over new text")
    parser.add_argument(
        "--student", type=Path, metavar="FOLDER", help="run nothing, write the course for a class there"
    )
    arguments = parser.parse_args()
    if arguments.student:
        try:
            write_for_students(arguments.student)
        except OSError as error:
            sys.exit(str(error))
        return print(f"{len(SOURCES)} notebooks without outputs and solutions are in {arguments.student}")
    for source in SOURCES:
        if arguments.numbers and source.stem[:2] not in arguments.numbers:
            continue
        if arguments.prose:
            measured = {}
            print(f"{source.stem:28s} {'new text' if take_prose(source) else 'code has changed: run it'}", flush=True)
        else:
            measured = {source.stem: build(source)}
            print(f"{source.stem:28s} {' '.join(measured[source.stem])}", flush=True)
        README.write_text(table(measured))


if __name__ == "__main__":
    main()
