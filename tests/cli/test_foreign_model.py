"""A Stable-Diffusion-like folder that diffusers wrote goes through every command, and back to diffusers."""

import shutil

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionControlNetPipeline
from PIL import Image
from typer.testing import CliRunner

from rfsr_ext.cli import _typer
from tests.tiny import tiny_parts


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock") / "sd"
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionControlNetPipeline(**tiny_parts(3, scheduler), **extra).save_pretrained(folder)
    return folder


def rfsr(*words):
    done = CliRunner().invoke(_typer, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_from_diffusers_through_every_command_and_back(stock, tmp_path):
    options = ("--model-option", "scale=2", "--model-option", "num_inference_steps=5", "--model-option", "start=noise")
    Image.effect_noise((12, 10), 80).convert("RGB").save(tmp_path / "photo.png")
    rfsr("upscale", tmp_path / "photo.png", "--model", stock, "--output", tmp_path / "up", "--tile", 64,
         "--guidance-scale", 3, "--negative-prompt", "blurry", *options)  # fmt: skip
    assert Image.open(tmp_path / "up" / "photo_x2.png").size == (24, 20)

    run = tmp_path / "run"
    (run / "notes").mkdir(parents=True)
    (run / "notes" / "mine.md").write_text("mine")
    settings = {
        "model": stock, "model_options": "{num_inference_steps: 5, start: noise}", "crop_size": 32, "batch_size": 2,
        "window_unit": "timesteps", "structure_window": "[600, 1000]", "reward_window": "[0, 200]", "style_loss": "kl",
        "iterations": 3, "validate_every": 3, "validation_crops": 2, "validation_size": 32, "checkpoint_every": 1,
        "output_dir": run,
    }  # fmt: skip
    command = ["train", "mini", *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]
    rfsr(*command)
    (run / "model" / "unet" / "mine.txt").write_text("mine")
    rfsr(*command)  # finished; writes its result again
    assert (run / "notes" / "mine.md").read_text() == (run / "model" / "unet" / "mine.txt").read_text() == "mine"

    table = rfsr("evaluate", stock, run / "model", "--crops", 2, "--size", 32, "--seeds", 1, "--model-option",
                 "num_inference_steps=5")  # fmt: skip
    assert str(run / "model") in table and "bicubic" in table

    pipeline = StableDiffusionControlNetPipeline.from_pretrained(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("cat", image=torch.rand(1, 3, 32, 32), num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()
    before = StableDiffusionControlNetPipeline.from_pretrained(stock).unet.conv_in.weight
    assert not torch.equal(pipeline.unet.conv_in.weight, before)  # it was trained


def test_a_folder_without_controlnet_says_what_is_missing(stock, tmp_path):
    shutil.copytree(stock, tmp_path / "plain")
    index = (tmp_path / "plain" / "model_index.json").read_text()
    (tmp_path / "plain" / "model_index.json").write_text(index.replace('"ControlNetModel"', "null"))
    with pytest.raises(ValueError, match="without ControlNet; give its folder as controlnet="):
        rfsr("upscale", stock / "nothing.png", "--model", tmp_path / "plain")
