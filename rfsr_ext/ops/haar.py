"""Haar LL band and the L1 loss on it (arXiv 2412.03268, eq. 1 and 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, reference
from ._library import NAMESPACE, define


def haar_ll(x: Tensor) -> Tensor:
    r"""LL band of the one-level orthonormal Haar wavelet transform.

    .. math:: LL_{ij} = \tfrac12 (x_{2i,2j} + x_{2i,2j+1} + x_{2i+1,2j} + x_{2i+1,2j+1})

    An odd height or width is extended symmetrically by one sample, as ``pywt.dwt2(x, "haar", mode="symmetric")``
    does. Half types are added up in fp32 and rounded once. Bitwise reproducible.

    Args:
        x: ``[N, C, H, W]``, fp64, fp32, bf16 or fp16, any strides.

    Returns:
        ``[N, C, ceil(H/2), ceil(W/2)]`` in the dtype of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` does not have four dimensions, or C, H or W is 0.

    Equivalent to (even sizes)::

        2 * torch.nn.functional.avg_pool2d(x, 2)

    Source: the LL band of arXiv 2412.03268, eq. 1.
    """
    _checks.image_like(x, "x")
    return torch.ops.rfsr_ext.haar_ll(x)


def haar_ll_l1_loss(pred: Tensor, target: Tensor) -> Tensor:
    r"""L1 distance of two images in the Haar LL band, without writing the bands.

    .. math:: L = \operatorname{mean} |LL(\text{pred}) - LL(\text{target})|

    Differentiable in either or both inputs; the gradient of :math:`|d|` at 0 is 0. Only two bits per LL
    coefficient are kept for backward, so neither input is kept alive. An empty batch gives NaN, as
    ``torch.mean`` does. Bitwise reproducible for any number of threads. A second derivative (zero almost
    everywhere) is refused with a sentence.

    Args:
        pred: ``[N, C, H, W]``, fp64, fp32, bf16 or fp16, any strides.
        target: same shape, dtype and device as ``pred``.

    Returns:
        Scalar; fp64 for fp64, else fp32.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: not four dimensions, C, H or W of 0, different shapes or devices.

    Equivalent to (even sizes)::

        2 * torch.nn.functional.avg_pool2d(pred - target, 2).abs().mean()

    Source: arXiv 2412.03268, eq. 2.
    """
    _checks.image_like(pred, "pred")
    _checks.alike(target, "target", pred, "pred")
    keep_signs = torch.is_grad_enabled() and (pred.requires_grad or target.requires_grad)
    return torch.ops.rfsr_ext.haar_ll_l1(pred, target, keep_signs)[0]


# ------------------------------------------------------------------------------------ registration


def _half(size: int) -> int:
    return (size + 1) // 2


def _haar_ll_fake(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty(n, c, _half(h), _half(w))


def _haar_ll_backward_fake(grad: Tensor, height: int, width: int) -> Tensor:
    return grad.new_empty(grad.shape[0], grad.shape[1], height, width)


def _haar_ll_l1_fake(pred: Tensor, target: Tensor, keep_signs: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = pred.shape
    packed = (_half(w) + reference.SIGNS_PER_BYTE - 1) // reference.SIGNS_PER_BYTE
    signs = (n, c, _half(h), packed) if keep_signs else (0,)
    return pred.new_empty((), dtype=reference.acc_dtype(pred.dtype)), pred.new_empty(signs, dtype=torch.uint8)


def _haar_ll_l1_backward_fake(grad: Tensor, signs: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return signs.new_empty((signs.shape[0], signs.shape[1], height, width), dtype=dtype)


define("haar_ll", "(Tensor x) -> Tensor", reference.haar_ll, _haar_ll_fake)
define(
    "haar_ll_backward",
    "(Tensor grad, SymInt height, SymInt width) -> Tensor",
    reference.haar_ll_backward,
    _haar_ll_backward_fake,
)
define(
    "haar_ll_l1",
    "(Tensor pred, Tensor target, bool keep_signs) -> (Tensor loss, Tensor signs)",
    reference.haar_ll_l1,
    _haar_ll_l1_fake,
)
define(
    "haar_ll_l1_backward",
    "(Tensor grad, Tensor signs, SymInt height, SymInt width, ScalarType dtype) -> Tensor",
    reference.haar_ll_l1_backward,
    _haar_ll_l1_backward_fake,
)


def _haar_ll_setup(ctx, inputs, output) -> None:
    ctx.size = inputs[0].shape[-2:]


def _haar_ll_grad(ctx, grad: Tensor) -> Tensor:
    return torch.ops.rfsr_ext.haar_ll_backward(grad, *ctx.size)


def _haar_ll_backward_grad(ctx, grad: Tensor) -> tuple:
    # The transform is linear, so the gradient of its gradient is the transform.
    return torch.ops.rfsr_ext.haar_ll(grad), None, None


def _haar_ll_l1_setup(ctx, inputs, output) -> None:
    pred, _, keep_signs = inputs
    _, signs = output
    ctx.keep_signs, ctx.size, ctx.dtype = keep_signs, pred.shape[-2:], pred.dtype
    ctx.mark_non_differentiable(signs)
    ctx.save_for_backward(signs)


def _haar_ll_l1_grad(ctx, grad: Tensor, _) -> tuple:
    if not ctx.keep_signs:
        raise RuntimeError("rfsr_ext::haar_ll_l1 was called with keep_signs=False and so has no gradient")
    (signs,) = ctx.saved_tensors
    g = torch.ops.rfsr_ext.haar_ll_l1_backward(grad, signs, *ctx.size, ctx.dtype)
    wants_pred, wants_target = ctx.needs_input_grad[:2]
    return g if wants_pred else None, -g if wants_target else None, None


def _haar_ll_l1_backward_grad(ctx, grad: Tensor) -> tuple:
    raise RuntimeError("haar_ll_l1_loss has no second derivative: it is zero almost everywhere, so use the first only")


torch.library.register_autograd(f"{NAMESPACE}::haar_ll", _haar_ll_grad, setup_context=_haar_ll_setup)
torch.library.register_autograd(f"{NAMESPACE}::haar_ll_backward", _haar_ll_backward_grad)
torch.library.register_autograd(f"{NAMESPACE}::haar_ll_l1", _haar_ll_l1_grad, setup_context=_haar_ll_l1_setup)
torch.library.register_autograd(f"{NAMESPACE}::haar_ll_l1_backward", _haar_ll_l1_backward_grad)
