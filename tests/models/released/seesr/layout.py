"""The authors' download layout at reduced width, written from the names and shapes that the public classes give.

Used by make.py, whose public code opens these very files, and by the tests.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.released.layouts import VOCABULARY, uniform, write_plain_parts
from tests.models.released.seeded import seeded
from tests.once import written_once

HERE = Path(__file__).parent
LENGTH = 16  # of prompts, in tokens

UNET = {
    "sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 2, "attention_head_dim": [2, 4],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24, "norm_num_groups": 4, "use_linear_projection": True,
}  # fmt: skip
EMBEDDING = [8, 16]  # widths of the ControlNet's embedding of its image
VAE = {
    "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
}  # fmt: skip
TEXT = {
    "vocab_size": len(VOCABULARY), "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": LENGTH, "projection_dim": 24, "hidden_act": "gelu",
    "bos_token_id": len(VOCABULARY) - 2, "eos_token_id": len(VOCABULARY) - 1, "pad_token_id": len(VOCABULARY) - 1,
}  # fmt: skip
SCHEDULER = {  # of Stable Diffusion 2 base, which samples with PNDM where nobody asks for another
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.8.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
TURBO = SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
SWIN = {
    "image_res": 224, "vision_width": 64, "embed_dim": 8, "depths": [2, 2, 3, 1], "num_heads": [2, 4, 4, 8],
    "window_size": 7,
}  # fmt: skip
BERT = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 24, "initializer_range": 0.02, "intermediate_size": 40,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 8, "model_type": "bert", "num_attention_heads": 4,
    "num_hidden_layers": 2, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 10, "encoder_width": 24,
    "add_cross_attention": True, "add_tag_cross_attention": False,
}  # fmt: skip
TAGS = [f"tag {k}" for k in range(20)]
THRESHOLDS = [0.5 + 0.01 * k for k in range(20)]


def keys() -> dict:
    """What make.py stored: by part, the public class's names and shapes, and its config.json."""
    return json.loads((HERE / "keys.json").read_text())


def noise(count: int, shape: tuple[int, ...]) -> list[Tensor]:
    """Noises of variance 1 for one image: x_T's, then one for each step."""
    return [uniform(f"noise {k}", list(shape), -(3**0.5), 3**0.5) for k in range(count)]


def write_tensors(path: Path, shapes: dict[str, list[int]], seed: int, dtype: torch.dtype = torch.float32) -> None:
    tensors = {name: x.to(dtype) for name, x in seeded(shapes, seed).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save({"model": tensors} if path.name.startswith("ram") else tensors, path)


def write_part(folder: Path, name: str, file: str, seed: int, dtype: torch.dtype, known: dict) -> None:
    write_tensors(folder / file, known[name]["shapes"], seed, dtype)
    (folder / "config.json").write_text(json.dumps(known[name]["config"]))


def write_ram(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """RAM, DAPE and the lists of tags in one folder."""
    known = keys()
    write_tensors(folder / "ram_swin_large_14m.pth", known["ram"]["shapes"], seed, dtype)
    write_tensors(folder / "DAPE.pth", known["dape"]["shapes"], seed, dtype)
    (folder / "ram_tag_list.txt").write_text("\n".join(TAGS))  # the published one ends without a line break, too
    (folder / "ram_tag_list_threshold.txt").write_text("".join(f"{x}\n" for x in THRESHOLDS))


@written_once
def write_base(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, turbo: bool = False) -> Path:
    """Stable Diffusion 2 base as a diffusers folder, or SD-Turbo, whose schedule is another."""
    known = keys()
    file = "diffusion_pytorch_model.safetensors"
    write_part(folder / "unet", "base_unet", file, seed, dtype, known)
    write_part(folder / "vae", "vae", file, seed, dtype, known)
    write_part(folder / "text_encoder", "text_encoder", "model.safetensors", seed, dtype, known)
    # as in the published files, which are older than the libraries that read them
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, old))})\.(?=weight|bias)")
    vae = load_file(folder / "vae" / file)
    save_file({pattern.sub(lambda m: f".{old[m[1]]}.", name): x for name, x in vae.items()}, folder / "vae" / file)
    text = load_file(folder / "text_encoder/model.safetensors")
    text["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file(text, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
    index = {
        "_diffusers_version": "0.8.0", "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": [None, None],
    }  # fmt: skip
    write_plain_parts(folder, TURBO if turbo else SCHEDULER, LENGTH, index, {"do_lower_case": True})
    return folder


@written_once
def write_layout(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """``preset/models`` of the authors: the base, SeeSR's two networks, RAM and DAPE."""
    known = keys()
    write_base(folder / "stable-diffusion-2-base", seed, dtype)
    for part in ("unet", "controlnet"):
        file = "diffusion_pytorch_model.safetensors"
        write_part(folder / "seesr" / part, part, file, seed, dtype, known)
    write_ram(folder, seed, dtype)
    return folder
