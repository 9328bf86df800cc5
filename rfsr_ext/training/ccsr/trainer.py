"""CCSR's stages from their settings: one of them, or both in a row."""

import pandas as pd
from torch.utils.data import Dataset

from rfsr_ext.data import Sample
from rfsr_ext.evaluation.measure import Scorer
from rfsr_ext.models import ISRModel
from rfsr_ext.training import setup
from rfsr_ext.training.ccsr.config import CCSRConfig, CCSRStage1Config, CCSRStage2Config
from rfsr_ext.training.ccsr.consistency import Consistency
from rfsr_ext.training.ccsr.decoder import DecoderTuning, build_perceptual_loss
from rfsr_ext.training.ccsr.held_out import HeldOutStability
from rfsr_ext.training.loop import Loop, create_accelerator
from rfsr_ext.training.rfsr import TrainingResult

__all__ = ["CCSRStageTrainer", "CCSRTrainer"]


class CCSRStageTrainer:
    """One stage, as its settings say; what is not given is built.

    Args:
        config: of stage 1 or of stage 2.
        model: trained in place.
        dataset: samples as `rfsr_ext.data.Sample`, one for every index that the run asks for.
        validation: held-out samples.
        judges: scorers by name that training never uses.
    """

    def __init__(
        self,
        config: CCSRStage1Config | CCSRStage2Config,
        model: ISRModel | None = None,
        *,
        dataset: Dataset | None = None,
        validation: list[Sample] | None = None,
        judges: dict[str, Scorer] | None = None,
    ):
        if config.lora_rank:
            raise ValueError(
                f"lora_rank must be 0 for {config.method}, which trains all weights, got {config.lora_rank}"
            )
        accelerator = create_accelerator(config)
        self.model = setup.build_model(config, accelerator.device, model)
        dataset = setup.build_samples(config, self.model, config.iterations * config.batch_size, dataset)
        validation = setup.build_validation(config, self.model) if validation is None else validation
        judges = setup.build_judges(accelerator.device) if judges is None else judges
        kind = Consistency if isinstance(config, CCSRStage1Config) else DecoderTuning
        self.method = kind(config, self.model)
        distance = build_perceptual_loss(config.validation_distance, self.model.device)
        self.held_out = HeldOutStability(
            self.model, validation, distance, judges, seeds=config.validation_seeds,
            max_psnr_drop=config.max_psnr_drop, seed=config.seed, batch_size=config.batch_size,
            num_inference_steps=getattr(config, "num_inference_steps", None),
        )  # fmt: skip
        self.loop = Loop(config, self.method, dataset, self.held_out, accelerator, name=config.method)

    def train(self, resume: bool = True) -> TrainingResult:
        """Train to ``config.iterations``, see `rfsr_ext.training.loop.Loop.train`."""
        history = self.loop.train(resume)
        setup.finish(self.model)
        return TrainingResult(
            self.model, self.loop.folder, history, pd.DataFrame(self.held_out.measured), self.held_out.best_iteration,
            self.loop.seconds,
        )  # fmt: skip


class CCSRTrainer:
    """Both stages in a row; the second opens what the first has written."""

    def __init__(self, config: CCSRConfig):
        self.config = config

    def train(self, resume: bool = True) -> TrainingResult:
        """Train every stage that is not done, and give the last one's result."""
        for config in self.config.stages():
            result = CCSRStageTrainer(config).train(resume)
        return result
