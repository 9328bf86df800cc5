"""Denoising from x_T with the model's own noise process: up to a step, or all the way; never with gradient."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rfsr_ext.models import Condition, ISRModel, Process

__all__ = ["State", "denoise", "generators", "inference_condition", "rollout", "sample", "trajectory"]


def generators(seed: int, indices: list[int] | range, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One noise generator per image, each a function of ``(seed, index)`` alone.

    An image then gets the same noise in whatever batch or process it is, and however often a run was interrupted.
    """
    # The last mixing steps of SplitMix64: neighboring seeds and indices give unrelated streams.
    result = []
    for index in indices:
        state = (int(seed) * 0x9E3779B97F4A7C15 + (int(index) + 1) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        result.append(torch.Generator(device).manual_seed(state ^ (state >> 31)))
    return result


@dataclass(frozen=True)
class State:
    """The state before one sampling step.

    Attributes:
        step: its number st, from 1.
        timestep: t, 0 after the last step.
        latents: z_t.
        process: the trajectory's noise process, which has gone as far as this state.
    """

    step: int
    timestep: Tensor
    latents: Tensor
    process: Process


def denoise(
    model: ISRModel,
    process: Process,
    latents: Tensor,
    timestep: Tensor,
    condition: Condition,
    guidance_scale: float = 1.0,
) -> Tensor:
    """The network's output at z_t, with classifier-free guidance: the one place where both are applied.

    output = n + g (p − n), where p is predicted under ``condition`` and n under ``condition.negative``; a
    ``guidance_scale`` g of 1 is p alone, and so is the output where the process has no guidance (`Process.is_guided`).
    The latents are scaled for the network here.

    Raises:
        ValueError: if guidance is asked for and the condition has no negative.
    """
    scaled = process.scale_model_input(latents, timestep)
    output = model.predict(scaled, timestep, condition)
    if guidance_scale == 1 or not process.is_guided(timestep):
        return output
    if condition.negative is None:
        raise ValueError(
            f"condition must hold a negative condition for guidance_scale {guidance_scale:g}, got none; give "
            f"negative_prompts to model.condition"
        )
    negative = model.predict(scaled, timestep, condition.negative)
    return negative + guidance_scale * (output - negative)


def _states(model: ISRModel, condition: Condition, generator, num_inference_steps: int | None, guidance_scale: float):
    """Yield every state with a function that gives the network's output there; asking for the next takes the step."""
    height, width = condition.image.shape[-2:]
    process = model.process(num_inference_steps, (height, width))
    latents = model.initial_latents(condition, process, generator)
    for step, timestep in enumerate(process.timesteps, start=1):
        predict = functools.cache(
            functools.partial(denoise, model, process, latents, timestep, condition, guidance_scale)
        )
        yield State(step, timestep, latents, process), predict
        latents = process.step(predict(), timestep, latents, generator)
    yield State(step + 1, torch.zeros_like(timestep), latents, process), None


@torch.no_grad()
def trajectory(
    model: ISRModel,
    condition: Condition,
    generator: list[torch.Generator] | torch.Generator | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
) -> Iterator[tuple[State, Tensor]]:
    """Denoise all the way; yield the state before each step with the z_0 estimate made from it.

    The last item is the end: ``step`` one past the last sampling step, and the final latents in both places.
    """
    for state, predict in _states(model, condition, generator, num_inference_steps, guidance_scale):
        if predict is None:
            yield state, state.latents
        else:
            yield state, state.process.pred_original_sample(predict(), state.timestep, state.latents)


@torch.no_grad()
def rollout(
    model: ISRModel,
    condition: Condition,
    step: int,
    generator: list[torch.Generator] | torch.Generator | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
) -> State:
    """x_T → … → z_t without gradient: the state before sampling step ``step`` (1 gives x_T itself).

    The paper then takes one step with gradient from there (section 3.5).

    Raises:
        ValueError: if ``step`` is not one of the sampling steps.
    """
    last = len(model.process(num_inference_steps))
    if not 1 <= step <= last:
        raise ValueError(f"step must be a sampling step from 1 to {last}, got {step}")
    states = _states(model, condition, generator, num_inference_steps, guidance_scale)
    return next(itertools.islice(states, step - 1, None))[0]


def inference_condition(
    model: ISRModel,
    lr: Tensor,
    prompts: list[str],
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
) -> tuple[Condition, float]:
    """The condition of inference and its guidance scale; what is None comes from ``model.recipe``.

    A prompt is what the model itself says of the image, what is given, and the recipe's ``added_prompt``.
    """
    recipe = model.recipe
    scale = recipe.guidance_scale if guidance_scale is None else guidance_scale
    negative = recipe.negative_prompt if negative_prompt is None else negative_prompt
    seen = model.describe(lr.to(model.device, model.dtype))
    parts = zip(seen, prompts, [recipe.added_prompt] * len(prompts), strict=True)
    texts = [", ".join(filter(None, texts)) for texts in parts]
    return model.condition(lr, texts, None if scale == 1 else [negative] * len(texts)), scale


@torch.no_grad()
def sample(
    model: ISRModel,
    lr: Tensor,
    prompts: list[str],
    generator: list[torch.Generator] | torch.Generator | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
) -> Tensor:
    """LR images ``[N, 3, h, w]`` in [0, 1] to SR images ``[N, 3, scale·h, scale·w]`` in [0, 1].

    What is None is the model's recipe's.
    """
    condition, scale = inference_condition(model, lr, prompts, guidance_scale, negative_prompt)
    *_, (_, latents) = trajectory(model, condition, generator, num_inference_steps, scale)
    return model.decode(latents).clamp(0, 1)
