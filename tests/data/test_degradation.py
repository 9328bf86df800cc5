import dataclasses
import functools
import hashlib
import os
import pickle
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rfsr_ext.data import Degradation, load_photograph
from rfsr_ext.data.dead_leaves import dead_leaves
from rfsr_ext.data.degradation import DEGRADATIONS, Round, pipeline, stages_cpu, stages_gpu
from rfsr_ext.data.degradation.kernels import FAMILIES
from rfsr_ext.data.images import from_uint8, jpeg, resize, to_tensor, to_uint8
from tests.odd import ODD


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
    """The same bits, whatever other presets become."""
    sharp = np.ascontiguousarray(load_photograph("coffee")[:128, :96])
    lr = [Degradation.preset("mini").degrade(sharp, np.random.default_rng(seed))[0] for seed in range(3)]
    digests = [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in lr]
    assert digests == ["acc31465fc5fb63e", "9fd1531c8dca5b05", "5430d8ee7c7cd8c7"]


def test_a_round_may_leave_the_colors_of_jpeg_their_size():
    sharp = np.ascontiguousarray(load_photograph("coffee")[:128, :128])
    clean = resize(sharp, (32, 32))

    def error(subsampling):
        first = Round(noise_range=(0, 0), blur_sigma=(0.1, 0.1), jpeg_range=(95, 95), jpeg_subsampling=subsampling)
        lr, _ = Degradation(first=first).degrade(sharp, np.random.default_rng(0))
        return np.mean((lr - clean) ** 2)

    assert error("4:4:4") < 0.7 * error("4:2:0")


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


# -- two rounds -------------------------------------------------------------------------------------------------------

PUBLISHED = [name for name in DEGRADATIONS if name != "mini"]


def batch(count=32, height=64, width=48):
    """Photographs, ``[N, 3, H, W]``."""
    photograph = to_tensor(load_photograph("astronaut"))
    places = np.random.default_rng(0).integers(0, 300, (count, 2))
    return torch.stack([photograph[:, top : top + height, left : left + width] for top, left in places])


def digest(*images):
    return hashlib.sha256(b"".join(image.numpy().tobytes() for image in images)).hexdigest()


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_samples_are_the_same_in_any_batch_and_with_any_threads(name):
    degradation, gt, seeds = Degradation.preset(name), batch(), [(7, index) for index in range(32)]
    lr, sharp = degradation(gt, seeds)
    assert lr.shape == (32, 3, 16, 12) and lr.dtype == sharp.dtype == torch.float32 and sharp.shape == gt.shape
    assert lr.min() >= 0 and lr.max() <= 1 and torch.equal(lr, (lr * 255).round() / 255)
    assert len({image.numpy().tobytes() for image in lr}) == 32
    assert degradation.sharpens_gt != torch.equal(sharp, gt)
    threads = torch.get_num_threads()
    try:
        for size, torch_threads in ((1, 2), (4, 1), (8, 3)):
            torch.set_num_threads(torch_threads)
            parts = [degradation(gt[i : i + size], seeds[i : i + size]) for i in range(0, 32, size)]
            assert torch.equal(torch.cat([part[0] for part in parts]), lr)
            assert torch.equal(torch.cat([part[1] for part in parts]), sharp)
    finally:
        torch.set_num_threads(threads)
    backwards = degradation(gt.flip(0), seeds[::-1])
    assert torch.equal(backwards[0].flip(0), lr) and torch.equal(backwards[1].flip(0), sharp)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_one_image_as_an_array_is_the_same(name):
    degradation, gt = Degradation.preset(name), batch(1)
    lr, sharp = degradation(gt, [(3, 4)])
    one, one_sharp = degradation.degrade(gt[0].movedim(0, -1).numpy(), degradation.generator((3, 4)))
    np.testing.assert_array_equal(one, lr[0].movedim(0, -1))
    np.testing.assert_array_equal(one_sharp, sharp[0].movedim(0, -1))


def test_seed_and_index_both_matter():
    degradation, gt = Degradation.preset("realesrgan-a"), batch(1)
    assert len({digest(degradation(gt, [seed])[0]) for seed in ((0, 1), (1, 0), (1, 1), (0, 0))}) == 4


