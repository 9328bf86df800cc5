"""How several rewards become one loss (paper eq. 4 and 5): what each sees, how it counts, and at which steps."""

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rfsr_ext.memory import on_device
from rfsr_ext.rewards.base import Reward

__all__ = ["RunningStatistics", "WeightedReward", "check_rewards", "reward_loss"]


class RunningStatistics:
    """Mean and variance of a score over training, as exponential averages over batches and processes.

    The variance starts at 1 and the mean at that of the first batch: scores pass almost as they are at first, and a
    batch of one image divides by nothing small.  Batches with a score that is not finite are left out.
    """

    def __init__(self, decay: float = 0.99):
        self.decay = decay
        self.mean: float | None = None
        self.variance = 1.0

    def update(self, scores: Tensor) -> None:
        """Take a batch of detached scores into account."""
        batch = float(_over_processes(scores.double().mean()))
        if not math.isfinite(batch):
            return
        self.mean = batch if self.mean is None else self.decay * self.mean + (1 - self.decay) * batch
        spread = float(_over_processes((scores.double() - self.mean).square().mean()))
        self.variance = self.decay * self.variance + (1 - self.decay) * spread

    def __call__(self, scores: Tensor) -> Tensor:
        """(score − mean) / standard deviation; the scores as they are before the first `update`."""
        return scores if self.mean is None else (scores - self.mean) / max(self.variance, 1e-12) ** 0.5

    def state(self) -> list[float | None]:
        """What `load` goes on from, as it may stand in JSON."""
        return [self.mean, self.variance]

    def load(self, state: Sequence[float | None]) -> None:
        """Go on from what `state` gave."""
        self.mean, self.variance = state


@dataclass(frozen=True)
class WeightedReward:
    """One term of eq. 5: how a reward sees the images and what its score counts.

    The loss of a batch is weight · mean(−r), or weight · mean(relu(cap − r)) with a cap.  r is the mean of the reward
    over ``views``, over ``tags`` if asked for, standardized if asked for.

    Attributes:
        reward: what scores.
        weight: λ_clipiqa or λ_iw.
        cap: scores above it are good enough and get no gradient: the released code's relu(2 − r).  Meant for rewards
            without an upper bound, such as ImageReward; for one that never reaches its cap it changes nothing.
        steps: the inclusive sampling steps ``[first, last]`` at which the term counts; None for all of the reward
            window.
        views: what the reward is shown of every image: "1" the image, "0.5" the image at half its size (any factor up
            to 1, antialiased), "crop-256" a random square crop of that side; the same may stand there several times.
        tags: "mean" or "worst" scores an image against each comma-separated part of its prompt; None against the whole.
        normalize: standardize the score by its `RunningStatistics`.
        offload: keep the reward where it is, on the CPU, except while it scores.

    Raises:
        ValueError: if one of them is out of range.
    """

    reward: Reward
    weight: float
    cap: float | None = None
    steps: tuple[int, int] | None = None
    views: tuple[str, ...] = ("1",)
    tags: str | None = None
    normalize: bool = False
    offload: bool = False
    statistics: RunningStatistics = field(default_factory=RunningStatistics, init=False, repr=False, compare=False)

    def __post_init__(self):
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be a finite number, got {self.weight}")
        if self.cap is not None and not math.isfinite(self.cap):
            raise ValueError(f"cap must be a finite number or None, got {self.cap}")
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps must be [first, last] with 1 <= first <= last, got {list(self.steps)}")
        if self.tags not in (None, "mean", "worst"):
            raise ValueError(f"tags must be mean or worst, got {self.tags!r}")
        if not self.views:
            raise ValueError("views must name at least one view, got none")
        for view in self.views:
            _parse_view(view)

    def acts_at(self, step: int | None) -> bool:
        """Whether the term counts at a sampling step; None stands for any."""
        return step is None or self.steps is None or self.steps[0] <= step <= self.steps[1]

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Have the reward on ``device`` for as long as the block lasts, if it is off-loaded at all."""
        return on_device([self.reward] if self.offload else [], device)

    def measure(self, images: Tensor, prompts: list[str]) -> Tensor:
        """What the reward itself says of images, ``[N]``: without views, tags or statistics, for tables."""
        with self.on(images.device):
            return self.reward.score(images, prompts)

    def score(self, images: Tensor, prompts: list[str], generator=None) -> Tensor:
        """The score training sees, before standardization, ``[N]`` in single precision at least.

        Raises:
            ValueError: if the reward does not give one score per image, or a crop does not fit into the images.
        """
        seen = [self._score_tags(_view(view, images, generator), prompts) for view in self.views]
        return torch.stack(seen).mean(0)

    def _score_tags(self, images: Tensor, prompts: list[str]) -> Tensor:
        if self.tags is None:
            return self._score(images, prompts)
        tags = [[tag.strip() for tag in prompt.split(",") if tag.strip()] or [""] for prompt in prompts]
        owner = torch.tensor([i for i, own in enumerate(tags) for _ in own], device=images.device)
        scores = self._score(images[owner], [tag for own in tags for tag in own])
        parts = scores.split([len(own) for own in tags])
        return torch.stack([part.mean() if self.tags == "mean" else part.min() for part in parts])

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        score = self.reward.score(images, prompts)
        if score.shape != images.shape[:1]:
            raise ValueError(
                f"reward {self.reward.name!r} must return one score per image, shape [{images.shape[0]}], "
                f"got {list(score.shape)}"
            )
        return score.to(torch.promote_types(score.dtype, torch.float32))

    def loss(self, scores: Tensor) -> Tensor:
        """The unweighted loss of a batch of (standardized) scores: mean(−r) or mean(relu(cap − r))."""
        return (-scores if self.cap is None else F.relu(self.cap - scores)).mean()


def check_rewards(rewards: Sequence[WeightedReward], window: tuple[int, int] | None) -> None:
    """Refuse terms that cannot train by gradient in a reward window.

    Raises:
        ValueError: if a reward has no gradient, two have one name, or a term's steps lie outside the window.
    """
    names = [term.reward.name for term in rewards]
    for term in rewards:
        name = term.reward.name
        if not term.reward.differentiable:
            raise ValueError(_no_gradient(name))
        if names.count(name) > 1:
            raise ValueError(f"rewards must have different names, got {name!r} {names.count(name)} times")
        if window and term.steps and (term.steps[1] < window[0] or term.steps[0] > window[1]):
            raise ValueError(
                f"steps of reward {name!r} must overlap the reward window {list(window)}, got {list(term.steps)}"
            )


def reward_loss(
    rewards: Sequence[WeightedReward],
    images: Tensor,
    prompts: list[str],
    step: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    balance: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_reward = Σ λ_k · loss_k, eq. 5, and the detached ``[N]`` scores by name.

    Rewards are evaluated one after the other: each is scored, differentiated down to the images, and its graph and (if
    off-loaded) its weights are gone before the next begins.  The loss then carries the summed image gradient on, so the
    peak memory is that of the largest reward and not of all, and the gradient of whatever made the images is the same.
    The loss can be differentiated once.

    Args:
        rewards: what to weigh.
        images: ``[N, 3, H, W]``, already clamped to [0, 1].
        prompts: N prompts.
        step: the sampling step; terms whose ``steps`` exclude it are left out.
        generator: places random crops: one, a list of N, or None for PyTorch's global one.
        balance: scale the terms so that the image gradients of all unweighted losses have the same norm, their mean;
            the weights then are the shares of the rewards in the update.

    Raises:
        ValueError: if a reward has no gradient with respect to the images, or see `WeightedReward.score`.
    """
    differentiate = torch.is_grad_enabled() and images.requires_grad
    terms = [term for term in rewards if term.acts_at(step)]
    losses, gradients, scores = [], [], {}
    for term in terms:
        leaf = images.detach().requires_grad_(differentiate)
        with term.on(images.device):
            score = term.score(leaf, prompts, generator)
            scores[term.reward.name] = score.detach()
            if term.normalize:
                if differentiate:  # looking at a loss does not train, so it must not move the statistics either
                    term.statistics.update(score.detach())
                score = term.statistics(score)
            loss = term.loss(score)
            losses.append(loss.detach())
            if differentiate:
                gradients.append(_gradient(loss, leaf, term.reward.name))
    factors = _balance(gradients) if balance else [1.0] * len(terms)
    weights = [term.weight * factor for term, factor in zip(terms, factors, strict=True)]
    total = images.new_zeros((), dtype=torch.promote_types(images.dtype, torch.float32))
    total = total + sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    if differentiate:
        gradient = torch.zeros_like(images, dtype=total.dtype)
        for weight, part in zip(weights, gradients, strict=True):
            gradient += weight * part
        total = total + ((images - images.detach()) * gradient).sum()  # adds zero, and has this gradient
    return total, scores


