"""Ways of training compared at the same cost: chains of trainings, run over several seeds and measured alike."""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rfsr_ext.data import Sample
from rfsr_ext.evaluation import Measure, Spread, evaluate_measures
from rfsr_ext.evaluation.measure import seconds_per_image
from rfsr_ext.files import load_tensors, lock_folder, save_table, save_tensors
from rfsr_ext.models import ISRModel, load_model
from rfsr_ext.training.ccsr import CCSRConfig
from rfsr_ext.training.config import Count, Measured, RFSRConfig, RunConfig, Settings, Text
from rfsr_ext.training.dp2o import DP2OConfig
from rfsr_ext.training.kept import find_result, samples_digest
from rfsr_ext.training.runs import create_trainer, load_config

__all__ = ["BASE", "ComparisonConfig", "run_comparison", "shown_images"]

logger = logging.getLogger(__name__)

BASE = "base"
SHOWN = 4  # held-out images whose first result is kept as a picture
OWNED = ("comparison.csv", "comparison.md", "comparison.png", "table.csv", "best_of.csv", "best_of.png")
_DECIDED = ("model", "seed", "output_dir", "iterations", "max_seconds")  # by the comparison alone
_PICTURES = "pictures.safetensors"
_MOST = 10**7  # iterations, where seconds end a training


