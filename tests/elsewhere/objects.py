"""What users hand their own tensors to, on the CPU and elsewhere: models, rewards, losses, trainers.

``python -m tests.elsewhere.objects LIBRARY FOLDER``: the device, compiled, and where the mini model is built. Each
object ends in a line of JSON: its name, how much was computed on the device, how far the result is from the CPU's.
"""

import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from rfsr_ext.data import Degradation, load_photograph, photographs
from rfsr_ext.data.degradation import DEGRADATIONS
from rfsr_ext.data.images import to_tensor
from rfsr_ext.losses import HaarLLLoss, VGGFeatureLoss, VGGGramLoss
from rfsr_ext.mini import build
from rfsr_ext.models import check_model
from rfsr_ext.rewards import REWARDS, create_reward
from rfsr_ext.sampling import generators, sample, upscale
from tests.elsewhere import NAME, computed, register
from tests.models.released.reduced import REDUCED
from tests.rewards.tiny import OriginalImageReward
from tests.training.run_tiny import make_trainer


def images(device: str, count: int, *size: int) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)


def model(create: Callable, device: str) -> list[Tensor]:
    thing = create().to(device)
    side = 2 * thing.multiple // thing.scale
    if device == NAME:
        check_model(thing)
    large, tile = images("cpu", 1, 9, side + 3)[0], 2 * thing.multiple  # by two tiles
    return [
        sample(thing, images(device, 2, side, side), ["cat", ""], generators(0, [0, 1]), 2),
        upscale(thing, large, tile=tile, num_inference_steps=2, progress=False),
    ]


def reward(create: Callable, device: str) -> list[Tensor]:
    x = images(device, 2, 64, 48).requires_grad_()
    scores = create().to(device).score(x, ["cat", "dog"])
    return [scores.detach(), *torch.autograd.grad(scores.sum(), x)]


def loss(create: Callable, device: str) -> list[Tensor]:
    x = images(device, 4, 64, 48).requires_grad_()
    value = create().to(device)(x, images(device, 4, 64, 48).flip(0))
    return [value.detach(), *torch.autograd.grad(value, x)]


def on_both(compute: Callable, create: Callable) -> float:
    """The largest difference."""
    created = functools.cache(create)  # some draw their weights
    both = zip(*(compute(lambda: copy.deepcopy(created()), device) for device in ("cpu", NAME)), strict=True)
    return max((elsewhere.cpu() - here).abs().max().item() for here, elsewhere in both)


def degradation(name: str) -> float:
    """The mean difference: on a GPU another code draws the same, and a pixel may end a level beside."""
    photograph, seeds = to_tensor(load_photograph("astronaut"))[None, :, 200:264, 200:248], [(7, 0)]
    results = [Degradation.preset(name)(photograph.to(device), seeds) for device in ("cpu", NAME)]
    return max((elsewhere.cpu() - here).abs().mean().item() for here, elsewhere in zip(*results, strict=True))


def refusals() -> float:
    """What CUDA refuses, the device refuses."""
    x = torch.ones(2, device=NAME)
    for sentence, act in {
        "same device": lambda: x + torch.ones(2),
        "convert": lambda: x.numpy(),
        "device type for generator": lambda: torch.randn(2, device=NAME, generator=torch.Generator()),
    }.items():
        try:
            act()
        except (RuntimeError, TypeError) as error:
            assert sentence in str(error), error
        else:
            raise AssertionError(sentence)
    return (x + 1 - 2).abs().sum().item()


def mini_build(folder: Path) -> float:
    """An iteration of every stage, on the photographs that are there; what it wrote can be opened."""
    plan = build.BuildPlan(**{field.name: 1 for field in dataclasses.fields(build.BuildPlan)})

    def bundled(split: str, packaged: bool = False) -> list[str]:
        return [] if packaged else photographs(split)

    with mock.patch.object(build, "photographs", bundled), mock.patch.object(build, "PACKAGED", {}):
        build.build(folder, folder / "work", folder / "weights", plan=plan, device=NAME, bf16=False)
    return 0.0


def half_precision(folder: Path) -> float:
    """Training under autocast, whose list of operations is CUDA's here, with a scaled loss."""
    trainer, seen = make_trainer(folder, 2, 2, mixed_precision="fp16"), set()
    trainer.model.networks["unet"].conv_out.register_forward_hook(lambda module, given, made: seen.add(made.dtype))
    history = trainer.train().history
    assert torch.float16 in seen and not history["skipped"].any(), (seen, history)
    return 0.0


def main() -> None:
    library, folder = sys.argv[1:]
    register(library)
    losses = {"HaarLLLoss": HaarLLLoss, "VGGGramLoss": functools.partial(VGGGramLoss, weights="random"),
              "VGGFeatureLoss": VGGFeatureLoss}  # fmt: skip
    rewards = {name: functools.partial(create_reward, name) for name in REWARDS}
    rewards["ImageReward"] = OriginalImageReward().reward
    things = {
        "refusals": refusals,
        "mini build": functools.partial(mini_build, Path(folder, "mini")),
        "half precision": functools.partial(half_precision, Path(folder, "half")),
    }
    things |= {name: functools.partial(degradation, name) for name in DEGRADATIONS if name != "mini"}
    for compute, created in ((model, REDUCED), (reward, rewards), (loss, losses)):
        things |= {name: functools.partial(on_both, compute, create) for name, create in created.items()}
    for name, act in things.items():
        before = computed()
        error = act()
        print(json.dumps({"name": name, "computed": computed() - before, "error": error}), flush=True)


if __name__ == "__main__":
    main()
