"""Each stage against an independent implementation: formulas in fp64, PyTorch, Pillow, the public code."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from scipy import integrate, ndimage, special, stats

from rfsr_ext.data import Degradation
from rfsr_ext.data.degradation import pipeline, poisson, stages_cpu, stages_gpu
from rfsr_ext.data.degradation.choices import MODES
from rfsr_ext.data.degradation.jpeg_transform import jpeg as jpeg_transform
from rfsr_ext.data.degradation.kernels import FAMILIES, Kernel, gaussian
from rfsr_ext.data.images import to_uint8

RELEASED = Path(__file__).parent / "released/expected.safetensors"


class Tensors:
    """`stages_gpu` with arrays going in and coming out."""

    def __getattr__(self, name):
        def stage(image, *arguments):
            return getattr(stages_gpu, name)(torch.from_numpy(np.ascontiguousarray(image)), *arguments).numpy()

        return stage


BOTH = pytest.mark.parametrize("stages", [stages_cpu, Tensors()], ids=["cpu", "gpu"])


def image(height=40, width=56, seed=0):
    """Edges and texture."""
    rng = np.random.default_rng(seed)
    blocks = rng.random((3, -(-height // 8), -(-width // 8))).repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return (0.8 * blocks + 0.2 * rng.random(blocks.shape)).astype(np.float32)


def released():
    with safe_open(RELEASED, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["kernels"])  # noqa: SIM118


# -- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [7, 15, 21])
def test_kernel_is_its_formula(family, size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        sigma, theta, beta = rng.uniform(0.2, 3, 2), rng.uniform(-math.pi, math.pi), rng.uniform(0.5, 4)
        if not family.endswith("aniso"):
            sigma[1], theta = sigma[0], 0.0
        turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
        covariance = turn @ np.diag(sigma**2) @ turn.T
        y, x = np.mgrid[:size, :size] - size // 2
        points = np.stack([x, y], axis=-1)
        if family in ("iso", "aniso"):
            beta = 1.0
            wanted = stats.multivariate_normal([0, 0], covariance).pdf(points)
        else:
            q = np.einsum("...i,ij,...j->...", points, np.linalg.inv(covariance), points)
            wanted = np.exp(-(q**beta) / 2) if family.startswith("generalized") else 1 / (q**beta + 1)
        weights = Kernel(family, size, tuple(sigma), theta, beta).weights()
        np.testing.assert_allclose(weights, wanted / wanted.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [7, 21])
def test_sinc_is_the_inverse_transform_of_a_disk(size):
    cutoff = 1.9
    y, x = np.mgrid[:size, :size] - size // 2
    radii = np.hypot(x, y)
    values = {
        r: integrate.quad(lambda rho, r=r: special.j0(rho * r) * rho, 0, cutoff)[0] / (2 * np.pi)
        for r in np.unique(radii)
    }
    wanted = np.vectorize(values.get)(radii)
    np.testing.assert_allclose(Kernel("sinc", size, cutoff=cutoff).weights(), wanted / wanted.sum(), atol=1e-9)


def test_kernels_are_those_of_the_public_code():
    tensors, kernels = released()
    assert {kernel["family"] for kernel in kernels} == {*FAMILIES, "sinc"}
    for index, values in enumerate(kernels):
        values = values | ({"sigma": tuple(values["sigma"])} if "sigma" in values else {})
        np.testing.assert_allclose(Kernel(**values).weights(), tensors[f"kernel.{index}"], atol=1e-6)


# -- blur and sharpening ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("size", [(40, 56), (5, 64), (1, 3)], ids=str)
def test_blur_is_a_correlation_with_reflected_edges(stages, size):
    weights = np.random.default_rng(0).random((21, 21))
    weights += weights[::-1, ::-1]  # symmetric about the center as all kernels are, and no more
    weights /= weights.sum()
    wanted = [ndimage.correlate(channel.astype(np.float64), weights, mode="mirror") for channel in image(*size)]
    np.testing.assert_allclose(stages.blur(image(*size), weights), wanted, atol=1e-6)


@BOTH
def test_blur_and_sharpening_are_those_of_the_public_code(stages):
    tensors, kernels = released()
    blurred = stages.blur(tensors["image"], Kernel(**kernels[-1]).weights())
    np.testing.assert_allclose(blurred, tensors["blurred"], atol=1e-6)
    if stages is stages_cpu:
        sharpened = pipeline._sharpened(tensors["image"], stages_cpu)
    else:
        sharpened = pipeline._sharpened(torch.from_numpy(tensors["image"]), stages_gpu).numpy()
    np.testing.assert_allclose(sharpened, tensors["sharpened"], atol=2e-6)
    assert np.abs(sharpened - tensors["image"]).max() > 0.05


@pytest.mark.parametrize("name", ["realesrgan-a", "realesrgan-b", "realesrgan-c"])
def test_the_order_is_that_of_the_public_code(name, monkeypatch):
    """All stages but noise and JPEG, from the public functions in the public order; 8 bits may round to either side."""
    monkeypatch.setattr(stages_cpu, "jpeg", lambda image, quality: stages_cpu.round_to_8_bits(image))
    silent = {"noise_range": [0, 0], "poisson_scale_range": [0, 0]}
    degradation = Degradation.preset(name, first=silent, second=silent)
    tensors, _ = released()
    gt = np.tile(tensors["image"], (1, 2, 2))
    for index in range(4):
        lr, _ = pipeline._two_rounds(degradation, gt, degradation.generator((0, index)), stages_cpu)
        assert np.abs(lr - tensors[f"{name}.{index}"]).max() * 255 < 2.01
        assert np.abs(lr - tensors[f"{name}.{index}"]).mean() * 255 < 0.5
        assert np.abs(lr - stages_cpu.resize(gt, lr.shape[1:], "area")).mean() * 255 > 1


def test_unsharp_gaussian_has_the_width_of_opencv():
    rows = gaussian(51).sum(axis=1)
    offsets = np.arange(51) - 25
    np.testing.assert_allclose(rows, np.exp(-(offsets**2) / 128) / np.exp(-(offsets**2) / 128).sum(), atol=1e-12)


# -- resizing ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [0.15, 0.3, 0.77, 1.0, 1.31, 1.5])
def test_resizing_by_a_factor(stages, mode, scale):
    size = (int(40 * scale), int(56 * scale))
    wanted = F.interpolate(torch.from_numpy(image()).double()[None], scale_factor=scale, mode=mode)[0]
    resized = stages.resize(image(), size, mode, scale)
    assert resized.shape == wanted.shape
    np.testing.assert_allclose(resized, wanted, atol=1e-5 if stages is not stages_cpu else 1e-6)


@BOTH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(10, 14), (11, 13), (40, 56), (53, 91), (1, 1)], ids=str)
def test_resizing_to_a_size(stages, mode, size):
    wanted = F.interpolate(torch.from_numpy(image()).double()[None], size, mode=mode)[0]
    np.testing.assert_allclose(
        stages.resize(image(), size, mode), wanted, atol=1e-5 if stages is not stages_cpu else 1e-6
    )


def test_resizing_agrees_with_pillow_where_both_mean_the_same():
    def pillow(size, resample):
        return [np.asarray(Image.fromarray(channel).resize(size[::-1], resample)) for channel in image()]

    np.testing.assert_allclose(
        stages_cpu.resize(image(), (10, 14), "area"), pillow((10, 14), Image.Resampling.BOX), atol=1e-6
    )
    np.testing.assert_allclose(
        stages_cpu.resize(image(), (60, 84), "bilinear"), pillow((60, 84), Image.Resampling.BILINEAR), atol=1e-6
    )


@BOTH
def test_what_would_vanish_keeps_a_pixel(stages):
    assert stages.resize(image(3, 40), (1, 6), "bilinear", 0.15).shape == (3, 1, 6)


# -- noise ------------------------------------------------------------------------------------------------------------


def flat(levels, side=512):
    """``[3, side, side]`` of the given 8-bit levels in turn, in equal numbers."""
    assert side * side % len(levels) == 0
    return np.broadcast_to(np.resize(np.float32(levels) / 255, (side, side)), (3, side, side))


@BOTH
@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_moments(stages, gray):
    noise = stages.add_gaussian_noise(flat([128]), 12.0, gray, np.random.default_rng(0)) - flat([128])
    n = noise[0].size
    for channel in noise:
        assert abs(channel.mean()) < 4 * 12 / 255 / math.sqrt(n)
        assert channel.std() * 255 == pytest.approx(12, rel=4 / math.sqrt(2 * n))
        assert stats.kstest(channel[::4].ravel() * 255 / 12, "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise.reshape(3, -1))[0, 1]
    assert correlation == pytest.approx(1) if gray else abs(correlation) < 4 / math.sqrt(n)


@BOTH
@pytest.mark.parametrize("gray", [False, True])
def test_poisson_noise_has_its_moments(stages, gray):
    """Variance ``strength² x / n`` and skewness ``1 / sqrt(n x)``, with n = 4 for three levels."""
    levels = [16, 64, 64, 192]
    noise = stages.add_poisson_noise(flat(levels), 0.05, gray, np.random.default_rng(0)) - flat(levels)
    for level in set(levels):
        x = level / 255
        chosen = noise[:, np.isclose(flat(levels)[0], x)].astype(np.float64)
        count = chosen[0].size
        assert abs(chosen.mean()) < 4 * math.sqrt(0.0025 * x / 4 / count)
        assert chosen.var() == pytest.approx(0.0025 * x / 4, rel=0.03)
        assert stats.skew(chosen.ravel()) == pytest.approx(1 / math.sqrt(4 * x), rel=0.05)
    difference = np.abs(noise[0] - noise[1]).max()
    assert difference < 1e-6 if gray else difference > 0.02


@pytest.mark.parametrize("power", [1, 2, 32, 256])
@pytest.mark.parametrize("level", [0, 1, 40, 200, 255])
def test_alias_table_holds_the_poisson_distribution(power, level):
    """Every probability, read out of the table: a column's own share and those of which it is the alias."""
    bits = poisson.column_bits(power)
    row = poisson.alias_table(power).reshape(256, -1)[level].astype(np.int64)
    share, alias = (row >> bits) / 2 ** (32 - bits), row & ((1 << bits) - 1)
    probabilities = share + np.bincount(alias, 1 - share, minlength=len(row))
    mean = level / 255 * power
    lowest = round((poisson.offsets(power)[level] + level / 255) * power)
    wanted = stats.poisson(mean).pmf(lowest + np.arange(len(row)))
    np.testing.assert_allclose(probabilities / len(row), wanted, atol=2**-30)
    assert wanted.sum() == pytest.approx(1, abs=2**-30)


