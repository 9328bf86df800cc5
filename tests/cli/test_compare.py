"""``rfsr compare``: the six ways in small, interrupted in the middle."""

import json
from importlib import resources

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from rfsr_ext.models import load_model
from rfsr_ext.training import Loop
from rfsr_ext.training.comparison import ComparisonConfig, shown_images
from rfsr_ext.training.dp2o import DP2OConfig
from tests.tiny import tiny_model

QUICK = {"batch_size": 2, "crop_size": 32, "validation_size": 32, "validation_crops": 1, "checkpoint_every": 1}
DP2O = {"config": "dp2o-mini", "images": 2, "candidates": 4, "selected": 2, "report_crops": 0, "validation_seeds": 2}
RFSR = {"config": "mini", "structure_window": [1, 1], "reward_window": [2, 2], "style_loss": "none"}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(num_inference_steps=2).save_pretrained("tiny")
    config = yaml.safe_load(resources.files("rfsr_ext.presets").joinpath("compare/mini.yaml").read_text())
    config |= {"seconds": None, "iterations": 2, "seeds": 1, "crops": 2, "size": 32, "results": 2, "output_dir": "all"}
    config["settings"] |= QUICK
    ways = config["ways"]
    for way, steps in ways.items():
        names = [step if isinstance(step, str) else step["config"] for step in steps]
        ways[way] = [{"mini": RFSR, "dp2o-mini": DP2O}.get(name, steps[i]) for i, name in enumerate(names)]
    (tmp_path / "ways.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return config


@pytest.mark.slow
def test_six_ways_by_command(recipe, rfsr, tmp_path, monkeypatch):
    steps = []
    train_step = Loop._train_step

    def interrupted(loop, *arguments):
        steps.append(loop.name)
        if len(steps) == 4:
            raise KeyboardInterrupt  # in the middle of a training
        return train_step(loop, *arguments)

    monkeypatch.setattr(Loop, "_train_step", interrupted)
    code, printed = rfsr("compare", "ways.yaml", "--model", "tiny")
    assert code == 130 and "the same command goes on from the last checkpoint" in printed.err
    assert not (tmp_path / "all/comparison.csv").exists()
    code, printed = rfsr("compare", "ways.yaml", "--model", "tiny")
    assert code == 0 and len(steps) == 5 * 2 + 1  # each iteration once, but the interrupted one
    ways = ["base", *recipe["ways"]]
    frame, table = (pd.read_csv(tmp_path / f"all/{name}.csv") for name in ("comparison", "table"))
    assert list(frame["model"].unique()) == ways and len(frame) == 6 * 2 * 2
    assert {"psnr", "ssim", "low_ssim", "mini-iqa", "mini-preference", "judge", "reward_worst", "g_std_judge", "l_std",
            "seconds_per_image", "training_seconds"} <= set(table["quantity"])  # fmt: skip
    text = (tmp_path / "all/comparison.md").read_text()
    assert f"| {' | '.join(['', *ways])} |" in text and "`rfsr compare ways.yaml --model tiny`" in text
    assert text in printed.out
    assert yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["ways"] == recipe["ways"]
    with Image.open(tmp_path / "all/comparison.png") as image:
        assert image.width > 9 * 200 and image.height > 2 * 200  # LR, bicubic, six, truth; two crops
    assert set(pd.read_csv(tmp_path / "all/best_of.csv")["quantity"]) == {"reward", "judge"}
    config = ComparisonConfig.load("ways.yaml", {"model": "tiny"})
    pictures = shown_images(config)
    changed = [way for way in ways[1:] if not torch.equal(pictures[way], pictures["base"])]
    assert changed == ways[1:]
    chain = {way: load_model(config.trainings(way, 0)[-1].output_dir + "/model") for way in ways[1:]}
    tuned, base = chain["RFSR then CCSR decoder"], load_model("tiny")
    assert tuned.recipe.spacing == "ccsr-v2" and chain["RFSR"].recipe.spacing == "uniform"
    networks = {name for name in base.networks if not same(tuned.networks[name], base.networks[name])}
    assert networks == {"vae", "unet", "controlnet"}
    code, printed = rfsr("compare", "ways.yaml", "--model", "tiny", "--set", "iterations=5")
    assert "training.csv' was made with other settings (iterations 2, now 5); give another folder" in str(code)
    settings = json.loads((tmp_path / "all/dp2o/seed-0/step-1/training.json").read_text())
    assert settings["beta"] == DP2OConfig.load("dp2o-mini").beta and "output_dir" not in settings


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
