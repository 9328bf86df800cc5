"""Base models: the protocol RFSR asks for and its implementation over diffusers parts."""

from rfsr_ext.importing import create_object, is_import_name
from rfsr_ext.models.base import Condition, ISRModel
from rfsr_ext.models.controlnet import ControlNetISRModel
from rfsr_ext.weights import WEIGHTS

__all__ = ["Condition", "ControlNetISRModel", "ISRModel", "load_model"]


def load_model(name: str = "mini") -> ISRModel:
    """The mini model ("mini"), a folder of `ControlNetISRModel.save_pretrained`, or what ``package.module:Name`` makes.

    The mini model is a ×4 model for images of 64 to 128 pixels, sampled by 50 DDIM steps; it fits a laptop.
    """
    if is_import_name(name):
        return create_object(name, "model", ISRModel)
    return ControlNetISRModel.from_pretrained(WEIGHTS / "model" if name == "mini" else name)
