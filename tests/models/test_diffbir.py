"""DiffBIR from its authors' files: what their code gives, and the sentences that wrong files get."""

import copy
import dataclasses
import functools
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from rfsr_ext.models import ISRModel, Process, load_model
from rfsr_ext.models.diffbir import DiffBIRModel, diffbir_scheduler
from rfsr_ext.sampling import inference_condition, upscale
from tests.models.released.diffbir.fixture import EXPECTED, KEYS, RELEASES, diffbir, full_v1, release, weights
from tests.models.released.diffbir.inputs import STEPS, lr_image, noise, tell, text_ids, tokenizer


@functools.cache
def opened(version: str) -> DiffBIRModel:
    """A version's model, not to be changed."""
    return diffbir(version)


def run(model: DiffBIRModel, prompt: str, **options) -> torch.Tensor:
    """`upscale` with the fixture's noise."""
    draws = iter(noise(STEPS + 1))
    give = lambda *args, **kwargs: next(draws)  # noqa: E731
    schedulers = "diffusers.schedulers.scheduling_{}.randn_tensor"
    with (
        mock.patch("rfsr_ext.models.base.randn_tensor", give),
        mock.patch(schedulers.format("ddpm"), give),
        mock.patch(schedulers.format("dpmsolver_multistep"), give),
    ):
        return upscale(model, lr_image()[0], prompt, progress=False, **options)


# -- the public code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1 full", "v2", "v2.1"])
def test_a_sampling_run_equals_the_public_code(version):
    """First stage, text, control latents, sampler, guidance, decoder and color fix, from their files to the end."""
    model = copy.copy(opened(version))
    model.recipe = dataclasses.replace(model.recipe, min_side=0, added_prompt="")
    if version == "v1 full":
        image, wanted = model.condition(lr_image(), [""]).image, EXPECTED["v1.stage1"]
        torch.testing.assert_close(image, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
        result, wanted = run(model, ""), EXPECTED["v1.result"]
    else:
        result, wanted = run(model, "a photo of a dog", negative_prompt="blurry"), EXPECTED[f"{version}.result"]
    torch.testing.assert_close(result[None], wanted.clamp(0, 1), rtol=0, atol=1e-4)
    assert ((wanted > 0) & (wanted < 1)).float().mean() > 0.1  # not all of it is clamped


def test_both_layouts_of_v1_are_one_model():
    assert opened("v1").fingerprint() == opened("v1 full").fingerprint()


def test_the_full_file_is_that_of_the_public_class():
    shapes = {name: list(tensor.shape) for name, tensor in full_v1().items()}
    told = KEYS["general_full_v1"]
    assert tell(shapes, told["parameters"]) == told


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 333, 1000])
def test_spaced_timesteps_and_steps(steps):
    """The authors' timesteps, and DDPM's posterior between them in closed form."""
    process = Process(diffbir_scheduler("v1"), steps)
    wanted = [round(i * 999 / max(steps - 1, 1)) for i in range(steps)][::-1]
    assert process.timesteps.tolist() == wanted
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    place = steps // 2
    t = wanted[place]
    ours, before = alphas[t], alphas[wanted[place + 1]] if place + 1 < steps else 1.0
    beta = 1 - ours / before
    z, output, eps = torch.randn(3, 1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    estimate = (z - np.sqrt(1 - ours) * output) / np.sqrt(ours)
    mean = np.sqrt(before) * beta / (1 - ours) * estimate + np.sqrt(ours / before) * (1 - before) / (1 - ours) * z
    wanted_next = mean + np.sqrt(beta * (1 - before) / (1 - ours)) * eps * (t > 0)
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: eps):
        given = process.step(output, process.timesteps[place], z)
    torch.testing.assert_close(given, wanted_next, rtol=1e-5, atol=1e-5)  # diffusers keeps ᾱ in single precision


