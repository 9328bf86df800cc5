"""Gram matrix and the distances of Gram matrices (arXiv 2412.03268, eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, reference
from ._library import NAMESPACE, define, operator, promote_under_autocast
from .reference import CRITERIA


def gram_matrix(features: Tensor, *, joint_layer_norm: bool = False) -> Tensor:
    r"""Gram matrix of each sample's features.

    .. math:: G_{ij} = \frac{1}{CHW} \sum_k F_{ik} F_{jk}, \qquad k \text{ over the } HW \text{ pixels}

    With ``joint_layer_norm`` it is the Gram matrix of ``F.layer_norm(f, f.shape[1:])``, a sample's features less their
    mean and divided by their standard deviation, which the released RFSR code takes. Those features are not written:
    with the features' mean :math:`\mu`, variance :math:`\sigma^2` and channel means :math:`m` it is

    .. math:: \frac{G_{ij} - \mu (m_i + m_j - \mu) / C}{\sigma^2 + 10^{-5}}, \qquad
              \sigma^2 = \operatorname{tr} G - \mu^2

    taken of features less their mean at the centre pixel, so that a large mean costs no digits.

    Half types are added up in fp32 and the result stays fp32, so large activations do not overflow. Differentiable any
    number of times, in reverse and forward mode and under ``torch.func``. Bitwise reproducible for any number of
    threads. Under autocast the features keep their dtype.

    Args:
        features: ``[N, C, H, W]``, fp64, fp32, bf16 or fp16, any strides.
        joint_layer_norm: normalise each sample over C, H and W together.

    Returns:
        ``[N, C, C]``; fp64 for fp64, else fp32.

    Raises:
        TypeError: ``features`` is not a floating-point tensor.
        ValueError: ``features`` does not have four dimensions, or C, H or W is 0.

    Equivalent to::

        f = features.float()
        if joint_layer_norm:
            f = torch.nn.functional.layer_norm(f, f.shape[1:])
        torch.bmm(f.flatten(2), f.flatten(2).mT) / f[0].numel()

    Source: arXiv 2412.03268, eq. 6; the layer norm is the released RFSR code's.
    """
    _checks.image_like(features, "features")
    return _gram(features, joint_layer_norm)


def gram_loss(
    features: Tensor | Sequence[Tensor],
    target_features: Tensor | Sequence[Tensor] | None = None,
    weights: Sequence[float] | None = None,
    *,
    target_gram: Tensor | Sequence[Tensor] | None = None,
    criterion: str = "l2",
    joint_layer_norm: bool = False,
) -> Tensor:
    r"""Distance of Gram matrices, mean over the batch, weighted sum over layers.

    .. math:: L = \sum_l w_l \frac1N \sum_n d(G(F^l_n) - G(\hat F^l_n)), \qquad d(D) =
              \sum D_{ij}^2 \text{ (l2)},\ \sum |D_{ij}| \text{ (l1)},\ \sqrt{\textstyle\sum D_{ij}^2} \text{ (fro)}

    Of two features the two Gram matrices are not written, only their difference is, and it is what is kept for
    backward (beside the features). With ``target_gram`` the features' own is written too; with ``joint_layer_norm``
    one per side is kept as well. Differentiable in either or both inputs, as :func:`gram_matrix` is, under any
    criterion; where D is 0 the derivative of l1 and of fro is 0. Finite in fp16 at activations of several hundred. An
    empty batch gives NaN, as ``torch.mean`` does. Bitwise reproducible for any number of threads.

    Under autocast the features keep their dtypes, and two different ones are promoted to one that holds both.

    Args:
        features: one layer ``[N, C, H, W]`` or a list of layers; fp64, fp32, bf16 or fp16, any strides.
        target_features: the same number of layers with the same shapes, dtypes and devices; or
        target_gram: for each layer ``gram_matrix(target, joint_layer_norm=joint_layer_norm)``, computed once and used
            again. ``[N, C, C]``, fp64 for fp64, else fp32.
        weights: one number per layer; 1 for every layer if not given.
        criterion: "l2" (eq. 6), "l1" or "fro". l1 is a sum over the C x C entries: divide the weights by C^2 for the
            mean, which the released RFSR code takes.
        joint_layer_norm: compare Gram matrices of features normalised over C, H and W, see :func:`gram_matrix`.

    Returns:
        Scalar; fp64 for fp64, else fp32.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: not four dimensions, C, H or W of 0, different shapes, devices or numbers of layers, an unknown
            criterion, both or neither of target_features and target_gram.

    Equivalent to (one layer, l2)::

        (gram_matrix(features) - gram_matrix(target_features)).square().sum((1, 2)).mean()

    Source: arXiv 2412.03268, eq. 6.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be 'l2', 'l1' or 'fro', got {criterion!r}")
    wanted, name = (target_features, "target_features") if target_gram is None else (target_gram, "target_gram")
    if wanted is None or (target_features is not None and target_gram is not None):
        given = "neither" if wanted is None else "both"
        raise ValueError(f"one of target_features and target_gram must be given, got {given}")
    layers, targets = _as_layers(features, "features"), _as_layers(wanted, name)
    if isinstance(features, Tensor) != isinstance(wanted, Tensor) or len(targets) != len(layers):
        raise ValueError(f"{name} must be {_describe(features)} as features is, got {_describe(wanted)}")
    if weights is not None and len(weights) != len(layers):
        raise ValueError(f"weights must hold one number per layer ({len(layers)}), got {len(weights)}")

    losses = []
    for index, (layer, target) in enumerate(zip(layers, targets, strict=True)):
        suffix = "" if isinstance(features, Tensor) else f"[{index}]"
        _checks.image_like(layer, f"features{suffix}")
        if target_gram is None:
            _checks.alike(target, f"{name}{suffix}", layer, f"features{suffix}")
        else:
            _check_gram(target, f"{name}{suffix}", layer, f"features{suffix}")
        if target_gram is None and not joint_layer_norm:
            loss = operator("gram_distance")(layer, target, CRITERIA.index(criterion))[0]
        else:
            gram = target if target_gram is not None else _gram(target, joint_layer_norm)
            loss = reference.distance(_gram(layer, joint_layer_norm) - gram, criterion)
        losses.append(loss if weights is None else weights[index] * loss)
    return sum(losses[1:], start=losses[0])


