"""Ways of training side by side: one table of quality, spread and cost, with errors over crops and training seeds.

For way w, training seed t and held-out image i every quantity is one number q_wti, already a mean or a spread over the
noise of that image.  The table has their mean, and two standard errors: over images, of (mean_t q_wti)_i, and over
training seeds, of (mean_i q_wti)_t; the same of the differences q_wti − q_0i to the base model, paired by image.
"""

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from rfsr_ext.evaluation.best_of import add_reward, best_of
from rfsr_ext.rewards.ranking import HybridReward

__all__ = ["best_of_ways", "markdown_rows", "markdown_table", "reward_ways", "total_error", "ways_table"]

_KEYS = ["model", "training_seed", "image"]
_FIXED = ("l_std", "seconds_per_image", "training_seconds", "iterations")  # columns whose mean is all there is to say


def reward_ways(frame: pd.DataFrame, hybrid: HybridReward, lower_better: Collection[str] = ()) -> pd.DataFrame:
    """`rfsr_ext.evaluation.best_of.add_reward` for rows with ``training_seed``: one scale for all ways and seeds."""
    runs = frame["model"] + "\n" + frame["training_seed"].astype(str)  # each a model of its own
    return add_reward(frame.assign(model=runs), hybrid, lower_better).assign(model=frame["model"].to_numpy())


def best_of_ways(frame: pd.DataFrame, quantity: str, lower_better: bool = False) -> pd.DataFrame:
    """`rfsr_ext.evaluation.best_of` of every way, values and intervals averaged over its training seeds."""
    parts = [best_of(part, quantity, lower_better) for _, part in frame.groupby("training_seed")]
    keys = ["quantity", "model", "count", "of"]
    return pd.concat(parts).groupby(keys, sort=False)[["value", "low", "high"]].mean().reset_index()


def _quantities(frame: pd.DataFrame, scores: Sequence[str]) -> pd.DataFrame:
    """q_wti, indexed by way, training seed and image."""
    groups = frame.groupby(_KEYS, sort=False)
    parts = {name: groups[name].mean() for name in scores}
    parts |= {f"reward_{name}": groups["reward"].agg(how) for name, how in
              (("best", "max"), ("mean", "mean"), ("worst", "min"))}  # fmt: skip
    parts |= {f"g_std_{name}": groups[name].std(ddof=0) for name in scores}
    return pd.DataFrame(parts | {name: groups[name].mean() for name in _FIXED})


def ways_table(frame: pd.DataFrame, scores: Sequence[str], base: str = "base") -> pd.DataFrame:
    """Every quantity of every way.

    Args:
        frame: one row per result: ``model`` (the way), ``training_seed``, ``image``, ``seed`` (of the noise), a column
            per score, ``reward`` (see `reward_ways`), and what is the same in all rows of an image or a run: ``l_std``,
            ``seconds_per_image``, ``training_seconds`` and ``iterations``.
        scores: columns to average; ``g_std_NAME`` is their standard deviation over the noise (G-STD).
        base: the way that the others are compared with; it may have fewer training seeds.

    Returns:
        Rows of ``model``, ``quantity``, ``mean``, ``error_images``, ``error_seeds``, ``difference``,
        ``difference_error_images``, ``difference_error_seeds``, ``images`` and ``seeds``.  ``reward_best``,
        ``reward_mean`` and ``reward_worst`` are of all results of an image.  An error of one image or seed is NaN.

    Raises:
        ValueError: if there is no base, or a way was measured on other images or with other seeds of the noise.
    """
    if base not in set(frame["model"]):
        raise ValueError(f"base must be one of {', '.join(frame['model'].unique())}, got {base!r}")
    wanted = set(map(tuple, frame.loc[frame["model"] == base, ["image", "seed"]].to_numpy()))
    for (model, seed), part in frame.groupby(["model", "training_seed"], sort=False):
        if len(part) != len(wanted) or set(map(tuple, part[["image", "seed"]].to_numpy())) != wanted:
            raise ValueError(
                f"ways must be measured on the same images and noise as {base}, got others for {model}, training seed "
                f"{seed}"
            )
    values = _quantities(frame, scores).sort_index()
    rows = []
    for model in frame["model"].unique():
        for quantity in values:
            of_way, of_base = (values.loc[name, quantity].unstack("image") for name in (model, base))
            row = {"model": model, "quantity": quantity} | _moments(of_way)
            difference = _moments(of_way - of_base.mean())
            row |= {"difference": difference["mean"]}
            row |= {f"difference_{name}": difference[name] for name in ("error_images", "error_seeds")}
            rows.append(row | {"images": of_way.shape[1], "seeds": of_way.shape[0]})
    return pd.DataFrame(rows)


def _moments(table: pd.DataFrame) -> dict[str, float]:
    """Mean of ``[training seeds, images]`` and its standard errors over either."""
    over_seeds, over_images = table.mean(axis=0), table.mean(axis=1)
    return {"mean": over_seeds.mean(), "error_images": over_seeds.sem(), "error_seeds": over_images.sem()}


def total_error(over_images: float, over_seeds: float) -> float:
    """Of both together, √(e_i² + e_t²), a little too large: what they share is counted twice.  NaN is left out."""
    known = [error**2 for error in (over_images, over_seeds) if not np.isnan(error)]
    return sum(known) ** 0.5 if known else float("nan")


def markdown_table(table: pd.DataFrame, difference: bool = False) -> str:
    """What `ways_table` gave with quantities in rows and ways in columns, ``mean ± error``, for readers.

    Differences beyond twice their error are bold.
    """
    prefix = "difference_" if difference else ""
    rows = []
    for quantity, part in table.groupby("quantity", sort=False):
        cells = []
        for _, row in part.iterrows():
            value = row["difference" if difference else "mean"]
            error = total_error(row[f"{prefix}error_images"], row[f"{prefix}error_seeds"])
            cell = _number(value, error, difference)
            cells.append(f"**{cell}**" if difference and abs(value) > 2 * error > 0 else cell)
        rows.append([str(quantity), *cells])
    return "\n".join(markdown_rows(["", *table["model"].unique()], rows))


def markdown_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, whose columns but the first are numbers and stand on the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _number(value: float, error: float, signed: bool) -> str:
    """With as many digits as its error's first two; without an error two, or none if it is whole."""
    known = error > 0
    digits = int(np.clip(1 - np.floor(np.log10(error)), 0, 6)) if known else 0 if float(value).is_integer() else 2
    shown = f"{value:{'+' if signed else ''}.{digits}f}"
    return f"{shown} ± {error:.{digits}f}" if known else shown
