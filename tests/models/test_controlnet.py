import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionControlNetPipeline
from safetensors.torch import load_file

from rfsr_ext.mini import architecture
from rfsr_ext.models import Condition, ControlNetISRModel, ISRModel
from rfsr_ext.sampling import generators, sample

PROMPTS = ["cat, fur", ""]


def latents_like(model, n=2, height=16, width=12, seed=1):
    shape = n, model.latent_channels, height, width
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_satisfies_the_protocol(model):
    assert isinstance(model, ISRModel)
    assert model.multiple == 4 and model.vae_scale_factor == 2


def test_everything_is_frozen_until_training_asks(model):
    assert not any(p.requires_grad for module in model._modules().values() for p in module.parameters())


# -- conditioning -----------------------------------------------------------------------------------------------------


def test_encode_condition(model, lr):
    condition = model.encode_condition(lr, PROMPTS)
    assert condition.controlnet_cond.shape == (2, 3, 32, 24)
    assert condition.controlnet_cond.min() >= 0 and condition.controlnet_cond.max() <= 1
    torch.testing.assert_close(condition.controlnet_cond, F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1))
    assert condition.prompt_embeds.shape == (2, architecture.TEXT_LENGTH, architecture.TEXT_WIDTH)
    assert condition.prompts == PROMPTS and len(condition) == 2


def test_condition_slices(model, lr):
    condition, second = model.encode_condition(lr, PROMPTS)[1:], model.encode_condition(lr[1:], PROMPTS[1:])
    assert condition.prompts == [""]
    torch.testing.assert_close(condition.controlnet_cond, second.controlnet_cond)
    torch.testing.assert_close(condition.prompt_embeds, second.prompt_embeds)
    assert Condition(lr, None, PROMPTS)[:1].prompt_embeds is None


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
def test_encode_condition_rejects(model, lr, change, error, message):
    with pytest.raises(error, match=message):
        model.encode_condition(change(lr), PROMPTS)


def test_encode_condition_rejects_odd_sizes(make_model):
    model = make_model(options={"scale": 2})
    with pytest.raises(ValueError, match="lr must be a multiple of 2 pixels high and wide, got 8x5"):
        model.encode_condition(torch.rand(1, 3, 8, 5), [""])


def test_unknown_start(make_model):
    with pytest.raises(ValueError, match=r"start must be one of \('lr', 'noise'\), got 'zero'"):
        make_model(options={"start": "zero"})


def test_prompt_and_image_both_matter(model, lr):
    condition, latents = model.encode_condition(lr, PROMPTS), latents_like(model)
    output = model.predict_noise(latents, torch.tensor(500), condition)
    other_prompt = model.encode_condition(lr, ["dog", "tree"])
    other_image = model.encode_condition(1 - lr, PROMPTS)
    for other in (other_prompt, other_image):
        assert (model.predict_noise(latents, torch.tensor(500), other) - output).abs().max() > 1e-6


def test_timestep_may_be_a_scalar_or_one_per_image(model, lr):
    condition, latents = model.encode_condition(lr, PROMPTS), latents_like(model)
    with torch.no_grad():
        both = model.predict_noise(latents, torch.tensor([900, 100]), condition)
        single = [model.predict_noise(latents[i : i + 1], t, condition[i : i + 1]) for i, t in enumerate((900, 100))]
    torch.testing.assert_close(both, torch.cat(single))


def test_initial_latents(make_model, lr):
    """x_T is √ᾱ z_lr + √(1 − ᾱ) ε, or ε alone."""
    start_lr, start_noise = make_model(), make_model(options={"start": "noise"})
    condition, timestep = start_lr.encode_condition(lr, PROMPTS), torch.tensor(981)
    noise = torch.cat([torch.randn(1, 4, 16, 12, generator=g) for g in generators(0, [0, 1])])
    torch.testing.assert_close(start_noise.initial_latents(condition, timestep, generators(0, [0, 1])), noise)
    alpha_bar = start_lr.scheduler.alphas_cumprod[981]
    expected = alpha_bar.sqrt() * start_lr.encode(condition.controlnet_cond) + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(start_lr.initial_latents(condition, timestep, generators(0, [0, 1])), expected)


