"""FLUX against diffusers' own pipeline, run on the same parts; what training asks of a flow model; its files."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from rfsr_ext.models import flux, load_model
from rfsr_ext.models.flux import FLUX_RECIPE, FluxISRModel
from rfsr_ext.rewards import WeightedReward
from rfsr_ext.sampling import TimestepWindows, denoise, generators, rollout, sample, trajectory, upscale
from rfsr_ext.training import RFSRConfig, RFSRTrainer
from tests.models.released.dp2o import T5_WIDTH, tiny_flux, tiny_flux_parts
from tests.tiny import sd_scheduler, tiny_parts
from tests.training.conftest import Brightness, TinyData

PROMPTS = ["cat, fur", ""]


@pytest.fixture(scope="module")
def model():
    return tiny_flux()


@pytest.fixture(scope="module")
def lr():
    return torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))


# -- against diffusers ------------------------------------------------------------------------------------------------


@pytest.fixture
def stock(monkeypatch):
    """Run diffusers' pipeline on a model's parts; the posterior's mean stands for a draw from it, as in our models."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def run(model, lr, prompts, latents, steps, **options):
        parts = {"tokenizer": model.tokenizer, "tokenizer_2": model.tokenizer_2, "scheduler": model.scheduler}
        pipeline = FluxControlNetPipeline(**model.networks, **parts)
        pipeline.set_progress_bar_config(disable=True)
        image = model.condition(lr, prompts).image
        return pipeline(
            prompts, control_image=image * 2 - 1, latents=pipeline._pack_latents(latents, *latents.shape),
            height=image.shape[-2], width=image.shape[-1], num_inference_steps=steps, guidance_scale=model.guidance,
            max_sequence_length=model.max_sequence_length, output_type="pt", **options,
        ).images  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("steps", "guidance", "parts"),
    [
        (5, 2.5, {}),
        (4, 1.0, {"seed": 3, "layers": 4, "single_layers": 1, "heads": 3, "controlnet_layers": 3}),
        (3, 2.5, {"seed": 1, "guidance_embeds": False}),
    ],
)
def test_a_whole_run_is_the_stock_pipelines(stock, lr, steps, guidance, parts):
    model = FluxISRModel(**tiny_flux_parts(**parts), guidance=guidance, max_sequence_length=12)
    ours = sample(model, lr, PROMPTS, generators(0, [0, 1]), steps)
    noise = torch.cat([torch.randn(1, 4, 16, 12, generator=g) for g in generators(0, [0, 1])])
    theirs = stock(model, lr, PROMPTS, noise, steps)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_prompts_are_embedded_as_the_stock_pipeline_does(model):
    pipeline = FluxControlNetPipeline(
        **model.networks, tokenizer=model.tokenizer, tokenizer_2=model.tokenizer_2, scheduler=model.scheduler
    )
    long = "cat, dog " * 40  # more than either tokenizer takes
    text, pooled, _ = pipeline.encode_prompt([*PROMPTS, long], None, max_sequence_length=16)
    found = model.embed([*PROMPTS, long])
    torch.testing.assert_close(found["encoder_hidden_states"], text)
    torch.testing.assert_close(found["pooled_projections"], pooled)
    assert text.shape == (3, 16, T5_WIDTH) and found["guidance"].tolist() == [2.5] * 3


@pytest.mark.parametrize(("side", "steps", "mu"), [(512, 25, 0.63), (1024, 28, 1.15)])
def test_the_noise_levels_of_flux_1_dev(side, steps, mu):
    """The shift of an image of 1024 and of 4096 tokens, in closed form."""
    model = tiny_flux()
    model.multiple = 16  # of an autoencoder of 8 pixels per latent
    process = model.process(steps, (side, side))
    for i, timestep in enumerate(process.timesteps):
        s = 1 - i / steps
        sigma = math.exp(mu) * s / (1 + (math.exp(mu) - 1) * s)
        assert timestep.item() / 1000 == pytest.approx(sigma, rel=1e-5)
        alpha, level = process.level(timestep)
        assert (alpha.item(), level.item()) == pytest.approx((1 - sigma, sigma), rel=1e-5, abs=1e-6)
    assert model.process(steps).timesteps.equal(model.process(steps, (model.recipe.tile,) * 2).timesteps)


