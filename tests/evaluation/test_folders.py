"""Folders of the user's pictures: any sizes, a broken file among them, ground truths by name."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from rfsr_ext.data import load_photograph
from rfsr_ext.data.images import to_uint8
from rfsr_ext.evaluation import best_and_worst, cases_figure, compare, evaluate_folder, summarize
from rfsr_ext.evaluation.folders import list_pictures, read_picture
from rfsr_ext.metrics import PRESETS, Preset, Suite, psnr, ssim

FIDELITY = Preset("fidelity", ("psnr", "ssim"), "y", 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Photographs of three sizes, noisy versions of them, and files that cannot be measured."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for folder in ("gt", "sr"):
        (root / folder).mkdir()
    for name, (height, width) in {"coffee": (60, 48), "chelsea": (40, 40), "flower": (33, 70)}.items():
        image = load_photograph(name)[100 : 100 + height, 100 : 100 + width]
        Image.fromarray(to_uint8(image)).save(root / "gt" / f"{name}.png")
        Image.fromarray(to_uint8(image + rng.normal(0, 0.05, image.shape))).save(root / "sr" / f"{name}_x4.png")
    (root / "sr" / "broken.png").write_bytes((root / "sr" / "coffee_x4.png").read_bytes()[:500])
    Image.fromarray(to_uint8(load_photograph("camera")[:40, :40])).save(root / "sr" / "stranger.png")
    Image.fromarray(to_uint8(load_photograph("moon")[:40, :40])).save(root / "sr" / "moon.png")
    Image.fromarray(to_uint8(load_photograph("moon")[:80, :80])).save(root / "gt" / "moon.png")
    (root / "sr" / "notes.txt").write_text("no picture, and not meant to be one")
    return root


@pytest.fixture(scope="module")
def result(folders):
    return evaluate_folder(folders / "sr", Suite(FIDELITY), folders / "gt", name="noisy")


def test_every_picture_is_measured_by_itself(folders, result):
    assert list(result.frame.columns) == ["model", "image", "preset", "psnr", "ssim"]
    assert list(result.frame.image) == ["chelsea", "coffee", "flower"]
    assert set(result.frame.preset) == {FIDELITY.label} and set(result.frame.model) == {"noisy"}
    for row in result.frame.itertuples():
        sr, gt = (read_picture(paths[row.image])[None] for paths in (result.pictures, result.references))
        assert row.psnr == pytest.approx(psnr(sr, gt, "y", 2).item())
        assert row.ssim == pytest.approx(ssim(sr, gt, "y", 2).item())
        assert 24 < row.psnr < 34


def test_what_cannot_be_measured_is_named(folders, result):
    reasons = {path.name: reason for path, reason in result.broken.items()}
    assert set(reasons) == {"broken.png", "stranger.png", "moon.png"}
    assert reasons["stranger.png"] == f"{str(folders / 'gt')!r} has no picture called 'stranger'"
    assert reasons["moon.png"] == "it has 40x40 pixels, its ground truth 80x80"
    assert reasons["broken.png"]


def test_without_ground_truths(folders):
    suite = Suite(PRESETS["basic"], reference=False)
    result = evaluate_folder(folders / "sr", suite)
    assert list(result.frame.columns) == ["model", "image", "preset", "judge"]
    assert len(result.frame) == 5 and [path.name for path in result.broken] == ["broken.png"]


def test_summaries_take_such_a_table(result):
    summary = summarize(result.frame)
    assert list(summary.index) == [("noisy", "psnr"), ("noisy", "ssim")] and (summary.n == 3).all()
    assert summary.loc[("noisy", "psnr"), "mean"] == pytest.approx(result.frame.psnr.mean())
    better = result.frame.assign(model="better", psnr=result.frame.psnr + 1)
    both = pd.concat([result.frame, better])
    assert compare(both, "noisy", "better").loc["psnr", ["difference", "low", "high"]].tolist() == pytest.approx(
        [1] * 3
    )
    other = better.assign(preset="something else")
    with pytest.raises(ValueError, match="models must be measured on the same presets"):
        compare(pd.concat([result.frame, other]), "noisy", "better")


def test_nothing_to_measure(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="folder '.*nowhere' does not exist"):
        evaluate_folder(tmp_path / "nowhere", Suite(FIDELITY))
    with pytest.raises(FileNotFoundError, match="has no picture"):
        list_pictures(tmp_path)
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(ValueError, match="not one of 1 pictures in .* could be measured; a.png: cannot identify image"):
        evaluate_folder(tmp_path, Suite(PRESETS["basic"], reference=False))
    (tmp_path / "a_x4.png").write_text("x")
    with pytest.raises(ValueError, match="two pictures called 'a': a.png, a_x4.png"):
        list_pictures(tmp_path)


def test_best_and_worst():
    values = pd.Series({"a": 3.0, "b": 1.0, "c": np.nan, "d": 2.0, "e": 5.0})
    assert best_and_worst(values, "psnr", 2) == (["e", "a"], ["b", "d"])
    assert best_and_worst(values, "lpips", 1) == (["b"], ["e"])  # less is better
    assert best_and_worst(values[["a", "b", "d"]], "psnr", 4) == (["a", "d"], ["b"])
    assert best_and_worst(values[["a"]], "psnr") == (["a"], [])


def test_cases_show_the_middle_of_pictures_of_any_size():
    tall, wide = torch.zeros(3, 60, 20), torch.zeros(3, 30, 90)
    tall[:, 20:40], wide[:, 5:25, 35:55] = 1, 1  # white exactly in the middle 20x20
    figure = cases_figure([[(tall, "a"), (wide, "b")]], ["one", "two"], tile=40)
    assert all(axes.images[0].get_array().shape == (20, 20, 3) for axes in figure.axes)
    assert all(axes.images[0].get_array().min() == 1 for axes in figure.axes)
