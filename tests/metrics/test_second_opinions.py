"""Metrics that pyiqa builds without a file, against code of others or their formula, on distorted photographs.

MS-SSIM, GMSD, entropy, PSNR and SSIM: test_suite.py.  MAD is missing because no second implementation agrees: pyiqa
takes it over every color channel, weighs the statistics of its filters by orientation in place of scale, and keeps the
borders, all unlike the code of its authors.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import convolve, correlate1d, gaussian_filter, uniform_filter

from rfsr_ext.data import evaluation_crops, photographs
from rfsr_ext.metrics import Preset, Suite

pytest.importorskip("pyiqa", reason="pyiqa is not installed (pip install 'rfsr_ext[metrics]')")
PEERS = "the second implementation is not installed (pip install 'rfsr_ext[peers]')"
GRAY = [0.299, 0.587, 0.114]


def eight_bits(images):
    return (images.clamp(0, 1) * 255).round() / 255


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(file, "jpeg", quality=15)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255


@pytest.fixture(scope="module", params=["noise", "blur", "jpeg"])
def pair(request):
    """Two photographs distorted, and as they were."""
    gt = eight_bits(torch.stack([sample["gt"] for sample in evaluation_crops(photographs("test"), 256, 2)]))
    if request.param == "noise":
        sr = gt + 0.05 * torch.randn(gt.shape, generator=torch.Generator().manual_seed(0))
    elif request.param == "blur":
        sr = torch.from_numpy(gaussian_filter(gt.numpy(), (0, 0, 1.5, 1.5)))
    else:
        sr = torch.stack([jpeg(image) for image in gt])
    return eight_bits(sr), gt


def found(name, *images):
    return Suite(Preset("test", (name,)))(*images)[name].numpy()


def gray(image):
    return np.tensordot(GRAY, image.double().numpy(), 1)


def test_fsim_is_piqas(pair):
    piqa = pytest.importorskip("piqa", reason=PEERS)
    np.testing.assert_allclose(found("fsim", *pair), piqa.FSIM(reduction="none")(*pair), atol=1e-4)


def test_vsi_is_piqas_with_a_normalized_saliency(pair):
    """piqa leaves out that Zhang et al. stretch the saliency to [0, 1]; they find it at 256 pixels, as these have."""
    pytest.importorskip("piqa", reason=PEERS)
    from piqa.utils.color import ColorConv
    from piqa.utils.functional import gradient_kernel, scharr_kernel
    from piqa.vsi import sdsp, sdsp_filter, vsi

    def saliency(images):
        values = sdsp(images, sdsp_filter(images))
        low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
        return (values - low) / (high - low)

    opponents = map(ColorConv("RGB", "LMN"), pair)
    second = vsi(*opponents, *map(saliency, pair), kernel=gradient_kernel(scharr_kernel()))
    np.testing.assert_allclose(found("vsi", *pair), second, atol=1e-3)


def test_cw_ssim_on_simoncellis_pyramid(pair):
    """Sampat et al. (2009) on the coarsest of four scales, all eight orientations, weighted towards the middle."""
    pyramids = pytest.importorskip("pyrtools", reason=PEERS).pyramids

    def box(values):
        return uniform_filter(values, 7)[3:-3, 3:-3]

    def second(*images):
        a, b = (
            pyramids.SteerablePyramidFreq(np.round(gray(x) * 255), height=4, order=7, is_complex=True).pyr_coeffs
            for x in images
        )
        values = []
        for orientation in range(8):
            x, y = a[3, orientation], b[3, orientation]
            product = x * y.conj()
            similarity = 2 * np.hypot(box(product.real), box(product.imag)) / box(np.abs(x) ** 2 + np.abs(y) ** 2)
            line = np.arange(len(similarity)) - (len(similarity) - 1) / 2
            weight = np.exp(-(line**2) / (2 * (len(x) / 4) ** 2))
            values.append(weight @ similarity @ weight / weight.sum() ** 2)
        return np.mean(values)

    np.testing.assert_allclose(
        found("cw_ssim", *pair), [second(*images) for images in zip(*pair, strict=True)], atol=1e-6
    )


def test_vif_on_simoncellis_pyramid(pair):
    """Sheikh and Bovik (2006): Gaussian scale mixtures of 3x3 neighbors in two orientations of four scales."""
    pyramids = pytest.importorskip("pyrtools", reason=PEERS).pyramids

    def second(sr, gt):
        bands = [
            pyramids.SteerablePyramidSpace(np.round(gray(x) * 255), height=4, order=5, edge_type="reflect1").pyr_coeffs
            for x in (sr, gt)
        ]
        kept = total = 0.0
        for level, orientation in ((level, orientation) for level in range(4) for orientation in (0, 3)):
            d, r = (band[level, orientation] for band in bands)
            side, window = len(r) // 3, 2 ** (4 - level) + 1
            d, r = d[: side * 3, : side * 3], r[: side * 3, : side * 3]
            covariance = np.cov(np.lib.stride_tricks.sliding_window_view(r, (3, 3)).reshape(-1, 9).T, bias=True)
            blocks = r.reshape(side, 3, side, 3).swapaxes(1, 2).reshape(side, side, 9)
            s = np.einsum("hwi,ij,hwj->hw", blocks, np.linalg.inv(covariance), blocks) / 9

            def mean(values, size=window):
                return uniform_filter(values, size, mode="mirror")[1::3, 1::3]

            variances = (np.maximum(mean(x * x) - mean(x) ** 2, 0) for x in (r, d))
            (of_r, of_d), both = variances, mean(r * d) - mean(r) * mean(d)
            gain = np.maximum(both / (of_r + 1e-12), 0)
            rest = np.maximum(of_d - gain * both, 1e-12)
            edge = -(-(window - 1) // 6)
            gain, rest, s = (x[edge:-edge, edge:-edge, None] for x in (gain, rest, s))
            strength = s * np.linalg.eigvalsh(covariance)
            kept += np.log2(1 + gain**2 * strength / (rest + 0.4)).sum()
            total += np.log2(1 + strength / 0.4).sum()
        return kept / total

    np.testing.assert_allclose(found("vif", *pair), [second(*images) for images in zip(*pair, strict=True)], atol=1e-4)


def test_nlpd_is_its_formula(pair):
    """Laparra et al. (2016): a Laplacian pyramid, each value divided by its neighbors; top, left, right, bottom."""
    weights = [(0.1011, 0.1493, 0.1460, 0.1015), (0.0757, 0.1986, 0.1846, 0.0837), (0.0477, 0.2138, 0.2243, 0.0467),
               (0, 0.2503, 0.2616, 0), (0, 0.2598, 0.2552, 0), (0, 0.2215, 0.0717, 0)]  # fmt: skip
    sigmas = 0.0248, 0.0185, 0.0179, 0.0191, 0.0220, 0.2782

    def blur(x, mode):
        line = [0.05, 0.25, 0.4, 0.25, 0.05]
        return correlate1d(correlate1d(x, line, 0, mode=mode), line, 1, mode=mode)

    def pyramid(x):
        for level, ((top, left, right, bottom), sigma) in enumerate(zip(weights, sigmas, strict=True)):
            band, low = x, None
            if level < 5:
                low = blur(x, "reflect")[::2, ::2]
                spread = np.zeros([2 * n + 4 for n in low.shape])
                spread[::2, ::2] = np.pad(low, 1, mode="edge")
                band = x - 4 * blur(spread, "constant")[2 : x.shape[0] + 2, 2 : x.shape[1] + 2]
            around = convolve(np.abs(band), [[0, top, 0], [left, 0, right], [0, bottom, 0]], mode="constant")
            yield band / (sigma + around)
            x = low

    def second(*images):
        bands = zip(*(pyramid(gray(x)) for x in images), strict=True)
        return np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in bands])

    np.testing.assert_allclose(found("nlpd", *pair), [second(*images) for images in zip(*pair, strict=True)], atol=1e-5)


def test_piqe_is_pypiqes(pair):
    """On gray pictures of 8 bits: pypiqe rounds the gray of a colored one first, and blocks then tip over a threshold.

    And of whole blocks of 16 pixels: pyiqa fills up by the remainder, not to a whole block, and drops what is left.
    """
    piqe = pytest.importorskip("pypiqe", reason=PEERS).piqe
    for image in pair[0]:
        levels = np.round(gray(image) * 255)
        levels[0, 0] = 255  # both stretch the brightest to 255
        picture = torch.from_numpy(levels / 255).float().expand(1, 3, -1, -1)
        assert found("piqe", picture).item() == pytest.approx(piqe(levels)[0], abs=0.01)
