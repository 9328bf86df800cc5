"""PASD and PASD-light against what the authors' code gives (see released/pasd/make.py), and what fine-tuning needs."""

import dataclasses
import hashlib
import json
import math
import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from rfsr_ext.models import Recipe, load_model
from rfsr_ext.models import pasd as module
from rfsr_ext.models.pasd import PASDControlNetModel, PASDModel, PASDUNet2DConditionModel
from rfsr_ext.sampling import generators, inference_condition, sample, upscale
from tests.models.released.pasd import layout
from tests.models.released.pasd.model import pasd

SIZES = {"even": (8, 4), "odd": (5, 7)}


@pytest.fixture(scope="module")
def expected():
    return load_file(layout.HERE / "expected.safetensors")


@pytest.fixture(scope="module", params=layout.VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def model(variant):
    return pasd(variant)


@pytest.fixture(scope="module")
def full():
    return pasd()


def inputs(size: str):
    height, width = SIZES[size]
    latents = layout.uniform(f"latents {size}", [2, 4, height, width], -2, 2)
    image = layout.uniform(f"image {size}", [2, 3, 8 * height, 8 * width])
    return latents, torch.tensor([999, 301]), layout.uniform(f"text {size}", [2, 5, 12], -1, 1), image


def run(model, size: str = "even"):
    latents, timestep, text, image = inputs(size)
    down, mid = model.controlnet(latents, timestep, text, image, return_dict=False)
    return model.unet(latents, timestep, text, down, mid).sample


def assert_agrees(ours, theirs, limit):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= limit * theirs.abs().max()


def inject(monkeypatch):
    """The noises of the fixture instead of torch's."""
    drawn = []

    def randn_tensor(shape, **options):
        drawn.append(layout.noise(len(drawn), tuple(shape)))
        return drawn[-1]

    monkeypatch.setattr(module, "randn_tensor", randn_tensor)
    return drawn


# -- what the authors' code gives -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_networks_agree_with_the_public_code(model, variant, expected, size):
    latents, timestep, text, image = inputs(size)
    down, mid = model.controlnet(latents, timestep, text, image, return_dict=False)
    for i, x in enumerate(model.controlnet.rgbs(image)):
        assert_agrees(x, expected[f"{variant}.{size}.rgb.{i}"], 1e-5)
    assert len(down) == 3 * (model.unet.config.layers_per_block + 1)
    for i, x in enumerate(down):
        assert_agrees(x, expected[f"{variant}.{size}.down.{i}"], 1e-5)
    assert_agrees(mid, expected[f"{variant}.{size}.mid"], 1e-5)
    assert_agrees(run(model, size), expected[f"{variant}.{size}.output"], 1e-5)


@pytest.mark.parametrize("name", layout.RUNS)
def test_sampling_agrees_with_the_public_code(model, variant, expected, monkeypatch, name):
    """ "900" is the paper's start, "pinned" what that becomes with the diffusers that the public code asks for."""
    steps = layout.RUNS[name]
    level = 900 if name == "900" else int(model.process(steps).timesteps[-1])
    recipe = dataclasses.replace(
        model.recipe, added_prompt="clean", negative_prompt="blurry, noise", start_timestep=level
    )
    drawn = inject(monkeypatch)
    ours = PASDModel(**parts(model), recipe=recipe)
    result = sample(ours, layout.uniform("lr", [1, 3, 8, 16]), ["a cat"], num_inference_steps=steps)
    assert len(drawn) == 2
    assert_agrees(result, expected[f"{variant}.run {name}.image"], 1e-4)


@pytest.mark.parametrize("name", ["unet", "unet_light", "controlnet", "controlnet_rrdb"])
def test_full_size_has_the_weights_of_the_public_code(name):
    kind = PASDUNet2DConditionModel if name.startswith("unet") else PASDControlNetModel
    option = {"unet_light": {"light": True}, "controlnet_rrdb": {"use_rrdb": True}}.get(name, {})
    with torch.device("meta"):
        network = kind(cross_attention_dim=768, attention_head_dim=8, **option)
    lines = sorted(f"{key} {list(x.shape)}" for key, x in network.state_dict().items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    found = {"parameters": sum(p.numel() for p in network.parameters()), "tensors": len(lines), "sha256": digest}
    assert found == layout.keys()["full size"][name]


def test_the_authors_recipe(full):
    recipe = PASDModel(**parts(full)).recipe
    assert (recipe.num_inference_steps, recipe.guidance_scale) == (20, 9)
    assert (recipe.start, recipe.start_timestep) == ("lr", 900)
    assert (recipe.structure_window, recipe.reward_window, recipe.window_unit) == ((1, 8), (18, 20), "steps")
    assert (recipe.tile, recipe.overlap, recipe.min_side, recipe.color_fix) == (320 * 8, 8 * 8, 768, "wavelet")
    assert type(full.scheduler) is UniPCMultistepScheduler
    assert full.process().timesteps.tolist()[:3] == [999, 949, 899] and len(full.process()) == 20
    condition, guidance = inference_condition(full, torch.rand(1, 3, 8, 8), ["a cat"])
    assert condition.prompts == ["a cat, clean, high-resolution, 8k"] and guidance == 9
    assert condition.negative.prompts == ["blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed"]


def parts(model):
    return {**model.networks, "tokenizer": model.tokenizer, "scheduler": model.scheduler}


# -- start ------------------------------------------------------------------------------------------------------------


def test_starts_from_two_noises(full, monkeypatch):
    """z_T = α_900 (α_999 z + σ_999 ε₁) + σ_900 ε₂, with ᾱ from Stable Diffusion's β, in double precision."""
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    assert math.isclose(abar[900] ** 0.5, 0.1189, abs_tol=1e-4)  # as the authors' paper has it, section 4.2
    inject(monkeypatch)
    condition = full.condition(layout.uniform("lr", [1, 3, 8, 16]), [""])
    z = full.encode(condition.image)
    first, second = (layout.noise(k, z.shape) for k in range(2))
    once = abar[999] ** 0.5 * z + (1 - abar[999]) ** 0.5 * first
    wanted = abar[900] ** 0.5 * once + (1 - abar[900]) ** 0.5 * second
    torch.testing.assert_close(full.initial_latents(condition, full.process()), wanted.float(), rtol=1e-5, atol=1e-6)


def test_start_can_be_changed(full, monkeypatch):
    condition = full.condition(layout.uniform("lr", [1, 3, 8, 16]), [""])
    z, process = full.encode(condition.image), full.process()
    inject(monkeypatch)
    single = PASDModel(**parts(full), recipe=Recipe())
    wanted = process.add_noise(z, layout.noise(0, z.shape), process.timesteps[0])
    torch.testing.assert_close(single.initial_latents(condition, process), wanted)
    noise = PASDModel(**parts(full), recipe=Recipe(start="noise"))
    found = noise.initial_latents(condition, process, generators(0, [0]))
    torch.testing.assert_close(found, torch.randn(1, 4, 4, 8, generator=generators(0, [0])[0]))


# -- files ------------------------------------------------------------------------------------------------------------


def test_opens_the_checkpoint_and_what_is_above_it(full, tmp_path):
    layout.write(tmp_path)
    for place in (layout.VARIANTS["pasd"][0], "runs/pasd", "runs"):  # pasd() opens the repository itself
        assert PASDModel.from_released(tmp_path / place).fingerprint() == full.fingerprint()


def test_opens_the_layout_of_the_hub(tmp_path):
    layout.write(tmp_path, "pasd_light_rrdb")
    (tmp_path / "runs").rename(tmp_path / "PASD")
    base = (tmp_path / "checkpoints/stable-diffusion-v1-5").rename(tmp_path / "sd15")
    with pytest.raises(
        FileNotFoundError, match="base must be given, .* neither .*PASD/stable-diffusion-v1-5' nor checkp"
    ):
        PASDModel.from_released(tmp_path / "PASD")
    model = PASDModel.from_released(tmp_path / "PASD", base=base, scale=2, guidance_scale=5.0)
    assert model.unet.config.light and model.controlnet.config.use_rrdb
    assert (model.scale, model.recipe.guidance_scale, model.recipe.start_timestep) == (2, 5.0, 900)
    base.rename(tmp_path / "PASD/stable-diffusion-v1-5")
    assert load_model("pasd", weights=tmp_path / "PASD").fingerprint() == model.fingerprint()


def test_several_models_are_not_guessed_from(tmp_path):
    layout.write(tmp_path)
    layout.write_part(tmp_path / "runs/pasd/checkpoint-5/unet", "unet")
    layout.write_part(tmp_path / "runs/pasd/checkpoint-5/controlnet", "controlnet")
    names = "runs/pasd/checkpoint-100000, runs/pasd/checkpoint-5"
    with pytest.raises(ValueError, match=rf"holds several models \({names}\); give one of these folders"):
        PASDModel.from_released(tmp_path)


def test_missing_folders(tmp_path):
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="weights .* linked at github.com/yangxy/PASD"):
            PASDModel.from_released(place)
    checkpoint = layout.write(tmp_path)
    with pytest.raises(FileNotFoundError, match="base .*sd15' does not exist; give a diffusers folder of SD 1.5"):
        PASDModel.from_released(checkpoint, base=tmp_path / "sd15")
    with pytest.raises(TypeError, match="recipe field must be one of .*, got 'guidance'"):
        PASDModel.from_released(checkpoint, guidance=3)


def test_old_files_of_pytorch(model, variant, tmp_path):
    checkpoint = layout.write(tmp_path, variant)
    for name in layout.VARIANTS[variant][1:]:
        folder = checkpoint / name.partition("_")[0]
        (folder / layout.FILE).unlink()
        layout.write_part(folder, name, file="diffusion_pytorch_model.bin")
    with torch.no_grad():
        torch.testing.assert_close(run(PASDModel.from_released(checkpoint)), run(model))


def test_half_precision_files_open_in_any(full, tmp_path):
    layout.write(tmp_path, dtype=torch.float16)
    found = {dtype: PASDModel.from_released(tmp_path, torch_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, model in found.items():
        assert {p.dtype for n in model.networks.values() for p in n.parameters()} == {dtype}
    with torch.no_grad():
        reference = run(full)
        assert (run(found[torch.float32]) - reference).abs().max() < 0.02 * reference.abs().max()


class Mischief:
    """Code in a pickle."""

    def __reduce__(self):
        return print, ("run",)


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGES = ("missing", "truncated", "lacking", "extra", "shape", "pickle", "other", "no config")


@pytest.mark.parametrize(
    ("part", "damage"), [*(("unet", damage) for damage in DAMAGES), ("controlnet", "lacking"), ("controlnet", "extra")]
)
def test_damaged_files_are_refused_with_one_sentence(tmp_path, part, damage, capsys):
    checkpoint = layout.write(tmp_path)
    file = checkpoint / part / layout.FILE
    strange = "pixel_attentions.0.norm.weight" if part == "unet" else "to_rgbs.0.bias"
    message = f"{part}' cannot be opened as PASD"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "no config":
        (checkpoint / part / "config.json").unlink()
    elif damage == "pickle":
        file.unlink()
        torch.save({"conv_in.weight": Mischief()}, file.with_suffix(".bin"))
    elif damage == "lacking":
        change(file, lambda x: [x.pop(n) for n in list(x) if n.endswith(strange)][:0])
        message = f"{part}' is no PASD.* lacks .* weights such as .*{strange}"
    elif damage == "extra":
        change(file, lambda x: x.update(more=torch.zeros(1)))
        message = f"{part}' is no PASD.* has 1 unknown ones such as more"
    elif damage == "shape":
        change(file, lambda x: x.update({"conv_in.weight": torch.zeros(8, 4, 1, 1)}))
        message = "conv_in.weight"
    else:  # plain Stable Diffusion in its place
        names = [n for n in load_file(file) if "pixel_attentions" in n or "conv_out" in n]
        change(file, lambda x: [x.pop(n) for n in names][:0])
        message = f"{part}' is no PASD.* lacks"
    with pytest.raises(ValueError, match=message) as caught:
        PASDModel.from_released(tmp_path)
    assert "github.com/yangxy/PASD" in str(caught.value) and "\n" not in str(caught.value)
    assert "run" not in capsys.readouterr().out.split()


def test_saves_its_folder_under_the_authors_names(model, variant, tmp_path):
    model.save_pretrained(tmp_path / "model")
    names = {"unet": layout.VARIANTS[variant][1], "controlnet": layout.VARIANTS[variant][2]}
    for part, stored in names.items():
        found = {n: list(x.shape) for n, x in load_file(tmp_path / "model" / part / layout.FILE).items()}
        assert found == layout.keys()[stored]["shapes"]
        config = json.loads((tmp_path / "model" / part / "config.json").read_text())
        theirs = {k: v for k, v in layout.keys()[stored]["config"].items() if not k.startswith("_")}
        assert {k: config[k] for k in theirs} == theirs  # their code can open it
    again = load_model(tmp_path / "model")
    assert type(again) is PASDModel
    assert again.fingerprint() == model.fingerprint() and again.recipe == model.recipe
    assert again.trained == model.trained and type(again.scheduler) is UniPCMultistepScheduler
    assert again.unet.config.light == model.unet.config.light == (variant != "pasd")
    with torch.no_grad():
        torch.testing.assert_close(run(again), run(model))


@pytest.mark.parametrize("light", [False, True])
def test_other_architectures_open(tmp_path, light):
    """Depths, widths and heads are those of config.json: here unlike the fixture's, with linear projections."""
    options = {
        "block_out_channels": [12, 24, 48, 48], "attention_head_dim": [3, 6, 12, 12], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "cross_attention_dim": 12,
        "norm_num_groups": 6, "use_linear_projection": True,
    }  # fmt: skip
    checkpoint, up = layout.write(tmp_path), ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    torch.manual_seed(0)
    controlnet = PASDControlNetModel(**options, conditioning_embedding_out_channels=[6, 6, 12, 18], return_rgbs=False)
    unet = PASDUNet2DConditionModel(**options, up_block_types=up, transformer_layers_per_block=2, light=light)
    for part, network in {"unet": unet, "controlnet": controlnet}.items():
        network.save_pretrained(checkpoint / part)
        config = json.loads((checkpoint / part / "config.json").read_text())
        (checkpoint / part / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if k not in ("light", "return_rgbs")})
        )
    model = PASDModel.from_released(checkpoint)
    assert model.unet.config.light == light and not model.controlnet.config.return_rgbs
    assert {k: list(v.shape) for k, v in model.unet.state_dict().items()} == {
        k: list(v.shape) for k, v in unet.state_dict().items()
    }
    with torch.no_grad():
        assert run(model, "odd").shape == (2, 4, 5, 7)


def test_arguments_that_no_pasd_has():
    with pytest.raises(ValueError, match="class_embed_type must be unset in the U-Net of a PASD, got 'timestep'"):
        PASDUNet2DConditionModel(**layout.UNET, class_embed_type="timestep")


# -- fine-tuning ------------------------------------------------------------------------------------------------------


def gradients(model):
    model.unfreeze()
    for parameter in model.trained_parameters().values():
        parameter.grad = None
    run(model).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.trained_parameters().items()}


