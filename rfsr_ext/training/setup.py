"""From a configuration to the objects a run needs: model, data, windows, rewards, losses."""

import contextlib
import copy
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from rfsr_ext.data import ImageFolder, PhotographCrops, Root, Sample, evaluation_crops, photographs
from rfsr_ext.data.datasets import CheckedSamples
from rfsr_ext.data.stream import StreamedImages
from rfsr_ext.evaluation.measure import Scorer
from rfsr_ext.files import replace_folder
from rfsr_ext.importing import create_object, is_import_name
from rfsr_ext.losses import HaarLLLoss
from rfsr_ext.metrics.judge import Judge
from rfsr_ext.models import ISRModel, load_model
from rfsr_ext.rewards import WeightedReward, create_reward
from rfsr_ext.sampling import TimestepWindows
from rfsr_ext.training.config import RFSRConfig, RunConfig, create_degradation

__all__ = [
    "add_adapters",
    "as_reference",
    "build_dataset",
    "build_judges",
    "build_model",
    "build_rewards",
    "build_samples",
    "build_validation",
    "build_windows",
    "data_roots",
    "export_model",
    "finish",
    "merge_adapters",
    "save_adapters",
    "structure_loss",
]


def build_dataset(config: RunConfig) -> Dataset:
    """The training crops.

    Raises:
        FileNotFoundError: if a folder does not exist or holds nothing of use.
        ValueError: if the crops do not fit the degradation's scale, or the user's own object is no dataset.
    """
    degradation = create_degradation(config.degradation)
    if config.data == "photographs":
        return PhotographCrops(
            photographs("train"), config.crop_size, seed=config.seed, degradation=degradation, recolor=False
        )
    if isinstance(config.data, str) and is_import_name(config.data):
        return create_object(config.data, "data", Dataset, config)
    if isinstance(config.data, dict):
        return StreamedImages(
            config.data["stream"], config.crop_size, config.seed, degradation, config.data.get("lanes", 1)
        )
    return ImageFolder(data_roots(config), config.crop_size, seed=config.seed, degradation=degradation)


def build_samples(config: RunConfig, model: ISRModel, count: int, dataset: Dataset | None = None) -> Dataset:
    """The training crops of `build_dataset`; the user's own, given or named by ``data``, are checked.

    Their first and last are looked at here, before the work, all of them as they are drawn.

    Args:
        config: the settings.
        model: what they are for.
        count: how many samples will be asked for.
        dataset: instead of that of the configuration.

    Raises:
        ValueError: see `CheckedSamples` and `build_dataset`.
    """
    named = isinstance(config.data, str) and is_import_name(config.data)
    if dataset is None and not named:
        return build_dataset(config)
    own = CheckedSamples(build_dataset(config) if dataset is None else dataset, config.crop_size, model.scale)
    for index in {0, count - 1}:
        own[index]
    return own


def build_model(config: RunConfig, device: torch.device, model: ISRModel | None = None) -> ISRModel:
    """The configuration's model, or the one given, where it will be trained.

    Raises:
        ValueError: if the crops do not fit it; see also `load_model`.
    """
    model = load_model(config.model, **config.model_options) if model is None else model
    model.check_size(config.crop_size, "crop_size")
    model.to(device)
    return model.enable_gradient_checkpointing() if config.gradient_checkpointing else model


def build_validation(config: RunConfig, model: ISRModel) -> list[Sample]:
    """Held-out crops of the bundled photographs.

    Raises:
        ValueError: if they do not fit the model, or are too many.
    """
    names, size = photographs("validation"), config.validation_size
    model.check_size(size, "validation_size")
    return evaluation_crops(names, size, config.validation_crops, called="validation_crops")


def build_judges(device: torch.device) -> dict[str, Scorer]:
    """The scorers that training never uses: the judge that ships."""
    return {"judge": Judge.from_pretrained().to(device).score}


def data_roots(config: RunConfig) -> list[Root]:
    """The folders of the training data; none if it is something else."""
    if isinstance(config.data, dict):
        return []
    if isinstance(config.data, str):
        return [] if config.data == "photographs" or is_import_name(config.data) else [Root(config.data)]
    return [Root(root) if isinstance(root, str) else Root(**root) for root in config.data]


def build_windows(config: RFSRConfig, model: ISRModel) -> TimestepWindows:
    """The windows, in sampling steps of the model's own scheduler."""
    windows = TimestepWindows.from_process(
        model.process(config.num_inference_steps, (config.crop_size, config.crop_size)),
        config.structure_window,
        config.reward_window,
        config.window_unit,
        config.allow_overlap,
    )
    if config.structure_loss == "none":  # steps without a loss are not drawn
        windows = dataclasses.replace(windows, structure=None)
    return windows


