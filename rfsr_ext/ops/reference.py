"""PyTorch twins of the compiled operators.

The four functions with the names of the public operators are written for reading: plain, differentiable
PyTorch on any device (CPU, CUDA, MPS, XPU, ...), also under ``torch.compile``. The tests compare the compiled
operators with them. The functions further down keep the exact contract of each registered operator and serve
wherever no compiled library does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# PyWavelets' extension modes, in the order of csrc/index.h. A Haar pair lacks its second sample only at the end of
# an odd length n; then x[n] = last * x[n-1] + before * x[n-2] + first * x[0]. Numbers: (last, before, first).
MODES = {
    "symmetric": (1, 0, 0),
    "reflect": (0, 1, 0),
    "periodic": (0, 0, 1),
    "zero": (0, 0, 0),
    "constant": (1, 0, 0),
    "smooth": (2, -1, 0),
    "antisymmetric": (-1, 0, 0),
    "antireflect": (2, -1, 0),
    "periodization": (1, 0, 0),
}
REDUCTIONS = ("mean", "sum", "none")
_PLUS, _MINUS, _NAN = 1, 2, 3  # two bits per LL coefficient, see csrc/index.h
CRITERIA = ("l2", "l1", "fro")  # the operators take their number, see csrc/gram.h
LAYER_NORM_EPS = 1e-5  # torch.nn.functional.layer_norm's, and so the released code's


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums are kept and scalar losses returned: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------ the formulas


def _pair_sums(x: Tensor, dim: int, mode: str) -> Tensor:
    """Sums of neighbours (2i, 2i+1) along ``dim``, extended by one sample where the length is odd."""
    size = x.shape[dim]
    if size % 2 == 1:
        samples = [x.narrow(dim, index, 1) for index in (size - 1, max(size - 2, 0), 0)]
        terms = [weight * sample for weight, sample in zip(MODES[mode], samples, strict=True) if weight]
        x = torch.cat([x, sum(terms, start=torch.zeros_like(samples[0]))], dim)
    return x.unflatten(dim, (-1, 2)).sum(dim)


def haar_ll(x: Tensor, mode: str = "symmetric", level: int = 1) -> Tensor:
    """LL band of the orthonormal Haar transform, ``[N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)]`` per level."""
    wide = x.to(acc_dtype(x.dtype))
    for _ in range(level):
        wide = _pair_sums(_pair_sums(wide, -2, mode), -1, mode) / 2
    return wide.to(x.dtype)


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """``x.clamp(low, high)``; the gradient is 0 at and outside the ends (torch versions differ at the ends)."""
    return torch.where((x <= low) | (x >= high), x.detach().clamp(low, high), x)


def haar_ll_l1_loss(
    pred: Tensor,
    target: Tensor,
    *,
    mode: str = "symmetric",
    level: int = 1,
    input_range: tuple[float, float] | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """``mean |LL(pred) - LL(target)|`` (arXiv 2412.03268, eq. 2), written as ``mean |LL(pred - target)|``."""
    pred, target = (x.to(acc_dtype(x.dtype)) for x in (pred, target))
    if input_range is not None:
        low, high = input_range
        pred, target = ((clamp(x, low, high) - low) / (high - low) for x in (pred, target))
    distance = haar_ll(pred - target, mode, level).abs()
    per_sample = distance.sum((1, 2, 3)) if reduction == "sum" else distance.mean((1, 2, 3))
    if weight is not None:
        per_sample = weight.to(per_sample.dtype) * per_sample
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](per_sample)


def gram_matrix(features: Tensor, *, joint_layer_norm: bool = False) -> Tensor:
    """``F F^T / (C H W)`` per sample, ``[N, C, H, W] -> [N, C, C]``; of layer-normalised features if asked for."""
    wide = features.to(acc_dtype(features.dtype))
    if joint_layer_norm:
        wide = torch.nn.functional.layer_norm(wide, wide.shape[1:], eps=LAYER_NORM_EPS)
    flat = wide.flatten(2)
    return flat @ flat.mT / (flat.shape[1] * flat.shape[2])


def distance(difference: Tensor, criterion: str) -> Tensor:
    """Size of a difference of Gram matrices, ``[..., N, C, C] -> [...]``, mean over the N samples.

    Row by row: PyTorch shares a sum over everything out among its threads, and then the bits depend on their number.
    """
    if criterion == "l2":
        return difference.square().sum(-1).sum(-1).mean(-1)
    if criterion == "l1":
        return difference.abs().sum(-1).sum(-1).mean(-1)
    return frobenius_norm(difference).mean(-1)


def frobenius_norm(matrices: Tensor) -> Tensor:
    """``[..., C, C] -> [...]``; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(matrices, dim=-1), dim=-1)


def gram_loss(
    features: Tensor | Sequence[Tensor],
    target_features: Tensor | Sequence[Tensor] | None = None,
    weights: Sequence[float] | None = None,
    *,
    target_gram: Tensor | Sequence[Tensor] | None = None,
    criterion: str = "l2",
    joint_layer_norm: bool = False,
) -> Tensor:
    """Distance of Gram matrices (l2: arXiv 2412.03268, eq. 6), mean over the batch, weighted sum over the layers."""
    layers = [features] if isinstance(features, Tensor) else features
    if target_gram is None:
        targets = [target_features] if isinstance(target_features, Tensor) else target_features or ()
        grams = [gram_matrix(target, joint_layer_norm=joint_layer_norm) for target in targets]
    else:
        grams = [target_gram] if isinstance(target_gram, Tensor) else target_gram
    losses = [
        weight * distance(gram_matrix(layer, joint_layer_norm=joint_layer_norm) - gram, criterion)
        for weight, layer, gram in zip(weights or [1.0] * len(layers), layers, grams, strict=True)
    ]
    return torch.stack(losses).sum()


