"""pyproject.toml, environment.yml and the Makefile agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {"torch": "pytorch"}  # the only package conda-forge calls otherwise


def bounds(requirements):
    """Bound by name of each package, those of the extras that are named among them."""
    found = {}
    for text in requirements:
        name, extras, bound = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[(.+)\])?(.*)", text.split("#")[0].strip()).groups()
        if name == "rfsr_ext":
            found |= bounds(line for extra in extras.split(",") for line in EXTRAS[extra])
        else:
            found[CONDA_NAMES.get(name.lower(), name.lower())] = bound.replace(" ", "")
    return found


def test_environment_yml_has_the_bounds_of_pyproject():
    text = (ROOT / "environment.yml").read_text()
    conda = yaml.safe_load(text)["dependencies"]
    listed = bounds(x for x in conda if isinstance(x, str))
    assert listed.pop("python") == PROJECT["requires-python"]
    assert listed.pop("pip") == "" and listed.pop("cxx-compiler") == ""
    wanted = bounds([*PROJECT["dependencies"], "rfsr_ext[test]"])
    assert listed == wanted
    (pip,) = (x["pip"] for x in conda if isinstance(x, dict))
    assert pip[0] == "-e ." and bounds(pip[1:]) == {"pyiqa": bounds(EXTRAS["rewards"])["pyiqa"]}
    # what the project promises to hold, one by a command of its own
    assert "pip install --no-deps image-reward" in text.partition("\n")[0]
    assert {"pytorch", "diffusers", "ninja", "pybind11", "jupyterlab", "ipywidgets", "pywavelets", "nbval"} <= set(
        listed
    )


def test_every_dependency_has_a_lower_bound():
    for group in (PROJECT["dependencies"], *EXTRAS.values()):
        for text in group:
            assert ">=" in text or text.startswith("rfsr_ext["), f"{text} has no lower bound"


def test_the_oldest_torch_is_one_number_everywhere():
    setup = (ROOT / "setup.py").read_text()
    target = int(re.search(r'TARGET = "(0x[0-9a-f]+)"', setup)[1], 16)
    oldest = (target >> 56, target >> 48 & 0xFF)
    text = ".".join(map(str, oldest))
    assert f"torch>={text}" in PROJECT["dependencies"]
    assert f"MIN_TORCH = {oldest}" in (ROOT / "build_backend/toolchain.py").read_text()
    assert f"MIN_TORCH = {oldest}" in (ROOT / "rfsr_ext/ops/_library.py").read_text()
    assert f'"torch>={text}"' in (ROOT / "Makefile").read_text()


def test_make_installs_what_each_target_needs():
    makefile = (ROOT / "Makefile").read_text()
    installs = dict(
        re.findall(r"^\$\(VENV\)/\.installed(\S*):.*\n(?:\t.*\n)*?\t.*pip install -e (.+)$", makefile, re.MULTILINE)
    )
    assert installs == {"": '".[train]"', "-test": '".[test]"', "-bench": '".[bench]"', "-book": '".[book]"'}
    test = makefile.partition("\ntest: ")[2].partition("\n\n")[0]
    for tool in ("ruff check", "ruff format --check", "pyrefly check", "pytest"):
        assert tool in test


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in (
        f"Unreleased ({PROJECT['version']})",
        *(h for h in headings if h.startswith(PROJECT["version"])),
    )
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d{2}-\d{2}\)", heading) for heading in headings[1:])


def test_the_citation_is_of_this_version_and_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert PROJECT["urls"]["Paper"] == citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2412.03268"


def test_ci_runs_make_test_and_nothing_else():
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script == ["#!/bin/sh", 'cd "$(dirname "$0")/.." && exec make test']
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_only_the_agreed_folders_hold_python_packages():
    found = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert found == {"rfsr_ext"}


def test_every_module_imports_without_torchvision():
    """It is a part of the test extra alone: each of its releases demands one torch."""
    script = """
import importlib, pkgutil, sys
sys.modules["torchvision"] = None
import rfsr_ext
for module in pkgutil.walk_packages(rfsr_ext.__path__, "rfsr_ext."):
    if "._C_" not in module.name and "__main__" not in module.name:
        importlib.import_module(module.name)
print("rfsr_ext.losses.gram" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["True"] and "torchvision" not in run.stderr, run.stderr
