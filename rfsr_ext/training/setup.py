"""From a configuration to the objects a run needs: model, data, windows, rewards, losses."""

import copy
import dataclasses
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from rfsr_ext.data import ImageFolder, PhotographCrops, photographs
from rfsr_ext.importing import create_object, is_import_name
from rfsr_ext.losses import HaarLLLoss, VGGGramLoss
from rfsr_ext.models import ISRModel
from rfsr_ext.rewards import Reward, WeightedReward, create_reward
from rfsr_ext.sampling import TimestepWindows
from rfsr_ext.training.config import RFSRConfig

__all__ = [
    "add_adapters",
    "build_dataset",
    "build_rewards",
    "build_windows",
    "merge_adapters",
    "structure_loss",
    "style_loss",
]


def build_dataset(config: RFSRConfig) -> Dataset:
    """The training crops."""
    if config.data == "photographs":
        return PhotographCrops(photographs("train"), config.crop_size, seed=config.seed, recolor=False)
    if is_import_name(config.data):
        return create_object(config.data, "data", Dataset, config)
    return ImageFolder(config.data, config.crop_size, seed=config.seed)


def build_windows(config: RFSRConfig, model: ISRModel) -> TimestepWindows:
    """The windows, in sampling steps of the model's own scheduler."""
    last = config.num_inference_steps or model.num_inference_steps
    if config.window_unit == "noise":
        raise ValueError("window_unit must be steps or timesteps for this model, got 'noise'")
    if config.window_unit == "timesteps":
        scheduler = copy.deepcopy(model.scheduler)
        scheduler.set_timesteps(last)
        windows = TimestepWindows.from_timesteps(scheduler.timesteps, config.structure_window, config.reward_window)
    else:
        windows = TimestepWindows(config.structure_window, config.reward_window, last, config.allow_overlap)
    if config.structure_loss == "none":  # steps without a loss are not drawn
        windows = dataclasses.replace(windows, structure=None)
    return windows


def build_rewards(terms: dict[str, float | dict[str, Any]]) -> list[WeightedReward]:
    """Weighted rewards from the configuration: by name a weight, or a mapping with the fields of `WeightedReward`."""
    built = []
    for name, term in terms.items():
        options = dict(term) if isinstance(term, dict) else {"weight": term}
        own = is_import_name(name) and not name.startswith("pyiqa:")
        reward = create_object(name, "reward", Reward) if own else create_reward(name)
        built.append(WeightedReward(reward, **options))
    return built


def structure_loss(kind: str) -> nn.Module | None:
    """The low-frequency loss or what Table 5 puts in its place."""
    return {"haar-ll": HaarLLLoss, "l1": nn.L1Loss, "none": lambda: None}[kind]()


def style_loss(config: RFSRConfig) -> VGGGramLoss | None:
    """The Gram distance, if the configuration asks for it."""
    return VGGGramLoss(weights=config.vgg_weights) if config.style_loss == "gram" else None


def add_adapters(model: ISRModel, rank: int, targets: tuple[str, ...]) -> None:
    """Wrap every trainable group in a LoRA model of peft; only the adapters will train."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModuleNotFoundError("lora_rank needs the package peft; pip install 'rfsr_ext[lora]'") from None
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
    model.set_trainable_groups({name: get_peft_model(m, lora) for name, m in model.trainable_groups().items()})


def merge_adapters(module: nn.Module) -> nn.Module:
    """A copy of a module with its adapters merged into the weights; any other module as it is."""
    merge = getattr(module, "merge_and_unload", None)
    return copy.deepcopy(module).merge_and_unload() if merge else module
