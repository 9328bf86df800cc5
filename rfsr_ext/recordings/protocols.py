"""The protocols: what is measured on which pictures, and where the files of the network are.

Each is fixed by its name and version.  Whoever changes what one measures, here or in what it calls, raises its version;
recordings of the former one are then refused.  The kernels have none: ``make bench`` measures them, against the best
other way, and keeps a file for each processor.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rfsr_ext.data import PHOTOGRAPHS, Degradation, evaluation_crops, load_photograph, photographs
from rfsr_ext.data.distortions import DISTORTIONS
from rfsr_ext.data.images import resize, to_tensor
from rfsr_ext.evaluation import enlarge_bicubic
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.metrics import Suite, get_preset
from rfsr_ext.models import ISRModel
from rfsr_ext.models.catalog import PUBLISHED, find_files, open_published
from rfsr_ext.rewards import CLIPIQA, ImageReward, MiniIQA, Reward
from rfsr_ext.sampling import upscale
from rfsr_ext.weights import registry

__all__ = ["PROTOCOLS", "SEED", "Protocol", "Row"]

SEED = 0
Row = dict[str, str | bool | int | float]
_SUFFIXES = {".safetensors", ".bin", ".ckpt", ".pt", ".pth"}


@dataclass(frozen=True)
class Protocol:
    """One protocol.

    Attributes:
        measures: what, in words.
        run: the network and the device it is on to the rows; the network may be a stand-in.
        load: opens the published network on the CPU; takes ``weights=``, ``base=`` and ``torch_dtype=`` of a published
            model.
        files: what it is made of, by name, each with its place or None if it is missing; takes the folders
            ``weights`` and ``base`` of a published model.
        version: of what is measured.
    """

    measures: str
    run: Callable[[Any, str], list[Row]]
    load: Callable[..., Any]
    files: Callable[..., dict[str, Path | None]]
    version: int = 1


def _square(name: str) -> np.ndarray:
    """The largest square in the middle of a photograph, ``[S, S, 3]`` in [0, 1]."""
    image = load_photograph(name)
    side = min(image.shape[:2])
    top, left = ((n - side) // 2 for n in image.shape[:2])
    return image[top : top + side, left : left + side]


@torch.enable_grad()
def quality_versions() -> list[tuple[str, str, float, Tensor]]:
    """Photograph, version, strength and picture ``[1, 3, 256, 256]`` in [0, 1] of all that ``clip-iqa`` scores.

    The strength is the severity of a distortion, the amplitude of the pattern of 4×4 pixels, or the number of steps by
    which the bicubic version was changed along the gradient of MiniIQA, each of 0.003 per pixel (notebook 06).
    """
    found = []
    blocks = np.arange(256) // 2
    pattern = (1 - 2 * ((blocks[:, None] + blocks) % 2))[..., None]
    for name in photographs("test"):
        truth = resize(_square(name), (256, 256)).clip(0, 1)
        versions = {("truth", 0.0): truth, ("bicubic", 0.0): resize(resize(truth, (64, 64)), (256, 256))}
        for kind in ("blur", "noise", "jpeg", "sharpen"):
            for severity in (0.25, 0.5, 1.0):
                versions[kind, severity] = DISTORTIONS[kind](truth, severity, np.random.default_rng(SEED))
        versions |= {("pattern", strength): truth + strength * pattern for strength in (0.02, 0.05, 0.1)}
        pictures = {key: to_tensor(np.clip(image, 0, 1))[None] for key, image in versions.items()}
        climbed, mini = pictures["bicubic", 0.0], MiniIQA.from_pretrained()
        for step in range(1, 31):
            start = climbed.detach().requires_grad_()
            (push,) = torch.autograd.grad(mini.score(start).sum(), start)
            push = 0.003 * push.numel() ** 0.5 * F.normalize(push.flatten(), dim=0).view_as(push)
            climbed = (climbed + push).clamp(0, 1)
            if step % 10 == 0:
                pictures["climbed", float(step)] = climbed
        found += [(name, *key, picture) for key, picture in pictures.items()]
    return found


@torch.no_grad()
def _quality(reward: Reward, device: str) -> list[Row]:
    mini = MiniIQA.from_pretrained()
    return [
        {"photograph": name, "version": version, "strength": strength,
         "score": reward.score(picture.to(device), [""]).item(), "mini_iqa": mini.score(picture).item()}
        for name, version, strength, picture in quality_versions()
    ]  # fmt: skip


@torch.no_grad()
def _preference(reward: Reward, device: str) -> list[Row]:
    """At 224 pixels, the size to which ImageReward brings every picture."""
    names = [*photographs("test"), "astronaut", "brick", "china", "motorcycle"]
    rows: list[Row] = []
    for name in names:
        picture = to_tensor(resize(_square(name), (224, 224)).clip(0, 1))[None].to(device)
        for other in names:
            score = reward.score(picture, [", ".join(PHOTOGRAPHS[other].tags)]).item()
            rows.append({"photograph": name, "prompt_of": other, "own": name == other, "score": score})
    return rows


@torch.no_grad()
def _style(loss: VGGGramLoss, device: str) -> list[Row]:
    """The patches of 64 pixels of notebook 08."""
    places = {1: (100, 100), 2: (300, 250)}
    patches = {
        (name, k): to_tensor(load_photograph(name)[top : top + 64, left : left + 64])[None].to(device)
        for name in ("grass", "gravel", "brick")
        for k, (top, left) in places.items()
    }
    return [
        {"a": f"{a[0]} {a[1]}", "b": f"{b[0]} {b[1]}", "same": a[0] == b[0],
         "distance": loss(patches[a], patches[b]).item()}
        for a, b in combinations(patches, 2)
    ]  # fmt: skip


def _upscaled(model: ISRModel, device: str) -> list[Row]:
    """LR pictures of 64 pixels, degraded as SeeSR, PASD and RFSR degrade; the first one's time has the warming up."""
    suite, rows = Suite(get_preset("basic")), []
    ways = {
        "bicubic": lambda lr, prompt: enlarge_bicubic(lr[None], 4)[0],
        "model": lambda lr, prompt: upscale(model, lr, prompt, seed=SEED, progress=False),
    }
    for name in photographs("test"):
        (crop,) = evaluation_crops([name], 256, 1, SEED, Degradation.preset("realesrgan-a"))
        for way, make in ways.items():
            start = time.perf_counter()
            sr = make(crop["lr"], crop["prompt"])
            row = {"photograph": name, "way": way, "seconds": time.perf_counter() - start}
            rows.append(row | {metric: x.item() for metric, x in suite(sr[None], crop["gt"][None]).items()})
    return rows


