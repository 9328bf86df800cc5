"""Haar LL band and the L1 loss on it (arXiv 2412.03268, eq. 1 and 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _checks, reference
from ._library import NAMESPACE, define, is_transformed, operator

_MODES = {name: number for number, name in enumerate(reference.MODES)}
_REDUCTIONS = {name: number for number, name in enumerate(reference.REDUCTIONS)}


def haar_ll(x: Tensor, mode: str = "symmetric", level: int = 1) -> Tensor:
    r"""LL band of the orthonormal Haar wavelet transform.

    .. math:: LL_{ij} = \tfrac12 (x_{2i,2j} + x_{2i,2j+1} + x_{2i+1,2j} + x_{2i+1,2j+1})

    An odd height or width is extended by one sample as ``pywt.dwt2(x, "haar", mode)`` does; ``mode`` makes no
    difference to even ones. Level 2 is the LL band of the LL band, and so on, as ``pywt.wavedec2``. Half types are
    added up in fp32, also between levels, and rounded once. Differentiable any number of times, in reverse and
    forward mode and under ``torch.func``. Bitwise reproducible.

    Args:
        x: ``[N, C, H, W]``, fp64, fp32, bf16 or fp16, any strides.
        mode: ``"symmetric"``, ``"reflect"``, ``"periodic"``, ``"zero"``, ``"constant"``, ``"smooth"``,
            ``"antisymmetric"``, ``"antireflect"`` or ``"periodization"``.
        level: how often the transform is applied, at least once.

    Returns:
        ``[N, C, ceil(H/2), ceil(W/2)]`` in the dtype of ``x``; each further level halves the sizes again.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` does not have four dimensions, or C, H or W is 0; no such mode or level; a reflecting mode
            meets a height or width of 1.

    Equivalent to (even sizes, level 1)::

        2 * torch.nn.functional.avg_pool2d(x, 2)

    Source: the LL band of arXiv 2412.03268, eq. 1.
    """
    _checks.image_like(x, "x")
    _check_mode(x, mode, level)
    return _bands(x, mode, level, x.dtype)


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
    r"""L1 distance of two images in the Haar LL band, without writing the bands.

    .. math:: L = \operatorname{mean} |LL(\text{pred}) - LL(\text{target})|

    Differentiable in either or both inputs, and in ``weight``; the gradient of :math:`|d|` at 0 is 0. Only two bits
    per LL coefficient are kept for backward, so neither input is kept alive. An empty batch gives NaN, as
    ``torch.mean`` does. Bitwise reproducible for any number of threads. Differentiable any number of times,
    in reverse and forward mode and under ``torch.func``; as the loss is straight almost everywhere, its gradient has a
    graph, in reverse mode, only where the gradient that comes in has one.

    Above level 1 the lower bands, and clamped inputs, are written in the dtype of the sums; the last level is fused
    with the distance.
    Inputs of two dtypes are refused, except under ``torch.autocast``: there both are taken to the wider one.

    Args:
        pred: ``[N, C, H, W]``, fp64, fp32, bf16 or fp16, any strides.
        target: same shape, dtype and device as ``pred``.
        mode: how odd sizes are extended, see :func:`haar_ll`.
        level: level of the LL band, at least 1.
        input_range: ``(low, high)`` maps both inputs to ``clamp((x - low) / (high - low), 0, 1)`` first, in fp32 and
            in the same pass at level 1; ``(-1, 1)`` for the output of a diffusion model's decoder. A pixel on the
            ends of the range or outside has gradient 0. One bit per pixel is kept for this, for each input that
            requires a gradient.
        reduction: ``"mean"`` and ``"sum"`` over all coefficients, or ``"none"`` for the mean of each sample, ``[N]``.
        weight: one number per sample, ``[N]``. ``"mean"`` is then the mean of ``weight[n]`` times sample n's mean,
            and likewise for the others.

    Returns:
        Scalar, or ``[N]`` for ``reduction="none"``; fp64 for fp64, else fp32.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: not four dimensions, C, H or W of 0, different shapes or devices; no such mode, level, range or
            reduction; a reflecting mode meets a height or width of 1; ``weight`` is not ``[N]``.

    Equivalent to (even sizes, defaults)::

        2 * torch.nn.functional.avg_pool2d(pred - target, 2).abs().mean()

    Source: arXiv 2412.03268, eq. 2.
    """
    _checks.image_like(pred, "pred")
    if isinstance(target, Tensor) and target.dtype != pred.dtype and torch.is_autocast_enabled(pred.device.type):
        _checks.image_like(target, "target")
        wider = torch.promote_types(pred.dtype, target.dtype)
        pred, target = pred.to(wider), target.to(wider)
    _checks.alike(target, "target", pred, "pred")
    _check_mode(pred, mode, level)
    _checks.one_of(reduction, "reduction", reference.REDUCTIONS)
    low, high = (0.0, 0.0) if input_range is None else _as_range(input_range)
    if weight is not None:
        _checks.per_sample(weight, "weight", pred, "pred")

    factor = 1.0
    if level > 1:
        wide = reference.acc_dtype(pred.dtype)
        if low != high:
            pred, target = (reference.clamp(x.to(wide), low, high) for x in (pred, target))
            low, high, factor = 0.0, 0.0, 1 / (high - low)
        pred, target = (_bands(x, mode, level - 1, wide) for x in (pred, target))
    grads = torch.is_grad_enabled() and not is_transformed()  # which differentiates the kernel itself
    number = _REDUCTIONS[reduction if weight is None else "none"]
    options = _MODES[mode], low, high, number, grads and pred.requires_grad, grads and target.requires_grad
    if torch.compiler.is_compiling() or is_transformed():
        loss = operator("haar_ll_l1")(pred, target, *options)[0]
    else:
        loss = _EagerL1.apply(pred, target, options)
    if factor != 1:
        loss = factor * loss
    if weight is None:
        return loss
    loss = weight.to(loss.dtype) * loss
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum() * math.prod((pred.shape[1], *_band(*pred.shape[2:])))


def _check_mode(x: Tensor, mode: str, level: int) -> None:
    _checks.one_of(mode, "mode", reference.MODES)
    if not isinstance(level, int) or level < 1:
        raise ValueError(f"level must be a whole number of at least 1, got {level!r}")
    if mode in ("reflect", "antireflect"):
        size = tuple(x.shape[2:])
        for _ in range(level):
            if min(size) == 1:
                given = f"{tuple(x.shape[2:])} and level {level}"
                raise ValueError(f"mode {mode!r} needs a height and width of at least 2 at each level, got {given}")
            size = _band(*size)


def _as_range(value: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(x) for x in value)
    except (TypeError, ValueError):
        low = high = 0.0
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(f"input_range must be two numbers (low, high) with low < high, or None, got {value!r}")
    return low, high


def _bands(x: Tensor, mode: str, level: int, dtype: torch.dtype) -> Tensor:
    """The LL band of any level in ``dtype``; nothing is rounded to a half type between levels."""
    wide = reference.acc_dtype(x.dtype) if level > 1 else dtype
    for _ in range(level):
        x = operator("haar_ll")(x, _MODES[mode], wide)
    return x.to(dtype)


# ------------------------------------------------------------------------------------ registration
# mode and reduction: numbers, in the order of reference.MODES and REDUCTIONS. low, high: input range, none if equal.
# kept: uint8 [N, bytes], the sign codes and bits that backward needs, see csrc/index.h. mask: which block of bits
# holds those of the wanted gradient's input, -1 for none.


def _band(height: int, width: int) -> tuple[int, int]:
    return (height + 1) // 2, (width + 1) // 2


def _haar_ll_fake(x: Tensor, mode: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:2], *_band(*x.shape[2:])), dtype=dtype)


def _haar_ll_backward_fake(grad: Tensor, mode: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty((*grad.shape[:2], height, width), dtype=dtype)


def _haar_ll_l1_fake(pred, target, mode, low, high, reduction, pred_grad, target_grad) -> tuple[Tensor, Tensor]:
    n, c, height, width = pred.shape
    size = 0
    if pred_grad or target_grad:
        size = reference.packed_bytes(2, c, *_band(height, width))
        if low != high:
            size = size + (pred_grad + target_grad) * reference.packed_bytes(1, c, height, width)
    shape = (n,) if reference.REDUCTIONS[reduction] == "none" else ()
    loss = pred.new_empty(shape, dtype=reference.acc_dtype(pred.dtype))
    return loss, pred.new_empty((n, size), dtype=torch.uint8)


def _haar_ll_l1_backward_fake(grad, kept, mode, low, high, reduction, channels, height, width, dtype, mask) -> Tensor:
    return kept.new_empty((kept.shape[0], channels, height, width), dtype=dtype)


define("haar_ll", "(Tensor x, int mode, ScalarType dtype) -> Tensor", reference.haar_ll_band, _haar_ll_fake)
define(
    "haar_ll_backward",
    "(Tensor grad, int mode, SymInt height, SymInt width, ScalarType dtype) -> Tensor",
    reference.haar_ll_backward,
    _haar_ll_backward_fake,
)
define(
    "haar_ll_l1",
    "(Tensor pred, Tensor target, int mode, float low, float high, int reduction, bool pred_grad, bool target_grad)"
    " -> (Tensor loss, Tensor kept)",
    reference.haar_ll_l1,
    _haar_ll_l1_fake,
)
define(
    "haar_ll_l1_backward",
    "(Tensor grad, Tensor kept, int mode, float low, float high, int reduction,"
    " SymInt channels, SymInt height, SymInt width, ScalarType dtype, int mask) -> Tensor",
    reference.haar_ll_l1_backward,
    _haar_ll_l1_backward_fake,
)


# --------------------------------------------------------------------------------------- gradients


def _haar_ll_setup(ctx, inputs, output) -> None:
    x, mode, _ = inputs
    ctx.mode, ctx.size, ctx.dtype = mode, x.shape[2:], x.dtype


def _haar_ll_grad(ctx, grad: Tensor) -> tuple:
    return operator("haar_ll_backward")(grad, ctx.mode, *ctx.size, ctx.dtype), None, None


def _haar_ll_backward_setup(ctx, inputs, output) -> None:
    ctx.dtype, ctx.mode = inputs[0].dtype, inputs[1]


def _haar_ll_backward_grad(ctx, grad: Tensor) -> tuple:
    # The transform is linear, so the gradient of its gradient is the transform.
    return operator("haar_ll")(grad, ctx.mode, ctx.dtype), None, None, None, None


def _remember(ctx, pred: Tensor, kept: Tensor, options: tuple) -> None:
    mode, low, high, reduction, pred_grad, target_grad = options
    ctx.options = mode, low, high, reduction, *pred.shape[1:], pred.dtype
    ctx.kept_for = pred_grad, target_grad
    ctx.masks = (-1, -1) if low == high else (0, int(pred_grad))
    ctx.save_for_backward(kept)


def _gradients(ctx, grad: Tensor, kept: Tensor) -> tuple[Tensor | None, Tensor | None]:
    to_pred, to_target = ctx.needs_input_grad[:2]
    if (to_pred and not ctx.kept_for[0]) or (to_target and not ctx.kept_for[1]):
        raise RuntimeError(
            "rfsr_ext::haar_ll_l1 has a gradient only for inputs it was told of by pred_grad, target_grad"
        )
    backward = operator("haar_ll_l1_backward")
    return (
        backward(grad, kept, *ctx.options, ctx.masks[0]) if to_pred else None,
        backward(-grad, kept, *ctx.options, ctx.masks[1]) if to_target else None,
    )


def _haar_ll_l1_setup(ctx, inputs, output) -> None:
    _remember(ctx, inputs[0], output[1], inputs[2:])
    ctx.mark_non_differentiable(output[1])


def _haar_ll_l1_grad(ctx, grad: Tensor, _) -> tuple:
    return *_gradients(ctx, grad, *ctx.saved_tensors), *[None] * 6


class _EagerL1(torch.autograd.Function):
    """The loss outside torch.compile: the registered gradient walks the schema in Python at every call, which for a
    small image takes longer than the image."""

    @staticmethod
    def forward(ctx, pred: Tensor, target: Tensor, options: tuple) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            loss, kept = torch.ops.rfsr_ext.haar_ll_l1(pred, target, *options)
        _remember(ctx, pred, kept, options)
        return loss

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        (grad,), (kept,) = grads, ctx.saved_tensors  # not below autograd: unpacking may run a checkpointed forward pass
        if torch.is_grad_enabled() or is_transformed():  # a second derivative may be asked for
            return *_gradients(ctx, grad, kept), None
        with torch._C._AutoDispatchBelowAutograd():
            return *_gradients(ctx, grad, kept), None


def _haar_ll_l1_backward_setup(ctx, inputs, output) -> None:
    grad, kept, *ctx.options = inputs
    ctx.save_for_backward(grad, kept)


def _haar_ll_l1_backward_grad(ctx, grad: Tensor) -> tuple:
    # The gradient of the loss is a factor, one for all or one for each sample, times what the signs give.
    factor, kept = ctx.saved_tensors
    *options, _, mask = ctx.options
    slope = operator("haar_ll_l1_backward")(torch.ones_like(factor), kept, *options, factor.dtype, mask)
    product = (grad.to(factor.dtype) * slope).sum((1, 2, 3))
    return product.sum() if factor.ndim == 0 else product, *[None] * 10


for _name, _grad, _setup in (
    ("haar_ll", _haar_ll_grad, _haar_ll_setup),
    ("haar_ll_backward", _haar_ll_backward_grad, _haar_ll_backward_setup),
    ("haar_ll_l1", _haar_ll_l1_grad, _haar_ll_l1_setup),
    ("haar_ll_l1_backward", _haar_ll_l1_backward_grad, _haar_ll_l1_backward_setup),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _grad, setup_context=_setup)
