"""Bradley and Terry's strengths against closed forms, another algorithm and simulated votes."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import binomtest

from rfsr_ext.evaluation import bradley_terry


def table(*rows):
    """(winner, loser, how often), the winner in turn left and right."""
    votes = []
    for winner, loser, count in rows:
        votes += [((winner, loser)[k % 2], (loser, winner)[k % 2], winner) for k in range(count)]
    return pd.DataFrame(votes, columns=["left", "right", "chosen"])


def of(strengths, number, rng):
    """Simulated votes between things that are called by their numbers."""
    a = rng.integers(len(strengths), size=number)
    b = (a + rng.integers(1, len(strengths), size=number)) % len(strengths)
    first = rng.random(number) < expit(strengths[a] - strengths[b])
    names = np.array([f"{k}" for k in range(len(strengths))])
    return pd.DataFrame({"left": names[a], "right": names[b], "chosen": names[np.where(first, a, b)]})


def climbed(votes):
    """Strengths of mean 0 by Zermelo's iteration, in plain Python: s_a = log(Σ_b w_ab / Σ_b n_ab / (e^s_a + e^s_b))."""
    rows = list(votes[["left", "right", "chosen"]].itertuples(index=False))
    worth = {name: 1.0 for row in rows for name in row}
    for _ in range(20_000):
        share = dict.fromkeys(worth, 0.0)
        for left, right, _ in rows:
            for name in (left, right):
                share[name] += 1 / (worth[left] + worth[right])
        worth = {name: sum(row[2] == name for row in rows) / share[name] for name in worth}
        scale = np.exp(np.mean(np.log(list(worth.values()))))
        before, worth = worth, {name: x / scale for name, x in worth.items()}
        if max(abs(np.log(worth[name] / before[name])) for name in worth) < 1e-12:
            break
    return {name: np.log(x) for name, x in worth.items()}


@pytest.mark.parametrize(("wins", "losses"), [(34, 6), (23, 17), (1, 1), (1, 500)])
def test_two_things_have_the_log_odds_of_their_share(wins, losses):
    votes = table(("a", "b", wins), ("b", "a", losses))
    found = bradley_terry(votes, zero="b")
    error = np.sqrt(1 / wins + 1 / losses)
    assert found.loc["a", "strength"] == pytest.approx(np.log(wins / losses), abs=1e-12)
    assert found.loc["a", "standard_error"] == pytest.approx(error, rel=1e-9)
    assert found.loc["a", ["low", "high"]].tolist() == pytest.approx(
        [np.log(wins / losses) - 1.959964 * error, np.log(wins / losses) + 1.959964 * error], abs=1e-5
    )
    assert found.loc["b", ["strength", "standard_error", "low", "high"]].tolist() == [0, 0, 0, 0]
    assert found[["wins", "votes"]].to_dict("index") == {
        "a": {"wins": wins, "votes": wins + losses},
        "b": {"wins": losses, "votes": wins + losses},
    }
    centered = bradley_terry(votes)
    assert centered.loc["a", "strength"] == pytest.approx(np.log(wins / losses) / 2, abs=1e-12)
    assert centered["strength"].sum() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(34, 6), (23, 17)])
def test_the_interval_of_a_share_is_near_wilsons(wins, losses):
    found = bradley_terry(table(("a", "b", wins), ("b", "a", losses)), zero="b").loc["a"]
    wilson = binomtest(wins, wins + losses).proportion_ci(method="wilson")
    assert expit(found[["low", "high"]].to_numpy(float)) == pytest.approx(list(wilson), abs=0.01)


def test_many_things_are_those_of_another_algorithm():
    votes = of(np.array([-1.0, 0.0, 0.3, 2.0]), 150, np.random.default_rng(0))
    found = bradley_terry(votes)
    assert found["strength"].to_dict() == pytest.approx(climbed(votes), abs=1e-9)
    assert found["strength"].is_monotonic_decreasing


