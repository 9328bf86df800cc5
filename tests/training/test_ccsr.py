"""CCSR's two stages on the tiny model."""

import time

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from rfsr_ext.evaluation.stability import Spread
from rfsr_ext.losses import PatchDiscriminator, VGGFeatureLoss
from rfsr_ext.models import load_model
from rfsr_ext.sampling import generators, sample
from rfsr_ext.training import RunConfig, load_config
from rfsr_ext.training.ccsr import (
    CCSRConfig,
    CCSRStage1Config,
    CCSRStage2Config,
    CCSRStageTrainer,
    CCSRTrainer,
    Consistency,
    DecoderTuning,
)
from tests import launching
from tests.tiny import tiny_model
from tests.training import run_ccsr
from tests.training.conftest import FewSamples, Pixels, TinyData
from tests.training.run_ccsr import METHODS, SHARED, make, run
from tests.training.test_loop import assert_same_state, end_state


def batch(count=2):
    found = [TinyData()[i] for i in range(count)]
    return {k: torch.stack([s[k] for s in found]) for k in ("lr", "gt")} | {"prompt": [s["prompt"] for s in found]}


def weights(model):
    return {f"{n}.{k}": p.detach().clone() for n, m in model.networks.items() for k, p in m.named_parameters()}


def moved(model, before):
    return {name for name, p in weights(model).items() if not torch.equal(p, before[name])}


# -- stage 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "prediction"), [("v1", "epsilon"), ("v2", "v_prediction")])
def test_consistency_is_the_formula(variant, prediction):
    """Against α and σ of Stable Diffusion's schedule, written out here in double precision."""
    model = tiny_model()
    model.scheduler = type(model.scheduler).from_config(model.scheduler.config, prediction_type=prediction)
    method = Consistency(CCSRStage1Config(variant=variant, lambda_consistency=0.5), model)
    loss, logs = method.loss("model", batch(), 0, [4, 5])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    z = model.encode(batch()["gt"])
    noise, first, second, timesteps = method._draw(z, [4, 5])
    assert timesteps.max() < 667 and not torch.equal(first, second)
    condition = model.condition(batch()["lr"], batch()["prompt"])

    def noised(x, noise, t):
        a = alpha_bar[t].reshape(-1, 1, 1, 1)
        return (a.sqrt() * x + (1 - a).sqrt() * noise).float()

    def estimates(z_t, t):
        output, a = model.predict(z_t, torch.as_tensor(t), condition), alpha_bar[t].reshape(-1, 1, 1, 1)
        if prediction == "epsilon":
            return output, (z_t - (1 - a).sqrt() * output) / a.sqrt(), output
        return output, a.sqrt() * z_t - (1 - a).sqrt() * output, (1 - a).sqrt() * z_t + a.sqrt() * output

    a = alpha_bar[timesteps].reshape(-1, 1, 1, 1)
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
    output, _, _ = estimates(noised(z, noise, timesteps), timesteps)
    _, at_T, _ = estimates(noised(z, first, 999), 999)
    _, at_t_max, found_noise = estimates(noised(at_T, second, 667), 667)
    terms = {"denoising": (output - target).square().mean(), "at_T": (at_T - z).square().mean()}
    terms["at_t_max"] = (at_t_max - z).square().mean()
    if variant == "v1":
        terms["noise_at_t_max"] = (found_noise - second).square().mean()
    assert logs.keys() == {"loss", *terms}
    for name, term in terms.items():
        assert logs[name].item() == pytest.approx(term.item(), rel=1e-4)
    expected = terms["denoising"] + 0.5 * sum(v for k, v in terms.items() if k != "denoising")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()  # the ControlNet alone, and each of its parameters
    assert not any(p.grad is not None for n, m in model.networks.items() if n != "controlnet" for p in m.parameters())
    assert all(p.grad is not None for p in model.controlnet.parameters() if p.requires_grad)
    last = Consistency(CCSRStage1Config(variant=variant, start="lr"), model).loss("model", batch(), 0, [4, 5])[1]
    assert last["at_T"] != logs["at_T"] and last["denoising"] == logs["denoising"]


