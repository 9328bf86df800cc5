"""How much the samples of one LR image differ: CCSR's G-STD and L-STD, and where they disagree, as a picture.

For image i and seed s of S, metric m and sample y: G-STD_m = mean_i std_s m(y_is), L-STD = mean_i mean_{c,h,w} std_s
y_is[c, h, w], with population standard deviations and y in [0, 1] (CCSR, arXiv 2401.00877, section 4.1, and its code).
"""

from collections.abc import Hashable, Iterable, Mapping

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from rfsr_ext.evaluation.figures import comparison_figure, middle

__all__ = ["Spread", "disagreement_figure", "stability_table"]


class Spread:
    """Standard deviation over the samples of every image at every pixel and channel, added up as samples come.

    Args:
        border: pixels along every side that L-STD leaves out; 4 in CCSR's code.

    Attributes:
        first: by image the sample that came first, ``[3, H, W]``.
    """

    def __init__(self, border: int = 4):
        self.border = border
        self.first: dict[Hashable, Tensor] = {}
        self._sums: dict[Hashable, tuple[int, Tensor, Tensor]] = {}  # number, mean, sum of squared deviations

    def add(self, images: Iterable[Hashable], samples: Tensor) -> None:
        """One sample ``[3, H, W]`` in [0, 1] of each image; the images' names or numbers tell them apart.

        Raises:
            ValueError: if a sample of an image has another size than its first.
        """
        for image, sample in zip(images, samples.detach().cpu(), strict=True):
            first = self.first.setdefault(image, sample)
            if first.shape != sample.shape:
                raise ValueError(
                    f"samples of image {image!r} must all have the size of the first, {list(first.shape)}, got "
                    f"{list(sample.shape)}"
                )
            y = sample.double()
            count, mean, squares = self._sums.get(image, (0, torch.zeros_like(y), torch.zeros_like(y)))
            step = y - mean  # Welford's: no difference of large sums
            mean = mean + step / (count + 1)
            self._sums[image] = count + 1, mean, squares + step * (y - mean)

    def maps(self) -> dict[Hashable, Tensor]:
        """By image the standard deviation ``[3, H, W]``, float64.

        Raises:
            ValueError: if an image has fewer than two samples.
        """
        for image, (count, _, _) in self._sums.items():
            if count < 2:
                raise ValueError(f"seeds must be at least 2 to measure a spread, got {count} of image {image!r}")
        return {image: (squares / count).sqrt() for image, (count, _, squares) in self._sums.items()}

    def l_std(self) -> pd.Series:
        """The mean of each map within the border, by image.

        Raises:
            ValueError: as `maps`; also if an image is no larger than its border.
        """
        values, b = {}, self.border
        for image, map in self.maps().items():
            if min(map.shape[-2:]) <= 2 * b:
                raise ValueError(
                    f"images must be larger than {2 * b} pixels for a border of {b}, got {list(map.shape[-2:])}"
                )
            values[image] = map[:, b : map.shape[1] - b, b : map.shape[2] - b].mean().item()
        return pd.Series(values, name="l_std")


def stability_table(frame: pd.DataFrame, spreads: Mapping[str, Spread] | None = None) -> pd.DataFrame:
    """G-STD of every metric, and L-STD, of every model.

    Args:
        frame: what `rfsr_ext.evaluation.evaluate` gave for two seeds or more, or several of them concatenated; models
            without seeds, such as bicubic interpolation, are left out.
        spreads: by model what its samples were added to.

    Returns:
        Indexed by (model, metric), the last metric ``l_std``: ``mean`` over images and seeds (of L-STD none, NaN),
        ``std`` (G-STD or L-STD), its ``standard_error`` over images, ``n`` images and ``seeds``. A metric that is not a
        number somewhere has no G-STD.

    Raises:
        ValueError: if a model has fewer than two seeds, or not the same ones for every image.
    """
    rows = []
    for model, part in frame[frame["seed"].notna()].groupby("model", sort=False):
        seeds = part["seed"].nunique()
        if seeds < 2:
            raise ValueError(f"seeds must be at least 2 to measure a spread, got {seeds} of {model}")
        for metric in part.drop(columns=["image", "seed"]).select_dtypes("number").columns:
            table = part.pivot(index="image", columns="seed", values=metric)
            if len(part) != table.size:
                raise ValueError(
                    f"images of {model} must all have the same seeds, got {len(part)} of {table.size} rows"
                )
            values = table.to_numpy(float)
            with np.errstate(invalid="ignore"):  # PSNR of equal images is infinite
                rows.append((model, metric, values.mean(), *_over_images(values.std(axis=1)), len(values), seeds))
        if spreads and model in spreads:
            values = spreads[model].l_std().to_numpy()
            rows.append((model, "l_std", np.nan, *_over_images(values), len(values), seeds))
    columns = ["model", "metric", "mean", "std", "standard_error", "n", "seeds"]
    return pd.DataFrame(rows, columns=columns).set_index(["model", "metric"])


def _over_images(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return values.mean(), error


def disagreement_figure(
    spreads: Mapping[str, Spread], references: Mapping[Hashable, Tensor] | None = None, rows: int = 4, crop: int = 256
) -> Figure:
    """Of each model one sample and the map of where its samples disagree: dark where all agree.

    The images are those whose samples the first model spreads most; maps are means over channels, their colors the same
    for all models, up to the 99.5th percentile of what is shown.

    Args:
        spreads: by model.
        references: by image what it should look like, ``[3, H, W]`` in [0, 1], the last column.
        rows: number of images.
        crop: of larger pictures the middle is shown, a square of this side.
    """
    first = next(iter(spreads.values()))
    shown = first.l_std().sort_values(ascending=False, kind="stable").index[:rows]
    maps = {model: {image: middle(spread.maps()[image].mean(0)[None], crop)[0] for image in shown}
            for model, spread in spreads.items()}  # fmt: skip
    values = torch.cat([map.flatten() for of_model in maps.values() for map in of_model.values()])
    top = max(float(np.quantile(values.numpy(), 0.995)), 1e-6)
    table = []
    for image in shown:
        row = []
        for model, spread in spreads.items():
            color = matplotlib.colormaps["inferno"]((maps[model][image] / top).clamp(0, 1).numpy())[..., :3]
            row.append((middle(spread.first[image], crop), ""))
            row.append((torch.from_numpy(np.moveaxis(color, -1, 0)), f"L-STD {spread.l_std()[image]:.4f}"))
        table.append(row + ([(middle(references[image], crop), "")] if references else []))
    titles = [title for model in spreads for title in (model, f"disagreement, up to {top:.3f}")]
    return comparison_figure(table, titles + (["ground truth"] if references else []), tile=200)