def test_errors_are_those_of_the_second_derivative():
    """By finite differences of the log-likelihood in the differences from one thing, which are free."""
    votes = of(np.array([0.5, 0.0, -0.5]), 90, np.random.default_rng(1))
    found = bradley_terry(votes, zero="0").sort_index()

    def likelihood(free):
        s = dict(zip(("0", "1", "2"), (0.0, *free), strict=True))
        return sum(np.log(expit(s[c] - s[b if c == a else a])) for a, b, c in votes.itertuples(index=False))

    x, step = found["strength"].to_numpy()[1:], 1e-4
    curvature = np.empty((2, 2))
    for i, di in enumerate(np.eye(2) * step):
        for j, dj in enumerate(np.eye(2) * step):
            ends = [likelihood(x + a * di + b * dj) * a * b for a in (1, -1) for b in (1, -1)]
            curvature[i, j] = sum(ends) / (4 * step**2)
    errors = np.sqrt(np.diag(np.linalg.inv(-curvature)))
    assert found["standard_error"].to_numpy()[1:] == pytest.approx(errors, rel=1e-4)


def test_simulated_votes_give_back_the_strengths_and_intervals_hold_them():
    true, inside = np.array([-1.5, -0.5, 0.0, 0.5, 1.5]), []
    for seed in range(100):
        found = bradley_terry(of(true, 400, np.random.default_rng(seed))).sort_index()
        assert abs(found["strength"] - true).max() < 0.8
        inside += ((found["low"] < true) & (true < found["high"])).tolist()
    assert 0.92 < np.mean(inside) < 0.98


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 100))
def test_neither_order_nor_sides_nor_names_matter(random, seed):
    votes = of(np.array([0.0, 1.0, 2.0]), 40, np.random.default_rng(seed))
    rows = [tuple(row) if random.random() < 0.5 else (row[1], row[0], row[2]) for row in votes.to_numpy()]
    random.shuffle(rows)
    names = dict(zip("012", random.sample("xyz", 3), strict=True))
    renamed = pd.DataFrame([[names[x] for x in row] for row in rows], columns=list(votes))
    expected, found = bradley_terry(votes, prior=0.5), bradley_terry(renamed, prior=0.5)
    for old, new in names.items():
        assert found.loc[new].tolist() == pytest.approx(expected.loc[old].tolist(), abs=1e-9)


def test_very_one_sided_votes_have_strengths():
    votes = table(*((f"{k:02}", f"{k + 1:02}", 1000) for k in range(20)))
    found = bradley_terry(votes, prior=0.01, zero="00").sort_index()
    assert np.diff(found["strength"]) == pytest.approx([-np.log(1000.01 / 0.01)] * 20)


def test_half_a_win_each_makes_strengths_finite():
    votes = table(("a", "b", 6))
    found = bradley_terry(votes, prior=0.5, zero="b").loc["a"]
    assert found["strength"] == pytest.approx(logit(6.5 / 7)) and (found["wins"], found["votes"]) == (6, 6)
    assert found["standard_error"] == pytest.approx(np.sqrt(1 / 6.5 + 1 / 0.5))


@pytest.mark.parametrize(
    ("votes", "options", "says"),
    [
        (table(("a", "b", 6)), {}, "^votes must contain a loss of a to another thing .* got none; .* prior=0.5$"),
        (table(("a", "b", 2), ("b", "a", 1), ("b", "c", 1)), {}, "^votes must contain a loss of a, b to another thing"),
        (table(("a", "b", 1), ("b", "a", 1), ("c", "d", 1)), {"prior": 0.5}, "^votes must compare a, b with the other"),
        (table(("a", "b", 6)).drop(columns="left"), {}, r"^votes must have the columns .* got \['right', 'chosen'\]"),
        (table(), {}, "^votes must each choose one of two different things, got no vote$"),
        (table(("a", "a", 1)), {}, "^votes must each choose one of two different things, got {'left': 'a'"),
        (table(("a", "b", 1)).assign(chosen="left"), {}, "got {'left': 'a', 'right': 'b', 'chosen': 'left'}$"),
        (table(("a", "b", 1)), {"prior": -1}, "^prior must be 0 votes, or 0.01 or more, got -1; 0.5"),
        (table(("a", "b", 1)), {"prior": float("nan")}, "^prior must be 0 votes, .* got nan; 0.5 is usual$"),
        (table(("a", "b", 1)), {"zero": "c"}, r"^zero must be one of \['a', 'b'\], got 'c'$"),
    ],
)
def test_what_gives_no_strengths_is_refused(votes, options, says):
    with pytest.raises(ValueError, match=says):
        bradley_terry(votes, **options)
