"""Color corrections of a result against the image it was made from."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["COLOR_FIXES", "adain_color_fix", "wavelet_color_fix"]


def adain_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """Give each channel of ``image`` the mean and spread of ``reference``, both ``[N, 3, H, W]`` (SeeSR)."""
    (mean, std), (wanted_mean, wanted_std) = (
        (x.mean(dim=(2, 3), keepdim=True), (x.var(dim=(2, 3), keepdim=True, correction=0) + 1e-5).sqrt())
        for x in (image, reference)
    )
    return (image - mean) / std * wanted_std + wanted_mean


def _low_frequencies(image: Tensor, levels: int = 5) -> Tensor:
    """À-trous approximation: binomial 3×3 blurs with holes of 1, 2, 4 … pixels, together a Gaussian of σ ≈ 13."""
    row = image.new_tensor([[0.25, 0.5, 0.25]]).repeat(image.shape[1], 1, 1, 1)
    for radius in (2**level for level in range(levels)):
        image = F.pad(image, (radius,) * 4, mode="replicate")
        image = F.conv2d(image, row, dilation=radius, groups=image.shape[1])
        image = F.conv2d(image, row.mT, dilation=radius, groups=image.shape[1])
    return image


def wavelet_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """Replace the low frequencies of ``image`` by those of ``reference``, both ``[N, 3, H, W]`` (StableSR)."""
    return image + _low_frequencies(reference - image)


COLOR_FIXES = {"wavelet": wavelet_color_fix, "adain": adain_color_fix, None: lambda image, reference: image}
