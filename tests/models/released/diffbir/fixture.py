"""DiffBIR at a reduced width: what `make` stored, weights for it, and files and models made of them."""

import functools
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rfsr_ext.models.diffbir import DiffBIRModel
from rfsr_ext.networks.swinir import SwinIR
from tests.models.released.diffbir.inputs import tokenizer
from tests.models.released.seeded import seeded
from tests.once import built_once, written_once

HERE = Path(__file__).parent
KEYS = json.loads((HERE / "keys.json").read_text())
EXPECTED = load_file(HERE / "expected.safetensors")


@functools.cache
def _weights(part: str, width: str, scale: float) -> dict[str, Tensor]:
    shapes = KEYS[width][part] if width else KEYS[part]
    tensors = seeded(shapes, scale=scale)
    if part == "swinir":  # buffers are what the class computes
        tensors |= dict(SwinIR(**SwinIR.config_of(tensors)).named_buffers())
    return tensors


def weights(part: str, width: str = "", scale: float = 1.0) -> dict[str, Tensor]:
    """The tensors of a network under its authors' names; not to be written to."""
    return dict(_weights(part, width, scale))


def full_v1() -> dict[str, Tensor]:
    """The tensors of ``general_full_v1.ckpt``."""
    vae = weights("vae", "tiny")
    parts = {
        "model.diffusion_model": weights("unet", "tiny"),
        "control_model": weights("controlnet", "tiny"),
        "first_stage_model": vae,
        "cond_encoder": {name: t for name, t in vae.items() if name.startswith(("encoder.", "quant_conv."))},
        "cond_stage_model.model": weights("text", "tiny"),
        "preprocess_model": weights("swinir"),
    }
    tensors = {name: torch.zeros(shape) for name, shape in KEYS["schedule"].items()}
    return tensors | {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}


def stable_diffusion() -> dict[str, Tensor]:
    """The tensors of Stable Diffusion's one file."""
    names = ("model.", "first_stage_model.", "cond_stage_model.")
    return {name: t for name, t in full_v1().items() if name.startswith(names) or "." not in name}


RELEASES = {
    "v1": ("v1_general.pth", "general_swinir_v1.ckpt", "v2-1_512-ema-pruned.ckpt"),
    "v2": ("v2.pth", "BSRNet.pth", "v2-1_512-ema-pruned.ckpt"),
    "v2.1": ("DiffBIR_v2.1.pt", "realesrgan_s4_swinir_100k.pth", "sd2.1-base-zsnr-laionaes5.ckpt"),
}


@written_once
def release(folder: Path, version: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a version's files as its authors publish them, and a tokenizer; "v1 full" is the older layout of v1."""

    def save(name: str, tensors: dict[str, Tensor], wrapped: bool = False) -> None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        torch.save({"state_dict": tensors, "global_step": 1} if wrapped else tensors, folder / name)

    if version == "v1 full":
        save("general_full_v1.ckpt", full_v1(), wrapped=True)
        save("general_swinir_v1.ckpt", weights("swinir"))
    else:
        control, first_stage, base = RELEASES[version]
        save(control, weights("controlnet", "tiny"))
        save(first_stage, weights("rrdbnet", scale=1.5) if version == "v2" else weights("swinir"))
        save(base, stable_diffusion(), wrapped=True)
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@built_once
def diffbir(version: str, **options) -> DiffBIRModel:
    """The tiny model of a version, opened from its files."""
    with tempfile.TemporaryDirectory() as folder:
        return DiffBIRModel.from_released(release(Path(folder), version), **options)
