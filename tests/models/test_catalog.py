"""The published models by name: what is listed, what is found, what is said of what is missing."""

import json

import pytest
from typer.testing import CliRunner

from rfsr_ext.cli import _typer
from rfsr_ext.importing import import_object
from rfsr_ext.models import ISRModel, list_models, load_model
from rfsr_ext.models.catalog import PUBLISHED
from rfsr_ext.training import RFSRConfig
from tests.models.released.seesr import layout
from tests.models.released.seesr.model import seesr_model


@pytest.fixture
def run(monkeypatch):
    """The command line on a machine with nothing."""
    monkeypatch.delenv("RFSR_WEIGHTS", raising=False)

    def run(*arguments, code=0):
        result = CliRunner().invoke(_typer, ["models", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.output if code == 0 else result.exception

    return run


def test_every_entry_leads_to_a_class_and_a_preset():
    for name, published in PUBLISHED.items():
        kind = import_object(published.model, "model")
        assert issubclass(kind, ISRModel) and callable(kind.from_released), name
        assert not published.preset or published.preset in RFSRConfig.presets
        assert sum(file.base for file in published.files) == 1 and published.parameters > 1e9
    assert list_models() == ["mini", *PUBLISHED]


def test_an_empty_machine_sees_what_there_is_to_have(run):
    lines = run().splitlines()
    assert [line.split()[0] for line in lines[1 : len(PUBLISHED) + 1]] == list(PUBLISHED)
    assert all(" 0 of " in line for line in lines[1 : len(PUBLISHED) + 1])
    text = run("seesr")
    assert "looked for nowhere: give --weights, or set RFSR_WEIGHTS" in text
    assert "DAPE.pth: MISSING" in text and "github.com/cswry/SeeSR" in text and "mirror: sd2-community" in text
    assert "rfsr upscale photo.jpg --model seesr --weights DIR" in text and "rfsr train paper-seesr" in text
    rows = json.loads(run("--json"))
    assert [row["name"] for row in rows] == list(PUBLISHED) and not any(row["found"] for row in rows)
    assert "name must be one of seesr, " in str(run("sesr", code=1))


def test_files_are_found_where_their_authors_put_them(run, tmp_path, monkeypatch):
    weights = layout.write_layout(tmp_path / "seesr")
    monkeypatch.setenv("RFSR_WEIGHTS", str(tmp_path))
    (row,) = json.loads(run("seesr", "--json"))
    assert row["found"] and {f["path"] for f in row["files"] if f["found"]} >= {"DAPE.pth", "seesr/unet"}
    (weights / "DAPE.pth").unlink()
    assert " 4 of 5 " in next(line for line in run().splitlines() if line.startswith("seesr "))
    assert "DAPE.pth: MISSING" in run("seesr")


def test_a_model_that_is_not_here(monkeypatch, tmp_path):
    monkeypatch.delenv("RFSR_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match=r"^pasd needs its published files; .* `rfsr models pasd` lists them$"):
        load_model("pasd")
    with pytest.raises(FileNotFoundError, match="is no folder; `rfsr models pasd` lists what it should hold"):
        load_model("pasd", weights=tmp_path / "gone")
    with pytest.raises(ValueError, match="torch_dtype must be one of float32, bfloat16, float16, got 'half'"):
        load_model("pasd", weights=tmp_path, torch_dtype="half")
    for name in PUBLISHED:
        with pytest.raises(FileNotFoundError) as error:
            load_model(name, weights=tmp_path)
        assert "\n" not in str(error.value) and any(
            site in str(error.value)
            for site in ("github.com", "huggingface.co", "lxq007", "mirror", "copies", "diffusers folder")
        ), (name, str(error.value))


def test_convert_writes_a_folder_of_ours(run, tmp_path):
    weights = layout.write_layout(tmp_path / "files")
    output = run("seesr", "--weights", weights, "--convert", tmp_path / "ours", "--model-option", "min_side=0")
    assert f"--model {tmp_path / 'ours'}" in output
    model = load_model(tmp_path / "ours")
    assert model.kind == "seesr" and model.recipe.min_side == 0
    assert all(path.suffix != ".pth" for path in (tmp_path / "ours").rglob("*"))
    assert set(model.networks) == set(seesr_model().networks)
