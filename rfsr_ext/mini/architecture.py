"""The untrained parts of the mini ISR model: real diffusers and transformers classes at a small size."""

import itertools
import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rfsr_ext.data import PHOTOGRAPHS

__all__ = ["LATENT_CHANNELS", "autoencoder", "denoiser", "scheduler", "text_encoder", "tokenizer"]

LATENT_CHANNELS = 12
TEXT_WIDTH = 64
TEXT_LENGTH = 32

# Words a user may type that no photograph is tagged with; the tokenizer falls back to bytes for all others.
_EXTRA_WORDS = (
    "a photo of",
    "clean, high-resolution, 8k",
    "blurry, noisy, lowres, smooth",
    "dog",
    "car",
    "tree",
    "face",
)


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token; ties go to the alphabet, so that the result never changes.

    The trainer of the tokenizers library breaks ties by hash order, and gave another vocabulary on every run.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for word in spelled for pair in itertools.pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in spelled:
            for k in range(len(word) - 2, -1, -1):
                if tuple(word[k : k + 2]) == best:
                    word[k : k + 2] = ["".join(best)]
    return merges


def tokenizer() -> CLIPTokenizer:
    """A byte-level BPE tokenizer of CLIP's format, learned from the photographs' tags."""
    corpus = [tag for photograph in PHOTOGRAPHS.values() for tag in photograph.tags] + list(_EXTRA_WORDS)
    merges = _learn_merges(re.findall(r"[a-z]+", " ".join(corpus)))
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text transformer of width 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def autoencoder() -> AutoencoderKL:
    """Four times smaller latents of 12 channels: 4 numbers for the 16·3 of a patch would lose too much at 64 pixels."""
    widths = (32, 48, 64)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=64,
    )


def denoiser() -> tuple[UNet2DConditionModel, ControlNetModel]:
    """The U-Net, and a ControlNet with a copy of its encoder as `ControlNetModel.from_unet` makes one.

    Zero-initialized convolutions protect a pre-trained U-Net from its new ControlNet; these two learn together from
    scratch, so they start from ordinary random weights, and the condition at the strength of the latents.
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 112),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,  # text enters in the middle block
        attention_head_dim=4,
        norm_num_groups=16,
    )
    controlnet = ControlNetModel.from_unet(
        unet, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32, 64)
    )
    for module in controlnet.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    _amplify_condition(controlnet)
    return unet, controlnet


@torch.no_grad()
def _amplify_condition(controlnet: ControlNetModel) -> None:
    """Scale the conditioning embedding so that smooth random colors leave each layer with mean 0 and variance 1.

    Under ordinary initialization each layer weakens the picture, and after six of them the network hardly sees its
    condition: it learns to read the colors off the noisy latents instead (tried: after 250 iterations the squared
    error at t = 981 was 0.303, two thirds of it a color cast, against 0.060 with this).
    """
    embedding = controlnet.controlnet_cond_embedding
    images = F.interpolate(torch.rand(16, 3, 8, 8), scale_factor=8, mode="bicubic").clamp(0, 1)
    for layer in (embedding.conv_in, *embedding.blocks, embedding.conv_out):
        output = layer(images)
        mean, std = output.mean((0, 2, 3)), output.std((0, 2, 3))
        layer.weight.div_(std[:, None, None, None])
        layer.bias.sub_(mean).div_(std)
        images = F.silu(layer(images))


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, sampled by DDIM, predicting velocity.

    With 50 steps the timesteps are 981, 961, …, 1, so that the paper's t ∈ [600, 1000] and [0, 200] are its sampling
    steps 1–20 and 41–50.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="v_prediction",
    )
