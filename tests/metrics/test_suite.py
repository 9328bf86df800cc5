"""Metrics by name and presets: what they need, what they say, and that their numbers are right."""

import re
import sys

import numpy as np
import pytest
import torch
from skimage.measure import shannon_entropy
from skimage.metrics import structural_similarity

from rfsr_ext.data import evaluation_crops, photographs
from rfsr_ext.metrics import METRICS, PRESETS, Judge, Preset, Suite, get_preset, psnr, ssim
from rfsr_ext.weights import registry
from rfsr_ext.weights.registry import METRIC_FILES

FREE = PRESETS["weightless"].metrics
NEEDS_PEERS = "torchmetrics is not installed (pip install 'rfsr_ext[peers]')"
NEEDS_PYIQA = "pyiqa is not installed (pip install 'rfsr_ext[metrics]')"


@pytest.fixture(scope="module")
def gt():
    return torch.stack([sample["gt"] for sample in evaluation_crops(photographs("test"), 192, 3)])


@pytest.fixture(scope="module")
def noise(gt):
    return torch.randn(gt.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No weight file is to be found."""
    monkeypatch.setenv("RFSR_WEIGHTS", str(tmp_path / "mine"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path


def value(name, sr, gt, **options):
    return Suite(Preset("test", (name,), **options))(sr, gt)[name]


# -- without pyiqa ----------------------------------------------------------------------------------------------------


def test_every_file_of_every_metric_is_in_the_registry():
    assert set(METRIC_FILES) <= set(METRICS)
    used = {file for files in METRIC_FILES.values() for file in files}
    assert used <= set(registry.FILES)
    others = {"vgg19", "image-reward", "bert-vocabulary", "ram", "ram-tags", "ram-thresholds"}
    assert set(registry.FILES) - used == others  # of losses, rewards and the tagger


def test_presets_name_the_variants():
    assert get_preset("rfsr-paper").metrics == ("lpips", "maniqa-pipal", "musiq", "clipiqa", "laion_aes")
    seesr = get_preset("seesr")
    assert (seesr.channel, seesr.crop) == ("y", 4) and "maniqa-pipal" in seesr.metrics
    assert not set(FREE) & set(METRIC_FILES) and {"piqe", "ms_ssim", "fsim"} <= set(FREE)
    assert not {"clipiqa", "laion_aes", "musiq"} & set(get_preset("held-out").metrics)


def test_the_label_says_what_decides_a_number():
    assert PRESETS["basic"].label == "basic: seed 0, PSNR and SSIM on RGB, border 0"
    assert re.fullmatch(r"seesr: seed 0, PSNR and SSIM on Y, border 4, pyiqa .+", PRESETS["seesr"].label)
    assert re.fullmatch(r"rfsr-paper: seed 0, pyiqa .+", PRESETS["rfsr-paper"].label)


def test_basic_needs_nothing(gt, noise, nowhere, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    sr = (gt + 0.05 * noise).clamp(0, 1)
    found = Suite(PRESETS["basic"])(sr, gt)
    torch.testing.assert_close(found["psnr"], psnr(sr, gt))
    torch.testing.assert_close(found["ssim"], ssim(sr, gt))
    torch.testing.assert_close(found["judge"], Judge.from_pretrained().score(sr))


def test_channel_and_border_reach_psnr_and_ssim(gt, noise):
    sr = (gt + 0.05 * noise).clamp(0, 1)
    found = Suite(Preset("test", ("psnr", "ssim"), "y", 4))(sr, gt)
    torch.testing.assert_close(found["psnr"], psnr(sr, gt, "y", 4))
    torch.testing.assert_close(found["ssim"], ssim(sr, gt, "y", 4))


def test_without_a_ground_truth_reference_metrics_are_left_out(gt):
    suite = Suite(PRESETS["basic"], reference=False)
    assert suite.metrics == ("judge",) and list(suite(gt)) == ["judge"]
    with pytest.raises(ValueError, match="preset 'x' has only metrics that compare with a ground truth; give one"):
        Suite(Preset("x", ("psnr", "lpips")), reference=False)
    with pytest.raises(
        ValueError, match=r"gt must be given, psnr, ssim compare with it; Suite\(..., reference=False\) do"
    ):
        Suite(PRESETS["basic"])(gt)


def test_seeds_hold_for_every_generator_and_leave_them_alone(gt, monkeypatch):
    """A metric that draws crops, as MANIQA once did and pyiqa's still does in training mode, through NumPy."""

    def cropped(x):
        top, left = np.random.randint(0, 32, size=2)
        return x[..., top : top + 64, left : left + 64].mean() + torch.rand(()) * 1e-3

    monkeypatch.setattr("rfsr_ext.metrics.suite._build", lambda name, device: cropped)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    suites = [Suite(Preset("test", ("piqe",), seed=seed)) for seed in (0, 0, 1)]
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    a, b, c = (suite(gt)["piqe"] for suite in suites)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a[1:], suites[0](gt[1:])["piqe"])  # an image's crops do not depend on its neighbors
    assert np.array_equal(states[0], np.random.get_state()[1]) and torch.equal(states[1], torch.get_rng_state())


