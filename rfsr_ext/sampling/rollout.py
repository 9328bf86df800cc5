"""Denoising from x_T with the model's own noise process: up to a step, or all the way; never with gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rfsr_ext.models import Condition, ISRModel, Process

__all__ = ["Rollout", "State", "denoise", "generators", "inference_condition", "rollout", "sample", "trajectory"]


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
    """The network's output at z_t, ``[N, C, h, w]``, with classifier-free guidance; both are applied here alone.

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


class Rollout:
    """x_T → … → z_t without gradient: a trajectory that can be left at any step and gone on with later.

    Args:
        model: taken as it is at every step, so that a trajectory may begin before its weights change and end after it.
        condition: of every step.
        generator: noise of x_T and of a stochastic sampler, one or a list with one per image.
        num_inference_steps: of the whole trajectory; None takes the recipe's.
        guidance_scale: see `denoise`.

    Attributes:
        state: before the next sampling step; after the last one ``step`` is one past it and ``latents`` are the result.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: ISRModel,
        condition: Condition,
        generator: list[torch.Generator] | torch.Generator | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
    ):
        self.model, self.condition, self.generator = model, condition, generator
        self.guidance_scale = guidance_scale
        height, width = condition.image.shape[-2:]
        process = model.process(num_inference_steps, (height, width))
        latents = model.initial_latents(condition, process, generator)
        self.state = State(1, process.timesteps[0], latents, process)

    @property
    def finished(self) -> bool:
        """Whether the last sampling step has been taken."""
        return self.state.step > len(self.state.process)

    @torch.no_grad()
    def predict(self) -> Tensor:
        """The network's output at the state."""
        state = self.state
        return denoise(self.model, state.process, state.latents, state.timestep, self.condition, self.guidance_scale)

    @torch.no_grad()
    def advance(self, output: Tensor | None = None) -> None:
        """Take one sampling step; ``output`` is the network's at the state where that is known already."""
        state, process = self.state, self.state.process
        output = self.predict() if output is None else output.detach()
        latents = process.step(output, state.timestep, state.latents, self.generator)
        rest = process.timesteps[state.step :]
        timestep = rest[0] if len(rest) else torch.zeros_like(state.timestep)
        self.state = State(state.step + 1, timestep, latents, process)

    def to(self, step: int) -> State:
        """Go on to the state before sampling step ``step``.

        Raises:
            ValueError: if ``step`` is not one of the sampling steps ahead.
        """
        last = len(self.state.process)
        if not self.state.step <= step <= last:
            raise ValueError(f"step must be a sampling step from {self.state.step} to {last}, got {step}")
        while self.state.step < step:
            self.advance()
        return self.state


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
    run = Rollout(model, condition, generator, num_inference_steps, guidance_scale)
    while not run.finished:
        state, output = run.state, run.predict()
        yield state, state.process.pred_original_sample(output, state.timestep, state.latents)
        run.advance(output)
    yield run.state, run.state.latents


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
    return Rollout(model, condition, generator, num_inference_steps, guidance_scale).to(step)


def inference_condition(
    model: ISRModel,
    lr: Tensor,
    prompts: list[str],
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
) -> tuple[Condition, float]:
    """The condition of ``lr`` ``[N, 3, h, w]`` in [0, 1] at inference, and its guidance scale; None is the recipe's.

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