def test_heads_for_training_learn(full):
    full.controlnet.requires_grad_(True)
    rgbs = full.controlnet.rgbs(inputs("even")[3])
    assert [x.shape[-2:] for x in rgbs] == [(32, 16), (16, 8), (8, 4)]
    sum(x.abs().mean() for x in rgbs).backward()
    assert all(p.grad.any() for p in full.controlnet.controlnet_cond_embedding.to_rgbs.parameters())
    full.controlnet.zero_grad()
    full.controlnet.requires_grad_(False)


def test_gradient_checkpointing_changes_no_number(variant):
    """A layer runs again in the backward pass; it must see its own call's residuals, whatever was called since."""
    model = pasd(variant)
    plain = gradients(model)
    dead = [name for name, grad in plain.items() if grad is None or not grad.any()]
    assert dead == [] and any("pixel_attentions" in name or "attn2_plus" in name for name in plain)
    assert not any("to_rgbs" in name for name in plain)
    for network in model.trainable_networks().values():
        network.enable_gradient_checkpointing()
    output = run(model)
    latents, timestep, text, image = inputs("even")
    with torch.no_grad():
        down, mid = model.controlnet(latents, timestep, text, 1 - image, return_dict=False)
        other = model.unet(latents, timestep, text, [2 * x for x in down], mid).sample
        assert not torch.allclose(other, output)
    for parameter in model.trained_parameters().values():
        parameter.grad = None
    output.square().mean().backward()
    for name, parameter in model.trained_parameters().items():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


