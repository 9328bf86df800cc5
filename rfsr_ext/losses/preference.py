"""Diffusion-DPO (Wallace et al., 2023, arXiv 2311.12908, eq. 14), the loss of DP2O-SR (arXiv 2510.18851, eq. 1)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BETA_CONVENTIONS", "diffusion_dpo_loss"]

# By name: the factor of β before the difference of errors, and whether an error is a mean or a sum over a sample.
BETA_CONVENTIONS = {"half-mean": (0.5, True), "mean": (1.0, True), "sum": (1.0, False)}


def diffusion_dpo_loss(
    output: Tensor,
    reference_output: Tensor,
    target: Tensor,
    beta: float = 5000.0,
    convention: str = "half-mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """How little a network prefers the better of two samples, compared with the network it started from.

    With e = ‖output − target‖² of the trained network and e_ref of the reference, for winner w and loser l::

        margin = −c β [(e(w) − e_ref(w)) − (e(l) − e_ref(l))]        loss = mean of weight · (−log sigmoid(margin))

    The output may be noise, velocity, flow or the sample itself, with the target that belongs to it.  Winner and loser
    must have been noised to the same timestep by the same noise, which leaves the least variance.  What c is, and
    whether e is a mean or a sum over a sample's elements, public code does not agree on, so that β means different
    things:

    =========== ===== ====== =========================================================================================
    convention  c     e      where
    =========== ===== ====== =========================================================================================
    "half-mean" 1/2   mean   the authors' code of Diffusion-DPO (β 2000 to 5000), diffusers' script for SDXL, Flow-GRPO
    "mean"      1     mean   diffusers' script for SD 1.5, whose default β of 2500 is 5000 in the row above
    "sum"       1     sum    the formula as printed, T·ω(λ) counted into β
    =========== ===== ====== =========================================================================================

    β of "half-mean" is β/2 of "mean" and β/(2n) of "sum", for samples of n elements.

    Args:
        output: of the trained network, ``[2, N, …]``: winners, then losers.
        reference_output: of the reference at the same inputs, of the same shape; it gets no gradient.
        target: what the network should give, of the same shape.
        beta: how closely the reference is held; larger is closer.
        convention: see the table.
        weight: ``[N]`` of the pairs; 1 by default.  The mean is over pairs, not over weights.

    Returns:
        The loss, and detached scalars to log: ``loss``; ``accuracy``, the share of pairs with a positive margin, a
        margin of 0 counting half; ``margin``; ``winner`` and ``loser``, the means of e − e_ref relative to the mean of
        e_ref (both above 0: the network unlearns winners, too, only more slowly); ``drift``, the mean of
        ‖output − reference_output‖² relative to the mean of e_ref, which is proportional to the Kullback–Leibler
        divergence of a denoising step from the reference's.

    Raises:
        ValueError: if shapes do not agree, the convention is not known or ``beta`` is not above 0.
    """
    if output.ndim < 3 or output.shape[0] != 2 or not output.shape == reference_output.shape == target.shape:
        raise ValueError(
            f"output, reference_output and target must share a shape [2, N, ...], got {list(output.shape)}, "
            f"{list(reference_output.shape)} and {list(target.shape)}"
        )
    if weight is not None and weight.shape != output.shape[1:2]:
        raise ValueError(f"weight must have shape {list(output.shape[1:2])}, got {list(weight.shape)}")
    if convention not in BETA_CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(BETA_CONVENTIONS)}, got {convention!r}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta:g}")
    factor, averages = BETA_CONVENTIONS[convention]
    reference_output, target = reference_output.detach(), target.detach()
    error, reference_error = _squared(output, target), _squared(reference_output, target)
    change = error - reference_error
    elements = 1 if averages else target[0, 0].numel()
    margin = -factor * beta * elements * (change[0] - change[1])
    losses = -F.logsigmoid(margin)
    loss = (losses if weight is None else weight.to(losses) * losses).mean()
    with torch.no_grad():
        scale = reference_error.mean()
        logs: dict[str, Any] = {
            "loss": loss,
            "accuracy": (margin.sign() / 2 + 0.5).mean(),
            "margin": margin.mean(),
            "winner": change[0].mean() / scale,
            "loser": change[1].mean() / scale,
            "drift": _squared(output, reference_output).mean() / scale,
        }
    return loss, {name: value.detach() for name, value in logs.items()}


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of every sample, ``[2, N]``; differences of these are small, so in fp32 at least."""
    exact = torch.promote_types(a.dtype, torch.float32)
    return (a.to(exact) - b.to(exact)).square().flatten(2).mean(2)
