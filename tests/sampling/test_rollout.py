import copy
import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsr_ext.sampling import Rollout, denoise, generators, rollout, sample, trajectory

SCHEDULERS = [DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler, DPMSolverMultistepScheduler]


@pytest.fixture(params=SCHEDULERS, ids=lambda kind: kind.__name__)
def any_model(model, request):
    other = copy.copy(model)
    other.scheduler = request.param.from_config(model.scheduler.config)
    return other


# -- noise ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**62), st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_generators_are_a_function_of_seed_and_index(seed, indices):
    together = [g.initial_seed() for g in generators(seed, indices)]
    assert together == [generators(seed, [index])[0].initial_seed() for index in indices]


def test_generators_do_not_repeat():
    seeds = {g.initial_seed() for seed in range(100) for g in generators(seed, range(100))}
    assert len(seeds) == 10_000


def test_neighboring_generators_are_uncorrelated():
    noise = torch.stack([torch.randn(5_000, generator=g) for s in range(4) for g in generators(s, range(4))])
    correlation = torch.corrcoef(noise) - torch.eye(16)
    assert correlation.abs().max() < 0.08  # 5 standard deviations are 0.07


# -- trajectories -----------------------------------------------------------------------------------------------------


def test_trajectory(any_model, condition):
    scheduler = any_model.scheduler
    before = copy.deepcopy(scheduler.__dict__)
    states = list(trajectory(any_model, condition, generators(0, range(3))))
    expected = copy.deepcopy(scheduler)
    expected.set_timesteps(10)
    assert [state.step for state, _ in states] == list(range(1, 12))
    assert [int(state.timestep) for state, _ in states] == [*expected.timesteps.tolist(), 0]
    assert all(state.latents.shape == (3, 16, 8, 8) and state.latents.isfinite().all() for state, _ in states)
    assert states[-1][0].latents is states[-1][1]
    # the model's own scheduler is as it was
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(scheduler.__dict__[k]))
               for k, v in before.items() if isinstance(v, torch.Tensor))  # fmt: skip
    assert scheduler.__dict__.get("num_inference_steps") is None


def test_trajectory_is_the_schedulers_own_loop(any_model, condition):
    scheduler, noise = copy.deepcopy(any_model.scheduler), generators(5, range(3))
    scheduler.set_timesteps(6)
    latents = any_model.initial_latents(condition, any_model.process(6), noise)
    options = {} if isinstance(scheduler, UniPCMultistepScheduler) else {"generator": noise}
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = any_model.predict(latents, t, condition)
        latents = scheduler.step(output, t, latents, **options).prev_sample
    *_, (_, end) = trajectory(any_model, condition, generators(5, range(3)), 6)
    torch.testing.assert_close(end, latents)


@pytest.mark.parametrize("step", [1, 2, 5, 10])
def test_rollout_is_the_trajectorys_state(any_model, condition, step):
    states = list(trajectory(any_model, condition, generators(0, range(3))))
    state = rollout(any_model, condition, step, generators(0, range(3)))
    assert (state.step, int(state.timestep)) == (step, int(states[step - 1][0].timestep))
    assert torch.equal(state.latents, states[step - 1][0].latents)


def test_rollout_calls_the_network_only_before_its_step(model, condition, monkeypatch):
    calls = []
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda z, t, c: calls.append(int(t)) or predict(z, t, c))
    rollout(model, condition, 1)
    assert calls == []
    rollout(model, condition, 4)
    assert len(calls) == 3


def test_a_rollout_goes_on_in_pieces_and_asks_for_no_output_that_it_was_given(any_model, condition, monkeypatch):
    states = [state.latents for state, _ in trajectory(any_model, condition, generators(0, range(3)))]
    calls, predict = [], any_model.predict
    monkeypatch.setattr(any_model, "predict", lambda z, t, c: calls.append(int(t)) or predict(z, t, c))
    run = Rollout(any_model, condition, generators(0, range(3)))
    for step in (2, 5, 10):
        state = run.to(step)
        assert (state.step, state.timestep) == (step, state.process.timesteps[step - 1])
        assert torch.equal(state.latents, states[step - 1])
        run.advance(run.predict().requires_grad_())
        assert torch.equal(run.state.latents, states[step]) and not run.state.latents.requires_grad
    assert run.finished and len(calls) == 10  # once at every step
    with pytest.raises(ValueError, match="step must be a sampling step from 11 to 10, got 10"):
        run.to(10)


