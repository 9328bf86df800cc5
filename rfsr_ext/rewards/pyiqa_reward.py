"""Metrics of pyiqa as rewards."""

import functools

import torch
from torch import Tensor, nn

from rfsr_ext.rewards.base import Reward
from rfsr_ext.weights.pyiqa import create_metric, metric_settings

__all__ = ["PyIQAReward"]


class PyIQAReward(Reward):
    """Any no-reference metric of pyiqa, through its ``as_loss`` mode, which keeps the gradient if there is one.

    Runs in single precision whatever the images are and ``.to`` says; only the device follows it.  Metrics for which
    lower is better get the opposite sign.

    Args:
        metric: its name in ``pyiqa.list_models()``.
        options: for ``pyiqa.create_metric``.

    Raises:
        ModuleNotFoundError: without pyiqa.
        FileNotFoundError: if its weights are not on disk.
        ValueError: if there is no such metric, it compares with a reference image, which rewards do not have, or its
            file is a wrong one.
    """

    def __init__(self, metric: str, **options):
        super().__init__()
        if metric_settings(metric).get("metric_mode", "NR") != "NR":
            raise ValueError(f"metric must judge an image without a reference, got {metric!r}, which compares with one")
        self.name = f"pyiqa:{metric}"
        options = {"as_loss": True, "loss_reduction": "none", "device": "cpu"} | options
        self.metric = create_metric(metric, **options)
        # pyiqa hides CLIP in lists, where neither .to nor requires_grad_ would find it
        hidden = [value for value in vars(self.metric.net).values() if isinstance(value, list)]
        self.hidden = nn.ModuleList(part for parts in hidden for part in parts if isinstance(part, nn.Module))
        self.requires_grad_(False).eval()
        self.sign = -1 if self.metric.lower_better else 1

    @functools.cached_property
    def differentiable(self) -> bool:
        """Whether noise of 256 pixels gets a gradient that is not zero all over: PIQE's rounding, for one, gives zeros.

        Found out when first asked, as the gradient trainer does before it starts.
        """
        images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.enable_grad():
            score = self.score(images).sum()
        (gradient,) = torch.autograd.grad(score, images, allow_unused=True) if score.requires_grad else (None,)
        return gradient is not None and bool(gradient.any())

    def _apply(self, fn, recurse: bool = True):
        """Moves, but keeps its precision, the only one that pyiqa's metrics are made for."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def score(self, images: Tensor, prompts: list[str] | None = None) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.sign * self.metric(images.float()).float().reshape(len(images))  # NIQE answers in double