@BOTH
def test_poisson_numbers_are_drawn_from_the_table(stages):
    """A chi-square test of the counts."""
    picture = flat([0, 50, 100, 255])
    noisy = stages.add_poisson_noise(picture * np.float32(0.5), 1e-3, False, np.random.default_rng(3))
    for level in (25, 50):
        chosen = (picture * np.float32(0.5) * 255).round() == level
        counts = np.rint(((noisy - picture * np.float32(0.5))[chosen] * 1e3 + level / 255) * 4).astype(int)
        found = np.bincount(counts, minlength=8)
        wanted = stats.poisson(level / 255 * 4).pmf(np.arange(len(found))) * len(counts)
        tail = wanted >= 10
        found, wanted = found[tail], wanted[tail]
        rest = len(counts) - found.sum(), len(counts) - wanted.sum()
        assert stats.chisquare([*found, rest[0]], [*wanted, rest[1]]).pvalue > 1e-3


@pytest.mark.parametrize(("levels", "power"), [(1, 1), (2, 2), (3, 4), (128, 128), (129, 256), (256, 256)])
def test_photons_per_white_are_the_next_power_of_two(levels, power):
    assert poisson.levels_power(levels) == power


@BOTH
@pytest.mark.parametrize("noise", ["add_gaussian_noise", "add_poisson_noise"])
def test_noise_stays_in_range(stages, noise):
    noisy = getattr(stages, noise)(flat([0, 255], 32), 200.0, False, np.random.default_rng(0))
    assert noisy.min() == 0 and noisy.max() == 1