def test_enlarges_as_pillow_does():
    """The authors enlarge 8-bit pictures with Pillow, which rounds after each direction; other kernels are worse."""
    lr = torch.from_numpy(np.random.default_rng(0).integers(64, 192, (1, 3, 16, 16))).float()
    seen = []
    with mock.patch.object(opened("v1").networks["swinir"], "forward", lambda x: seen.append(x) or x):
        opened("v1").first_stage(lr / 255)
    picture = Image.fromarray(lr[0].permute(1, 2, 0).byte().numpy()).resize((64, 64), Image.Resampling.BICUBIC)
    wanted = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert (seen[0][0] * 255 - wanted).abs().max() < 1.1
    other = F.interpolate(lr, scale_factor=4, mode="bicubic")[0]
    assert (other - wanted).abs().max() > 5


def test_text_is_filled_up_with_zeros_as_openclip_does():
    given = []
    with mock.patch.object(opened("v1").text_encoder, "forward", lambda ids: given.append(ids) or (ids,)):
        opened("v1").encode_prompts(["a photo of a dog", ""])
    assert torch.equal(given[0], text_ids(["a photo of a dog", ""]))


# -- what a version is ------------------------------------------------------------------------------------------------


def test_recipes_are_the_authors():
    v1, v2, v21 = (opened(version).recipe for version in RELEASES)
    assert (v1.start, v1.num_inference_steps, v1.guidance_scale, v1.color_fix) == ("noise", 50, 1.0, "wavelet")
    assert (v1.tile, v1.overlap, v1.min_side, v1.negative_prompt) == (512, 256, 512, "")
    assert (v1.structure_window, v1.reward_window) == ((1, 20), (41, 50))
    assert (v2.num_inference_steps, v2.guidance_scale) == (50, 4.0) and v2.negative_prompt.startswith("low quality")
    assert (v21.num_inference_steps, v21.guidance_scale) == (10, 8.0) and v21.added_prompt.startswith("Cinematic")
    assert opened("v2").process().prediction_type == "epsilon"
    assert opened("v2.1").process().prediction_type == "v_prediction"


def test_the_tagger_gives_the_prompt(tmp_path):
    """DiffBIR-tag: what the tagger says of the LR image, then the user's words."""
    seen = []
    model = diffbir("v1", tagger=lambda images: seen.append(images) or ["dog, tree"] * len(images))
    condition, _ = inference_condition(model, lr_image(), ["at night"])
    assert condition.prompts == ["dog, tree, at night"] and torch.equal(seen[0], lr_image())
    assert inference_condition(opened("v1"), lr_image(), ["at night"])[0].prompts == ["at night"]
    model.save_pretrained(tmp_path / "model")
    again = DiffBIRModel.from_pretrained(tmp_path / "model", tagger=model.tagger)
    assert again.describe(lr_image()) == ["dog, tree"]


def test_v2_enlarges_to_any_scale():
    """BSRNet enlarges by 4 and is scaled to what is wanted."""
    model = diffbir("v2", scale=2)
    assert model.first_stage(lr_image()).shape == (1, 3, 32, 32)


def test_gradients_flow_through_the_whole_unet():
    """The authors' v1 stops them in the U-Net's encoder."""
    model = diffbir("v1").unfreeze()
    condition = model.condition(lr_image(), [""])
    latents = noise(1)[0].requires_grad_()
    model.predict(latents, torch.tensor(500), condition).square().mean().backward()
    assert latents.grad.abs().max() > 0
    assert all(model.networks[n].conv_in.weight.grad.abs().max() > 0 for n in ("unet", "controlnet"))


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v2", "v2.1"])
def test_our_folder_gives_the_model_back(version, tmp_path):
    model = opened(version)
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert isinstance(again, DiffBIRModel) and isinstance(again, ISRModel)
    assert again.fingerprint() == model.fingerprint() and again.networks.keys() == model.networks.keys()
    assert again.recipe == model.recipe and again.trained == model.trained == {"unet": "", "controlnet": ""}
    for name, network in model.networks.items():
        theirs = again.networks[name].state_dict()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in network.state_dict().items())
    assert type(again.scheduler) is type(model.scheduler)
    stock = type(model.scheduler).from_pretrained(tmp_path / "model/scheduler")
    assert torch.equal(stock.alphas_cumprod, model.scheduler.alphas_cumprod)
    if version == "v2.1":  # the authors' last noise level
        assert stock.alphas_cumprod[-1].item() == pytest.approx(1e-8, rel=1e-5)


