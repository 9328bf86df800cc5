"""Full-reference fidelity: PSNR, SSIM and the band SSIM of the paper's Figure 1, one number per image."""

import numpy as np
import pywt
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

__all__ = ["band_ssim", "psnr", "ssim"]

_WINDOW = 11  # pixels: the Gaussian of standard deviation 1.5 that Wang et al. (2004) use
_BAND_RANGE = 2.0


def check_floating(images: Tensor, name: str) -> None:
    """Refuse 8-bit images: clamped to [0, 1] they would be black and white, and measured all the same.

    Raises:
        TypeError: as said.
    """
    if not images.is_floating_point():
        raise TypeError(f"{name} must be floating point in [0, 1], got {images.dtype}; divide 8-bit images by 255")


def _pair(sr: Tensor, gt: Tensor, smallest: int = 1, channel: str = "rgb", crop: int = 0) -> tuple[Tensor, Tensor]:
    """Check both batches; give them back clamped to [0, 1], cropped, in float64 on the CPU."""
    if channel not in ("rgb", "y"):
        raise ValueError(f"channel must be 'rgb' or 'y', got {channel!r}")
    if crop < 0:
        raise ValueError(f"crop must be at least 0, got {crop}")
    check_floating(sr, "sr")
    check_floating(gt, "gt")
    if sr.ndim != 4 or sr.shape[1] != 3:
        raise ValueError(f"sr must have shape [N, 3, H, W], got {list(sr.shape)}")
    if gt.shape != sr.shape:
        raise ValueError(f"gt must have the shape of sr {list(sr.shape)}, got {list(gt.shape)}")
    least = smallest + 2 * crop
    if min(sr.shape[-2:]) < least:
        left = f" if {crop} are left out along every border" if crop else ""
        raise ValueError(f"sr must be at least {least} pixels high and wide{left}, got {sr.shape[-2]}x{sr.shape[-1]}")
    inside = (..., slice(crop, sr.shape[-2] - crop), slice(crop, sr.shape[-1] - crop))
    a, b = (x.detach().double().cpu().clamp(0, 1)[inside] for x in (sr, gt))
    return (_luma(a), _luma(b)) if channel == "y" else (a, b)


def _luma(images: Tensor) -> Tensor:
    """Y of YCbCr as ITU-R BT.601 and the super-resolution literature have it: 16/255 for black, 235/255 for white."""
    r, g, b = images.unbind(1)
    return ((65.481 * r + 128.553 * g + 24.966 * b + 16) / 255)[:, None]


def psnr(sr: Tensor, gt: Tensor, channel: str = "rgb", crop: int = 0) -> Tensor:
    """Peak signal-to-noise ratio in dB, −10·log₁₀ of the mean squared error over all pixels and channels.

    Args:
        sr, gt: ``[N, 3, H, W]`` in [0, 1]; values outside are clamped, as saving the image would.
        channel: "rgb", or "y" for the luma of YCbCr (ITU-R BT.601), not rounded.
        crop: pixels left out along every border.

    Returns:
        ``[N]`` on the CPU; infinite for equal images.

    Raises:
        TypeError: if images are not floating point.
        ValueError: if a shape or an option is wrong.
    """
    sr, gt = _pair(sr, gt, channel=channel, crop=crop)
    return -10 * (sr - gt).square().mean(dim=(1, 2, 3)).log10().float()


def _ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> Tensor:
    values = [
        structural_similarity(
            a, b, channel_axis=0, data_range=data_range, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(x, y, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float32)


def ssim(sr: Tensor, gt: Tensor, channel: str = "rgb", crop: int = 0) -> Tensor:
    """Structural similarity as Wang et al. (2004) define it, mean over channels (scikit-image underneath).

    Args:
        sr, gt: ``[N, 3, H, W]`` in [0, 1], at least 11 pixels high and wide after ``crop``; values outside are clamped.
        channel, crop: as of `psnr`.

    Returns:
        ``[N]`` on the CPU, at most 1.

    Raises:
        TypeError: if images are not floating point.
        ValueError: if a shape or an option is wrong.
    """
    return _ssim(*(x.numpy() for x in _pair(sr, gt, _WINDOW, channel, crop)), data_range=1.0)


def band_ssim(sr: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM of the low and of the high frequencies, as in the paper's Figure 1.

    Low is the SSIM of the LL band of a one-level orthonormal Haar DWT (PyWavelets underneath), high the mean SSIM of
    the LH, HL and HH bands.  For images in [0, 1] LL lies in [0, 2] and the others in [−1, 1], so ``data_range`` is 2
    for all four: each band's true width, and one constant for all because an orthonormal transform spreads white noise
    evenly.

    Args:
        sr, gt: ``[N, 3, H, W]`` in [0, 1], at least 21 pixels high and wide; values outside are clamped.

    Returns:
        ``(low, high)``, each ``[N]`` on the CPU, at most 1.

    Raises:
        TypeError: if images are not floating point.
        ValueError: if a shape is wrong.
    """
    bands = [pywt.dwt2(x.numpy(), "haar", axes=(-2, -1)) for x in _pair(sr, gt, smallest=2 * _WINDOW - 1)]
    (low_sr, details_sr), (low_gt, details_gt) = bands
    high = [_ssim(a, b, _BAND_RANGE) for a, b in zip(details_sr, details_gt, strict=True)]
    return _ssim(low_sr, low_gt, _BAND_RANGE), torch.stack(high).mean(dim=0)
