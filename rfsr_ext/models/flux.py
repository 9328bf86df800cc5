"""FLUX with a ControlNet: C-FLUX and DP2O-FLUX (Wu et al., 2025, arXiv 2510.18851), made of diffusers parts.

A flow model: z_t = (1 − σ) z_0 + σ ε, and the network gives ε − z_0.  The transformer works on tokens of 2×2 latents;
these are packed and unpacked inside `FluxISRModel.predict`, and are ordinary latents everywhere else.
"""

import inspect
import re
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from rfsr_ext.models.base import Condition, ISRModel, Recipe, Tagger
from rfsr_ext.models.csd2 import read_controlnet
from rfsr_ext.models.folders import (
    open_part,
    open_plain_part,
    read_config,
    read_index,
    require_classes,
    write_folder,
)
from rfsr_ext.weights.reading import open_network

__all__ = ["FLUX_RECIPE", "FluxISRModel"]

FLUX_RECIPE = Recipe(
    num_inference_steps=25,
    start="noise",
    color_fix="adain",
    tile=512,
    overlap=128,
    min_side=512,
    structure_window=(0.84, 1.0),
    reward_window=(0.0, 0.25),
    window_unit="noise",
)
"""How the authors of C-FLUX sample, and the paper's windows by their share of noise: steps 1–12 and 21–25 at 512²."""

_PIPELINE = "FluxControlNetPipeline"
_CLASSES: dict[str, type] = {  # of the networks in its folder
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
    "transformer": FluxTransformer2DModel,
    "controlnet": FluxControlNetModel,
}
_TOKENIZERS: dict[str, type] = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_PATCH = 2  # latents per token, in each direction
_KEPT_TEXTS = 64  # embeddings of so many prompts; one of FLUX.1-dev is 4 MB in bfloat16


def _pack(latents: Tensor) -> Tensor:
    """Latents ``[N, C, h, w]`` to tokens ``[N, h·w/4, 4·C]``."""
    return F.pixel_unshuffle(latents, _PATCH).flatten(2).transpose(1, 2)


