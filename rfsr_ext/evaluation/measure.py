"""Measuring models on a fixed set of samples: one row per image and seed, and what such a table says.

Models are compared on the same images and the same noise, and errors are standard errors over images: an image's seeds
are averaged first, because they are no independent evidence about other images.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rfsr_ext.data import Sample
from rfsr_ext.metrics.fidelity import band_ssim, psnr, ssim
from rfsr_ext.metrics.judge import Judge
from rfsr_ext.metrics.suite import Suite
from rfsr_ext.models import ISRModel
from rfsr_ext.rewards import REWARDS, create_reward
from rfsr_ext.sampling import generators, inference_condition, sample, trajectory

__all__ = [
    "Scorer",
    "compare",
    "enlarge_bicubic",
    "evaluate",
    "evaluate_bicubic",
    "held_out_scorers",
    "measure_trajectory",
    "seconds_per_image",
    "summarize",
]

Scorer = Callable[[Tensor, list[str]], Tensor]
"""Images ``[N, 3, H, W]`` in [0, 1] and their prompts to ``[N]`` scores: a reward's or a judge's ``score`` is one."""


def held_out_scorers() -> dict[str, Scorer]:
    """What ships with the package: both stand-in rewards and the judge.  They compute on the CPU, as PSNR does."""

    def at_home(score: Scorer) -> Scorer:
        return lambda images, prompts: score(images.cpu(), prompts)

    rewards = [create_reward(name) for name in REWARDS]
    return {scorer.name: at_home(scorer.score) for scorer in (*rewards, Judge.from_pretrained())}


def _batches(samples: Sequence[Sample], batch_size: int, desc: str, seeds: Sequence[int | None]) -> Iterator[tuple]:
    """Yield seed, image indices, gt, lr and prompts of every batch of every seed, with a progress bar."""
    if not samples:
        raise ValueError("samples must hold at least one sample, got none")
    if len({sample["gt"].shape for sample in samples}) > 1:
        raise ValueError("samples must all have the same size, got several sizes; evaluate each size by itself")
    with tqdm(total=len(samples) * len(seeds), desc=desc, unit="image", leave=False) as progress:
        for seed in seeds:
            for first in range(0, len(samples), batch_size):
                part = samples[first : first + batch_size]
                gt, lr = (torch.stack([sample[key] for sample in part]) for key in ("gt", "lr"))
                yield seed, range(first, first + len(part)), gt, lr, [sample["prompt"] for sample in part]
                progress.update(len(part))


def _rows(
    sr: Tensor, gt: Tensor, prompts: list[str], scorers: dict[str, Scorer], suite: Suite | None, **keys
) -> pd.DataFrame:
    low, high = band_ssim(sr, gt)
    columns = {"psnr": psnr(sr, gt), "ssim": ssim(sr, gt), "low_ssim": low, "high_ssim": high}
    with torch.no_grad():
        columns |= {name: scorer(sr, prompts).detach().float().cpu() for name, scorer in scorers.items()}
    if suite is not None:  # its PSNR and SSIM take the place of those above
        columns |= suite(sr, gt)
        keys["preset"] = suite.preset.label
    return pd.DataFrame({**keys, "prompt": prompts, **{name: values.numpy() for name, values in columns.items()}})


def _table(parts: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True).astype({"seed": "Int64"})  # nullable: bicubic has no seed


def evaluate(
    model: ISRModel,
    samples: Sequence[Sample],
    scorers: dict[str, Scorer],
    seeds: Sequence[int] = (0,),
    batch_size: int = 8,
    num_inference_steps: int | None = None,
    name: str = "",
    suite: Suite | None = None,
    on_images: Callable[[range, Tensor], None] | None = None,
) -> pd.DataFrame:
    """Upscale every sample with every seed and measure the result.

    The noise of image i with seed s is `rfsr_ext.sampling.generators` ``(s, [i])``, whatever the model and batch size.

    Args:
        model: makes the images.
        samples: all of one size, such as `rfsr_ext.data.evaluation_crops` gives.
        scorers: by the name their column gets.
        seeds: of the noise.
        batch_size: images at once.
        num_inference_steps: the model's own by default.
        name: what the column ``model`` says.
        suite: published metrics to measure as well; the column ``preset`` then says which settings they had.
        on_images: called with the indices and the results of every batch, for those who want to look at them.

    Returns:
        One row per (image, seed): ``model``, ``image`` (index), ``seed``, ``prompt``, ``psnr``, ``ssim``, ``low_ssim``,
        ``high_ssim`` and one column per scorer.

    Raises:
        ValueError: if there are no samples or their sizes differ.
    """
    parts = []
    for seed, images, gt, lr, prompts in _batches(samples, batch_size, f"evaluate {name}".strip(), seeds):
        sr = sample(model, lr.to(model.device), prompts, generators(seed, images), num_inference_steps)
        parts.append(_rows(sr, gt, prompts, scorers, suite, model=name, image=images, seed=seed))
        if on_images is not None:
            on_images(images, sr)
    return _table(parts)


def enlarge_bicubic(lr: Tensor, scale: int) -> Tensor:
    """``[N, 3, H, W]`` in [0, 1] to ``[N, 3, scale·H, scale·W]``."""
    return F.interpolate(lr, scale_factor=scale, mode="bicubic").clamp(0, 1)


def evaluate_bicubic(
    samples: Sequence[Sample],
    scorers: dict[str, Scorer],
    scale: int,
    batch_size: int = 8,
    name: str = "bicubic",
    suite: Suite | None = None,
) -> pd.DataFrame:
    """The same table for bicubic interpolation, the floor any model must beat; its ``seed`` is `pandas.NA`."""
    parts = []
    for _, images, gt, lr, prompts in _batches(samples, batch_size, f"evaluate {name}".strip(), [None]):
        sr = enlarge_bicubic(lr, scale)
        parts.append(_rows(sr, gt, prompts, scorers, suite, model=name, image=images, seed=pd.NA))
    return _table(parts)


def seconds_per_image(model: ISRModel, example: Sample, repeats: int = 5) -> float:
    """The median time of upscaling one image by itself, from LR image to pixels on the CPU, after a first try.

    Args:
        model: where it computes.
        example: of the size that is meant.
        repeats: number of measurements.
    """
    lr, prompts, seconds = example["lr"][None].to(model.device), [example["prompt"]], []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        sample(model, lr, prompts, generators(0, [0])).cpu()  # a GPU has ended then
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _per_image(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over an image's seeds, indexed by (model, image)."""
    keys = ["model", "image"]
    metrics = frame.drop(columns=[*keys, "seed"], errors="ignore").select_dtypes("number").columns
    return frame.groupby(keys, sort=False)[list(metrics)].mean()


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean of every metric of every model with its standard error over images.

    Args:
        frame: what `evaluate` gave, or several of them concatenated.

    Returns:
        Indexed by (model, metric): ``mean``, ``standard_error`` (NaN for one image) and ``n``, the number of images.
    """
    models = _per_image(frame).groupby(level="model", sort=False)
    table = models.agg(["mean", "sem", "count"]).stack(0, future_stack=True)
    return table.rename_axis(["model", "metric"]).rename(columns={"sem": "standard_error", "count": "n"})


def _bootstrap(differences: pd.DataFrame, confidence: float, resamples: int) -> np.ndarray:
    """Percentile intervals of the columns' means, ``[2, columns]``: whole images are drawn again, with replacement."""
    values, generator = differences.to_numpy(float), np.random.default_rng(0)
    with np.errstate(invalid="ignore"):  # the difference of two infinite PSNRs is no number, and so are its means
        means = [values[generator.integers(len(values), size=len(values))].mean(0) for _ in range(resamples)]
        return np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)


