"""Color corrections of a result against the image it was made from, band by band: both may be large."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["COLOR_FIXES", "adain_color_fix", "wavelet_color_fix"]

_BAND = 256  # rows at once
_LEVELS = 5
_REACH = 2**_LEVELS - 1  # rows above and below that low frequencies depend on


def _bands(height: int) -> Iterator[tuple[int, int]]:
    return ((top, min(top + _BAND, height)) for top in range(0, height, _BAND))


def _statistics(image: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Mean and spread of each channel, ``[N, 3, 1, 1]``."""
    total = square = torch.zeros((), dtype=torch.float64)
    for top, bottom in _bands(height):
        band = image[..., top:bottom, :width].double()
        total = total + band.sum((2, 3), keepdim=True)
        square = square + band.square().sum((2, 3), keepdim=True)
    mean = total / (height * width)
    variance = (square / (height * width) - mean.square()).clamp(min=0)
    return mean.float(), (variance + 1e-5).sqrt().float()


def adain_color_fix(image: Tensor, reference: Tensor, inplace: bool = False) -> Tensor:
    """Give each channel of ``image`` the mean and spread of ``reference``, both ``[N, 3, H, W]`` (SeeSR).

    Args:
        image: to correct.
        reference: may be larger to the right and below; only bands of its rows are asked for.
        inplace: change ``image`` itself, which saves the memory of a second one.
    """
    image = image if inplace else image.clone()
    (mean, std), (wanted_mean, wanted_std) = (_statistics(x, *image.shape[-2:]) for x in (image, reference))
    return image.sub_(mean).mul_(wanted_std / std).add_(wanted_mean)


def _low_frequencies(image: Tensor) -> Tensor:
    """À-trous approximation: binomial 3×3 blurs with holes of 1, 2, 4 … pixels, together a Gaussian of σ ≈ 13."""
    row = image.new_tensor([[0.25, 0.5, 0.25]]).repeat(image.shape[1], 1, 1, 1)
    for radius in (2**level for level in range(_LEVELS)):
        image = F.pad(image, (radius,) * 4, mode="replicate")
        image = F.conv2d(image, row, dilation=radius, groups=image.shape[1])
        image = F.conv2d(image, row.mT, dilation=radius, groups=image.shape[1])
    return image


def wavelet_color_fix(image: Tensor, reference: Tensor, inplace: bool = False) -> Tensor:
    """Replace the low frequencies of ``image`` by those of ``reference``, both ``[N, 3, H, W]`` (StableSR).

    Arguments are those of `adain_color_fix`.
    """
    image = image if inplace else image.clone()
    height, width = image.shape[-2:]
    above = image[..., :0, :]  # rows that are changed already, as they were
    for top, bottom in _bands(height):
        first, last = top - above.shape[-2], min(bottom + _REACH, height)
        band = torch.cat([above, image[..., top:last, :]], dim=-2)
        low = _low_frequencies(reference[..., first:last, :width].float() - band)
        image[..., top:bottom, :] += low[..., top - first : bottom - first, :]
        above = band[..., max(bottom - first - _REACH, 0) : bottom - first, :].clone()
    return image


COLOR_FIXES = {
    "wavelet": wavelet_color_fix,
    "adain": adain_color_fix,
    None: lambda image, reference, inplace=False: image,
}