def test_calls_in_threads_do_not_mix(model):
    cases = [{"lr": layout.uniform(f"lr {k}", [1, 3, 8, 8])} for k in range(3)]
    latents, timestep = layout.uniform("z", [1, 4, 4, 4], -1, 1), torch.tensor(500)

    @torch.no_grad()
    def predict(case, name):
        case[name] = model.predict(latents, timestep, model.condition(case["lr"], ["a cat"]))

    for case in cases:
        predict(case, "alone")
    threads = [threading.Thread(target=predict, args=(case, "together")) for case in cases]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for case in cases:
        torch.testing.assert_close(case["together"], case["alone"])
    assert not torch.allclose(cases[0]["alone"], cases[1]["alone"])


def test_adapters(variant):
    from peft import LoraConfig, get_peft_model

    model = pasd(variant)
    with torch.no_grad():
        before = run(model)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    model.networks |= {name: get_peft_model(m, lora) for name, m in model.trainable_networks().items()}
    own = "attn2_plus" if model.unet.config.light else "pixel_attentions"
    assert any(own in n and "lora" in n for n, _ in model.unet.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(run(model), before)
    run(model).square().mean().backward()
    reached = [n for n, p in model.unet.named_parameters() if own in n and "lora_B" in n and p.grad.any()]
    assert reached
    merged = model.unet.merge_and_unload()
    assert {n: list(x.shape) for n, x in merged.state_dict().items()} == layout.keys()[layout.VARIANTS[variant][1]][
        "shapes"
    ]


def test_upscales_a_photograph_in_tiles(full):
    photograph = layout.uniform("photograph", [3, 37, 53])
    result = upscale(full, photograph, tile=96, overlap=32, num_inference_steps=2, guidance_scale=1, progress=False)
    assert result.shape == (3, 148, 212) and result.isfinite().all() and result.std() > 0


def test_small_results_are_made_large_first(full, monkeypatch):
    model, sizes = PASDModel(**parts(full), recipe=Recipe(min_side=96, num_inference_steps=1)), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda image: sizes.append(list(image.shape[-2:])) or encode(image))
    assert upscale(model, layout.uniform("photograph", [3, 8, 12]), progress=False).shape == (3, 32, 48)
    assert sizes == [[96, 160]]  # 96 × 144, padded to what three resolutions need


