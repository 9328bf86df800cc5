"""Every method of training by its name: the settings and the trainer of each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rfsr_ext.training.ccsr import (
    CCSRConfig,
    CCSRStage1Config,
    CCSRStage2Config,
    CCSRStageTrainer,
    CCSRTrainer,
)
from rfsr_ext.training.config import RFSRConfig, RunConfig, read_values
from rfsr_ext.training.dp2o import DP2OConfig, DP2OTrainer
from rfsr_ext.training.rfsr import RFSRTrainer, TrainingResult

__all__ = ["METHODS", "Trainer", "create_trainer", "load_config", "method_presets"]


class Trainer(Protocol):
    """A run of a method, made from its settings alone."""

    def train(self, resume: bool = True) -> TrainingResult: ...


METHODS: dict[str, tuple[type[RunConfig], Callable[[Any], Trainer]]] = {
    "rfsr": (RFSRConfig, RFSRTrainer),
    "ccsr": (CCSRConfig, CCSRTrainer),
    "ccsr-stage1": (CCSRStage1Config, CCSRStageTrainer),
    "ccsr-stage2": (CCSRStage2Config, CCSRStageTrainer),
    "dp2o": (DP2OConfig, DP2OTrainer),
}


def method_presets() -> tuple[str, ...]:
    """The presets of all methods."""
    return tuple(preset for config, _ in METHODS.values() for preset in config.presets)


def load_config(source: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a preset or a YAML file of any method; its key ``method`` says of which, "rfsr" by default.

    Raises:
        FileNotFoundError: if there is neither a file nor a preset of that name.
        ValueError: if the file is no YAML mapping, or a key or value is wrong.
    """
    values, name = read_values(source, method_presets(), overrides)
    method = values.get("method", "rfsr")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"{name}: method must be one of {', '.join(METHODS)}, got {method!r}")
    config, _ = METHODS[method]
    return config.from_dict(values, name)


def create_trainer(config: RunConfig) -> Trainer:
    """The trainer of the settings' method."""
    _, trainer = METHODS[config.method]
    return trainer(config)
