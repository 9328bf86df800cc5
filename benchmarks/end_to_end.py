"""Whole training steps with our operators, and the same steps with a peer in their place."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.models import load_model
from rfsr_ext.sampling import generators
from rfsr_ext.training import RFSRConfig, build_objective, setup

PLACES = {"haar": "rfsr_ext.losses.haar.haar_ll_l1_loss", "gram": "rfsr_ext.losses.gram.gram_loss"}
Step = Callable[[], Tensor]  # a loss whose gradients have been computed


def vgg_gram_step(side: int, device: str) -> Step:
    """`VGGGramLoss` (random VGG19) and its gradient with respect to a picture."""
    module = VGGGramLoss(weights="random").to(device)
    pred, target = torch.rand(2, 1, 3, side, side, device=device).unbind()
    pred.requires_grad_()

    def step():
        loss = module(pred, target)
        torch.autograd.grad(loss, pred)
        return loss.detach()

    return step


def rfsr_step(sampling_step: int, term: str, device: str) -> Step:
    """Loss and gradients of one iteration of the preset ``mini``, without the optimizer; the step returns one term."""
    config = RFSRConfig.load("mini")
    model = load_model(config.model).to(device)
    objective = build_objective(config, model)
    parameters = list(model.unfreeze().trained_parameters().values())
    with torch.no_grad():
        for parameter in parameters:  # as after some training: at its start the style loss is 0 whatever computes it
            parameter.mul_(1.01)
    crops = setup.build_dataset(config)
    batch = [crops[i] for i in range(config.batch_size)]
    lr, gt = (torch.stack([sample[key] for sample in batch]).to(device) for key in ("lr", "gt"))
    prompts = [sample["prompt"] for sample in batch]

    def step():
        loss, logs = objective(lr, gt, prompts, sampling_step, generators(0, range(len(batch))))
        torch.autograd.grad(loss, parameters, allow_unused=True)
        return logs[term]

    return step


STEPS: dict[str, tuple[str, Callable[[str], Step]]] = {
    "VGGGramLoss, fwd+bwd, 256² image": ("gram", lambda device: vgg_gram_step(256, device)),
    "VGGGramLoss, fwd+bwd, 512² image": ("gram", lambda device: vgg_gram_step(512, device)),
    "RFSR iteration, structure window": ("haar", lambda device: rfsr_step(2, "structure", device)),
    "RFSR iteration, reward window": ("gram", lambda device: rfsr_step(9, "style", device)),
}


def fitting(operator: str, loss: Callable) -> Callable:
    """A peer with the signature the loss modules call; that it does the same is checked, not believed.

    The modules also pass their options, which are all at their defaults here.
    """
    if operator == "haar":
        return lambda pred, target, **options: loss(pred, target)
    return lambda features, targets, weights, **options: sum(
        w * loss([f], [t]) for w, f, t in zip(weights, features, targets, strict=True)
    )


def with_loss(operator: str, step: Step, loss: Callable) -> Step:
    """``step`` with ``loss`` in our operator's place. Ours is put there too, so that swapping costs both the same."""

    def run():
        with mock.patch(PLACES[operator], loss):
            return step()

    return run


def loss_alone(operator: str, step: Step, loss: Callable) -> Step:
    """``loss`` and its gradient at the very tensors ``step`` gives it: the most a faster loss could save."""
    with mock.patch(PLACES[operator], side_effect=loss) as spy:
        step()
    (pred, target, *weights), options = spy.call_args
    as_list = isinstance(pred, (list, tuple))
    pred = [x.detach().requires_grad_() for x in (pred if as_list else [pred])]
    target = [x.detach() for x in (target if as_list else [target])]

    def run():
        inputs = (pred, target, *weights) if as_list else (pred[0], target[0])
        value = loss(*inputs, **options)
        torch.autograd.grad(value, pred)
        return value.detach()

    return run
