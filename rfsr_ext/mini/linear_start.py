"""Starts from linear maps: weights with which diffusers' classes compute what a small linear network has learned.

From random weights half an hour of a processor core brings the small autoencoder to 30 dB on held-out photographs, and
the denoiser after as long is still less near the truth than bicubic enlargement.  *Linear* networks of the same strides
are better than both after a minute or two: the autoencoder reaches 37 dB, and the best linear filter of a noisy LR
image is a little nearer to the truth than its enlargement.  So the linear networks are trained first and laid into the
stock classes, which then learn the rest.  Three things in these are not linear:

* residual branches: their last convolution starts at zero;
* group normalization: one channel of every group holds a large constant, which alone decides mean and deviation; the
  affine part of the normalization then undoes both;
* SiLU: silu(x) − silu(−x) = x, so that every value is there with both signs, before a normalization in one group,
  whose mean they then leave alone.

Channels that the linear map leaves free start at random, for the other layers to work with.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

__all__ = ["LinearAutoencoder", "LinearEstimator", "load_linear_estimate", "load_linear_map"]

_CONSTANT = 30.0  # of one channel in every group; the others are about 1


def _bias(conv: nn.Conv2d) -> Tensor:
    return cast("Tensor", conv.bias)  # every convolution here has one


def _convolutions(layers: nn.ModuleList) -> list[nn.Conv2d]:
    return cast("list[nn.Conv2d]", list(layers))


def _without_bias(layers: Iterable[nn.Conv2d]) -> nn.ModuleList:
    modules = nn.ModuleList(layers)
    for layer in _convolutions(modules):
        nn.init.zeros_(_bias(layer))
    return modules


class LinearAutoencoder(nn.Module):
    """Convolutions without activation, with the strides and paddings of an `AutoencoderKL` of three blocks."""

    def __init__(self, latent_channels: int):
        super().__init__()
        c = latent_channels
        self.encoder = _without_bias(
            [
                nn.Conv2d(3, 12, 3, padding=1),
                nn.Conv2d(12, 24, 3, stride=2),
                nn.Conv2d(24, c, 3, stride=2),
                nn.Conv2d(c, c, 3, padding=1),
            ]
        )
        self.decoder = _without_bias(nn.Conv2d(a, b, 3, padding=1) for a, b in ((c, 48), (48, 36), (36, 12), (12, 3)))

    def encode(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, C, H/4, W/4]``."""
        first, *downsampling, last = self.encoder
        x = first(images)
        for layer in downsampling:
            x = layer(F.pad(x, (0, 1, 0, 1)))
        return last(x)

    def decode(self, latents: Tensor) -> Tensor:
        """The way back."""
        first, *upsampling, last = self.decoder
        x = first(latents)
        for layer in upsampling:
            x = layer(F.interpolate(x, scale_factor=2.0))
        return last(x)


