import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from rfsr_ext.data import evaluation_crops
from rfsr_ext.evaluation import compare, evaluate, evaluate_bicubic, measure_trajectory, summarize
from rfsr_ext.metrics import band_ssim, psnr, ssim
from rfsr_ext.models import ISRModel, Recipe
from rfsr_ext.sampling import generators
from tests.tiny import sd_scheduler


class NoisyBicubic(ISRModel):
    """Bicubic interpolation with a little of the initial noise left in it."""

    scale, multiple, latent_channels, vae_scale_factor = 4, 8, 3, 1

    def __init__(self, strength=0.02):
        self.networks, self.trained = {"network": torch.nn.Linear(1, 1)}, {"network": ""}
        self.recipe = Recipe(num_inference_steps=5, start="noise")
        # to the very end: Stable Diffusion's own setting leaves the noise of the first timestep in the result
        self.scheduler = DDIMScheduler.from_config(sd_scheduler().config, set_alpha_to_one=True)
        self.strength = strength
        super().__init__()

    def initial_latents(self, condition, process, generator=None):
        noise = super().initial_latents(condition, process, generator)
        self.image = condition.image + self.strength * noise
        return noise

    def predict(self, latents, timestep, condition):
        alpha_bar = self.scheduler.alphas_cumprod[timestep]  # the velocity that leads to self.image
        return (alpha_bar.sqrt() * latents - self.image) / (1 - alpha_bar).sqrt()

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents


@pytest.fixture(scope="module")
def samples():
    return evaluation_crops(["coffee", "chelsea", "flower"], 32, 5)


def brightness(images, prompts):
    assert images.min() >= 0 and images.max() <= 1 and not images.requires_grad
    return images.mean((1, 2, 3))


def words(images, prompts):
    return torch.tensor([float(len(prompt.split())) for prompt in prompts], requires_grad=True) + 0 * images.mean()


SCORERS = {"brightness": brightness, "words": words}


@pytest.fixture(scope="module")
def frame(samples):
    return evaluate(NoisyBicubic(), samples, SCORERS, seeds=(0, 3), name="noisy")


def test_evaluate_measures_what_it_says(samples, frame):
    assert list(frame.columns) == [
        "model", "image", "seed", "prompt", "psnr", "ssim", "low_ssim", "high_ssim", "brightness", "words",
    ]  # fmt: skip
    assert sorted(zip(frame.image, frame.seed, strict=True)) == [(i, s) for i in range(5) for s in (0, 3)]
    assert (frame.model == "noisy").all()
    for row in frame.itertuples():
        sample = samples[row.image]
        noise = torch.randn(3, 32, 32, generator=generators(row.seed, [row.image])[0])
        upscaled = F.interpolate(sample["lr"][None], scale_factor=4, mode="bicubic").clamp(0, 1)
        sr, gt = (upscaled + 0.02 * noise).clamp(0, 1), sample["gt"][None]
        low, high = band_ssim(sr, gt)
        expected = [x.item() for x in (psnr(sr, gt), ssim(sr, gt), low, high, sr.mean())]
        found = [row.psnr, row.ssim, row.low_ssim, row.high_ssim, row.brightness]
        assert found == pytest.approx(expected, abs=2e-3)
        assert row.prompt == sample["prompt"] and row.words == len(sample["prompt"].split())


def test_noise_does_not_depend_on_the_batch_size(samples, frame):
    other = evaluate(NoisyBicubic(), samples, SCORERS, seeds=(0, 3), batch_size=2, name="noisy")
    pd.testing.assert_frame_equal(frame, other, check_exact=False, atol=1e-5)


def test_seeds_differ(frame):
    values = frame.set_index(["image", "seed"]).psnr.unstack()
    assert (values[0] != values[3]).all()


def test_steps_are_passed_on(samples):
    model, calls = NoisyBicubic(), []
    predict = model.predict
    model.predict = lambda z, t, c: calls.append(int(t)) or predict(z, t, c)
    evaluate(model, samples[:1], {}, num_inference_steps=3)
    assert len(calls) == 3