def diffusers_folder(path: Path, **scheduler) -> Path:
    """Stable Diffusion 2.1-base as diffusers publishes it, at the fixture's width."""
    for name in ("unet", "vae", "text_encoder"):
        opened("v1").networks[name].save_pretrained(path / name)
    tokenizer().save_pretrained(path / "tokenizer")
    DDIMScheduler(**scheduler).save_pretrained(path / "scheduler")
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    index = {name: ["diffusers", kind.__name__] for name, kind in kinds.items()}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    return path


def test_base_may_be_a_diffusers_folder(tmp_path):
    folder = release(tmp_path / "weights", "v1")
    (folder / "v2-1_512-ema-pruned.ckpt").unlink()
    base = diffusers_folder(tmp_path / "base")
    model = DiffBIRModel.from_released(folder, base=base)
    base.rename(folder / "stable-diffusion-2-1-base")
    assert DiffBIRModel.from_released(folder).fingerprint() == model.fingerprint()
    base = folder / "stable-diffusion-2-1-base"
    assert model.fingerprint() == opened("v1").fingerprint() and isinstance(
        model.scheduler, type(diffbir_scheduler("v1"))
    )
    (base / "scheduler/scheduler_config.json").write_text(
        '{"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}'
    )
    with pytest.raises(ValueError, match="must predict epsilon, got v_prediction; DiffBIR v1 and v2 stand on Stable"):
        DiffBIRModel.from_released(folder, base=base)


def test_base_gives_the_tokenizer_of_what_is_complete(tmp_path):
    """general_full_v1.ckpt and v2.1's own base hold all networks."""
    base = tmp_path / "base"
    tokenizer().save_pretrained(base / "tokenizer")
    for version in ("v1 full", "v2.1"):
        folder = release(tmp_path / version, version)
        shutil.rmtree(folder / "tokenizer")
        model = DiffBIRModel.from_released(folder, base=base)
        assert model.fingerprint() == opened(version).fingerprint()
        assert model.tokenizer.pad_token_id == 0


def test_a_condition_encoder_of_its_own_is_kept(tmp_path):
    """The authors' class has a copy of the VAE's encoder; a file in which it differs is honored."""
    folder = release(tmp_path, "v1 full")
    own = full_v1()
    own["cond_encoder.quant_conv.bias"] = own["cond_encoder.quant_conv.bias"] + 1
    torch.save({"state_dict": own}, folder / "general_full_v1.ckpt")
    model, plain = DiffBIRModel.from_released(folder), opened("v1 full")
    assert "cond_encoder" in model.networks and "cond_encoder" not in plain.networks
    image = plain.first_stage(lr_image())
    shifted, usual = (m.control(image)["controlnet_cond"] for m in (model, plain))
    torch.testing.assert_close(shifted - usual, torch.full_like(usual, model.scaling_factor))
    assert torch.equal(model.encode(image), plain.encode(image))


def test_half_precision_files_open_in_any_precision(tmp_path):
    model = DiffBIRModel.from_released(release(tmp_path, "v2", torch.float16))
    assert {p.dtype for network in model.networks.values() for p in network.parameters()} == {torch.float32}
    halves = DiffBIRModel.from_released(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for network in halves.networks.values() for p in network.parameters()} == {torch.bfloat16}
    condition = halves.condition(lr_image(), [""])
    assert halves.predict(noise(1)[0].bfloat16(), torch.tensor(500), condition).isfinite().all()


# -- what wrong files get ---------------------------------------------------------------------------------------------


class Strange:
    """Not a tensor."""


