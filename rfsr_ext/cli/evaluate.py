"""``rfsr evaluate`` and ``rfsr ablate``: tables of measurements."""

import importlib.util
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import typer
from torch import Tensor

from rfsr_ext.cli.config import check_target, choose_device, split_names
from rfsr_ext.data import Root, evaluation_crops, photographs
from rfsr_ext.data.images import SUFFIXES
from rfsr_ext.evaluation import (
    FolderResult,
    Spread,
    best_and_worst,
    best_of_figure,
    cases_figure,
    compare,
    disagreement_figure,
    evaluate,
    evaluate_bicubic,
    evaluate_folder,
    evaluate_pairs,
    evaluate_pairs_bicubic,
    held_out_scorers,
    measure_trajectory,
    save_figure,
    stability_table,
    summarize,
    trajectory_figure,
)
from rfsr_ext.evaluation.best_of import add_reward, best_of_table
from rfsr_ext.evaluation.folders import read_picture
from rfsr_ext.files import make_folder, save_table
from rfsr_ext.metrics import METRICS, Preset, Suite, get_preset
from rfsr_ext.models import ISRModel, load_model
from rfsr_ext.processes import is_main, join
from rfsr_ext.rewards import REWARDS
from rfsr_ext.rewards.ranking import HybridReward
from rfsr_ext.training import RFSRConfig
from rfsr_ext.training.ablation import VARIANTS, ablate

__all__ = [
    "ablate_variants",
    "choose_preset",
    "difference_table",
    "evaluate_best_of",
    "evaluate_folders",
    "evaluate_models",
    "evaluate_on_pairs",
    "holds_pictures",
    "mean_table",
]

STABILITY = (".stability.csv", ".stability.png")  # endings of what is written beside a table, in the place of its own
BEST_OF = (".best_of.csv", ".best_of.png")


def choose_preset(name: str | None, metrics: str | None, channel: str | None, border: int | None) -> Preset | None:
    """The preset of this name; with anything changed it is called "custom".  None if nothing was asked for.

    Raises:
        ValueError: if there is no such preset, metric or channel.
    """
    if channel not in (None, "rgb", "y"):
        raise ValueError(f"--channel must be rgb or y, got {channel!r}")
    changes: dict[str, Any] = {
        "metrics": split_names(metrics),
        "channel": channel,
        "crop": border,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if name is None and not changes:
        return None
    preset = get_preset(name or "basic")
    return replace(preset, name="custom", **changes) if changes else preset


def holds_pictures(target: str) -> bool:
    """Whether ``target`` is a folder of pictures instead of a model."""
    folder = Path(target)
    if target == "mini" or not folder.is_dir() or (folder / "model_index.json").is_file():
        return False
    return any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())


def mean_table(frame: pd.DataFrame) -> str:
    """Models in rows, metrics in columns, ``mean ± standard error`` in cells; ``n`` is the number of images."""
    table = summarize(frame)
    cells = table["mean"].map("{:.3f}".format) + " ± " + table["standard_error"].map("{:.3f}".format)
    wide = cells.unstack("metric")[table.index.get_level_values("metric").unique()]
    wide.insert(0, "n", table["n"].groupby("model").max())
    return wide.loc[frame["model"].unique()].to_string()


def difference_table(frame: pd.DataFrame, base: str, names: Sequence[str]) -> str:
    """What changed against ``base``: standard errors over images, the ratio of the two, 95 % bootstrap intervals."""
    parts = []
    for name in names:
        table = compare(frame, base, name)
        table.insert(0, "model", name)
        parts.append(table.reset_index())
    columns = {"difference": "{:+.4f}".format, "standard_error": "{:.4f}".format, "ratio": "{:+.1f}".format,
               "low": "{:+.4f}".format, "high": "{:+.4f}".format}  # fmt: skip
    return pd.concat(parts).to_string(index=False, formatters=columns)


def check_outputs(output: Path | None, beside: Sequence[str], overwrite: bool, *others: Path | None) -> None:
    """Refuse, before anything is measured, what could not be written afterwards or is there already; make its folder.

    Args:
        output: the table.
        beside: endings of what is written beside it, in the place of its own.
        overwrite: whether files that exist may be replaced.
        others: further files.
    """
    targets = [path for path in others if path is not None]
    if output is not None:
        if output.suffix not in (".csv", ".parquet"):
            raise ValueError(f"output must end in .csv or .parquet, got {str(output)!r}")
        if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ModuleNotFoundError(
                "writing .parquet needs pyarrow (pip install 'rfsr_ext[metrics]'); give a .csv instead"
            )
        targets += [output, *(output.with_suffix(ending) for ending in beside)]
    for path in targets:
        check_target(path, overwrite)
        make_folder(path.parent)