def test_noise_does_not_depend_on_how_a_batch_is_cut():
    method = Consistency(CCSRStage1Config(), tiny_model())
    z = torch.zeros(2, 4, 16, 16)
    both, second = method._draw(z, [6, 7]), method._draw(z[1:], [7])
    assert all(torch.equal(a[1:], b) for a, b in zip(both, second, strict=True))


def test_the_second_term_reaches_the_first_evaluation():
    """Gradient through the leap: with the first output's graph cut it is another one."""
    model = tiny_model()
    method = Consistency(CCSRStage1Config(), model)
    z = model.encode(batch()["gt"])
    condition = model.condition(batch()["lr"], batch()["prompt"])
    parameter = model.controlnet.conv_in.weight
    found = []
    for cut in (False, True):
        _, leapt = method.estimate(torch.ones_like(z), 999, condition)
        leapt = leapt.detach() if cut else leapt
        _, truncated = method.estimate(method.process.add_noise(leapt, z, 667), 667, condition)
        found.append(torch.autograd.grad(F.mse_loss(truncated, z), parameter)[0])
    assert (found[0] - found[1]).norm() > 1e-3 * found[1].norm()


def test_stage_1_teaches_the_first_estimate(tmp_path):
    """An untrained model's estimate at T becomes better than it was, and the folder is an ordinary one."""
    trainer = make("stage1", tmp_path, iterations=12, learning_rate=3e-3, checkpoint_every=12)
    before = weights(trainer.model)
    result = trainer.train()
    terms = result.history["at_T"]
    assert terms.tail(3).mean() < 0.9 * terms.head(3).mean()
    assert {name.partition(".")[0] for name in moved(trainer.model, before)} == {"controlnet"}
    validation = result.validation
    assert list(validation["iteration"]) == [0, 12] and (validation["l_std"] > 0).all()
    assert {"psnr", "distance", "g_std_psnr", "g_std_darkness"} <= set(validation)
    again = load_model(tmp_path / "model")
    assert again.recipe == trainer.model.recipe and again.trained == {"unet": "", "controlnet": ""}


# -- stage 2 ----------------------------------------------------------------------------------------------------------


def test_decoder_losses_are_the_formula():
    model, config = tiny_model(0, 6, spacing="ccsr-v2", t_min=0.5), METHODS["stage2"]["config"]
    config = CCSRStage2Config(**SHARED | config | {"lambda_reconstruction": 2.0, "lambda_perceptual": 0.3})
    discriminator = PatchDiscriminator(4, 1, "group")
    method = DecoderTuning(config, model, discriminator)
    loss, logs = method.loss("decoder", batch(), 3, [6, 7])
    with torch.no_grad():
        images = sample_unclamped(model, batch(), generators(0, [6, 7]))
    images.requires_grad_()
    target = batch()["gt"] * 2 - 1
    l1 = (images - target).abs().mean()
    perceptual = VGGFeatureLoss("random", ("conv1_2", "conv2_2", "conv3_4"))(images / 2 + 0.5, batch()["gt"])
    rest, adversarial = 2 * l1 + 0.3 * perceptual, -discriminator(images).mean()
    # at the last convolution: x = W h, so that ∇_W of a loss is the correlation of its image gradient with h
    latents, _ = method.estimates(batch(), [6, 7])
    latents = latents / model.scaling_factor
    hidden = []
    hook = model.vae.decoder.conv_out.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    model.vae.decode(latents)
    hook.remove()
    norms = []
    for term in (rest, adversarial):
        (gradient,) = torch.autograd.grad(term, images, retain_graph=True)
        shape = model.vae.decoder.conv_out.weight.shape
        norms.append(torch.nn.grad.conv2d_weight(hidden[0], shape, gradient, padding=1).norm())
    weight = norms[0] / (norms[1] + 1e-4)
    assert logs["l1"].item() == pytest.approx(l1.item(), rel=1e-4)
    assert logs["perceptual"].item() == pytest.approx(perceptual.item(), rel=1e-3)
    assert logs["weight"].item() == pytest.approx(weight.item(), rel=2e-3)
    assert loss.item() == pytest.approx((rest + 0.5 * weight * adversarial).item(), rel=2e-3)
    found, _ = method.loss("discriminator", batch(), 3, [6, 7])
    real, fake = discriminator(target), discriminator(images)
    assert found.item() == pytest.approx((F.relu(1 - real).mean() + F.relu(1 + fake).mean()).item() / 2, rel=1e-4)
    early, logs = method.loss("decoder", batch(), 0, [0, 1])  # before adversarial_start
    assert logs.keys() == {"loss", "l1", "perceptual"}


