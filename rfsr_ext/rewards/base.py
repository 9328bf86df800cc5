"""What a reward is, and how any callable becomes one."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["CallableReward", "Reward", "check_prompts"]


def check_prompts(prompts: list[str], images: Tensor) -> None:
    """Refuse what is not one prompt per image, above all a single text, which Python takes for a list of letters.

    Raises:
        ValueError: as said.
    """
    if isinstance(prompts, str) or len(prompts) != len(images):
        given = f"the text {prompts!r}" if isinstance(prompts, str) else len(prompts)
        raise ValueError(f"prompts must be a list of one per image, {len(images)}, got {given}")


class Reward(nn.Module, ABC):
    """A score of images, higher is better.

    Attributes:
        name: what it is called in logs and tables.
        stand_in_for: the published model a small stand-in plays the part of, or None if it is the real one.
        differentiable: whether the score has a gradient with respect to the images.
    """

    name: str
    stand_in_for: str | None = None
    differentiable: bool = True

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score ``[N, 3, H, W]`` images in [0, 1], one prompt each (ignored by rewards without text), to ``[N]``."""

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.score(images, prompts)

    @property
    def label(self) -> str:
        """The name as shown to people: stand-ins say that they are."""
        return f"{self.name} (stand-in for {self.stand_in_for})" if self.stand_in_for else self.name


class CallableReward(Reward):
    """Any ``f(images, prompts) → [N]`` as a reward.

    Args:
        function: scores images in [0, 1]; a module moves with the reward.
        name: what to call it.
        higher_is_better: False turns the sign of the score.
        differentiable: False for a function without a gradient; it can then measure, but not train by gradient.
    """

    def __init__(
        self,
        function: Callable[[Tensor, list[str]], Tensor],
        name: str,
        higher_is_better: bool = True,
        differentiable: bool = True,
    ):
        super().__init__()
        self.function, self.name = function, name
        self.sign = 1 if higher_is_better else -1
        self.differentiable = differentiable

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.sign * self.function(images, prompts)
