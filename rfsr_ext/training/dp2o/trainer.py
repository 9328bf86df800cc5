"""DP2O from a configuration: sample, score, pair, train, and show what became of best, mean and worst."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset

from rfsr_ext.data import Sample, evaluation_crops, photographs
from rfsr_ext.data.candidates import CandidateFolder
from rfsr_ext.evaluation.measure import Scorer
from rfsr_ext.evaluation.preferences import Measure, Scores, create_measures, score_candidates
from rfsr_ext.files import check_unheld
from rfsr_ext.models import ISRModel
from rfsr_ext.processes import from_main, join
from rfsr_ext.rewards.ranking import HybridReward, pair_candidates
from rfsr_ext.sampling import sample_candidates
from rfsr_ext.training import setup
from rfsr_ext.training.dp2o.config import DP2OConfig
from rfsr_ext.training.dp2o.held_out import HeldOutExtremes
from rfsr_ext.training.dp2o.method import DP2O, PreferencePairs
from rfsr_ext.training.dp2o.report import WRITTEN, Report
from rfsr_ext.training.kept import count_seconds, read_seconds
from rfsr_ext.training.loop import Loop, create_accelerator
from rfsr_ext.training.rfsr import TrainingResult

__all__ = ["DP2OResult", "DP2OTrainer", "hybrid_reward", "sample_preferences", "score_preferences"]

logger = logging.getLogger(__name__)


def hybrid_reward(config: DP2OConfig) -> HybridReward:
    """The reward that the settings describe."""
    return HybridReward(config.full_reference, config.no_reference, config.reward_scope)


def sample_preferences(config: DP2OConfig, model: ISRModel, dataset: Dataset, round_: int = 1) -> CandidateFolder:
    """Sample a round's candidates, or as many as are missing."""
    keys = ("data", "degradation", "crop_size", "seed")
    sample_candidates(
        model,
        dataset,
        config.folder(round_),
        config.images,
        config.candidates,
        seed=config.seed + (round_ << 32),
        batch_size=config.sampling_batch_size,
        num_inference_steps=config.num_inference_steps,
        source={key: value for key, value in config.to_dict().items() if key in keys},
    )
    return CandidateFolder(config.folder(round_))


def score_preferences(
    config: DP2OConfig, model: ISRModel, measures: Sequence[Measure], round_: int = 1
) -> tuple[CandidateFolder, Scores]:
    """Score a round's candidates, or as many as are missing.

    Raises:
        FileNotFoundError: if candidates have not been sampled, or are gone.
    """
    candidates = CandidateFolder(config.folder(round_))
    return candidates, score_candidates(model, candidates, measures, config.sampling_batch_size)


@dataclass(frozen=True)
class DP2OResult(TrainingResult):
    """`TrainingResult`, and the comparison with the base model on other photographs.

    Attributes:
        report: None where the settings ask for none.
    """

    report: Report | None = None

    @property
    def summary(self) -> str:
        """What changed, and where the models and pictures lie."""
        return "\n".join(filter(None, [self.report.summary if self.report else "", super().summary]))


