"""A device that is not the CPU, on any machine: what computes on a GPU and leaves an operand behind fails on it too."""

import os
from types import SimpleNamespace

import torch

NAME = "elsewhere"


def register(library: str) -> None:
    """Make the compiled ``device.cpp`` a device of torch, and the one that accelerate takes."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(library)
    one = {"is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "device_count": 1,
           "current_device": 0, "set_device": None, "manual_seed_all": None,
           "get_amp_supported_dtype": [torch.float16, torch.bfloat16],
           "get_rng_state": torch.zeros(1), "set_rng_state": None}  # fmt: skip
    module = SimpleNamespace(**{name: lambda *_, value=value: value for name, value in one.items()})
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME


def computed() -> int:
    """Operations that were computed there so far."""
    return torch.ops.elsewhere.computed()