def spoil(folder: Path, how: str) -> None:
    control, first_stage, base = (folder / name for name in RELEASES["v1"])
    if how.startswith("no "):
        {"no control": control, "no first stage": first_stage, "no base": base}[how].unlink()
    elif how == "truncated":
        base.write_bytes(base.read_bytes()[: base.stat().st_size // 2])
    elif how == "swapped":
        control.write_bytes(first_stage.read_bytes())
    elif how == "BSRNet":
        torch.save(weights("rrdbnet"), first_stage)
    elif how == "another width":
        torch.save(weights("controlnet", "other"), control)
    elif how == "extra":
        torch.save(weights("controlnet", "tiny") | {"zero_convs.12.0.weight": torch.zeros(1)}, control)
    elif how == "lacking":
        tensors = weights("swinir")
        del tensors["norm.bias"]
        torch.save(tensors, first_stage)
    elif how == "pickled":
        torch.save({"state_dict": weights("controlnet", "tiny"), "hooks": Strange()}, control)
    elif how == "base is all of it":
        torch.save(full_v1(), base)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (
            "no control",
            FileNotFoundError,
            "must hold a ControlNet of DiffBIR, one of v1_general.pth, general_full_v1.ckpt",
        ),
        (
            "no first stage",
            FileNotFoundError,
            "'.*general_swinir_v1.ckpt' does not exist; .* comes from lxq007/DiffBIR on",
        ),
        ("no base", FileNotFoundError, "does not exist; v2-1_512-ema-pruned.ckpt comes from a copy of stabilityai/"),
        ("truncated", ValueError, "v2-1_512-ema-pruned.ckpt' cannot be read .* fetch it again"),
        ("swapped", ValueError, "v1_general.pth' is not DiffBIR's ControlNet: .* v1_general.pth comes from lxq007"),
        (
            "BSRNet",
            ValueError,
            "general_swinir_v1.ckpt' is not SwinIR: SwinIR with a pixel unshuffle must have a tensor",
        ),
        ("another width", ValueError, "must be a multiple of num_head_channels, got 64"),
        (
            "extra",
            ValueError,
            "v1_general.pth' is not DiffBIR's ControlNet: it lacks none and has 1 unknown ones such as ",
        ),
        ("lacking", ValueError, "general_swinir_v1.ckpt' is not SwinIR: it lacks 1 tensors such as norm.bias"),
        ("pickled", ValueError, "v1_general.pth' cannot be read .* the file is damaged or something else"),
        ("base is all of it", ValueError, "base '.*' must be Stable Diffusion alone, got one with cond_encoder"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(how, error, message, tmp_path):
    spoil(release(tmp_path, "v1"), how)
    with pytest.raises(error, match=message) as caught:
        DiffBIRModel.from_released(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="DiffBIR's weights '.*nowhere' must be a folder with its files"):
        DiffBIRModel.from_released(tmp_path / "nowhere")
    release(tmp_path, "v1")
    with pytest.raises(ValueError, match=r"version must be one of v1, v2, v2\.1, got 'v3'"):
        DiffBIRModel.from_released(tmp_path, version="v3")
    with pytest.raises(TypeError, match="recipe field must be one of .* got 'steps'"):
        DiffBIRModel.from_released(tmp_path, steps=3)
    release(tmp_path, "v2")
    with pytest.raises(ValueError, match="holds the ControlNets of v1 and v2; say which with version="):
        DiffBIRModel.from_released(tmp_path)
    assert "bsrnet" in DiffBIRModel.from_released(tmp_path, version="v2").networks
    with pytest.raises(FileNotFoundError, match="base '.*nowhere' does not exist; give Stable Diffusion 2.1-base"):
        DiffBIRModel.from_released(tmp_path, version="v1", base=tmp_path / "nowhere")
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer' does not exist; put the folder tokenizer/ .* hold none"):
        DiffBIRModel.from_released(tmp_path, version="v1")


def test_parts_must_fit(tmp_path):
    model = opened("v1")
    parts = {**model.networks, "tokenizer": model.tokenizer, "scheduler": model.scheduler}
    with pytest.raises(ValueError, match="DiffBIR needs swinir or bsrnet as its first stage, got neither"):
        DiffBIRModel(**(parts | {"swinir": None}))
    model.save_pretrained(tmp_path)
    file = tmp_path / "controlnet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != "conv_in.bias"}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights such as conv_in.bias"):
        load_model(tmp_path)