def test_refuses_a_scheduler_that_cannot_serve(full):
    with pytest.raises(ValueError, match="scheduler DDIMScheduler cannot serve"):
        PASDModel(**parts(full) | {"scheduler": DDIMScheduler(clip_sample=True)})


def test_a_plain_unet_is_no_pasd(tmp_path):
    UNet2DConditionModel(**layout.UNET).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="is no PASDUNet2DConditionModel .*pixel_attentions"):
        module.open_part(PASDUNet2DConditionModel, tmp_path / "unet")


# -- captions ---------------------------------------------------------------------------------------------------------


def test_prompts_without_a_captioner(full):
    assert full.describe(torch.rand(2, 3, 8, 8)) == ["", ""]


def test_captions_do_not_ask_for_a_bad_image(full):
    seen = []

    def captioner(lr):
        seen.append(lr.shape)
        return [" a blurry photo of a noisy cat "] * len(lr)

    captioned = PASDModel(**parts(full), captioner=captioner)
    condition, _ = inference_condition(captioned, torch.rand(1, 3, 8, 8), ["fur"])
    assert condition.prompts == ["a clear photo of a clean cat, fur, clean, high-resolution, 8k"]
    assert seen == [(1, 3, 8, 8)]
    captioned.captioner = lambda lr: ["one"]
    with pytest.raises(ValueError, match=r"captioner must give one caption per image \(2\), got 1"):
        captioned.describe(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("name", ["blip", "hf:", "hf:nobody/nothing"])
def test_unknown_captioners(full, name):
    with pytest.raises(ValueError, match="tagger must be ram, dape, hf:|captioner"):
        PASDModel(**parts(full), captioner=name)


def test_captioner_of_transformers_by_folder(full, tmp_path):
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "blurry", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    text = {"vocab_size": len(words) + 2, "hidden_size": 8, "encoder_hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": len(words), "eos_token_id": 3,
            "sep_token_id": 3, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    torch.manual_seed(0)
    network = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():  # one that says "cat" until it may say no more
        network.text_decoder.cls.predictions.bias[words.index("cat")] = 100
    network.save_pretrained(tmp_path / "blip")
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path / "blip")
    captioned = PASDModel(**parts(full), captioner=f"hf:{tmp_path / 'blip'}")
    captions = captioned.describe(layout.uniform("lr", [2, 3, 8, 16]))
    assert len(captions) == 2 and all(set(caption.split()) == {"cat"} for caption in captions)
    full.save_pretrained(tmp_path / "model")
    again = PASDModel.from_pretrained(tmp_path / "model", captioner=f"hf:{tmp_path / 'blip'}")
    assert again.describe(layout.uniform("lr", [2, 3, 8, 16])) == captions
