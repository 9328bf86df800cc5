"""A model run on pairs, as RealSR and DRealSR are: any sizes, kept pictures, and what does not fit named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rfsr_ext.data import Root
from rfsr_ext.data.images import read_image, to_image, to_tensor
from rfsr_ext.evaluation import evaluate_pairs, evaluate_pairs_bicubic, summarize
from rfsr_ext.evaluation import pairs as module
from rfsr_ext.metrics import Preset, Suite, psnr
from rfsr_ext.sampling import upscale
from tests import tiny

FIDELITY = Preset("fidelity", ("psnr", "ssim"), "y", 2)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model(0, num_inference_steps=2)


def save(path, height, width, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


@pytest.fixture
def root(tmp_path, model):
    """Two sizes, a folder below, names as DRealSR's; one pair of another scale and two pictures without a partner."""
    for i, (name, height, width) in enumerate([("a", 8, 8), ("sub/b", 8, 12)]):
        save(tmp_path / "LR" / f"{name}_x1.png", height, width, i)
        save(tmp_path / "HR" / f"{name}_x{model.scale}.png", height * model.scale, width * model.scale, i)
    save(tmp_path / "LR" / "wrong.png", 8, 8)
    save(tmp_path / "HR" / "wrong.png", 8, 8)
    save(tmp_path / "LR" / "alone.png", 8, 8)
    save(tmp_path / "HR" / "lonely.png", 32, 32)
    (tmp_path / "LR" / "a_x1.txt").write_text("a cat")
    return Root(lr=str(tmp_path / "LR"), gt=str(tmp_path / "HR"))


def test_pictures_are_those_of_upscale_and_measured_as_written(tmp_path, root, model):
    result = evaluate_pairs(model, root, Suite(FIDELITY), tmp_path / "out", (0, 1), "runs/a model")
    scale = model.scale
    assert list(result.frame.columns) == ["model", "image", "preset", "psnr", "ssim", "seed"]
    assert sorted(zip(result.frame.image, result.frame.seed, strict=True)) == [
        (f"a_x{scale}", 0), (f"a_x{scale}", 1), (f"sub/b_x{scale}", 0), (f"sub/b_x{scale}", 1)
    ]  # fmt: skip
    assert result.folders == [tmp_path / "out" / f"runs_a_model-seed{seed}" for seed in (0, 1)]
    for image, prompt in (("a", "a cat"), ("sub/b", "")):
        lr = to_tensor(read_image(tmp_path / "LR" / f"{image}_x1.png"))
        expected = to_image(upscale(model, lr, prompt, seed=1, progress=False))
        path = tmp_path / "out" / "runs_a_model-seed1" / f"{image}_x{scale}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)
        sr, gt = (to_tensor(read_image(p))[None] for p in (path, tmp_path / "HR" / f"{image}_x{scale}.png"))
        row = result.frame[(result.frame.image == f"{image}_x{scale}") & (result.frame.seed == 1)]
        assert row.psnr.item() == pytest.approx(psnr(sr, gt, "y", 2).item())
    assert {path.removeprefix(f"{tmp_path}/"): reason for path, reason in result.left_out.items()} == {
        "HR/wrong.png": f"is 8x8 pixels, must be {scale} times its LR image, which is 8x8",
        "LR/alone.png": f"has no ground truth in {tmp_path / 'HR'}",
        "HR/lonely.png": f"has no LR image in {tmp_path / 'LR'}",
    }
    assert (summarize(result.frame).n == 2).all()


def test_bicubic_is_measured_on_the_same_pairs_in_8_bits(root, tmp_path, model):
    frame = evaluate_pairs_bicubic(root, model.scale, Suite(FIDELITY))
    assert list(frame.image) == [f"a_x{model.scale}", f"sub/b_x{model.scale}"] and (frame.model == "bicubic").all()
    assert frame.seed.isna().all() and not (tmp_path / "out").exists()
    lr, gt = (to_tensor(read_image(tmp_path / path))[None] for path in ("LR/a_x1.png", f"HR/a_x{model.scale}.png"))
    enlarged = torch.nn.functional.interpolate(lr, scale_factor=model.scale, mode="bicubic").clamp(0, 1)
    assert frame.psnr[0] == pytest.approx(psnr((enlarged * 255).round() / 255, gt, "y", 2).item())


def test_finished_pictures_are_not_made_again(tmp_path, root, model, monkeypatch):
    made = []

    def counting(*arguments, **options):
        made.append(options["seed"])
        return upscale(*arguments, **options)

    monkeypatch.setattr(module, "upscale", counting)
    arguments = model, root, Suite(FIDELITY), tmp_path / "out"
    first = evaluate_pairs(*arguments, (0,), "m")
    again = evaluate_pairs(*arguments, (0, 1), "m")
    assert made == [0, 0, 1, 1] and again.frame[again.frame.seed == 0].equals(first.frame)
    (tmp_path / "LR" / "a_x1.txt").write_text("a dog")  # the picture is another with another prompt
    evaluate_pairs(*arguments, (0,), "m")
    assert made == [0, 0, 1, 1, 0]
    manifest = json.loads((tmp_path / "out" / "m-seed0" / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 0 and manifest["settings"]["fingerprint"] == model.fingerprint()
    assert manifest["files"][f"a_x{model.scale}.png"]["facts"]["prompt"] == "a dog"
    other = tiny.tiny_model(1, num_inference_steps=2)
    with pytest.raises(ValueError, match="made with another fingerprint; give another folder"):
        evaluate_pairs(other, *arguments[1:], (0,), "m")


def test_foreign_pictures_stay(tmp_path, root, model):
    foreign = tmp_path / "out" / "m-seed0" / f"a_x{model.scale}.png"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(FileExistsError, match="that rfsr did not write; move it away"):
        evaluate_pairs(model, root, Suite(FIDELITY), tmp_path / "out", (0,), "m")
    assert foreign.read_text() == "mine"


def test_a_broken_picture_is_left_out(tmp_path, root, model):
    path = tmp_path / "LR" / "a_x1.png"
    path.write_bytes(path.read_bytes()[:80])
    result = evaluate_pairs(model, root, Suite(FIDELITY), tmp_path / "out")
    assert list(result.frame.image) == [f"sub/b_x{model.scale}"] and str(path) in result.left_out


def test_pairs_of_another_scale(tmp_path, model):
    save(tmp_path / "R" / "Canon_001_LR4.png", 32, 32)  # version 1 of RealSR has both in one size
    save(tmp_path / "R" / "Canon_001_HR.png", 32, 32)
    root = Root(lr=str(tmp_path / "R"), gt=str(tmp_path / "R"))
    with pytest.raises(ValueError) as error:
        evaluate_pairs(model, root, Suite(FIDELITY), tmp_path / "out", name="mini")
    assert str(error.value) == (
        f"ground truths must be {model.scale} times as large as their LR images, which is the scale of mini, and none "
        f"of 1 pairs in {tmp_path}/R and {tmp_path}/R is so; {tmp_path}/R/Canon_001_HR.png is 32x32 pixels, must be "
        f"{model.scale} times its LR image, which is 32x32"
    )
    assert not (tmp_path / "out").exists()