def test_noise_levels_follow_the_size_that_the_network_sees(lr):
    """The image's, or with tiles a tile's, which is what FLUX was trained with."""
    model, sizes = tiny_flux(), []
    process = model.process
    model.process = lambda n=None, size=None: sizes.append(size) or process(n, size)
    sample(model, lr[:1], [""], generators(0, [0]), 1)
    upscale(model, lr[0], num_inference_steps=1, tile=16, overlap=4, progress=False)
    assert sizes[0] == (32, 24) and set(sizes[1:]) == {(16, 16)}


def test_prompt_image_and_guidance_all_matter(model, lr):
    condition, latents = model.condition(lr, PROMPTS), torch.randn(2, 4, 16, 12)
    with torch.no_grad():
        output = model.predict(latents, torch.tensor(500.0), condition)
        other = tiny_flux(guidance=4.0)
        for changed in (
            model.predict(latents, torch.tensor(500.0), model.condition(lr, ["dog", "tree"])),
            model.predict(latents, torch.tensor(500.0), model.condition(1 - lr, PROMPTS)),
            other.predict(latents, torch.tensor(500.0), other.condition(lr, PROMPTS)),
        ):
            assert (changed - output).abs().max() > 1e-3


def test_true_guidance_on_top(model, lr):
    """A guidance_scale of the recipe is classifier-free: n + g (p − n)."""
    condition, latents = model.condition(lr, PROMPTS, ["dog", "dog"]), torch.randn(2, 4, 16, 12)
    process = model.process()
    with torch.no_grad():
        p, n = (model.predict(latents, process.timesteps[1], c) for c in (condition, condition.negative))
        guided = denoise(model, process, latents, process.timesteps[1], condition, 3.0)
    torch.testing.assert_close(guided, n + 3 * (p - n))
    assert (p - n).abs().max() > 1e-3


# -- reward feedback on a flow ----------------------------------------------------------------------------------------


def test_the_papers_windows_by_their_share_of_noise():
    """t ∈ [600, 1000] and [0, 200] of Stable Diffusion are steps 1–12 and 21–25 of 25 at 512²."""
    model = tiny_flux()
    model.multiple = 16
    process = model.process(25, (512, 512))
    windows = TimestepWindows.from_process(
        process, FLUX_RECIPE.structure_window, FLUX_RECIPE.reward_window, FLUX_RECIPE.window_unit
    )
    assert (windows.structure, windows.reward, windows.last) == ((1, 12), (21, 25), 25)