class DP2OTrainer:
    """Fine-tunes any `ISRModel` by DP2O-SR: its own best results against its own worst.

    Every round samples candidates with the model as it is, scores them and trains on their pairs; what is there already
    is neither sampled nor scored again, and training goes on from the newest checkpoint.  All randomness of iteration k
    comes from ``(config.seed, k)``.  Every part can be given; what is not given is built from ``config``.

    Args:
        config: all settings.
        model: the pre-trained model; it is trained in place.
        dataset: samples as `rfsr_ext.data.Sample`; candidates are sampled for the first ones.
        measures: the metrics that the settings name.
        validation: held-out samples, measured during training.
        judges: scorers by name that training never uses.
        test: other held-out samples, for the comparison at the end.
    """

    def __init__(
        self,
        config: DP2OConfig,
        model: ISRModel | None = None,
        *,
        dataset: Dataset | None = None,
        measures: Sequence[Measure] | None = None,
        validation: list[Sample] | None = None,
        judges: dict[str, Scorer] | None = None,
        test: list[Sample] | None = None,
    ):
        self.config, self.accelerator = config, create_accelerator(config)
        join()  # sampling and scoring are shared as training is
        device = self.accelerator.device
        self.model = setup.build_model(config, device, model)
        self.hybrid = hybrid_reward(config)
        if measures is None:
            measures = create_measures(config.full_reference, config.no_reference, device)
        self.measures = list(measures)
        self.dataset = setup.build_samples(config, self.model, config.images, dataset)
        self.validation = setup.build_validation(config, self.model) if validation is None else validation
        self.judges = setup.build_judges(device) if judges is None else judges
        if test is None:
            size, count, test = config.validation_size, config.report_crops, []
            if count:
                self.model.check_size(size, "validation_size")
                test = evaluation_crops(photographs("test"), size, count, called="report_crops")
        self.test = test
        self.base = self.model.fingerprint()
        self.adapted = False
        self.original = None if config.lora_rank else self.model.reference()

    def train(self, resume: bool = True) -> DP2OResult:
        """Every round in turn, see `rfsr_ext.training.loop.Loop.train`.

        Raises:
            ValueError, FileNotFoundError: as the parts of a round do, and see `Loop.train`.
            FileExistsError: if the folder has files of the report's names and no run has held it before.
        """
        if self.test and self.accelerator.is_main_process:
            check_unheld(self.config.output_dir, WRITTEN)
        for round_ in range(1, self.config.rounds + 1):
            _, held_out, loop = self._round(round_)
            history = loop.train(resume)
        report = self._report() if self.test else None
        setup.finish(self.model)
        validation = pd.DataFrame(held_out.measured)
        return DP2OResult(self.model, loop.folder, history, validation, held_out.best_iteration, loop.seconds, report)

    def _round(self, round_: int) -> tuple[DP2O, HeldOutExtremes, Loop]:
        config = self.config.of_round(round_)
        spent = Path(config.output_dir) / "preferences.seconds"
        with count_seconds(spent) if self.accelerator.is_main_process else contextlib.nullcontext():
            sample_preferences(self.config, self.model, self.dataset, round_)
            candidates, scores = score_preferences(self.config, self.model, self.measures, round_)
        pairs = pair_candidates(
            self.hybrid(scores.values, scores.lower_better),
            config.selected,
            config.intra_group_weight,
            config.inter_group_weight,
        )
        logger.info(
            "round %d: %d pairs of %d images, weights %.3f to %.3f",
            round_, len(pairs), len(pairs.groups), pairs.weights.min(), pairs.weights.max(),
        )  # fmt: skip
        method = DP2O(config, self._trained(), self._reference(round_), f"{self.base} round {round_}")
        loops: list[Loop] = []
        held_out = HeldOutExtremes(
            self.model,
            self.validation,
            self.measures,
            self.hybrid,
            self.judges,
            range(config.validation_seeds),
            lambda: loops[0].history,
            max_psnr_drop=config.max_psnr_drop,
            batch_size=config.sampling_batch_size,
            num_inference_steps=config.num_inference_steps,
        )
        dataset = PreferencePairs(candidates, pairs, config.seed)
        loops.append(Loop(config, method, dataset, held_out, self.accelerator, name=f"DP2O round {round_}"))
        loops[0].seconds = from_main(read_seconds(spent))
        return method, held_out, loops[0]

    def _trained(self) -> ISRModel:
        """The model with what is to be trained asking for gradients; adapters are made once."""
        if not self.config.lora_rank:
            return self.model.unfreeze()
        if not self.adapted:
            set_seed(self.config.seed)  # adapters start from random numbers
            setup.add_adapters(self.model, self.config.lora_rank, self.config.lora_targets)
            self.adapted = True
        return self.model

    def _reference(self, round_: int) -> ISRModel | None:
        if self.config.reference == "round" and round_ > 1:
            return self.model.reference()
        return self.original

    def _report(self) -> Report | None:
        """On the main process, where the model is whole."""
        if not self.accelerator.is_main_process:
            return None
        options: dict[str, Any] = {
            "seeds": range(self.config.report_seeds),
            "batch_size": self.config.sampling_batch_size,
            "num_inference_steps": self.config.num_inference_steps,
        }
        with torch.no_grad():
            report = Report(self.test, self.measures, self.hybrid, self.judges, **options)
            with setup.as_reference(self.model, self.original) as base:
                report.measure("base", base)
            report.measure("tuned", self.model)
        report.write(Path(self.config.output_dir))
        return report