def test_what_is_missing_is_said_before_anything_is_built(nowhere, monkeypatch):
    monkeypatch.setattr("rfsr_ext.metrics.suite._build", lambda *_: pytest.fail("built too early"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lpips, maniqa-pipal, .* come from pyiqa; pip install 'rfsr_ext\[m"):
        Suite(PRESETS["rfsr-paper"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(FileNotFoundError) as error:
        Suite(PRESETS["rfsr-paper"])
    sentence = str(error.value)
    assert "\n" not in sentence
    for name in ("alexnet", "lpips", "maniqa-vit", "maniqa-pipal", "musiq", "clip-rn50", "clip-vit-l14-aesthetic",
                 "laion_aes"):  # fmt: skip
        assert f"{name} ({registry.FILES[name].file})" in sentence


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Preset("x", ("psnr", "vmaf")), "metrics must be among psnr, .*, got 'vmaf'"),
        (lambda: get_preset("ntire"), "preset must be one of basic, rfsr-paper, .*, got 'ntire'"),
    ],
)
def test_unknown_names(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_an_image_a_metric_cannot_measure():
    with pytest.raises(ValueError, match="ssim: sr must be at least 11 pixels high and wide, got 8x8"):
        Suite(PRESETS["basic"])(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


# -- pyiqa's metrics that need no file, for real ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy(gt, noise):
    """Increasingly noisy versions of the photographs."""
    return [(gt + strength * noise).clamp(0, 1) for strength in (0.02, 0.05, 0.15)]


@pytest.mark.parametrize("name", [name for name in FREE if METRICS[name].reference])
def test_more_noise_is_worse(name, gt, noisy):
    pytest.importorskip("pyiqa", reason=NEEDS_PYIQA)
    suite = Suite(Preset("test", (name,)))
    values = torch.stack([suite(sr, gt)[name] for sr in (gt, *noisy)])
    better = -values if METRICS[name].lower_better else values
    assert values[1:].isfinite().all()
    assert (better[:-1] > better[1:]).all()


def test_piqe_sees_noise(gt, noisy):
    pytest.importorskip("pyiqa", reason=NEEDS_PYIQA)
    values = torch.stack([value("piqe", sr, None) for sr in (gt, *noisy[1:])])
    assert ((values >= 0) & (values <= 100)).all() and (values.diff(dim=0) > 0).all()


def test_entropy_is_scikit_images(gt):
    pytest.importorskip("pyiqa", reason=NEEDS_PYIQA)
    found = value("entropy", gt, None)
    expected = [shannon_entropy(np.round(rgb2gray_601(image) * 255)) for image in gt]
    np.testing.assert_allclose(found, expected, atol=0.02)


def rgb2gray_601(image):
    return np.tensordot([0.299, 0.587, 0.114], image.double().numpy(), 1)


def y_of_8_bits(image):
    """The luma pyiqa's structural metrics compare: YIQ, in 0 to 255, rounded."""
    return np.round(rgb2gray_601(image) * 255)


def test_ms_ssim_is_built_from_scikit_images_ssim(gt, noisy):
    """Wang, Simoncelli and Bovik (2003): contrast and structure at four scales, all of SSIM at the fifth."""
    pytest.importorskip("pyiqa", reason=NEEDS_PYIQA)
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    for image, truth, found in zip(noisy[1], gt, value("ms_ssim", noisy[1], gt), strict=True):
        a, b, product = y_of_8_bits(image), y_of_8_bits(truth), 1.0
        for scale, weight in enumerate(weights):
            if scale < 4:
                product *= contrast_structure(a, b) ** weight
            else:
                product *= structural_similarity(a, b, **options) ** weight
            a, b = (x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2).mean((1, 3)) for x in (a, b))
        assert found.item() == pytest.approx(product, abs=1e-4)


def contrast_structure(a, b):
    from scipy.ndimage import gaussian_filter

    def blur(x):
        return gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    covariance = blur(a * b) - blur(a) * blur(b)
    variances = blur(a * a) - blur(a) ** 2 + blur(b * b) - blur(b) ** 2
    constant = (0.03 * 255) ** 2
    return np.mean((2 * covariance + constant) / (variances + constant))


def test_gmsd_is_its_formula(gt, noisy):
    """Xue et al. (2014): the spread of the similarity of Prewitt gradients, after halving the picture."""
    from scipy.ndimage import correlate

    pytest.importorskip("pyiqa", reason=NEEDS_PYIQA)
    prewitt = np.array([[1, 0, -1]] * 3) / 3
    for image, truth, found in zip(noisy[1], gt, value("gmsd", noisy[1], gt), strict=True):
        magnitudes = []
        for x in (y_of_8_bits(image), y_of_8_bits(truth)):
            x = x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2).mean((1, 3))
            magnitudes.append(np.hypot(*(correlate(x, k, mode="constant") for k in (prewitt, prewitt.T))))
        a, b = magnitudes
        similarity = (2 * a * b + 170) / (a * a + b * b + 170)
        assert found.item() == pytest.approx(similarity.std(ddof=1), abs=1e-4)


def test_ours_agree_with_torchmetrics(gt, noisy):
    image = pytest.importorskip("torchmetrics.functional.image", reason=NEEDS_PEERS)
    options = {"gaussian_kernel": True, "sigma": 1.5, "data_range": 1.0, "reduction": "none"}
    for sr in noisy:
        found = Suite(Preset("test", ("psnr", "ssim")))(sr, gt)
        second = image.peak_signal_noise_ratio(sr, gt, data_range=1.0, reduction="none", dim=(1, 2, 3))
        torch.testing.assert_close(found["psnr"], second)
        _, everywhere = image.structural_similarity_index_measure(sr, gt, return_full_image=True, **options)
        second = everywhere[..., 5:-5, 5:-5].mean((1, 2, 3))  # where the window lies inside, as Wang et al. average
        torch.testing.assert_close(found["ssim"], second, atol=1e-4, rtol=0)


def test_ours_on_luma_is_pyiqas(gt, noisy):
    pyiqa = pytest.importorskip("pyiqa", reason=NEEDS_PYIQA)
    options = {"test_y_channel": True, "color_space": "ycbcr", "crop_border": 4, "device": torch.device("cpu")}
    for sr in noisy:
        theirs = [pyiqa.create_metric(name, **options)(sr, gt).float() for name in ("psnr", "ssim")]
        torch.testing.assert_close(psnr(sr, gt, "y", 4), theirs[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(ssim(sr, gt, "y", 4), theirs[1], atol=2e-3, rtol=0)  # pyiqa rounds Y to 8 bits


@pytest.mark.parametrize("name", ["piqe", "gmsd", "vif"])
def test_batches_and_sizes_change_nothing(name, gt, noisy):
    pytest.importorskip("pyiqa", reason=NEEDS_PYIQA)
    suite = Suite(Preset("test", (name,)))
    together = suite(noisy[1], gt)[name]
    alone = torch.cat([suite(noisy[1][i : i + 1], gt[i : i + 1])[name] for i in range(len(gt))])
    assert torch.equal(together, alone)
    assert suite(noisy[1][:1, :, :150, :91], gt[:1, :, :150, :91])[name].isfinite().all()


@pytest.mark.parametrize("sr, gt, name", [(np.uint8, np.float32, "sr"), (np.float32, np.uint8, "gt")])
def test_images_in_8_bits_are_refused(sr, gt, name):
    """Clamped to [0, 1] they would be measured, as black and white."""
    images = [torch.from_numpy(np.zeros((1, 3, 32, 32), dtype)) for dtype in (sr, gt)]
    for measure in (Suite(get_preset("basic")), psnr, ssim):
        with pytest.raises(TypeError, match=f"{name} must be floating point .* got torch.uint8; divide 8-bit"):
            measure(*images)