# -- z_0 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_pred_original_sample_is_the_schedulers(make_model, prediction_type):
    model = make_model(prediction_type=prediction_type)
    model.scheduler.set_timesteps(10)
    for timestep in model.scheduler.timesteps:
        latents, output = latents_like(model, seed=int(timestep)), latents_like(model, seed=int(timestep) + 1)
        expected = model.scheduler.step(output, timestep, latents).pred_original_sample
        torch.testing.assert_close(model.pred_original_sample(output, timestep, latents), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pred_original_sample_of_the_true_output_is_the_truth(make_model, prediction_type):
    model = make_model(prediction_type=prediction_type)
    clean, noise, timesteps = latents_like(model), latents_like(model, seed=2), torch.tensor([20, 700])
    noisy = model.scheduler.add_noise(clean, noise, timesteps)
    output = noise if prediction_type == "epsilon" else model.scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(model.pred_original_sample(output, timesteps, noisy), clean, atol=1e-5, rtol=1e-5)


def test_unknown_prediction_type(make_model):
    model = make_model(prediction_type="score")
    with pytest.raises(ValueError, match="prediction_type must be epsilon, v_prediction or sample, got 'score'"):
        model.pred_original_sample(latents_like(model), torch.tensor(1), latents_like(model))


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
    for module in model.trainable_groups().values():
        module.requires_grad_(True)
    condition, latents = model.encode_condition(lr, PROMPTS), latents_like(model)
    output = model.predict_noise(latents, torch.tensor(100), condition)
    model.decode(model.pred_original_sample(output, torch.tensor(100), latents)).mean().backward()
    for name, module in model.trainable_groups().items():
        assert all(p.grad is not None for p in module.parameters()), name
        assert sum(p.grad.abs().sum() for p in module.parameters()) > 0, name
    assert all(p.grad is None for p in (*model.vae.parameters(), *model.text_encoder.parameters()))


# -- reference --------------------------------------------------------------------------------------------------------


def test_reference_is_frozen_and_does_not_follow(model, lr):
    for module in model.trainable_groups().values():
        module.requires_grad_(True)
    reference = model.reference()
    condition, latents = model.encode_condition(lr, PROMPTS), latents_like(model)
    before = model.predict_noise(latents, torch.tensor(500), condition)
    torch.testing.assert_close(reference.predict_noise(latents, torch.tensor(500), condition), before)
    for module in reference.trainable_groups().values():
        assert not any(p.requires_grad for p in module.parameters())
    with torch.no_grad():
        for module in model.trainable_groups().values():
            for parameter in module.parameters():
                parameter.add_(0.1)
    assert all(p.requires_grad for module in model.trainable_groups().values() for p in module.parameters())
    assert (model.predict_noise(latents, torch.tensor(500), condition) - before).abs().max() > 1e-3
    torch.testing.assert_close(reference.predict_noise(latents, torch.tensor(500), condition), before)
    assert reference.vae is model.vae and reference.text_encoder is model.text_encoder


def test_set_trainable_groups(make_model):
    model, other = make_model(0), make_model(1)
    model.set_trainable_groups(other.trainable_groups())
    assert model.unet is other.unet and model.controlnet is other.controlnet
    assert set(model.trainable_groups()) == {"unet", "controlnet"}


# -- storage ----------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(make_model, tmp_path, lr):
    model = make_model(options={"scale": 2, "num_inference_steps": 7, "start": "noise"})
    model.save_pretrained(tmp_path / "model")
    again = ControlNetISRModel.from_pretrained(tmp_path / "model")
    assert (again.scale, again.num_inference_steps, again.start) == (2, 7, "noise")
    assert again.scheduler.to_json_string() == model.scheduler.to_json_string()
    for name, module in model._modules().items():
        for key, value in module.state_dict().items():
            assert torch.equal(again._modules()[name].state_dict()[key], value), f"{name}.{key}"
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stock_pipeline_gives_our_images(make_model, tmp_path, lr, prediction_type):
    model = make_model(prediction_type=prediction_type)
    model.save_pretrained(tmp_path / "model")
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    condition = model.encode_condition(lr, PROMPTS)
    pipeline.scheduler.set_timesteps(5)
    latents = model.initial_latents(condition, pipeline.scheduler.timesteps[0], generators(0, [0, 1]))
    theirs = pipeline(
        PROMPTS, image=condition.controlnet_cond, latents=latents, num_inference_steps=5, guidance_scale=1,
        output_type="pt",
    ).images  # fmt: skip
    ours = sample(model, lr, PROMPTS, generators(0, [0, 1]), 5)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_saving_over_an_old_folder_leaves_files_of_others(make_model, tmp_path):
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


def test_not_a_model_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="model folder .* has no isr_config.json; give a folder"):
        ControlNetISRModel.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_half_precision(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    model = ControlNetISRModel.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    images = sample(model, torch.rand(1, 3, 4, 4), ["cat"], generators(0, [0]), 2)
    assert images.dtype == torch.bfloat16 and images.isfinite().all()
