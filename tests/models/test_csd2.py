"""C-SD2 against diffusers' own pipeline, as its authors call it (cswry/DP2O-SR, bc216ec, test_sd2b_controlnet.py)."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from rfsr_ext.models import csd2, load_model
from rfsr_ext.models.csd2 import CSD2_RECIPE, CSD2ISRModel
from rfsr_ext.sampling import generators, inference_condition, sample
from tests.tiny import tiny_parts

SCHEDULER = {  # of Stable Diffusion 2-base: PNDM's, which the authors open as DDPM's
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
}  # fmt: skip
TAGS = ["cat, fur", "tree"]


def tags(images):
    assert images.shape[1] == 3 and images.min() >= 0 and images.max() <= 1
    return TAGS[: len(images)]


@pytest.fixture(scope="module")
def lr():
    return torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parts():
    return tiny_parts(3, scheduler=PNDMScheduler(**SCHEDULER))


@pytest.fixture(scope="module")
def released(tmp_path_factory, parts):
    """The authors' layout: a folder without ControlNet, and beside it one with the ControlNet's weights alone."""
    root = tmp_path_factory.mktemp("preset") / "models"
    base = {name: part for name, part in parts.items() if name != "controlnet"}
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**base, **extra).save_pretrained(root / "stable-diffusion-2-base")
    (root / "dp2o-sd2").mkdir()
    save_file(parts["controlnet"].state_dict(), root / "dp2o-sd2" / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def model(released):
    return CSD2ISRModel.from_released(released / "dp2o-sd2", tagger=tags)


def test_the_authors_recipe(model, released, caplog):
    assert model.recipe == CSD2_RECIPE
    assert load_model("dp2o-sd2", weights=released).fingerprint() == model.fingerprint()
    assert [r.getMessage().partition(",")[0] for r in caplog.records] == ["prompts of dp2o-sd2 stay without tags"]
    process = model.process()
    assert process.timesteps.tolist() == list(range(981, 0, -20)) and type(model.scheduler) is DDPMScheduler
    assert model.trained == {"unet": "", "controlnet": ""}


def test_a_whole_run_is_the_authors(model, released, lr):
    """Their calls, with the tags, the noise of x_T and that of every step the same."""
    base = released / "stable-diffusion-2-base"
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    controlnet.load_state_dict(load_file(released / "dp2o-sd2" / "model.safetensors"))
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        base, unet=unet, controlnet=controlnet, safety_checker=None, feature_extractor=None,
        scheduler=DDPMScheduler.from_pretrained(base / "scheduler", clip_sample=False),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    condition, guidance_scale = inference_condition(model, lr, ["", ""])
    assert condition.prompts == TAGS and guidance_scale == 3.5
    noise = generators(0, [0, 1])
    latents = model.initial_latents(condition, model.process(8), noise)
    pure = torch.cat([torch.randn(1, 4, 16, 12, generator=g) for g in generators(0, [0, 1])])
    torch.testing.assert_close(latents, pure)
    theirs = pipeline(
        TAGS, condition.image, num_inference_steps=8, guidance_scale=3.5, generator=noise, latents=latents,
        negative_prompt=["dotted, noise, blur, lowres, smooth"] * 2, output_type="pt",
    ).images  # fmt: skip
    ours = sample(model, lr, ["", ""], generators(0, [0, 1]), 8)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    without = sample(model, lr, ["", ""], generators(0, [0, 1]), 8, 1.0)
    assert (ours - without).abs().max() > 1e-2


def test_tags_come_before_what_a_user_says(model, lr):
    assert inference_condition(model, lr, ["dog", ""])[0].prompts == ["cat, fur, dog", "tree"]


def test_it_is_saved_as_an_ordinary_folder(model, lr, tmp_path):
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model", tagger=tags)
    assert type(again) is CSD2ISRModel and again.recipe == CSD2_RECIPE and again.fingerprint() == model.fingerprint()
    a, b = (sample(m, lr, ["", ""], generators(0, [0, 1]), 2) for m in (model, again))
    assert torch.equal(a, b)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "model")
    assert type(pipeline.scheduler) is DDPMScheduler
    without = load_model(tmp_path / "model")
    assert inference_condition(without, lr, ["", "dog"])[0].prompts == ["", "dog"]


@pytest.mark.parametrize("widths", [(4,), (8, 8), (4, 6, 10), (2,) * 7])
def test_any_width_of_the_controlnet_opens(released, tmp_path, widths):
    """The embedding of the image is as deep and wide as the file has it."""
    unet = UNet2DConditionModel.from_pretrained(released / "stable-diffusion-2-base" / "unet")
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths).half()
    save_file(controlnet.state_dict(), tmp_path / "model.safetensors")
    model = CSD2ISRModel.from_released(
        tmp_path, base=released / "stable-diffusion-2-base", torch_dtype=torch.bfloat16, trained={"controlnet": ""},
        num_inference_steps=4,
    )  # fmt: skip
    assert model.controlnet.config.conditioning_embedding_out_channels == list(widths)
    for name, value in controlnet.state_dict().items():
        assert torch.equal(model.controlnet.state_dict()[name], value.to(torch.bfloat16)), name
    assert (model.recipe.num_inference_steps, model.recipe.guidance_scale, model.dtype) == (4, 3.5, torch.bfloat16)


def edit(path, changes, tensors=None):
    """Replace tensors in a file; None takes one out."""
    tensors = (load_file(path) if tensors is None else tensors) | changes
    save_file({name: t.clone() for name, t in tensors.items() if t is not None}, path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w, b: w.unlink(), FileNotFoundError, r"give the folder c-sd2 or dp2o-sd2 that the README of github"),
        (lambda w, b: shutil.rmtree(b), FileNotFoundError, "base .* does not exist; give the diffusers folder"),
        (lambda w, b: shutil.rmtree(b / "vae"), FileNotFoundError, "vae folder .* does not exist"),
        (lambda w, b: shutil.rmtree(b / "tokenizer"), FileNotFoundError, "tokenizer folder .* does not exist"),
        (lambda w, b: shutil.rmtree(b / "scheduler"), FileNotFoundError, "scheduler folder .* does not exist"),
        (lambda w, b: w.write_bytes(w.read_bytes()[:-100]), ValueError, "weights .*dp2o-sd2.* cannot be read"),
        (lambda w, b: edit(w, {"more": torch.zeros(1)}), ValueError, "is not a ControlNet of the U-Net in .* as more"),
        (lambda w, b: edit(w, {"conv_in.bias": None}), ValueError, "lacks 1 tensors such as conv_in.bias"),
        (lambda w, b: edit(w, {"conv_in.bias": torch.zeros(7)}), ValueError, r"must have shape \[8\], got \[7\]"),
        (lambda w, b: edit(w, {"lone": torch.zeros(1)}, {}), ValueError, "is not a ControlNet of the U-Net"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_a_sentence(released, tmp_path, change, error, message):
    shutil.copytree(released, tmp_path / "models")
    weights = tmp_path / "models" / "dp2o-sd2" / "model.safetensors"
    change(weights, tmp_path / "models" / "stable-diffusion-2-base")
    with pytest.raises(error, match=message) as found:
        CSD2ISRModel.from_released(weights.parent)
    assert "\n" not in str(found.value)


def test_full_size(monkeypatch, tmp_path):
    """C-SD2 opens from the names and shapes that the public class gives it, over the parts of Stable Diffusion 2."""
    clip = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True, sample_size=64
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        )  # fmt: skip
        parts = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(clip)}
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    rest = {"tokenizer": None, "scheduler": PNDMScheduler(**SCHEDULER)}
    monkeypatch.setattr(csd2, "open_part", lambda kind, folder, dtype: parts[folder.name])
    monkeypatch.setattr(csd2, "open_tokenizer_and_scheduler", lambda base: dict(rest))
    monkeypatch.setattr(csd2, "read_controlnet", lambda *_: (Path("c-sd2/model.safetensors"), controlnet.state_dict()))
    model = CSD2ISRModel.from_released("c-sd2", base=tmp_path)
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in model.networks.items()}
    copied = sum(
        p.numel() for n, p in unet.named_parameters() if not n.startswith(("up_blocks", "conv_norm", "conv_out"))
    )
    zero = sum(c * c + c for c in (320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280))
    widths = ((3, 16), (16, 16), (16, 32), (32, 32), (32, 96), (96, 96), (96, 256), (256, 320))
    embedding = sum(9 * a * b + b for a, b in widths)
    assert counts == {"vae": 83_653_863, "text_encoder": 340_387_840, "unet": 865_910_724,
                      "controlnet": copied + zero + embedding}  # fmt: skip
    assert (model.multiple, model.latent_channels) == (64, 4)
