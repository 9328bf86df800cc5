"""Image rewards behind one interface: ``score(images in [0, 1], prompts) → [N]``, higher is better."""

from collections.abc import Callable
from functools import partial

from rfsr_ext.rewards.base import CallableReward, Reward
from rfsr_ext.rewards.clip_iqa import CLIPIQA
from rfsr_ext.rewards.compose import WeightedReward, check_rewards, reward_loss
from rfsr_ext.rewards.image_reward import ImageReward
from rfsr_ext.rewards.mini import MiniIQA, MiniPreference
from rfsr_ext.rewards.pyiqa_reward import PyIQAReward

__all__ = [
    "CLIPIQA",
    "PUBLISHED",
    "REWARDS",
    "CallableReward",
    "ImageReward",
    "MiniIQA",
    "MiniPreference",
    "PyIQAReward",
    "Reward",
    "WeightedReward",
    "check_rewards",
    "create_reward",
    "reward_loss",
]

REWARDS: dict[str, Callable[[], Reward]] = {  # those that ship with the package
    "mini-iqa": MiniIQA.from_pretrained,
    "mini-preference": MiniPreference.from_pretrained,
}
PUBLISHED: dict[str, Callable[[], Reward]] = {  # those whose weights must be on disk
    **{variant: partial(CLIPIQA, variant) for variant in CLIPIQA.VARIANTS},
    "image-reward": ImageReward.from_pretrained,
}


def create_reward(name: str) -> Reward:
    """A reward by the name it has in configurations; ``pyiqa:NAME`` is the metric NAME of pyiqa.

    Raises:
        ValueError: if there is none of that name.
        FileNotFoundError, ModuleNotFoundError: if its weights or its package are not there.
    """
    if name.startswith("pyiqa:"):
        return PyIQAReward(name.removeprefix("pyiqa:"))
    known = REWARDS | PUBLISHED
    if name not in known:
        raise ValueError(f"reward must be one of {', '.join(known)} or pyiqa:METRIC, got {name!r}")
    return known[name]()
