"""Training: settings, the loop, the methods that run on it, and what measures them."""

from rfsr_ext.training.config import RFSRConfig, RunConfig
from rfsr_ext.training.held_out import HeldOut
from rfsr_ext.training.loop import Loop, NonFiniteLossError
from rfsr_ext.training.method import Method
from rfsr_ext.training.objective import RFSRObjective
from rfsr_ext.training.rfsr import RFSR, RFSRTrainer, TrainingResult, build_objective
from rfsr_ext.training.runs import create_trainer, load_config

__all__ = [
    "HeldOut",
    "Loop",
    "Method",
    "NonFiniteLossError",
    "RFSR",
    "RFSRConfig",
    "RFSRObjective",
    "RFSRTrainer",
    "RunConfig",
    "TrainingResult",
    "build_objective",
    "create_trainer",
    "load_config",
]
