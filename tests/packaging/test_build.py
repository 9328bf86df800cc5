"""What is built, and what happens where it cannot be."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load_toolchain():
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "build_backend/toolchain.py")
    module = sys.modules["toolchain"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load_toolchain()


def libraries():
    return sorted((ROOT / "rfsr_ext/ops").glob("_C_*.so"))


# ---------------------------------------------------------------------------------- the libraries


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_libraries_name_no_unstable_torch_symbol():
    if not libraries():
        pytest.skip("no library was built")
    for library in libraries():
        symbols = subprocess.run(["nm", "-DC", "--undefined-only", library], capture_output=True, text=True).stdout
        assert "torch_call_dispatcher" in symbols  # the stable shims are there, so the list is not empty
        assert not re.findall(r"\b(?:at|c10|torch)::\S+", symbols)


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_libraries_need_no_particular_cuda_or_python():
    if not libraries():
        pytest.skip("no library was built")
    for library in libraries():
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
        names = re.findall(r"\(NEEDED\).*\[(.+)\]", needed)
        assert "libtorch_cpu.so" in names
        assert not [n for n in names if re.match(r"lib(cuda|python|torch_python|torch_cuda|c10)", n)]


# ------------------------------------------------------------------------------------- toolchain


def test_versions_are_compared_as_numbers():
    assert toolchain.version_tuple("2.9.1") < toolchain.MIN_TORCH <= toolchain.version_tuple("2.11.0+cu130")
    assert toolchain.version_tuple("2.15.0.dev20261101+cu132") == (2, 15, 0)


def make_toolkit(home, release):
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    nvcc = home / "bin/nvcc"
    nvcc.write_text(
        f'#!/bin/sh\ncase "$1" in\n--dryrun) echo "#\\$ TOP={home}/bin/.." >&2 ;;\n'
        f'*) echo "Cuda compilation tools, release {release}, V{release}.1" ;;\nesac\n'
    )
    nvcc.chmod(0o755)
    return nvcc


def test_nvcc_is_found_behind_a_wrapper_script(tmp_path, monkeypatch):
    real = make_toolkit(tmp_path / "opt/cuda-99.1", "99.1")
    wrapper = tmp_path / "bin/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    first = toolchain.cuda_toolkits()[0]
    assert (first.home, first.version) == ((tmp_path / "opt/cuda-99.1").resolve(), "99.1")


def test_cuda_home_comes_before_path_and_pip(tmp_path, monkeypatch):
    make_toolkit(tmp_path / "mine", "98.0")
    make_toolkit(tmp_path / "path", "97.0")
    make_toolkit(tmp_path / "site/nvidia/cu96", "96.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "mine"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'path/bin'}:/usr/bin:/bin")
    monkeypatch.syspath_prepend(tmp_path / "site")
    versions = [t.version for t in toolchain.cuda_toolkits()]
    assert versions[:2] == ["98.0", "97.0"] and "96.0" in versions


def test_cuda_home_without_nvcc_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tmp_path not in [t.home for t in toolchain.cuda_toolkits()]


def test_torch_is_found_in_a_venv_beside_the_sources(tmp_path, monkeypatch):
    """uv builds in an interpreter of its own; the environment is the .venv upward of the sources."""
    site = tmp_path / f".venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    site.mkdir(parents=True)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert site in toolchain.torch_folders()


# --------------------------------------------------------------------------- builds that cannot be


@pytest.fixture
def sources(tmp_path):
    """A copy of what the build reads, with nothing built."""
    tree = tmp_path / "sources"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in ("csrc", "build_backend"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    unwanted = shutil.ignore_patterns("*.so", "_build_record.json", "__pycache__", "weights")
    shutil.copytree(ROOT / "rfsr_ext", tree / "rfsr_ext", ignore=unwanted)
    return tree


def environment(**changes):
    wanted = {**os.environ, "RFSR_CUDA": "0", "MAX_JOBS": "1", **changes}
    wanted.pop("PYTHONPATH", None)
    return {k: v for k, v in wanted.items() if v is not None}


def build(tree, **changes):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment(**changes))


def record(tree):
    return json.loads((tree / "rfsr_ext/ops/_build_record.json").read_text())


def served(tree, python=sys.executable, cwd=None, **changes):
    """``build_info()`` and one loss, asked of the copied package alone."""
    script = (
        "import json, sys, torch\n"
        "from rfsr_ext import ops\n"
        "loss = ops.haar_ll_l1_loss(torch.ones(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))\n"
        "print(json.dumps([ops.__file__, loss.item(), ops.build_info()['devices']]))"
    )
    run = subprocess.run(
        [python, "-c", script], cwd=cwd or tree, capture_output=True, text=True, env=environment(**changes)
    )
    assert run.returncode == 0, run.stderr
    file, loss, info = json.loads(run.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(tree) and loss == 2.0
    return info


@pytest.mark.slow
def test_a_failing_compiler_leaves_an_install_that_works(sources):
    broken = sources.parent / "broken-c++"
    broken.write_text('#!/bin/sh\ncase "$*" in *-dumpfullversion*|*--version*) echo 12.2.0; exit 0;; esac\nexit 1\n')
    broken.chmod(0o755)
    (sources / "rfsr_ext/ops/_C_cpu.so").write_text("left over from another build")
    run = build(sources, CXX=str(broken), CC=str(broken))
    assert run.returncode == 0, run.stderr
    assert "rfsr_ext: no cpu library because compiling it failed" in run.stderr
    assert not (sources / "rfsr_ext/ops/_C_cpu.so").exists()
    info = served(sources)["cpu"]
    assert info["backend"] == "reference" and "compiling it failed" in info["why"] and info["remedy"]


@pytest.mark.slow
@pytest.mark.skipif(toolchain.find_cxx() is None, reason="needs a C++ compiler")
def test_a_folder_of_any_name_can_be_installed_from(sources):
    """What takes minutes to compile is left out."""
    tree = sources.rename(sources.parent / """costs $1 "or" it's free""")
    for source in (tree / "csrc/cpu").glob("*.cpp"):
        source.write_text(f"int {source.stem}_compiled;")
    run = build(tree)
    assert run.returncode == 0 and record(tree)["cpu"].get("built"), run.stdout + run.stderr
    assert (tree / "rfsr_ext/ops/_C_cpu.so").is_file()


