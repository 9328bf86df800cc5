"""Gram matrix and the Gram loss over it (arXiv 2412.03268, eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, reference
from ._library import NAMESPACE, define


def gram_matrix(features: Tensor) -> Tensor:
    r"""Gram matrix of each sample's features.

    .. math:: G_{ij} = \frac{1}{CHW} \sum_k F_{ik} F_{jk}, \qquad k \text{ over the } HW \text{ pixels}

    Half types are added up in fp32 and the result stays fp32, so large activations do not overflow. Twice
    differentiable. Bitwise reproducible for any number of threads.

    Args:
        features: ``[N, C, H, W]``, fp64, fp32, bf16 or fp16, any strides.

    Returns:
        ``[N, C, C]``; fp64 for fp64, else fp32.

    Raises:
        TypeError: ``features`` is not a floating-point tensor.
        ValueError: ``features`` does not have four dimensions, or C, H or W is 0.

    Equivalent to::

        f = features.float().flatten(2)
        torch.bmm(f, f.mT) / f[0].numel()

    Source: arXiv 2412.03268, eq. 6.
    """
    _checks.image_like(features, "features")
    return torch.ops.rfsr_ext.gram_matrix(features)


def gram_loss(
    features: Tensor | Sequence[Tensor],
    target_features: Tensor | Sequence[Tensor],
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Squared distance of Gram matrices, mean over the batch, weighted sum over layers.

    .. math:: L = \sum_l w_l \frac1N \sum_n \| G(F^l_n) - G(\hat F^l_n) \|_F^2

    The two Gram matrices are not written, only their difference is. Differentiable (twice) in either or both
    inputs; finite in fp16 at activations of several hundred. An empty batch gives NaN, as ``torch.mean`` does.
    Bitwise reproducible for any number of threads.

    Args:
        features: one layer ``[N, C, H, W]`` or a list of layers; fp64, fp32, bf16 or fp16, any strides.
        target_features: the same number of layers with the same shapes, dtypes and devices.
        weights: one number per layer; 1 for every layer if not given.

    Returns:
        Scalar; fp64 for fp64, else fp32.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: not four dimensions, C, H or W of 0, different shapes, devices or numbers of layers.

    Equivalent to (one layer)::

        (gram_matrix(features) - gram_matrix(target_features)).square().sum((1, 2)).mean()

    Source: arXiv 2412.03268, eq. 6.
    """
    layers = _as_layers(features, "features")
    targets = _as_layers(target_features, "target_features")
    if isinstance(features, Tensor) != isinstance(target_features, Tensor) or len(targets) != len(layers):
        wanted, given = _describe(features, layers), _describe(target_features, targets)
        raise ValueError(f"target_features must be {wanted} as features is, got {given}")
    if weights is None:
        weights = [1.0] * len(layers)
    elif len(weights) != len(layers):
        raise ValueError(f"weights must hold one number per layer ({len(layers)}), got {len(weights)}")

    total = None
    for index, (layer, target, weight) in enumerate(zip(layers, targets, weights, strict=True)):
        suffix = "" if isinstance(features, Tensor) else f"[{index}]"
        _checks.image_like(layer, f"features{suffix}")
        _checks.alike(target, f"target_features{suffix}", layer, f"features{suffix}")
        loss = torch.ops.rfsr_ext.gram_l2(layer, target)[0]
        loss = loss if weight == 1 else weight * loss
        total = loss if total is None else total + loss
    return total


def _as_layers(value: Tensor | Sequence[Tensor], name: str) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a torch.Tensor or a list of them, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must hold at least one layer, got an empty list")
    return value


def _describe(value: Tensor | Sequence[Tensor], layers: Sequence[Tensor]) -> str:
    return "one tensor" if isinstance(value, Tensor) else f"a list of {len(layers)} layer{'s' * (len(layers) != 1)}"


# ------------------------------------------------------------------------------------ registration


def _gram_matrix_fake(features: Tensor) -> Tensor:
    n, c = features.shape[:2]
    return features.new_empty((n, c, c), dtype=reference.acc_dtype(features.dtype))


def _gram_l2_fake(features: Tensor, target_features: Tensor) -> tuple[Tensor, Tensor]:
    return features.new_empty((), dtype=reference.acc_dtype(features.dtype)), _gram_matrix_fake(features)


def _gram_backward_fake(s: Tensor, features: Tensor) -> Tensor:
    return features.new_empty(features.shape)


define("gram_matrix", "(Tensor features) -> Tensor", reference.gram_matrix, _gram_matrix_fake)
define(
    "gram_l2",
    "(Tensor features, Tensor target_features) -> (Tensor loss, Tensor difference)",
    reference.gram_l2,
    _gram_l2_fake,
)
define("gram_backward", "(Tensor s, Tensor features) -> Tensor", reference.gram_backward, _gram_backward_fake)


def _gram_matrix_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _pull_back(grad: Tensor, features: Tensor) -> Tensor:
    """Gradient of ``sum(grad * G(features))``: ``(grad + grad^T) F / (C H W)``."""
    s = (grad + grad.mT) / (features.shape[1] * features.shape[2] * features.shape[3])
    return torch.ops.rfsr_ext.gram_backward(s, features)


def _gram_matrix_grad(ctx, grad: Tensor) -> Tensor:
    (features,) = ctx.saved_tensors
    return _pull_back(grad, features)


def _gram_l2_setup(ctx, inputs, output) -> None:
    features, target = inputs
    _, difference = output
    # Only what the wanted gradients need is kept alive: the difference, and the inputs that require one.
    wants = [x if x.requires_grad else None for x in (features, target)]
    ctx.save_for_backward(difference, *wants)


def _gram_l2_grad(ctx, grad_loss: Tensor, grad_difference: Tensor) -> tuple:
    difference, features, target = ctx.saved_tensors
    grad = grad_difference + difference * (2 / max(1, difference.shape[0]) * grad_loss)
    return (
        _pull_back(grad, features) if ctx.needs_input_grad[0] else None,
        _pull_back(-grad, target) if ctx.needs_input_grad[1] else None,
    )


def _gram_backward_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gram_backward_grad(ctx, grad: Tensor) -> tuple:
    # out = S^T F, so dS = F grad^T and dF = S grad.
    s, features = ctx.saved_tensors
    grad_s = features.to(s.dtype).flatten(2) @ grad.to(s.dtype).flatten(2).mT if ctx.needs_input_grad[0] else None
    grad_f = torch.ops.rfsr_ext.gram_backward(s.mT, grad) if ctx.needs_input_grad[1] else None
    return grad_s, grad_f


torch.library.register_autograd(f"{NAMESPACE}::gram_matrix", _gram_matrix_grad, setup_context=_gram_matrix_setup)
torch.library.register_autograd(f"{NAMESPACE}::gram_l2", _gram_l2_grad, setup_context=_gram_l2_setup)
torch.library.register_autograd(f"{NAMESPACE}::gram_backward", _gram_backward_grad, setup_context=_gram_backward_setup)
