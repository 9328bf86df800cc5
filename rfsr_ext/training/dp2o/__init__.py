"""DP2O-SR (Wu et al., 2025, arXiv 2510.18851): a model learns which of its own results are better."""

from rfsr_ext.training.dp2o.config import DP2OConfig
from rfsr_ext.training.dp2o.method import DP2O, PreferencePairs
from rfsr_ext.training.dp2o.trainer import DP2OResult, DP2OTrainer

__all__ = ["DP2O", "DP2OConfig", "DP2OResult", "DP2OTrainer", "PreferencePairs"]
