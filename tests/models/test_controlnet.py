import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from rfsr_ext.mini import architecture
from rfsr_ext.models import ControlNetISRModel, check_model, load_model
from rfsr_ext.sampling import generators, sample
from tests.tiny import sd_scheduler, tiny_parts

PROMPTS = ["cat, fur", ""]


def latents_like(model, n=2, height=16, width=12, seed=1):
    shape = n, model.latent_channels, height, width
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_facts_of_its_parts(model):
    assert (model.multiple, model.vae_scale_factor, model.latent_channels, model.scale) == (4, 2, 4, 4)
    assert set(model.networks) == {"vae", "text_encoder", "unet", "controlnet"}
    assert model.trained == {"unet": "", "controlnet": ""}


# -- conditioning -----------------------------------------------------------------------------------------------------


def test_condition(model, lr):
    condition = model.condition(lr, PROMPTS)
    assert condition.image.shape == (2, 3, 32, 24)
    assert condition.image.min() >= 0 and condition.image.max() <= 1
    torch.testing.assert_close(condition.image, F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1))
    assert condition.shared["encoder_hidden_states"].shape == (2, architecture.TEXT_LENGTH, architecture.TEXT_WIDTH)
    assert condition.prompts == PROMPTS and len(condition) == 2


def test_condition_slices(model, lr):
    condition, second = model.condition(lr, PROMPTS)[1:], model.condition(lr[1:], PROMPTS[1:])
    assert condition.prompts == [""]
    torch.testing.assert_close(condition.image, second.image)
    torch.testing.assert_close(condition.spatial["controlnet_cond"], second.spatial["controlnet_cond"])
    torch.testing.assert_close(condition.shared["encoder_hidden_states"], second.shared["encoder_hidden_states"])
    assert condition.negative is None
    assert model.condition(lr, PROMPTS, ["blurry", "noisy"])[1:].negative.prompts == ["noisy"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x[0], ValueError, r"lr must have shape \[N, 3, h, w\], got \[3, 8, 6\]"),
        (lambda x: x[:, :1], ValueError, r"lr must have shape \[N, 3, h, w\], got \[2, 1, 8, 6\]"),
        (lambda x: (x * 255).byte(), TypeError, "lr must be floating point in .* got torch.uint8"),
        (lambda x: x * 255, ValueError, r"lr must be finite and in \[0, 1\], got values from"),
        (lambda x: x - 1, ValueError, r"lr must be finite and in \[0, 1\], got values from -"),
        (lambda x: x.masked_fill(x > 0.9, float("nan")), ValueError, "lr must be finite .* got values from nan to nan"),
        (lambda x: x.masked_fill(x > 0.9, float("inf")), ValueError, "lr must be finite .* to inf"),
        (lambda x: x[:1], ValueError, r"prompts must hold one prompt per image of lr \(1\), got 2"),
    ],
)
def test_condition_rejects(model, lr, change, error, message):
    with pytest.raises(error, match=message):
        model.condition(change(lr), PROMPTS)


def test_one_text_is_no_list_of_prompts(model, lr):
    """It has a length, too, and may be as long as the batch."""
    with pytest.raises(TypeError, match="negative_prompts must be a list of one prompt per image .* the text 'no'"):
        model.condition(lr, PROMPTS, "no")


def test_condition_rejects_odd_sizes(make_model):
    model = make_model(scale=2)
    with pytest.raises(ValueError, match="lr must be a multiple of 2 pixels high and wide, got 8x5"):
        model.condition(torch.rand(1, 3, 8, 5), [""])


def test_unknown_start(make_model):
    with pytest.raises(ValueError, match="start must be one of lr, noise, got 'zero'"):
        make_model(start="zero")


def test_prompt_and_image_both_matter(model, lr):
    condition, latents = model.condition(lr, PROMPTS), latents_like(model)
    output = model.predict(latents, torch.tensor(500), condition)
    other_prompt = model.condition(lr, ["dog", "tree"])
    other_image = model.condition(1 - lr, PROMPTS)
    for other in (other_prompt, other_image):
        assert (model.predict(latents, torch.tensor(500), other) - output).abs().max() > 1e-6


