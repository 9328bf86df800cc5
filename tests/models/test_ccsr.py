"""CCSR v1 and v2 against their authors' code: see tests/models/released/ccsr/make_v1.py and make_v2.py."""

import copy
import hashlib
import json
import math
import shutil
from functools import partial

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from rfsr_ext.models import ccsr, check_model, load_model
from rfsr_ext.networks import compvis
from rfsr_ext.sampling import TimestepWindows, generators, sample, trajectory
from tests.models.released.ccsr import layout
from tests.models.released.ccsr.tiny import tiny_ccsr_v1, tiny_ccsr_v2


def close(given, wanted, tolerance=1e-5):
    """Largest difference over largest value."""
    assert given.shape == wanted.shape
    assert (given - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.fixture(scope="module")
def expected():
    tensors = load_file(layout.HERE / "expected.safetensors")
    return {v: {k[3:]: t for k, t in tensors.items() if k.startswith(v)} for v in ("v1", "v2")}


@pytest.fixture(scope="module")
def v2_folder(tmp_path_factory):
    return layout.write_v2(tmp_path_factory.mktemp("v2") / "models")


@pytest.fixture
def v2(v2_folder):
    return ccsr.CCSRv2Model.from_released(v2_folder)


@pytest.fixture
def authors_noise(monkeypatch):
    """Noise is what it was when the fixtures were made, whatever the generators say."""
    draws = []

    def draw(shape, **options):
        draws.append(len(draws))
        return torch.cat([layout.noise(i, draws[-1], shape[-1]) for i in range(shape[0])])

    for place in ("rfsr_ext.models.base", "rfsr_ext.models.process", "diffusers.schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"{place}.randn_tensor", draw)
    return draws


def sampled(model, guidance_scale, steps, shares=None, prompt=layout.PROMPT, negative=layout.NEGATIVE_PROMPT, width=12):
    if shares:
        model.recipe = model.recipe.replace(t_max=shares[0], t_min=shares[1])
    condition = model.condition(layout.lr_images(width), [prompt] * 2, [negative] * 2)
    *_, (_, latents) = trajectory(model, condition, None, steps, guidance_scale)
    return latents


# -- version 2 --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_v2_networks(v2, expected):
    expected = expected["v2"]
    condition = v2.condition(layout.lr_images(), [layout.PROMPT, layout.NEGATIVE_PROMPT])
    close(condition.spatial["controlnet_cond"], expected["condition_latents"])
    close(condition.shared["encoder_hidden_states"], expected["text"])
    latents, timestep = torch.cat([layout.noise(i, 0) for i in range(2)]), torch.tensor([999, 13])
    down, mid = v2.controlnet(latents, timestep, expected["text"], expected["condition_latents"], return_dict=False)
    for i, residual in enumerate(down):
        close(residual, expected[f"controlnet.down.{i}"])
    close(mid, expected["controlnet.mid"])
    close(v2.predict(latents, timestep, condition), expected["unet"])


@pytest.mark.parametrize("run", ["one_step", "two_steps", "many_steps", "no_leap"])
def test_v2_sampling_is_the_authors(v2, expected, authors_noise, run):
    steps, *shares, guidance_scale = layout.keys("v2")["runs"][run]
    latents = sampled(v2, guidance_scale, steps, shares)
    assert len(authors_noise) == len(v2.process(steps))  # x_T and one for every evaluation but the last
    close(latents, expected["v2"][f"run.{run}"], 1e-4)


def test_v2_image(v2, expected):
    with torch.no_grad():
        close(v2.decode(expected["v2"]["run.two_steps"]), expected["v2"]["image.two_steps"])


def test_v2_authors_give_the_first_step_the_negative_prompt(v2, expected, authors_noise, monkeypatch):
    predict = v2.predict
    monkeypatch.setattr(v2, "predict", lambda z, t, c: predict(z, t, c.negative if t == 999 else c))
    latents = sampled(v2, 4.5, 6)
    close(latents, expected["v2"]["run.negative_first"], 1e-4)
    with pytest.raises(AssertionError):
        close(latents, expected["v2"]["run.two_steps"], 1e-3)


def test_v2_contract(v2):
    assert len(check_model(v2)) == 5


# -- version 1 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v1_tensors():
    return layout.v1_tensors()


@pytest.fixture(scope="module")
def v1_file(tmp_path_factory, v1_tensors):
    return layout.write_v1(tmp_path_factory.mktemp("v1") / "weights", v1_tensors)


@pytest.fixture(scope="module")
def v1_opened(v1_file):
    return ccsr.CCSRv1Model.from_released(v1_file, num_head_channels=16)


@pytest.fixture
def v1(v1_opened):
    return copy.copy(v1_opened)


@torch.no_grad()
def test_v1_networks(v1, expected):
    expected = expected["v1"]
    condition = v1.condition(layout.lr_images(16), ["", "blurry"])
    assert "cond_encoder" not in v1.networks
    close(condition.spatial["controlnet_cond"], expected["condition_latents"])
    close(v1.encode(condition.image), expected["encoded"])
    close(condition.shared["encoder_hidden_states"], expected["text"])
    latents, timestep = torch.cat([layout.noise(i, 0, 8) for i in range(2)]), torch.tensor([999, 13])
    down, mid = v1.controlnet(latents, timestep, expected["text"], expected["condition_latents"], return_dict=False)
    for i in (0, 5, 11):
        close(down[i], expected[f"controlnet.down.{i}"])
    close(mid, expected["controlnet.mid"])
    close(v1.predict(latents, timestep, condition), expected["unet"])


@pytest.mark.parametrize("run", ["authors", "two_steps", "guided", "noisier_than_told"])
def test_v1_sampling_is_the_authors(v1, expected, authors_noise, run):
    steps, t_max, t_min, guidance_scale = layout.keys("v1")["runs"][run]
    latents = sampled(v1, guidance_scale, steps, (t_max, t_min), "sharp", "blurry", 16)
    assert len(authors_noise) == len(v1.process(steps)) == 1 + round(steps * t_max) - round(steps * t_min)
    close(latents, expected["v1"][f"run.{run}"], 1e-4)


def test_v1_image(v1, expected):
    with torch.no_grad():
        close(v1.decode(expected["v1"]["run.two_steps"]), expected["v1"]["image.two_steps"])


def test_v1_with_an_encoder_of_its_own_for_the_condition(tmp_path):
    tensors = layout.weights("v1", layout.keys("v1")["shapes"])  # every tensor another one
    model = ccsr.CCSRv1Model.from_released(layout.write_v1(tmp_path / "v1", tensors), num_head_channels=16)
    image = model.first_stage(layout.lr_images(16))
    with torch.no_grad():
        condition = model.control(image)["controlnet_cond"]
        close(condition, model.networks["cond_encoder"].encode(image * 2 - 1).latent_dist.mode() * 0.18215)
    assert (condition - model.encode(image)).abs().max() > 0.01
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.fingerprint() == model.fingerprint() and "cond_encoder" in again.networks


# -- full size --------------------------------------------------------------------------------------------------------

SD21 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}


def facts(network, shapes=None):
    shapes = shapes or {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    lines = "\n".join(sorted(f"{name} {list(shape)}" for name, shape in shapes.items()))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return {"parameters": parameters, "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def test_v2_at_full_size():
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel(**SD21),
            "controlnet": ccsr.CCSRv2ControlNetModel(**SD21, use_vae_encode_condition=True),
        }
    assert {name: facts(network) for name, network in networks.items()} == layout.keys("v2")["full"]


def test_v1_at_full_size(v1_tensors):
    """The reduced checkpoint has every layer of the large one; ours at full width, under the old names, is the same."""
    full = layout.keys("v1")["full"]
    for prefix, convert, widths in (
        ("model.diffusion_model.", partial(compvis.unet, num_head_channels=16), SD21),
        ("control_model.", partial(compvis.controlnet, num_head_channels=16), SD21),
        ("first_stage_model.", compvis.vae, {}),
    ):
        part = {name.removeprefix(prefix): t for name, t in v1_tensors.items() if name.startswith(prefix)}
        build, renamed = convert(part)
        old = {tensor.data_ptr(): name for name, tensor in part.items()}
        assert len(old) == len(part) == len(renamed)
        with torch.device("meta"):
            small = build()
            channels = {"block_out_channels": [128, 256, 512, 512] if prefix[0] == "f" else [320, 640, 1280, 1280]}
            large = type(small).from_config({**small.config, **widths, **channels})
        shapes = {}
        for name, tensor in large.state_dict().items():
            was = old[renamed[name].data_ptr()]
            shapes[was] = [*tensor.shape, *[1] * (part[was].ndim - tensor.ndim)]  # 1x1 convolutions became linear
        assert facts(large, shapes) == full[prefix[:-1]]
        if prefix == "first_stage_model.":
            encoder = {n: s for n, s in shapes.items() if n.startswith(("encoder.", "quant_conv."))}
            assert facts(large, encoder) == full["cond_encoder"]


# -- folders, options and errors --------------------------------------------------------------------------------------


def test_v2_round_trip(v2_folder, tmp_path):
    model = load_model("ccsr-v2", weights=v2_folder, num_inference_steps=20, t_max=0.8)
    recipe = model.recipe
    assert (recipe.t_max, recipe.t_min, len(model.process()), len(model.process(1))) == (0.8, 0.5, 7, 1)
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "controlnet" / "config.json").read_text())
    assert config["use_vae_encode_condition"] is True
    stored = load_file(tmp_path / "model" / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert {k: list(t.shape) for k, t in stored.items()} == layout.keys("v2")["parts"]["controlnet"]["shapes"]
    again = load_model(tmp_path / "model", t_min=0.2)
    assert type(again) is ccsr.CCSRv2Model and again.fingerprint() == model.fingerprint()
    assert again.recipe == recipe.replace(t_min=0.2)
    a, b = (
        sample(m, layout.lr_images(), ["", "cat"], generators(0, [0, 1]), 2)
        for m in (model, load_model(tmp_path / "model"))
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # weights in a mapped file lie differently
    with pytest.raises(ValueError, match="t_max and t_min must satisfy .* got 0.8 and 0.9"):
        load_model(tmp_path / "model", t_min=0.9)


def test_v2_over_an_image(v2_folder, tmp_path):
    """A ControlNet of theirs that was not trained over latents is the stock one."""
    model = ccsr.CCSRv2Model.from_released(v2_folder)
    stock = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    shutil.copytree(v2_folder, tmp_path / "models")
    shutil.rmtree(tmp_path / "models" / "controlnet")
    stock.save_pretrained(tmp_path / "models" / "controlnet")
    model = ccsr.CCSRv2Model.from_released(tmp_path / "models")
    condition = model.condition(layout.lr_images(), ["", ""])
    assert torch.equal(condition.spatial["controlnet_cond"], condition.image)
    assert len(check_model(model)) == 5


def test_v1_round_trip(v1_file, tmp_path):
    model = load_model("ccsr", weights=v1_file.parent, num_head_channels=16, t_min=0.5)
    assert model.recipe.num_inference_steps == 45 and len(model.process()) == 9 and model.process().timesteps[0] == 999
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert type(again) is ccsr.CCSRv1Model and again.fingerprint() == model.fingerprint()
    assert again.recipe == model.recipe and again.recipe.t_min == 0.5
    a, b = (sample(m, layout.lr_images(16), ["", ""], generators(0, [0, 1]), 6) for m in (model, again))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # weights in a mapped file lie differently


@pytest.mark.parametrize(
    ("make", "structure", "reward"), [(tiny_ccsr_v1, (1, 4), (14, 16)), (tiny_ccsr_v2, (1, 1), (2, 2))]
)
def test_windows(make, structure, reward):
    model = make()
    recipe = model.recipe
    windows = TimestepWindows.from_process(
        model.process(), recipe.structure_window, recipe.reward_window, recipe.window_unit
    )
    assert (windows.structure, windows.reward) == (structure, reward)


def test_half_precision(v2_folder, v1_tensors, tmp_path):
    """Half-precision files open in any type."""
    shutil.copytree(v2_folder, tmp_path / "models")
    for name, dtype in (("controlnet", torch.float16), ("vae", torch.bfloat16)):
        file = tmp_path / "models" / name / "diffusion_pytorch_model.safetensors"
        save_file({k: t.to(dtype) for k, t in load_file(file).items()}, file)
    model = ccsr.CCSRv2Model.from_released(tmp_path / "models")
    assert {p.dtype for m in model.networks.values() for p in m.parameters()} == {torch.float32}
    model = ccsr.CCSRv2Model.from_released(tmp_path / "models", torch_dtype=torch.bfloat16)
    images = sample(model, layout.lr_images(), ["", ""], generators(0, [0, 1]))
    assert images.dtype == torch.bfloat16 and images.isfinite().all()
    halves = {k: t.half() for k, t in v1_tensors.items()}
    model = ccsr.CCSRv1Model.from_released(layout.write_v1(tmp_path / "v1", halves), num_head_channels=16)
    assert {p.dtype for m in model.networks.values() for p in m.parameters()} == {torch.float32}


def without(folder, part):
    shutil.rmtree(folder / part)


def cut(folder, part):
    file = folder / part / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def change(folder, part, edit):
    file = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


FETCH_V2 = "; fetch controlnet/ and vae/ of CCSR-v2 from where github.com/csslc/CCSR links to"


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: without(f, "controlnet"), FileNotFoundError, "'.*controlnet', which does not exist" + FETCH_V2),
        (lambda f: without(f, "vae"), FileNotFoundError, "'.*vae', which does not exist" + FETCH_V2),
        (lambda f: without(f, "stable-diffusion-2-1-base"), FileNotFoundError, "which has left its first address"),
        (lambda f: cut(f, "controlnet"), ValueError, "controlnet' cannot be opened as CCSRv2ControlNetModel" ),
        (lambda f: change(f, "vae", lambda t: t.update(more=torch.ones(1))), ValueError,
         "unknown ones such as more" + FETCH_V2),
        (lambda f: change(f, "controlnet", lambda t: t.pop("condition_conv_in.bias")), ValueError,
         "lacks 1 weights such as condition_conv_in.bias .*" + FETCH_V2),
        (lambda f: change(f, "controlnet", lambda t: t.update({"condition_conv_in.bias": torch.ones(7)})), ValueError,
         "condition_conv_in.bias"),
    ],
)  # fmt: skip
def test_v2_refuses(v2_folder, tmp_path, spoil, error, message):
    shutil.copytree(v2_folder, tmp_path / "models")
    spoil(tmp_path / "models")
    with pytest.raises(error, match=message) as caught:
        load_model("ccsr-v2", weights=tmp_path / "models")
    assert "\n" not in str(caught.value)


