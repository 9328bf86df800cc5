"""Candidates scored by any metrics and rewards, each once, and what the scores say of them."""

import contextlib
import logging
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from rfsr_ext.data import Sample
from rfsr_ext.data.candidates import CandidateFolder
from rfsr_ext.evaluation.figures import comparison_figure
from rfsr_ext.evaluation.measure import Scorer, evaluate
from rfsr_ext.files import load_tensors, lock_folder, save_tensors
from rfsr_ext.metrics.suite import METRICS, Preset, Suite
from rfsr_ext.models import ISRModel
from rfsr_ext.processes import from_main, is_main, split_map
from rfsr_ext.rewards import create_reward
from rfsr_ext.sampling import decode_candidates
from rfsr_ext.weights.pyiqa import create_metric, import_pyiqa, metric_settings

__all__ = ["Measure", "Scores", "create_measures", "evaluate_measures", "extremes_figure", "score_candidates"]

logger = logging.getLogger(__name__)

SCORES = "scores.safetensors"
_EVERY = 30  # seconds between two writings of the scores


@dataclass(frozen=True)
class Measure:
    """One full-reference or no-reference score.

    Attributes:
        name: of a metric, a reward or ``pyiqa:NAME``.
        score: results and ground truths ``[N, 3, H, W]`` in [0, 1] and N prompts to ``[N]``.
        lower_better: whether less is better.
        label: everything that decides a number, in one line; scores made with another are made again.
    """

    name: str
    score: Callable[[Tensor, Tensor, list[str]], Tensor]
    lower_better: bool = False
    label: str = ""


def create_measures(
    full_reference: Sequence[str], no_reference: Sequence[str], device: str | torch.device = "cpu"
) -> list[Measure]:
    """Measures by name: of `rfsr_ext.metrics.METRICS`, ``pyiqa:NAME`` for any other metric of pyiqa, or a reward's.

    Raises:
        ValueError: if a name is not known, or a metric is not of the kind it is listed under.
        FileNotFoundError, ModuleNotFoundError: if weights or packages are not there.
    """
    found = []
    for kind, names, reference in (
        ("full_reference", full_reference, True),
        ("no_reference", no_reference, False),
    ):
        for name in names:
            if name in METRICS:
                measure, compares = _from_suite(name, device), METRICS[name].reference
            elif name.startswith("pyiqa:"):
                measure, compares = _from_pyiqa(name, device)
            else:
                measure, compares = _from_reward(name, device), False
            if compares != reference:
                raise ValueError(
                    f"{kind} must name metrics that {'compare' if reference else 'do not compare'} with the ground "
                    f"truth, got {name!r}"
                )
            found.append(measure)
    return found


def _from_suite(name: str, device: str | torch.device) -> Measure:
    suite = Suite(Preset("preferences", (name,)), device=device)
    return Measure(name, lambda sr, gt, prompts: suite(sr, gt)[name], METRICS[name].lower_better, suite.preset.label)


def _from_pyiqa(name: str, device: str | torch.device) -> tuple[Measure, bool]:
    metric_name = name.removeprefix("pyiqa:")
    compares = metric_settings(metric_name).get("metric_mode", "NR") == "FR"
    metric = create_metric(metric_name, device=torch.device(device))

    @torch.no_grad()
    def score(sr: Tensor, gt: Tensor, prompts: list[str]) -> Tensor:
        given = (sr, gt) if compares else (sr,)  # one by one and copied: some take no batch, some work in place
        return torch.stack([metric(*(x[i : i + 1].clone() for x in given)).reshape(()) for i in range(len(sr))])

    version = import_pyiqa().__version__
    return Measure(name, score, bool(metric.lower_better), f"pyiqa {version}"), compares


def _from_reward(name: str, device: str | torch.device) -> Measure:
    reward = create_reward(name)
    reward.to(device)

    @torch.no_grad()
    def score(sr: Tensor, gt: Tensor, prompts: list[str]) -> Tensor:
        return reward.score(sr, prompts)

    return Measure(name, score, label=reward.label)


@dataclass(frozen=True)
class Scores:
    """Scores of all candidates of a folder.

    Attributes:
        values: by measure ``[groups, M]``.
        lower_better: measures for which less is better.
    """

    values: dict[str, Tensor]
    lower_better: frozenset[str]


