"""Denoising from x_T with the model's own scheduler: up to a step, or all the way; never with gradient."""

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rfsr_ext.models import Condition, ISRModel

__all__ = ["Trajectory", "generators", "rollout", "sample", "trajectory"]


def generators(seed: int, indices: list[int] | range, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One noise generator per image, each a function of ``(seed, index)`` alone.

    An image then gets the same noise in whatever batch or process it is, and however often a run was interrupted.
    """
    # SplitMix64's finaliser: neighbouring seeds and indices give unrelated streams
    result = []
    for index in indices:
        state = (int(seed) * 0x9E3779B97F4A7C15 + (int(index) + 1) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        result.append(torch.Generator(device).manual_seed(state ^ (state >> 31)))
    return result


@dataclass(frozen=True)
class Trajectory:
    """The state before one sampling step: its number st (from 1), its timestep and the latents z_t it starts from."""

    step: int
    timestep: Tensor
    latents: Tensor


def _states(model: ISRModel, condition: Condition, generator, num_inference_steps: int | None):
    """Yield every state with a function that gives the model's output there; going on takes the step, lazily."""
    scheduler = copy.deepcopy(model.scheduler)  # multistep solvers keep a history; the model's own stays clean
    scheduler.set_timesteps(num_inference_steps or model.num_inference_steps)
    accepted = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in accepted else {}
    latents = model.initial_latents(condition, scheduler.timesteps[0], generator)
    for step, timestep in enumerate(scheduler.timesteps, start=1):
        scaled = scheduler.scale_model_input(latents, timestep)
        predict = functools.cache(functools.partial(model.predict_noise, scaled, timestep, condition))
        yield Trajectory(step, timestep, latents), predict
        latents = scheduler.step(predict(), timestep, latents, **options, return_dict=False)[0]
    yield Trajectory(step + 1, torch.zeros_like(timestep), latents), None


@torch.no_grad()
def trajectory(
    model: ISRModel,
    condition: Condition,
    generator: list[torch.Generator] | torch.Generator | None = None,
    num_inference_steps: int | None = None,
) -> Iterator[tuple[Trajectory, Tensor]]:
    """Denoise all the way; yield the state before each step with the z_0 estimate made from it.

    The last item is the end: ``step`` one past the last sampling step, and the final latents in both places.
    """
    for state, predict in _states(model, condition, generator, num_inference_steps):
        if predict is None:
            yield state, state.latents
        else:
            yield state, model.pred_original_sample(predict(), state.timestep, state.latents)


@torch.no_grad()
def rollout(
    model: ISRModel,
    condition: Condition,
    step: int,
    generator: list[torch.Generator] | torch.Generator | None = None,
    num_inference_steps: int | None = None,
) -> Trajectory:
    """x_T → … → z_t without gradient: the state before sampling step ``step`` (1 gives x_T itself).

    The paper then takes one step with gradient from there (section 3.5).

    Raises:
        ValueError: if ``step`` is not one of the sampling steps.
    """
    last = num_inference_steps or model.num_inference_steps
    if not 1 <= step <= last:
        raise ValueError(f"step must be a sampling step from 1 to {last}, got {step}")
    return next(itertools.islice(_states(model, condition, generator, num_inference_steps), step - 1, None))[0]


@torch.no_grad()
def sample(
    model: ISRModel,
    lr: Tensor,
    prompts: list[str],
    generator: list[torch.Generator] | torch.Generator | None = None,
    num_inference_steps: int | None = None,
) -> Tensor:
    """LR images ``[N, 3, h, w]`` in [0, 1] to SR images ``[N, 3, scale·h, scale·w]`` in [0, 1]."""
    condition = model.encode_condition(lr, prompts)
    *_, (_, latents) = trajectory(model, condition, generator, num_inference_steps)
    return model.decode(latents).clamp(0, 1)
