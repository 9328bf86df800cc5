"""The figures: before and after, training curves, and the trajectory of the paper's Figure 1.

Each function returns a `matplotlib.figure.Figure` that belongs to no window; save it with `save_figure`.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.typing import LineStyleType
from torch import Tensor

from rfsr_ext.files import replace_file
from rfsr_ext.sampling import TimestepWindows

__all__ = [
    "best_of_figure",
    "cases_figure",
    "comparison_figure",
    "curves_figure",
    "gaps_figure",
    "middle",
    "save_figure",
    "trajectory_figure",
]

_DPI = 100
_INK, _FAINT = "#222222", "#8a8a8a"
_STRUCTURE, _REWARD = "#2a6fb0", "#d1662b"  # distinguishable in gray and to color-blind readers
_LINES = (_INK, "#2a6fb0", "#d1662b", "#3c8d5a", "#8a5aa8", "#b59b00", "#4fb3d9", "#c2497a")


def save_figure(figure: Figure, path: str | Path, dpi: int = _DPI) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replace_file(path) as aside:
        figure.savefig(aside, format="png", dpi=dpi)


def comparison_figure(rows: Sequence[Sequence[tuple[Tensor, str]]], titles: Sequence[str], tile: int = 320) -> Figure:
    """A table of pictures, for instance LR · base · fine-tuned · ground truth for several photographs.

    Every pixel is enlarged to a square of whole pixels, so that nothing is sharpened or smoothed on the way.

    Args:
        rows: one per photograph; its pictures ``[3, H, W]`` in [0, 1] with their captions ("" for none).  Pictures may
            be smaller than the largest one by a whole factor, as an LR image is.
        titles: one per column.
        tile: least height and width of a picture in the figure, in pixels.

    Raises:
        ValueError: if there are no rows, a row's length is not that of ``titles``, or sizes do not fit as above.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"rows must hold {len(titles)} pictures each, one per title, got {[len(row) for row in rows]}")
    height, width = (max(image.shape[axis] for row in rows for image, _ in row) for axis in (-2, -1))
    for image, _ in (picture for row in rows for picture in row):
        if height % image.shape[-2] or height * image.shape[-1] != width * image.shape[-2]:
            raise ValueError(
                f"rows must hold pictures of {height}x{width} pixels or a whole factor less, got {list(image.shape)}"
            )
    zoom = math.ceil(tile / min(height, width))
    height, width = height * zoom, width * zoom
    lines = max(len(caption.splitlines()) for row in rows for _, caption in row)
    gap, head, foot = 6, 34, 10 + 16 * lines if lines else 6  # pixels
    total = gap + len(titles) * (width + gap), head + len(rows) * (height + foot)
    figure = Figure(figsize=(total[0] / _DPI, total[1] / _DPI), dpi=_DPI, facecolor="white")
    for column, title in enumerate(titles):
        left = gap + column * (width + gap)
        center = (left + width / 2) / total[0]
        figure.text(center, 1 - head / 2 / total[1], title, ha="center", va="center", size=12, color=_INK)
        for i, (image, caption) in enumerate(row[column] for row in rows):
            top = head + i * (height + foot)
            box = left / total[0], 1 - (top + height) / total[1], width / total[0], height / total[1]
            axes = figure.add_axes(box)
            axes.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).float().numpy(), interpolation="nearest")
            axes.set_axis_off()
            below = 1 - (top + height + foot / 2 - 1) / total[1]
            figure.text(center, below, caption, ha="center", va="center", size=9, color="#5c5c5c")
    return figure


def cases_figure(
    rows: Sequence[Sequence[tuple[Tensor, str]]], titles: Sequence[str], size: int = 256, tile: int = 320
) -> Figure:
    """`comparison_figure` of pictures of any sizes: of each the middle, a square of ``size`` pixels or all there is.

    The square is the same for all pictures, so that one picture pixel has the same size everywhere.
    """
    size = min(size, *(min(image.shape[-2:]) for row in rows for image, _ in row))
    return comparison_figure([[(middle(image, size), text) for image, text in row] for row in rows], titles, tile)