def _registered(*names: str, package: str | None = None) -> dict[str, Path | None]:
    absent = {package: None} if package and importlib.util.find_spec(package) is None else {}
    return {registry.FILES[name].file: registry.find(name) for name in names} | absent


def _released(name: str, weights: Path | None = None, base: Path | None = None) -> dict[str, Path | None]:
    """Without optional files that are not there; of a folder every file of weights, whether it is read or not."""
    found = {}
    for file, place in find_files(name, weights, base).items():
        if place is not None and place.is_dir():
            inner = sorted(path for path in place.rglob("*") if path.suffix in _SUFFIXES)
            found |= {f"{file.path}/{path.relative_to(place).as_posix()}": path for path in inner}
        elif place is not None or not file.optional:
            found[file.path] = place
    return found


def _load_image_reward() -> ImageReward:
    return ImageReward.from_pretrained(registry.locate("image-reward"), registry.locate("bert-vocabulary").parent)


PROTOCOLS: dict[str, Protocol] = {
    "clip-iqa": Protocol("CLIP-IQA of photographs, their faults, and what fools MiniIQA", _quality, CLIPIQA,
                         partial(_registered, "clip-rn50", package="pyiqa")),
    "image-reward": Protocol("ImageReward of photographs with their own prompt and with others'", _preference,
                             _load_image_reward, partial(_registered, "image-reward", "bert-vocabulary")),
    "vgg19": Protocol("style distances within textures and between them, ImageNet's VGG19", _style, VGGGramLoss,
                      partial(_registered, "vgg19")),
    **{name: Protocol(f"{model.title}: photographs upscaled ×4, fidelity and time", _upscaled,
                      partial(open_published, name), partial(_released, name)) for name, model in PUBLISHED.items()},
}  # fmt: skip
