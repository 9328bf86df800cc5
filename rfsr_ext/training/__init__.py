"""Reward feedback fine-tuning: settings, the objective of one batch, and the trainer."""

from rfsr_ext.training.config import RFSRConfig
from rfsr_ext.training.objective import RFSRObjective
from rfsr_ext.training.trainer import NonFiniteLossError, RFSRTrainer, TrainingResult

__all__ = ["NonFiniteLossError", "RFSRConfig", "RFSRObjective", "RFSRTrainer", "TrainingResult"]