class ComparisonConfig(Settings):
    """Ways of training one base model, what each may cost, and how all are measured.

    A way is a chain of steps, each the name of a preset or a YAML file of any method, or a mapping of it as ``config``
    and of what is changed in it; a step goes on with the model that the one before has made.  A step of method ccsr is
    two trainings, its stages.  The trainings of a way share its seconds or iterations evenly.

    Raises:
        ValueError: see `Settings`; also for what is wrong in a step.
    """

    presets: ClassVar[tuple[str, ...]] = ("mini",)
    presets_folder: ClassVar[str] = "compare"

    model: Text = Field("mini", description="the base model, as for a training")
    model_options: dict[str, Any] = Field({}, description="for what opens it; a step may add its own")
    seconds: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None, description="of training for each way and seed, or null for iterations"
    )
    iterations: Annotated[int, Field(ge=1, le=_MOST)] | None = Field(
        None, description="of training for each way and seed, or null for seconds"
    )
    seeds: Count = Field(3, description="trainings of each way, which differ in data order and noise; seeds from 0")
    crops: Count = Field(24, description="held-out crops of the bundled test photographs")
    size: Measured = Field(64, description="their side in pixels")
    results: Annotated[int, Field(ge=2, le=1000)] = Field(
        8, description="M, results per crop, for spread and for best, mean and worst of M"
    )
    full_reference: tuple[Text, ...] = Field(
        ("psnr", "ssim"), description="metrics with ground truth of the reward of best, mean and worst of M"
    )
    no_reference: tuple[Text, ...] = Field(
        ("mini-iqa", "mini-preference"), description="metrics and rewards without ground truth of that reward"
    )
    held_out: tuple[Text, ...] = Field(
        ("judge",), description="metrics and rewards without ground truth that no way is trained on"
    )
    settings: dict[str, Any] = Field(
        {}, description="of every training, whatever its preset says, such as {data: photos/, batch_size: 4}"
    )
    ways: dict[str, Any] = Field(
        description="by name a list of steps, each a preset or YAML file, or {config: PRESET, KEY: VALUE …}"
    )
    output_dir: Text = Field("runs/compare", description="folder for everything")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.seconds is None) == (self.iterations is None):
            raise ValueError(
                f"one of seconds and iterations must be given, the other null, got {self.seconds} and {self.iterations}"
            )
        folders = {_folder(way): way for way in self.ways}
        if not self.ways or len(folders) < len(self.ways) or {"", BASE} & folders.keys():
            raise ValueError(
                f"ways must have names that differ in letters or digits, none of them {BASE}, got "
                f"{', '.join(self.ways) or 'none'}"
            )
        trained_on = set()
        for way in self.ways:
            for config in self.trainings(way, 0):
                trained_on |= _rewards(config)
        if known := trained_on & set(self.held_out):
            raise ValueError(
                f"held_out must name what no way is trained on, got {', '.join(sorted(known))}; leave it out"
            )
        return self

    def run_folder(self, way: str, seed: int) -> Path:
        """Of a way's trainings and measurement with a seed."""
        return Path(self.output_dir) / _folder(way) / f"seed-{seed}"

    def trainings(self, way: str, seed: int) -> list[RunConfig]:
        """The settings of a way's trainings, one after the other.

        Raises:
            FileNotFoundError: if a step names neither a preset nor a file.
            ValueError: naming the step that is wrong.
        """
        folder, steps = self.run_folder(way, seed), self.ways[way]
        if not isinstance(steps, (list, tuple)) or not steps:
            raise ValueError(f"ways.{way} must be a list of steps, got {steps!r}")
        found: list[RunConfig] = []
        for number, step in enumerate(steps):
            try:
                found += self._step(step, folder / f"step-{number + 1}", found[-1] if found else None)
            except ValueError as error:
                raise ValueError(f"ways.{way}[{number}]: {error}") from None
        costs = [self._cost(number, len(found)) for number in range(len(found))]
        try:
            return [
                config.replace(**self.settings, seed=seed, **cost) for config, cost in zip(found, costs, strict=True)
            ]
        except ValueError as error:
            raise ValueError(f"settings: {error}") from None

    def _step(self, step: Any, folder: Path, before: RunConfig | None) -> list[RunConfig]:
        changes = {"config": step} if isinstance(step, str) else dict(step) if isinstance(step, Mapping) else {}
        source = changes.pop("config", None)
        if not isinstance(source, str):
            raise ValueError(f"a step must be a preset, or such as {{config: mini, learning_rate: 1e-5}}, got {step!r}")
        for name, values in (("step", changes), ("settings", self.settings)):
            if decided := [key for key in _DECIDED if key in values]:
                raise ValueError(f"{name} must leave {decided[0]} to the comparison, got {values[decided[0]]!r}")
        config = load_config(source, changes)
        if isinstance(config, DP2OConfig) and config.rounds > 1:
            raise ValueError(f"rounds must be 1, got {config.rounds}; each further round is a step of its own")
        start = (
            {"model": self.model, "model_options": self.model_options | config.model_options}
            if before is None
            else {"model": f"{before.output_dir}/model"}
        )
        config = config.replace(**start, output_dir=str(folder))
        return list(config.stages()) if isinstance(config, CCSRConfig) else [config]

    def _cost(self, number: int, trainings: int) -> dict[str, Any]:
        """Of one of so many trainings."""
        if self.iterations is None:
            return {"iterations": _MOST, "max_seconds": self.seconds / trainings}
        if self.iterations < trainings:
            raise ValueError(f"iterations must be at least {trainings}, one for each training, got {self.iterations}")
        return {"iterations": (self.iterations * (number + 1)) // trainings - self.iterations * number // trainings}


def _folder(way: str) -> str:
    return re.sub(r"\W+", "-", way.lower()).strip("-")


def _rewards(config: RunConfig) -> set[str]:
    """What a training maximizes, by name."""
    if isinstance(config, RFSRConfig):
        return set(config.rewards)
    return {*config.full_reference, *config.no_reference} if isinstance(config, DP2OConfig) else set()


def run_comparison(
    config: ComparisonConfig,
    samples: Sequence[Sample],
    measures: Sequence[Measure],
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Train every way with every seed and measure all on held-out samples.

    Each training and each measurement that is finished is kept, and an unfinished training goes on from its newest
    checkpoint, so that the whole can be interrupted, and ways and seeds be added.  The settings are kept beside each:
    what was made with others is never taken.

    Args:
        config: all settings.
        samples: held-out samples, all of one size.
        measures: what they are measured by, besides PSNR and SSIM of whole pictures and of both bands.
        device: where models are measured.

    Returns:
        One row per way (the base model first), training seed, image and noise: what
        `rfsr_ext.evaluation.ways.ways_table` wants, but ``reward``.

    Raises:
        ValueError: if the samples do not fit the model, or the folder holds what was made with other settings; see also
            the trainers.
        ModuleNotFoundError: before anything is trained, if a way needs a package that is not installed.
        FileExistsError, RuntimeError: see `rfsr_ext.files.lock_folder`.
    """
    for way in config.ways:
        for training in config.trainings(way, 0):
            training.check_packages()
    common = {
        "samples": samples_digest(samples),
        "results": config.results,
        "measures": {measure.name: measure.label for measure in measures},
    }

    def measured(name: str, seed: int, start: Mapping[str, str], create: Callable[[], ISRModel]) -> pd.DataFrame:
        folder = config.run_folder(name, seed)
        frame = find_result(folder / "evaluation.csv", common | start)
        if frame is None:
            logger.info("%s, seed %d: measuring %d images", name, seed, len(samples))
            frame = _measure(name, create().to(device), samples, measures, config.results, folder)
            save_table(folder / "evaluation.csv", frame)
        return frame.assign(training_seed=seed)

    with lock_folder(config.output_dir, OWNED):
        base = load_model(config.model, **config.model_options)
        for side in samples[0]["gt"].shape[-2:]:
            base.check_size(side, "size")
        start = {"base model": base.fingerprint()}
        frames = [measured(BASE, 0, start, lambda: base).assign(training_seconds=0.0, iterations=0)]
        base = None  # trainings need its memory
        for seed in range(config.seeds):
            for way in config.ways:
                spent, before, trainings = [], start, config.trainings(way, seed)
                for number, training in enumerate(trainings):
                    what = f"{way}, seed {seed}: training {number + 1} of {len(trainings)}, {training.method}"
                    table, before = _train(training, before, what)
                    spent.append(table)
                model = Path(trainings[-1].output_dir) / "model"
                frame = measured(way, seed, before, functools.partial(load_model, model))
                total = pd.concat(spent)[["training_seconds", "iterations"]].sum()
                frames.append(frame.assign(**total))
    return pd.concat(frames, ignore_index=True)


def _train(config: RunConfig, before: Mapping[str, str], what: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """What a training took, and what the next one begins with."""
    result = Path(config.output_dir) / "training.csv"
    settings = {k: v for k, v in config.to_dict().items() if k not in ("output_dir", "model")} | before
    table = find_result(result, settings)
    if table is None:
        logger.info("%s", what)
        made = create_trainer(config).train()
        table = pd.DataFrame({"training_seconds": [made.seconds], "iterations": [len(made.history)]})
        save_table(result, table)
    digest = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()
    return table, {"earlier training": digest}


def _measure(
    name: str, model: ISRModel, samples: Sequence[Sample], measures: Sequence[Measure], results: int, folder: Path
) -> pd.DataFrame:
    """Rows of a model, whose first results for some images are kept as pictures."""
    spread = Spread()
    frame = evaluate_measures(model, samples, measures, {}, range(results), spread.add, name=name)
    images = torch.stack([spread.first[i] for i in range(min(SHOWN, len(samples)))])
    save_tensors(folder / _PICTURES, {"images": images})
    return frame.assign(
        l_std=frame["image"].map(spread.l_std()), seconds_per_image=seconds_per_image(model, samples[0])
    )


def shown_images(config: ComparisonConfig) -> dict[str, Tensor]:
    """By way the first results of its first seed for some images, ``[N, 3, H, W]``."""
    ways = (BASE, *config.ways)
    return {way: load_tensors(config.run_folder(way, 0) / _PICTURES)[0]["images"] for way in ways}
