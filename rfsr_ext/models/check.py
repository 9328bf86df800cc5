"""What every base model must satisfy, as one function: for tests, and for users before their first long run."""

import torch
from torch import Tensor

from rfsr_ext.models.base import Condition, ISRModel

__all__ = ["check_model"]


def check_model(model: ISRModel, lr: Tensor | None = None, prompts: list[str] | None = None) -> list[str]:
    """Try a model on a small batch and report what was found, or stop at the first thing that is wrong.

    1. `condition` gives an image of ``scale`` times the size of ``lr``, finite; `encode` and `decode` fit it.
    2. The process gives z_0 back from z_t = α z_0 + σ ε and the output that implies it.
    3. `predict` takes a scalar timestep and one per image; it and `initial_latents` treat images alike whatever their
       batch; whether `predict` sees the condition is reported.
    4. Of the gradients of a decoded estimate, one reaches every trained network, and none any other parameter.
    5. `reference` is frozen, predicts the same and shares no trained weight with the model.

    Args:
        model: it comes back as it was.
        lr: ``[N, 3, h, w]`` with N of at least 2; random by default, as large as ``multiple`` asks for.
        prompts: one per image.

    Returns:
        One line for each thing that was checked.

    Raises:
        ValueError: the first thing that is wrong, in one sentence.
    """
    generator = torch.Generator().manual_seed(0)
    if lr is None:
        side = 4 * model.multiple // model.scale or 1
        lr = torch.rand(2, 3, side, side, generator=generator)
    prompts = ["a photo"] * len(lr) if prompts is None else prompts
    if len(lr) < 2:
        raise ValueError(f"lr must hold at least 2 images, got {len(lr)}")
    asked = {name: p.requires_grad for n, m in model.networks.items() for name, p in _named(n, m)}
    grads = {name: p.grad for n, m in model.networks.items() for name, p in _named(n, m)}
    try:
        return _check(model, lr, prompts, generator)
    finally:
        for network, module in model.networks.items():
            for name, parameter in _named(network, module):
                parameter.requires_grad_(asked[name])
                parameter.grad = grads[name]


def _named(network: str, module: torch.nn.Module):
    return ((f"{network}.{name}", parameter) for name, parameter in module.named_parameters())


def _limit(output: Tensor) -> float:
    """Rounding that may lie between two ways to compute an output."""
    return (1e-3 if output.dtype == torch.float32 else 0.1) * (output.detach().float().std().item() or 1.0)


def _require(holds, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


def _check(model: ISRModel, lr: Tensor, prompts: list[str], generator: torch.Generator) -> list[str]:
    kind, found = type(model).__name__, []
    size = [len(lr), 3, *(n * model.scale for n in lr.shape[2:])]
    condition = model.condition(lr, prompts)
    image = condition.image
    _require(list(image.shape) == size, f"{kind}.condition must give an image {size}, got {list(image.shape)}")
    _require(image.isfinite().all(), f"{kind}.condition must give a finite image")
    latents = model.encode(image)
    wanted = [len(lr), model.latent_channels, *(n // model.vae_scale_factor for n in size[2:])]
    _require(list(latents.shape) == wanted, f"{kind}.encode must give {wanted}, got {list(latents.shape)}")
    _require(not latents.requires_grad, f"{kind}.encode must not record a gradient")
    decoded = list(model.decode(latents).shape)
    _require(decoded == size, f"{kind}.decode must give {size}, got {decoded}")
    found.append(f"images {size[2]}x{size[3]}, latents {wanted[1]}x{wanted[2]}x{wanted[3]}")

    process = model.process()
    timestep = process.timesteps[len(process) // 2]
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy = process.add_noise(latents, noise, timestep)
    back = process.pred_original_sample(process.target(latents, noise, timestep), timestep, noisy)
    error = ((back - latents).abs().max() / latents.abs().max().clamp_min(1e-6)).item()
    limit = 1e-3 if latents.dtype == torch.float32 else 0.1
    _require(
        error < limit, f"the process must give z_0 back from the right output, got a relative error of {error:.1e}"
    )
    found.append(f"{len(process)} network evaluations of {process.prediction_type}, the right output gives z_0 back")

    scaled = process.scale_model_input(noisy, timestep)
    _check_predict(model, scaled, timestep, condition)
    with torch.no_grad():
        difference = model.predict(scaled, timestep, model.condition(1 - lr, prompts)) - model.predict(
            scaled, timestep, condition
        )
    sees = "sees its condition" if difference.any() else "does NOT see its condition (a new ControlNet does not)"
    start = model.initial_latents(condition, process, [torch.Generator().manual_seed(i) for i in range(len(lr))])
    last = model.condition(lr[-1:], prompts[-1:])
    alone = model.initial_latents(last, process, [torch.Generator().manual_seed(len(lr) - 1)])
    _require(
        start.shape == latents.shape and (start[-1:] - alone).abs().max() <= _limit(start),
        f"{kind}.initial_latents must start an image alike whatever its batch, from its own LR image and generator",
    )
    found.append(f"predict treats every image alike and {sees}")

    model.unfreeze()
    output = model.predict(scaled, timestep, condition)
    estimate = model.decode(process.pred_original_sample(output, timestep, noisy))
    _require(estimate.requires_grad, f"the gradient is lost between {kind}.predict and {kind}.decode")
    parameters = dict(item for network, module in model.networks.items() for item in _named(network, module))
    trained = model.trained_parameters()
    for parameter in parameters.values():
        parameter.grad = None
    estimate.square().mean().backward()
    for network in model.trained:
        reached = [p for name, p in trained.items() if name.startswith(f"{network}.") and p.grad is not None]
        _require(any(p.grad.abs().max() > 0 for p in reached), f"no gradient reaches the trained network {network!r}")
    stray = [name for name, p in parameters.items() if p.grad is not None and name not in trained]
    _require(not stray, f"a gradient must reach trained parameters only, got one at {stray[0] if stray else ''}")
    found.append(
        f"the gradient reaches {', '.join(model.trained)}: {sum(p.numel() for p in trained.values()):,} numbers"
    )

    reference = model.reference()
    theirs = {p.data_ptr() for p in reference.trained_parameters().values()}
    shared = [name for name, p in trained.items() if p.data_ptr() in theirs]
    _require(not shared, f"reference must not share trained weights with the model, got {shared[0] if shared else ''}")
    asking = [name for name, p in reference.trained_parameters().items() if p.requires_grad]
    _require(not asking, f"reference must be frozen, got a gradient asked for by {asking[0] if asking else ''}")
    with torch.no_grad():
        change = (reference.predict(scaled, timestep, condition) - output).abs().max()
    _require(change <= _limit(output), "reference must predict what the model predicts before training")
    found.append("the reference is frozen and shares no trained weight")
    return found


@torch.no_grad()
def _check_predict(model: ISRModel, scaled: Tensor, timestep: Tensor, condition: Condition) -> None:
    kind = type(model).__name__
    output = model.predict(scaled, timestep, condition)
    _require(
        output.shape == scaled.shape,
        f"{kind}.predict must keep the shape {list(scaled.shape)}, got {list(output.shape)}",
    )
    limit = _limit(output)
    each = model.predict(scaled, timestep.expand(len(scaled)), condition)
    _require(
        (each - output).abs().max() <= limit, f"{kind}.predict must take one timestep per image as it takes a scalar"
    )
    first = model.predict(scaled[:1], timestep, condition[:1])
    _require((first - output[:1]).abs().max() <= limit, f"{kind}.predict must not mix the images of a batch")
