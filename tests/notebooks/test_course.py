"""Every stored notebook is what its source says, complete and in order; ``make notebooks`` makes them."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
_spec = importlib.util.spec_from_file_location("build_notebooks", NOTEBOOKS / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


def test_every_source_has_its_notebook_and_no_notebook_is_without():
    assert {source.stem for source in build.SOURCES} == {path.stem for path in NOTEBOOKS.glob("*.ipynb")}


@pytest.mark.parametrize("source", build.SOURCES, ids=lambda source: source.stem)
def test_a_notebook_is_its_source_run_from_top_to_bottom(source):
    path = NOTEBOOKS / f"{source.stem}.ipynb"
    stored, wanted = nbformat.read(path, as_version=4), build.unrun(source)
    assert [(c.cell_type, c.source) for c in stored.cells] == [(c.cell_type, c.source) for c in wanted.cells]
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size <= 600_000
