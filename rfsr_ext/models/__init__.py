"""Base models: what RFSR asks of one, and the implementation over diffusers parts."""

import json
from pathlib import Path

from rfsr_ext.importing import create_object, is_import_name
from rfsr_ext.models.base import Condition, ISRModel, Recipe
from rfsr_ext.models.check import check_model
from rfsr_ext.models.controlnet import ISR_CONFIG, ControlNetISRModel
from rfsr_ext.models.diffbir import DiffBIRModel
from rfsr_ext.models.process import NonUniformProcess, Process, check_scheduler
from rfsr_ext.weights import WEIGHTS

__all__ = [
    "Condition",
    "ControlNetISRModel",
    "DiffBIRModel",
    "ISRModel",
    "NonUniformProcess",
    "Process",
    "Recipe",
    "check_model",
    "check_scheduler",
    "list_models",
    "load_model",
]

_CLASSES: dict[str, type[ISRModel]] = {kind.kind: kind for kind in (ControlNetISRModel, DiffBIRModel)}
_SHIPPED: dict[str, Path] = {"mini": WEIGHTS / "model"}


def list_models() -> list[str]:
    """Names of the models that ship with the package."""
    return list(_SHIPPED)


def load_model(name: str | Path = "mini", **options) -> ISRModel:
    """A model that ships with the package, one of your own code, or a folder on disk.

    The mini model is a ×4 model for images of 64 to 128 pixels, sampled by 50 DDIM steps; it fits a laptop.

    Args:
        name: one of `list_models`; a folder that a model's ``save_pretrained`` wrote, or one of a Stable Diffusion
            model with a ControlNet; or ``package.module:Name`` of a function that returns an `ISRModel`.
        options: for the ``from_pretrained`` of the folder's class, or for the function, such as ``torch_dtype=``,
            ``scale=``, ``controlnet=``, ``start=``.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the folder holds no model of a known kind.
    """
    if is_import_name(str(name)):
        return create_object(str(name), "model", ISRModel, **options)
    path = _SHIPPED.get(str(name), Path(name))
    config = path / ISR_CONFIG
    kind = json.loads(config.read_text()).get("model", "controlnet") if config.is_file() else "controlnet"
    if kind not in _CLASSES:
        raise ValueError(f"model in {str(config)!r} must be one of {', '.join(_CLASSES)}, got {kind!r}")
    return _CLASSES[kind].from_pretrained(path, **options)
