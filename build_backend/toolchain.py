"""What this machine can compile with: a C++ compiler, a CUDA toolkit, a torch with headers.

Used by setup.py. Imports nothing but the standard library, so that it also works in an isolated build
before torch has been found.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 11)


def version_tuple(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``"2.15.0+cu132" -> (2, 15, 0)``. Compared as numbers, so 2.9 < 2.11."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


# ------------------------------------------------------------------------------------------- torch


def torch_folders() -> list[Path]:
    """Folders of installed packages that may hold the user's torch, nearest first.

    An isolated build hides them, yet it runs on the interpreter of the environment that is being installed
    into (pip) or from the source folder next to ``.venv`` (uv), so both places are still known.
    """
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folders = [os.environ.get("RFSR_TORCH_DIR"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += [folder / ".venv/lib" / python / "site-packages" for folder in (Path.cwd(), *Path.cwd().parents)]
    if os.environ.get("VIRTUAL_ENV"):
        folders.append(Path(os.environ["VIRTUAL_ENV"]) / "lib" / python / "site-packages")
    folders += site.getsitepackages()
    if site.ENABLE_USER_SITE is not False:
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(Path(f) for f in folders if f and Path(f).is_dir()))


def expose_torch() -> bool:
    """Makes the user's torch importable, behind everything already on ``sys.path``. True if there is one."""
    import importlib.metadata
    import importlib.util

    for folder in [None, *torch_folders()]:
        before = list(sys.path)
        if folder is not None:
            site.addsitedir(str(folder))  # follows .pth files, as the interpreter itself would
        if importlib.util.find_spec("torch") is not None:
            try:
                if version_tuple(importlib.metadata.version("torch")) >= MIN_TORCH:
                    return True
            except importlib.metadata.PackageNotFoundError:
                pass
        sys.path[:] = before
        importlib.invalidate_caches()
    return False


# --------------------------------------------------------------------------------------- compilers


def find_cxx() -> str | None:
    """Path of the C++ compiler that setuptools would call, or None."""
    named = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    for name in (named.split()[0], "c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    return None


def first_line(*command: str) -> str:
    """First line a command prints; empty if it cannot run."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return output.partition("\n")[0]


@dataclass(frozen=True)
class CudaToolkit:
    home: Path
    version: str  # "13.0"

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    def library_dirs(self) -> list[str]:
        folders = [self.home / "lib64", self.home / "lib", *self.home.glob("targets/*/lib")]
        return [str(f) for f in folders if list(f.glob("libcudart_static*"))][:1]


def cuda_toolkits() -> list[CudaToolkit]:
    """Toolkits with nvcc, in order of preference. Decided by files, not by a visible GPU."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        homes += [Path(nvcc).resolve().parent.parent, _home_by_dryrun(nvcc)]
    homes.append("/usr/local/cuda")
    for folder in torch_folders() + [Path(p) for p in sys.path if p]:
        homes += sorted(folder.glob("nvidia/cu[0-9]*"), reverse=True)  # pip's cuda-toolkit[nvcc]
    found = {}
    for home in homes:
        if not home:
            continue
        home = Path(home).resolve()
        if home in found or not (home / "include/cuda_runtime.h").is_file() or not (home / "bin/nvcc").is_file():
            continue
        if version := _nvcc_version(home / "bin/nvcc"):
            found[home] = CudaToolkit(home, version)
    return list(found.values())


def _nvcc_version(nvcc: Path) -> str | None:
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"release (\d+\.\d+)", output)
    return match.group(1) if match else None


def _home_by_dryrun(nvcc: str) -> Path | None:
    """Where an nvcc on PATH lives when it is a wrapper script: the real one names its folder in a dry run."""
    try:
        run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
    return Path(match.group(1).strip()) if match else None


def gpu_capabilities() -> list[tuple[int, ...]]:
    """Compute capabilities of the GPUs here, such as ``(7, 5)``, as the driver lists them; empty without one."""
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [version for line in output.splitlines() if (version := version_tuple(line.strip()))]
