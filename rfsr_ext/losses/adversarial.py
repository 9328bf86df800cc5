"""Adversarial losses of an image decoder: two discriminators, the hinge losses and the adaptive weight.

CCSR (arXiv 2401.00877) fine-tunes a VAE's decoder with them: version 1 as VQGAN does (arXiv 2012.09841), with a
PatchGAN; version 2 with the projected discriminator of StyleGAN-T (arXiv 2301.09515) over features of DINO.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "DINODiscriminator",
    "PatchDiscriminator",
    "adaptive_weight",
    "class_token",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_TAPS = (0, 3, 6, 9, 12)  # hidden states: the embedded patches, then the outputs of blocks 2, 5, 8 and 11
_TRANSLATION, _CUTOUT, _CROP = 0.125, 0.2, 0.5  # of DiffAugment, shares of a side; how often an image is cropped


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½ (mean max(0, 1 − D(x)) + mean max(0, 1 + D(G(z)))), over logits of any shape (Lim and Ye, 2017)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """−mean D(G(z))."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    maximum: float = 1e4,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """λ = min(‖∇_w L_rec‖ / (‖∇_w L_adv‖ + 10⁻⁴), maximum), a number without gradient (VQGAN, eq. 7).

    Args:
        reconstruction, adversarial: scalar losses of one batch, both with a graph to ``last_layer``, which is kept.
        last_layer: w, the weight of the generator's last layer.
        maximum: where the adversarial gradient vanishes.
        average: takes a gradient to its mean over processes, so that several weigh as one does.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append((gradient if average is None else average(gradient)).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, maximum).detach()


# -- PatchGAN ---------------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv 1611.07004): one logit for each overlapping patch, of 70² pixels with 3 layers.

    Convolutions of 4² pixels: ``layers`` of stride 2 from ``channels`` on, doubled up to 8 times; one of stride 1; one
    to a single channel. An image ``[N, 3, H, W]`` in [−1, 1] becomes ``[N, 1, h, w]``, with 3 layers h = ⌊H / 8⌋ − 2.
    Weights begin as N(0, 0.02²), those of norms as N(1, 0.02²).

    Args:
        channels: of the first layer.
        layers: of stride 2.
        norm: "batch", as published, whose logits depend on what else is in the batch; or "group", one group, which an
            image has to itself: a batch then may be cut over processes.
        seed: of the weights.

    Raises:
        ValueError: if ``norm`` is neither.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "batch", seed: int = 0):
        super().__init__()
        # without running statistics, which nobody would read: it is only ever used in training
        norms: dict[str, Callable[[int], nn.Module]] = {
            "batch": lambda width: nn.BatchNorm2d(width, track_running_stats=False),
            "group": lambda width: nn.GroupNorm(1, width),
        }
        if norm not in norms:
            raise ValueError(f"norm must be batch or group, got {norm!r}")
        modules: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            before, width = width, channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            modules += [nn.Conv2d(before, width, 4, stride, 1, bias=False), norms[norm](width), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, 1, 1))
        generator = torch.Generator().manual_seed(seed)
        for module in self.main:
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.normal_(module.weight, 1.0, 0.02, generator=generator)
            elif isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, images: Tensor, condition: Tensor | None = None, generator: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        return self.main(images)


# -- DINO -------------------------------------------------------------------------------------------------------------


