"""The CPU kernels built with AddressSanitizer and UBSan, or ThreadSanitizer, under the fuzzed calls of operators.py.

ThreadSanitizer knows nothing of what an OpenMP runtime that was built without it orders, so that for it the kernels'
parallel loops run on std::thread.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-include", str(Path(__file__).parent / "threads.h")],
}
LIBRARIES = {"address": ["libasan.so", "libubsan.so", "libstdc++.so.6"], "thread": ["libtsan.so", "libstdc++.so.6"]}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has until its end
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def build(kind: str, folder: Path) -> None:
    """A copy of the operators in ``folder`` with a library of that kind."""
    sources, package = folder / "csrc", folder / "rfsr_ext"
    shutil.copytree(ROOT / "csrc", sources)
    shutil.copytree(ROOT / "rfsr_ext/ops", package / "ops", ignore=shutil.ignore_patterns("_C_*", "_build_record.json"))
    (package / "__init__.py").touch()
    (folder / "tests/soak").mkdir(parents=True)
    shutil.copy(ROOT / "tests/soak/operators.py", folder / "tests/soak")
    if kind == "thread":
        for path in (sources / "cpu").iterdir():
            path.write_text(path.read_text().replace("torch::stable::parallel_for(", "soak::parallel_for("))
    root = Path(torch.__file__).parent
    command = ["g++", "-O1", "-g", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=fast", *FLAGS[kind]]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{root / 'include'}"]
    command += [str(sources / "cpu" / name) for name in ("haar.cpp", "gram.cpp")]
    command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-o", str(package / "ops/_C_cpu.so")]
    subprocess.run(command, check=True, capture_output=True, text=True)


def found(library: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={library}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def run_calls(first: int, last: int, before: str, python: list[str], folder: Path, environment: dict[str, str]) -> None:
    """The fuzzed calls in a process of their own, once a line of Python has said that it is as it should be.

    Raises:
        AssertionError: with what it printed, if one of the two fails.
    """
    for arguments in (["-c", before], ["-m", "tests.soak.operators", str(first), str(last)]):
        command, variables = [*python, *arguments], os.environ | environment
        ended = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-1500:] or ended.stdout[-1500:]


def run(kind: str, first: int, last: int) -> None:
    """The fuzzed calls from ``first`` to ``last`` under a sanitizer.

    Raises:
        AssertionError: with what it found, or if the calls did not reach its library.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(kind, folder)
        environment = OPTIONS | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        environment["LD_PRELOAD"] = " ".join(map(found, LIBRARIES[kind]))
        served = "from rfsr_ext.ops import build_info; assert build_info()['devices']['cpu']['backend'] == 'native'"
        # without random addresses, for which ThreadSanitizer has no room
        python = ["setarch", platform.machine(), "-R", sys.executable]
        run_calls(first, last, served, python, folder, environment)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
