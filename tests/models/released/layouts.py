"""What the layouts of several systems share: a small tokenizer, inputs, the plain parts of Stable Diffusion."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

LETTERS = sorted(ByteLevel.alphabet())
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def uniform(name: str, shape: list[int], low: float = 0.0, high: float = 1.0) -> Tensor:
    """The same input for the public code and for ours."""
    u = np.random.default_rng([1, *name.encode()]).random(shape)
    return torch.from_numpy((low + (high - low) * u).astype(np.float32))


def write_plain_parts(folder: Path, scheduler: dict, length: int, index: dict, tokenizer: dict | None = None) -> None:
    """``model_index.json``, tokenizer and scheduler of a Stable Diffusion folder.

    Args:
        folder: exists.
        scheduler: ``scheduler_config.json``.
        length: of prompts, in tokens.
        index: entries of ``model_index.json`` besides those that all have.
        tokenizer: further entries of ``tokenizer_config.json``.
    """
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    } | index  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("tokenizer", "scheduler"):
        (folder / name).mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "tokenizer/vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>"}  # fmt: skip
    (folder / "tokenizer/special_tokens_map.json").write_text(json.dumps(special))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special, **(tokenizer or {})}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