@pytest.mark.parametrize("step", [0, 11, -1])
def test_rollout_rejects_steps(model, condition, step):
    with pytest.raises(ValueError, match=f"step must be a sampling step from 1 to 10, got {step}"):
        rollout(model, condition, step)


def test_no_gradient_is_recorded(model, condition):
    model.unfreeze()
    try:
        with torch.enable_grad():
            assert not rollout(model, condition, 3).latents.requires_grad
            for state, estimate in trajectory(model, condition, num_inference_steps=2):
                assert torch.is_grad_enabled()  # the loop's body is the caller's
                assert not state.latents.requires_grad and not estimate.requires_grad
            assert not sample(model, condition.image[:, :, ::4, ::4], [""] * 3, None, 2).requires_grad
    finally:
        for module in model.networks.values():
            module.requires_grad_(False)


def test_an_image_does_not_depend_on_its_batch(any_model):
    lr, prompts = torch.rand(3, 3, 8, 8), ["cat", "", "dog"]
    together = sample(any_model, lr, prompts, generators(1, [7, 8, 9]), 4)
    alone = [sample(any_model, lr[i : i + 1], prompts[i : i + 1], generators(1, [7 + i]), 4) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_sample(any_model):
    lr = torch.rand(2, 3, 8, 10)
    first, again, other = (sample(any_model, lr, ["cat", ""], generators(s, range(2)), 3) for s in (0, 0, 1))
    assert first.shape == (2, 3, 32, 40) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3


# -- classifier-free guidance -----------------------------------------------------------------------------------------


def test_guidance_is_the_formula(model):
    lr, prompts = torch.rand(2, 3, 8, 8), ["cat, fur", ""]
    condition = model.condition(lr, prompts, ["blurry, noisy"] * 2)
    process = model.process()
    z, t = torch.randn(2, 16, 8, 8), process.timesteps[3]
    with torch.no_grad():
        positive, negative = (model.predict(z, t, c) for c in (condition, condition.negative))
        assert (positive - negative).abs().max() > 1e-5
        for scale in (0.0, 2.5, 7.0):
            expected = negative + scale * (positive - negative)
            torch.testing.assert_close(denoise(model, process, z, t, condition, scale), expected)
        assert torch.equal(denoise(model, process, z, t, condition, 1.0), positive)
    with pytest.raises(ValueError, match="condition must hold a negative condition for guidance_scale 2, got none"):
        denoise(model, process, z, t, model.condition(lr, prompts), 2.0)


def test_the_recipe_guides_unless_told_otherwise(model):
    lr, seeds = torch.rand(1, 3, 8, 8), lambda: generators(0, [0])
    guided = copy.copy(model)
    guided.recipe = dataclasses.replace(model.recipe, guidance_scale=3.0, negative_prompt="blurry", added_prompt="8k")
    plain, told = sample(model, lr, ["cat"], seeds(), 3), sample(model, lr, ["cat, 8k"], seeds(), 3, 3.0, "blurry")
    by_recipe = sample(guided, lr, ["cat"], seeds(), 3)
    assert torch.equal(by_recipe, told) and not torch.equal(by_recipe, plain)
    again = sample(guided, lr, ["cat"], seeds(), 3, guidance_scale=1.0)
    assert torch.equal(again, sample(model, lr, ["cat, 8k"], seeds(), 3))


def test_guidance_needs_two_evaluations_a_step(model, monkeypatch):
    calls, predict = [], model.predict
    monkeypatch.setattr(model, "predict", lambda z, t, c: calls.append(c.prompts) or predict(z, t, c))
    sample(model, torch.rand(1, 3, 8, 8), ["cat"], generators(0, [0]), 2, 4.0, "blurry")
    assert calls == [["cat"], ["blurry"]] * 2
