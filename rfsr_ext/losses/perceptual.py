"""A perceptual distance that needs no published weights of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfsr_ext.losses.gram import LAYERS, VGG19Features

__all__ = ["VGGFeatureLoss"]


class VGGFeatureLoss(nn.Module):
    """Σ_l mean_{n,y,x} ‖f̂_l(pred) − f̂_l(target)‖², f̂_l the features of layer l at one place, of length 1.

    It is LPIPS (Zhang et al., arXiv 1801.03924, eq. 1) over VGG19 with every channel's weight 1, where LPIPS has
    learned ones.  Images are ``[N, 3, H, W]`` in [0, 1]; gradients reach ``pred`` alone where ``target`` asks for none.

    Args:
        weights: "imagenet", or "random", a stand-in that needs no file.
        layers: of VGG19, before their ReLU, which is applied here as LPIPS does.
    """

    def __init__(self, weights: str = "random", layers: Sequence[str] = tuple(LAYERS)):
        super().__init__()
        self.vgg = VGG19Features(layers, weights)

    @property
    def label(self) -> str:
        """The name shown to people: it says so if the network is a random one."""
        return f"VGG19 feature distance{'' if self.vgg.weights == 'imagenet' else ' (random VGG19, a stand-in)'}"

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return self.distances(pred, target).mean()

    def distances(self, pred: Tensor, target: Tensor) -> Tensor:
        """One number per image, ``[N]``."""
        pairs = zip(self.vgg(pred), self.vgg(target), strict=True)
        units = ([F.normalize(F.relu(x), dim=1) for x in pair] for pair in pairs)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in units]).sum(0)
