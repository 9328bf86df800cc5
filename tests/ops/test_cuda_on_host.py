"""The CUDA kernels, run on the host: their indices, edges and sums are tested where there is no GPU too.

The sources are compiled as C++ with another launch.cuh, which runs a block's threads as fibers in changing order, and
another instructions.cuh, which copies as early or as late as it may and multiplies from the registers PTX names. What a
GPU stops at, such as 16 bytes that are not aligned, stops here too. They are registered for the CPU in a copy of the
package. A copy of the ordinary operator tests then runs against it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VALUES = [(3, 5, 7), (17, 4, 65), (70, 9, 1)]  # of test_gram.py's: a tile in part, more than one stage, larger tiles
TESTS = [
    *[f"test_gram.py::test_values_match_fp64[cpu-{shape}-{dtype}]" for shape in VALUES for dtype in DTYPES],
    "test_gram.py::test_values_match_fp64[cpu-(1, 65, 66)-torch.bfloat16]",  # ranges that several threads add up
    "test_gram.py::test_wide_layers_of_aligned_planes",
    "test_gram.py::test_fp32_products_keep_what_one_rounding_keeps",
    "test_gram.py::test_layer_norm_keeps_its_digits_under_a_large_mean",
    "test_gram.py::test_large_half_activations_stay_finite",
    "test_gram.py::test_close_features_keep_their_difference",
    "test_gram.py::test_equal_features_have_gradient_zero",
    "test_gram.py::test_gradients_match_the_twin",
    "test_gram.py::test_nan_in_is_nan_out",
    "test_gram.py::test_poisoned_outputs_and_workspaces_are_overwritten",
    "test_haar.py::test_haar_ll_is_pywavelets",
    "test_haar.py::test_loss_is_the_mean_distance_of_the_bands",
    "test_haar.py::test_any_mode_level_range_and_reduction",
    "test_haar.py::test_gradients_of_every_option",
    "test_haar.py::test_gradients_of_every_mode_and_dtype",
    "test_haar.py::test_modes_match_finite_differences",
    "test_haar.py::test_nan_stays_where_the_mode_does_not_look",
    "test_haar.py::test_every_byte_of_the_outputs_is_written",
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_cuda_kernels_pass_the_operator_tests_on_the_host(tmp_path):
    sources, package = tmp_path / "csrc", tmp_path / "rfsr_ext"
    shutil.copytree(ROOT / "csrc", sources)
    shutil.copytree(ROOT / "tests/ops/cuda_on_host", sources / "cuda", dirs_exist_ok=True)
    shutil.copytree(ROOT / "rfsr_ext/ops", package / "ops", ignore=shutil.ignore_patterns("_C_*", "_build_record.json"))
    (package / "__init__.py").touch()
    kernels = [sources / "cuda/haar.cu", sources / "cuda/gram.cu"]
    for kernel in kernels:
        text = kernel.read_text()
        assert "(rfsr_ext, CUDA, m)" in text
        kernel.write_text(text.replace("(rfsr_ext, CUDA, m)", "(rfsr_ext, CPU, m)"))

    root = Path(torch.__file__).parent
    flags = [
        "-O1",
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-Wno-unknown-pragmas",
        "-U_FORTIFY_SOURCE",  # which takes a jump to another fiber for a mistake
        "-fsanitize=undefined",  # alignment above all, which a CPU does not ask for
        "-fno-sanitize-recover=undefined",
    ]
    library = package / "ops/_C_cpu.so"
    command = ["g++", *flags, f"-I{root / 'include'}", "-x", "c++", *kernels, "-x", "none"]
    command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-o", library]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    check = "from rfsr_ext.ops import build_info; print(build_info()['devices']['cpu']['library'])"
    served = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert served.stdout.strip() == str(library), served.stderr

    tests = tmp_path / "tests"  # copied too: this project's pytest settings would put the real package first
    shutil.copytree(ROOT / "tests/ops", tests / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/conftest.py", tests)
    (tests / "pytest.ini").write_text("[pytest]\nmarkers =\n  cuda: GPU\n  slow: long\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--durations=6",
        "-m",
        "not slow and not cuda",
        *[f"ops/{name}" for name in TESTS],
    ]
    run = subprocess.run(command, cwd=tests, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
