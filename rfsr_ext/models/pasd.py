"""PASD (Yang et al., ECCV 2024) and PASD-light: Stable Diffusion 1.5 whose decoder also attends to the ControlNet.

A ControlNet's residuals are added to the U-Net's skip connections.  In PASD each layer of the U-Net's decoder attends
to the same residuals as well, pixel by pixel (*pixel-aware cross attention*): in a transformer of its own (PASD), or in
one more attention within the transformer that is there (PASD-light).  Weights keep the names of the authors' files.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    Transformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention import Attention, BasicTransformerBlock
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel

from rfsr_ext.models.base import Condition, Recipe, Tagger
from rfsr_ext.models.controlnet import ControlNetISRModel, open_tokenizer_and_scheduler
from rfsr_ext.models.folders import open_part, read_json
from rfsr_ext.models.process import Process
from rfsr_ext.networks.options import with_options
from rfsr_ext.networks.rrdbnet import DenseBlock
from rfsr_ext.networks.taggers import load_tagger
from rfsr_ext.weights.reading import read_tensors

__all__ = ["PASD_RECIPE", "PASDControlNetModel", "PASDModel", "PASDUNet2DConditionModel"]

_WHERE = "PASD's and PASD-light's weights are linked at github.com/yangxy/PASD"
_PIXELS = "pixel_hidden_states"  # the name of the residual among the arguments of an attention

PASD_RECIPE = Recipe(
    num_inference_steps=20,
    start="lr",
    start_timestep=900,
    guidance_scale=9.0,
    added_prompt="clean, high-resolution, 8k",
    negative_prompt="blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed",
    color_fix="wavelet",
    tile=2560,  # 320 and 8 latents
    overlap=64,
    min_side=768,
    structure_window=(1, 8),
    reward_window=(18, 20),
)
"""How the authors of PASD sample, and RFSR's windows for it."""


def _weight_names(folder: Path) -> set[str]:
    """Names of the weights in a diffusers folder, without the weights."""
    files = sorted(folder.iterdir())
    if tables := [file for file in files if file.name.endswith(".index.json")]:  # weights in several files
        return set().union(*(read_json(table).get("weight_map", ()) for table in tables))
    names: set[str] = set()
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                names |= set(weights.keys())
        elif file.suffix == ".bin":
            names |= set(read_tensors(file, "weights"))
    return names


# -- U-Net ------------------------------------------------------------------------------------------------------------


def _tokens(x: Tensor) -> Tensor:
    """``[N, C, h, w]`` to ``[N, h·w, C]``."""
    return x.flatten(2).transpose(1, 2)


class _LightBlock(BasicTransformerBlock):
    """Self-attention, attention to the text, attention to the ControlNet's residual, feed-forward."""

    def __init__(self, block: BasicTransformerBlock, residual_channels: int, upcast_attention: bool):
        super().__init__(
            block.dim,
            num_attention_heads=block.num_attention_heads,
            attention_head_dim=block.attention_head_dim,
            cross_attention_dim=block.cross_attention_dim,
            only_cross_attention=block.only_cross_attention,
            upcast_attention=upcast_attention,
        )
        self.norm2_plus = nn.LayerNorm(block.dim)
        self.attn2_plus = Attention(
            query_dim=block.dim,
            cross_attention_dim=residual_channels,
            heads=block.num_attention_heads,
            dim_head=block.attention_head_dim,
            upcast_attention=upcast_attention,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        pixels = (cross_attention_kwargs or {})[_PIXELS]
        first = encoder_hidden_states if self.only_cross_attention else None
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), encoder_hidden_states=first)
        hidden_states = hidden_states + self.attn2(
            self.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states
        )
        hidden_states = hidden_states + self.attn2_plus(self.norm2_plus(hidden_states), encoder_hidden_states=pixels)
        return hidden_states + self.ff(self.norm3(hidden_states))