def sample_unclamped(model, batch, noise):
    """What the model makes of it, in [−1, 1]: decoded by the model's own decoder."""
    from rfsr_ext.sampling import trajectory

    *_, (_, latents) = trajectory(model, model.condition(batch["lr"], batch["prompt"]), noise)
    return model.decode(latents) * 2 - 1


def test_stage_2_tunes_the_decoder_alone(tmp_path):
    trainer = make("stage2", tmp_path, iterations=4, learning_rate=3e-3, checkpoint_every=4, lambda_adversarial=0.0)
    model, before = trainer.model, weights(trainer.model)
    result = trainer.train()
    assert {n.rpartition(".")[0].split(".")[1] for n in moved(model, before)} == {"decoder", "post_quant_conv"}
    assert {n.partition(".")[0] for n in moved(model, before)} == {"vae"}
    assert result.history["decoder/loss"].iloc[-1] < 0.95 * result.history["decoder/loss"].iloc[0]
    assert result.validation["distance"].iloc[-1] < result.validation["distance"].iloc[0]
    assert result.best_iteration == 4 and result.history["discriminator/loss"].notna().all()

    tuned = load_model(tmp_path / "model")  # an ordinary folder, whose VAE works with another U-Net
    assert tuned.recipe.spacing == "ccsr-v2" and len(tuned.process()) == 2 and len(tuned.process(1)) == 1
    torch.testing.assert_close(weights(tuned), weights(model))
    other = tiny_model(1)
    other.networks["vae"] = tuned.vae
    assert sample(other, batch()["lr"], ["", ""], generators(0, [0, 1]), 2).isfinite().all()


def test_one_set_of_weights_serves_any_number_of_steps():
    model = tiny_model(0, 6, spacing="ccsr-v2", t_min=0.5)
    spreads = {}
    for steps in (1, 6, 20):
        spreads[steps] = Spread()
        for seed in range(2):
            spreads[steps].add([0], sample(model, batch(1)["lr"], [""], generators(seed, [0]), steps))
    assert all(spread.l_std()[0] > 0 for spread in spreads.values())


def test_dino_from_folders(tmp_path):
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    size = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 112}
    ViTModel(ViTConfig(**size, image_size=224, intermediate_size=8), add_pooling_layer=False).save_pretrained(
        tmp_path / "dino"
    )
    Dinov2Model(Dinov2Config(**size | {"patch_size": 259}, image_size=518)).save_pretrained(tmp_path / "dinov2")
    config = METHODS["stage2"]["config"] | {"discriminator": "dino", "dino": str(tmp_path / "dino")}
    config |= {"dino_condition": str(tmp_path / "dinov2")}
    method = DecoderTuning(CCSRStage2Config(**SHARED | config), tiny_model(0, 2))
    for player in ("decoder", "discriminator"):
        loss, logs = method.loss(player, batch(), 4, [8, 9])
        loss.backward()
        assert loss.isfinite()
    heads = method.players["discriminator"]["discriminator"].heads
    assert all(p.grad is not None for p in heads.parameters())
    with pytest.raises(FileNotFoundError, match="dino_condition folder .*dinov3' does not exist"):
        DecoderTuning(CCSRStage2Config(**SHARED | config | {"dino_condition": f"{tmp_path}/dinov3"}), tiny_model())
    with pytest.raises(ValueError, match="dinov2' is no ViTModel|dinov2' cannot be opened as ViTModel"):
        DecoderTuning(CCSRStage2Config(**SHARED | config | {"dino": f"{tmp_path}/dinov2"}), tiny_model())