# ------------------------------------------------------------- operator contracts (see haar.py, gram.py)


def _name(mode: int) -> str:
    return list(MODES)[mode]


def haar_ll_band(x: Tensor, mode: int, dtype: torch.dtype) -> Tensor:
    return haar_ll(x.to(acc_dtype(x.dtype)), _name(mode)).to(dtype)


def haar_ll_backward(grad: Tensor, mode: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Gradient of :func:`haar_ll_band`."""
    return _spread(grad.to(acc_dtype(dtype)) / 2, mode, height, width).to(dtype)


def _spread(coefficients: Tensor, mode: int, height: int, width: int) -> Tensor:
    """Each pixel takes the coefficient of its pair; an odd end's extra sample goes back to where it came from."""
    out = coefficients
    for dim, size in ((-2, height), (-1, width)):
        out = out.repeat_interleave(2, dim)
        if size % 2 == 1:
            extra, out = out.narrow(dim, size, 1), out.narrow(dim, 0, size)
            for index, weight in zip((size - 1, max(size - 2, 0), 0), MODES[_name(mode)], strict=True):
                if weight:
                    out = out.index_add(dim, torch.tensor([index], device=out.device), weight * extra)
    return out


def _pack(values: Tensor, bits: int) -> Tensor:
    """Small integers of ``bits`` bits, packed into bytes along the last axis, the first one lowest."""
    count = 8 // bits
    values = torch.nn.functional.pad(values.long(), (0, -values.shape[-1] % count))
    shifts = torch.tensor([1 << bits * k for k in range(count)], device=values.device)
    shape = [*values.shape[:-1], values.shape[-1] // count, count]  # explicit: the batch may be empty
    return (values.reshape(shape) * shifts).sum(-1).to(torch.uint8).flatten(1)


def _unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """What :func:`_pack` packed, ``[N, ...] = shape``."""
    count = 8 // bits
    shifts = torch.tensor([1 << bits * k for k in range(count)], device=packed.device)
    values = packed.unsqueeze(-1) // shifts % (1 << bits)
    row = (shape[-1] + count - 1) // count * count
    return values.reshape([*shape[:-1], row])[..., : shape[-1]]


def packed_bytes(bits: int, *shape: int) -> int:
    """Bytes of ``bits`` bits per element of ``shape``, each row rounded up to whole bytes."""
    return math.prod(shape[:-1]) * ((shape[-1] * bits + 7) // 8)


def haar_ll_l1(
    pred: Tensor,
    target: Tensor,
    mode: int,
    low: float,
    high: float,
    reduction: int,
    pred_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor]:
    pred, target = (x.to(acc_dtype(x.dtype)) for x in (pred, target))
    factor, kept = 1.0, []
    if low != high:
        inside = [~((x <= low) | (x >= high)) for x, wanted in ((pred, pred_grad), (target, target_grad)) if wanted]
        kept = [_pack(bits, 1) for bits in inside]
        pred, target, factor = clamp(pred, low, high), clamp(target, low, high), 1 / (high - low)
    d = haar_ll(pred - target, _name(mode))
    if pred_grad or target_grad:
        kept = [_pack((d > 0) * _PLUS + (d < 0) * _MINUS + d.isnan() * _NAN, 2), *kept]
    distance = d.abs() * factor
    loss = {"mean": distance.mean, "sum": distance.sum, "none": lambda: distance.mean((1, 2, 3))}
    return loss[REDUCTIONS[reduction]](), torch.cat(kept, 1) if kept else d.new_empty(len(d), 0, dtype=torch.uint8)


def haar_ll_l1_backward(
    grad: Tensor,
    kept: Tensor,
    mode: int,
    low: float,
    high: float,
    reduction: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    mask: int,
) -> Tensor:
    n, h, w = len(kept), (height + 1) // 2, (width + 1) // 2
    signs, bits = packed_bytes(2, channels, h, w), packed_bytes(1, channels, height, width)
    codes = _unpack(kept[:, :signs], 2, (n, channels, h, w))
    over = {"mean": max(n, 1) * channels * h * w, "sum": 1, "none": channels * h * w}[REDUCTIONS[reduction]]
    g = grad.reshape(-1, 1, 1, 1) / (2 * over if low == high else 2 * over * (high - low))
    values = torch.where(codes == _PLUS, g, torch.where(codes == _MINUS, -g, 0 * g))
    out = _spread(torch.where(codes == _NAN, g * float("nan"), values), mode, height, width).to(dtype)
    if mask < 0:
        return out
    start = signs + mask * bits
    return out.masked_fill(_unpack(kept[:, start : start + bits], 1, out.shape) == 0, 0)


def gram_moments(features: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    if shift is None:
        return gram_matrix(features), features.new_empty(0, dtype=acc_dtype(features.dtype))
    centred = features.to(shift.dtype) - shift[:, None, None, None]
    return gram_matrix(centred), centred.mean((2, 3))


def gram_distance(features: Tensor, target_features: Tensor, criterion: int) -> tuple[Tensor, Tensor]:
    difference = gram_matrix(features) - gram_matrix(target_features)
    return distance(difference, CRITERIA[criterion]), difference


def gram_backward(s: Tensor, features: Tensor, bias: Tensor | None) -> Tensor:
    out = s.mT @ features.to(s.dtype).flatten(2)
    if bias is not None:
        out = out + bias[:, :, None]
    return out.reshape(features.shape).to(features.dtype)