def step_figures(names: Sequence[str]) -> list[str]:
    """Endings of the figures of models: each by its folder's name, or where two are called alike by the whole path."""
    short = [Path(name).name for name in names]
    return [
        f".{last if short.count(last) == 1 else '-'.join(Path(name).parts).strip('/-')}.png"
        for name, last in zip(names, short, strict=True)
    ]


def write_stability(
    frame: pd.DataFrame, spreads: dict[str, Spread], references: dict[Hashable, Tensor], output: Path | None
) -> None:
    """Print G-STD and L-STD; with ``output`` keep them beside it, with the map of where samples disagree."""
    table = stability_table(frame, spreads)
    columns = {"mean": "{:.4f}".format, "std": "{:.4f}".format, "standard_error": "{:.4f}".format}
    typer.echo("\nstandard deviation over seeds: G-STD of each metric, L-STD of pixels (l_std)\n")
    typer.echo(table.reset_index().to_string(index=False, formatters=columns, na_rep=""))
    if output is not None:
        save_table(output.with_suffix(STABILITY[0]), table.reset_index())
        save_figure(disagreement_figure(spreads, references), output.with_suffix(STABILITY[1]))


def _cases(results: dict[str, FolderResult], metric: str, frame: pd.DataFrame, path: Path) -> None:
    """Best and worst by a metric, of two folders by what changed from the first to the second."""
    values = {name: part.set_index("image")[metric] for name, part in frame.groupby("model", sort=False)}
    first, *others = values
    ranking = values[others[0]] - values[first] if others else values[first]
    best, worst = best_and_worst(ranking, metric)
    rows = []
    for kind, images in (("best", best), ("worst", worst)):
        for image in images:
            row = [(read_picture(result.pictures[image]), f"{kind}: {image} · {metric} {values[name][image]:.3f}")
                   for name, result in results.items()]  # fmt: skip
            truth = results[first].references.get(image)
            rows.append(row + ([(read_picture(truth), "")] if truth else []))
    titles = [Path(name).name for name in results] + (["ground truth"] if results[first].references else [])
    save_figure(cases_figure(rows, titles), path)


def _print_means(frame: pd.DataFrame, suite: Suite) -> None:
    better = ", ".join(name for name in suite.metrics if METRICS[name].lower_better)
    typer.echo(f"mean ± standard error over pictures{f'; lower is better for {better}' if better else ''}\n")
    typer.echo(mean_table(frame))


def evaluate_folders(
    folders: Sequence[Path],
    references: Path | None,
    preset: Preset | None,
    output: Path | None,
    cases: Path | None,
    by: str | None,
    overwrite: bool,
) -> None:
    """Print the table of folders of pictures and of their differences from the first one; several processes share them.

    Raises:
        ValueError: at the end, if a picture could not be measured; the others were.
    """
    check_outputs(output, (), overwrite, cases)
    join()  # each has a GPU of its own from here on
    suite = Suite(preset or get_preset("basic"), references is not None, choose_device())
    if by is not None and by not in suite.metrics:
        raise ValueError(f"--by must be one of {', '.join(suite.metrics)}, got {by!r}")
    left_out = [name for name in suite.preset.metrics if name not in suite.metrics]
    results = {name: evaluate_folder(name, suite, references) for name in dict.fromkeys(map(str, folders))}
    if not is_main():
        return
    frame = pd.concat([result.frame for result in results.values()], ignore_index=True)
    typer.echo(suite.preset.label)
    if left_out:
        typer.echo(f"without --gt there is no {', '.join(left_out)}")
    _print_means(frame, suite)
    common = set.intersection(*(set(result.pictures) for result in results.values()))
    base, *others = results
    shared = frame[frame["image"].isin(common)]
    if others and common:
        typer.echo(f"\nAgainst {base}, {len(common)} pictures that all folders have:\n")
        typer.echo(difference_table(shared, base, others))
    elif others:
        typer.echo("\nno picture is in all folders, so that nothing can be compared")
    if output is not None:
        save_table(output, frame)
    if cases is not None and common:
        _cases(results, by or suite.metrics[0], shared, cases)
    broken = {path: reason for result in results.values() for path, reason in result.broken.items()}
    if broken:
        for path, reason in broken.items():
            typer.echo(f"left out {path}: {reason}", err=True)
        pictures = len(frame) + len(broken)
        raise ValueError(f"{len(broken)} of {pictures} pictures could not be measured: {', '.join(map(str, broken))}")