def compare(frame: pd.DataFrame, a: str, b: str, confidence: float = 0.95, resamples: int = 10_000) -> pd.DataFrame:
    """Paired difference b − a of every metric: what changed between two models on the same images and noise.

    Args:
        frame: rows of both models, as `evaluate` gave them.
        a, b: names in the column ``model``.
        confidence: of the bootstrap interval.
        resamples: of the images, with replacement, for that interval; their seed is fixed.

    Returns:
        Indexed by metric: ``difference`` (mean over image and seed), its ``standard_error`` over images, their
        ``ratio`` (beyond ±2 it is hardly chance), the ends ``low`` and ``high`` of the paired percentile bootstrap
        interval (Efron, 1979; too narrow for fewer than about ten images) and ``n``, the number of images.

    Raises:
        ValueError: if a model has no rows, or both were not measured on the same images and seeds with the same preset.
    """
    rows = {name: frame[frame["model"] == name] for name in (a, b)}
    for name, part in rows.items():
        if part.empty:
            raise ValueError(f"model must be one of {sorted(frame['model'].unique())}, got {name!r}")
    for column in (name for name in ("image", "seed", "preset") if name in frame):
        first, second = (sorted(part[column].dropna().unique()) for part in rows.values())
        if first != second and first and second:  # bicubic interpolation has no seed and pairs with any
            raise ValueError(
                f"models must be measured on the same {column}s, got {first} for {a!r} and {second} for {b!r}"
            )
    difference = _per_image(rows[b]).droplevel("model") - _per_image(rows[a]).droplevel("model")
    table = difference.agg(["mean", "sem", "count"]).T.rename_axis("metric")
    table.insert(2, "ratio", table["mean"] / table["sem"])
    low, high = _bootstrap(difference, confidence, resamples)
    table.insert(3, "low", low)
    table.insert(4, "high", high)
    return table.rename(columns={"mean": "difference", "sem": "standard_error", "count": "n"}).astype({"n": int})


def measure_trajectory(
    model: ISRModel,
    samples: Sequence[Sample],
    seeds: Sequence[int] = (0,),
    batch_size: int = 8,
    num_inference_steps: int | None = None,
    name: str = "",
    steps: Collection[int] | None = None,
) -> pd.DataFrame:
    """How close the z_0 estimate of every sampling step is to the truth (the paper's Figure 1, b).

    Arguments and noise are those of `evaluate`; ``steps``, from 1, are the ones to decode and measure, all by default.

    Returns:
        One row per (image, seed, step): ``model``, ``image``, ``seed``, ``step`` (from 1), ``timestep``, ``low_ssim``,
        ``high_ssim`` and ``psnr`` of the decoded estimate.

    Raises:
        ValueError: if there are no samples or their sizes differ.
    """
    parts = []
    for seed, images, gt, lr, prompts in _batches(samples, batch_size, f"trajectory {name}".strip(), seeds):
        with torch.no_grad():
            condition, guidance_scale = inference_condition(model, lr.to(model.device), prompts)
            *path, _ = trajectory(model, condition, generators(seed, images), num_inference_steps, guidance_scale)
            for state, estimate in path:
                if steps is not None and state.step not in steps:
                    continue
                sr = model.decode(estimate)
                low, high = band_ssim(sr, gt)
                where = {"step": state.step, "timestep": state.timestep.item()}
                values = {"low_ssim": low.numpy(), "high_ssim": high.numpy(), "psnr": psnr(sr, gt).numpy()}
                parts.append(pd.DataFrame({"model": name, "image": images, "seed": seed, **where, **values}))
    return pd.concat(parts, ignore_index=True)