class LinearEstimator(nn.Module):
    """Enlarged LR images to latents, with the strides of a ControlNet's embedding of its condition, and one layer more.

    Args:
        latent_channels: of the result.
        widths: half of the embedding's.
        features: what the embedding gives, and the last layer takes.
    """

    def __init__(self, latent_channels: int, widths: tuple[int, int, int], features: int = 16):
        super().__init__()
        a, b, c = widths
        shapes = ((3, a), (a, a), (a, b), (b, b), (b, c), (c, features), (features, latent_channels))
        strides = (1, 1, 2, 1, 2, 1, 1)
        self.layers = _without_bias(
            nn.Conv2d(before, after, 3, stride, padding=1)
            for (before, after), stride in zip(shapes, strides, strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1] to ``[N, C, H/4, W/4]``."""
        for layer in self.layers:
            images = layer(images)
        return images


def _constants(width: int, groups: int) -> list[int]:
    return list(range(0, width, width // groups))


def _channels(width: int, groups: int, count: int) -> list[int]:
    """The first channels that hold no constant."""
    return [channel for channel in range(width) if channel % (width // groups)][:count]


def _pairs(width: int, groups: int, count: int) -> tuple[list[int], list[int]]:
    """So many pairs of neighboring channels that hold no constant, the same number in each group."""
    size, each = width // groups, -(-count // groups)
    first = [group * size + 1 + 2 * i for group in range(groups) for i in range(each)][:count]
    return first, [channel + 1 for channel in first]


def _tame(norm: nn.GroupNorm, constants_to: float) -> None:
    """Make a normalization whose groups hold the constant the identity of the other channels."""
    mean = _CONSTANT * norm.num_groups / norm.num_channels
    norm.weight.fill_((_CONSTANT * mean - mean**2 + norm.eps) ** 0.5)
    norm.bias.fill_(mean)
    constants = _constants(norm.num_channels, norm.num_groups)
    norm.weight[constants], norm.bias[constants] = 0.0, constants_to


def _zero(conv: nn.Conv2d) -> None:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(_bias(conv))


def _finish(conv: nn.Conv2d, layer: nn.Conv2d, positive: list[int], negative: list[int]) -> None:
    """Let a convolution behind SiLU compute a linear layer of the pairs."""
    _zero(conv)
    rows = slice(0, layer.out_channels)
    conv.weight[rows, positive], conv.weight[rows, negative] = layer.weight, -layer.weight
    _bias(conv)[rows] = _bias(layer)


@torch.no_grad()
def load_linear_map(vae: AutoencoderKL, linear: LinearAutoencoder) -> None:
    """Give ``vae``, of three blocks and without attention, weights with which it computes nearly ``linear``."""
    groups = vae.encoder.conv_norm_out.num_groups
    for network in (vae.encoder, vae.decoder):
        for module in network.modules():
            if module.__class__.__name__ == "ResnetBlock2D":
                _tame(module.norm1, 1.0)
                _zero(module.conv2)
        _tame(network.conv_norm_out, 0.0)

    def lay(conv: nn.Conv2d, weight: Tensor, bias: Tensor, source: list[int]) -> list[int]:
        """Put one linear layer into a convolution that reads these channels; the channels it writes."""
        target, constants = _channels(conv.out_channels, groups, len(weight)), _constants(conv.out_channels, groups)
        conv.weight.mul_(0.3)
        conv.weight[[*target, *constants]] = 0.0
        if source[0]:  # inner channels, constants among them
            conv.weight[:, _constants(conv.in_channels, groups)] = 0.0
        for row, channel in enumerate(target):
            conv.weight[channel, source] = weight[row]
        _bias(conv)[target], _bias(conv)[constants] = bias, _CONSTANT
        return target

    def passed(conv: nn.Conv2d, source: list[int]) -> list[int]:
        return lay(conv, torch.eye(len(source))[:, :, None, None], torch.zeros(len(source)), source)

    def passed_in_pairs(conv: nn.Conv2d, source: list[int]) -> tuple[list[int], list[int]]:
        _zero(conv)
        pairs = _pairs(conv.out_channels, groups, len(source))
        for sign, channels in zip((1.0, -1.0), pairs, strict=True):
            conv.weight[channels, source] = sign
        _bias(conv)[_constants(conv.out_channels, groups)] = _CONSTANT
        return pairs

    encoder, (e0, e1, e2, e3) = vae.encoder, _convolutions(linear.encoder)
    down = encoder.down_blocks
    x = lay(encoder.conv_in, e0.weight, _bias(e0), [0, 1, 2])
    x = lay(down[0].downsamplers[0].conv, e1.weight, _bias(e1), x)
    x = passed(down[1].resnets[0].conv_shortcut, x)
    x = lay(down[1].downsamplers[0].conv, e2.weight, _bias(e2), x)
    _finish(encoder.conv_out, e3, *passed_in_pairs(down[2].resnets[0].conv_shortcut, x))
    encoder.conv_out.bias[e3.out_channels :] = -8.0  # the log-variance: nearly none

    decoder, (d0, d1, d2, d3) = vae.decoder, _convolutions(linear.decoder)
    up = decoder.up_blocks
    x = lay(decoder.conv_in, d0.weight, _bias(d0), list(range(d0.in_channels)))
    x = lay(up[0].upsamplers[0].conv, d1.weight, _bias(d1), x)
    x = passed(up[1].resnets[0].conv_shortcut, x)
    x = lay(up[1].upsamplers[0].conv, d2.weight, _bias(d2), x)
    _finish(decoder.conv_out, d3, *passed_in_pairs(up[2].resnets[0].conv_shortcut, x))

    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.zeros_(conv.bias)
        conv.weight.copy_(torch.eye(conv.in_channels)[:, :, None, None])


@torch.no_grad()
def load_linear_estimate(unet: UNet2DConditionModel, controlnet: ControlNetModel, linear: LinearEstimator) -> None:
    """Give both weights with which they predict what ``linear`` makes of the condition, whatever the noisy latents.

    The way: the ControlNet's embedding, its first residual, the U-Net's last block, which has that as its skip
    connection, and the output.
    """
    embedding = controlnet.controlnet_cond_embedding
    *inner, to_features, to_latents = _convolutions(linear.layers)
    for place, (conv, layer) in enumerate(zip((embedding.conv_in, *embedding.blocks), inner, strict=True)):
        weight = torch.cat([layer.weight, -layer.weight], dim=1) if place else layer.weight
        conv.weight.copy_(torch.cat([weight, -weight]))
        conv.bias.copy_(torch.cat([_bias(layer), -_bias(layer)]))
    features = to_features.out_channels
    embedding.conv_out.weight[:features] = torch.cat([to_features.weight, -to_features.weight], dim=1)
    embedding.conv_out.bias[:features] = _bias(to_features)
    residual = controlnet.controlnet_down_blocks[0]
    for conv in (controlnet.conv_in, unet.conv_in, residual):  # nothing is added to the features
        conv.weight[:features], conv.bias[:features] = 0.0, 0.0
    residual.weight[:features, :features, 0, 0] = torch.eye(features)

    last, norm = unet.up_blocks[-1].resnets[-1], unet.conv_norm_out
    _zero(last.conv2)
    _tame(norm, 0.0)
    positive, negative = _pairs(norm.num_channels, norm.num_groups, features)
    constants, shortcut = _constants(norm.num_channels, norm.num_groups), last.conv_shortcut
    written = [*positive, *negative, *constants]
    shortcut.weight.mul_(0.1)
    shortcut.bias.mul_(0.1)
    shortcut.weight[written], shortcut.bias[written] = 0.0, 0.0
    skip = shortcut.in_channels - norm.num_channels
    for sign, channels in ((1.0, positive), (-1.0, negative)):
        shortcut.weight[channels, list(range(skip, skip + features))] = sign
    shortcut.bias[constants] = _CONSTANT
    _finish(unet.conv_out, to_latents, positive, negative)