@pytest.mark.slow
def test_every_processor_makes_the_same_bits():
    """Without the vector units that NumPy and libjpeg choose at run time, and with other numbers of threads."""
    script = (
        "import torch; from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__ as has\n"
        "from tests.data.test_degradation import batch, digest; from rfsr_ext.data import Degradation\n"
        "results = [Degradation.preset(f'realesrgan-{p}')(batch(8), [(0, i) for i in range(8)]) for p in 'abc']\n"
        "print(*(name for name in __cpu_dispatch__ if has[name]), torch.backends.cpu.get_cpu_capability(),\n"
        "      digest(*(x for pair in results for x in pair)))"
    )
    names = ("NPY_DISABLE_CPU_FEATURES", "JSIMD_FORCENONE", "ATEN_CPU_CAPABILITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    root = str(Path(__file__).parents[2])

    def run(**changes):
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            env=environment | {"PYTHONPATH": root} | changes,
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip

    *units, capability, bits = run(OMP_NUM_THREADS="2")
    if not units or capability == "DEFAULT":
        pytest.skip("this processor has no vector units that could be left out")
    off = dict(zip(names, (" ".join(units), "1", "default"), strict=True))
    assert run(OMP_NUM_THREADS="1", **off) == ["DEFAULT", bits]


VERSIONS = {"numpy": "2.4.6", "scipy": "1.17.1", "pillow": "13.0.0"}


def test_other_machines_made_these_bits():
    """Digests of a processor with AVX2 and without AVX-512; other versions of a library may well differ."""
    if (found := {name: version(name) for name in VERSIONS}) != VERSIONS:
        pytest.skip(f"the digests are of {VERSIONS}, here are {found}")
    gt, seeds = batch(8), [(0, index) for index in range(8)]
    digests = {name: digest(*Degradation.preset(name)(gt, seeds))[:16] for name in DEGRADATIONS}
    assert digests == {
        "mini": "19cd9ed7d3ebf430",
        "realesrgan-a": "90c95f8597f22b37",
        "realesrgan-b": "c390196d8c1782c8",
        "realesrgan-c": "67960d39dd7d1974",
    }


class Recorder:
    """Stages that write down what they were asked for, and change sizes only."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def stage(image, *arguments):
            self.calls.append((name, arguments))
            return np.zeros((3, *arguments[0])) if name == "resize" else image

        return stage


def test_order_of_the_stages():
    """As the public code has it: dataloaders/realesrgan.py of SeeSR."""
    degradation, seen = Degradation.preset("realesrgan-a"), set()
    for seed in range(64):
        choices, recorder = degradation.draw(np.random.default_rng(seed)), Recorder()
        lr, _ = pipeline._two_rounds(degradation, np.zeros((3, 64, 48)), np.random.default_rng(seed), recorder)
        first, second = choices.first, choices.second
        blur = ["blur"] if second.kernel else []
        sinc = ["blur"] if choices.final_kernel else []
        wanted = ["blur", "resize", f"add_{first.noise}_noise", "jpeg", *blur, "resize", f"add_{second.noise}_noise"]
        wanted += ["resize", *sinc, "jpeg"] if choices.jpeg_last else ["jpeg", "resize", *sinc, "round_to_8_bits"]
        assert [name for name, _ in recorder.calls] == wanted
        sizes = [arguments for name, arguments in recorder.calls if name == "resize"]
        assert sizes == [
            ((int(64 * first.resize), int(48 * first.resize)), first.mode, first.resize),
            ((int(16 * second.resize), int(12 * second.resize)), second.mode, None),
            ((16, 12), choices.final_mode, None),
        ]
        noises = [arguments for name, arguments in recorder.calls if name.endswith("noise")]
        assert [noise[:2] for noise in noises] == [(part.strength, part.gray) for part in (first, second)]
        assert [a for n, a in recorder.calls if n == "jpeg"] == [(first.quality,), (second.quality,)]
        assert lr.shape == (3, 16, 12)
        seen.add((bool(blur), bool(sinc), choices.jpeg_last))
    assert len(seen) == 8


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_gpu_differs_by_little(name):
    """Its stages on the CPU: most samples are the same, as only a rounding to 8 bits can show the last bits.

    The unsharp mask, too, has a threshold; a pixel on its other side changes its neighborhood by less than a level.
    """
    degradation, gt = Degradation.preset(name), batch(16, 48, 32)
    differences = []
    for index, image in enumerate(gt):
        rngs = (np.random.default_rng(index) for _ in range(2))
        on_cpu, cpu_gt = pipeline._two_rounds(degradation, image.numpy(), next(rngs), stages_cpu)
        on_gpu, gpu_gt = pipeline._two_rounds(degradation, image, next(rngs), stages_gpu)
        assert np.abs(gpu_gt.numpy() - cpu_gt).max() * 255 < 0.1
        differences.append(np.abs(on_gpu.numpy() - on_cpu))
    assert np.mean(differences) * 255 < 0.05 and sum(not d.any() for d in differences) >= 8


@pytest.mark.cuda
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_samples_on_a_gpu_are_the_same_in_any_batch(name):
    degradation, gt, seeds = Degradation.preset(name), batch().cuda(), [(7, index) for index in range(32)]
    lr, sharp = degradation(gt, seeds)
    assert lr.is_cuda and sharp.is_cuda
    for size in (1, 4, 8):
        parts = [degradation(gt[i : i + size], seeds[i : i + size]) for i in range(0, 32, size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), lr)
        assert torch.equal(torch.cat([part[1] for part in parts]), sharp)
    on_cpu, _ = degradation(gt.cpu(), seeds)
    assert (lr.cpu() - on_cpu).abs().mean() * 255 < 0.05


def test_an_empty_batch():
    lr, gt = Degradation.preset("realesrgan-b")(torch.zeros(0, 3, 64, 32), [])
    assert lr.shape == (0, 3, 16, 8) and gt.shape == (0, 3, 64, 32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tiny_and_flat_images(name):
    """A side of one low-resolution pixel, and one level only."""
    for value, size in ((0.5, (4, 4)), (0.0, (4, 40)), (1.0, (8, 8))):
        lr, _ = Degradation.preset(name)(torch.full((16, 3, *size), value), [(0, i) for i in range(16)])
        assert lr.shape == (16, 3, size[0] // 4, size[1] // 4) and torch.isfinite(lr).all()


# -- what is drawn ----------------------------------------------------------------------------------------------------

DRAWS = 6000


@functools.cache
def drawn(name):
    degradation = Degradation.preset(name)
    return [degradation.draw(np.random.default_rng((11, index))) for index in range(DRAWS)]


def fits_uniform(values, low, high):
    assert len(values) > 30
    return stats.kstest(values, stats.uniform(low, high - low).cdf, method="asymp").pvalue


def fits_halves(values, low, high):
    """Half of them uniform below 1, half above."""

    def cdf(x):
        return np.where(x < 1, 0.5 * (x - low) / (1 - low) if low < 1 else 0, 0.5 + 0.5 * (x - 1) / (high - 1))

    if low == 1:  # half of them are 1 itself
        above = np.array(values)[np.array(values) > 1]
        shares = fits_shares([value > 1 for value in values], {False: 0.5, True: 0.5})
        return min(shares, fits_uniform(above, 1, high))
    return stats.kstest(values, cdf, method="asymp").pvalue


def fits_shares(values, shares):
    found = Counter(values)
    assert found.keys() <= shares.keys()
    return stats.chisquare(
        [found[key] for key in shares], [share * len(values) / sum(shares.values()) for share in shares.values()]
    ).pvalue


@pytest.mark.parametrize("part", ["first", "second"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_of_a_round_has_its_distribution(name, part):
    """Kolmogorov and Smirnov's test of every range, chi-square of every choice, on fixed seeds."""
    p = getattr(Degradation.preset(name), part)
    rounds = [getattr(choices, part) for choices in drawn(name)]
    kernels = [r.kernel for r in rounds if r.kernel]
    sinc, shaped = ([k for k in kernels if (k.family == "sinc") is wanted] for wanted in (True, False))
    turned = [k for k in shaped if k.family.endswith("aniso")]
    sizes = {size: 1 / 8 for size in range(7, 22, 2)}
    modes = {"area": 1 / 3, "bilinear": 1 / 3, "bicubic": 1 / 3}
    directions = dict(zip((1, -1, 0), p.resize_prob, strict=True))
    assert all(k.sigma[0] == k.sigma[1] and k.theta == 0 for k in shaped if not k.family.endswith("aniso"))
    assert all(k.beta == 1 for k in shaped if k.family in ("iso", "aniso"))
    qualities = {q: 1.0 for q in range(p.jpeg_range[0], p.jpeg_range[1] + 1)}
    fits = {
        "blurred": fits_shares([r.kernel is not None for r in rounds], {True: p.blur_prob, False: 1 - p.blur_prob})
        if p.blur_prob < 1
        else float(len(kernels) == DRAWS),
        "size": fits_shares([k.size for k in kernels], sizes),
        "sinc": fits_shares([k.family == "sinc" for k in kernels], {True: p.sinc_prob, False: 1 - p.sinc_prob}),
        "small cutoff": fits_uniform([k.cutoff for k in sinc if k.size < 13], np.pi / 3, np.pi),
        "large cutoff": fits_uniform([k.cutoff for k in sinc if k.size >= 13], np.pi / 5, np.pi),
        "family": fits_shares([k.family for k in shaped], dict(zip(FAMILIES, p.kernel_prob, strict=True))),
        "sigma": fits_uniform([k.sigma[0] for k in shaped], *p.blur_sigma),
        "other sigma": fits_uniform([k.sigma[1] for k in turned], *p.blur_sigma),
        "theta": fits_uniform([k.theta for k in turned], -np.pi, np.pi),
        "generalized": fits_halves([k.beta for k in shaped if k.family.startswith("generalized")], *p.betag_range),
        "plateau": fits_halves([k.beta for k in shaped if k.family.startswith("plateau")], *p.betap_range),
        "direction": fits_shares([int(np.sign(r.resize - 1)) for r in rounds], directions),
        "larger": fits_uniform([r.resize for r in rounds if r.resize > 1], 1, p.resize_range[1]),
        "smaller": fits_uniform([r.resize for r in rounds if r.resize < 1], p.resize_range[0], 1),
        "mode": fits_shares([r.mode for r in rounds], modes),
        "noise": fits_shares([r.noise for r in rounds], {"gaussian": p.gaussian_noise_prob, "poisson": 0.5}),
        "gaussian": fits_uniform([r.strength for r in rounds if r.noise == "gaussian"], *p.noise_range),
        "poisson": fits_uniform([r.strength for r in rounds if r.noise == "poisson"], *p.poisson_scale_range),
        "gray": fits_shares([r.gray for r in rounds], {True: p.gray_noise_prob, False: 1 - p.gray_noise_prob}),
        "quality": fits_shares([r.quality for r in rounds], qualities),
    }
    assert {key: value for key, value in fits.items() if value < 1e-3} == {}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_end_has_its_distribution(name):
    ends = drawn(name)
    sinc = [end.final_kernel for end in ends if end.final_kernel]
    fits = {
        "sinc": fits_shares([end.final_kernel is not None for end in ends], {True: 0.8, False: 0.2}),
        "size": fits_shares([k.size for k in sinc], {size: 1 / 8 for size in range(7, 22, 2)}),
        "cutoff": fits_uniform([k.cutoff for k in sinc], np.pi / 3, np.pi),
        "mode": fits_shares([end.final_mode for end in ends], {"area": 1 / 3, "bilinear": 1 / 3, "bicubic": 1 / 3}),
        "order": fits_shares([end.jpeg_last for end in ends], {True: 0.5, False: 0.5}),
    }
    assert {key: value for key, value in fits.items() if value < 1e-3} == {}
    assert {kernel.family for kernel in sinc} == {"sinc"}


def test_rounds_and_samples_are_independent():
    ends = drawn("realesrgan-a")
    columns = {
        "sigma": [end.first.kernel.sigma[0] for end in ends],
        "sigma2": [end.second.kernel.sigma[0] if end.second.kernel else 0 for end in ends],
        "resize": [end.first.resize for end in ends],
        "resize2": [end.second.resize for end in ends],
        "quality": [end.first.quality for end in ends],
        "quality2": [end.second.quality for end in ends],
        "order": [end.jpeg_last for end in ends],
    }
    values = np.array(list(columns.values()), float)
    between = np.corrcoef(np.concatenate([values[:, 1:], values[:, :-1]]))
    assert np.abs(between - np.eye(len(between))).max() < 5 / np.sqrt(DRAWS)


# -- settings ---------------------------------------------------------------------------------------------------------

# As the public files have them: dataloaders/params_realesrgan.yml and utils_data/make_paired_data.py of SeeSR,
# configs/dataset/general_deg_stablesr_realesrgan_train.yaml of CCSR.
KERNELS = [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
ONE = dict(blur_prob=1, kernel_prob=KERNELS, sinc_prob=0.1, blur_sigma=[0.2, 3], betag_range=[0.5, 4],
           betap_range=[1, 2], resize_prob=[0.2, 0.7, 0.1], resize_range=[0.3, 1.5], gaussian_noise_prob=0.5,
           noise_range=[1, 15], poisson_scale_range=[0.05, 2.0], gray_noise_prob=0.4, jpeg_range=[60, 95],
           jpeg_subsampling="4:2:0")  # fmt: skip
TWO = ONE | dict(blur_prob=0.5, blur_sigma=[0.2, 1.5], resize_prob=[0.3, 0.4, 0.3], resize_range=[0.6, 1.2],
                 noise_range=[1, 12], poisson_scale_range=[0.05, 1.0], jpeg_range=[60, 100])  # fmt: skip
SETS = {
    "realesrgan-a": (False, ONE, TWO),
    "realesrgan-b": (
        True,
        ONE | dict(resize_range=[0.15, 1.5], noise_range=[1, 30], poisson_scale_range=[0.05, 3], jpeg_range=[30, 95]),
        TWO | dict(blur_prob=0.8, resize_range=[0.3, 1.2], noise_range=[1, 25], poisson_scale_range=[0.05, 2.5],
                   jpeg_range=[30, 95]),
    ),
    "realesrgan-c": (
        False,
        ONE | dict(blur_sigma=[0.2, 1.5], betag_range=[0.5, 2.0], betap_range=[1, 1.5]),
        TWO | dict(blur_sigma=[0.2, 1.0], betag_range=[0.5, 2.0], betap_range=[1, 1.5]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_sets(name):
    sharpens_gt, first, second = SETS[name]
    assert Degradation.preset(name).to_dict() == {
        "scale": 4, "sharpens_gt": sharpens_gt, "kernel_size": [7, 21], "first": first, "second": second,
        "final_sinc_prob": 0.8,
    }  # fmt: skip


def test_the_mini_preset_is_the_default():
    assert Degradation.preset("mini") == Degradation()


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_settings_survive_yaml(name, tmp_path):
    degradation = Degradation.preset(name)
    path = tmp_path / "degradation.yaml"
    path.write_text(yaml.safe_dump(degradation.to_dict()))
    assert Degradation.load(path) == Degradation.load(name) == degradation
    assert pickle.loads(pickle.dumps(degradation)) == degradation and hash(degradation) == hash(Degradation.load(path))


def test_changes_to_a_preset():
    changed = Degradation.preset("realesrgan-a", scale=2, first={"jpeg_range": [30, 40]})
    assert changed.scale == 2 and changed.first.jpeg_range == (30, 40)
    assert changed.first.noise_range == (1, 15) and changed.second == Degradation.preset("realesrgan-a").second
    lr, _ = changed(batch(2), [(0, 0), (0, 1)])
    assert lr.shape == (2, 3, 32, 24)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"scale": 0}, "scale must be a whole number from 1 to 64, got 0"),
        ({"scale": True}, "scale must be a whole number from 1 to 64, got True"),
        ({"scale": float("nan")}, "scale must be a whole number from 1 to 64, got nan"),
        ({"sharpens_gt": 1}, "sharpens_gt must be true or false, got 1"),
        ({"kernel_size": [7, 20]}, r"kernel_size must be two odd numbers, got \[7, 20\]"),
        ({"final_sinc_prob": 1.5}, "final_sinc_prob must be a probability from 0 to 1, got 1.5"),
        ({"first": 3}, "first must be a mapping of a round's parameters, got 3"),
        ({"first": None}, "first must be a mapping of a round's parameters, got None"),
        ({"jpeg": [30, 95]}, "unknown key 'jpeg'; valid are scale, "),
        ({"first": {"jpeg_subsampling": "4:4:4"}, "second": {}}, "first.jpeg_subsampling must be 4:2:0 with"),
        ({"first": {"jpeg_subsampling": "4:1:1"}}, "first.jpeg_subsampling must be 4:2:0 or 4:4:4, got '4:1:1'"),
        ({"second": {"jpeg_rang": [30, 95]}}, "unknown key 'second.jpeg_rang'; did you mean 'jpeg_range'?"),
        ({"first": {"jpeg_range": [95, 30]}}, r"first.jpeg_range must be \[low, high\], whole numbers from 1 to 100"),
        ({"first": {"jpeg_range": [30.5, 95]}}, r"first.jpeg_range must be \[low, high\], whole numbers"),
        ({"first": {"noise_range": "1-5"}}, r"first.noise_range must be \[low, high\], numbers .* got '1-5'"),
        ({"first": {"noise_range": [1, float("inf")]}}, "first.noise_range must be .* from 0 to 255 in order"),
        ({"second": {"resize_range": [1.1, 1.5]}}, r"second.resize_range must be \[low, high\] with 1 between them"),
        ({"second": {"kernel_prob": [0.5, 0.5]}}, "second.kernel_prob must be 6 probabilities that add up to 1"),
        ({"second": {"resize_prob": [0.2, 0.2, 0.2]}}, "second.resize_prob must be 3 probabilities that add up to 1"),
        ({"first": {"sinc_prob": 0.1}}, "first.sinc_prob must be left out without a second round"),
        ({"final_sinc_prob": 0.8}, "final_sinc_prob must be left out without a second round"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings(values, sentence):
    with pytest.raises(ValueError, match=f"^degradation: {sentence}".replace("?", r"\?")) as error:
        Degradation.from_dict(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Degradation, Round])
def test_odd_settings_are_of_use_or_refused_in_one_sentence(kind):
    takes = {"sharpens_gt": {"true", "false"}, "second": {"null"}, "final_sinc_prob": {"zero"}}
    takes |= {name: {"zero"} for name in ("blur_prob", "sinc_prob", "gaussian_noise_prob", "gray_noise_prob")}
    two_rounds, one = Degradation.preset("realesrgan-a").to_dict(), Degradation.preset("mini").to_dict()
    for field in dataclasses.fields(kind):
        key, accepted = field.name if kind is Degradation else f"second.{field.name}", set()
        for name, value in ODD.items():
            change = {field.name: value}
            if kind is Round:
                change = {"second": two_rounds["second"] | change}
            try:
                Degradation.from_dict((one if field.name == "second" else two_rounds) | change)
            except ValueError as error:
                inner = name == "mapping" and field.name in ("first", "second")
                assert str(error).startswith(f"degradation: unknown key '{key}.a'" if inner else f"degradation: {key} ")
                assert "\n" not in str(error)
            else:
                accepted.add(name)
        assert accepted == takes.get(field.name, set()), key


def test_where_settings_come_from(tmp_path):
    with pytest.raises(ValueError, match="one of the presets mini, realesrgan-a, .* got 'realesrgan'"):
        Degradation.preset("realesrgan")
    with pytest.raises(FileNotFoundError, match="neither a file nor one of the presets"):
        Degradation.load(tmp_path / "missing.yaml")
    for text, sentence in (("scale: [", "is not valid YAML"), ("- 4", "must hold 'key: value' lines, got a list")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            Degradation.load(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("shape", "dtype", "seeds", "sentence"),
    [
        ((3, 64, 64), torch.float32, 3, r"gt must be float32 \[N, 3, H, W\], got torch.float32 \[3, 64, 64\]"),
        ((1, 1, 64, 64), torch.float32, 1, r"gt must be float32 \[N, 3, H, W\]"),
        ((1, 3, 64, 64), torch.uint8, 1, r"gt must be float32 \[N, 3, H, W\], got torch.uint8"),
        ((1, 3, 62, 64), torch.float32, 1, r"sides that are multiples of scale 4, got \[62, 64\]"),
        ((2, 3, 64, 64), torch.float32, 1, r"seeds must hold a \(seed, index\) for each of the 2 samples, got 1"),
    ],
)
def test_bad_batches(shape, dtype, seeds, sentence):
    with pytest.raises(ValueError, match=sentence):
        Degradation.preset("realesrgan-a")(torch.zeros(shape, dtype=dtype), [(0, i) for i in range(seeds)])


@pytest.mark.parametrize(
    ("shape", "dtype", "sentence"),
    [
        ((3, 64, 64), np.float32, r"gt must be float32 \[H, W, 3\], got float32 \[3, 64, 64\]"),
        ((64, 64, 3), np.float64, r"gt must be float32 \[H, W, 3\], got float64 \[64, 64, 3\]"),
        ((62, 64, 3), np.float32, r"sides that are multiples of scale 4, got \[62, 64\]"),
    ],
)
def test_bad_arrays(shape, dtype, sentence):
    with pytest.raises(ValueError, match=sentence):
        Degradation().degrade(np.zeros(shape, dtype), np.random.default_rng(0))
