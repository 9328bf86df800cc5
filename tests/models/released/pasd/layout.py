"""The authors' download layout at reduced width, written from the names and shapes that the public classes give.

Used by make.py, whose public code opens these very files, and by the tests.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.released.layouts import VOCABULARY, uniform, write_plain_parts
from tests.models.released.seeded import seeded
from tests.once import written_once

HERE = Path(__file__).parent
LENGTH = 24  # of prompts, in tokens

UNET = {
    "sample_size": 8, "block_out_channels": [8, 16, 16], "layers_per_block": 2, "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12, "norm_num_groups": 4,
}  # fmt: skip
LIGHT = {**UNET, "layers_per_block": 1}
EMBEDDING = [4, 8, 8, 12]  # widths of the ControlNet's embedding of its image
VAE = {
    "block_out_channels": [4, 4, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2,
    "sample_size": 32,
}  # fmt: skip
TEXT = {
    "vocab_size": len(VOCABULARY), "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": LENGTH, "projection_dim": 12, "hidden_act": "quick_gelu",
    "bos_token_id": len(VOCABULARY) - 2, "eos_token_id": len(VOCABULARY) - 1, "pad_token_id": len(VOCABULARY) - 1,
}  # fmt: skip
SCHEDULER = {  # of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
VARIANTS = {  # where the authors keep each, and what of theirs it is made of
    "pasd": ("runs/pasd/checkpoint-100000", "unet", "controlnet"),
    "pasd_light_rrdb": ("runs/pasd_light_rrdb/checkpoint-120000", "unet_light", "controlnet_rrdb"),
}
RUNS = {"900": 20, "pinned": 5}  # sampling steps; see make.py for what the two are
FILE = "diffusion_pytorch_model.safetensors"


def keys() -> dict:
    """What make.py stored: by part, the public class's names and shapes, and its config.json."""
    return json.loads((HERE / "keys.json").read_text())


def noise(number: int, shape: tuple[int, ...]) -> Tensor:
    """A noise of variance 1."""
    return uniform(f"noise {number}", list(shape), -(3**0.5), 3**0.5)


def write_part(folder: Path, name: str, seed: int = 0, dtype: torch.dtype = torch.float32, file: str = FILE) -> None:
    """One network's folder."""
    part = keys()[name]
    # small enough that 20 steps of guidance 9 do not blow rounding up
    tensors = {n: x.to(dtype) for n, x in seeded(part["shapes"], seed, scale=0.7).items()}
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(part["config"]))


def write_base(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """What PASD takes of Stable Diffusion 1.5."""
    write_part(folder / "vae", "vae", seed, dtype)
    write_part(folder / "text_encoder", "text_encoder", seed, dtype, "model.safetensors")
    index = {
        "_diffusers_version": "0.6.0", "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }  # fmt: skip
    write_plain_parts(folder, SCHEDULER, LENGTH, index)


@written_once
def write(root: Path, variant: str = "pasd", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """The authors' repository with one of their models in it; gives the model's folder."""
    place, unet, controlnet = VARIANTS[variant]
    write_part(root / place / "unet", unet, seed, dtype)
    write_part(root / place / "controlnet", controlnet, seed, dtype)
    write_base(root / "checkpoints/stable-diffusion-v1-5", seed, dtype)
    return root / place
