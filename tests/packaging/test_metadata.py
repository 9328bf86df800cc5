"""pyproject.toml, environment.yml and the Makefile agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch"}  # the only package conda-forge calls otherwise


def bounds(requirements):
    split = (re.fullmatch(r"([A-Za-z0-9_.-]+)(.*)", text.split("#")[0].strip()) for text in requirements)
    return {CONDA_NAMES.get(m[1].lower(), m[1].lower()): m[2].replace(" ", "") for m in split}


def test_environment_yml_has_the_bounds_of_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    listed = bounds(x for x in conda if isinstance(x, str))
    assert listed.pop("python") == PROJECT["requires-python"]
    assert listed.pop("pip") == "" and listed.pop("cxx-compiler") == ""
    wanted = {**bounds(PROJECT["dependencies"]), **bounds(PROJECT["optional-dependencies"]["test"])}
    assert listed == wanted
    assert {"pip": ["-e ."]} in conda


def test_every_dependency_has_a_lower_bound():
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for text in group:
            assert ">=" in text or text.startswith("rfsr_ext["), f"{text} has no lower bound"


def test_the_oldest_torch_is_one_number_everywhere():
    setup = (ROOT / "setup.py").read_text()
    target = int(re.search(r'TARGET = "(0x[0-9a-f]+)"', setup)[1], 16)
    oldest = (target >> 56, target >> 48 & 0xFF)
    text = ".".join(map(str, oldest))
    assert f"torch>={text}" in PROJECT["dependencies"]
    assert f"MIN_TORCH = {oldest}" in (ROOT / "rfsr_ext/_build/toolchain.py").read_text()
    assert f"MIN_TORCH = {oldest}" in (ROOT / "rfsr_ext/ops/_library.py").read_text()
    assert f'"torch>={text}"' in (ROOT / "Makefile").read_text()


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
