"""The untrained parts of the mini ISR model: real diffusers and transformers classes at a small size."""

import itertools
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rfsr_ext.data import PACKAGED, PHOTOGRAPHS
from rfsr_ext.data.photographs import Photograph

__all__ = ["LATENT_CHANNELS", "autoencoder", "denoiser", "scheduler", "text_encoder", "tokenizer"]

LATENT_CHANNELS = 16
START_NOISE = 0.12  # σ where sampling starts, for latents of deviation 1
LINEAR_WIDTHS = (6, 12, 24)  # half of the condition's embedding, see `rfsr_ext.mini.linear_start`
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


def tokenizer(photographs: Mapping[str, Photograph] = PHOTOGRAPHS | PACKAGED) -> CLIPTokenizer:
    """A byte-level BPE tokenizer of CLIP's format, learned from the photographs' tags."""
    corpus = [tag for photograph in photographs.values() for tag in photograph.tags] + list(_EXTRA_WORDS)
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
    """Four times smaller latents of 16 channels: 4 numbers for the 16·3 of a patch would lose too much at 64 pixels.

    ``scaling_factor`` gives the latents that `rfsr_ext.mini.base_model.train_autoencoder` makes about unit deviation.
    """
    widths = (32, 48, 64)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=2.2,
    )


def denoiser() -> tuple[UNet2DConditionModel, ControlNetModel]:
    """The U-Net, and a ControlNet with a copy of its encoder as `ControlNetModel.from_unet` makes one.

    Zero-initialized convolutions protect a pre-trained U-Net from its new ControlNet; these two learn together, so they
    start from ordinary random weights.  The large ``norm_eps`` lets a group's strength pass: what is to be added to a
    flat picture is little.
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,  # text enters in the middle block
        attention_head_dim=4,
        norm_num_groups=8,
        norm_eps=1.0,
    )
    controlnet = ControlNetModel.from_unet(
        unet, conditioning_channels=3, conditioning_embedding_out_channels=[2 * width for width in LINEAR_WIDTHS]
    )
    for module in controlnet.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return unet, controlnet


def scheduler() -> DDIMScheduler:
    """A constant β, so that σ grows as √t up to `START_NOISE`; sampled by DDIM, predicting z_0.

    Stable Diffusion's schedule ends in noise, in which a large network finds the picture.  A small one starts from the
    enlarged LR image, whose latents are about 0.2 from the truth's, under a little less noise, and estimates z_0
    itself: what it does not understand of the noise it leaves away.  (Predicting noise, it left that as speckle.)

    With 50 steps the timesteps are 999, 979, …, 19, so that the paper's t ∈ [600, 1000] and [0, 200] are its sampling
    steps 1–20 and 41–50; σ falls from 0.12 to 0.09 in the former and from 0.05 in the latter.
    """
    beta = -math.log(1 - START_NOISE**2) / 1000
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=beta,
        beta_end=beta,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="trailing",
        prediction_type="sample",
    )