# -- JPEG -------------------------------------------------------------------------------------------------------------


def pillow(picture, quality):
    """The bytes of the file, and what is read from it."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(np.moveaxis(picture, 0, -1))).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), np.moveaxis(np.asarray(Image.open(buffer)), -1, 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 100), st.integers(0, 2**32), st.booleans())
def test_jpeg_is_pillows_on_both(height, width, quality, seed, rough):
    picture = image(height, width, seed)
    picture = np.random.default_rng(seed).random(picture.shape, dtype=np.float32) if rough else picture
    wanted = pillow(picture, quality)[1]
    for stages in (stages_cpu, Tensors()):
        np.testing.assert_array_equal(to_uint8(stages.jpeg(picture, quality)), wanted)


def test_jpeg_of_a_batch_takes_a_quality_each():
    pictures, qualities = np.stack([image(seed=seed) for seed in range(5)]), [1, 30, 50, 77, 100]
    together = jpeg_transform(torch.from_numpy(pictures), torch.tensor(qualities))
    for picture, quality, result in zip(pictures, qualities, together, strict=True):
        np.testing.assert_array_equal(to_uint8(result.numpy()), pillow(picture, quality)[1])


@BOTH
def test_rounding_to_8_bits(stages):
    values = np.linspace(-0.2, 1.2, 3 * 64, dtype=np.float32).reshape(3, 8, 8)
    np.testing.assert_array_equal(stages.round_to_8_bits(values), to_uint8(values) / np.float32(255))
