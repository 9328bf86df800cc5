"""Image rewards behind one interface: ``score(images in [0, 1], prompts) → [N]``, higher is better."""

from collections.abc import Callable
from functools import partial

from rfsr_ext.importing import create_object, is_import_name
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
    """A reward by the name it has in configurations.

    Args:
        name: one of `REWARDS` and `PUBLISHED`; ``pyiqa:NAME`` for the metric NAME of pyiqa; or ``package.module:Name``
            of a function that returns a `Reward`.

    Raises:
        ValueError: if there is none of that name, or the user's own object is no reward.
        FileNotFoundError, ModuleNotFoundError: if its weights or its package are not there.
    """
    if name.startswith("pyiqa:"):
        return PyIQAReward(name.removeprefix("pyiqa:"))
    known = REWARDS | PUBLISHED
    if name in known:
        return known[name]()
    if is_import_name(name):
        return create_object(name, "reward", Reward)
    raise ValueError(f"reward must be one of {', '.join(known)}, pyiqa:METRIC or package.module:Name, got {name!r}")