def score_candidates(
    model: ISRModel, candidates: CandidateFolder, measures: Sequence[Measure], batch_size: int = 8
) -> Scores:
    """Score every candidate by every measure; what ``scores.safetensors`` beside them holds is not scored again.

    Several processes share the images, and the main one writes.

    Args:
        model: the one that sampled the candidates; it decodes them.
        candidates: the folder.
        measures: what scores.
        batch_size: candidates at once.

    Raises:
        FileNotFoundError: if a candidate has gone.
        ValueError: if a score is not finite.
        RuntimeError: if another run holds the folder.
    """
    path = candidates.folder / SCORES
    shape = (len(candidates), candidates.candidates)
    digests = [candidates.digest(group) for group in range(len(candidates))]
    with lock_folder(candidates.folder) if is_main() else contextlib.nullcontext():
        known = from_main(_known(path, measures, digests) if is_main() else {})
        values = {m.name: known.get(m.name, torch.full(shape, torch.nan)) for m in measures}
        missing = {m.name: values[m.name].isnan().any(1) for m in measures}
        todo = torch.stack(list(missing.values())).any(0).nonzero()[:, 0].tolist()
        written = time.monotonic()

        def score(group: int) -> dict[str, Tensor]:
            lacking = [measure for measure in measures if missing[measure.name][group]]
            return _score(model, candidates, group, lacking, batch_size)

        for group, scores in zip(todo, split_map(score, todo, "score candidates"), strict=True):
            for name, column in scores.items():
                values[name][group] = column
            if is_main() and (group == todo[-1] or time.monotonic() - written > _EVERY):
                _write(path, measures, digests, values)
                written = time.monotonic()
    return Scores(values, frozenset(m.name for m in measures if m.lower_better))


def _write(path: Path, measures: Sequence[Measure], digests: list[str], values: dict[str, Tensor]) -> None:
    """Put scores into the file, beside those of other measures."""
    facts = {m.name: {"label": m.label, "lower_better": m.lower_better, "candidates": digests} for m in measures}
    tensors, others = _read(path)
    facts |= {name: fact for name, fact in others.items() if name not in values}
    save_tensors(path, tensors | values, {"measures": facts})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, dict]]:
    try:
        tensors, metadata = load_tensors(path)
        return tensors, metadata["measures"]
    except FileNotFoundError:
        return {}, {}


def _known(path: Path, measures: Sequence[Measure], digests: list[str]) -> dict[str, Tensor]:
    """Scores that are there, not a number where the candidates or what scored them were others."""
    tensors, facts = _read(path)
    known = {}
    for measure in measures:
        fact = facts.get(measure.name)
        if fact is None or len(fact["candidates"]) != len(digests):
            continue
        if fact["label"] != measure.label:
            logger.warning("%s was scored as %r before and is now %r, so it is scored again",
                           measure.name, fact["label"], measure.label)  # fmt: skip
            continue
        same = torch.tensor([a == b for a, b in zip(fact["candidates"], digests, strict=True)])
        known[measure.name] = tensors[measure.name].where(same[:, None], torch.nan)
    return known


def _score(
    model: ISRModel, candidates: CandidateFolder, group: int, measures: Sequence[Measure], batch_size: int
) -> dict[str, Tensor]:
    """One group's scores, ``[M]`` by measure."""
    latents, prompt = candidates.latents(group)
    lr, gt = candidates.images(group)
    images = decode_candidates(model, latents, lr, batch_size)
    found = {}
    for measure in measures:
        parts = []
        for part in images.split(batch_size):
            truths = gt.to(part).expand_as(part)
            parts.append(measure.score(part, truths, [prompt] * len(part)).detach().float().cpu())
        found[measure.name] = scores = torch.cat(parts)
        if not scores.isfinite().all():
            number = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(
                f"{measure.name} gives {scores[number].item():g} for candidate {number} in "
                f"{str(candidates.folder / f'{group:06}')!r}; leave the metric out, or delete the latents there, which "
                f"samples them again"
            )
    return found


def evaluate_measures(
    model: ISRModel,
    samples: Sequence[Sample],
    measures: Sequence[Measure],
    scorers: dict[str, Scorer],
    seeds: Sequence[int],
    on_images: Callable[[range, Tensor], None] | None = None,
    **options,
) -> pd.DataFrame:
    """`rfsr_ext.evaluation.evaluate` with a column for every measure; its pictures are not color-corrected."""
    columns: dict[str, list[Tensor]] = {measure.name: [] for measure in measures}

    def collect(indices: range, sr: Tensor) -> None:
        gt = torch.stack([samples[i]["gt"] for i in indices]).to(sr.device)
        prompts = [samples[i]["prompt"] for i in indices]
        for measure in measures:
            columns[measure.name].append(measure.score(sr, gt, prompts).detach().float().cpu())
        if on_images is not None:
            on_images(indices, sr)

    frame = evaluate(model, samples, scorers, seeds, on_images=collect, **options)
    return frame.assign(**{name: torch.cat(parts).numpy() for name, parts in columns.items()})


def extremes_figure(
    model: ISRModel, candidates: CandidateFolder, scores: Scores, rewards: Tensor, groups: Sequence[int]
) -> Figure:
    """One row per group: LR image, worst and best candidate by ``rewards`` ``[groups, M]``, and ground truth."""
    rows = []
    for group in groups:
        lr, gt = candidates.images(group)
        row = [(lr, f"image {group}")]
        for number in (int(rewards[group].argmin()), int(rewards[group].argmax())):
            (image,) = decode_candidates(model, candidates.latents(group, [number])[0], lr)
            parts = [f"{name} {values[group, number]:.3g}" for name, values in scores.values.items()]
            caption = f"candidate {number}, reward {rewards[group, number]:.2f}: {', '.join(parts)}"
            row.append((image, textwrap.fill(caption, 54)))
        rows.append([*row, (gt, "")])
    return comparison_figure(rows, ["low resolution", "worst candidate", "best candidate", "ground truth"])
