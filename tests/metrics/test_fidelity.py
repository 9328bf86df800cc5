import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from rfsr_ext.data import evaluation_crops
from rfsr_ext.metrics import band_ssim, psnr, ssim


@pytest.fixture(scope="module")
def pair():
    gt = torch.stack([sample["gt"] for sample in evaluation_crops(["coffee", "chelsea"], 64, 4)])
    noise = 0.05 * torch.randn(gt.shape, generator=torch.Generator().manual_seed(0))
    return (gt + noise).clamp(0, 1), gt


def haar(x):
    """The four bands of the orthonormal Haar transform, by hand: low, then the three others."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2, ((a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2)


def reference_ssim(a, b, data_range):
    """Wang et al. through scikit-image, one channel of one image at a time."""
    options = {"data_range": data_range, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return torch.tensor([
        np.mean([structural_similarity(x.double().numpy(), y.double().numpy(), **options)
                 for x, y in zip(*channels, strict=True)])
        for channels in zip(a, b, strict=True)
    ]).float()  # fmt: skip


def test_psnr(pair):
    expected = [peak_signal_noise_ratio(gt.numpy(), sr.numpy(), data_range=1) for sr, gt in zip(*pair, strict=True)]
    torch.testing.assert_close(psnr(*pair), torch.tensor(expected).float(), rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.floats(0.01, 0.9))
def test_psnr_of_a_constant_error(error):
    gt = torch.zeros(1, 3, 4, 4)
    assert psnr(gt + error, gt).item() == pytest.approx(-20 * math.log10(error), rel=1e-4, abs=1e-4)


def test_ssim(pair):
    torch.testing.assert_close(ssim(*pair), reference_ssim(*pair, data_range=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("crop", [0, 5])
def test_luma_and_border_are_scikit_images(pair, crop):
    from skimage.color import rgb2ycbcr

    inside = slice(crop, 64 - crop)
    lumas = [[rgb2ycbcr(image.permute(1, 2, 0).double().numpy())[inside, inside, 0] for image in x] for x in pair]
    for sr, gt, p, s in zip(*lumas, psnr(*pair, "y", crop), ssim(*pair, "y", crop), strict=True):
        assert p.item() == pytest.approx(peak_signal_noise_ratio(gt, sr, data_range=255), abs=1e-4)
        options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        assert s.item() == pytest.approx(structural_similarity(sr, gt, **options), abs=1e-5)


def test_border_is_left_out(pair):
    gt = pair[1]
    framed = gt.clone()
    framed[..., :3, :] = framed[..., -3:] = 0
    assert psnr(framed, gt, crop=3).isinf().all() and psnr(framed, gt, crop=2).isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"channel": "luma"}, "channel must be 'rgb' or 'y', got 'luma'"),
        ({"crop": -1}, "crop must be at least 0, got -1"),
        ({"crop": 27}, "sr must be at least 65 pixels high and wide if 27 are left out along every border, got 64x64"),
    ],
)
def test_rejects_options(pair, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ssim(*pair, **options)


def test_band_ssim(pair):
    (low_sr, high_sr), (low_gt, high_gt) = map(haar, pair)
    low, high = band_ssim(*pair)
    torch.testing.assert_close(low, reference_ssim(low_sr, low_gt, 2), rtol=1e-5, atol=1e-5)
    expected = torch.stack([reference_ssim(a, b, 2) for a, b in zip(high_sr, high_gt, strict=True)]).mean(0)
    torch.testing.assert_close(high, expected, rtol=1e-5, atol=1e-5)


def test_equal_images(pair):
    gt = pair[1]
    assert psnr(gt, gt).isinf().all()
    for value in (ssim(gt, gt), *band_ssim(gt, gt)):
        torch.testing.assert_close(value, torch.ones(4))


def test_bands_are_told_apart(pair):
    """A checkerboard lives in the high bands alone, a slow change of brightness nearly in the low band alone."""
    gt = pair[1] * 0.5 + 0.25
    sign = 1 - 2 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2)
    low, high = band_ssim(gt + 0.1 * sign, gt)
    torch.testing.assert_close(low, torch.ones(4))
    assert high.max() < 0.9
    slope = 0.2 * torch.linspace(-1, 1, 64).sin() * torch.ones(64, 1)
    low, high = band_ssim(gt + slope, gt)
    assert high.min() > 0.97 > 0.95 > low.max()


@settings(deadline=None, max_examples=20)
@given(st.integers(21, 40), st.integers(21, 40), st.integers(1, 3))
def test_any_size(height, width, n):
    sr, gt = torch.rand(n, 3, height, width), torch.rand(n, 3, height, width)
    for value in (psnr(sr, gt), ssim(sr, gt), *band_ssim(sr, gt)):
        assert value.shape == (n,) and value.dtype == torch.float32 and value.isfinite().all()
    assert ssim(sr, gt).max() <= 1


def test_values_outside_are_clamped(pair):
    sr, gt = pair
    wild = torch.where(sr > 0.7, sr + 3, sr)
    for metric in (psnr, ssim, lambda a, b: band_ssim(a, b)[0], lambda a, b: band_ssim(a, b)[1]):
        torch.testing.assert_close(metric(wild, gt), metric(wild.clamp(0, 1), gt))


def test_worse_is_lower(pair):
    gt = pair[1]
    blurs = [F.interpolate(F.avg_pool2d(gt, k), scale_factor=k, mode="bicubic").clamp(0, 1) for k in (2, 4, 8)]
    for metric in (psnr, ssim, lambda a, b: band_ssim(a, b)[0]):
        values = torch.stack([metric(blur, gt).mean() for blur in blurs])
        assert (values.diff() < 0).all()


def test_gradients_do_no_harm(pair):
    assert not psnr(pair[0].clone().requires_grad_(), pair[1]).requires_grad


@pytest.mark.parametrize("metric", [psnr, ssim, band_ssim])
def test_rejects(metric):
    with pytest.raises(ValueError, match=r"sr must have shape \[N, 3, H, W\], got \[3, 32, 32\]"):
        metric(torch.rand(3, 32, 32), torch.rand(3, 32, 32))
    with pytest.raises(ValueError, match=r"gt must have the shape of sr \[1, 3, 32, 32\], got \[1, 3, 32, 30\]"):
        metric(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 30))


@pytest.mark.parametrize(("metric", "least"), [(ssim, 11), (band_ssim, 21)])
def test_too_small(metric, least):
    small = torch.rand(1, 3, 30, least - 1)
    with pytest.raises(ValueError, match=f"sr must be at least {least} pixels high and wide, got 30x{least - 1}"):
        metric(small, small)
