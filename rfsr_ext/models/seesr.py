"""SeeSR (Wu et al., CVPR 2024, arXiv 2311.16518): Stable Diffusion 2 attending to what RAM sees in LR images."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Self

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from rfsr_ext.models.base import Recipe
from rfsr_ext.models.controlnet import ControlNetISRModel
from rfsr_ext.models.folders import open_part, open_plain_part, quiet
from rfsr_ext.networks.ram import RAM, TAGS_FILE, THRESHOLDS_FILE
from rfsr_ext.networks.seesr import SeeSRControlNet, SeeSRUNet
from rfsr_ext.weights.reading import open_network, read_tensors

__all__ = ["SEESR", "SEESR_TURBO", "SeeSRModel"]

logger = logging.getLogger(__name__)

SEESR = Recipe(
    num_inference_steps=50,
    start="lr",
    start_timestep=999,
    guidance_scale=5.5,
    added_prompt="clean, high-resolution, 8k",
    negative_prompt="dotted, noise, blur, lowres, smooth",
    color_fix="adain",
    tile=768,
    overlap=256,
    min_side=512,
    structure_window=(1, 20),
    reward_window=(41, 50),
)
"""The authors' values, and the paper's windows for SeeSR.

Tiles are the authors' 96 latents.  They let them overlap by 4, RFSR's copy of their script by 32.  This is 32, a third
of a tile: with random weights at reduced width 4 of 96 leave a seam and 32 of 96 none.  A result of 3840 by 2160 then
takes 28 tiles instead of 18.
"""

SEESR_TURBO = SEESR.replace(num_inference_steps=2, guidance_scale=1.0, structure_window=(1, 1), reward_window=(2, 2))
"""The authors' values over SD-Turbo; the windows are no one's."""

_WHERE = "https://github.com/cswry/SeeSR says where its files are"


class SeeSRModel(ControlNetISRModel):
    """SeeSR: U-Net and ControlNet attend to the prompt, which RAM's tags begin, and to RAM's image tokens.

    RAM (SeeSR's *DAPE*, RAM for degraded images) sees the LR image.  Its tokens are the same under the negative prompt.
    The encoded LR image is noised to t = 999, then sampling begins at the trajectory's first timestep, 981 of 50 steps.

    The authors' code differs in this: every image of a batch starts from the first one's latents; the VAE's encoding is
    drawn from its posterior, here it is the mode; a prompt is "tags, prompt,added", here it is "tags, prompt, added".

    Args:
        parts: those of `ControlNetISRModel`, by position or name, U-Net and ControlNet with ``image_attentions``.
        ram: gives image tokens, and tags if it knows their names.
        recipe: the authors' values by default.
        trained: see `ISRModel`; all of U-Net and ControlNet by default, as RFSR's paper says.  SeeSR's authors, and the
            code of RFSR's, train ``{"unet": "image_attentions", "controlnet": ""}``.
        more: see `ControlNetISRModel`.

    Raises:
        ValueError: if the parts do not fit each other, or the scheduler cannot serve.
    """

    kind = "seesr"
    classes: ClassVar[dict[str, type]] = {
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "unet": SeeSRUNet,
        "controlnet": SeeSRControlNet,
        "ram": RAM,
    }
    opens = "SeeSR"

    def __init__(self, *parts, ram: RAM, recipe: Recipe | None = None, **more):
        super().__init__(*parts, recipe=recipe or SEESR, **more)
        self.networks["ram"] = ram.eval().requires_grad_(False)
        if self.tagger is None and not ram.has_tags:
            logger.warning(
                "prompts stay without tags, because %s and %s were not beside the weights of RAM; `rfsr weights fetch "
                "ram-tags ram-thresholds` gets them",
                TAGS_FILE,
                THRESHOLDS_FILE,
            )

    @property
    def ram(self) -> nn.Module:
        return self.networks["ram"]

    def describe(self, lr: Tensor) -> list[str]:
        """RAM's tags, "cat, fur, stare"; "" for each image if the names of the tags are not known."""
        return self.ram.tags(lr) if self.tagger is None and self.ram.has_tags else super().describe(lr)

    def embed_image(self, lr: Tensor) -> dict[str, Tensor]:
        return {"image_encoder_hidden_states": self.ram.tokens(lr)}

    @classmethod
    def from_released(
        cls,
        weights: str | Path,
        *,
        base: str | Path | None = None,
        base_unet: bool = False,
        torch_dtype: torch.dtype = torch.float32,
        scale: int = 4,
        trained: dict[str, str] | None = None,
        **recipe,
    ) -> Self:
        """SeeSR from its authors' download, or RFSR's; nothing is downloaded.

        Args:
            weights: the authors' ``preset/models``, which holds ``seesr/unet``, ``seesr/controlnet``, ``DAPE.pth`` and
                ``ram_swin_large_14m.pth``; or a folder such as RFSR's ``pretrained_models``, which holds ``unet``,
                ``controlnet`` and ``DAPE.pth``, or its ``checkpoint-N``, of which ``unet_target`` and
                ``controlnet_target`` are taken if these are all there is.  RAM's files are also looked for beside
                ``weights``, beside ``base`` and in ``RFSR_WEIGHTS``, see `RAM.from_released`.
            base: a diffusers folder of Stable Diffusion 2 base; by default ``stable-diffusion-2-base`` in ``weights``,
                beside it, or in ``preset/models`` beside it.
            base_unet: take the U-Net of ``base`` and only ``image_attentions`` from SeeSR's file.  Over SD-Turbo, which
                is the base then by default (``sd-turbo``), this is SeeSR-turbo: two steps without guidance.
            torch_dtype: of all networks, whatever the files have.
            scale, trained: as in the class.
            recipe: fields of `Recipe` that replace the authors' values.

        Raises:
            FileNotFoundError: if a folder or a file that is needed is nowhere.
            ValueError: if one is damaged or of another model.
            TypeError: for a recipe field that does not exist.
        """
        merged = (SEESR_TURBO if base_unet else SEESR).replace(**recipe)
        weights = Path(weights)
        own = weights / "seesr" if (weights / "seesr").is_dir() else weights
        suffix = next((s for s in ("", "_target") if not _missing(own, s)), None)
        if suffix is None:
            raise FileNotFoundError(
                f"weights must be a folder that holds seesr/unet and seesr/controlnet, or unet and controlnet, or "
                f"RFSR's unet_target and controlnet_target, got {str(weights)!r} without {_missing(own)[0]}; {_WHERE}"
            )
        base = _base(weights, "sd-turbo" if base_unet else "stable-diffusion-2-base") if base is None else Path(base)
        with _says_where():
            unet = _open_unet(own / f"unet{suffix}", base / "unet", base_unet, torch_dtype)
            controlnet = open_part(SeeSRControlNet, own / f"controlnet{suffix}", torch_dtype, "controlnet")
        ram = RAM.from_released([weights, weights.parent, base.parent], dape=True, torch_dtype=torch_dtype)
        with quiet():  # of a folder made for another scheduler, which is what it says
            tokenizer = open_plain_part(CLIPTokenizer, base / "tokenizer")
            scheduler = open_plain_part(DDPMScheduler, base / "scheduler")
        return cls(
            open_part(AutoencoderKL, base / "vae", torch_dtype, "vae"),
            open_part(CLIPTextModel, base / "text_encoder", torch_dtype, "text_encoder"),
            tokenizer,
            unet,
            controlnet,
            scheduler,
            ram=ram,
            scale=scale,
            recipe=merged,
            trained=trained,
        )


def _missing(folder: Path, suffix: str = "") -> list[str]:
    return [part for part in ("unet", "controlnet") if not (folder / f"{part}{suffix}").is_dir()]


@contextlib.contextmanager
def _says_where() -> Iterator[None]:
    """Complaints about SeeSR's own files say where these are."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}; {_WHERE}") from error


def _base(weights: Path, name: str) -> Path:
    places = [weights / name, weights.parent / name, weights.parent / "preset/models" / name]
    if found := next((place for place in places if place.is_dir()), None):
        return found
    raise FileNotFoundError(
        f"base must be given, a diffusers folder of {name} (vae/, text_encoder/, tokenizer/, scheduler/); none is "
        f"in {str(weights)!r} or beside it; stable-diffusion-2-base has left its first address, copies of it serve"
    )


def _open_unet(folder: Path, base: Path, base_unet: bool, dtype: torch.dtype) -> nn.Module:
    """SeeSR's U-Net, whose file may hold all of it or, over that of the base, ``image_attentions`` alone."""
    path = _weights_file(folder)
    tensors = read_tensors(path, "SeeSR's U-Net")
    attentions = {name: x for name, x in tensors.items() if ".image_attentions." in name}
    if not base_unet and len(attentions) < len(tensors):
        return open_part(SeeSRUNet, folder, dtype, "unet")
    stock = open_part(UNet2DConditionModel, base, dtype, "unet of the base")
    tensors = stock.state_dict() | attentions
    config = {name: value for name, value in stock.config.items() if not name.startswith("_")}
    return open_network(lambda: SeeSRUNet(**config), tensors, path, "image_attentions of SeeSR for this base", dtype)


def _weights_file(folder: Path) -> Path:
    names = [f"diffusion_pytorch_model{kind}" for kind in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")]
    if found := next((folder / name for name in names if (folder / name).is_file()), None):
        return found
    raise FileNotFoundError(f"{names[0]} is not in {str(folder)!r}")
