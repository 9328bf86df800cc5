"""The operator namespace ``torch.ops.rfsr_ext`` and the compiled libraries behind it.

Schemas, fake kernels, gradients and a PyTorch kernel for every device are registered from Python, so every
operator exists whatever was built. Each compiled library then only adds faster kernels for its device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch.autograd import forward_ad

NAMESPACE = "rfsr_ext"
MIN_TORCH = (2, 11)
HERE = Path(__file__).parent
RECORD = HERE / "_build_record.json"  # written by setup.py: what was built, with what, and why not

_namespace = torch.library.Library(NAMESPACE, "FRAGMENT")  # FRAGMENT: a reloaded module may define it again
_kernels: dict[str, Callable] = {}  # the operators' PyTorch kernels


def define(name: str, schema: str, kernel: Callable, fake: Callable) -> None:
    """Registers ``rfsr_ext::name`` with its PyTorch kernel (any device) and its fake kernel (shapes only)."""
    _namespace.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _namespace.impl(name, kernel, "CompositeExplicitAutograd")
    _kernels[name] = kernel
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_namespace)


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def operator(name: str) -> Callable:
    """``rfsr_ext::name``, or its PyTorch kernel where a transform has to look inside.

    An operator has a gradient and nothing else; what its kernel is made of follows every transform, in any order.
    """
    if not is_transformed():
        return getattr(torch.ops.rfsr_ext, name)

    def kernel(first: torch.Tensor, *rest):
        with torch.autocast(first.device.type, enabled=False):  # as below an operator: products are not rounded
            return _kernels[name](first, *rest)

    return kernel


def promote_under_autocast(name: str) -> None:
    """Under autocast ``rfsr_ext::name`` takes its tensors as they are; different dtypes become one that holds both."""
    promoted = getattr(torch.ops.rfsr_ext, name)
    for device in ("CPU", "CUDA"):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def kernel(*args, keys=keys):
            dtype = reduce(torch.promote_types, [x.dtype for x in args if isinstance(x, torch.Tensor)])
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return promoted(*[x.to(dtype) if isinstance(x, torch.Tensor) else x for x in args])

        _namespace.impl(name, kernel, f"Autocast{device}")


@dataclass(frozen=True)
class Backend:
    """What serves one device: ``native`` with the library's path, or ``reference`` with why and the remedy."""

    backend: str
    library: str | None
    why: str
    remedy: str | None


def _load(device: str, label: str) -> Backend:
    def reference(why: str, remedy: str) -> Backend:
        return Backend("reference", None, f"the PyTorch implementation serves because {why}", remedy)

    if os.environ.get("RFSR_BACKEND") == "reference":
        return reference("RFSR_BACKEND=reference is set", "unset RFSR_BACKEND")
    if device == "cuda" and torch.version.cuda is None:
        return reference(f"torch {torch.__version__} was built without CUDA", "install a CUDA build of torch")
    # pyrefly: ignore[unsupported-operation] - TorchVersion gets its comparisons at run time
    if torch.torch_version.TorchVersion(torch.__version__) < MIN_TORCH:
        return reference(f"torch {torch.__version__} is older than 2.11", "pip install 'torch>=2.11'")
    record = build_record().get(device, {})
    found = sorted(HERE.glob(f"_C_{device}.*"))
    libraries = [path for path in found if path.suffix in (".so", ".dylib", ".pyd", ".dll")]
    if not libraries:
        why = record.get("why", f"no {label} library was built")
        return reference(why, record.get("remedy", "install a C++17 compiler and repeat 'pip install -e .'"))
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return reference(f"{libraries[0].name} could not be loaded ({error})", "repeat 'pip install -e .'")
    return Backend("native", str(libraries[0]), record.get("why", f"{libraries[0].name} was loaded"), None)


def build_record() -> dict:
    """The notes setup.py left beside the libraries; empty when there are none or they cannot be read."""
    try:
        return json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


_backends = {"cpu": _load("cpu", "CPU"), "cuda": _load("cuda", "CUDA")}
_OTHER = Backend("reference", None, "the PyTorch implementation serves every device but CPU and CUDA", None)


def build_info() -> dict:
    """Which implementation serves all operators on each device, why, and what to do about it.

    Returns:
        ``{"torch": version, "torch_cuda": version or None, "devices": {device: {"backend": "native" | "reference",
        "library": path or None, "why": sentence, "remedy": sentence or None, "build": {...}}}}`` with the devices
        ``cpu``, ``cuda`` and ``other``. ``build`` is what setup.py noted of a library that it built.
    """
    devices, record = {**_backends, "other": _OTHER}, build_record()
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "devices": {
            device: vars(served)
            | {"build": {key: x for key, x in record.get(device, {}).items() if key not in ("why", "remedy")}}
            for device, served in devices.items()
        },
    }