# -- both, and what is refused ----------------------------------------------------------------------------------------


def test_presets_hold_the_published_settings():
    first, second = load_config("ccsr-v1").stages()
    assert (first.variant, first.learning_rate, first.batch_size, first.iterations) == ("v1", 1e-4, 16 * 4 * 3, 25000)
    assert (second.learning_rate, second.adam_betas, second.batch_size) == (5e-6, (0.5, 0.9), 16 * 4 * 8)
    assert (second.lambda_adversarial, second.adaptive_weight, second.discriminator_norm) == (0.5, True, "batch")
    assert second.model == "runs/ccsr-v1/stage1/model" and second.model_options == {}
    first, second = load_config("ccsr-v2").stages()
    assert (first.variant, first.learning_rate, first.batch_size, first.iterations) == ("v2", 5e-5, 4 * 4 * 6, 20000)
    assert (second.learning_rate, second.batch_size, second.iterations) == (5e-6, 2 * 4 * 8, 2000)
    assert (second.discriminator, second.lambda_adversarial, second.adversarial_start) == ("dino", 0.05, 100)
    assert second.num_inference_steps == 1 and second.reconstruction_loss == "l2"
    mini = load_config("ccsr-mini", {"stage1": None, "model": "runs/demo/model", "output_dir": "x"})
    (only,) = mini.stages()
    assert (only.model, only.output_dir, only.perceptual_loss) == ("runs/demo/model", "x/stage2", "vgg-random")