def test_bicubic(samples):
    frame = evaluate_bicubic(samples, SCORERS, 4)
    assert len(frame) == 5 and (frame.model == "bicubic").all() and frame.seed.isna().all()
    upscaled = F.interpolate(samples[2]["lr"][None], scale_factor=4, mode="bicubic").clamp(0, 1)
    assert frame.psnr[2] == pytest.approx(psnr(upscaled, samples[2]["gt"][None]).item(), abs=1e-4)


def test_progress(samples, capsys):
    evaluate(NoisyBicubic(), samples, {}, seeds=(0, 1), name="noisy")
    err = capsys.readouterr().err
    assert "evaluate noisy" in err and "/10" in err


@pytest.mark.parametrize("measure", [
    lambda samples: evaluate(NoisyBicubic(), samples, {}),
    lambda samples: evaluate_bicubic(samples, {}, 4),
    lambda samples: measure_trajectory(NoisyBicubic(), samples),
])  # fmt: skip
def test_rejects_samples(samples, measure):
    with pytest.raises(ValueError, match="samples must hold at least one sample, got none"):
        measure([])
    with pytest.raises(ValueError, match="samples must all have the same size, got several"):
        measure([*samples, *evaluation_crops(["coffee"], 64, 1)])


# -- tables -----------------------------------------------------------------------------------------------------------


def table(model, values):
    """``values`` of ``(image, seed)``."""
    return pd.DataFrame(
        [{"model": model, "image": i, "seed": s, "prompt": "", "psnr": v} for (i, s), v in values.items()]
    ).astype({"seed": "Int64"})


A = {(0, 0): 20.0, (0, 1): 22.0, (1, 0): 30.0, (1, 1): 30.0, (2, 0): 25.0, (2, 1): 27.0}
B = {(0, 0): 21.0, (0, 1): 23.0, (1, 0): 33.0, (1, 1): 31.0, (2, 0): 25.0, (2, 1): 27.0}


def test_summarize_averages_seeds_before_images():
    summary = summarize(pd.concat([table("a", A), table("b", B)]))
    assert list(summary.index) == [("a", "psnr"), ("b", "psnr")]
    mean, error, n = summary.loc[("a", "psnr"), ["mean", "standard_error", "n"]]
    assert mean == pytest.approx((21 + 30 + 26) / 3) and n == 3
    assert error == pytest.approx(np.std([21, 30, 26], ddof=1) / math.sqrt(3))


def test_summarize_lists_every_metric(frame):
    summary = summarize(frame)
    assert list(summary.loc["noisy"].index) == ["psnr", "ssim", "low_ssim", "high_ssim", "brightness", "words"]
    assert list(summary.columns) == ["mean", "standard_error", "n"]


def test_compare_is_paired():
    """Images differ by 10 dB, the models by 1: only pairing shows it."""
    row = compare(pd.concat([table("a", A), table("b", B)]), "a", "b").loc["psnr"]
    differences = [1.0, 2.0, 0.0]
    error = np.std(differences, ddof=1) / math.sqrt(3)
    assert row.difference == pytest.approx(1) and row.standard_error == pytest.approx(error)
    assert row.ratio == pytest.approx(1 / error) and row.n == 3


def test_compare_goes_both_ways_and_ignores_order():
    frame = pd.concat([table("b", B), table("a", A)]).sample(frac=1, random_state=0)
    there, back = compare(frame, "a", "b"), compare(frame, "b", "a")
    assert there.difference["psnr"] == pytest.approx(1) and back.difference["psnr"] == pytest.approx(-1)


def test_compare_with_bicubic(samples, frame):
    both = pd.concat([frame, evaluate_bicubic(samples, SCORERS, 4)])
    result = compare(both, "bicubic", "noisy")
    assert result.difference["psnr"] < 0 and result.difference["words"] == 0
    assert (result.n == 5).all()


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (table("b", {(0, 0): 1.0}), r"models must be measured on the same images, got \[.*0.*1.*2.*\] for 'a'"),
        (table("b", {(i, 0): 1.0 for i in range(3)}), r"models must be .* same seeds, got .*0.*1.* for 'a'"),
        (table("c", B), r"model must be one of \['a', 'c'\], got 'b'"),
    ],
)
def test_compare_rejects(b, message):
    with pytest.raises(ValueError, match=message):
        compare(pd.concat([table("a", A), b]), "a", "b")