def test_the_estimate_of_a_flow(model, lr):
    """z_0 = z_t − σ u before every step, and Euler's next z_t is (1 − σ′) z_0 + σ′ (z_0 + u)."""
    condition = model.condition(lr, PROMPTS)
    states = list(trajectory(model, condition, generators(0, [0, 1]), 4))
    sigmas = [*(state.timestep.item() / 1000 for state, _ in states[:-1]), 0.0]
    assert sigmas[0] == 1.0
    for (state, estimate), (following, _), sigma, after in zip(states, states[1:], sigmas, sigmas[1:], strict=False):
        with torch.no_grad():
            flow = denoise(model, state.process, state.latents, state.timestep, condition)
        torch.testing.assert_close(estimate, state.latents - sigma * flow)
        line = (1 - after) * estimate + after * (estimate + flow)
        torch.testing.assert_close(following.latents, line, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("step", [1, 4])
def test_the_gradient_at_one_step(lr, step):
    """Of a decoded estimate, along a random direction of all trained weights, against a central difference."""
    model = tiny_flux().to("cpu", torch.float64)
    condition = model.condition(lr, PROMPTS)
    state = rollout(model, condition, step, generators(0, [0, 1]), 4)
    model.unfreeze()
    parameters = list(model.trained_parameters().values())
    generator = torch.Generator().manual_seed(1)
    ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def value():
        output = denoise(model, state.process, state.latents, state.timestep, condition)
        images = model.decode(state.process.pred_original_sample(output, state.timestep, state.latents))
        return images.square().mean()

    slope = sum((g * w).sum() for g, w in zip(torch.autograd.grad(value(), parameters), ways, strict=True))
    values = []
    with torch.no_grad():
        for side in (1e-5, -2e-5):  # one to the right, then two to the left
            torch._foreach_add_(parameters, ways, alpha=side)
            values.append(value())
    assert slope.abs() > 1e-6
    torch.testing.assert_close((values[0] - values[1]) / 2e-5, slope, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_training_by_reward_feedback(tmp_path, options):
    """Both windows are drawn, the reward rises, and what is written is what was trained."""
    model = tiny_flux()
    data, before = TinyData(), model.fingerprint()
    config = RFSRConfig.from_dict(
        {
            "crop_size": 32, "batch_size": 2, "structure_window": [0.84, 1.0], "reward_window": [0.0, 0.3],
            "window_unit": "noise", "lambda_structure": 1.0, "lambda_style": 0.1, "style_loss": "kl", "iterations": 4,
            "learning_rate": 3e-3, "ema_decay": 0.0, "validate_every": 4, "checkpoint_every": 4, "seed": 3,
            "output_dir": str(tmp_path / "run"), **options,
        }
    )  # fmt: skip
    result = RFSRTrainer(
        config, model, dataset=data, rewards=[WeightedReward(Brightness(), 1.0)],
        validation=[data[i] for i in range(500, 502)],
        judges={"darkness": lambda images, prompts: -images.mean((1, 2, 3))},
    ).train()  # fmt: skip
    assert {"structure", "reward"} == set(result.history["window"]) and not result.history["skipped"].any()
    assert result.validation["brightness"].iloc[-1] > result.validation["brightness"].iloc[0]
    assert result.model.fingerprint() != before
    both = result.model, load_model(tmp_path / "run" / "model")
    ours, again = (sample(m, data[500]["lr"][None], ["cat"], generators(0, [0])) for m in both)
    torch.testing.assert_close(ours, again)


def test_every_trained_weight_gets_a_gradient(model, lr):
    """Those that get none, of the text that leaves the ControlNet's last block, are not trained: see DDP's docs."""
    model = tiny_flux().unfreeze()
    condition, latents = model.condition(lr, PROMPTS), torch.randn(2, 4, 16, 12)
    model.predict(latents, torch.tensor(500.0), condition).square().mean().backward()
    trained = model.trained_parameters()
    assert all(p.grad is not None for p in trained.values())
    left = {f"controlnet.{n}" for n, p in model.networks["controlnet"].named_parameters()} - set(trained)
    assert {n.rpartition(".")[0] for n in left} == {
        f"controlnet.transformer_blocks.1.{n}" for n in ("ff_context.net.0.proj", "ff_context.net.2", "attn.to_add_out")
    }
    assert len(trained) + len(left) == sum(len(list(m.parameters())) for m in model.trainable_networks().values())


# -- text -------------------------------------------------------------------------------------------------------------


def test_prompts_are_embedded_once(lr, monkeypatch):
    model, calls = tiny_flux(), []
    encode = model.encode_prompts
    monkeypatch.setattr(model, "encode_prompts", lambda prompts: calls.append(prompts) or encode(prompts))
    both = model.embed(["cat", "", "cat"])
    again = model.embed(["", "dog"])
    assert calls == [["cat", ""], ["dog"]]
    for name in ("encoder_hidden_states", "pooled_projections"):
        assert torch.equal(both[name][0], both[name][2]) and torch.equal(both[name][1], again[name][0])
    model.embed([f"cat {i}" for i in range(70)])  # more than are kept
    assert calls.pop() == [f"cat {i}" for i in range(70)]
    model.embed(["", "cat 69"])
    assert calls.pop() == [""]


def test_the_text_encoders_have_a_device_of_their_own(lr):
    """By turns on one device; the meta device stands for one that has no room for them."""
    model = tiny_flux(text_device="cpu")
    found = model.embed(["cat"])
    model.text_device = "meta"
    model.to("cpu")
    devices = {name: next(m.parameters()).device.type for name, m in model.networks.items()}
    assert devices == {"vae": "cpu", "text_encoder": "meta", "text_encoder_2": "meta", "transformer": "cpu",
                       "controlnet": "cpu"}  # fmt: skip
    again = model.embed(["cat"])
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert sample(model, lr[:1], ["cat"], generators(0, [0]), 2).isfinite().all()


def test_a_tagger_gives_the_prompts(lr):
    model, seen = tiny_flux(), []
    model.tagger = lambda images: ["cat, fur"] * len(images)
    predict = model.predict
    model.predict = lambda z, t, c: seen.append(c.prompts) or predict(z, t, c)
    sample(model, lr, ["", "dog"], generators(0, [0, 1]), 1)
    assert seen == [["cat, fur", "cat, fur, dog"]]


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The authors' layout: FLUX.1-dev, and beside it a folder with the ControlNet's weights alone."""
    root = tmp_path_factory.mktemp("preset") / "models"
    parts = tiny_flux_parts(7, layers=4, heads=3, controlnet_layers=3)
    controlnet = parts.pop("controlnet")
    FluxPipeline(**parts).save_pretrained(root / "FLUX.1-dev")
    (root / "c-flux").mkdir()
    save_file(controlnet.state_dict(), root / "c-flux" / "model.safetensors")
    controlnet.save_pretrained(root / "controlnet")
    return root


def test_the_released_layout_opens(released, lr):
    model = FluxISRModel.from_released(released / "c-flux")
    assert model.recipe == FLUX_RECIPE and model.guidance == 2.5
    assert load_model("c-flux", weights=released).fingerprint() == model.fingerprint()
    own = FluxISRModel(**tiny_flux_parts(7, layers=4, heads=3, controlnet_layers=3))
    assert model.fingerprint() == own.fingerprint()
    a, b = (sample(m, lr, PROMPTS, generators(0, [0, 1]), 2) for m in (model, own))
    torch.testing.assert_close(a, b)
    joined = FluxISRModel.from_pretrained(released / "FLUX.1-dev", controlnet=released / "controlnet", guidance=3.5)
    assert joined.fingerprint() == model.fingerprint() and joined.guidance == 3.5
    half = FluxISRModel.from_released(
        released / "c-flux" / "model.safetensors", base=released / "FLUX.1-dev", torch_dtype=torch.bfloat16, scale=2,
        num_inference_steps=3, tagger=lambda images: ["cat"] * len(images),
    )  # fmt: skip
    assert {p.dtype for m in half.networks.values() for p in m.parameters()} == {torch.bfloat16}
    assert (half.scale, half.recipe.num_inference_steps, half.recipe.color_fix) == (2, 3, "adain")
    assert sample(half, lr[:1], [""], generators(0, [0])).isfinite().all()


def test_our_folder_is_an_ordinary_one(lr, tmp_path, stock):
    model = tiny_flux(3, guidance=1.5, trained={"controlnet": ""}, scale=2)
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert type(again) is FluxISRModel and again.fingerprint() == model.fingerprint()
    for name in ("recipe", "trained", "guidance", "scale", "max_sequence_length"):
        assert getattr(again, name) == getattr(model, name), name
    lr = lr[..., :8, :4]
    ours = sample(again, lr, PROMPTS, generators(0, [0, 1]), 3)
    pipeline = FluxControlNetPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.cat([torch.randn(1, 4, 8, 4, generator=g) for g in generators(0, [0, 1])])
    theirs = pipeline(
        PROMPTS, control_image=again.condition(lr, PROMPTS).image * 2 - 1, guidance_scale=1.5, max_sequence_length=16,
        latents=pipeline._pack_latents(noise, *noise.shape), height=16, width=8, num_inference_steps=3,
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda root: shutil.rmtree(root / "c-flux"), FileNotFoundError, "give the folder c-flux or dp2o-flux"),
        (lambda root: shutil.rmtree(root / "FLUX.1-dev"), FileNotFoundError, "base .* give the folder of FLUX.1"),
        (lambda root: shutil.rmtree(root / "FLUX.1-dev/vae"), FileNotFoundError, "vae folder .* does not exist"),
        (lambda root: shutil.rmtree(root / "FLUX.1-dev/tokenizer_2"), FileNotFoundError, "tokenizer_2 folder .* does"),
        (
            lambda root: (root / "FLUX.1-dev/scheduler/scheduler_config.json").unlink(),
            ValueError,
            "cannot be opened as Fl",
        ),
        (lambda root: truncate(root / "c-flux/model.safetensors"), ValueError, "weights .*c-flux.* cannot be read"),
        (lambda root: edit(root, {"more": torch.zeros(1)}), ValueError, "is not a Contr.* 1 unknown ones such as more"),
        (lambda root: edit(root, {"x_embedder.bias": None}), ValueError, "lacks 1 tensors such as x_embedder.bias"),
        (
            lambda root: edit(root, {"x_embedder.bias": torch.zeros(7)}),
            ValueError,
            r"must have shape \[48\], got \[7\]",
        ),
        (lambda root: edit(root, tiny_parts()["controlnet"].state_dict(), {}), ValueError, "is not a ControlNet of"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_a_sentence(released, tmp_path, change, error, message):
    shutil.copytree(released, tmp_path / "models")
    change(tmp_path / "models")
    with pytest.raises(error, match=message) as found:
        FluxISRModel.from_released(tmp_path / "models" / "c-flux")
    assert "\n" not in str(found.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(root, changes, tensors=None):
    """Replace tensors in the released file; None takes one out."""
    path = root / "c-flux" / "model.safetensors"
    tensors = (load_file(path) if tensors is None else tensors) | changes
    save_file({name: t.clone() for name, t in tensors.items() if t is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder_2": {"d_model": 16}}, "text_encoder_2 d_model must be 24 to fit the transformer, got 16; give"),
        ({"scheduler": None}, "scheduler must be a FlowMatchEulerDiscreteScheduler, got DDIMScheduler"),
        ({"trained": {"text_encoder": ""}}, "trained must not name 'text_encoder'"),
        ({"trained": {"unet": ""}}, "trained must name networks among vae, .* got 'unet'"),
    ],
)
def test_parts_must_fit(changes, message):
    parts = tiny_flux_parts()
    if "text_encoder_2" in changes:
        parts["text_encoder_2"].config.d_model = 16
    if "scheduler" in changes:
        parts["scheduler"] = sd_scheduler()
    with pytest.raises(ValueError, match=message):
        FluxISRModel(**parts, trained=changes.get("trained"))


def test_full_size(monkeypatch, tmp_path):
    """C-FLUX opens from the names and shapes that the public classes give it; every weight is counted."""
    tokenizers = {name: part for name, part in tiny_flux_parts().items() if "token" in name or name == "scheduler"}
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    t5 = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=19, num_single_layers=38, guidance_embeds=True)
        controlnet = FluxControlNetModel.from_transformer(transformer, 4, 0, load_weights_from_transformer=False)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
        )  # fmt: skip
        parts = {"vae": vae, "text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}
    parts |= {"transformer": transformer} | tokenizers
    monkeypatch.setattr(flux, "_open_parts", lambda path, dtype: dict(parts))
    monkeypatch.setattr(flux, "read_controlnet", lambda *_: (Path("c-flux/model.safetensors"), controlnet.state_dict()))
    model = FluxISRModel.from_released("c-flux", base=tmp_path)
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in model.networks.items()}
    d = 3072
    block = 2 * (6 * d * d + 6 * d) + 8 * (d * d + d) + 4 * 128 + 2 * (8 * d * d + 5 * d)
    embedders = 2 * (256 * d + d + d * d + d) + 768 * d + d + d * d + d  # of time, guidance and CLIP's summary
    rest = 4096 * d + d + 2 * (64 * d + d) + 4 * (d * d + d)  # of T5's text, latents and control; the blocks' outputs
    assert counts == {
        "vae": 83_819_683, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656, "transformer": 11_901_408_320,
        "controlnet": 4 * block + embedders + rest,
    }  # fmt: skip
    assert (model.multiple, model.latent_channels) == (16, 16)
