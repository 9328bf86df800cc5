"""G-STD and L-STD against NumPy, and the map."""

import numpy as np
import pandas as pd
import pytest
import torch

from rfsr_ext.evaluation import Spread, disagreement_figure, stability_table


def samples(seeds=5, images=3, side=16):
    return np.random.default_rng(0).random((seeds, images, 3, side, side), dtype=np.float32)


def spread_of(y, border=4):
    spread = Spread(border)
    for of_seed in y:
        for i in range(0, len(of_seed), 2):  # in batches
            part = range(i, min(i + 2, len(of_seed)))
            spread.add(part, torch.from_numpy(of_seed[part]))
    return spread


def frame_of(values, model="a", seeds=True):
    rows = [(model, i, s if seeds else pd.NA, v) for s, of_seed in enumerate(values) for i, v in enumerate(of_seed)]
    return pd.DataFrame(rows, columns=["model", "image", "seed", "psnr"]).astype({"seed": "Int64"})


def test_l_std_is_numpys():
    y = samples()
    spread, expected = spread_of(y), np.std(y.astype(float), axis=0)
    for image, map in spread.maps().items():
        np.testing.assert_allclose(map.numpy(), expected[image], rtol=1e-12)
    np.testing.assert_allclose(spread.l_std().to_numpy(), expected[..., 4:-4, 4:-4].mean((1, 2, 3)), rtol=1e-12)
    whole = spread_of(y, border=0).l_std().mean()
    np.testing.assert_allclose(whole, expected.mean(), rtol=1e-12)


def test_equal_samples_have_none_and_noise_has_its_own():
    y = np.repeat(samples(1), 4, axis=0)
    assert spread_of(y).l_std().eq(0).all()
    noise = np.random.default_rng(1).normal(0.5, 0.03, (200, 1, 3, 16, 16)).astype(np.float32)
    assert spread_of(noise).l_std()[0] == pytest.approx(0.03, rel=0.02)


def test_g_std_is_numpys():
    values = np.random.default_rng(2).random((4, 6))
    frame = pd.concat([frame_of(values), frame_of([values[0]], "bicubic", seeds=False), frame_of(values * 2, "b")])
    table = stability_table(frame.sample(frac=1, random_state=0), {"a": spread_of(samples(4, 6))})
    assert set(table.index) == {("a", "psnr"), ("a", "l_std"), ("b", "psnr")}
    row, stds = table.loc[("a", "psnr")], np.std(values, axis=0)
    assert (row["n"], row["seeds"]) == (6, 4)
    np.testing.assert_allclose(row["mean"], values.mean())
    np.testing.assert_allclose(row["std"], stds.mean())
    np.testing.assert_allclose(row["standard_error"], stds.std(ddof=1) / 6**0.5)
    np.testing.assert_allclose(table.loc[("b", "psnr"), "std"], 2 * stds.mean())
    np.testing.assert_allclose(table.loc[("a", "l_std"), "std"], spread_of(samples(4, 6)).l_std().mean())
    values[0, 0] = np.inf  # equal images
    assert np.isnan(stability_table(frame_of(values)).loc[("a", "psnr"), "std"])


def test_refusals():
    one = spread_of(samples(1))
    with pytest.raises(ValueError, match="seeds must be at least 2 to measure a spread, got 1 of image 0"):
        one.maps()
    with pytest.raises(ValueError, match="seeds must be at least 2 to measure a spread, got 1 of a"):
        stability_table(frame_of([[1.0, 2.0]]))
    with pytest.raises(ValueError, match="images of a must all have the same seeds, got 3 of 4 rows"):
        stability_table(frame_of([[1.0, 2.0], [1.0]]))
    with pytest.raises(ValueError, match=r"must all have the size of the first, \[3, 16, 16\], got \[3, 8, 8\]"):
        one.add([0], torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images must be larger than 16 pixels for a border of 8, got \[16, 16\]"):
        spread_of(samples(2), border=8).l_std()


def test_the_map_shows_where_samples_disagree():
    y = np.repeat(samples(1, 2), 3, axis=0)
    y[:, 0, :, 8:, :] += np.array([0, 0.1, 0.2], dtype=np.float32)[:, None, None, None]
    figure = disagreement_figure({"a": spread_of(y)}, {0: torch.zeros(3, 16, 16), 1: torch.ones(3, 16, 16)}, rows=1)
    sample, map, truth = (axes.images[0].get_array() for axes in figure.axes)
    assert (
        np.allclose(np.moveaxis(sample, -1, 0), y[0, 0].clip(0, 1)) and not truth.any()
    )  # image 0, of the larger spread
    assert np.ptp(map[:8], axis=(0, 1)).max() == 0 and np.ptp(map[8:], axis=(0, 1)).max() < 0.01
    assert map[12, 0].sum() > map[0, 0].sum() + 1  # bright where they differ
