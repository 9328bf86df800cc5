"""Checkpoints of CompVis' latent diffusion (.ckpt, .pth) as networks of diffusers and transformers.

The names in such a file are those of `ldm`'s classes and of OpenCLIP; DiffBIR and CCSR v1 are published so, and Stable
Diffusion itself was.  A converter takes one part of a file and gives a function that builds the network, with a
configuration read from names and shapes alone, and the tensors under the network's own names:

>>> build, tensors = unet(parts(read_tensors(path, "checkpoint"), path)["unet"])
>>> network = open_network(build, tensors, path, "Stable Diffusion's U-Net")

A name that no rule knows keeps its old one, so that loading strictly refuses it.  What shapes cannot say are widths of
attention heads, which are arguments, and group norms, which have 32 groups in all of these models.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from rfsr_ext.networks.controlnet import LatentControlNetModel
from rfsr_ext.weights.reading import open_network

__all__ = ["SCHEDULE", "Converted", "condition_encoder", "controlnet", "opened", "parts", "text_encoder", "unet", "vae"]

Converted = tuple[Callable[[], nn.Module], dict[str, Tensor]]
"""What builds the network, and its tensors by the network's own names."""

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise that Stable Diffusion was trained with, which no such file tells, as diffusers' schedulers take it."""

_PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.model.": "text_encoder",
    "control_model.": "controlnet",
    "cond_encoder.": "cond_encoder",
    "preprocess_model.": "preprocess_model",
}
# what training left in the file: copies of weights, and numbers that follow from the noise schedule
_LEFT_OVER = re.compile(
    r"model_ema\..*|logvar|scale_factor|((sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?)|betas|"
    r"posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights"
)


