"""The table of ways against NumPy."""

import itertools

import numpy as np
import pandas as pd
import pytest

from rfsr_ext.evaluation.best_of import best_of
from rfsr_ext.evaluation.ways import best_of_ways, markdown_table, reward_ways, ways_table
from rfsr_ext.rewards.ranking import HybridReward

SEEDS, IMAGES, NOISES = 3, 4, 5


@pytest.fixture(scope="module")
def values():
    """By column an array ``[way, training seed, image, noise]``; of the base model the first seed is all there is."""
    draw = np.random.default_rng(0)
    shape = (2, SEEDS, IMAGES, NOISES)
    found = {"psnr": draw.normal(24, 1, shape), "error": draw.normal(0, 1, shape)}
    found["l_std"] = np.broadcast_to(draw.random(shape[:3])[..., None], shape)
    for name in ("seconds_per_image", "training_seconds", "iterations"):
        found[name] = np.broadcast_to(draw.random(shape[:2])[..., None, None], shape)
    return found


@pytest.fixture(scope="module")
def frame(values):
    keys = itertools.product(range(2), range(SEEDS), range(IMAGES), range(NOISES))
    rows = [
        {"model": ("base", "way")[k[0]], "training_seed": k[1], "image": k[2], "seed": k[3], "prompt": ""}
        | {name: x[k] for name, x in values.items()}
        for k in keys if k[0] or not k[1]
    ]  # fmt: skip
    return reward_ways(pd.DataFrame(rows), HybridReward(("psnr",), ("error",)), ["error"])


@pytest.fixture(scope="module")
def reward(values):
    """By the smallest and largest score that an image has from any way, seed and noise."""
    scaled = []
    for name, sign in (("psnr", 1), ("error", -1)):
        score = sign * values[name]
        known = [np.concatenate([score[0, 0, i], score[1, :, i].ravel()]) for i in range(IMAGES)]
        low, high = (np.array([f(x) for x in known])[:, None] for f in (np.min, np.max))
        scaled.append((score - low) / (high - low))
    return np.mean(scaled, axis=0)


def test_the_table_is_numpys(frame, values, reward):
    table = ways_table(frame, ["psnr", "error"]).set_index(["model", "quantity"])
    expected = {name: values[name].mean(-1) for name in values}
    expected |= {f"g_std_{name}": values[name].std(-1) for name in ("psnr", "error")}
    expected |= {"reward_best": reward.max(-1), "reward_mean": reward.mean(-1), "reward_worst": reward.min(-1)}
    assert {quantity for _, quantity in table.index} == expected.keys()
    for name, q in expected.items():
        row, base = table.loc[("way", name)], q[0, 0]
        for prefix, x in (("", q[1]), ("difference_", q[1] - base)):
            assert row[prefix.rstrip("_") or "mean"] == pytest.approx(x.mean(), rel=1e-12, abs=1e-14), name
            over_images = x.mean(0).std(ddof=1) / IMAGES**0.5
            over_seeds = x.mean(1).std(ddof=1) / SEEDS**0.5
            assert row[f"{prefix}error_images"] == pytest.approx(over_images, rel=1e-9, abs=1e-14), name
            assert row[f"{prefix}error_seeds"] == pytest.approx(over_seeds, rel=1e-9), name
        assert (row["images"], row["seeds"]) == (IMAGES, SEEDS)
        own = table.loc[("base", name)]
        assert own["mean"] == pytest.approx(base.mean()) and own["difference"] == 0 and np.isnan(own["error_seeds"])


def test_curves_are_averages_over_training_seeds(frame, values):
    curves = best_of_ways(frame, "psnr").set_index(["model", "count", "of"])
    assert curves.loc[("way", NOISES, "best"), "value"] == pytest.approx(values["psnr"][1].max(-1).mean())
    assert curves.loc[("base", 1, "worst"), "value"] == pytest.approx(values["psnr"][0, 0].mean())
    one = best_of(frame[(frame["model"] == "way") & (frame["training_seed"] == 1)], "psnr", counts=[2])
    pairs = [values["psnr"][1, 1][:, list(k)].max(1) for k in itertools.combinations(range(NOISES), 2)]
    assert one[one["of"] == "best"]["value"].item() == pytest.approx(np.mean(pairs))


def test_markdown_has_as_many_digits_as_the_error_and_marks_what_is_beyond_twice():
    row = {"model": "way", "quantity": "psnr", "mean": 24.31234, "error_images": 0.03, "error_seeds": 0.04}
    errors = {"difference_error_images": 3.0, "difference_error_seeds": np.nan}
    rows = [row | {"difference": 7.0} | errors, row | {"quantity": "ssim", "difference": 5.0} | errors]
    assert markdown_table(pd.DataFrame(rows)).splitlines()[:3] == [
        "|  | way |", "| --- | ---: |", "| psnr | 24.312 ± 0.050 |"
    ]  # fmt: skip
    exact = {"error_images": 0.0, "error_seeds": np.nan}
    whole = pd.DataFrame([row | exact | {"mean": mean} for mean in (240.0, 1.5, np.nan)])
    assert [line.split()[3] for line in markdown_table(whole.assign(quantity=["a", "b", "c"])).splitlines()[2:]] == [
        "240", "1.50", "nan"
    ]  # fmt: skip
    shown = markdown_table(pd.DataFrame(rows), difference=True).splitlines()
    assert shown[2:] == ["| psnr | **+7.0 ± 3.0** |", "| ssim | +5.0 ± 3.0 |"]


def test_refusals(frame):
    with pytest.raises(ValueError, match="base must be one of base, way, got 'none'"):
        ways_table(frame, ["psnr"], "none")
    with pytest.raises(ValueError, match="same images and noise as base, got others for way, training seed 2"):
        ways_table(frame.iloc[:-1], ["psnr"])
