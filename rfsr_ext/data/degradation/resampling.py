"""One axis of `torch.nn.functional.interpolate` as a sparse matrix, the same for every mode."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

__all__ = ["matrix"]


def matrix(before: int, after: int, mode: str, scale: float | None = None) -> csr_array:
    """``[after, before]`` float32; each row holds the weights of one new sample and sums to 1.

    Args:
        before: samples of the axis.
        after: samples wanted.
        mode: ``area``, ``bilinear`` or ``bicubic``, none of them antialiased (``area`` averages what a sample covers).
        scale: distance of samples as interpolate's ``scale_factor`` gives it; from the sizes if None.
    """
    new = np.arange(after)
    if mode == "area":
        starts, ends = new * before // after, -(-(new + 1) * before // after)
        counts = ends - starts
        pointers = np.concatenate(([0], np.cumsum(counts)))
        indices = np.arange(pointers[-1]) - np.repeat(pointers[:-1] - starts, counts)
        return csr_array((np.repeat(1 / counts, counts).astype(np.float32), indices, pointers), (after, before))
    places = (new + 0.5) * (before / after if scale is None else 1 / scale) - 0.5
    if mode == "bilinear":
        places = places.clip(0)
    first = np.floor(places)
    t = places - first
    taps = (1 - t, t) if mode == "bilinear" else (_far(1 + t), _near(t), _near(1 - t), _far(2 - t))
    offsets = np.arange(len(taps)) - (mode == "bicubic")
    indices = (first[:, None] + offsets).clip(0, before - 1).astype(np.int32)
    pointers = np.arange(after + 1) * len(taps)
    return csr_array((np.stack(taps, axis=1).astype(np.float32).ravel(), indices.ravel(), pointers), (after, before))


def _near(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -3/4, for |x| up to 1."""
    return (1.25 * x - 2.25) * x * x + 1


def _far(x: np.ndarray) -> np.ndarray:
    """The same from 1 to 2."""
    return ((-0.75 * x + 3.75) * x - 6) * x + 3
