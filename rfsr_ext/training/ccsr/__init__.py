"""CCSR (arXiv 2401.00877): its two stages as methods of training, see ``docs/ccsr.md``."""

from rfsr_ext.training.ccsr.config import CCSRConfig, CCSRStage1Config, CCSRStage2Config
from rfsr_ext.training.ccsr.consistency import Consistency
from rfsr_ext.training.ccsr.decoder import DecoderTuning
from rfsr_ext.training.ccsr.trainer import CCSRStageTrainer, CCSRTrainer

__all__ = [
    "CCSRConfig",
    "CCSRStage1Config",
    "CCSRStage2Config",
    "CCSRStageTrainer",
    "CCSRTrainer",
    "Consistency",
    "DecoderTuning",
]
