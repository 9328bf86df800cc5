"""Installs the package into fresh environments and asserts what serves there, and why.

    python tests/packaging/install_matrix.py                    # the light rows
    python tests/packaging/install_matrix.py two-torches uv     # rows by name
    python tests/packaging/install_matrix.py all

Light rows see the packages of the interpreter that runs this; heavy ones download PyTorch, gigabytes of it, or compile
CUDA for minutes. Every row installs a copy of the sources by plain ``pip install -e .``, isolation on and no flags,
except where its line says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import traceback
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "2.11"

PROBE = """
import json, torch, rfsr_ext
a, b = torch.arange(15.0).reshape(1, 1, 3, 5).requires_grad_(), torch.ones(1, 1, 3, 5)
haar, gram = rfsr_ext.haar_ll_l1_loss(a, 0 * b), rfsr_ext.gram_loss(a, b)
(haar + gram).backward()
info = rfsr_ext.build_info()
print(json.dumps({"file": rfsr_ext.__file__, "torch": torch.__version__, "cuda_version": torch.version.cuda,
                  "haar": haar.item(), "gram": gram.item(), "finite": a.grad.isfinite().all().item(),
                  **info["devices"]}))
"""


class Skip(Exception):
    """Why a row cannot be run here."""


class Environment:
    """A fresh virtual environment with a copy of the sources beside it."""

    def __init__(self, folder: Path, ambient: bool, name: str = ".venv"):
        """``ambient`` lets it see the packages of this interpreter. uv finds it by its name and place."""
        self.tree, self.venv = folder / "sources", folder / "sources" / name
        if not self.tree.exists():
            unwanted = shutil.ignore_patterns("*.so", "_build_record.json", "__pycache__", "build", ".*", "*.egg-info")
            shutil.copytree(ROOT, self.tree, ignore=unwanted)
        venv.create(self.venv, with_pip=True)
        self.python = self.venv / "bin/python"
        self.variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "RFSR_CUDA")}
        self.variables |= {"RFSR_CUDA": "0", "MAX_JOBS": "1"}  # compiling CUDA takes minutes; a row may ask for it
        if ambient:
            (self.packages / "ambient.pth").write_text(sysconfig.get_path("purelib") + "\n")

    @property
    def packages(self) -> Path:
        return self.venv / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"

    def run(self, *command, prefix=()) -> str:
        run = subprocess.run(
            [*prefix, *map(str, command)], cwd=self.tree, env=self.variables, capture_output=True, text=True
        )
        output = run.stdout + run.stderr
        if run.returncode and re.search(r"No matching distribution|ConnectionError|resolve host", output):
            raise Skip("the package index cannot be reached or does not have what the row needs")
        assert run.returncode == 0, f"{' '.join(map(str, command))}:\n{output[-3000:]}"
        return output

    def pip(self, *arguments, prefix=()) -> str:
        return self.run(self.python, "-m", "pip", "install", "-v", *arguments, prefix=prefix)

    def hide_toolkits(self, folder: Path) -> list[str]:
        """Commands prefixed with this find no CUDA toolkit: not by the environment, not in a well-known place."""
        for name in ("CUDA_HOME", "CUDA_PATH", "RFSR_CUDA"):
            self.variables.pop(name, None)
        paths = self.variables["PATH"].split(":")
        self.variables["PATH"] = ":".join(p for p in paths if not (Path(p) / "nvcc").exists())
        empty = folder / "empty"
        empty.mkdir()
        # Toolkits in well-known places are covered up, for this row's processes alone.
        cover = [f"mount --bind {empty} {toolkit.home / 'bin'}" for toolkit in toolchain().cuda_toolkits()]
        if not cover:
            return []
        prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", " && ".join([*cover, 'exec "$@"']), "sh"]
        if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
            raise Skip("there is a CUDA toolkit, and this user may not cover it up with a mount")
        return prefix

    def record(self) -> dict:
        """What the build noted beside the libraries."""
        return json.loads((self.tree / "rfsr_ext/ops/_build_record.json").read_text())

    def probe(self, installed: Path | None = None) -> dict:
        """``build_info()`` here, after both losses have run and given what they should.

        The package is imported from the sources, or from the folder ``installed`` where they are out of sight.
        """
        isolated = ["-P"] if installed else []  # leaves the folder it runs in, the sources, off sys.path
        found = json.loads(self.run(self.python, *isolated, "-c", PROBE).splitlines()[-1])
        assert Path(found["file"]) == (installed or self.tree) / "rfsr_ext/__init__.py", found["file"]
        assert math.isclose(found["haar"], 103 / 6, rel_tol=1e-5), found["haar"]
        assert math.isclose(found["gram"], (1015 / 15 - 1) ** 2, rel_tol=1e-5), found["gram"]
        assert found["finite"]
        return found

    def assert_reported(self, found: dict, device: str, backend: str, why: str, remedy: str | None) -> None:
        """``build_info()`` says so, and ``rfsr doctor`` says the same."""
        served = found[device]
        assert served["backend"] == backend and why in served["why"], served
        assert remedy in served["remedy"] if remedy else served["remedy"] is None, served
        report = self.run(self.python, "-m", "rfsr_ext", "doctor")
        assert f"{backend}: {served['why']}" in report, report

    def assert_native(self, found: dict, device: str = "cpu") -> Path:
        """The compiled library serves and names nothing of PyTorch's C++ ABI."""
        assert found[device]["backend"] == "native", found[device]
        library = Path(found[device]["library"])
        assert library.is_relative_to(self.tree)
        if shutil.which("nm"):
            symbols = self.run("nm", "-D", "--undefined-only", library)
            assert "torch_call_dispatcher" in symbols  # the stable shims: the list is not empty
            unstable = [name for name in symbols.split() if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]
            assert not unstable, unstable
        return library


