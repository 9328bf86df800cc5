"""Strengths of things that people chose between, two at a time, by Bradley and Terry's model (Biometrika 39, 1952)."""

import math
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

__all__ = ["bradley_terry"]


def bradley_terry(votes: pd.DataFrame, prior: float = 0.0, zero: str | None = None) -> pd.DataFrame:
    """Strengths s by maximum likelihood of P(a is chosen before b) = σ(s_a − s_b), with 95 % intervals.

    With w_ab votes for a against b, n_ab = w_ab + w_ba and p_ab = σ(s_a − s_b), the gradient of the log-likelihood is
    Σ_b (w_ab − n_ab p_ab), and the information I_aa = Σ_b n_ab p_ab p_ba, I_ab = −n_ab p_ab p_ba.  Intervals are
    s ± 1.96 errors by the inverse of I.  Of two things a and b: s_a − s_b = log(w_ab / w_ba), and its squared error is
    1 / w_ab + 1 / w_ba.

    Votes count as independent.  Many by one person, or about one picture, are not; then the intervals are too narrow.

    Args:
        votes: a row for each, with the two names in ``left`` and ``right`` and one of them in ``chosen``, as
            `rfsr_ext.notebook.blind` writes them; other columns and the order of rows have no influence.
        prior: votes added for each side of every two things that were compared.  Some things that lost to no others
            have no finite strength without it; 0.5 gives them one (Haldane's and Anscombe's correction) and draws all
            together a little.
        zero: the thing whose strength is 0, so that intervals are those of the differences from it; without it the mean
            of all is 0.

    Returns:
        Indexed by name, strongest first: ``wins`` and ``votes`` without the prior, ``strength``, its
        ``standard_error``, ``low`` and ``high``.

    Raises:
        ValueError: if a column is missing, a vote does not choose one of two things, ``prior`` or ``zero`` is not
            one of those above, no chain of comparisons connects two things, or a strength is infinite.
    """
    wins, names = _wins(votes)
    if not (prior == 0 or 0.01 <= prior < math.inf):
        raise ValueError(f"prior must be 0 votes, or 0.01 or more, got {prior!r}; 0.5 is usual")
    if zero is not None and zero not in names:
        raise ValueError(f"zero must be one of {names}, got {zero!r}")
    weighed = wins + prior * (wins + wins.T > 0)
    _refuse_unbounded(weighed, names)
    strengths, information = _maximize(weighed)
    contrast = np.eye(len(names))  # what is subtracted: the mean, or one strength
    if zero is None:
        contrast -= 1 / len(names)
    else:
        contrast[:, names.index(zero)] -= 1
    strengths = contrast @ strengths
    errors = np.sqrt(np.diag(contrast @ np.linalg.inv(information) @ contrast.T))
    reach = NormalDist().inv_cdf(0.975) * errors
    table = pd.DataFrame(
        {"wins": wins.sum(1).astype(int), "votes": (wins + wins.T).sum(1).astype(int), "strength": strengths,
         "standard_error": errors, "low": strengths - reach, "high": strengths + reach},
        index=pd.Index(names, name="name"),
    )  # fmt: skip
    return table.sort_values("strength", ascending=False, kind="stable")


def _wins(votes: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    """``[n, n]``: how often the thing of the row was chosen before that of the column; and their names, sorted."""
    if not {"left", "right", "chosen"} <= set(votes):
        raise ValueError(f"votes must have the columns left, right and chosen, got {list(votes)}")
    left, right, chosen = (votes[column].astype(str) for column in ("left", "right", "chosen"))
    wrong = votes[(left == right) | (chosen != left) & (chosen != right)]
    if votes.empty or len(wrong):
        got = wrong[["left", "right", "chosen"]].iloc[0].to_dict() if len(wrong) else "no vote"
        raise ValueError(f"votes must each choose one of two different things, got {got}")
    names = sorted(set(left) | set(right))
    counts = pd.crosstab(chosen, right.where(chosen == left, left))
    return counts.reindex(index=names, columns=names, fill_value=0).to_numpy(float), names


def _refuse_unbounded(wins: np.ndarray, names: list[str]) -> None:
    """The maximum exists if and only if each thing lost to each other by some chain of votes (Ford, 1957)."""
    parts, part = connected_components(wins + wins.T)
    if parts > 1:
        alone = [name for name, place in zip(names, part, strict=True) if place == part[0]]
        raise ValueError(f"votes must compare {', '.join(alone)} with the other things, got none; ask for such votes")
    parts, part = connected_components(wins, connection="strong")
    for place in range(parts if parts > 1 else 0):
        if not wins[part != place][:, part == place].any():
            best = [name for name, its in zip(names, part, strict=True) if its == place]
            raise ValueError(
                f"votes must contain a loss of {', '.join(best)} to another thing for a finite strength, got none; "
                "ask for more votes, or give prior=0.5"
            )


def _maximize(wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strengths of sum 0, and the information there plus 1 in every element, which makes it invertible.

    Adding 1 changes nothing else: it is the second derivative of (Σ s)² / 2, which is 0 at the solution.  Newton's step
    is divided by 1 + d, where d is the largest change of a difference; that converges from everywhere, for the logistic
    loss is generalized self-concordant (Sun and Tran-Dinh, 2019).
    """
    played, strengths = wins + wins.T, np.zeros(len(wins))
    for _ in range(10_000):  # a dozen are enough but for very one-sided votes
        p = expit(strengths[:, None] - strengths)
        weights = played * p * p.T
        information = np.diag(weights.sum(1)) - weights + 1
        step = np.linalg.solve(information, (wins - played * p).sum(1))
        change = np.ptp(step)
        strengths += step / (1 + change)
        if change < 1e-9:
            break
    return strengths, information