def middle(image: Tensor, side: int) -> Tensor:
    """The middle of ``[…, H, W]``, a square of this side or all there is."""
    height, width = (min(n, side) for n in image.shape[-2:])
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=8)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)


def curves_figure(history: pd.DataFrame, columns: Sequence[str] | None = None) -> Figure:
    """Training curves, one panel per column: raw values as faint points, their running mean as a line.

    Iterations of the structure and of the reward window are drawn apart, since their losses have nothing in common;
    values measured only now and then, such as held-out metrics, are joined as they are.

    Args:
        history: one row per iteration; ``iteration``, ``window`` ("structure", "reward", or missing where it means
            nothing) and a column per quantity, missing (NaN) where it was not computed.
        columns: quantities to draw, in order; all numeric ones by default.

    Raises:
        ValueError: if ``iteration`` is missing or nothing is left to draw.
    """
    if "iteration" not in history:
        raise ValueError(f"history must have a column 'iteration', got {list(history.columns)}")
    if columns is None:
        columns = [name for name in history.select_dtypes("number") if name not in ("iteration", "step", "timestep")]
    columns = [name for name in columns if history[name].notna().any()]
    if not columns:
        raise ValueError("history must hold at least one quantity that was measured, got none")
    down = math.ceil(len(columns) / 4)
    across = math.ceil(len(columns) / down)
    figure = Figure(figsize=(3.6 * across, 2.4 * down + 0.6), dpi=_DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
    window = history["window"] if "window" in history else pd.Series(None, history.index, dtype=object)
    legend = {}
    for axes, name in zip(panels, columns, strict=False):
        measured = history[name].notna()
        sparse = measured.sum() < len(history) / 4 and window[measured].isna().all()
        for kind, color in (("structure", _STRUCTURE), ("reward", _REWARD), (None, _INK)):
            rows = history[measured & (window.isna() if kind is None else window.eq(kind))]
            if rows.empty:
                continue
            x, y = rows["iteration"], rows[name]
            if sparse:
                axes.plot(x, y, color=color, linewidth=1.4, marker="o", markersize=3)
                continue
            axes.scatter(x, y, s=8, color=color, alpha=0.35, linewidths=0)
            smooth = y.rolling(max(1, len(y) // 8), min_periods=1, center=True).mean()
            (line,) = axes.plot(x, smooth, color=color, linewidth=1.6)
            if kind:
                legend[f"{kind} window"] = line
        axes.set_title(name, size=10, color=_INK, loc="left")
        _tidy(axes)
        axes.tick_params(labelbottom=True)
    for axes in panels[len(columns) :]:
        axes.set_visible(False)
    figure.supxlabel("iteration", size=9, color=_INK)
    if legend:
        figure.legend(
            legend.values(), legend.keys(), loc="outside upper right", ncols=len(legend), frameon=False, fontsize=9
        )
    return figure


def trajectory_figure(frame: pd.DataFrame, windows: TimestepWindows | None = None) -> Figure:
    """SSIM of the low and the high frequencies against the sampling step, as in the paper's Figure 1 (b).

    Lines are means over images (an image's seeds averaged first), bands ± one standard error over images; the best step
    of each line is marked.

    Args:
        frame: what `rfsr_ext.evaluation.measure_trajectory` gave; several models give one line each.
        windows: shaded where given.
    """
    figure = Figure(figsize=(9.0, 3.4), dpi=_DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    models = list(frame["model"].unique())
    bands = ("low_ssim", "low frequencies (LL)"), ("high_ssim", "high frequencies (LH, HL, HH)")
    for axes, (column, title) in zip(panels, bands, strict=True):
        for i, model in enumerate(models):
            values = frame[frame["model"] == model].groupby(["image", "step"])[column].mean().groupby("step")
            mean, error, color = values.mean(), values.sem().fillna(0), _LINES[i % len(_LINES)]
            axes.fill_between(mean.index, mean - error, mean + error, color=color, alpha=0.18, linewidth=0)
            best = mean.idxmax()
            label = f"{model}: best at step {best} ({mean[best]:.3f})".removeprefix(": ")
            axes.plot(mean.index, mean, "-o", color=color, linewidth=1.6, markersize=5,
                      markevery=[mean.index.get_loc(best)], label=label)  # fmt: skip
        axes.margins(x=0.02, y=0.16)
        axes.legend(loc="best", frameon=False, fontsize=8)
        for window, color in ((windows.structure, _STRUCTURE), (windows.reward, _REWARD)) if windows else ():
            if window:
                axes.axvspan(window[0] - 0.5, window[1] + 0.5, color=color, alpha=0.07, linewidth=0)
                axes.text(
                    np.mean(window), 0.02, "structure" if color == _STRUCTURE else "reward", ha="center", size=8,
                    color=color, transform=axes.get_xaxis_transform(),
                )  # fmt: skip
        axes.set_title(title, size=10, color=_INK, loc="left")
        axes.set_xlabel("sampling step", size=9, color=_INK)
        _tidy(axes)
    panels[0].set_ylabel("SSIM with ground truth", size=9, color=_INK)
    return figure


def best_of_figure(table: pd.DataFrame) -> Figure:
    """Best, mean and worst of M results against M, one panel per quantity, one color per model.

    Args:
        table: what `rfsr_ext.evaluation.best_of` gave, its bootstrap intervals as bands; several of them concatenated
            give a panel each.
    """
    quantities, models = list(table["quantity"].unique()), list(table["model"].unique())
    down = math.ceil(len(quantities) / 3)
    across = math.ceil(len(quantities) / down)
    figure = Figure(figsize=(4.0 * across, 3.0 * down + 0.5), dpi=_DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    styles: dict[str, LineStyleType] = {"best": "--", "mean": "-", "worst": ":"}
    colors = {model: _LINES[i % len(_LINES)] for i, model in enumerate(models)}
    for axes, quantity in zip(panels, quantities, strict=False):
        for model, color in colors.items():
            for kind, style in styles.items():
                part = table[table["quantity"].eq(quantity) & table["model"].eq(model) & table["of"].eq(kind)]
                axes.fill_between(
                    part["count"], part["low"], part["high"], color=color, alpha=0.3 / max(2, len(models)), linewidth=0
                )
                axes.plot(part["count"], part["value"], style, color=color, linewidth=1.6)
        axes.set_xscale("log", base=2)
        counts = sorted(table["count"].unique())
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_title(quantity, size=10, color=_INK, loc="left")
        _tidy(axes)
    for axes in panels[len(quantities) :]:
        axes.set_visible(False)
    figure.supxlabel("results per image (M)", size=9, color=_INK)
    handles = [Line2D([], [], color=color, linewidth=1.6, label=model) for model, color in colors.items()]
    handles += [Line2D([], [], color=_FAINT, linewidth=1.6, linestyle=style, label=k) for k, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return figure


def gaps_figure(gaps: Tensor, spreads: Tensor) -> Figure:
    """Histograms of what the weights of hierarchical preference optimization are made of.

    Args:
        gaps: differences of reward of all pairs, of any shape.
        spreads: standard deviation of the rewards of every image.
    """
    figure = Figure(figsize=(8.0, 3.0), dpi=_DPI, facecolor="white", layout="constrained")
    titles = ("difference of reward within a pair", "pairs"), ("standard deviation of an image's rewards", "images")
    for axes, values, (title, what), color in zip(
        figure.subplots(1, 2), (gaps, spreads), titles, (_STRUCTURE, _REWARD), strict=True
    ):
        values = values.flatten().tolist()
        axes.hist(values, bins=min(40, max(5, len(values) // 4)), color=color, alpha=0.8)
        mean = float(np.mean(values))
        axes.axvline(mean, color=_INK, linewidth=1)
        axes.set_title(f"{title}, mean {mean:.3f}", size=10, color=_INK, loc="left")
        axes.set_ylabel(what, size=9, color=_INK)
        _tidy(axes)
    return figure