def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_pack`, to latents of that height and width."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // _PATCH, width // _PATCH)), _PATCH)


class FluxISRModel(ISRModel):
    """Image super-resolution with a ControlNet over FLUX.1.

    The ControlNet sees the latents of the enlarged LR image; CLIP's summary of the prompt enters with the timestep,
    T5's embeddings as tokens beside the image's.

    FLUX.1-dev takes its guidance as an input, trained to stand for that of two evaluations.  It is not the recipe's
    ``guidance_scale``, which is 1 here: a larger one asks for classifier-free guidance on top, as usual.

    The text encoders may stay on a device of their own, such as the CPU, and what they make of the last 64 prompts is
    kept, so that a run does not wait for them.  To have them and the transformer on one GPU by turns::

        model.text_device = "cuda"
        model.to("cpu").embed(prompts)
        model.text_device = "cpu"
        model.to("cuda")

    Args:
        vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer, controlnet, scheduler: the diffusers
            parts, as `diffusers.FluxControlNetPipeline` names them.
        scale: output size over input size.
        recipe: the authors' values; `FLUX_RECIPE` by default.
        trained: see `ISRModel`; all of transformer and ControlNet by default, as the paper trains U-Net and ControlNet.
            The authors of C-FLUX train ``{"controlnet": ""}`` alone.
        guidance: FLUX's own, not used by models without that input, such as FLUX.1-schnell.
        max_sequence_length: of T5's tokens.
        text_device: where the text encoders stay when the model is moved; None for where the model is.
        tagger: see `ISRModel`; the authors' is DAPE.

    Raises:
        ValueError: if the parts do not fit each other, the scheduler cannot serve or ``trained`` names a text encoder.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        controlnet: FluxControlNetModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        scale: int = 4,
        recipe: Recipe = FLUX_RECIPE,
        trained: dict[str, str] | None = None,
        guidance: float = 2.5,
        max_sequence_length: int = 512,
        text_device: torch.device | str | None = None,
        tagger: Tagger | None = None,
    ):
        self.networks = {
            "vae": vae,
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "transformer": transformer,
            "controlnet": controlnet,
        }
        self.tokenizer, self.tokenizer_2, self.scheduler = tokenizer, tokenizer_2, scheduler
        self.trained = {"transformer": "", "controlnet": ""} if trained is None else trained
        self.scale, self.recipe, self.guidance = scale, recipe, guidance
        self.max_sequence_length, self.text_device, self.tagger = max_sequence_length, text_device, tagger
        self._texts: dict[str, dict[str, Tensor]] = {}
        # read once: wrapped modules (several processes, adapters) have no config
        self.scaling_factor, self.shift_factor = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        self.latent_channels = vae.config.latent_channels
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = self.vae_scale_factor * _PATCH
        self._guided = [n for n in ("transformer", "controlnet") if self.networks[n].config.guidance_embeds]
        # without single blocks after it, the text that leaves the ControlNet's last block goes nowhere
        self._last_block = None if controlnet.config.num_single_layers else controlnet.config.num_layers - 1
        for name, wanted, given in (
            ("vae latent_channels", transformer.config.in_channels // _PATCH**2, vae.config.latent_channels),
            ("controlnet in_channels", transformer.config.in_channels, controlnet.config.in_channels),
            ("controlnet conditioning_embedding_channels", None, controlnet.config.conditioning_embedding_channels),
            ("controlnet num_mode", None, controlnet.config.num_mode),
            ("controlnet joint_attention_dim", transformer.config.joint_attention_dim,
             controlnet.config.joint_attention_dim),
            ("text_encoder hidden_size", transformer.config.pooled_projection_dim, text_encoder.config.hidden_size),
            ("text_encoder_2 d_model", transformer.config.joint_attention_dim, text_encoder_2.config.d_model),
        ):  # fmt: skip
            if wanted != given:
                raise ValueError(f"{name} must be {wanted} to fit the transformer, got {given}; give parts of one")
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(f"scheduler must be a FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}")
        for name in _TEXT_ENCODERS:
            if name in self.trained:
                raise ValueError(f"trained must not name {name!r}: embeddings of prompts are kept; name others")
        super().__init__()

    # -- conditioning ---------------------------------------------------------------------------------------------

    def control(self, image: Tensor) -> dict[str, Tensor]:
        return {"controlnet_cond": self.encode(image)}

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            for prompt, *found in zip(new, *self.encode_prompts(new), strict=True):
                self._texts[prompt] = dict(zip(("encoder_hidden_states", "pooled_projections"), found, strict=True))
        texts = [self._texts[prompt] for prompt in prompts]
        for old in list(self._texts)[:-_KEPT_TEXTS]:
            del self._texts[old]
        shared = {name: torch.stack([x[name] for x in texts]).to(self.device, self.dtype) for name in texts[0]}
        return shared | {"guidance": torch.full((len(prompts),), self.guidance, device=self.device, dtype=self.dtype)}

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """T5's embeddings ``[N, max_sequence_length, D]`` and CLIP's summary ``[N, E]``, where those are."""
        outputs = []
        for name, tokenizer, length in (
            ("text_encoder_2", self.tokenizer_2, self.max_sequence_length),
            ("text_encoder", self.tokenizer, self.tokenizer.model_max_length),
        ):
            tokens = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            encoder = self.networks[name]
            outputs.append(encoder(tokens.input_ids.to(next(encoder.parameters()).device)))
        return outputs[0].last_hidden_state, outputs[1].pooler_output

    # -- networks -------------------------------------------------------------------------------------------------

    def timestep_options(self, num_inference_steps: int, size: tuple[int, int]) -> dict[str, Any]:
        """σ = 1, 1 − 1/n, …, 1/n, shifted to e^μ σ / (1 + (e^μ − 1) σ), with a μ that is linear in the tokens' number.

        With FLUX.1-dev's scheduler, μ is 0.63 at 512² and 1.15 at 1024².
        """
        n = num_inference_steps
        options: dict[str, Any] = {"sigmas": [1 - i / n for i in range(n)]}
        config = self.scheduler.config
        if config.get("use_dynamic_shifting"):
            height, width = size
            tokens = (height // self.multiple) * (width // self.multiple)
            share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
            options["mu"] = config.base_shift + share * (config.max_shift - config.base_shift)
        return options

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        height, width = latents.shape[-2:]
        text = condition.shared["encoder_hidden_states"]
        places = torch.cartesian_prod(*(torch.arange(n // _PATCH) for n in (height, width)))
        timestep = torch.as_tensor(timestep, device=latents.device).expand(len(latents)).to(latents.dtype)
        seen = {
            "hidden_states": _pack(latents),
            "timestep": timestep / self.scheduler.config.num_train_timesteps,
            "encoder_hidden_states": text,
            "pooled_projections": condition.shared["pooled_projections"],
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "img_ids": F.pad(places, (1, 0)).to(latents),  # of a tile: its own
            "return_dict": False,
        }
        guidance = {name: {"guidance": condition.shared["guidance"]} for name in self._guided}
        control = _pack(condition.spatial["controlnet_cond"])
        blocks, single_blocks = self.networks["controlnet"](
            controlnet_cond=control, **seen, **guidance.get("controlnet", {})
        )
        (flow,) = self.networks["transformer"](
            controlnet_block_samples=blocks, controlnet_single_block_samples=single_blocks,
            **seen, **guidance.get("transformer", {}),
        )  # fmt: skip
        return _unpack(flow, height, width)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        posterior = self.networks["vae"].encode(images.to(self.dtype) * 2 - 1).latent_dist
        return (posterior.mode() - self.shift_factor) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.scaling_factor + self.shift_factor
        return self.networks["vae"].decode(latents, return_dict=False)[0] / 2 + 0.5

    # -- weights --------------------------------------------------------------------------------------------------

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What fine-tuning changes; without weights that no output depends on, which several processes stumble over."""
        without_use = rf"^controlnet\..*\btransformer_blocks\.{self._last_block}\.(ff_context|attn\.to_add_out)\."
        return {n: p for n, p in super().trained_parameters().items() if not re.search(without_use, n)}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        for name, network in self.networks.items():
            home = self.text_device if name in _TEXT_ENCODERS and self.text_device is not None else device
            nn.Module.to(network, device=home, dtype=dtype)
        if dtype is not None:
            self._texts.clear()
        return self

    # -- storage --------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder of diffusers' `FluxControlNetPipeline`, see `rfsr_ext.models.folders.write_folder`."""
        parts = {**self.networks, "scheduler": self.scheduler} | {name: getattr(self, name) for name in _TOKENIZERS}
        others = dict.fromkeys(("image_encoder", "feature_extractor"), [None, None])
        config = {"model": "flux", "scale": self.scale, "trained": self.trained, "recipe": self.recipe.to_dict()}
        config |= {"guidance": self.guidance, "max_sequence_length": self.max_sequence_length}
        write_folder(path, _PIPELINE, parts, others, config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        controlnet: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        scale: int | None = None,
        trained: dict[str, str] | None = None,
        guidance: float | None = None,
        text_device: torch.device | str | None = None,
        tagger: Tagger | None = None,
        **recipe,
    ) -> Self:
        """Open a diffusers folder on disk; nothing is downloaded.

        Args:
            path: a folder that `save_pretrained` wrote, or any folder of FLUX.1.
            controlnet: the ControlNet's own folder, for a folder that holds none.
            torch_dtype: of all networks.
            scale, trained, guidance: as in the class; those of ``isr_config.json`` by default, else the class's own.
            text_device, tagger: as in the class; no folder holds them.
            recipe: fields of `Recipe` that replace those of ``isr_config.json``, else of `FLUX_RECIPE`.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if it holds another kind of model, or weights are missing, unknown or damaged.
            TypeError: for a recipe field that does not exist.
        """
        path = Path(path)
        stored = read_config(path, cls)
        given = {"scale": scale, "trained": trained, "guidance": guidance}
        stored |= {name: value for name, value in given.items() if value is not None}
        stored["recipe"] = FLUX_RECIPE.replace(**stored.get("recipe", {})).replace(**recipe)
        parts = _open_parts(path, torch_dtype, path / "controlnet" if controlnet is None else Path(controlnet))
        return cls(**parts, **stored, text_device=text_device, tagger=tagger)

    @classmethod
    def from_released(
        cls,
        weights: str | Path,
        *,
        base: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        scale: int = 4,
        trained: dict[str, str] | None = None,
        text_device: torch.device | str | None = None,
        tagger: Tagger | None = None,
        **recipe,
    ) -> Self:
        """Open C-FLUX or DP2O-FLUX as its authors publish it.

        Args:
            weights: ``preset/models/c-flux`` or ``dp2o-flux``, or the file ``model.safetensors`` in it: the ControlNet.
            base: the folder of FLUX.1-dev; beside ``weights`` by default.
            torch_dtype, scale, trained, text_device, tagger: as in `from_pretrained`.
            recipe: fields of `Recipe` that replace those of `FLUX_RECIPE`.

        Raises:
            FileNotFoundError, ValueError, TypeError: as `from_pretrained` does.
        """
        merged = FLUX_RECIPE.replace(**recipe)
        path, tensors = read_controlnet(weights, ("c-flux", "dp2o-flux"))
        base = path.parent.parent / "FLUX.1-dev" if base is None else Path(base)
        if not base.is_dir():
            raise FileNotFoundError(f"base {str(base)!r} does not exist; give the folder of FLUX.1-dev")
        parts = _open_parts(base, torch_dtype)
        # as diffusers' from_transformer, which returns to the class's defaults what the transformer has by default
        known = inspect.signature(FluxControlNetModel.__init__).parameters
        config = {name: value for name, value in parts["transformer"].config.items() if name in known}
        for name, blocks in (("num_layers", "transformer_blocks"), ("num_single_layers", "single_transformer_blocks")):
            config[name] = len({key.split(".")[1] for key in tensors if key.startswith(f"{blocks}.")})
        what = f"a ControlNet of the transformer in {str(base)!r}"
        parts["controlnet"] = open_network(lambda: FluxControlNetModel(**config), tensors, path, what, torch_dtype)
        return cls(**parts, scale=scale, recipe=merged, trained=trained, text_device=text_device, tagger=tagger)


def _open_parts(path: Path, dtype: torch.dtype, controlnet: Path | None = None) -> dict[str, Any]:
    """The parts of a folder of FLUX.1, with a ControlNet where one is asked for."""
    if controlnet == path / "controlnet" and read_index(path).get("controlnet") is None:
        raise ValueError(f"model folder {str(path)!r} holds no ControlNet; give the folder of one as controlnet=")
    classes = {name: kind for name, kind in _CLASSES.items() if name != "controlnet"}
    require_classes(path, classes, "this class opens FLUX.1")
    parts: dict[str, Any] = {name: open_part(kind, path / name, dtype) for name, kind in classes.items()}
    if controlnet is not None:
        parts["controlnet"] = open_part(FluxControlNetModel, controlnet, dtype)
    plain = _TOKENIZERS | {"scheduler": FlowMatchEulerDiscreteScheduler}
    return parts | {name: open_plain_part(kind, path / name) for name, kind in plain.items()}
