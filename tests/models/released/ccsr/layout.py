"""What the makers of the fixtures and the tests share: noise, images and the authors' folder layout.

It runs with the old libraries of the public code, too, so it imports nothing of this project but the seeded weights.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from tests.models.released.seeded import seeded
from tests.once import written_once

HERE = Path(__file__).parent
PROMPT = "clean, high-resolution, 8k"
NEGATIVE_PROMPT = "blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed"
LENGTH = 24  # tokens of a prompt
SCALE = 4
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = {  # scheduler/scheduler_config.json of Stable Diffusion 2.1-base, with skip_prk_steps and such left out
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.10.0.dev0",
    **NOISE,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def lr_images(width: int = 12) -> Tensor:
    """Two images ``[2, 3, 16, width]`` in [0, 1]."""
    return torch.from_numpy(np.random.default_rng(1).random((2, 3, 16, width), np.float32))


def enlarged(lr: Tensor) -> Tensor:
    return F.interpolate(lr, scale_factor=SCALE, mode="bicubic").clamp(0, 1)


def noise(image: int, draw: int, width: int = 6) -> Tensor:
    """What the ``draw``-th call for noise gives to an image of `lr_images`: 0 is x_T, 1 the leap's, then the steps'."""
    values = np.random.default_rng([image, draw]).standard_normal((1, 4, 8, width))
    return torch.from_numpy(values.astype(np.float32))


def vocabulary() -> list[str]:
    """CLIP's tokens without its merges: every byte, every byte at the end of a word, and two for the ends."""
    letters = ByteLevel.alphabet()
    letters = sorted(letters, key=lambda letter: (letter != "!", letter))  # "!" comes first in CLIP, and is the padding
    return [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    vocab = {token: i for i, token in enumerate(vocabulary())}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "pad_token": "!", "do_lower_case": True,
               "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def keys(version: str) -> dict:
    return json.loads((HERE / "keys.json").read_text())[version]


def write_part(folder: Path, name: str, part: dict, dtype: torch.dtype = torch.float32, **changes) -> dict[str, Tensor]:
    """A network's folder as the old libraries write it, from the configuration and the shapes in keys.json."""
    (folder / name).mkdir(parents=True)
    tensors = {k: v.to(dtype) for k, v in weights(name, part["shapes"]).items()}
    (folder / name / "config.json").write_text(json.dumps(part["config"] | changes))
    file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
    save_file(tensors, folder / name / file, {"format": "pt"})
    return tensors


def weights(name: str, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return seeded(shapes, seed=sum(name.encode()))


def write_base(folder: Path, parts: dict) -> None:
    """A Stable Diffusion folder with the networks of ``parts``."""
    for name, part in parts.items():
        write_part(folder, name, part)
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.10.0.dev0"}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"scheduler": ["diffusers", "PNDMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))


@written_once
def write_v2(folder: Path) -> Path:
    """CCSR v2's ``preset/models``: the fine-tuned VAE and the ControlNet beside Stable Diffusion's folder."""
    parts = keys("v2")["parts"]
    base = {name: parts[name] for name in ("unet", "text_encoder")}
    base["vae"] = {"config": parts["vae"]["config"], "shapes": parts["vae"]["shapes"]}
    write_base(folder / "stable-diffusion-2-1-base", base)
    for name in ("controlnet", "vae"):
        write_part(folder, name, parts[name])
    return folder


def v1_tensors() -> dict[str, Tensor]:
    """The ``state_dict`` of CCSR v1's checkpoint; its condition's encoder is the VAE's, as in the released one."""
    tensors = weights("v1", keys("v1")["shapes"])
    for name in tensors:
        if name.startswith("cond_encoder."):
            tensors[name] = tensors[name.replace("cond_encoder.", "first_stage_model.")]
    return tensors


def write_v1(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """CCSR v1's one file, as Lightning writes it; beside it what it lacks of a Stable Diffusion folder."""
    folder.mkdir(parents=True)
    state = {"state_dict": v1_tensors() if tensors is None else tensors, "global_step": 60, "epoch": 0}
    torch.save(state, folder / "real-world_ccsr.ckpt")
    write_base(folder / "stable-diffusion-2-1-base", {})
    return folder / "real-world_ccsr.ckpt"
