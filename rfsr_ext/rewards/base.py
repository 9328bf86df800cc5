"""What a reward is, and how several are weighed into one loss (paper eq. 4 and 5)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Reward", "WeightedReward", "reward_loss"]


class Reward(nn.Module, ABC):
    """A differentiable score of images, higher is better.

    Attributes:
        name: what it is called in logs and tables.
        stand_in_for: the published model a small stand-in plays the part of, or None if it is the real one.
    """

    name: str
    stand_in_for: str | None = None

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score ``[N, 3, H, W]`` images in [0, 1], one prompt each (ignored by rewards without text), to ``[N]``."""

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.score(images, prompts)

    @property
    def label(self) -> str:
        """The name as shown to people: stand-ins say that they are."""
        return f"{self.name} (stand-in for {self.stand_in_for})" if self.stand_in_for else self.name


@dataclass(frozen=True)
class WeightedReward:
    """One term of eq. 5: ``weight`` is λ_clipiqa or λ_iw, the loss is −score."""

    reward: Reward
    weight: float


def reward_loss(rewards: list[WeightedReward], images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """L_reward = Σ λ_k · mean(−r_k), eq. 5, and the detached ``[N]`` scores by name.

    Args:
        rewards: what to weigh.
        images: ``[N, 3, H, W]``, already clamped to [0, 1].
        prompts: N prompts.
    """
    loss, scores = images.new_zeros((), dtype=torch.float32), {}
    for term in rewards:
        score = term.reward.score(images, prompts)
        if score.shape != images.shape[:1]:
            raise ValueError(
                f"reward {term.reward.name!r} must return one score per image, shape [{images.shape[0]}], "
                f"got {list(score.shape)}"
            )
        scores[term.reward.name] = score.detach()
        loss = loss - term.weight * score.float().mean()
    return loss, scores
