"""``rfsr preferences``: candidates sampled, scored and looked at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rfsr_ext.cli.config import Set, check_target, choose_device, parse_pairs
from rfsr_ext.cli.numbers import whole

if TYPE_CHECKING:
    from rfsr_ext.models import ISRModel
    from rfsr_ext.training.dp2o import DP2OConfig

__all__ = ["preferences"]

preferences = typer.Typer(help="A model's own results for the same image, ranked (DP2O).", no_args_is_help=True)

Config = Annotated[str, typer.Argument(help="A YAML file of method dp2o, or a preset: dp2o-mini, dp2o-sd2, dp2o-flux.")]
Round = Annotated[int, whole("Which round's candidates.", 1, name="--round")]


def _load(source: str, pairs: list[str] | None) -> "DP2OConfig":
    from rfsr_ext.training import load_config
    from rfsr_ext.training.dp2o import DP2OConfig

    config = load_config(source, parse_pairs("--set", pairs))
    if not isinstance(config, DP2OConfig):
        raise ValueError(f"config must be one of method dp2o, got {source!r} of method {config.method}")
    return config


def _model(config: "DP2OConfig") -> tuple["ISRModel", Any]:
    """The base model on its device, that of this process where there are several."""
    from rfsr_ext.models import load_model
    from rfsr_ext.processes import join

    join()  # each has a GPU of its own from here on
    device = choose_device()
    return load_model(config.model, **config.model_options).to(device), device


@preferences.command()
def sample(config: Config, set_: Set = None) -> None:
    """Sample M candidates for each LR image with the base model; the same command, or rfsr train, goes on."""
    from rfsr_ext.processes import is_main
    from rfsr_ext.training.dp2o.trainer import sample_preferences
    from rfsr_ext.training.setup import build_samples

    settings = _load(config, set_)
    model, _ = _model(settings)
    found = sample_preferences(settings, model, build_samples(settings, model, settings.images))
    if is_main():
        typer.echo(f"{len(found)} images with {found.candidates} candidates each: {found.folder}")


@preferences.command()
def score(config: Config, set_: Set = None, round_: Round = 1) -> None:
    """Score candidates by the metrics of CONFIG; what has been scored is not scored again."""
    from rfsr_ext.evaluation import create_measures
    from rfsr_ext.processes import is_main
    from rfsr_ext.training.dp2o.trainer import score_preferences

    settings = _load(config, set_)
    model, device = _model(settings)
    measures = create_measures(settings.full_reference, settings.no_reference, device)
    candidates, scores = score_preferences(settings, model, measures, round_)
    if not is_main():
        return
    typer.echo(f"{len(candidates)} images with {candidates.candidates} candidates each: {candidates.folder}\n")
    typer.echo(f"{'':24s} {'mean':>10s} {'deviation within an image':>27s}")
    for name, values in scores.values.items():
        lower = " (lower is better)" if name in scores.lower_better else ""
        typer.echo(f"{name:24s} {values.mean():10.4f} {values.std(1, correction=0).mean():27.4f}{lower}")


@preferences.command()
def show(
    config: Config,
    set_: Set = None,
    round_: Round = 1,
    images: Annotated[int, whole("Images to show, those whose rewards spread most.", 1)] = 6,
    output: Annotated[Path | None, typer.Option(help="Folder for the pictures; that of the candidates.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that exist.")] = False,
) -> None:
    """Picture the best and the worst candidates with their scores, and the gaps of all pairs as a histogram."""
    from rfsr_ext.evaluation import create_measures, gaps_figure, save_figure
    from rfsr_ext.evaluation.preferences import extremes_figure
    from rfsr_ext.rewards.ranking import pair_candidates
    from rfsr_ext.training.dp2o.trainer import hybrid_reward, score_preferences

    settings = _load(config, set_)
    folder = output or settings.folder(round_)
    targets = {name: check_target(folder / f"{name}.png", overwrite) for name in ("worst_and_best", "gaps")}
    model, device = _model(settings)
    measures = create_measures(settings.full_reference, settings.no_reference, device)
    candidates, scores = score_preferences(settings, model, measures, round_)
    rewards = hybrid_reward(settings)(scores.values, scores.lower_better)
    pairs = pair_candidates(rewards, settings.selected, settings.intra_group_weight, settings.inter_group_weight)
    spreads = rewards.std(1, correction=0)
    widest = spreads.argsort(descending=True)[:images].tolist()
    figures = {
        "worst_and_best": extremes_figure(model, candidates, scores, rewards, widest),
        "gaps": gaps_figure(pairs.gaps, spreads),
    }
    typer.echo(f"{len(pairs)} pairs of {len(pairs.groups)} images")
    for name, figure in figures.items():
        save_figure(figure, targets[name])
        typer.echo(f"{targets[name]}")