class _PixelUpBlock(nn.Module):
    """An up block of diffusers' U-Net whose layers also attend to the ControlNet's residuals.

    A layer is: the skip connection beside the hidden states → resnet → attention to the text, if the block has it (in
    PASD-light to the residual too) → attention to the residual (PASD).  Its residual is the one that was added to its
    skip connection.
    """

    resnets: nn.ModuleList
    attentions: nn.ModuleList | None
    pixel_attentions: nn.ModuleList | None
    upsamplers: nn.ModuleList | None

    def __init__(self, block: nn.Module, pixel_attentions: nn.ModuleList | None):
        super().__init__()
        self.resnets, self.upsamplers = block.resnets, block.upsamplers
        self.attentions = getattr(block, "attentions", None)
        self.pixel_attentions = pixel_attentions
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        skips: list[Tensor],
        residuals: list[Tensor],
        temb: Tensor,
        encoder_hidden_states: Tensor,
        upsample_size: torch.Size | None = None,
    ) -> Tensor:
        """``skips`` and ``residuals`` of this block's layers, in the order of the encoder: the last comes first."""
        for layer, resnet in enumerate(self.resnets):
            residual = residuals[-1 - layer]
            hidden_states = torch.cat([hidden_states, skips[-1 - layer]], dim=1)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(resnet, hidden_states, temb)
            else:
                hidden_states = resnet(hidden_states, temb)
            if self.attentions is not None:
                attention = self.attentions[layer]
                extra = {_PIXELS: self._project(attention, residual)} if self.pixel_attentions is None else None
                hidden_states = attention(
                    hidden_states, encoder_hidden_states, cross_attention_kwargs=extra, return_dict=False
                )[0]
            if self.pixel_attentions is not None:
                hidden_states = self.pixel_attentions[layer](hidden_states, _tokens(residual), return_dict=False)[0]
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states

    @staticmethod
    def _project(attention: nn.Module, residual: Tensor) -> Tensor:
        if attention.use_linear_projection:
            return attention.proj_in_plus(_tokens(residual))
        return _tokens(attention.proj_in_plus(residual))


class PASDUNet2DConditionModel(UNet2DConditionModel):
    """The U-Net of PASD or, with ``light``, of PASD-light; all other arguments are diffusers'.

    With c the channels of a layer of an up block, r those of the skip connection that it takes and so of the
    ControlNet's residual, its additional weights are

    * PASD: ``pixel_attentions.j``, a transformer of width c whose cross attention sees the residual (in blocks without
      attention to text its width must be c);
    * PASD-light, in blocks with attention to text only: ``attentions.j.proj_in_plus``, a 1×1 convolution from r to r,
      and in each of its ``transformer_blocks`` ``norm2_plus`` and ``attn2_plus``.

    Raises:
        ValueError: for arguments of diffusers that no PASD was trained with.
    """

    @with_options(UNet2DConditionModel, light=False)
    def __init__(self, *, light: bool = False, **config):
        super().__init__(**config)
        for name in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type",
                     "time_embedding_act_fn", "center_input_sample", "dual_cross_attention"):  # fmt: skip
            if self.config[name]:
                raise ValueError(f"{name} must be unset in the U-Net of a PASD, got {self.config[name]!r}")
        if self.config.attention_type != "default":
            raise ValueError(f"attention_type must be 'default' in a PASD, got {self.config.attention_type!r}")
        for place, block in enumerate(self.up_blocks):
            if not light:
                layers = nn.ModuleList(self._pixel_attention(place, i) for i in range(len(block.resnets)))
                self.up_blocks[place] = _PixelUpBlock(block, layers)
            elif hasattr(block, "attentions"):
                for layer in range(len(block.resnets)):
                    self._extend(block.attentions[layer], self._residual_channels(place, layer))
                self.up_blocks[place] = _PixelUpBlock(block, None)

    def _residual_channels(self, place: int, layer: int) -> int:
        """Channels of the residual for a layer of an up block: the last one's comes from the next higher resolution."""
        channels = self.config.block_out_channels[::-1]
        last = layer == len(self.up_blocks[place].resnets) - 1
        return channels[min(place + 1, len(channels) - 1)] if last else channels[place]

    def _of_block(self, name: str, place: int) -> Any:
        """An argument that may be one value or one for each down block."""
        value = self.config[name]
        return value[::-1][place] if isinstance(value, list | tuple) else value

    def _pixel_attention(self, place: int, layer: int) -> Transformer2DModel:
        config, width = self.config, self.config.block_out_channels[::-1][place]
        heads = self._of_block("num_attention_heads" if config.num_attention_heads else "attention_head_dim", place)
        to_text = config.up_block_types[place] == "CrossAttnUpBlock2D"
        return Transformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=width,
            num_layers=self._of_block("transformer_layers_per_block", place),
            cross_attention_dim=self._residual_channels(place, layer) if to_text else width,
            norm_num_groups=config.norm_num_groups,
            use_linear_projection=config.use_linear_projection,
            only_cross_attention=self._of_block("only_cross_attention", place),
            upcast_attention=config.upcast_attention,
        )

    def _extend(self, attention: Transformer2DModel, channels: int) -> None:
        attention.proj_in_plus = (
            nn.Linear(channels, channels)
            if attention.use_linear_projection
            else nn.Conv2d(channels, channels, kernel_size=1)
        )
        for i, block in enumerate(attention.transformer_blocks):
            attention.transformer_blocks[i] = _LightBlock(block, channels, self.config.upcast_attention)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> Self:
        """As in diffusers; which of the two it is follows from the weights, the authors' config.json do not tell."""
        names = _weight_names(Path(path) / options.get("subfolder", ""))
        return super().from_pretrained(path, light=any(".attn2_plus." in name for name in names), **options)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        down_block_additional_residuals: list[Tensor],
        mid_block_additional_residual: Tensor,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The output at ``sample`` ``[N, 4, h, w]``, with the ControlNet's residuals in the order it gives them."""
        emb = self.time_embedding(self.get_time_embed(sample=sample, timestep=timestep))
        sample = self.conv_in(sample)
        skips = [sample]
        for block in self.down_blocks:
            text = {"encoder_hidden_states": encoder_hidden_states} if hasattr(block, "attentions") else {}
            sample, states = block(hidden_states=sample, temb=emb, **text)
            skips += states
        residuals = list(down_block_additional_residuals)
        skips = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
        if self.mid_block is not None:
            sample = self.mid_block(sample, emb, encoder_hidden_states=encoder_hidden_states)
        sample = sample + mid_block_additional_residual
        for block in self.up_blocks:
            layers = len(block.resnets)
            of_block, skips = skips[-layers:], skips[:-layers]
            size = skips[-1].shape[2:] if skips else None  # sides that are no multiple of the deepest level's unit
            if isinstance(block, _PixelUpBlock):
                sample = block(sample, of_block, residuals[-layers:], emb, encoder_hidden_states, size)
            else:
                sample = block(sample, tuple(of_block), emb, size)
            residuals = residuals[:-layers]
        if self.conv_norm_out is not None:
            sample = self.conv_act(self.conv_norm_out(sample))
        sample = self.conv_out(sample)
        return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)


