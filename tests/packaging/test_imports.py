"""Each package that is imported is declared where it is needed, and the losses need torch alone."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

DISTRIBUTIONS = {  # of modules whose package has another name
    "IPython": "ipython",
    "ImageReward": "image-reward",
    "PIL": "pillow",
    "pywt": "pywavelets",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
OURS = {"rfsr_ext", "tests", "benchmarks", "toolchain"}


def declared(*extras: str) -> set[str]:
    """Packages of the core and of these extras, with those of the extras they name."""
    lines, names = list(PROJECT["dependencies"]), set()
    for extra in extras:
        lines += EXTRAS[extra]
    while lines:
        requirement = Requirement(lines.pop())
        if requirement.name == "rfsr_ext":
            lines += [line for extra in requirement.extras for line in EXTRAS[extra]]
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Third-party packages that a module imports, also by ``import_module`` and ``importorskip``."""
    nodes, modules = [ast.parse(path.read_text())], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "importorskip") and isinstance(node.args[0].value, str):
                modules.add(node.args[0].value)
    roots = {module.partition(".")[0] for module in modules if module} - OURS - sys.stdlib_module_names
    return {canonicalize_name(DISTRIBUTIONS.get(root, root)) for root in roots}


def modules(folder: str) -> list[Path]:
    """All but the makers of fixtures, which run by hand, beside other people's code, in environments of their own."""
    makers = {path for path in (ROOT / folder).rglob("make*.py") if "released" in path.parts}
    return sorted(set((ROOT / folder).rglob("*.py")) - makers)


def undeclared(paths: list[Path], known: set[str], **options) -> dict[str, set[str]]:
    found = {str(path.relative_to(ROOT)): imports(path, **options) - known for path in paths}
    return {path: names for path, names in found.items() if names}


# What a part may import beyond the extras of its folder: it says what to install where that is missing.
OPTIONAL = {
    "rfsr_ext": declared("lora", "8bit", "stream", "notebooks", "metrics") | {"packaging", "image-reward"},
    "benchmarks": declared("bench") | {"torchvision"},
    "notebooks/src": set(),
    "notebooks": set(),
    "tests": declared("8bit", "metrics", "stream", "peers", "browser") | {"timm", "image-reward"},
}


NEEDS = {"rfsr_ext": "train", "benchmarks": "train", "notebooks/src": "notebooks", "notebooks": "test", "tests": "test"}


@pytest.mark.parametrize(("folder", "extra"), NEEDS.items())
def test_every_import_is_declared(folder, extra):
    paths = modules(folder)
    assert paths
    assert undeclared(paths, declared(extra) | OPTIONAL[folder]) == {}


def test_every_package_imports_at_its_head_what_train_brings_alone():
    """What another extra brings is imported where it is used, so that `import` never fails for want of it."""
    assert undeclared(modules("rfsr_ext"), declared("train"), inside_functions=False) == {}


def test_what_an_extra_brings_is_imported():
    """A package that nothing imports any more leaves the list."""
    used = set().union(*(imports(path) for path in modules("rfsr_ext")))
    assert declared("train") - used == {"tensorboard"}, "accelerate imports tensorboard"
    assert declared("lora", "8bit") - declared("train") == {"peft", "bitsandbytes"} <= used


def test_running_the_package_needs_nothing_that_builds_it():
    assert not declared("metrics", "notebooks") & {"pybind11", "ninja", "setuptools", "ruff", "pyrefly"}
    assert declared() == {"torch"}


TORCH_ALONE = """
import importlib.metadata, sys
ALLOWED = set(sys.argv[1].split())
refused = set()

class Refuse:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in ALLOWED and root not in sys.stdlib_module_names:
            refused.add(root)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
from rfsr_ext import build_info, gram_loss, gram_matrix, haar_ll, haar_ll_l1_loss
from rfsr_ext.losses import HaarLLLoss, VGG19Features, VGGGramLoss

a, b = torch.rand(1, 3, 19, 16, requires_grad=True), torch.rand(1, 3, 19, 16)
loss = HaarLLLoss()(a, b) + haar_ll_l1_loss(a, b) + gram_loss(a, b)
loss = loss + VGGGramLoss({"conv1_2": 1.0}, weights="random")(a, b)
loss.backward()
assert a.grad.isfinite().all() and a.grad.abs().sum() > 0
for name in ("numpy", "safetensors", "diffusers"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} was to be had")
try:
    VGGGramLoss()
except FileNotFoundError as error:
    assert "vgg19-dcbb9e9d.pth" in str(error)
import rfsr_ext.__main__
try:
    rfsr_ext.__main__.main()
except SystemExit as stopped:
    print(stopped)
"""


def required_by(name: str) -> set[str]:
    """A package and everything it asks for here, by name."""
    found, names = set(), [name]
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in requirements:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.append(requirement.name)
                names += [
                    part.name
                    for extra in requirement.extras
                    for part in map(Requirement, importlib.metadata.requires(requirement.name) or [])
                    if part.marker and part.marker.evaluate({"extra": extra})
                ]
    return found


def test_the_losses_need_torch_alone(tmp_path):
    """In a process that refuses every module but those of torch and of what torch itself asks for: not even NumPy."""
    torch_needs = required_by("torch")
    assert {"sympy", "typing-extensions"} <= torch_needs and not torch_needs & {"numpy", "safetensors", "diffusers"}
    owners = importlib.metadata.packages_distributions()
    allowed = {module for module, names in owners.items() if {canonicalize_name(n) for n in names} <= torch_needs}
    command = [sys.executable, "-c", TORCH_ALONE, " ".join(allowed | {"rfsr_ext"})]
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RFSR_WEIGHTS": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.fullmatch(
        r"rfsr: the package typer is missing; the losses need torch alone, the command line needs more: "
        r"pip install 'rfsr_ext\[train\]'",
        run.stdout.splitlines()[-1],
    ), run.stdout