def build_rewards(terms: dict[str, float | dict[str, Any]]) -> list[WeightedReward]:
    """Weighted rewards from the configuration: by name a weight, or a mapping with the fields of `WeightedReward`."""
    options = {name: term if isinstance(term, dict) else {"weight": term} for name, term in terms.items()}
    return [WeightedReward(create_reward(name), **own) for name, own in options.items()]


def structure_loss(kind: str, level: int) -> nn.Module | None:
    """The structure loss, or what Table 5 puts in its place."""
    return {"haar-ll": lambda: HaarLLLoss(level=level), "l1": nn.L1Loss, "none": lambda: None}[kind]()


def add_adapters(model: ISRModel, rank: int, targets: tuple[str, ...]) -> None:
    """Wrap every trainable group in a LoRA model of peft; only the adapters will train.

    Raises:
        ValueError: if a network has none of the modules, or no network has one that the defaults do not name.
    """
    from peft import LoraConfig, get_peft_model

    parts = {
        network: [f".{name}" for name, part in module.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
        for network, module in model.trainable_networks().items()
    }
    for network, names in parts.items():
        if not any(name.endswith(f".{target}") for name in names for target in targets):
            raise _no_such_target(network, names, targets)
    usual = RunConfig.model_fields["lora_targets"].default  # no kind of network has all of these
    everywhere = [name for names in parts.values() for name in names]
    for target in targets:
        if target not in usual and not any(name.endswith(f".{target}") for name in everywhere):
            raise _no_such_target(" or ".join(parts), everywhere, [target])
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
    model.networks |= {name: get_peft_model(m, lora) for name, m in model.trainable_networks().items()}


def _no_such_target(network: str, names: Sequence[str], targets: Sequence[str]) -> ValueError:
    """Names of modules that there are, those first that look like what was given."""
    endings = sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()})
    near = [close for target in targets for close in difflib.get_close_matches(target, endings, n=1)]
    known = list(dict.fromkeys([*near, *endings]))[:8]
    return ValueError(
        f"lora_targets must name modules of the {network}, such as {', '.join(known)}, got {', '.join(targets)}"
    )


@contextlib.contextmanager
def as_reference(model: ISRModel, frozen: ISRModel | None) -> Iterator[ISRModel]:
    """The frozen reference of a training; where there is none the model itself, for as long without its adapters.

    Raises:
        ValueError: if the model has none.
    """
    with contextlib.ExitStack() as stack:
        for network in model.trainable_networks().values() if frozen is None else ():
            adapted = getattr(network, "module", network)
            if not hasattr(adapted, "disable_adapter"):
                raise ValueError("reference must be the frozen pre-trained model where there are no adapters, got None")
            stack.enter_context(adapted.disable_adapter())
        yield model if frozen is None else frozen


def merge_adapters(module: nn.Module) -> nn.Module:
    """A copy of a module with its adapters merged into the weights; any other module as it is."""
    return copy.deepcopy(module).merge_and_unload() if hasattr(module, "merge_and_unload") else module


def export_model(model: ISRModel, folder: Path, frozen: Mapping[str, nn.Module] = MappingProxyType({})) -> None:
    """Write the model as an ordinary folder, adapters merged; adapters themselves beside it, as peft keeps them.

    Args:
        model: in training.
        folder: is replaced as a whole.
        frozen: networks to save in the place of those that training computes with.
    """
    used, own = dict(model.networks), model.trainable_networks()
    model.networks |= dict(frozen) | {name: merge_adapters(network) for name, network in own.items()}
    try:
        model.save_pretrained(folder)
    finally:
        model.networks |= used
    save_adapters(own, folder.with_name(f"{folder.name}-adapters"))


def finish(model: ISRModel, frozen: Mapping[str, nn.Module] = MappingProxyType({})) -> None:
    """Merge adapters and freeze: what was trained is from now on an ordinary model, with ``frozen`` as it was."""
    trained = {name: merge_adapters(network) for name, network in model.trainable_networks().items()}
    model.networks |= dict(frozen) | trained
    model.to(model.device)
    for network in model.networks.values():
        network.requires_grad_(False)


def save_adapters(networks: dict[str, nn.Module], folder: Path) -> None:
    """Write the adapters of every network that has some as ``folder/NETWORK``, in peft's own files."""
    adapters = {name: network for name, network in networks.items() if hasattr(network, "merge_and_unload")}
    if adapters:
        with replace_folder(folder) as aside:
            for name, network in adapters.items():
                network.save_pretrained(aside / name)
