"""The command line as a user types it: what works, and the one sentence when something does not."""

import sys

import numpy as np
import pytest
from PIL import Image

from rfsr_ext.cli import app


@pytest.fixture
def rfsr(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rfsr", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            app()
        return stopped.value.code, capsys.readouterr()

    return run


def test_doctor_says_what_serves_each_operator(rfsr):
    code, printed = rfsr("doctor")
    assert code == 0
    for operator in ("haar_ll", "haar_ll_l1_loss", "gram_matrix", "gram_loss"):
        assert f"{operator} on cpu" in printed.out
    assert "vgg19-dcbb9e9d.pth" in printed.out
    assert "MISSING" not in printed.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "absent.yaml"], "config 'absent.yaml' is neither a file nor one of the presets mini, paper"),
        (["train", "mini", "--set", "lerning_rate=1"], "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        (["train", "mini", "--set", "seed"], "--set must be KEY=VALUE, got 'seed'"),
        (["train", "mini", "--set", "model=nowhere"], "model folder 'nowhere' has no isr_config.json"),
        (["train", "paper", "--set", "model=mini"], "reward must be one of mini-iqa, mini-preference, got 'clipiqa'"),
        (["evaluate", "mini", "--crops", "100000"], "count must be at most"),
        (["ablate", "--variants", "magic"], "variants must be among rfsr, "),
        (["upscale", "x.png", "--color-fix", "sepia"], "color_fix must be"),
    ],
)
def test_one_sentence(rfsr, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")
    code, _ = rfsr(*arguments)
    assert str(code).startswith("rfsr: ")
    assert sentence in str(code)
    assert "\n" not in str(code)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_upscale_writes_what_it_can_and_names_the_rest(rfsr, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (13, 10), dtype=np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(rng.integers(0, 255, (9, 40, 4), dtype=np.uint8)).save(tmp_path / "alpha.png")
    (tmp_path / "text.png").write_text("no image")
    files = [tmp_path / name for name in ("grey.png", "text.png", "alpha.png")]
    code, printed = rfsr("upscale", *files, "--output", tmp_path / "out", "--steps", 2)
    assert "1 of 3 files could not be read as images" in str(code)
    assert "skipped" in printed.err
    with Image.open(tmp_path / "out" / "grey_x4.png") as image:
        assert image.size == (40, 52)
    with Image.open(tmp_path / "out" / "alpha_x4.png") as image:
        assert image.size == (160, 36)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alpha_x4.png", "grey_x4.png"]


@pytest.mark.slow
def test_demo_in_small(rfsr, tmp_path):
    import json

    code, printed = rfsr("demo", "--output", tmp_path / "demo", "--iterations", 8, "--crops", 3)  # 8 reach both windows
    assert code == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert set(report["means"]) == {"bicubic", "base", "fine-tuned"}
    assert {"psnr", "ssim", "MiniIQA", "MiniPreference", "Judge"} <= set(report["fine_tuned_minus_base"])
    assert "random" in " ".join(report["stand_ins"])
    for name in ("comparison.png", "curves.png"):
        with Image.open(tmp_path / "demo" / name) as image:
            assert min(image.size) > 300
    assert "fine-tuned" in printed.out
