"""PyTorch twins of the compiled operators.

The four functions with the names of the public operators are written for reading: plain, differentiable
PyTorch on any device (CPU, CUDA, MPS, XPU, ...), also under ``torch.compile``. The tests compare the compiled
operators with them. The functions further down keep the exact contract of each registered operator and serve
wherever no compiled library does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SIGNS_PER_BYTE = 4  # two bits per LL coefficient, see csrc/index.h
_ZERO, _PLUS, _MINUS, _NAN = range(4)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums are kept and scalar losses returned: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------ the formulas


def _pair_sums(x: Tensor, dim: int) -> Tensor:
    """Sums of neighbours (2i, 2i+1) along ``dim``; an odd end is paired with itself (symmetric extension)."""
    size = x.shape[dim]
    first = x.narrow(dim, 0, size - size % 2).unflatten(dim, (-1, 2)).sum(dim)
    if size % 2 == 0:
        return first
    return torch.cat([first, 2 * x.narrow(dim, size - 1, 1)], dim)


def haar_ll(x: Tensor) -> Tensor:
    """LL band of the one-level orthonormal Haar transform, ``[N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)]``."""
    wide = x.to(acc_dtype(x.dtype))
    return (_pair_sums(_pair_sums(wide, -2), -1) / 2).to(x.dtype)


def haar_ll_l1_loss(pred: Tensor, target: Tensor) -> Tensor:
    """``mean |LL(pred) - LL(target)|`` (arXiv 2412.03268, eq. 2), written as ``mean |LL(pred - target)|``."""
    wide = acc_dtype(pred.dtype)
    return haar_ll(pred.to(wide) - target.to(wide)).abs().mean()


def gram_matrix(features: Tensor) -> Tensor:
    """``F F^T / (C H W)`` per sample, ``[N, C, H, W] -> [N, C, C]``."""
    flat = features.to(acc_dtype(features.dtype)).flatten(2)
    return flat @ flat.mT / (flat.shape[1] * flat.shape[2])


def gram_loss(
    features: Tensor | Sequence[Tensor],
    target_features: Tensor | Sequence[Tensor],
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Squared Frobenius norm of the difference of Gram matrices, mean over the batch (arXiv 2412.03268, eq. 6)."""
    if isinstance(features, Tensor):
        features, target_features = [features], [target_features]
    weights = [1.0] * len(features) if weights is None else weights
    layers = [
        w * (gram_matrix(f) - gram_matrix(t)).square().sum((1, 2)).mean()
        for w, f, t in zip(weights, features, target_features, strict=True)
    ]
    return torch.stack(layers).sum()


# ------------------------------------------------------------- operator contracts (see haar.py, gram.py)


def haar_ll_backward(grad: Tensor, height: int, width: int) -> Tensor:
    """Gradient of :func:`haar_ll`: each pixel reads the one coefficient it belongs to, twice at an odd end."""
    wide = grad.to(acc_dtype(grad.dtype)) / 2
    return _spread(wide, height, width).to(grad.dtype)


def _spread(coefficients: Tensor, height: int, width: int) -> Tensor:
    rows = torch.arange(height, device=coefficients.device)
    columns = torch.arange(width, device=coefficients.device)
    out = coefficients.index_select(-2, rows // 2).index_select(-1, columns // 2)
    if height % 2:
        out = torch.cat([out[..., :-1, :], 2 * out[..., -1:, :]], -2)
    if width % 2:
        out = torch.cat([out[..., :-1], 2 * out[..., -1:]], -1)
    return out


def haar_ll_l1(pred: Tensor, target: Tensor, keep_signs: bool) -> tuple[Tensor, Tensor]:
    wide = acc_dtype(pred.dtype)
    d = haar_ll(pred.to(wide) - target.to(wide))
    if not keep_signs:
        return d.abs().mean(), pred.new_empty(0, dtype=torch.uint8)
    codes = (d > 0) * _PLUS + (d < 0) * _MINUS + d.isnan() * _NAN
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % SIGNS_PER_BYTE))
    shifts = torch.tensor([1, 4, 16, 64], device=d.device)
    shape = [*codes.shape[:-1], codes.shape[-1] // SIGNS_PER_BYTE, SIGNS_PER_BYTE]  # explicit: the batch may be empty
    return d.abs().mean(), (codes.reshape(shape) * shifts).sum(-1).to(torch.uint8)


def haar_ll_l1_backward(grad: Tensor, signs: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    h, w = (height + 1) // 2, (width + 1) // 2
    shifts = torch.tensor([1, 4, 16, 64], device=signs.device)
    shape = [*signs.shape[:-1], signs.shape[-1] * SIGNS_PER_BYTE]
    codes = (signs.unsqueeze(-1) // shifts % 4).reshape(shape)[..., :w].long()
    g = grad / (2 * max(1, signs.shape[0] * signs.shape[1] * h * w))
    values = torch.stack([0 * g, g, -g, g * float("nan")])
    return _spread(values[codes], height, width).to(dtype)


def gram_l2(features: Tensor, target_features: Tensor) -> tuple[Tensor, Tensor]:
    difference = gram_matrix(features) - gram_matrix(target_features)
    return difference.square().sum((1, 2)).mean(), difference


def gram_backward(s: Tensor, features: Tensor) -> Tensor:
    out = s.mT @ features.to(s.dtype).flatten(2)
    return out.reshape(features.shape).to(features.dtype)