@pytest.mark.slow
def test_a_failing_compiler_stops_the_install_on_request(sources):
    run = build(sources, CXX="/bin/false", CC="/bin/false", RFSR_REQUIRE_EXT="1")
    assert run.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("row", ["no-compiler", "no-nvcc", "new-gcc", "uv", "wheel"])
def test_light_rows_of_the_install_matrix(row):
    script = ROOT / "tests/packaging/install_matrix.py"
    run = subprocess.run([sys.executable, script, row], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    if "skipped: " in run.stdout:
        pytest.skip(run.stdout.partition("skipped: ")[2].strip())


def planned_cuda(tree, change="", **changes):
    """What `cuda_extension` says of torch with CUDA 13.2, with the toolchain changed by a line of Python."""
    script = (
        "import pathlib, runpy, sys, setuptools\n"
        "sys.argv, setuptools.setup = ['setup.py', 'egg_info'], lambda **_: None  # only the functions\n"
        "names = runpy.run_path('setup.py')\n"
        f"toolchain = names['toolchain']\n{change}\n"
        "found = names['cuda_extension'](pathlib.Path('.'), '13.2')\n"
        "print(found['why'] if isinstance(found, dict) else 'it is built')"
    )
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment(RFSR_CUDA=None, **changes))
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_toolkit_of_another_cuda_is_named_and_left_alone(sources, tmp_path):
    make_toolkit(tmp_path / "old", "7.5")
    found = (
        "found = [t for t in toolchain.cuda_toolkits() if t.version == '7.5']; toolchain.cuda_toolkits = lambda: found"
    )
    why = planned_cuda(sources, found, CUDA_HOME=str(tmp_path / "old"))
    assert why == f"only CUDA 7.5 in {tmp_path / 'old'} was found and torch uses CUDA 13.2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "archs", "why"),
    [
        ("7.5", None, "the GPU here has compute capability 7.5 and the kernels need 8.0 (A100, RTX 30) or newer"),
        ("7.5", "8.0", "it is built"),
        ("7.5\n8.6", None, "it is built"),
        ("10.0", None, "it is built"),
        ("No devices were found", None, "it is built"),
    ],
)
def test_for_gpus_that_are_all_too_old_nothing_is_built(sources, tmp_path, gpus, archs, why):
    make_toolkit(tmp_path / "cuda", "13.2")
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin/nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{gpus}\nEND\n")
    smi.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    assert why == planned_cuda(sources, CUDA_HOME=str(tmp_path / "cuda"), PATH=path, TORCH_CUDA_ARCH_LIST=archs)


@pytest.mark.slow
@pytest.mark.skipif(toolchain.find_cxx() is None, reason="needs a C++ compiler")
def test_an_unchanged_build_compiles_nothing(sources):
    assert build(sources).returncode == 0
    library = sources / "rfsr_ext/ops/_C_cpu.so"
    first = library.stat().st_mtime_ns, record(sources)["cpu"]
    shutil.rmtree(sources / "build")  # not ninja's memory but ours
    run = build(sources)
    assert run.returncode == 0 and "-c csrc" not in run.stdout and "haar.cpp" not in run.stdout
    assert (library.stat().st_mtime_ns, record(sources)["cpu"]) == first
    with open(sources / "csrc/index.h", "a") as header:
        header.write("// changed\n")
    assert build(sources).returncode == 0
    assert record(sources)["cpu"]["key"] != first[1]["key"]
    assert served(sources)["cpu"]["backend"] == "native"


@pytest.mark.slow
@pytest.mark.skipif(toolchain.find_cxx() is None, reason="needs a C++ compiler")
def test_plain_pip_install_uses_the_torch_that_is_there(sources, tmp_path):
    """``pip install -e .`` with isolation on, in a fresh environment that sees this one's packages."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    (Path(site.stdout.strip()) / "ambient.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [python, "-m", "pip", "install", "--no-deps", "-v", "-e", "."]
    run = subprocess.run(command, cwd=sources, capture_output=True, text=True, env=environment())
    output = run.stdout + run.stderr
    if run.returncode and re.search(r"No matching distribution|ConnectionError|Retrying|resolve host", output):
        pytest.skip("the package index cannot be reached")
    assert run.returncode == 0, output[-3000:]
    assert not re.search(r"(Collecting|Downloading) torch\b", output)
    assert record(sources)["cpu"]["torch"] == torch.__version__
    assert served(sources, python=python, cwd=tmp_path)["cpu"]["backend"] == "native"
