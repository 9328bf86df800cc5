"""The loss of Diffusion-DPO against its closed form in double precision and against what the public scripts compute."""

import json
import math
from pathlib import Path

import pytest
import torch

from rfsr_ext.losses import diffusion_dpo_loss
from tests.losses.released.make import numbers

RELEASED = json.loads((Path(__file__).parent / "released/dpo.json").read_text())


def stacked(dtype=torch.float32):
    given = {name: tensor.to(dtype).unflatten(0, (2, -1)) for name, tensor in numbers().items()}
    return given["output"].requires_grad_(), given["reference"], given["target"]


def by_hand(output, reference, target, factor, weight):
    """Loss and gradient written out: ∂loss/∂output = ±2 c β w (1 − sigmoid(margin)) (output − target) / N."""
    error, reference_error = ((x - target).square().sum((2, 3, 4)) for x in (output, reference))
    margin = -factor * ((error - reference_error)[0] - (error - reference_error)[1])
    loss = (weight * torch.log1p(torch.exp(-margin))).mean()
    pull = (weight / (1 + torch.exp(margin)) * 2 * factor / len(weight)).reshape(-1, 1, 1, 1)
    return loss, torch.stack([pull * (output - target)[0], -pull * (output - target)[1]])


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_are_the_closed_form(weighted):
    output, reference, target = stacked(torch.float64)
    weight = torch.tensor([0.7, 1.0, 1.4], dtype=torch.float64) if weighted else None
    loss, _ = diffusion_dpo_loss(output, reference, target, beta=3.0, convention="sum", weight=weight)
    loss.backward()
    ones = torch.ones(3, dtype=torch.float64)
    wanted, gradient = by_hand(output.detach(), reference, target, 3.0, ones if weight is None else weight)
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.grad, gradient, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(lambda x: diffusion_dpo_loss(x, reference, target, 3.0, "sum", weight)[0], output)


@pytest.mark.parametrize("name", RELEASED)
def test_the_public_scripts_compute_the_same(name):
    wanted = RELEASED[name]
    output, reference, target = stacked()
    loss, logs = diffusion_dpo_loss(output, reference, target, wanted["beta"], name.partition(",")[0])
    loss.backward()
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-4)
    assert logs["accuracy"].item() == pytest.approx(wanted["accuracy"])
    gradient = torch.tensor(wanted["gradient"])
    assert gradient.abs().max() > 0.01
    torch.testing.assert_close(output.grad.flatten()[::7], gradient, rtol=1e-3, atol=1e-6)


def test_conventions_differ_and_are_one_with_their_betas():
    output, reference, target = stacked(torch.float64)
    elements = target[0, 0].numel()
    of = {
        name: [diffusion_dpo_loss(output, reference, target, beta, name)[0].item() for beta in (5000.0, own)]
        for name, own in {"half-mean": 5000.0, "mean": 2500.0, "sum": 2500.0 / elements}.items()
    }
    own = [values[1] for values in of.values()]
    assert own == pytest.approx([own[0]] * 3, rel=1e-12)
    assert len({round(values[0], 3) for values in of.values()}) == 3  # one β is not one loss


def test_at_the_reference_nothing_is_preferred():
    _, reference, target = stacked()
    output = reference.clone().requires_grad_()
    loss, logs = diffusion_dpo_loss(output, reference, target)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and logs["accuracy"] == 0.5
    assert logs["margin"] == logs["winner"] == logs["loser"] == logs["drift"] == 0
    closer = output.detach() - 1e-4 * output.grad  # downhill: winners nearer to their targets, losers farther
    error = (closer - target).square().mean((1, 2, 3, 4)) - (reference - target).square().mean((1, 2, 3, 4))
    assert error[0] < 0 < error[1]
    _, logs = diffusion_dpo_loss(closer, reference, target)
    assert logs["accuracy"] == 1 and logs["winner"] < 0 < logs["loser"] and logs["drift"] > 0


def test_logs_are_their_definitions():
    output, reference, target = (x.detach() for x in stacked(torch.float64))
    _, logs = diffusion_dpo_loss(output, reference, target)
    scale = (reference - target).square().mean()
    torch.testing.assert_close(logs["drift"], (output - reference).square().mean() / scale)
    wins, losses = ((x[i] - target[i]).square().mean() for i in (0, 1) for x in (output,))
    before = [(reference[i] - target[i]).square().mean() for i in (0, 1)]
    torch.testing.assert_close(logs["winner"], (wins - before[0]) / scale)
    torch.testing.assert_close(logs["loser"], (losses - before[1]) / scale)


def test_half_precision_is_subtracted_in_single():
    output, reference, target = (x.detach().bfloat16() for x in stacked())
    loss, _ = diffusion_dpo_loss(output, reference, target)
    exact, _ = diffusion_dpo_loss(output.double(), reference.double(), target.double())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target": torch.zeros(2, 3, 4, 3, 4)}, "must share a shape"),
        ({"weight": torch.ones(2)}, "weight must have shape"),
        ({"convention": "dpo"}, "convention must be one of half-mean, mean, sum, got 'dpo'"),
        ({"beta": 0.0}, "beta must be above 0, got 0"),
    ],
)
def test_sentences(changes, sentence):
    output, reference, target = stacked()
    given = {"output": output, "reference_output": reference, "target": target} | changes
    with pytest.raises(ValueError, match=sentence):
        diffusion_dpo_loss(**given)
