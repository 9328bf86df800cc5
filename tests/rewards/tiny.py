"""The real reward classes at a small size with random weights."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

from rfsr_ext.rewards import CLIPIQA, ImageReward, image_reward
from rfsr_ext.rewards.image_reward import ImageRewardModel, convert_names, load_tokenizer
from rfsr_ext.weights.pyiqa import import_pyiqa

FILES = Path(__file__).parent / "image_reward"
CLIP_SIZES = {  # embed, resolution, vision layers, width, patch, context, vocabulary, text width, heads, layers
    "RN50": (32, 224, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 1),
    "ViT-L/14": (32, 224, 2, 64, 32, 77, 49408, 64, 1, 1),
}


class OriginalImageReward:
    """What ``image_reward/make.py`` wrote: a tiny state dict, and what the original package makes of it."""

    def __init__(self):
        with safe_open(FILES / "tiny.safetensors", framework="pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.settings = {name: json.loads(text) for name, text in file.metadata().items()}
        self.prompts = self.settings["prompts"]
        self.state = {k.removeprefix("state."): v for k, v in self.tensors.items() if k.startswith("state.")}

    def sizes(self) -> tuple[dict, dict]:
        vision = image_reward.VISION | self.settings["vision"]
        tokens = {"vocab_size": len(load_tokenizer(FILES)), "bos_token_id": 1, "sep_token_id": 3}
        return vision, image_reward.TEXT | self.settings["text"] | tokens

    def reward(self) -> ImageReward:
        """Our own class with that state."""
        model = ImageRewardModel(*self.sizes())
        model.load_state_dict(convert_names(self.state))
        return ImageReward(model, load_tokenizer(FILES))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def clip_network(name: str = "RN50", seed: int = 0) -> torch.nn.Module:
    """pyiqa's CLIP, tiny."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = import_pyiqa("pyiqa.archs.clip_model").CLIP(*CLIP_SIZES[name]).eval()
        for parameter in network.parameters():  # the initial zeros would hide whole branches
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        network.logit_scale.fill_(math.log(100))  # as published
    return network


class Archive(torch.nn.Module):
    """CLIP as OpenAI's TorchScript files have it, which hold numbers beside the weights."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        for name, module in network.named_children():
            setattr(self, name, module)
        for name, parameter in network.named_parameters(recurse=False):
            setattr(self, name, parameter)
        self.input_resolution = torch.nn.Buffer(torch.tensor(224))

    def forward(self, x):
        return self.visual.conv1(x)


def save_archive(network: torch.nn.Module, path: Path) -> None:
    """Write a CLIP as such a file."""
    torch.jit.trace(Archive(network), torch.rand(1, 3, 32, 32)).save(path)


def clip_iqa(folder: Path) -> CLIPIQA:
    """CLIP-IQA with a tiny CLIP, by way of a file in ``folder``."""
    torch.save(clip_network().state_dict(), folder / "clip.pt")
    return CLIPIQA(clip=folder / "clip.pt")
