"""Run the course's sources and store them as notebooks: ``make notebooks``, or ``python notebooks/build.py 02 03``.

``src/NN_verb_object.py`` (jupytext percent format) is what people edit and review; the notebook beside this file holds
the same cells, links to its neighbours, and outputs.  Each is replaced whole, and only if every cell ran.
"""

import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from rfsr_ext.files import replace_file

HERE = Path(__file__).resolve().parent
SOURCES = sorted((HERE / "src").glob("[0-9][0-9]_*.py"))
_WIDGET = "application/vnd.jupyter.widget-view+json"  # refers to a widget of a kernel that is gone


def title(source: Path) -> str:
    """The notebook's one level-one heading."""
    return re.search(r"^# # (.+)$", source.read_text(), re.MULTILINE)[1]


def _links(source: Path) -> str:
    """Previous and next notebook."""
    place = SOURCES.index(source)
    links = []
    if place:
        before = SOURCES[place - 1]
        links.append(f"[← {title(before)}]({before.stem}.ipynb)")
    if place + 1 < len(SOURCES):
        after = SOURCES[place + 1]
        links.append(f"[{title(after)} →]({after.stem}.ipynb)")
    return " · ".join(links) or "the only notebook so far"


def unrun(source: Path) -> nbformat.NotebookNode:
    """The notebook a source stands for, without outputs.

    A line ``NAVIGATION`` becomes links to the neighbours.
    """
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("NAVIGATION", _links(source))
    return notebook


def build(source: Path) -> float:
    """Run one source in the notebooks' folder and store the notebook; returns the seconds it took."""
    notebook, started = unrun(source), time.monotonic()
    client = NotebookClient(
        notebook, timeout=900, startup_timeout=600, kernel_name="python3", resources={"metadata": {"path": HERE}},
        record_timing=False, store_widget_state=False, coalesce_streams=True,
    )  # fmt: skip
    client.execute()
    notebook.metadata.language_info = {"name": "python"}  # without the version of whoever ran it
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(_WIDGET, None)
    nbformat.validate(notebook)
    with replace_file(HERE / f"{source.stem}.ipynb") as path:
        nbformat.write(notebook, path)
    return time.monotonic() - started


if __name__ == "__main__":
    for source in SOURCES:
        if not sys.argv[1:] or source.stem[:2] in sys.argv[1:]:
            print(f"{source.stem:28s} {build(source):5.1f} s", flush=True)