def _gradient(loss: Tensor, images: Tensor, name: str) -> Tensor:
    found = None
    if loss.requires_grad:
        with torch.autocast(images.device.type, enabled=False):  # as a backward pass outside of it would be
            (found,) = torch.autograd.grad(loss, images, allow_unused=True)
    if found is None:
        raise ValueError(_no_gradient(name))
    return found


def _no_gradient(name: str) -> str:
    return (
        f"reward {name!r} has no gradient with respect to the images, so training by gradient cannot use it; "
        f"leave it to a preference trainer, which only compares scores"
    )


def _balance(gradients: list[Tensor]) -> list[float]:
    norms = [math.sqrt(_over_processes(gradient.double().square().sum())) for gradient in gradients]
    acting = [norm for norm in norms if norm > 0]  # a capped reward may have none
    return [sum(acting) / len(acting) / norm if norm > 0 else 1.0 for norm in norms]


def _over_processes(value: Tensor) -> Tensor:
    """The mean over all processes of a distributed run, so that each of them does what a single one would."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def _parse_view(view: str) -> float | int:
    """A factor in (0, 1] as a float, or the side of a crop as an int."""
    if crop := re.fullmatch(r"crop-([1-9]\d*)", view):
        return int(crop[1])
    with contextlib.suppress(ValueError):
        if 0 < float(view) <= 1:
            return float(view)
    raise ValueError(f"views must be factors up to 1, such as 0.5, or crops, such as crop-256, got {view!r}")


def _view(view: str, images: Tensor, generator) -> Tensor:
    what = _parse_view(view)
    if isinstance(what, int):
        return _random_crops(images, what, generator)
    if what == 1:
        return images
    size = [max(1, round(what * n)) for n in images.shape[-2:]]
    exact = images.to(torch.promote_types(images.dtype, torch.float32))  # PyTorch's CPU kernel knows no half types
    return F.interpolate(exact, size, mode="bilinear", antialias=True).to(images.dtype)


def _random_crops(images: Tensor, side: int, generator) -> Tensor:
    height, width = images.shape[-2:]
    if side > min(height, width):
        raise ValueError(f"views: crop-{side} does not fit into images of {height} x {width} pixels")
    generators = generator if isinstance(generator, list) else [generator] * len(images)
    crops = []
    for image, own in zip(images, generators, strict=True):
        device = "cpu" if own is None else own.device
        top, left = (int(torch.randint(n - side + 1, (), generator=own, device=device)) for n in (height, width))
        crops.append(image[:, top : top + side, left : left + side])
    return torch.stack(crops)