def test_one_image_has_no_standard_error():
    assert np.isnan(summarize(table("a", {(0, 0): 1.0})).standard_error.item())


def of_one_metric(differences):
    zeros = {(i, 0): 0.0 for i in range(len(differences))}
    both = [table("a", zeros), table("b", {(i, 0): float(d) for i, d in enumerate(differences)})]
    return pd.concat(both)


def test_bootstrap_of_two_images_is_known_exactly():
    """Means of two draws out of {0, 1}: 0, ½ and 1 with probabilities ¼, ½ and ¼."""
    frame = of_one_metric([0, 1])
    ends = {level: compare(frame, "a", "b", level).loc["psnr", ["low", "high"]].tolist() for level in (0.4, 0.9)}
    assert ends == {0.4: [0.5, 0.5], 0.9: [0.0, 1.0]}


def test_bootstrap_of_many_images_is_the_normal_interval():
    differences = np.random.default_rng(1).normal(0.3, 1, 400)
    row = compare(of_one_metric(differences), "a", "b").loc["psnr"]
    error = differences.std() / math.sqrt(400)  # the bootstrap's own variance is that of the sample, not n − 1
    assert row.low == pytest.approx(row.difference - 1.96 * error, abs=0.05 * 1.96 * error)
    assert row.high == pytest.approx(row.difference + 1.96 * error, abs=0.05 * 1.96 * error)


def test_bootstrap_is_paired_and_repeatable():
    frame = pd.concat([table("a", A), table("b", B)])
    first, second = compare(frame, "a", "b"), compare(frame, "a", "b")
    pd.testing.assert_frame_equal(first, second)
    assert 0 <= first.low["psnr"] <= 1 <= first.high["psnr"] <= 2  # images differ by 10 dB, their differences by 2


def test_a_suite_adds_its_metrics_and_says_which(samples):
    from rfsr_ext.metrics import Preset, Suite

    preset = Preset("luma", ("psnr", "judge"), "y", 4)
    frame = evaluate(NoisyBicubic(), samples, SCORERS, name="noisy", suite=Suite(preset))
    plain = evaluate(NoisyBicubic(), samples, SCORERS, name="noisy")
    assert set(frame.preset) == {preset.label} and "preset" not in plain
    assert (frame.psnr != plain.psnr).all() and (frame.ssim == plain.ssim).all()
    assert frame.judge.notna().all() and "judge" in summarize(frame).loc["noisy"].index


# -- trajectories -----------------------------------------------------------------------------------------------------


def test_trajectory(samples):
    frame = measure_trajectory(NoisyBicubic(), samples, seeds=(0, 1), batch_size=2, name="noisy")
    assert list(frame.columns) == ["model", "image", "seed", "step", "timestep", "low_ssim", "high_ssim", "psnr"]
    assert len(frame) == 5 * 2 * 5 and not frame.duplicated(["image", "seed", "step"]).any()
    assert frame.groupby("step").timestep.unique().explode().tolist() == [801, 601, 401, 201, 1]
    # this model knows its image from the start, and the evaluation sees the same one
    ends = evaluate(NoisyBicubic(), samples, {}, seeds=(0, 1))
    for _, step in frame.groupby("step"):
        merged = step.merge(ends, on=["image", "seed"], suffixes=("", "_end"))
        assert len(merged) == 10
        np.testing.assert_allclose(merged.psnr, merged.psnr_end, rtol=0, atol=1e-2)
        np.testing.assert_allclose(merged.low_ssim, merged.low_ssim_end, rtol=0, atol=1e-3)
        np.testing.assert_allclose(merged.high_ssim, merged.high_ssim_end, rtol=0, atol=1e-3)


def test_trajectory_of_some_steps(samples):
    whole = measure_trajectory(NoisyBicubic(), samples)
    some = measure_trajectory(NoisyBicubic(), samples, steps=(1, 4))
    pd.testing.assert_frame_equal(some, whole[whole.step.isin((1, 4))].reset_index(drop=True))
