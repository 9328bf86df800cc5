"""Base models: what RFSR asks of one, and the implementation over diffusers parts."""

from pathlib import Path

import torch

from rfsr_ext.importing import create_object, did_you_mean, import_object, is_import_name
from rfsr_ext.models.base import Condition, ISRModel, Recipe
from rfsr_ext.models.catalog import PUBLISHED, open_published
from rfsr_ext.models.check import check_model
from rfsr_ext.models.controlnet import ControlNetISRModel
from rfsr_ext.models.folders import ISR_CONFIG, read_json
from rfsr_ext.models.process import NonUniformProcess, Process, check_scheduler
from rfsr_ext.weights import WEIGHTS

__all__ = [
    "Condition",
    "ControlNetISRModel",
    "ISRModel",
    "NonUniformProcess",
    "Process",
    "Recipe",
    "check_model",
    "check_scheduler",
    "list_models",
    "load_model",
]

# By the word in isr_config.json, what opens a folder that was saved here; imported when one is opened.
_KINDS = {
    "controlnet": "rfsr_ext.models.controlnet:ControlNetISRModel",
    "c-sd2": "rfsr_ext.models.csd2:CSD2ISRModel",
    "ccsr": "rfsr_ext.models.ccsr:CCSRv1Model",
    "ccsr-v2": "rfsr_ext.models.ccsr:CCSRv2Model",
    "flux": "rfsr_ext.models.flux:FluxISRModel",
    "diffbir": "rfsr_ext.models.diffbir:DiffBIRModel",
    "pasd": "rfsr_ext.models.pasd:PASDModel",
    "seesr": "rfsr_ext.models.seesr:SeeSRModel",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHIPPED: dict[str, Path] = {"mini": WEIGHTS / "model"}


def list_models() -> list[str]:
    """Names that `load_model` knows: the model that ships with the package, then the published ones."""
    return [*_SHIPPED, *PUBLISHED]


def load_model(name: str | Path = "mini", **options) -> ISRModel:
    """A model that ships with the package, a published one, one of your own code, or a folder on disk.

    The mini model is a ×4 model for images of 64 to 128 pixels, sampled by 50 DDIM steps; it fits a laptop.

    Args:
        name: one of `list_models`; a folder that a model's ``save_pretrained`` wrote, or one of a Stable Diffusion
            model with a ControlNet; or ``package.module:Name`` of a function that returns an `ISRModel`.
        options: for what opens it.  A published model takes ``weights=`` and ``base=``, the folders of its files, see
            `rfsr_ext.models.catalog`; all take ``torch_dtype=``, ``scale=``, ``trained=`` and the fields of `Recipe`,
            such as ``start=``; a folder without ControlNet takes ``controlnet=``.

    Raises:
        FileNotFoundError: if there is no such folder, or a file of a published model is missing.
        ValueError: if the folder holds no model of a known kind.
    """
    if isinstance(dtype := options.get("torch_dtype"), str):  # from YAML or the command line
        if dtype not in _DTYPES:
            raise ValueError(f"torch_dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        options["torch_dtype"] = _DTYPES[dtype]
    if str(name) in PUBLISHED and not Path(name).is_dir():
        return open_published(str(name), **options)
    if is_import_name(str(name)):
        return create_object(str(name), "model", ISRModel, **options)
    for option in ("weights", "base"):
        if option in options:
            raise ValueError(f"{option} is for published models, which {str(name)!r} is not; leave it out")
    path = _SHIPPED.get(str(name), Path(name))
    if not path.exists():
        known = list_models()
        advice = did_you_mean(str(name), known) or f"give a folder on disk or one of {', '.join(known)}"
        raise FileNotFoundError(f"model folder {str(name)!r} does not exist, and nothing is downloaded; {advice}")
    config = path / ISR_CONFIG
    kind = read_json(config).get("model", "controlnet") if config.is_file() else "controlnet"
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"model in {str(config)!r} must be one of {', '.join(_KINDS)}, got {kind!r}")
    return import_object(_KINDS[kind], "model").from_pretrained(path, **options)