def evaluate_on_pairs(
    names: Sequence[str],
    pairs: tuple[Path, Path],
    pictures: Path,
    preset: Preset | None,
    seeds: Sequence[int],
    output: Path | None,
    options: dict[str, Any],
    stability: bool,
    best_of_seeds: bool,
    overwrite: bool,
) -> None:
    """Upscale the LR images of pairs, keep the pictures and print the table of models and of their differences.

    Bicubic enlargement, by the scale of the first model, stands above them.  Several processes share the pictures.
    With ``best_of_seeds`` also Best, Mean and Worst@M of all seeds, of the preset's metrics and the reward they make.

    Raises:
        ValueError: before any work if no pair fits a model; at the end if a pair was left out.
    """
    check_outputs(output, (STABILITY if stability else ()) + (BEST_OF if best_of_seeds else ()), overwrite)
    join()  # each has a GPU of its own from here on
    root = Root(lr=str(pairs[0]), gt=str(pairs[1]))
    suite = Suite(preset or get_preset("basic"), device=choose_device())
    results, frames = {}, []
    for name in dict.fromkeys(names):
        model = load_model(name, **options)
        model.to(choose_device())
        results[name] = evaluate_pairs(model, root, suite, pictures, seeds, name)
        frames = frames or [evaluate_pairs_bicubic(root, model.scale, suite)]
        frames.append(results[name].frame)
        del model  # the next one needs its memory
    if not is_main():
        return
    frame = pd.concat(frames, ignore_index=True).astype({"seed": "Int64"})  # nullable: bicubic has no seed
    typer.echo(suite.preset.label)
    _print_means(frame, suite)
    base, *others = results
    common = set.intersection(*(set(result.frame["image"]) for result in results.values()))
    if others and common:
        typer.echo(f"\nAgainst {base}, {len(common)} pictures:\n")
        typer.echo(difference_table(frame[frame["image"].isin(common)], base, others))
    if stability and common:
        spreads = {name: Spread() for name in results}
        for name, result in results.items():
            for folder, image in itertools.product(result.folders, sorted(common)):
                spreads[name].add([image], read_picture(folder / f"{image}.png")[None])
        references = {image: read_picture(results[base].references[image]) for image in common}
        write_stability(frame[frame["image"].isin(common)], spreads, references, output)
    if best_of_seeds and common:
        typer.echo(f"\n{len(seeds)} results for each of {len(common)} pictures; 95 % bootstrap over pictures")
        rows = frame[frame["image"].isin(common) & frame["seed"].notna()]
        write_best_of(rows, suite.metrics, (), output.with_suffix(BEST_OF[0]) if output else None)
    typer.echo(f"\npictures: {', '.join(str(folder) for result in results.values() for folder in result.folders)}")
    if output is not None:
        save_table(output, frame)
    left_out = {path: reason for result in results.values() for path, reason in result.left_out.items()}
    for path, reason in left_out.items():
        typer.echo(f"left out {path}: {reason}", err=True)
    if left_out:
        raise ValueError(f"{len(left_out)} pictures of the pairs were left out: {', '.join(map(str, left_out))}")


def _open(names: Sequence[str], options: dict[str, Any], size: int) -> dict[str, ISRModel]:
    """The models by name, on the CPU, before any of them is measured: a crop that does not fit the last is refused."""
    models = {name: load_model(name, **options) for name in dict.fromkeys(names)}
    for model in models.values():
        model.check_size(size, "--size")
    return models


def evaluate_models(
    names: Sequence[str],
    crops: int,
    size: int,
    seeds: Sequence[int],
    output: Path | None,
    steps: bool,
    preset: Preset | None,
    options: dict[str, Any],
    stability: bool,
    overwrite: bool,
) -> None:
    """Print the table of models and of their differences from the first one; the main process does it alone."""
    names = list(dict.fromkeys(names))
    figures = dict(zip(names, step_figures(names), strict=True)) if steps else {}
    beside = ((".steps.csv", *figures.values()) if steps else ()) + (STABILITY if stability else ())
    check_outputs(output, beside, overwrite)
    join()
    if not is_main():
        return
    device = choose_device()
    suite = Suite(preset, device=device) if preset else None
    samples = evaluation_crops(photographs("test"), size, crops, called="--crops")
    scorers, models = held_out_scorers(), _open(names, options, size)
    frames = [evaluate_bicubic(samples, scorers, next(iter(models.values())).scale, suite=suite)]
    spreads, paths = {name: Spread() for name in models}, []
    for name, model in models.items():
        model.to(device)
        seen = spreads[name].add if stability else None
        frames.append(evaluate(model, samples, scorers, seeds, name=name, suite=suite, on_images=seen))
        if steps:
            paths.append(measure_trajectory(model, samples, seeds, name=name))
        model.to("cpu")  # the next one needs its memory
    frame = pd.concat(frames, ignore_index=True)
    typer.echo(f"{len(samples)} held-out crops of {size} pixels, {len(seeds)} seeds; rewards are the small stand-ins\n")
    if suite is not None:
        typer.echo(f"{suite.preset.label}\n")
    typer.echo(mean_table(frame))
    base, *others = models
    if others:
        typer.echo(f"\nAgainst {base}:\n\n{difference_table(frame, base, others)}")
    if output is not None:
        save_table(output, frame)
    if stability:
        write_stability(frame, spreads, {i: sample["gt"] for i, sample in enumerate(samples)}, output)
    if steps:
        for name, path in zip(models, paths, strict=True):
            bands = path.groupby("step")[["low_ssim", "high_ssim", "psnr"]].mean()
            typer.echo(f"\n{name}: SSIM of the z_0 estimate with the truth, by sampling step\n")
            typer.echo(
                bands.loc[sorted({1, *range(5, len(bands), 5), *bands.idxmax(), len(bands)})].round(4).to_string()
            )
            if output is not None:
                save_figure(trajectory_figure(path), output.with_suffix(figures[name]), dpi=150)
        if output is not None:
            save_table(output.with_suffix(".steps.csv"), pd.concat(paths, ignore_index=True))


