"""What the best, the average and the worst of M results for one image is worth (DP2O-SR, section 5.4)."""

import math
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
import torch

from rfsr_ext.rewards.ranking import HybridReward

__all__ = ["add_reward", "best_of", "best_of_table"]


def add_reward(frame: pd.DataFrame, hybrid: HybridReward, lower_better: Collection[str] = ()) -> pd.DataFrame:
    """The frame with a column ``reward``, the hybrid reward of every row, comparable between the models in it.

    Smallest and largest score of a metric are those of an image's results by all models together, or of all images'.

    Args:
        frame: rows of `rfsr_ext.evaluation.evaluate`, the same images and seeds for every model.
        hybrid: made of columns of the frame.
        lower_better: columns for which less is better.

    Raises:
        ValueError: if a column is missing or not finite, or models were measured on different images or seeds.
    """
    names = [name for name in (*hybrid.full_reference, *hybrid.no_reference) if name in frame]
    tables = {name: _table(frame, name, ["image"], ["model", "seed"]) for name in names}
    rewards = hybrid({name: torch.tensor(t.to_numpy(float)) for name, t in tables.items()}, lower_better)
    like = next(iter(tables.values()))
    long = pd.DataFrame(rewards.numpy(), like.index, like.columns).stack(["model", "seed"], future_stack=True)
    return frame.merge(long.rename("reward").reset_index(), on=["image", "model", "seed"], how="left")


def best_of(
    frame: pd.DataFrame,
    quantity: str = "reward",
    lower_better: bool = False,
    counts: Sequence[int] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Best@M, Mean@M and Worst@M of every model: of M results for an image the best, averaged over images.

    Of S results x_1 ≤ … ≤ x_S for an image, the expected largest of M drawn without replacement is
    Σ_k C(k − 1, M − 1) / C(S, M) · x_k: every subset counts, not just the first M seeds.

    Args:
        frame: rows of `rfsr_ext.evaluation.evaluate`, S seeds for every image.
        quantity: the column.
        lower_better: whether the best is the smallest.
        counts: values of M; powers of two up to S, and S, by default.
        confidence: of the bootstrap interval.
        resamples: of the images, with replacement; their seed is fixed.

    Returns:
        Rows of ``quantity``, ``model``, ``count`` (M), ``of`` ("best", "mean", "worst"), ``value``, and ``low`` and
        ``high``, the ends of the percentile bootstrap interval over images.

    Raises:
        ValueError: if there is no such column, an image has not all seeds, or M is not from 1 to S.
    """
    if quantity not in frame:
        raise ValueError(f"quantity must be a column of the table, got {quantity!r}; there are {', '.join(frame)}")
    rows = []
    for model, part in frame.groupby("model", sort=False):
        values = np.sort(_table(part, quantity, ["image"], ["seed"]).to_numpy(float), axis=1)
        images, total = values.shape
        wanted = sorted({2**k for k in range(total.bit_length())} - {0} | {total}) if counts is None else counts
        draws = np.random.default_rng(0).integers(images, size=(resamples, images))
        for count in wanted:
            if not 1 <= count <= total:
                raise ValueError(f"counts must be from 1 to the number of seeds, {total}, got {count}")
            shares = np.array([math.comb(k, count - 1) for k in range(total)]) / math.comb(total, count)
            largest, smallest = values @ shares, values @ shares[::-1]
            best, worst = (smallest, largest) if lower_better else (largest, smallest)
            for of, per_image in (("best", best), ("mean", values.mean(1)), ("worst", worst)):
                means = per_image[draws].mean(1)
                low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
                row = {"quantity": quantity, "model": model, "count": count, "of": of}
                rows.append(row | {"value": per_image.mean(), "low": low, "high": high})
    return pd.DataFrame(rows)


def best_of_table(frame: pd.DataFrame, quantities: Collection[str], lower_better: Collection[str] = ()) -> pd.DataFrame:
    """`best_of` of several columns, one below the other; smaller is better for those in ``lower_better``."""
    return pd.concat([best_of(frame, name, name in lower_better) for name in quantities], ignore_index=True)


def _table(frame: pd.DataFrame, column: str, index: list[str], columns: list[str]) -> pd.DataFrame:
    table = frame.pivot(index=index, columns=columns, values=column)
    if table.isna().any(axis=None):
        raise ValueError(f"{column} must be there for every image, seed and model, but some are missing")
    return table
