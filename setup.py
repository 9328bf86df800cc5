"""Builds the compiled libraries; everything that is plain metadata is in pyproject.toml.

Two libraries, ``rfsr_ext/ops/_C_cpu.so`` and ``_C_cuda.so``, compiled by ``torch.utils.cpp_extension`` against
the LibTorch stable ABI. They are not Python modules (``torch.ops.load_library`` opens them), so one build
serves every Python and every torch from 2.11 on. If something is missing or a compilation fails, the
install goes on without that library, says so in a sentence, and notes it in ``_build_record.json`` for
``rfsr_ext.build_info()``.

Environment:
    RFSR_REQUIRE_EXT=1   a library that could be built but fails stops the install (for developers and CI)
    RFSR_CUDA=0          leave the CUDA library out
    TORCH_CUDA_ARCH_LIST GPU architectures; default "8.0;9.0+PTX": A100 and H100 code, and PTX that newer GPUs compile
    CUDA_HOME, CXX, MAX_JOBS as usual
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import toolchain  # noqa: E402

TARGET = "0x020b000000000000"  # torch 2.11, the oldest the libraries load on
ARCHS, OLDEST = "8.0;9.0+PTX", (8, 0)
RETRY = "then repeat 'pip install -e .'"


def note(why: str, remedy: str | None = None, **details) -> dict:
    return {"why": why, "remedy": remedy, **details}


def cpu_extension(torch_root: Path) -> Extension | dict:
    if sys.platform == "win32":
        return note("the C++ sources have no Windows port yet", "use Linux or macOS for the compiled operators")
    if toolchain.find_cxx() is None:
        return note("no C++ compiler was found", f"install a C++17 compiler such as g++, {RETRY}")
    return Extension(
        "rfsr_ext.ops._C_cpu",
        sources=["csrc/cpu/haar.cpp", "csrc/cpu/gram.cpp"],
        include_dirs=[str(torch_root / "include")],
        library_dirs=[str(torch_root / "lib")],
        libraries=["torch_cpu"],
        # No -ffast-math: NaN must stay NaN and sums must keep their order. Contracting a*b+c is neither.
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-std=c++17", "-ffp-contract=fast", f"-DTORCH_TARGET_VERSION={TARGET}"]
        },
        language="c++",
        optional=True,
    )


def cuda_extension(torch_root: Path, torch_cuda: str | None) -> Extension | dict:
    if os.environ.get("RFSR_CUDA") == "0":
        return note("RFSR_CUDA=0 was set at install", f"unset RFSR_CUDA, {RETRY}")
    if torch_cuda is None:
        return note("the installed torch was built without CUDA", f"install a CUDA build of torch, {RETRY}")
    if sys.platform == "win32" or toolchain.find_cxx() is None:
        return note("no usable C++ compiler was found", f"install a C++17 compiler such as g++, {RETRY}")
    major = torch_cuda.partition(".")[0]
    toolkits = toolchain.cuda_toolkits()
    fitting = [t for t in toolkits if t.version.partition(".")[0] == major]
    if not fitting:
        found = ", ".join(f"{t.version} in {t.home}" for t in toolkits)
        why = f"only CUDA {found} was found and torch uses CUDA {torch_cuda}" if found else "nvcc was not found"
        return note(why, f"pip install 'cuda-toolkit[nvcc,cudart,cccl]=={torch_cuda}.*' or set CUDA_HOME, {RETRY}")
    gpus = [] if "TORCH_CUDA_ARCH_LIST" in os.environ else toolchain.gpu_capabilities()
    if gpus and max(gpus) < OLDEST:
        capability = ".".join(map(str, max(gpus)))
        why = f"the GPU here has compute capability {capability} and the kernels need 8.0 (A100, RTX 30) or newer"
        return note(why, f"set TORCH_CUDA_ARCH_LIST to build for the GPU of another machine, {RETRY}")
    toolkit = fitting[0]
    # cpp_extension reads both when it is imported or when it compiles, so they are set before either.
    os.environ["CUDA_HOME"] = str(toolkit.home)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHS)
    return Extension(
        "rfsr_ext.ops._C_cuda",
        sources=["csrc/cuda/haar.cu", "csrc/cuda/gram.cu"],
        include_dirs=[str(torch_root / "include"), str(toolkit.home / "include")],
        library_dirs=[str(torch_root / "lib"), *toolkit.library_dirs()],
        # The runtime is linked in: no libcudart of one CUDA version is asked for when another is there.
        libraries=["torch_cpu", "cudart_static", "rt", "pthread", "dl"],
        extra_compile_args={
            "cxx": [],
            "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-DTORCH_TARGET_VERSION={TARGET}"],
        },
        language="c++",
        optional=True,
    )


def plan() -> tuple[list[Extension], dict]:
    """Extensions to build, and notes on those that cannot be."""
    if not toolchain.expose_torch():
        missing = note("torch 2.11 or newer was not found at install", f"pip install 'torch>=2.11', {RETRY}")
        return [], {"cpu": missing, "cuda": missing}
    import torch

    root = Path(torch.__file__).parent
    planned = {"cpu": cpu_extension(root), "cuda": cuda_extension(root, torch.version.cuda)}
    return [x for x in planned.values() if isinstance(x, Extension)], {
        device: x for device, x in planned.items() if isinstance(x, dict)
    }


def build_ext_command(notes: dict) -> type:
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        def __init__(self, *args, **kwargs):
            # These are no Python modules, so their names carry no Python version. Ninja would read a $ or a quotation
            # mark in a path as something else; without it files are compiled one after another.
            plain = not set("$\"'") & set(f"{ROOT}{torch.__file__}")
            super().__init__(*args, **{**kwargs, "no_python_abi_suffix": True, "use_ninja": plain})

        def run(self):
            self.force = True  # setuptools does not see that a header has changed; `reuse` does
            self.record = dict(notes)
            self.previous = read_record()
            super().run()
            folder = ROOT / "rfsr_ext/ops" if self.inplace else Path(self.build_lib) / "rfsr_ext/ops"
            folder.mkdir(parents=True, exist_ok=True)
            for device, entry in self.record.items():
                if not entry.get("built"):
                    print(f"rfsr_ext: no {device} library because {entry['why']}; {entry['remedy']}.", file=sys.stderr)
                    (folder / f"_C_{device}.so").unlink(missing_ok=True)  # never serve a stale one
            (folder / "_build_record.json").write_text(json.dumps(self.record, indent=2) + "\n")

        def build_extensions(self):
            # One at a time: a CUDA toolkit that refuses the host compiler must not take the CPU library along.
            planned, hooks = self.extensions, (self.compiler.compile, self.compiler._compile)
            for extension in planned:
                self.extensions = [extension]
                self.compiler.compile, self.compiler._compile = hooks
                device = extension.name.rpartition("_")[2]
                key, start = fingerprint(extension), time.monotonic()
                if self.reuse(extension, device, key):
                    self.record[device] = self.previous[device]
                    continue
                try:
                    super().build_extensions()
                except (Exception, SystemExit) as error:
                    if os.environ.get("RFSR_REQUIRE_EXT") == "1":
                        raise
                    reason = str(error).strip().partition("\n")[0][:300]
                    self.record[device] = note(
                        f"compiling it failed ({reason})",
                        "name another compiler by CC and CXX, "
                        "or see 'RFSR_REQUIRE_EXT=1 pip install -v -e .' for the compiler's words",
                    )
                else:
                    self.record[device] = describe(extension, device, key, time.monotonic() - start)
            self.extensions = planned

        def reuse(self, extension, device, key):
            """Takes the library of the last build when nothing it depends on has changed."""
            built = ROOT / "rfsr_ext/ops" / f"_C_{device}.so"
            if self.previous.get(device, {}).get("key") != key or not built.is_file():
                return False
            inplace, self.inplace = self.inplace, 0
            target = Path(self.get_ext_fullpath(extension.name))
            self.inplace = inplace
            if target.resolve() != built:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(built, target)
            return True

    return BuildLibraries


def read_record() -> dict:
    try:
        return json.loads((ROOT / "rfsr_ext/ops/_build_record.json").read_text())
    except (OSError, ValueError):
        return {}


def compilers(device: str) -> str:
    words = [toolchain.first_line(toolchain.find_cxx(), "--version")]
    if device == "cuda":
        words.append(f"nvcc {toolchain.CudaToolkit(Path(os.environ['CUDA_HOME']), '').nvcc}")
    return ", ".join(words)


def fingerprint(extension: Extension) -> str:
    """Changes whenever the library would: sources, flags, compilers, architectures, torch's headers."""
    import torch

    device = extension.name.rpartition("_")[2]
    digest = hashlib.sha256()
    sources = (p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp"))
    for path in [Path(__file__), *sorted(sources)]:
        digest.update(path.read_bytes())
    parts = [
        extension.extra_compile_args,
        extension.libraries,
        compilers(device),
        torch.__version__,
        platform.machine(),
    ]
    parts.append(os.environ.get("TORCH_CUDA_ARCH_LIST") if device == "cuda" else None)
    digest.update(repr(parts).encode())
    return digest.hexdigest()


def describe(extension: Extension, device: str, key: str, seconds: float) -> dict:
    import torch

    language = "nvcc" if device == "cuda" else "cxx"
    details = {
        "built": True,
        "torch": torch.__version__,
        "compiler": compilers(device),
        "flags": list(extension.extra_compile_args[language]),
        "seconds": round(seconds, 1),
        "key": key,
    }
    if device == "cuda":
        details["architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"]
    return note(f"it was compiled with {details['compiler']}", None, **details)


def wheel_command() -> type:
    from setuptools.command.bdist_wheel import bdist_wheel

    class Wheel(bdist_wheel):
        def get_tag(self):
            # Libraries without a Python ABI: any Python 3 on this platform.
            return ("py3", "none", super().get_tag()[2])

    return Wheel


def main() -> None:
    # Metadata hooks need no torch: importing it there would cost seconds for nothing.
    if {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        return setup()
    extensions, notes = plan()
    if extensions:
        return setup(
            ext_modules=extensions, cmdclass={"build_ext": build_ext_command(notes), "bdist_wheel": wheel_command()}
        )
    for device, entry in notes.items():
        print(f"rfsr_ext: no {device} library because {entry['why']}; {entry['remedy']}.", file=sys.stderr)
    (ROOT / "rfsr_ext/ops/_build_record.json").write_text(json.dumps(notes, indent=2) + "\n")
    setup()


main()