def parts(tensors: dict[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """A full checkpoint by its networks, whose names lose what stands before them in the file.

    Those that the file has of "unet", "vae", "text_encoder" (OpenCLIP), "controlnet", and of DiffBIR and CCSR
    "cond_encoder" (a copy of the VAE's encoder) and "preprocess_model" (the first stage).  Averaged copies of weights
    (``model_ema``) and the noise schedule's numbers are left out.

    Raises:
        ValueError: if there is no U-Net or a tensor belongs to none of them.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in _PARTS if name.startswith(prefix)), None)
        if prefix is not None:
            found.setdefault(_PARTS[prefix], {})[name.removeprefix(prefix)] = tensor
        elif not _LEFT_OVER.fullmatch(name):
            raise ValueError(
                f"{str(path)!r} must be a latent diffusion checkpoint with tensors named {', '.join(_PARTS)}, "
                f"got {name!r}"
            )
    if "unet" not in found:
        raise ValueError(
            f"{str(path)!r} must be a latent diffusion checkpoint, but no name starts with {next(iter(_PARTS))}"
        )
    return found


def opened(
    convert: Callable[[dict[str, Tensor]], Converted],
    tensors: dict[str, Tensor],
    path: Path,
    what: str,
    dtype: torch.dtype,
) -> nn.Module:
    """A network of one of the file's parts, strictly; ``what`` names it in the sentence of an error.

    Raises:
        ValueError: if it is another network.
    """
    try:
        build, converted = convert(tensors)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not {what}: {error}") from error
    return open_network(build, converted, path, what, dtype)


def condition_encoder(tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Of a checkpoint's parts a whole VAE that encodes control images; None where the model's own does.

    The file has the encoder alone, the authors' a copy of the model's; the decoder, which nobody asks for, is its.
    """
    own, vae = tensors.get("cond_encoder", {}), tensors["vae"]
    if all(name in vae and torch.equal(tensor, vae[name]) for name, tensor in own.items()):
        return None
    return own | {name: tensor for name, tensor in vae.items() if name.startswith(("decoder.", "post_quant_conv."))}


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """How many of something there are: one more than the largest number that ``pattern`` finds at the names' start."""
    numbers = [int(found[1]) for name in tensors if (found := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def _shape(tensors: dict[str, Tensor], name: str, what: str) -> torch.Size:
    if name not in tensors:
        raise ValueError(f"{what} must have a tensor {name!r}, got a file without it; it is damaged or another model's")
    return tensors[name].shape


def _rename(tensors: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Every name by the first rule that fits its start; one that none fits keeps its name."""
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    renamed = {}
    for name, tensor in tensors.items():
        rule = next(((pattern, new) for pattern, new in compiled if pattern.match(name)), None)
        renamed[name if rule is None else rule[0].sub(rule[1], name, count=1)] = tensor
    return renamed


# -- U-Net and ControlNet ---------------------------------------------------------------------------------------------

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _resnet_rules(old: str, new: str) -> list[tuple[str, str]]:
    return [(rf"{re.escape(old)}\.{re.escape(a)}\.", f"{new}.{b}.") for a, b in _RESNET.items()]


def _encoder(
    tensors: dict[str, Tensor], num_head_channels: int, what: str
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Configuration and renaming rules of what U-Net and ControlNet have in common: all up to the middle."""
    first = _shape(tensors, "input_blocks.0.0.weight", what)
    blocks = _count(tensors, r"input_blocks\.(\d+)\.")
    downsamplers = [k for k in range(blocks) if f"input_blocks.{k}.0.op.weight" in tensors]
    levels = len(downsamplers) + 1
    per_level, left = divmod(blocks - levels, levels)  # residual blocks
    if left or per_level < 1 or downsamplers != [i * (per_level + 1) for i in range(1, levels)]:
        raise ValueError(f"{what} must have equally many blocks at each resolution, got downsamplers at {downsamplers}")

    channels, attends = [], []
    rules = [
        (r"time_embed\.0\.", "time_embedding.linear_1."),
        (r"time_embed\.2\.", "time_embedding.linear_2."),
        (r"input_blocks\.0\.0\.", "conv_in."),
    ]
    for level in range(levels):
        start = level * (per_level + 1) + 1
        channels.append(_shape(tensors, f"input_blocks.{start}.0.out_layers.3.weight", what)[0])
        attends.append(f"input_blocks.{start}.1.proj_in.weight" in tensors)
        for j in range(per_level):
            rules += _resnet_rules(f"input_blocks.{start + j}.0", f"down_blocks.{level}.resnets.{j}")
            rules.append((rf"input_blocks\.{start + j}\.1\.", f"down_blocks.{level}.attentions.{j}."))
        rules.append((rf"input_blocks\.{start + per_level}\.0\.op\.", f"down_blocks.{level}.downsamplers.0.conv."))
    rules += _resnet_rules("middle_block.0", "mid_block.resnets.0") + _resnet_rules(
        "middle_block.2", "mid_block.resnets.1"
    )
    rules.append((r"middle_block\.1\.", "mid_block.attentions.0."))

    projection = _shape(tensors, "middle_block.1.proj_in.weight", what)
    context = _shape(tensors, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", what)[1]
    for width in (*(c for c, attended in zip(channels, attends, strict=True) if attended), channels[-1]):
        if width % num_head_channels:
            raise ValueError(
                f"{what} has attention over {width} channels, which must be a multiple of num_head_channels, got "
                f"{num_head_channels}; give the number in its yaml file"
            )
    config = {
        "in_channels": first[1],
        "block_out_channels": channels,
        "layers_per_block": per_level,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "cross_attention_dim": context,
        # diffusers' name for the number of heads
        "attention_head_dim": [max(1, width // num_head_channels) for width in channels],
        "transformer_layers_per_block": _count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        "use_linear_projection": len(projection) == 2,
    }
    return config, rules


def unet(tensors: dict[str, Tensor], num_head_channels: int = 64) -> Converted:
    """``ldm``'s UNetModel with transformers (Stable Diffusion 2.x, ``model.diffusion_model``).

    Args:
        tensors: names without the prefix.
        num_head_channels: width of one attention head; Stable Diffusion 2.x has 64.

    Raises:
        ValueError: if the architecture is another one.
    """
    what = "a latent diffusion U-Net"
    config, rules = _encoder(tensors, num_head_channels, what)
    levels, per_level = len(config["block_out_channels"]), config["layers_per_block"]
    ups = []
    for level in range(levels):
        attends = f"output_blocks.{level * (per_level + 1)}.1.proj_in.weight" in tensors
        ups.append("CrossAttnUpBlock2D" if attends else "UpBlock2D")
        for j in range(per_level + 1):
            old = f"output_blocks.{level * (per_level + 1) + j}"
            rules += _resnet_rules(f"{old}.0", f"up_blocks.{level}.resnets.{j}")
            rules.append((rf"{re.escape(old)}\.[12]\.conv\.", f"up_blocks.{level}.upsamplers.0.conv."))
            rules.append((rf"{re.escape(old)}\.1\.", f"up_blocks.{level}.attentions.{j}."))
    rules += [(r"out\.0\.", "conv_norm_out."), (r"out\.2\.", "conv_out.")]
    config |= {"up_block_types": ups, "out_channels": _shape(tensors, "out.2.weight", what)[0]}
    return lambda: UNet2DConditionModel.from_config(config), _rename(tensors, rules)


def controlnet(tensors: dict[str, Tensor], num_head_channels: int = 64) -> Converted:
    """DiffBIR's ControlNet over control latents (``control_model``), with as many of their channels as z_t has.

    Args:
        tensors: names without the prefix.
        num_head_channels: as in `unet`.

    Raises:
        ValueError: if the architecture is another one.
    """
    config, rules = _encoder(tensors, num_head_channels, "a ControlNet over latents")
    channels, odd = divmod(config["in_channels"], 2)
    if odd or "input_hint_block.0.weight" in tensors:
        raise ValueError("a ControlNet over latents must take z_t and control latents, got one that takes an image")
    config |= {"in_channels": channels, "conditioning_channels": channels}
    rules += [
        (r"zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
        (r"middle_block_out\.0\.", "controlnet_mid_block."),
    ]
    return lambda: LatentControlNetModel.from_config(config), _rename(tensors, rules)


# -- VAE --------------------------------------------------------------------------------------------------------------


def vae(tensors: dict[str, Tensor], scaling_factor: float = 0.18215) -> Converted:
    """``ldm``'s AutoencoderKL (``first_stage_model``).

    Args:
        tensors: names without the prefix.
        scaling_factor: latents for the U-Net are the encoder's times this.

    Raises:
        ValueError: if the architecture is another one.
    """
    what = "a latent diffusion VAE"
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    channels = [_shape(tensors, f"encoder.down.{i}.block.0.conv2.weight", what)[0] for i in range(levels)]
    config = {
        "in_channels": _shape(tensors, "encoder.conv_in.weight", what)[1],
        "out_channels": _shape(tensors, "decoder.conv_out.weight", what)[0],
        "latent_channels": _shape(tensors, "post_quant_conv.weight", what)[1],
        "block_out_channels": channels,
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": scaling_factor,
    }
    rules = [(r"(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.")]
    for i in range(levels):
        for old, new in (
            (f"encoder.down.{i}", f"encoder.down_blocks.{i}"),
            (f"decoder.up.{i}", f"decoder.up_blocks.{levels - 1 - i}"),
        ):
            old = re.escape(old)
            rules += [
                (rf"{old}\.block\.(\d+)\.nin_shortcut\.", rf"{new}.resnets.\1.conv_shortcut."),
                (rf"{old}\.block\.(\d+)\.", rf"{new}.resnets.\1."),
                (rf"{old}\.(down|up)sample\.", rf"{new}.\1samplers.0."),
            ]
    rules += [(rf"(encoder|decoder)\.mid\.block_{i + 1}\.", rf"\1.mid_block.resnets.{i}.") for i in (0, 1)]
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    rules += [
        (rf"(encoder|decoder)\.mid\.attn_1\.{a}\.", rf"\1.mid_block.attentions.0.{b}.") for a, b in attention.items()
    ]
    renamed = _rename(tensors, rules)
    for name, tensor in renamed.items():
        if ".mid_block.attentions." in name and tensor.ndim == 4:  # 1x1 convolutions there, linear layers here
            renamed[name] = tensor[:, :, 0, 0]
    return lambda: AutoencoderKL.from_config(config), renamed


# -- text -------------------------------------------------------------------------------------------------------------

_TEXT = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
         "mlp.c_proj": "mlp.fc2"}  # fmt: skip


def text_encoder(tensors: dict[str, Tensor], head_width: int = 64) -> Converted:
    """OpenCLIP's text tower as Stable Diffusion 2.x reads it (``cond_stage_model.model``): all layers but the last.

    The last layer, the projection and the temperature, which nothing reads, are left out.

    Args:
        tensors: names without the prefix.
        head_width: of one attention head; all of OpenCLIP's text towers have 64.

    Raises:
        ValueError: if the architecture is another one.
    """
    what = "an OpenCLIP text tower"
    vocabulary, width = _shape(tensors, "token_embedding.weight", what)
    layers = _count(tensors, r"transformer\.resblocks\.(\d+)\.") - 1
    if layers < 1 or width % head_width:
        raise ValueError(
            f"{what} must have at least 2 layers, {head_width} channels a head, got {layers + 1} of {width}"
        )
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_shape(tensors, "transformer.resblocks.0.mlp.c_fc.weight", what)[0],
        num_hidden_layers=layers,
        num_attention_heads=width // head_width,
        max_position_embeddings=_shape(tensors, "positional_embedding", what)[0],
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )

    def build() -> CLIPTextModel:
        return CLIPTextModel(config)

    last = f"transformer.resblocks.{layers}."
    read = {n: t for n, t in tensors.items() if n not in ("text_projection", "logit_scale", "attn_mask")}
    unread = {n.removeprefix(last) for n in read if n.startswith(last)}
    first = "transformer.resblocks.0."
    wanted = {n.removeprefix(first) for n in read if n.startswith(first)}
    if unread != wanted:
        name = min(unread ^ wanted)
        raise ValueError(
            f"{what} must have the same tensors in every layer, got {name!r} not in both first and last one"
        )
    rules = [
        (r"token_embedding\.", "embeddings.token_embedding."),
        (r"positional_embedding$", "embeddings.position_embedding.weight"),
        (r"ln_final\.", "final_layer_norm."),
        *((rf"transformer\.resblocks\.(\d+)\.{re.escape(a)}\.", rf"encoder.layers.\1.{b}.") for a, b in _TEXT.items()),
    ]
    result = {}
    for name, tensor in _rename({n: t for n, t in read.items() if not n.startswith(last)}, rules).items():
        joint = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
        if joint is None:
            result[name] = tensor
            continue
        for part, values in zip("qkv", tensor.chunk(3), strict=True):  # cloned, or all three would be saved with each
            result[f"encoder.layers.{joint[1]}.self_attn.{part}_proj.{joint[2]}"] = values.clone()
    with torch.device("meta"):  # transformers before 5 put "text_model." before every name
        prefix = "text_model." if "text_model.final_layer_norm.weight" in build().state_dict() else ""
    return build, {prefix + name: tensor for name, tensor in result.items()}