def test_timestep_may_be_a_scalar_or_one_per_image(model, lr):
    condition, latents = model.condition(lr, PROMPTS), latents_like(model)
    with torch.no_grad():
        both = model.predict(latents, torch.tensor([900, 100]), condition)
        single = [model.predict(latents[i : i + 1], t, condition[i : i + 1]) for i, t in enumerate((900, 100))]
    torch.testing.assert_close(both, torch.cat(single))


def test_initial_latents(make_model, lr):
    """x_T is √ᾱ z_lr + √(1 − ᾱ) ε, or ε alone."""
    start_lr, start_noise = make_model(), make_model(start="noise")
    condition, process = start_lr.condition(lr, PROMPTS), start_lr.process(50)
    assert process.timesteps[0] == 981
    noise = torch.cat([torch.randn(1, 4, 16, 12, generator=g) for g in generators(0, [0, 1])])
    torch.testing.assert_close(start_noise.initial_latents(condition, process, generators(0, [0, 1])), noise)
    alpha_bar = start_lr.scheduler.alphas_cumprod[981]
    expected = alpha_bar.sqrt() * start_lr.encode(condition.image) + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(start_lr.initial_latents(condition, process, generators(0, [0, 1])), expected)
    cool = make_model(temperature=0.5)
    expected = alpha_bar.sqrt() * cool.encode(condition.image) + 0.5 * (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(cool.initial_latents(condition, process, generators(0, [0, 1])), expected)


# -- pixels -----------------------------------------------------------------------------------------------------------


def test_encode_and_decode(model):
    images = torch.rand(2, 3, 32, 24, requires_grad=True)
    latents = model.encode(images)
    assert latents.shape == (2, 4, 16, 12) and not latents.requires_grad
    expected = model.vae.encode(images * 2 - 1).latent_dist.mode() * 0.7
    torch.testing.assert_close(latents, expected.detach())
    decoded = model.decode(latents)
    torch.testing.assert_close(decoded, (model.vae.decode(latents / 0.7).sample + 1) / 2)


def test_decode_is_differentiable(model):
    latents = latents_like(model, 1, 4, 4).double().requires_grad_()
    model.vae.double()
    assert torch.autograd.gradcheck(lambda z: model.decode(z).square().mean(), latents, atol=1e-6)


def test_gradients_reach_unet_and_controlnet(model, lr):
    model.unfreeze()
    condition, latents = model.condition(lr, PROMPTS), latents_like(model)
    output = model.predict(latents, torch.tensor(100), condition)
    estimate = model.process().pred_original_sample(output, torch.tensor(100), latents)
    model.decode(estimate).mean().backward()
    for name, module in model.trainable_networks().items():
        assert all(p.grad is not None for p in module.parameters()), name
        assert sum(p.grad.abs().sum() for p in module.parameters()) > 0, name
    assert all(p.grad is None for p in (*model.vae.parameters(), *model.text_encoder.parameters()))


# -- reference --------------------------------------------------------------------------------------------------------


def test_reference_is_frozen_and_does_not_follow(model, lr):
    model.unfreeze()
    reference = model.reference()
    condition, latents = model.condition(lr, PROMPTS), latents_like(model)
    before = model.predict(latents, torch.tensor(500), condition)
    torch.testing.assert_close(reference.predict(latents, torch.tensor(500), condition), before)
    for module in reference.trainable_networks().values():
        assert not any(p.requires_grad for p in module.parameters())
    with torch.no_grad():
        for module in model.trainable_networks().values():
            for parameter in module.parameters():
                parameter.add_(0.1)
    assert all(p.requires_grad for module in model.trainable_networks().values() for p in module.parameters())
    assert (model.predict(latents, torch.tensor(500), condition) - before).abs().max() > 1e-3
    torch.testing.assert_close(reference.predict(latents, torch.tensor(500), condition), before)
    assert reference.vae is model.vae and reference.text_encoder is model.text_encoder


def test_networks_put_in_place_are_the_ones_that_run(make_model, lr):
    model, other = make_model(0), make_model(1)
    condition, latents = model.condition(lr, PROMPTS), latents_like(model)
    model.networks |= other.trainable_networks()
    assert model.unet is other.unet and model.controlnet is other.controlnet
    t = torch.tensor(500)
    assert torch.equal(model.predict(latents, t, condition), other.predict(latents, t, condition))


# -- storage ----------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(make_model, tmp_path, lr):
    model = make_model(scale=2, num_inference_steps=7, start="noise", trained={"unet": "attn", "vae": "^decoder"})
    model.save_pretrained(tmp_path / "model")
    again = ControlNetISRModel.from_pretrained(tmp_path / "model")
    assert (again.scale, again.recipe, again.trained) == (2, model.recipe, model.trained)
    assert again.scheduler.to_json_string() == model.scheduler.to_json_string()
    for name, module in model.networks.items():
        for key, value in module.state_dict().items():
            assert torch.equal(again.networks[name].state_dict()[key], value), f"{name}.{key}"
    a, b = (sample(m, lr, PROMPTS, generators(0, [0, 1]), 2) for m in (model, again))
    assert torch.equal(a, b)


def test_folder_is_an_ordinary_diffusers_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionControlNetPipeline"
    weights = load_file(tmp_path / "model" / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == model.controlnet.state_dict().keys()
    assert not list((tmp_path / "model").rglob("*.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("guidance_scale", [1.0, 5.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stock_pipeline_gives_our_images(make_model, tmp_path, lr, prediction_type, guidance_scale):
    scheduler = DDIMScheduler.from_config(sd_scheduler().config, prediction_type=prediction_type)
    model = make_model(scheduler=scheduler)
    model.save_pretrained(tmp_path / "model")
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    condition = model.condition(lr, PROMPTS)
    pipeline.scheduler.set_timesteps(5)
    latents = model.initial_latents(condition, model.process(5), generators(0, [0, 1]))
    theirs = pipeline(
        PROMPTS, image=condition.image, latents=latents, num_inference_steps=5, guidance_scale=guidance_scale,
        negative_prompt=["blurry, noisy"] * 2, output_type="pt",
    ).images  # fmt: skip
    ours = sample(model, lr, PROMPTS, generators(0, [0, 1]), 5, guidance_scale, "blurry, noisy")
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_saving_again_replaces_the_model_and_nothing_else(make_model, tmp_path):
    make_model(0).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "unet" / "notes.md").write_text("mine")
    new = make_model(1)
    new.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "unet" / "notes.md").read_text() == "mine"
    again = ControlNetISRModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.unet.conv_in.weight, new.unet.conv_in.weight)


def test_failed_save_leaves_the_old_model(make_model, tmp_path, monkeypatch):
    old, new = make_model(0), make_model(1)
    old.save_pretrained(tmp_path / "model")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(new.controlnet, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path / "model")
    again = ControlNetISRModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.unet.conv_in.weight, old.unet.conv_in.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -- folders of other people ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A Stable-Diffusion-like folder that diffusers wrote, with a ControlNet, and one without; and that ControlNet."""
    root, parts = tmp_path_factory.mktemp("stock"), tiny_parts(5, scheduler=PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ))  # fmt: skip
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionControlNetPipeline(**parts, **extra).save_pretrained(root / "whole")
    controlnet = parts.pop("controlnet")
    StableDiffusionPipeline(**parts, **extra).save_pretrained(root / "plain")
    controlnet.save_pretrained(root / "controlnet")
    return root


def test_an_ordinary_diffusers_folder_opens(stock, lr):
    whole = load_model(stock / "whole", scale=2, start="noise", num_inference_steps=6, guidance_scale=2.0)
    assert (whole.scale, whole.recipe.start, whole.recipe.num_inference_steps) == (2, "noise", 6)
    assert type(whole.scheduler) is PNDMScheduler and len(whole.process()) == 7
    joined = load_model(stock / "plain", controlnet=stock / "controlnet", scale=2, start="noise", num_inference_steps=6)
    a, b = (sample(m, lr, PROMPTS, generators(0, [0, 1]), guidance_scale=1.0) for m in (whole, joined))
    assert torch.equal(a, b)
    assert len(check_model(whole)) == 5


def test_what_we_save_of_it_stock_diffusers_opens(stock, tmp_path):
    model = load_model(stock / "whole", scale=2)
    model.save_pretrained(tmp_path / "model")
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("cat", image=torch.rand(1, 3, 16, 16), num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    again = load_model(tmp_path / "model")
    assert again.scale == 2 and again.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("place", "options", "error", "message"),
    [
        (
            "nowhere",
            {},
            FileNotFoundError,
            r"model folder '.*nowhere' does not exist, and nothing is downloaded; give a ",
        ),
        ("empty", {}, ValueError, r"must be a diffusers folder .* got a folder without model_index.json"),
        ("photo.png", {}, ValueError, r"must be a diffusers folder .* got a file"),
        ("plain", {}, ValueError, r"is a StableDiffusionPipeline without ControlNet; give its folder as controlnet="),
        ("plain", {"controlnet": "gone"}, FileNotFoundError, "controlnet folder 'gone' does not exist"),
        ("xl", {}, ValueError, r"text_encoder in .* must be a CLIPTextModel, got CLIPTextModelWithProjection"),
        ("whole", {"begin": "lr"}, TypeError, "recipe field must be one of added_prompt, .* got 'begin'"),
        ("whole", {"start": "zero"}, ValueError, "start must be one of lr, noise, got 'zero'"),
        ("torn", {}, FileNotFoundError, "vae folder '.*vae' does not exist; give a complete model folder"),
        ("other", {}, ValueError, "must be one of controlnet, .* got 'other'"),
    ],
)
def test_what_is_no_model_is_refused_in_a_sentence(stock, tmp_path, place, options, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.png").touch()
    for name in ("xl", "torn", "other"):
        (tmp_path / name).mkdir()
        index = json.loads((stock / "whole" / "model_index.json").read_text())
        if name == "xl":
            index["text_encoder"][1] = "CLIPTextModelWithProjection"
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "other" / "isr_config.json").write_text('{"model": "other"}')
    folder = stock / place if place in ("plain", "whole") else tmp_path / place
    with pytest.raises(error, match=message):
        load_model(folder, **options)


def test_a_prompt_that_is_cut_is_said_once(make_model, caplog):
    model = make_model()
    most = model.tokenizer.model_max_length
    word = next(n for n in range(1, most) if len(model.tokenizer("cat " * n).input_ids) == most)  # so many fit
    model.encode_prompts(["cat " * word, ""])
    assert not caplog.records
    for _ in range(2):
        model.encode_prompts(["cat", "cat " * (word + 5)])
    assert [record.message for record in caplog.records] == [
        f"a prompt of {len(model.tokenizer('cat ' * (word + 5)).input_ids)} tokens is cut to the {most} that the text "
        "encoder takes"
    ]


def test_parts_must_fit(make_model):
    parts, others = tiny_parts(), make_model()
    narrow = architecture.autoencoder()  # of 16 channels
    with pytest.raises(ValueError, match="vae latent_channels must be 4 to fit the unet, got 16; give parts of one"):
        ControlNetISRModel(**parts | {"vae": narrow})
    assert others.latent_channels == 4


@pytest.mark.filterwarnings("error::FutureWarning")
def test_half_precision(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    model = ControlNetISRModel.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    images = sample(model, torch.rand(1, 3, 4, 4), ["cat"], generators(0, [0]), 2)
    assert images.dtype == torch.bfloat16 and images.isfinite().all()
