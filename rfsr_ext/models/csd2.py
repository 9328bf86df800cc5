"""C-SD2 and DP2O-SD2 (Wu et al., 2025, arXiv 2510.18851): a stock ControlNet over Stable Diffusion 2-base."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ControlNetModel, DDPMScheduler
from torch import Tensor

from rfsr_ext.models.base import Recipe, Tagger
from rfsr_ext.models.controlnet import ControlNetISRModel, open_tokenizer_and_scheduler
from rfsr_ext.models.folders import open_part
from rfsr_ext.weights.reading import open_network, read_tensors

__all__ = ["CSD2_RECIPE", "CSD2ISRModel", "read_controlnet"]

CSD2_RECIPE = Recipe(
    num_inference_steps=50,
    start="noise",
    guidance_scale=3.5,
    negative_prompt="dotted, noise, blur, lowres, smooth",
    color_fix="adain",
    tile=512,
    overlap=128,
    min_side=512,
)
"""How the authors of C-SD2 sample."""


class CSD2ISRModel(ControlNetISRModel):
    """A `ControlNetISRModel` used as the authors of C-SD2 do: from pure noise, with tags as prompt.

    Args:
        parts: those of `ControlNetISRModel`, by name.
        recipe: the authors' values; `CSD2_RECIPE` by default.
        trained: see `ControlNetISRModel`; the authors of C-SD2 train ``{"controlnet": ""}`` alone.
        options: the others of `ControlNetISRModel`; the authors' ``tagger`` is DAPE.
    """

    kind = "c-sd2"

    def __init__(self, *, recipe: Recipe = CSD2_RECIPE, **options: Any):
        super().__init__(recipe=recipe, **options)

    @classmethod
    def from_released(
        cls,
        weights: str | Path,
        *,
        base: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        scale: int = 4,
        trained: dict[str, str] | None = None,
        tagger: Tagger | None = None,
        **recipe: Any,
    ) -> Self:
        """Open C-SD2 or DP2O-SD2 as its authors publish it.

        Args:
            weights: ``preset/models/c-sd2`` or ``dp2o-sd2``, or the file ``model.safetensors`` in it: the ControlNet.
            base: the diffusers folder of Stable Diffusion 2-base; beside ``weights`` by default.
            torch_dtype: of all networks.
            scale, trained, tagger: as in the class.
            recipe: fields of `Recipe` that replace those of `CSD2_RECIPE`.

        Raises:
            FileNotFoundError: if a file or folder does not exist.
            ValueError: if one is damaged or another model's.
            TypeError: for a recipe field that does not exist.
        """
        merged = CSD2_RECIPE.replace(**recipe)
        path, tensors = read_controlnet(weights, ("c-sd2", "dp2o-sd2"))
        base = path.parent.parent / "stable-diffusion-2-base" if base is None else Path(base)
        if not base.is_dir():
            raise FileNotFoundError(
                f"base {str(base)!r} does not exist; give the diffusers folder of Stable Diffusion 2-base"
            )
        parts = open_tokenizer_and_scheduler(base)
        for name in ("vae", "text_encoder", "unet"):
            parts[name] = open_part(cls.classes[name], base / name, torch_dtype)
        widths = {
            int(found[1] or 0): len(tensor)  # every second block widens
            for name, tensor in tensors.items()
            if (found := re.fullmatch(r"controlnet_cond_embedding\.(?:conv_in|blocks\.(\d*[13579]))\.weight", name))
        }
        embedding = [widths[block] for block in sorted(widths)] or [16, 32, 96, 256]

        def build() -> ControlNetModel:
            return ControlNetModel.from_unet(
                parts["unet"], conditioning_embedding_out_channels=embedding, load_weights_from_unet=False
            )

        what = f"a ControlNet of the U-Net in {str(base)!r}"
        parts["controlnet"] = open_network(build, tensors, path, what, torch_dtype)
        parts["scheduler"] = DDPMScheduler.from_config(parts["scheduler"].config, clip_sample=False)
        return cls(**parts, scale=scale, recipe=merged, trained=trained, tagger=tagger)


def read_controlnet(weights: str | Path, folders: Sequence[str]) -> tuple[Path, dict[str, Tensor]]:
    """The one file that the authors of DP2O-SR publish of a model, and the ControlNet's weights in it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    path = Path(weights)
    path = path / "model.safetensors" if path.is_dir() or not path.suffix else path
    if not path.is_file():
        raise FileNotFoundError(
            f"weights {str(path)!r} does not exist; give the folder {' or '.join(folders)} that the README of "
            f"github.com/cswry/DP2O-SR links to, with model.safetensors in it"
        )
    return path, read_tensors(path, "weights")
