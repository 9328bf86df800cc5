"""``rfsr preferences``, ``rfsr train`` of method dp2o and ``rfsr evaluate --best-of`` on a tiny model."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.tiny import tiny_model


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(num_inference_steps=2).save_pretrained("tiny")
    settings = {
        "model": "tiny", "crop_size": 32, "images": 3, "candidates": 4, "selected": 2, "batch_size": 2, "iterations": 2,
        "validate_every": 2, "validation_crops": 2, "validation_size": 32, "validation_seeds": 2, "report_crops": 2,
        "report_seeds": 2, "output_dir": "run",
    }  # fmt: skip
    return ["dp2o-mini", *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]


@pytest.mark.slow
def test_sample_score_show_and_train(rfsr, command, tmp_path):
    code, printed = rfsr("preferences", "show", *command)
    assert printed.err == "" and "holds no candidates; `rfsr preferences sample` makes them" in str(code)
    code, printed = rfsr("preferences", "sample", *command)
    assert code == 0 and "3 images with 4 candidates each: run/preferences/round-1" in printed.out
    code, printed = rfsr("preferences", "score", *command)
    assert code == 0 and all(name in printed.out for name in ("psnr", "ssim", "mini-iqa", "mini-preference"))
    written = (tmp_path / "run/preferences/round-1/scores.safetensors").stat().st_mtime_ns
    code, printed = rfsr("preferences", "show", *command, "--output", "shown", "--images", "2")
    assert code == 0 and "12 pairs of 3 images" in printed.out
    assert Image.open("shown/worst_and_best.png").width > 1200 and Image.open("shown/gaps.png").width > 700
    code, printed = rfsr("train", *command)
    assert code == 0 and "reward worst" in printed.out and "fine-tuned model: run/model" in printed.out
    assert (tmp_path / "run/preferences/round-1/scores.safetensors").stat().st_mtime_ns == written  # taken as they were
    code, _ = rfsr("preferences", "sample", "mini")
    assert "config must be one of method dp2o, got 'mini' of method rfsr" in str(code)


def test_pictures_that_exist_are_not_replaced_unasked(rfsr, command, tmp_path):
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown/gaps.png").write_text("mine")
    code, _ = rfsr("preferences", "show", *command, "--output", "shown")
    assert code == "rfsr: 'shown/gaps.png' exists already; give another --output or --overwrite"
    code, _ = rfsr("preferences", "show", *command, "--output", "shown", "--overwrite")
    assert "holds no candidates" in code  # it goes on to the work
    assert [path.name for path in (tmp_path / "shown").iterdir()] == ["gaps.png"]


def test_best_of(rfsr, command):
    code, printed = rfsr("evaluate", "tiny", "--best-of", "3", "--crops", "2", "--size", "32", "--output", "curves.csv")
    assert code == 0 and "2 held-out crops of 32 pixels, 3 results each" in printed.out
    curves = pd.read_csv("curves.csv")
    assert set(curves["count"]) == {1, 2, 3} and {"reward", "psnr", "judge"} <= set(curves["quantity"])
    assert Image.open("curves.png").width > 400
    code, _ = rfsr("evaluate", "tiny", "--best-of", "3", "--seeds", "2")
    assert "--best-of is for models on held-out crops or --pairs, and its number is that of the seeds" in str(code)


def test_best_of_pairs(rfsr, command):
    """Curves are of the rows that are written beside them."""
    rng = np.random.default_rng(0)
    for folder, side in (("lr", 8), ("gt", 32)):
        Path(folder).mkdir()
        for name in ("a.png", "b.png"):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(f"{folder}/{name}")
    code, printed = rfsr("evaluate", "tiny", "--pairs", "lr", "gt", "--best-of", "3", "--output", "rows.csv")
    assert code == 0 and "3 results for each of 2 pictures" in printed.out
    rows, curves = pd.read_csv("rows.csv"), pd.read_csv("rows.best_of.csv")
    best = rows[rows["model"] == "tiny"].groupby("image")["psnr"].max().mean()
    found = curves[curves["quantity"].eq("psnr") & curves["count"].eq(3) & curves["of"].eq("best")]["value"].item()
    assert found == pytest.approx(best) and set(curves["quantity"]) == {"reward", "psnr", "ssim", "judge"}
    assert set(curves["model"]) == {"tiny"} and Image.open("rows.best_of.png").width > 400
