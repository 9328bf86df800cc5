"""``rfsr evaluate`` and ``rfsr ablate``: tables of held-out measurements."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import typer

from rfsr_ext.data import evaluation_crops, photographs
from rfsr_ext.evaluation import (
    Judge,
    Scorer,
    compare,
    evaluate,
    evaluate_bicubic,
    measure_trajectory,
    summarise,
    trajectory_figure,
)
from rfsr_ext.files import replace_file
from rfsr_ext.models import load_model
from rfsr_ext.rewards import REWARDS, create_reward
from rfsr_ext.training import RFSRConfig
from rfsr_ext.training.ablation import VARIANTS, ablate

__all__ = ["ablate_variants", "difference_table", "evaluate_models", "held_out_scorers", "mean_table"]


def held_out_scorers() -> dict[str, Scorer]:
    """Both stand-in rewards and the judge."""
    rewards = [create_reward(name) for name in REWARDS]
    return {reward.name: reward.score for reward in rewards} | {Judge.name: Judge.from_pretrained().score}


def mean_table(frame: pd.DataFrame) -> str:
    """Models in rows, metrics in columns, ``mean ± standard error`` in cells."""
    table = summarise(frame)
    cells = table["mean"].map("{:.3f}".format) + " ± " + table["standard_error"].map("{:.3f}".format)
    wide = cells.unstack("metric")[table.index.get_level_values("metric").unique()]
    return wide.loc[frame["model"].unique()].to_string()


def difference_table(frame: pd.DataFrame, base: str, names: Sequence[str]) -> str:
    """What changed against ``base``, with standard errors over images and the ratio of the two."""
    parts = []
    for name in names:
        table = compare(frame, base, name)
        table.insert(0, "model", name)
        parts.append(table.reset_index())
    columns = {"difference": "{:+.4f}".format, "standard_error": "{:.4f}".format, "ratio": "{:+.1f}".format}
    return pd.concat(parts).to_string(index=False, formatters=columns)


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    with replace_file(path) as aside:
        frame.to_csv(aside, index=False)


def evaluate_models(
    names: Sequence[str], crops: int, size: int, seeds: Sequence[int], output: Path | None, steps: bool
) -> None:
    """Print the table of models and of their differences from the first one."""
    samples = evaluation_crops(photographs("test"), size, crops)
    scorers = held_out_scorers()
    models = {name: load_model(name) for name in dict.fromkeys(names)}
    frames = [evaluate_bicubic(samples, scorers, next(iter(models.values())).scale)]
    frames += [evaluate(model, samples, scorers, seeds=seeds, name=name) for name, model in models.items()]
    frame = pd.concat(frames, ignore_index=True)
    typer.echo(f"{len(samples)} held-out crops of {size} pixels, {len(seeds)} seeds; rewards are the small stand-ins\n")
    typer.echo(mean_table(frame))
    base, *others = models
    if others:
        typer.echo(f"\nAgainst {base}:\n\n{difference_table(frame, base, others)}")
    if output is not None:
        write_csv(frame, output)
    if steps:
        paths = [measure_trajectory(model, samples, seeds, name=name) for name, model in models.items()]
        for name, path in zip(models, paths, strict=True):
            bands = path.groupby("step")[["low_ssim", "high_ssim", "psnr"]].mean()
            typer.echo(f"\n{name}: SSIM of the z_0 estimate with the truth, by sampling step\n")
            typer.echo(
                bands.loc[sorted({1, *range(5, len(bands), 5), *bands.idxmax(), len(bands)})].round(4).to_string()
            )
            if output is not None:
                with replace_file(output.with_suffix(f".{Path(name).name}.png")) as aside:
                    trajectory_figure(path).savefig(aside, format="png", dpi=150)
        if output is not None:
            write_csv(pd.concat(paths, ignore_index=True), output.with_suffix(".steps.csv"))


def ablate_variants(
    config: str, variants: Sequence[str] | None, seeds: Sequence[int], crops: int, size: int, output: Path
) -> None:
    """Train and compare; the table and every row land in ``output``."""
    variants = list(variants or VARIANTS)
    samples = evaluation_crops(photographs("test"), size, crops)
    frame = ablate(RFSRConfig.load(config), samples, held_out_scorers(), variants, seeds, output)
    write_csv(frame, output / "ablation.csv")
    typer.echo(f"{len(samples)} held-out crops of {size} pixels, {len(seeds)} training seeds; rewards are stand-ins\n")
    typer.echo(mean_table(frame))
    typer.echo(f"\nAgainst base:\n\n{difference_table(frame, 'base', variants)}")