FETCH_V1 = "; fetch real-world_ccsr.ckpt from where github.com/csslc/CCSR, branch main, links to"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("control_model.zero_convs.3.0.bias"), "lacks 1 tensors such as controlnet_down_blocks.3.bias"),
        (lambda t: t.update({"control_model.more": torch.ones(1)}), "has 1 unknown ones such as more"),
        (lambda t: t.update({"more": torch.ones(1)}), "must be a latent diffusion checkpoint .* got 'more'"),
        (lambda t: t.update({"preprocess_model.a": torch.ones(1)}), "it has also a preprocess_model"),
        (lambda t: t.pop("control_model.input_blocks.0.0.weight"), "must have a tensor 'input_blocks.0.0.weight'"),
        (lambda t: t.update({"control_model.time_embed.0.bias": torch.ones(5)}), r"must have shape \[128\], got \[5\]"),
        (lambda t: t.update(run=print), "cannot be read"),
    ],
)
def test_v1_refuses(v1_tensors, tmp_path, edit, message):
    tensors = dict(v1_tensors)
    edit(tensors)
    file = layout.write_v1(tmp_path / "v1", tensors)
    with pytest.raises(ValueError, match=f"{message}.*{FETCH_V1}") as caught:
        ccsr.CCSRv1Model.from_released(file, num_head_channels=16)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_v1_missing_and_truncated(v1_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"real-world_ccsr.ckpt', which does not exist{FETCH_V1}"):
        load_model("ccsr", weights=tmp_path)
    file = tmp_path / "real-world_ccsr.ckpt"
    file.write_bytes(v1_file.read_bytes()[:-1000])
    with pytest.raises(
        FileNotFoundError, match="tokenizer', which does not exist; give the diffusers folder .* mirrored"
    ):
        load_model("ccsr", weights=tmp_path)
    with pytest.raises(ValueError, match=f"cannot be read .*{FETCH_V1}"):
        load_model("ccsr", weights=tmp_path, base=v1_file.parent / "stable-diffusion-2-1-base")
    with pytest.raises(TypeError, match="recipe field must be one of .* got 'begin'"):
        load_model("ccsr", weights=v1_file.parent, begin="lr")