def evaluate_best_of(
    names: Sequence[str],
    crops: int,
    size: int,
    count: int,
    output: Path | None,
    preset: Preset | None,
    options: dict[str, Any],
    overwrite: bool,
) -> None:
    """Print Best, Mean and Worst@M of models, M up to ``count``; with ``output`` also the figure and every number.

    The reward is made of the preset's metrics, halves with and without ground truth; without a preset of PSNR and SSIM
    and of both stand-in rewards, so that the judge stays held out.  The main process does it alone.
    """
    check_outputs(output, (".png",), overwrite)
    join()
    if not is_main():
        return
    device = choose_device()
    suite = Suite(preset, device=device) if preset else None
    samples, scorers = evaluation_crops(photographs("test"), size, crops, called="--crops"), held_out_scorers()
    frames = []
    for name, model in _open(names, options, size).items():
        frames.append(evaluate(model.to(device), samples, scorers, range(count), name=name, suite=suite))
        model.to("cpu")  # the next one needs its memory
    typer.echo(f"{len(samples)} held-out crops of {size} pixels, {count} results each; 95 % bootstrap over crops")
    typer.echo(suite.preset.label if suite else "rewards are the small stand-ins")
    chosen = suite.metrics if suite else ("psnr", "ssim", *REWARDS)
    write_best_of(pd.concat(frames, ignore_index=True), chosen, tuple(scorers), output)


def write_best_of(frame: pd.DataFrame, chosen: Sequence[str], others: Sequence[str], output: Path | None) -> None:
    """Print Best, Mean and Worst@M of the reward that ``chosen`` columns make, and of each column; with ``output`` keep
    every number there and the figure beside it.
    """
    compared = {name: name in METRICS and METRICS[name].reference for name in chosen}
    hybrid = HybridReward(
        tuple(name for name in chosen if compared[name]), tuple(name for name in chosen if not compared[name])
    )
    lower_better = {name for name in chosen if name in METRICS and METRICS[name].lower_better}
    frame = add_reward(frame, hybrid, lower_better)
    quantities = dict.fromkeys(("reward", *chosen, *others))
    curves = best_of_table(frame, quantities, lower_better)
    curves["cell"] = [f"{v:.3f} [{a:.3f}, {b:.3f}]" for v, a, b in curves[["value", "low", "high"]].to_numpy()]
    for name in quantities:
        part = curves[curves["quantity"] == name].pivot(index=["model", "of"], columns="count", values="cell")
        typer.echo(f"\n{name}{', lower is better' if name in lower_better else ''}, by number of results\n\n{part}")
    if output is not None:
        save_table(output, curves.drop(columns="cell"))
        save_figure(best_of_figure(curves), output.with_suffix(".png"))


def ablate_variants(
    config: str, variants: Sequence[str] | None, seeds: Sequence[int], crops: int, size: int, output: Path
) -> None:
    """Train and compare; every row lands in ``output/ablation.csv``."""
    variants = list(variants or VARIANTS)
    samples = evaluation_crops(photographs("test"), size, crops, called="--crops")
    frame = ablate(RFSRConfig.load(config), samples, held_out_scorers(), variants, seeds, output)
    typer.echo(f"{len(samples)} held-out crops of {size} pixels, {len(seeds)} training seeds; rewards are stand-ins\n")
    typer.echo(mean_table(frame))
    typer.echo(f"\nAgainst base:\n\n{difference_table(frame, 'base', variants)}")
