"""Best, mean and worst of M against all subsets; one reward for several models."""

import itertools

import numpy as np
import pandas as pd
import pytest

from rfsr_ext.evaluation import best_of, best_of_figure
from rfsr_ext.evaluation.best_of import add_reward
from rfsr_ext.rewards.ranking import HybridReward


@pytest.fixture
def frame():
    draw = np.random.default_rng(0)
    keys = itertools.product(("base", "tuned"), range(3), range(5))
    return pd.DataFrame(
        [{"model": m, "image": i, "seed": s, "a": draw.normal(), "b": draw.normal(), "prompt": ""} for m, i, s in keys]
    )


def test_every_subset_of_m_results_counts(frame):
    table = best_of(frame, "a", counts=[1, 2, 3, 5]).set_index(["model", "count", "of"])["value"]
    values = frame[frame["model"] == "tuned"].pivot(index="image", columns="seed", values="a").to_numpy()
    for count in (1, 2, 3, 5):
        subsets = np.stack([values[:, s] for s in itertools.combinations(range(5), count)])
        assert table["tuned", count, "best"] == pytest.approx(subsets.max(2).mean())
        assert table["tuned", count, "worst"] == pytest.approx(subsets.min(2).mean())
        assert table["tuned", count, "mean"] == pytest.approx(values.mean())
    lower = best_of(frame, "a", lower_better=True, counts=[2]).set_index(["model", "of"])["value"]
    assert lower["base", "best"] == pytest.approx(table["base", 2, "worst"])


def test_counts_are_powers_of_two_and_bands_hold_the_value(frame):
    table = best_of(frame, "b")
    assert sorted(table["count"].unique()) == [1, 2, 4, 5]
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    wide = table[table["of"] == "best"].eval("high - low")
    values = frame[frame["model"] == "base"].groupby("image")["b"].mean()
    assert wide.min() > 0
    one = table[(table["model"] == "base") & (table["count"] == 1) & (table["of"] == "mean")].iloc[0]
    again = np.random.default_rng(0).choice(values.to_numpy(), size=(20_000, 3)).mean(1)
    assert [one["low"], one["high"]] == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.05)


def test_models_share_one_scale(frame):
    rewarded = add_reward(frame, HybridReward(("a",), ("b",)), ["b"])
    assert len(rewarded) == len(frame)
    scaled = {}
    for name, sign in (("a", 1), ("b", -1)):
        values = sign * frame[name]
        low, high = (values.groupby(frame["image"]).transform(f) for f in ("min", "max"))
        scaled[name] = (values - low) / (high - low)
    np.testing.assert_allclose(rewarded["reward"], (scaled["a"] + scaled["b"]) / 2, rtol=1e-12)
    figure = best_of_figure(pd.concat([best_of(rewarded), best_of(frame, "a")]))
    assert all(len(axes.lines) == 2 * 3 for axes in figure.axes)
    assert [text.get_text() for text in figure.legends[0].texts] == ["base", "tuned", "best", "mean", "worst"]


def test_sentences(frame):
    with pytest.raises(ValueError, match="counts must be from 1 to the number of seeds, 5, got 6"):
        best_of(frame, "a", counts=[6])
    with pytest.raises(ValueError, match="quantity must be a column of the table, got 'c'"):
        best_of(frame, "c")
    with pytest.raises(ValueError, match="a must be there for every image, seed and model"):
        best_of(frame.iloc[1:], "a")
    with pytest.raises(ValueError, match="scores must hold 'c'"):
        add_reward(frame, HybridReward(("a",), ("c",)))