def toolchain():
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "build_backend/toolchain.py")
    module = sys.modules["toolchain"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc_fits():
    """A toolkit whose major version is that of this interpreter's torch, or None."""
    import torch

    major = (torch.version.cuda or "").partition(".")[0]
    return next((t for t in toolchain().cuda_toolkits() if t.version.partition(".")[0] == major), None)


# --------------------------------------------------------------------------------------- light rows


def no_compiler(folder: Path) -> None:
    """PATH holds nothing but the environment: PyTorch serves, and the report says what to install."""
    env = Environment(folder, ambient=True)
    for name in ("CXX", "CC", "CUDA_HOME", "CUDA_PATH", "RFSR_CUDA"):
        env.variables.pop(name, None)
    env.variables["PATH"] = str(env.venv / "bin")
    env.pip("--no-deps", "-e", ".")
    found = env.probe()
    env.assert_reported(found, "cpu", "reference", "no C++ compiler was found", "install a C++17 compiler")
    if found["cuda_version"]:
        env.assert_reported(found, "cuda", "reference", "no usable C++ compiler was found", "install a C++17 compiler")


def no_nvcc(folder: Path) -> None:
    """A CUDA build of torch and no toolkit: the CPU library serves, and the report says how to get nvcc."""
    env = Environment(folder, ambient=True)
    prefix = env.hide_toolkits(folder)
    env.pip("--no-deps", "-e", ".", prefix=prefix)
    found = env.probe()
    env.assert_native(found)
    if found["cuda_version"] is None:
        raise Skip("torch was built without CUDA, which says so before it looks for nvcc")
    env.assert_reported(found, "cuda", "reference", "nvcc was not found", "pip install 'cuda-toolkit[nvcc")


def uv(folder: Path) -> None:
    """``uv pip install -e .``, which builds in an interpreter of its own, compiles against the torch that is there."""
    env = Environment(folder, ambient=True)
    env.pip("uv")
    output = env.run(env.venv / "bin/uv", "pip", "install", "-v", "--no-deps", "--python", env.python, "-e", ".")
    assert "Selecting: torch==" not in output, output[-3000:]
    env.assert_native(env.probe())


def again(folder: Path) -> None:
    """The CPU library compiles within a minute; a second install with nothing changed compiles nothing."""
    env = Environment(folder, ambient=True)
    env.pip("--no-deps", "-e", ".")
    library, record = env.assert_native(env.probe()), env.record()
    assert record["cpu"]["seconds"] <= 60, record["cpu"]["seconds"]
    print(f"{'':14s} CPU library: {record['cpu']['seconds']} s on one core")
    built = library.stat().st_mtime_ns
    output = env.pip("--no-deps", "-e", ".")
    assert "haar.cpp" not in output and (library.stat().st_mtime_ns, env.record()) == (built, record), output[-3000:]


def wheel(folder: Path) -> None:
    """``pip install .`` and an sdist both bring the library, the presets and the weights."""
    env = Environment(folder, ambient=True)
    tracked = [p.relative_to(env.tree) for p in (env.tree / "rfsr_ext").rglob("*") if p.is_file()]
    env.pip("build")
    env.run(env.python, "-m", "build", "--sdist")
    for source in (".", next((env.tree / "dist").glob("*.tar.gz"))):
        env.pip("--no-deps", "--force-reinstall", source)
        env.assert_native(env.probe(installed=env.packages))
        missing = [str(p) for p in tracked if not (env.packages / p).is_file()]
        assert not missing, f"from {source}: {missing} are missing"
        assert not list(env.packages.glob("*backend*")), "what only builds the package was installed"
        env.run(env.python, "-P", "-m", "rfsr_ext", "doctor")


def wrong_cuda(folder: Path) -> None:
    """A toolkit of another major version than torch's CUDA is named and left alone; the CPU library serves."""
    env = Environment(folder, ambient=True)
    prefix = env.hide_toolkits(folder)
    home = folder / "cuda-7.5"
    for place in ("bin/nvcc", "include/cuda_runtime.h"):
        (home / place).parent.mkdir(parents=True)
        (home / place).write_text("#!/bin/sh\necho Cuda compilation tools, release 7.5, V7.5.17\n")
    (home / "bin/nvcc").chmod(0o755)
    env.variables["CUDA_HOME"] = str(home)
    env.pip("--no-deps", "-e", ".", prefix=prefix)
    found = env.probe()
    env.assert_native(found)
    if found["cuda_version"] is None:
        raise Skip("torch was built without CUDA, which says so before it looks for a toolkit")
    env.assert_reported(found, "cuda", "reference", f"only CUDA 7.5 in {home} was found", "cuda-toolkit[nvcc")


def new_gcc(folder: Path) -> None:
    """A g++ that says it is newer than nvcc knows: the CPU library serves, and the report says what nvcc wants."""
    if not nvcc_fits():
        raise Skip("there is no nvcc of torch's CUDA")
    env = Environment(folder, ambient=True)
    env.variables.pop("RFSR_CUDA")
    (folder / "bin").mkdir()
    for name in ("g++", "gcc"):
        compiler = folder / "bin" / name
        compiler.write_text(f'#!/bin/sh\n[ "$1" = -dumpfullversion ] && echo 99.1.0 && exit\nexec {name} "$@"\n')
        compiler.chmod(0o755)
    env.variables |= {"CXX": str(folder / "bin/g++"), "CC": str(folder / "bin/gcc")}
    env.pip("--no-deps", "-e", ".")
    found = env.probe()
    env.assert_native(found)
    env.assert_reported(found, "cuda", "reference", "99.1.0", "CXX")


# --------------------------------------------------------------------------------------- heavy rows


def no_torch(folder: Path) -> None:
    """An empty environment: the build asks for a torch of its own, and its library runs on the one then installed.

    Nothing but torch and what it needs comes along: both losses run, and the command line says what it lacks.
    """
    env = Environment(folder, ambient=False)
    env.pip("-e", ".")
    found = env.probe()
    env.assert_native(found)
    listed = {x["name"].lower() for x in json.loads(env.run(env.python, "-m", "pip", "list", "--format=json"))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    train = {re.match(r"[\w-]+", line)[0].lower() for line in project["optional-dependencies"]["train"]}
    assert "torch" in listed and not listed & (train | {"pybind11", "ninja"}), listed
    print(f"{'':14s} brings {' '.join(sorted(listed))}")
    rfsr = subprocess.run([env.venv / "bin/rfsr", "doctor"], env=env.variables, capture_output=True, text=True)
    assert rfsr.returncode == 1 and rfsr.stderr.count("\n") == 1, rfsr
    assert rfsr.stderr.endswith("pip install 'rfsr_ext[train]'\n"), rfsr.stderr


def torch_present(folder: Path) -> None:
    """A torch older than the newest is there: it is compiled against, and no other is fetched, by `train` neither."""
    env = Environment(folder, ambient=False)
    env.pip(f"torch=={OLDEST}.*")
    output = env.pip("-e", ".[train]")
    fetched = re.findall(r"(?:Collecting|Downloading) torch[<>=~!; -].*", output)
    assert not fetched, fetched
    found = env.probe()
    assert found["torch"].startswith(f"{OLDEST}.")
    env.assert_native(found)
    env.assert_reported(found, "cpu", "native", "it was compiled with", None)


def two_torches(folder: Path) -> None:
    """The libraries built with the torch of this interpreter, also for CUDA if nvcc is here, run on the oldest too."""
    newest = Environment(folder, ambient=True)
    newest.variables.pop("RFSR_CUDA")
    newest.variables["TORCH_CUDA_ARCH_LIST"] = "9.0"
    newest.pip("--no-deps", "-e", ".")
    found = newest.probe()
    devices = ("cpu", "cuda") if nvcc_fits() else ("cpu",)
    built = {library: library.read_bytes() for library in (newest.assert_native(found, d) for d in devices)}
    oldest = Environment(folder, ambient=False, name=".venv-oldest")
    oldest.pip(f"torch=={OLDEST}.*", "numpy")
    oldest.variables["PYTHONPATH"] = str(oldest.tree)
    again = oldest.probe()
    assert found["torch"] != again["torch"] and again["torch"].startswith(f"{OLDEST}."), again["torch"]
    assert [oldest.assert_native(again, device) for device in devices] == list(built)
    assert all(library.read_bytes() == bits for library, bits in built.items())


def cuda(folder: Path) -> None:
    """An nvcc that is a wrapper script on PATH compiles for the one GPU asked for, and PTX, within three minutes."""
    toolkit = nvcc_fits()
    if not toolkit:
        raise Skip("there is no nvcc of torch's CUDA")
    env = Environment(folder, ambient=True)
    for name in ("CUDA_HOME", "CUDA_PATH", "RFSR_CUDA"):
        env.variables.pop(name, None)
    (folder / "bin").mkdir()
    (folder / "bin/nvcc").write_text(f'#!/bin/sh\nexec {toolkit.nvcc} "$@"\n')
    (folder / "bin/nvcc").chmod(0o755)
    env.variables["PATH"] = f"{folder / 'bin'}:{env.variables['PATH']}"
    assert_cuda(env, archs=(90,))


def pip_cuda(folder: Path) -> None:
    """No toolkit but pip's, of torch's own CUDA version, compiles for several GPUs."""
    env = Environment(folder, ambient=True)
    prefix = env.hide_toolkits(folder)
    version = env.run(env.python, "-c", "import torch; print(torch.version.cuda or '')").strip()
    if not version:
        raise Skip("torch was built without CUDA")
    env.pip("--ignore-installed", f"cuda-toolkit[nvcc,cudart,cccl]=={version}.*")
    assert_cuda(env, archs=(80, 90, 120), prefix=prefix)


def assert_cuda(env: Environment, archs: tuple[int, ...], prefix=()) -> None:
    """Within three minutes both libraries are there: code for the GPUs asked for, PTX for the last, no spills."""
    env.variables["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{arch / 10:.1f}" for arch in archs) + "+PTX"
    env.variables |= {"NVCC_APPEND_FLAGS": "-Xptxas -v", "MAX_JOBS": "2"}
    output = env.pip("--no-deps", "-e", ".", prefix=prefix)
    wanted = {(f"compute_{arch}", f"sm_{arch}") for arch in archs} | {(f"compute_{archs[-1]}",) * 2}
    compiled = set(re.findall(r"-gencode=arch=(\w+),code=(\w+)", output))
    assert compiled == wanted, compiled
    assert set(re.findall(r"(\d+) bytes spill", output)) == {"0"}, "ptxas -v shows spills, or nothing"
    found, record = env.probe(), env.record()["cuda"]
    for device in ("cpu", "cuda"):
        env.assert_native(found, device)
    assert record["seconds"] <= 180, record["seconds"]
    print(f"{'':14s} CUDA library: {record['seconds']} s by {record['compiler']}")


LIGHT = {
    "no-compiler": no_compiler,
    "no-nvcc": no_nvcc,
    "wrong-cuda": wrong_cuda,
    "new-gcc": new_gcc,
    "uv": uv,
    "again": again,
    "wheel": wheel,
}
HEAVY = {
    "no-torch": no_torch,
    "torch-present": torch_present,
    "two-torches": two_torches,
    "cuda": cuda,
    "pip-cuda": pip_cuda,
}


def main() -> int:
    rows = LIGHT | HEAVY
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*rows, "all", []], help=f"default: {' '.join(LIGHT)}")
    names = parser.parse_args().rows or LIGHT
    failed = 0
    for name in rows if "all" in names else names:
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows[name](Path(folder).resolve())
            outcome = "ok"
        except Skip as reason:
            outcome = f"skipped: {reason}"
        except AssertionError as error:
            outcome, failed = f"FAILED: {error or traceback.format_exc()}", failed + 1
        print(f"{name:14s} {time.monotonic() - start:5.0f} s  {outcome}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
