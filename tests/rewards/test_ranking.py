"""Hybrid rewards, pairs and weights against a worked example and NumPy."""

import numpy as np
import pytest
import torch

from rfsr_ext.rewards.ranking import HybridReward, pair_candidates

# Two images, four candidates.  lpips: lower is better.
SCORES = {
    "lpips": torch.tensor([[0.1, 0.3, 0.2, 0.5], [0.4, 0.4, 0.4, 0.4]], dtype=torch.float64),
    "musiq": torch.tensor([[60.0, 70.0, 50.0, 50.0], [10.0, 30.0, 20.0, 30.0]]),
    "clipiqa": torch.tensor([[0.5, 0.5, 0.9, 0.7], [0.0, 1.0, 0.5, 0.25]], dtype=torch.float64),
}
HYBRID = HybridReward(("lpips",), ("musiq", "clipiqa"))


def test_a_worked_example():
    rewards = HYBRID(SCORES, ["lpips"])
    # image 0: lpips → 1, .5, .75, 0; musiq → .5, 1, 0, 0; clipiqa → 0, 0, 1, .5
    # image 1: lpips the same everywhere → .5; musiq → 0, 1, .5, 1; clipiqa → 0, 1, .5, .25
    wanted = [[0.625, 0.5, 0.625, 0.125], [0.25, 0.75, 0.5, 0.5625]]
    torch.testing.assert_close(rewards, torch.tensor(wanted, dtype=torch.float64))
    pairs = pair_candidates(rewards, 2)
    assert pairs.groups.tolist() == [0, 1]
    assert pairs.winners.tolist() == [[0, 2], [1, 3]]
    assert pairs.losers.tolist() == [[3, 1], [0, 2]]
    # gaps of image 0: .5, .125; .5, .125, mean .3125.  Image 1: .5, .25; .3125, .0625, mean .28125
    intra = np.array([[[1.1875, 0.8125], [1.1875, 0.8125]], [[1.21875, 0.96875], [1.03125, 0.78125]]])
    np.testing.assert_allclose(pairs.gaps[0], [[0.5, 0.125], [0.5, 0.125]])
    spread = np.std(wanted, axis=1)
    inter = spread + 1 - spread.mean()
    for switches, weights in {
        (True, True): intra * inter[:, None, None],
        (True, False): intra,
        (False, True): np.broadcast_to(inter[:, None, None], intra.shape),
        (False, False): np.ones_like(intra),
    }.items():
        np.testing.assert_allclose(pair_candidates(rewards, 2, *switches).weights, weights, rtol=1e-12)
    assert len(pairs) == 8


def test_the_scope_of_the_set_is_that_of_all_images():
    rewards = HybridReward((), ("musiq",), scope="set")(SCORES)
    torch.testing.assert_close(rewards, (SCORES["musiq"].double() - 10) / 60)


def test_rewards_against_numpy():
    draw = np.random.default_rng(0)
    scores = {name: draw.normal(size=(5, 9)) for name in "abcde"}
    hybrid = HybridReward(("a", "b"), ("c", "d", "e"))
    found = hybrid({name: torch.from_numpy(values) for name, values in scores.items()}, ["b", "d"]).numpy()
    scaled = {}
    for name, values in scores.items():
        values = -values if name in "bd" else values
        low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
        scaled[name] = (values - low) / (high - low)
    halves = [sum(scaled[name] for name in names) / len(names) for names in ("ab", "cde")]
    np.testing.assert_allclose(found, (halves[0] + halves[1]) / 2, rtol=1e-12)
    order = draw.permutation(9)  # of candidates: rewards go along
    permuted = hybrid({name: torch.from_numpy(values[:, order]) for name, values in scores.items()}, ["b", "d"])
    np.testing.assert_allclose(permuted, found[:, order], rtol=1e-12)


def test_later_candidates_are_measured_by_the_first_ones_bounds():
    bounds = HYBRID.bounds(SCORES, ["lpips"])
    better = SCORES | {"musiq": SCORES["musiq"] + 20}
    change = HYBRID(better, ["lpips"], bounds) - HYBRID(SCORES, ["lpips"])
    torch.testing.assert_close(change, torch.full((2, 4), 0.25, dtype=torch.float64))


def test_groups_of_equal_rewards_are_left_out(caplog):
    rewards = torch.tensor([[0.5, 0.5, 0.5], [0.1, 0.2, 0.3]])
    pairs = pair_candidates(rewards, 1)
    assert pairs.groups.tolist() == [1] and pairs.winners.tolist() == [[2]] and pairs.losers.tolist() == [[0]]
    assert "1 of 2 images are left out, because all their candidates have equal rewards" in caplog.text


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: pair_candidates(torch.rand(2, 5), 3), "selected must be from 1 to half of the 5 candidates"),
        (lambda: pair_candidates(torch.ones(2, 4), 1), "each of the 2 images has equal rewards for all its 4"),
        (lambda: HYBRID({"lpips": torch.rand(1, 2)}), "scores must hold 'musiq', got lpips; score the candidates"),
        (
            lambda: HYBRID(SCORES | {"musiq": torch.tensor([[1.0, 2.0], [3.0, float("nan")]])}),
            "scores of 'musiq' must be finite, got nan for candidate 1 of image 1",
        ),
        (lambda: HybridReward((), ()), "must name at least one metric"),
        (lambda: HybridReward(("a",), ("a",)), "got 'a' twice"),
        (lambda: HybridReward(("a",), (), "image"), "scope must be one of group, set, got 'image'"),
    ],
)
def test_sentences(act, sentence):
    with pytest.raises(ValueError, match=sentence):
        act()