def test_both_in_a_row_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr("rfsr_ext.training.setup.load_model", lambda name, **options: (
        tiny_model(0, 6, spacing="ccsr-v2", t_min=0.5) if name == "mini" else load_model(name, **options)
    ))  # fmt: skip
    monkeypatch.setattr("rfsr_ext.training.setup.build_dataset", lambda config: TinyData())
    held_out = [TinyData()[i] for i in range(500, 502)]
    monkeypatch.setattr("rfsr_ext.training.setup.build_validation", lambda config, model: held_out)
    shared = {k: v for k, v in SHARED.items() if k in RunConfig.model_fields}
    own = {name: METHODS[name]["config"] | {"validation_distance": "vgg-random"} for name in METHODS}
    config = CCSRConfig(**shared | {"iterations": 2}, **own, output_dir=str(tmp_path))
    result = CCSRTrainer(config).train()
    assert result.folder == tmp_path / "stage2" and (tmp_path / "stage1/model/model_index.json").is_file()
    assert result.summary.startswith(f"fine-tuned model: {tmp_path / 'stage2/model'}")
    ended = end_state(tmp_path / "stage2")
    longer = CCSRTrainer(config.replace(stage2=own["stage2"] | {"iterations": 3})).train()  # goes on with the second
    assert len(longer.history) == 3 and end_state(tmp_path / "stage2")[1]["iteration"] == 3
    assert ended[1]["fingerprint"] != end_state(tmp_path / "stage1")[1]["fingerprint"]


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        (lambda: CCSRConfig(stage1=None, stage2=None), "stage1 or stage2 must be a mapping, .* got null"),
        (lambda: CCSRConfig(stage1={"t_mx": 0.5}), "^stage1: unknown key 't_mx'; did you mean 't_max'"),
        (
            lambda: CCSRConfig(stage2={"discriminator": "dino"}),
            "^stage2: dino must be the folder of .*got None for dino",
        ),
        (lambda: CCSRStage2Config(dino="x"), "and null for patch, got 'x' for patch"),
        (lambda: CCSRStage1Config(t_max=1), "t_max must be a finite number .*below 1.*, got 1"),
        (lambda: Consistency(CCSRStage1Config(t_max=0.0001), tiny_model()), "t_max must lead to .*, 999, got 0.0001"),
        (lambda: Consistency(CCSRStage1Config(trained={"unte": ""}), tiny_model()), "among vae, .*, got 'unte'"),
        (
            lambda: Consistency(CCSRStage1Config(trained={"unet": "none"}), tiny_model()),
            r"trained\['unet'\] must match",
        ),
        (lambda: DecoderTuning(CCSRStage2Config(), Pixels()), "'vae' that is an AutoencoderKL .*, got Pixels with net"),
        (lambda: CCSRStageTrainer(CCSRStage1Config(lora_rank=4)), "lora_rank must be 0 for ccsr-stage1, .*, got 4"),
        (
            lambda: CCSRStageTrainer(CCSRStage1Config(crop_size=32), tiny_model(), dataset=FewSamples(3)),
            "dataset must give a sample for every index",
        ),
    ],
)
def test_refusals(refused, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        refused()
    assert "\n" not in str(error.value)


def test_lpips_without_its_package_or_weights_is_one_sentence(no_weights):
    with pytest.raises((ModuleNotFoundError, FileNotFoundError), match="pyiqa|lpips-vgg|vgg16") as error:
        DecoderTuning(CCSRStage2Config(), tiny_model())
    assert "\n" not in str(error.value)


# -- interruptions and processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", METHODS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, stage):
    make(stage, tmp_path / "whole", iterations=3).loop.train()
    make(stage, tmp_path / "cut", iterations=2).loop.train()
    make(stage, tmp_path / "cut", iterations=3).loop.train()
    assert_same_state(end_state(tmp_path / "whole"), end_state(tmp_path / "cut"))


@pytest.mark.parametrize("stage", METHODS)
def test_accumulated_parts_equal_one_batch(tmp_path, stage):
    """But for the adaptive weight, which each part has of its own, as in the authors' code."""
    changes = {"iterations": 2} | ({"adaptive_weight": False} if stage == "stage2" else {})
    one = make(stage, tmp_path / "one", **changes).loop.train()
    cut = make(stage, tmp_path / "cut", **changes, gradient_accumulation_steps=2).loop.train()
    columns = [name for name in one if name.endswith(("loss", "grad_norm"))]
    pd.testing.assert_frame_equal(one[columns], cut[columns], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", METHODS)
def test_killed_it_resumes_to_the_same_bits(tmp_path, stage):
    run(stage, tmp_path / "whole", 12)
    process = launching.start_alone(run_ccsr.__file__, stage, tmp_path / "killed", 12)
    while process.poll() is None and not list((tmp_path / "killed").glob("checkpoints/iteration-000003*")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -9 and end_state(tmp_path / "killed")[1]["iteration"] < 12
    launching.ended_well(launching.start_alone(run_ccsr.__file__, stage, tmp_path / "killed", 12))
    assert_same_state(end_state(tmp_path / "whole"), end_state(tmp_path / "killed"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", METHODS)
def test_two_processes_train_as_one(tmp_path, stage):
    """The adaptive weight too, whose gradients are averaged over processes; the script asserts that there are two.

    A gradient's norm is that of the whole batch only where the processes have exchanged theirs.  Weights are not
    compared: Adam's first steps have one size, so that those of gradients near zero are made of rounding.
    """
    one = run(stage, tmp_path / "one", 4)
    launching.ended_well(launching.start("ddp.yaml", run_ccsr.__file__, stage, tmp_path / "two", 4, 2))
    assert {path.name for path in (tmp_path / "two").glob("ended-*")} == {"ended-0", "ended-1"}
    two = pd.read_csv(tmp_path / "two" / "history.csv")
    columns = [name for name in one if name.endswith(("loss", "grad_norm", "weight"))]
    pd.testing.assert_frame_equal(one[columns], two[columns], rtol=1e-3)
