"""The paper's reward step, CLIP-IQA and ImageReward at their published sizes, in two orders of calls.

Weights are random and prompts are not tokenized: neither changes time or memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor

from rfsr_ext.rewards import CLIPIQA, ImageReward, WeightedReward, reward_loss
from rfsr_ext.rewards.image_reward import MAX_LENGTH, ImageRewardModel
from rfsr_ext.weights.pyiqa import import_pyiqa

TITLE = "Reward step, CLIP-IQA and ImageReward, batch 4 at 512², float32"
RN50 = (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12)  # OpenAI's sizes


def published_sizes() -> list[WeightedReward]:
    """Both rewards of the paper with its weights λ, and random parameters."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.safetensors"
        save_file(import_pyiqa("pyiqa.archs.clip_model").CLIP(*RN50).state_dict(), path)
        clip_iqa = CLIPIQA(clip=path)
    ones = torch.ones(1, MAX_LENGTH, dtype=torch.long)
    image_reward = ImageReward(
        ImageRewardModel(), lambda *_, **__: SimpleNamespace(input_ids=ones, attention_mask=ones)
    )
    return [WeightedReward(clip_iqa, 5e-5), WeightedReward(image_reward, 5e-5)]


def all_at_once(rewards: list[WeightedReward], images: Tensor, prompts: list[str]) -> Tensor:
    """Score with every reward, add, and differentiate the sum: what one writes first."""
    return sum(term.weight * term.loss(term.score(images, prompts)) for term in rewards)


def steps(device: str, batch: int = 4, side: int = 512) -> dict[str, Callable[[], list[Tensor]]]:
    """Loss and image gradient in both orders."""
    torch.set_flush_denormal(True)  # random weights make gradients so small that a CPU takes several times as long
    rewards = published_sizes()
    for term in rewards:
        term.reward.to(device)
    images, prompts = torch.rand(batch, 3, side, side, device=device).requires_grad_(), ["a photograph"] * batch

    def step(loss: Callable) -> Callable[[], list[Tensor]]:
        def run():
            value = loss(rewards, images, prompts)
            return [value.detach(), *torch.autograd.grad(value, images)]

        return run

    return {
        "ours": step(lambda *inputs: reward_loss(*inputs)[0]),
        "all scores, then one backward": step(all_at_once),
    }
