"""Base models: the protocol RFSR asks for and its implementation over diffusers parts."""

from rfsr_ext.models.base import Condition, ISRModel
from rfsr_ext.models.controlnet import ControlNetISRModel
from rfsr_ext.weights import WEIGHTS

__all__ = ["Condition", "ControlNetISRModel", "ISRModel", "load_model"]


def load_model(name: str = "mini") -> ControlNetISRModel:
    """The mini model that ships with the package ("mini"), or a folder written by `ControlNetISRModel.save_pretrained`.

    The mini model is a ×4 model for images of 64 to 128 pixels, sampled by 50 DDIM steps; it fits a laptop.
    """
    return ControlNetISRModel.from_pretrained(WEIGHTS / "model" if name == "mini" else name)