# -- ControlNet -------------------------------------------------------------------------------------------------------


class _RRDB(nn.Module):
    """The residual-in-residual dense block of ESRGAN (Wang et al., 2018), under the names of BasicSR."""

    def __init__(self, channels: int):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(channels, channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class _ConditioningEmbedding(ControlNetConditioningEmbedding):
    """Image to features at 1/8 of its size; heads for training guess the sharp image at 1/2, 1/4 and 1/8 of it."""

    def __init__(
        self,
        conditioning_embedding_channels: int,
        conditioning_channels: int,
        block_out_channels: tuple[int, ...],
        return_rgbs: bool,
        use_rrdb: bool,
    ):
        super().__init__(conditioning_embedding_channels, conditioning_channels, block_out_channels)
        if use_rrdb:
            self.preprocesser = nn.Sequential(*(_RRDB(block_out_channels[0]) for _ in range(2)))
        if return_rgbs:
            self.to_rgbs = nn.ModuleList(nn.Conv2d(c, 3, kernel_size=3, padding=1) for c in block_out_channels[1:])

    def features(self, conditioning: Tensor) -> list[Tensor]:
        """At the image's size and after each halving of it."""
        embedding = F.silu(self.conv_in(conditioning))
        if hasattr(self, "preprocesser"):
            embedding = self.preprocesser(embedding)
        found = [embedding]
        for keep, halve in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            found.append(F.silu(halve(F.silu(keep(found[-1])))))
        return found

    def forward(self, conditioning: Tensor) -> Tensor:
        return self.conv_out(self.features(conditioning)[-1])


class PASDControlNetModel(ControlNetModel):
    """The ControlNet of PASD and PASD-light: diffusers' own with more in the embedding of its image.

    ``return_rgbs`` adds ``to_rgbs``, heads that only training asks for (see `rgbs`); ``use_rrdb`` adds
    ``preprocesser``, two dense blocks at the image's full size (the files called rrdb).  All other arguments are
    diffusers'.
    """

    @with_options(ControlNetModel, return_rgbs=True, use_rrdb=False)
    def __init__(self, *, return_rgbs: bool = True, use_rrdb: bool = False, **config):
        super().__init__(**config)
        self.controlnet_cond_embedding = _ConditioningEmbedding(
            self.config.block_out_channels[0],
            self.config.conditioning_channels,
            self.config.conditioning_embedding_out_channels,
            return_rgbs,
            use_rrdb,
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> Self:
        """As in diffusers; the two options follow from the weights."""
        names = _weight_names(Path(path) / options.get("subfolder", ""))
        return super().from_pretrained(
            path,
            return_rgbs=any(".to_rgbs." in name for name in names),
            use_rrdb=any(".preprocesser." in name for name in names),
            **options,
        )

    def rgbs(self, controlnet_cond: Tensor) -> list[Tensor]:
        """Guesses of the sharp image in [-1, 1], at 1/2, 1/4 and 1/8 of the size of ``controlnet_cond`` in [0, 1].

        The authors add Σ_k ‖rgbs_k − GT_k‖₁ (means; GT resized bilinearly to that size) to the loss of the noise.
        """
        embedding = self.controlnet_cond_embedding
        return [head(x) for head, x in zip(embedding.to_rgbs, embedding.features(controlnet_cond)[1:], strict=True)]


# -- model ------------------------------------------------------------------------------------------------------------


class PASDModel(ControlNetISRModel):
    """PASD or PASD-light, with or without dense blocks in the ControlNet (``rrdb``); see `ControlNetISRModel`.

    Unlike the authors, who draw the latents of the LR image from the posterior, it starts from the posterior's mode.

    Args:
        parts: as for `ControlNetISRModel`; ``trained`` is by default all that has a part in the output (not
            ``to_rgbs``).  The authors train ``{"unet": "pixel_attentions|_plus", "controlnet": ""}``.
        captioner: a function from LR images ``[N, 3, h, w]`` in [0, 1] to one caption each, or ``"hf:NAME_OR_FOLDER"``
            of a captioning model of transformers such as BLIP, on disk.  The caption stands before the user's prompt.
            The authors use CoCa.  Without one nothing stands there.

    Raises:
        ValueError: if the parts do not fit each other, or the captioner cannot be opened.
    """

    kind: ClassVar[str] = "pasd"
    classes: ClassVar[dict[str, type]] = {
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "unet": PASDUNet2DConditionModel,
        "controlnet": PASDControlNetModel,
    }
    arguments: ClassVar[frozenset[str]] = ControlNetISRModel.arguments | {"captioner"}
    opens: ClassVar[str] = "PASD and PASD-light"

    def __init__(
        self,
        *parts,
        recipe: Recipe | None = None,
        trained: dict[str, str] | None = None,
        captioner: Tagger | str | None = None,
        **more,
    ):
        trained = {"unet": "", "controlnet": "^(?!.*to_rgbs)"} if trained is None else trained
        super().__init__(*parts, recipe=recipe or PASD_RECIPE, trained=trained, **more)
        self.captioner = _captioner(captioner)

    def describe(self, lr: Tensor) -> list[str]:
        if self.captioner is None:
            return super().describe(lr)
        captions = self.captioner(lr)
        if len(captions) != len(lr):
            raise ValueError(f"captioner must give one caption per image ({len(lr)}), got {len(captions)}")
        # a caption of a bad image says so, and the prompt would ask for it
        return [caption.strip().replace("blurry", "clear").replace("noisy", "clean") for caption in captions]

    def initial_latents(self, condition: Condition, process: Process, generator=None) -> Tensor:
        # Even the last timestep leaves a trace of the LR image, α_T z_lr, which makes results stable but too smooth.
        # The authors (section 4.2, "adjustable noise schedule") therefore noise the start once more, as at timestep
        # 900, and keep α_900 = 0.119 of the trace.  With diffusers 0.29.2, which their code now asks for, UniPC takes a
        # timestep that is not in the trajectory for the last that is, 50 of 20 steps; start_timestep=50 does the same.
        if self.recipe.start == "noise":
            return super().initial_latents(condition, process, generator)
        latents = self.encode(condition.image)
        for timestep in (process.timesteps[0], self.recipe.start_timestep):
            if timestep is not None:
                noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
                latents = process.add_noise(latents, self.recipe.temperature * noise, timestep)
        return latents

    # -- storage --------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, *, captioner: Tagger | str | None = None, **options) -> Self:
        """As `ControlNetISRModel.from_pretrained`, with a captioner as in the class, which no folder holds."""
        return super().from_pretrained(path, captioner=_captioner(captioner), **options)  # opened before the weights

    @classmethod
    def from_released(
        cls,
        weights: str | Path,
        *,
        base: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        scale: int = 4,
        trained: dict[str, str] | None = None,
        captioner: Tagger | str | None = None,
        **recipe,
    ) -> Self:
        """Open the authors' files; which of their models it is follows from the weights.

        Args:
            weights: a folder that holds ``unet/`` and ``controlnet/`` (``runs/pasd/checkpoint-100000``), or one above
                it that holds no other such folder.
            base: folder of Stable Diffusion 1.5; by default ``stable-diffusion-v1-5`` in ``weights``, or
                ``checkpoints/stable-diffusion-v1-5`` beside ``runs``, as in the authors' repository.
            torch_dtype, scale, trained, captioner: as in the class.
            recipe: fields of `Recipe` that replace the authors'.

        Raises:
            FileNotFoundError: if a folder does not exist.
            ValueError: if there are several models to choose from, or files are damaged or of another model.
            TypeError: for a recipe field that does not exist.
        """
        merged = PASD_RECIPE.replace(**recipe)
        checkpoint = _checkpoint(Path(weights))
        folder = _base(Path(weights), checkpoint) if base is None else Path(base)
        if not folder.is_dir():
            raise FileNotFoundError(f"base {str(folder)!r} does not exist; give a diffusers folder of SD 1.5")
        captioner = _captioner(captioner)
        other, parts = open_tokenizer_and_scheduler(folder), {}
        for name in ("unet", "controlnet"):
            try:
                parts[name] = open_part(cls.classes[name], checkpoint / name, torch_dtype)
            except ValueError as error:
                raise ValueError(f"{error}; {_WHERE}") from error
        for name in ("vae", "text_encoder"):
            parts[name] = open_part(cls.classes[name], folder / name, torch_dtype)
        return cls(
            **parts,
            tokenizer=other["tokenizer"],
            scheduler=UniPCMultistepScheduler.from_config(other["scheduler"].config),
            scale=scale,
            recipe=merged,
            trained=trained,
            captioner=captioner,
        )


def _checkpoint(weights: Path) -> Path:
    """The one folder in or under ``weights`` that holds a U-Net and a ControlNet, in the layouts of the authors."""
    if not weights.is_dir():
        raise FileNotFoundError(f"weights {str(weights)!r} does not exist; {_WHERE}")
    places = [weights]
    for above in ("", "*/", "runs/*/"):  # a run, all runs, their repository
        places += sorted(weights.glob(f"{above}checkpoint-*"))
    found = [place for place in places if (place / "unet").is_dir() and (place / "controlnet").is_dir()]
    if not found:
        raise FileNotFoundError(
            f"weights must be a folder with unet/ and controlnet/, such as runs/pasd/checkpoint-100000, or one above "
            f"it, got {str(weights)!r}; {_WHERE}"
        )
    if len(found) > 1:
        names = ", ".join(str(p.relative_to(weights)) for p in found)
        raise ValueError(f"weights {str(weights)!r} holds several models ({names}); give one of these folders")
    return found[0]


def _base(weights: Path, checkpoint: Path) -> Path:
    """Stable Diffusion 1.5 beside the weights, or where the authors' repository has it."""
    places = [weights / "stable-diffusion-v1-5"]
    places += [folder / "checkpoints/stable-diffusion-v1-5" for folder in checkpoint.resolve().parents[:3]]
    if found := [place for place in places if place.is_dir()]:
        return found[0]
    raise FileNotFoundError(
        f"base must be given, a diffusers folder of SD 1.5 (vae/, text_encoder/, tokenizer/, scheduler/), for neither "
        f"{str(places[0])!r} nor checkpoints/stable-diffusion-v1-5 beside runs/ exists"
    )


def _captioner(captioner: Tagger | str | None) -> Tagger | None:
    return load_tagger(captioner) if isinstance(captioner, str) else captioner
