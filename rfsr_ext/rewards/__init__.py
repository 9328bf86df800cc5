"""Image rewards behind one interface: ``score(images in [0, 1], prompts) → [N]``, higher is better."""

from collections.abc import Callable

from rfsr_ext.rewards.base import CallableReward, Reward
from rfsr_ext.rewards.compose import WeightedReward, check_rewards, reward_loss
from rfsr_ext.rewards.mini import MiniIQA, MiniPreference

__all__ = [
    "REWARDS",
    "CallableReward",
    "MiniIQA",
    "MiniPreference",
    "Reward",
    "WeightedReward",
    "check_rewards",
    "create_reward",
    "reward_loss",
]

REWARDS: dict[str, Callable[[], Reward]] = {
    "mini-iqa": MiniIQA.from_pretrained,
    "mini-preference": MiniPreference.from_pretrained,
}


def create_reward(name: str) -> Reward:
    """A reward by the name it has in configurations.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in REWARDS:
        raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {name!r}")
    return REWARDS[name]()
