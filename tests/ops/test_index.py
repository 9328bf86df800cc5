"""The index arithmetic that CPU and CUDA kernels share (csrc/index.h), called directly through pybind11."""

import hashlib
import importlib.util
import math
import shutil
import subprocess
import sys
import sysconfig
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsr_ext.ops import reference

ROOT = Path(__file__).resolve().parents[2]
MODES = list(reference.MODES)
SIZES = range(1, 12)


@pytest.fixture(scope="module")
def index(request):
    """The binding, compiled once for each state of its sources and kept in pytest's cache folder."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform == "win32":
        pytest.skip("needs g++ or clang++")
    source, header = ROOT / "tests/ops/index_binding.cpp", ROOT / "csrc/index.h"
    key = hashlib.sha256(source.read_bytes() + header.read_bytes() + sys.version.encode()).hexdigest()[:16]
    library = request.config.cache.mkdir(f"index_binding_{key}") / "index_binding.so"
    if not library.exists():
        includes = [ROOT / "csrc", Path(torch.__file__).parent / "include", sysconfig.get_path("include")]
        flags = ["-O0", "-std=c++17", "-fPIC", "-shared", *(f"-I{path}" for path in includes)]
        flags += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        unfinished = library.with_suffix(".part")
        run = subprocess.run([compiler, *flags, source, "-o", unfinished], capture_output=True, text=True)
        if run.returncode != 0:
            pytest.fail(f"{compiler} did not compile {source.name}, the binding of csrc/index.h:\n{run.stderr}")
        unfinished.replace(library)
    spec = importlib.util.spec_from_file_location("index_binding", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------- Haar pairs


def matrix(rows, columns, terms):
    """A matrix from its weights, row by row."""
    dense = np.zeros((rows, columns))
    for row in range(rows):
        for column, weight in terms(row):
            dense[row, column] += weight
    return dense


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_those_of_the_twin(mode, index):
    assert index.modes == len(MODES) and index.haar_edge(MODES.index(mode)) == reference.MODES[mode]


# PyWavelets refuses to reflect a single sample, and so do the operators before they come here.
@pytest.mark.parametrize(
    "mode, size", [(mode, size) for mode in MODES for size in SIZES if size > 1 or "reflect" not in mode]
)
def test_pairs_are_pywavelets(mode, size, index):
    number = MODES.index(mode)
    pairs = matrix(index.haar_size(size), size, lambda i: index.haar_pair(i, size, number))
    wanted = np.stack([pywt.dwt(row, "haar", mode)[0] for row in np.eye(size)], axis=1) * math.sqrt(2)
    np.testing.assert_allclose(pairs, wanted, atol=1e-12)


@pytest.mark.parametrize("size", [*SIZES, 100, 101])
@pytest.mark.parametrize("mode", range(len(MODES)), ids=MODES)
def test_users_are_the_transpose_of_pairs(mode, size, index):
    half = index.haar_size(size)
    pairs = matrix(half, size, lambda i: index.haar_pair(i, size, mode))
    users = matrix(size, half, lambda k: index.haar_users(k, size, mode))
    np.testing.assert_array_equal(users, pairs.T)


# ---------------------------------------------------------------------------------- signs and bits


@pytest.mark.parametrize("name", ["float", "double"])
def test_sign_codes_give_the_sign_back(name, index):
    code, value = getattr(index, f"sign_code_{name}"), getattr(index, f"signed_value_{name}")
    for d in (1.5, -1.5, 0.0, -0.0, 1e-30, -math.inf, math.inf):
        assert value(code(d), 3.0) == 3 * np.sign(d)
    assert math.isnan(value(code(math.nan), 3.0))
    assert math.isnan(value(code(0.0), math.inf))  # a gradient that is not finite stays visible


@pytest.mark.parametrize("name", ["float", "double"])
def test_ranges_clamp_as_torch_and_keep_nan(name, index):
    clamped, inside = getattr(index, f"clamped_{name}"), getattr(index, f"inside_{name}")
    for x, kept in ((-2.0, False), (-1.0, False), (-0.5, True), (0.5, False), (7.0, False)):
        assert clamped(x, -1, 0.5) == min(max(x, -1), 0.5) and inside(x, -1, 0.5) == kept
    assert math.isnan(clamped(math.nan, -1, 1)) and inside(math.nan, -1, 1)
    assert index.range_factor(-1, 1) == 0.5 and index.range_factor(0, 0) == 1


@settings(max_examples=30, deadline=None)
@given(codes=st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_packed_codes_and_bits_are_read_back(codes, index):
    packed = bytes(reference._pack(torch.tensor([codes]), 2)[0].tolist())
    assert [index.code_at(packed, j) for j in range(len(codes))] == codes
    bits = bytes(reference._pack(torch.tensor([codes]) > 1, 1)[0].tolist())
    assert [index.bit_at(bits, k) for k in range(len(codes))] == [code > 1 for code in codes]


@pytest.mark.parametrize("masks", [0, 1, 2])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 9), (2, 6, 16)], ids=str)
def test_kept_bytes_have_one_owner_each(size, masks, index):
    channels, height, width = size
    kept = index.Kept(channels, height, width, masks)
    assert kept.sample() == reference.packed_bytes(
        2, channels, (height + 1) // 2, (width + 1) // 2
    ) + masks * reference.packed_bytes(1, channels, height, width)
    owners = []
    for n in range(3):
        for c in range(channels):
            owners += [kept.sign_row(n, c, i) + b for i in range((height + 1) // 2) for b in range(kept.sign_bytes())]
            owners += [
                kept.mask_row(mask, n, c, r) + b
                for mask in range(masks)
                for r in range(height)
                for b in range(kept.mask_bytes())
            ]
    assert sorted(owners) == list(range(3 * kept.sample()))


def test_reductions_are_in_the_twins_order(index):
    wanted = {"mean": 3 * 40, "sum": 1, "none": 40}
    assert [index.divisor(number, 3, 40) for number in range(3)] == [wanted[name] for name in reference.REDUCTIONS]


# --------------------------------------------------------------------------------- views and tiles


def test_pixels_of_views_are_where_torch_puts_them(index):
    base = torch.arange(4 * 6 * 8 * 10).reshape(4, 6, 8, 10)
    for x in (base, base.contiguous(memory_format=torch.channels_last), base[:, 1:, 2:, ::3], base.transpose(2, 3)):
        memory = x.as_strided((x.untyped_storage().nbytes() // 8,), (1,), 0)
        for k in (0, 1, x.shape[3], x.shape[2] * x.shape[3] - 1):
            offset, flat, pixels, second = index.pixel(list(x.shape), list(x.stride()), k)
            assert memory[x.storage_offset() + offset] == x[0, 0].flatten()[k]
            assert memory[x.storage_offset() + second] == x[1, 1, 1, 1]
            assert pixels == x[0, 0].numel()
            assert flat == (x.stride(2) == x.shape[3] * x.stride(3))


def test_triangle_counts_row_by_row(index):
    tiles = ((i, j) for i in count() for j in range(i + 1))
    assert [index.triangle(t) for t in range(500)] == list(islice(tiles, 500))