def _gram(features: Tensor, joint_layer_norm: bool) -> Tensor:
    if not joint_layer_norm:
        return operator("gram_moments")(features, None)[0]
    # The result does not depend on the shift, so the shift needs no gradient.
    centre = features.detach()[:, :, features.shape[2] // 2, features.shape[3] // 2]
    shift = centre.to(reference.acc_dtype(features.dtype)).mean(1)
    gram, means = operator("gram_moments")(features, shift)
    mean = means.mean(1, keepdim=True)
    variance = gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) - mean.square()
    half = mean / means.shape[1] * (means - mean / 2)  # of the correction: half[i] + half[j]
    scale = (1 / (variance + reference.LAYER_NORM_EPS)).expand_as(means)  # per row, so that its gradient adds rows
    return (gram - half.unsqueeze(2) - half.unsqueeze(1)) * scale.unsqueeze(2)


def _as_layers(value: Tensor | Sequence[Tensor], name: str) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a torch.Tensor or a list of them, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must hold at least one layer, got an empty list")
    return value


def _describe(value: Tensor | Sequence[Tensor]) -> str:
    if isinstance(value, Tensor):
        return "one tensor"
    return f"a list of {len(value)} layer{'s' * (len(value) != 1)}"


def _check_gram(gram: Tensor, name: str, layer: Tensor, layer_name: str) -> None:
    if not isinstance(gram, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(gram).__name__}")
    n, c = layer.shape[:2]
    if gram.shape != (n, c, c):
        raise ValueError(f"{name} must have {layer_name}'s Gram shape ({n}, {c}, {c}), got {tuple(gram.shape)}")
    if gram.dtype != reference.acc_dtype(layer.dtype):
        wanted, given = (str(dtype).removeprefix("torch.") for dtype in (reference.acc_dtype(layer.dtype), gram.dtype))
        raise TypeError(f"{name} must have {layer_name}'s Gram dtype {wanted}, got {given}")
    if gram.device != layer.device:
        raise ValueError(f"{name} must be on {layer_name}'s device {layer.device}, got {gram.device}")


# ------------------------------------------------------------------------------------ registration


def _gram_fake(features: Tensor) -> Tensor:
    n, c = features.shape[:2]
    return features.new_empty((n, c, c), dtype=reference.acc_dtype(features.dtype))


