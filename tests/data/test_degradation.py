import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsr_ext.data import Degradation, load_photograph
from rfsr_ext.data.dead_leaves import dead_leaves
from rfsr_ext.data.degradation import Round
from rfsr_ext.data.images import from_uint8, jpeg, resize, to_uint8


def image(height=32, width=48, seed=0):
    return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 2, 4]), st.integers(0, 2**32))
def test_shape_range_and_depth(height, width, scale, seed):
    sharp = image(height * scale, width * scale)
    lr, gt = Degradation(scale=scale).degrade(sharp, np.random.default_rng(seed))
    assert gt is sharp
    assert lr.shape == (height, width, 3) and lr.dtype == np.float32
    assert lr.min() >= 0 and lr.max() <= 1
    np.testing.assert_array_equal(lr, from_uint8(to_uint8(lr)))  # what an 8-bit file would hold


def test_the_mini_preset_is_what_the_small_weights_were_made_with():
    """The same bits as before there were other presets."""
    sharp = np.ascontiguousarray(load_photograph("coffee")[:128, :96])
    lr = [Degradation.preset("mini").degrade(sharp, np.random.default_rng(seed))[0] for seed in range(3)]
    digests = [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in lr]
    assert digests == ["89d05a35f582f71c", "9438031359e85134", "7dd443afc882d761"]


def test_depends_on_the_generator_alone():
    degrade, original = Degradation().degrade, image()
    untouched = original.copy()
    first, again, other = (degrade(original, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0
    np.testing.assert_array_equal(original, untouched)


@pytest.mark.parametrize(
    "harsh",
    [{"blur_sigma": (3.0, 3.0)}, {"noise_range": (25.0, 25.0)}, {"jpeg_range": (5, 5)}],
    ids=lambda x: next(iter(x)),
)
def test_every_stage_does_harm(harsh):
    gray = image(8, 8)[..., :1].repeat(3, axis=-1)  # the coarser colors of JPEG would hide the rest
    smooth = resize(gray, (64, 64)).clip(0, 1)
    mild = {"blur_sigma": (0.1, 0.1), "noise_range": (0.0, 0.0), "jpeg_range": (95, 95)}
    clean = resize(smooth, (16, 16)).clip(0, 1)

    def error(settings):
        degradation = Degradation(first=Round(**settings))
        lr = [degradation.degrade(smooth, np.random.default_rng(seed))[0] for seed in range(8)]
        return np.mean([(x - clean) ** 2 for x in lr])

    assert error(mild | harsh) > 2 * error(mild)


def test_resize_keeps_a_constant_and_does_not_round():
    np.testing.assert_allclose(resize(np.full((9, 7, 3), 0.3337, np.float32), (4, 5)), 0.3337, atol=1e-6)


def test_uint8_round_trip():
    eight_bits = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(to_uint8(from_uint8(eight_bits)), eight_bits)
    np.testing.assert_array_equal(to_uint8(np.array([-0.5, 1.5])), [0, 255])


def test_better_jpeg_is_closer():
    smooth = resize(image(8, 8), (64, 64)).clip(0, 1)
    assert np.abs(jpeg(smooth, 95) - smooth).mean() < np.abs(jpeg(smooth, 10) - smooth).mean()


@settings(deadline=None)
@given(st.integers(8, 64), st.integers(0, 2**32))
def test_dead_leaves(size, seed):
    leaves = dead_leaves(size, np.random.default_rng(seed), shapes=8)
    assert leaves.shape == (size, size, 3) and leaves.dtype == np.float32
    assert leaves.min() >= 0 and leaves.max() <= 1
    np.testing.assert_array_equal(leaves, dead_leaves(size, np.random.default_rng(seed), shapes=8))