class _SpectralNorm(nn.Module):
    """W / σ(W), σ the largest singular value, by power iteration from one fixed vector.

    torch's own carries its vectors from step to step, in buffers that change in the forward pass; a checkpoint of the
    parameters then would not resume to the same bits.
    """

    start: Tensor

    def __init__(self, rows: int, generator: torch.Generator, iterations: int = 10):
        super().__init__()
        self.iterations = iterations
        self.register_buffer("start", torch.randn(rows, generator=generator), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        with torch.no_grad():
            left = F.normalize(self.start.to(matrix.dtype), dim=0)
            for _ in range(self.iterations):
                right = F.normalize(matrix.mT @ left, dim=0)
                left = F.normalize(matrix @ right, dim=0)
        return weight / (left @ matrix @ right)


class _Head(nn.Module):
    """One logit for each token of ``[N, C, P]``: a convolution of one token, a residual one of nine, and the last."""

    def __init__(self, channels: int, condition_width: int, seed: int, width: int = 64):
        super().__init__()
        self.width = width if condition_width else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = self._block(channels, 1)
            self.second = self._block(channels, 9)
            self.last = nn.Conv1d(channels, self.width, 1)
            self.condition = nn.Linear(condition_width, width) if condition_width else None
        if self.condition is not None:
            nn.init.normal_(self.condition.weight, 0.0, condition_width**-0.5, torch.Generator().manual_seed(seed))
            nn.init.zeros_(self.condition.bias)
        generator = torch.Generator().manual_seed(seed)
        for conv, rows in ((self.first[0], channels), (self.second[0], channels), (self.last, self.width)):
            parametrize.register_parametrization(conv, "weight", _SpectralNorm(rows, generator))

    @staticmethod
    def _block(channels: int, kernel: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular"),
            nn.GroupNorm(4, channels),
            nn.LeakyReLU(0.2),
        )

    def forward(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        hidden = self.first(tokens)
        hidden = (hidden + self.second(hidden)) / math.sqrt(2)
        logits = self.last(hidden)
        if self.condition is None:
            return logits[:, 0]
        return (logits * self.condition(condition)[..., None]).sum(1) / math.sqrt(self.width)


class DINODiscriminator(nn.Module):
    """Heads over frozen features of DINO (Sauer et al., StyleGAN-T, arXiv 2301.09515, as CCSR v2 uses it).

    An image ``[N, 3, H, W]`` in [−1, 1] is moved by up to an eighth and loses a square of a fifth of its side
    (DiffAugment, arXiv 2006.10738), is cropped to the network's size (224²) half of the times where it is larger, or
    else averaged to that size. Of each tapped layer every patch token, with the class token added, gets a logit from a
    head with spectral norms: ``[N, 5·P]`` for five taps and P patches. Gradients reach the images through DINO, whose
    weights stay.

    Args:
        vit: transformers' `ViTModel` (DINO) or `Dinov2Model`: images to ``hidden_states`` ``[N, 1 + P, C]``.
        condition_width: of what the heads are told of the LR image, see `class_token`; 0 for nothing.
        taps: which hidden states; those of StyleGAN-T by default, as far as the network has them.
        seed: of the heads.

    Raises:
        ValueError: if the features cannot be normalized in four groups.
    """

    def __init__(self, vit: Any, condition_width: int = 0, taps: Sequence[int] | None = None, seed: int = 0):
        super().__init__()
        width, depth = vit.config.hidden_size, vit.config.num_hidden_layers
        if width % 4:
            raise ValueError(f"hidden_size of the DINO network must be a multiple of 4, got {width}")
        self.vit, self.size = vit.requires_grad_(False).eval(), vit.config.image_size
        self.taps = [tap for tap in _TAPS if tap <= depth] if taps is None else list(taps)
        self.heads = nn.ModuleList(_Head(width, condition_width, seed + i) for i in range(len(self.taps)))

    def forward(
        self, images: Tensor, condition: Tensor | None = None, generator: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """``condition`` ``[N, condition_width]``; ``generator``, one per image, draws its changes, none without."""
        if generator is None:
            views = [_resized(image[None], self.size) for image in images]
        else:
            views = [_changed(image[None], self.size, g) for image, g in zip(images, generator, strict=True)]
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        pixels = (torch.cat(views) / 2 + 0.5 - mean) / std
        states = self.vit(pixels, output_hidden_states=True).hidden_states
        tokens = [(states[tap][:, 1:] + states[tap][:, :1]).mT for tap in self.taps]
        return torch.cat([head(x, condition) for head, x in zip(self.heads, tokens, strict=True)], dim=1)


def _resized(image: Tensor, side: int) -> Tensor:
    return F.interpolate(image, (side, side), mode="area")


def _changed(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """One image ``[1, 3, H, W]``, moved and cut out, then cropped or resized to ``side``."""
    height, width = image.shape[-2:]
    down, right, top, left, crops, row, column = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
    far = [int(n * _TRANSLATION + 0.5) for n in (height, width)]
    padded = F.pad(image, (far[1], far[1], far[0], far[0]))
    y, x = (int(share * (2 * n + 1)) for share, n in zip((down, right), far, strict=True))
    image = padded[..., y : y + height, x : x + width]
    size = [int(n * _CUTOUT + 0.5) for n in (height, width)]
    y, x = (int(share * (n + 1)) - k // 2 for share, n, k in zip((top, left), (height, width), size, strict=True))
    kept = torch.ones_like(image[:, :1])
    kept[..., max(y, 0) : y + size[0], max(x, 0) : x + size[1]] = 0
    image = image * kept
    if min(height, width) > side and crops < _CROP:
        y, x = (int(share * (n - side + 1)) for share, n in zip((row, column), (height, width), strict=True))
        return image[..., y : y + side, x : x + side]
    return _resized(image, side)


@torch.no_grad()
def class_token(vit: Any, images: Tensor) -> Tensor:
    """What DINOv2 says of whole images ``[N, 3, H, W]`` in [0, 1]: its normalized class token ``[N, C]``.

    As in CCSR v2's code they are resized to its size (518²) and not normalized by ImageNet's mean and deviation.
    """
    pixels = F.interpolate(images, (vit.config.image_size,) * 2, mode="bilinear")
    return vit(pixels).last_hidden_state[:, 0]
