"""Checks of what callers pass in: one sentence that names the argument, what was wanted and what was given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def image_like(x: Tensor, name: str) -> None:
    """``x`` is a floating-point ``[N, C, H, W]`` tensor with at least one pixel and channel."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {_dtype(x)}")
    if x.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name} must have C, H and W of at least 1, got shape {tuple(x.shape)}")


def alike(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """``x`` is comparable with ``other`` element by element. Under autocast the operator promotes different dtypes."""
    image_like(x, name)
    if x.shape != other.shape:
        raise ValueError(f"{name} must have {other_name}'s shape {tuple(other.shape)}, got {tuple(x.shape)}")
    if x.dtype != other.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} must have {other_name}'s dtype {_dtype(other)}, got {_dtype(x)}")
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")


def one_of(value: object, name: str, choices: Iterable[str]) -> None:
    if value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def per_sample(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """``x`` holds one floating-point number for each sample of ``other``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {_dtype(x)}")
    if x.shape != other.shape[:1]:
        raise ValueError(
            f"{name} must have one number per sample of {other_name}, shape {tuple(other.shape[:1])}, "
            f"got shape {tuple(x.shape)}"
        )
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