def _gram_moments_fake(features: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    size = (0,) if shift is None else features.shape[:2]
    return _gram_fake(features), features.new_empty(size, dtype=reference.acc_dtype(features.dtype))


def _gram_distance_fake(features: Tensor, target_features: Tensor, criterion: int) -> tuple[Tensor, Tensor]:
    return features.new_empty((), dtype=reference.acc_dtype(features.dtype)), _gram_fake(features)


def _gram_backward_fake(s: Tensor, features: Tensor, bias: Tensor | None) -> Tensor:
    return features.new_empty(features.shape)


define(
    "gram_moments",
    "(Tensor features, Tensor? shift) -> (Tensor gram, Tensor means)",
    reference.gram_moments,
    _gram_moments_fake,
)
define(
    "gram_distance",
    "(Tensor features, Tensor target_features, int criterion) -> (Tensor loss, Tensor difference)",
    reference.gram_distance,
    _gram_distance_fake,
)
define(
    "gram_backward",
    "(Tensor s, Tensor features, Tensor? bias) -> Tensor",
    reference.gram_backward,
    _gram_backward_fake,
)


def _size(features: Tensor) -> int:
    return features.shape[1] * features.shape[2] * features.shape[3]


def _pull_back(grad: Tensor, size: int) -> Tensor:
    """The matrix S with which the gradient of ``sum(grad * G(F))`` is ``S^T F``."""
    return (grad + grad.mT) / size


def _gram_moments_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gram_moments_grad(ctx, grad: Tensor, grad_means: Tensor) -> tuple:
    features, shift = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        raise RuntimeError(
            "rfsr_ext::gram_moments has no gradient in shift: a Gram with layer norm does not depend on it"
        )
    s, bias = _pull_back(grad, _size(features)), None
    if shift is not None:
        bias = grad_means / (features.shape[2] * features.shape[3]) - shift.unsqueeze(1) * s.sum(2)
    return operator("gram_backward")(s, features, bias), None


def _slope(difference: Tensor, criterion: str, grad: Tensor) -> Tensor:
    """Gradient of ``grad * distance(difference, criterion)``, in terms that can be differentiated again."""
    grad = grad / max(1, difference.shape[0])
    if criterion == "l2":
        return difference * (2 * grad)
    if criterion == "l1":
        return difference.sign() * grad
    norm = reference.frobenius_norm(difference)[:, None, None]
    return difference * (grad / norm).masked_fill(norm == 0, 0)


def _gram_distance_setup(ctx, inputs, output) -> None:
    features, target, criterion = inputs
    _, difference = output
    # Only what the wanted gradients need is kept alive: the difference, and the inputs that require one.
    wants = [x if x.requires_grad else None for x in (features, target)]
    ctx.save_for_backward(difference, *wants)
    ctx.criterion, ctx.size = CRITERIA[criterion], _size(features)
    ctx.set_materialize_grads(False)


def _gram_distance_grad(ctx, grad: Tensor | None, grad_difference: Tensor | None) -> tuple:
    if grad is None and grad_difference is None:
        return None, None, None
    difference, features, target = ctx.saved_tensors
    wants_features, wants_target, _ = ctx.needs_input_grad
    s = 0
    if grad is not None:  # the slope is symmetric: what _pull_back would do to it is a factor
        s = _slope(difference, ctx.criterion, grad * (2 / ctx.size))
    if grad_difference is not None:
        s = s + _pull_back(grad_difference, ctx.size)
    return (
        operator("gram_backward")(s, features, None) if wants_features else None,
        operator("gram_backward")(-s, target, None) if wants_target else None,
        None,
    )


def _gram_backward_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gram_backward_grad(ctx, grad: Tensor) -> tuple:
    # out = S^T F + b, so dS = F grad^T, dF = S grad and db = the sums of grad over pixels.
    s, features = ctx.saved_tensors
    wants_s, wants_features, wants_bias = ctx.needs_input_grad
    return (
        features.to(s.dtype).flatten(2) @ grad.to(s.dtype).flatten(2).mT if wants_s else None,
        operator("gram_backward")(s.mT, grad, None) if wants_features else None,
        grad.sum((2, 3), dtype=s.dtype) if wants_bias else None,
    )


torch.library.register_autograd(f"{NAMESPACE}::gram_moments", _gram_moments_grad, setup_context=_gram_moments_setup)
torch.library.register_autograd(f"{NAMESPACE}::gram_distance", _gram_distance_grad, setup_context=_gram_distance_setup)
torch.library.register_autograd(f"{NAMESPACE}::gram_backward", _gram_backward_grad, setup_context=_gram_backward_setup)
promote_under_autocast("gram_distance")
