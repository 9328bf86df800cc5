"""The noise process against the closed form z_t = α z_0 + σ ε, for every scheduler that users have."""

import copy
import inspect
import math

import diffusers
import numpy as np
import pytest
import torch

from rfsr_ext.models import NonUniformProcess, Process, check_scheduler
from rfsr_ext.sampling import TimestepWindows, denoise, generators, rollout, sample, trajectory, upscale
from tests.tiny import PixelModel, tiny_model, tiny_parts

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
SCHEDULERS = {
    "DDIM": lambda: diffusers.DDIMScheduler(**SD, **LEADING, clip_sample=False, set_alpha_to_one=False),
    "DDIM, zero SNR": lambda: diffusers.DDIMScheduler(
        **SD,
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    ),
    "DDPM": lambda: diffusers.DDPMScheduler(**SD, **LEADING, clip_sample=False),
    "PNDM": lambda: diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1),
    "PNDM, Runge-Kutta": lambda: diffusers.PNDMScheduler(**SD, skip_prk_steps=False, steps_offset=1),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**SD),
    "UniPC, Karras": lambda: diffusers.UniPCMultistepScheduler(**SD, use_karras_sigmas=True),
    "DPM-Solver++": lambda: diffusers.DPMSolverMultistepScheduler(**SD),
    "DPM-Solver++, v": lambda: diffusers.DPMSolverMultistepScheduler(**SD, prediction_type="v_prediction"),
    "DPM-Solver++, SDE": lambda: diffusers.DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++"),
    "DPM-Solver++, flow": lambda: diffusers.DPMSolverMultistepScheduler(
        **SD, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "DEIS": lambda: diffusers.DEISMultistepScheduler(**SD),
    "LCM": lambda: diffusers.LCMScheduler(**SD),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**SD, **LEADING),
    "Euler, v, Karras": lambda: diffusers.EulerDiscreteScheduler(
        **SD, prediction_type="v_prediction", use_karras_sigmas=True, timestep_spacing="trailing"
    ),
    "Euler-ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**SD, **LEADING),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(**SD),
    "EDM": lambda: diffusers.EDMEulerScheduler(),
    "FlowMatchEuler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}
# They draw fresh noise, so that z_t keeps its distribution and not its ε.
STOCHASTIC = {"DDPM", "LCM", "Euler-ancestral", "DPM-Solver++, SDE"}
STEPS = 10  # divides 1000: DDIM finds the next timestep by whole division


@pytest.fixture(params=SCHEDULERS)
def name(request):
    return request.param


def closed_form(name: str, process: Process, index: int) -> tuple[float, float]:
    """(α, σ) before evaluation ``index``, computed here from the schedule's definition."""
    scheduler, timestep = process._scheduler, process.timesteps[index].item()
    if "flow" in name or "Flow" in name:
        sigma = scheduler.sigmas[index].item()
        return 1 - sigma, sigma
    if name == "EDM":
        return 1.0, math.exp(4 * timestep)
    if "Karras" in name:  # the noise levels are given, the timesteps made to fit
        sigma = scheduler.sigmas[index].item()
    else:
        betas = torch.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
        alpha_bar = torch.cumprod(1 - betas, 0)
        if "zero SNR" in name:  # Lin et al. 2023, algorithm 1: shift and stretch √ᾱ so that its last value is 0
            root = alpha_bar.sqrt()
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        low, high = alpha_bar[math.floor(timestep)], alpha_bar[math.ceil(timestep)]
        sigmas = [((1 - a) / a).sqrt() for a in (low, high)]
        if name in ("Heun", "Euler, v, Karras"):  # between timesteps these interpolate σ / α
            share = timestep - math.floor(timestep)
            sigma = float(sigmas[0] + share * (sigmas[1] - sigmas[0]))
        elif "zero SNR" in name:
            return float(low.sqrt()), float((1 - low).sqrt())
        else:
            sigma = float(sigmas[0])
    sigma_space = name in ("Euler", "Euler, v, Karras", "Euler-ancestral", "Heun")
    return (1.0, sigma) if sigma_space else (1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))


def test_level_is_the_closed_form(name):
    process = Process(SCHEDULERS[name](), STEPS)
    for index, timestep in enumerate(process.timesteps):
        alpha, sigma = process.level(timestep)
        wanted = closed_form(name, process, index)
        assert (alpha.item(), sigma.item()) == pytest.approx(wanted, rel=2e-4, abs=1e-5), f"timestep {timestep}"


def test_a_perfect_network_stays_on_the_line(name):
    """With the right output at every step, z_t = α z_0 + σ ε all the way, and the estimate is z_0 at every step."""
    process = Process(SCHEDULERS[name](), STEPS)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(64, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    latents = process.add_noise(clean, noise, process.timesteps[0])
    for index, timestep in enumerate(process.timesteps):
        alpha, sigma = closed_form(name, process, index)
        if name in STOCHASTIC:
            rest = (latents - alpha * clean) / sigma
            assert abs(rest.mean()) < 0.04 and abs(rest.std() - 1) < 0.04
        else:
            torch.testing.assert_close(latents, alpha * clean + sigma * noise, rtol=2e-3, atol=2e-3 * max(1, sigma))
        output = process.perfect_output(clean, timestep, latents)
        estimate = process.pred_original_sample(output, timestep, latents)
        torch.testing.assert_close(estimate, clean, rtol=1e-6, atol=1e-6)
        latents = process.step(output, timestep, latents, generator)
    torch.testing.assert_close(latents, clean, rtol=0, atol=0.15)  # DDIM and PNDM end at ᾱ_0, where σ is 0.03


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_is_the_perfect_output(name, kind):
    scheduler = SCHEDULERS[name]()
    if "prediction_type" in scheduler.config and scheduler.config.prediction_type in ("epsilon", "v_prediction"):
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type=kind)
    process = Process(scheduler, STEPS)
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    timesteps = process.timesteps[torch.tensor([1, len(process) // 2, len(process) - 1])]
    noisy = process.add_noise(clean, noise, timesteps)
    target = process.target(clean, noise, timesteps)
    torch.testing.assert_close(target, process.perfect_output(clean, timesteps, noisy), rtol=1e-5, atol=1e-5)
    if process.prediction_type == "epsilon" and name != "EDM":
        assert target is noise
    if process.prediction_type == "flow":
        torch.testing.assert_close(target, noise - clean)


def test_any_timestep_of_training_has_a_level():
    """Mini models and preference losses train at timesteps that no trajectory visits."""
    for name in ("DDIM", "UniPC", "Euler", "FlowMatchEuler"):
        process = Process(SCHEDULERS[name](), 7)
        alpha, sigma = process.level(torch.tensor([3, 500, 997]))
        if name == "FlowMatchEuler":
            torch.testing.assert_close(sigma, torch.tensor([0.003, 0.5, 0.997], dtype=torch.float64))
            continue
        wanted = diffusers.DDIMScheduler(**SD).alphas_cumprod[[3, 500, 997]].double()
        torch.testing.assert_close(alpha**2 / (alpha**2 + sigma**2), wanted, rtol=1e-6, atol=0)
        with pytest.raises(ValueError, match="timestep must be in 0 … 999, got 1000"):
            process.level(1000)


def test_the_scheduler_given_is_never_changed(name):
    scheduler = SCHEDULERS[name]()
    before = {k: copy.deepcopy(v) for k, v in vars(scheduler).items()}
    process = Process(scheduler, STEPS)
    process.step(torch.zeros(1, 4, 2, 2), process.timesteps[0], torch.ones(1, 4, 2, 2), torch.Generator())
    for key, value in vars(scheduler).items():
        assert np.array_equal(value, before[key]) if hasattr(value, "shape") else value == before[key], key


# -- the three faults, through a whole model --------------------------------------------------------------------------


def pixel_model(scheduler) -> PixelModel:
    """A model of one convolution: what is asked is what scheduler and loop do, not what a network does."""
    model = PixelModel(STEPS, start="lr")
    model.scheduler = scheduler
    return model


@pytest.fixture(scope="module")
def lr():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_rollout_starts_at_the_first_timesteps_noise_level(name, lr):
    """start="lr" is α z_lr + σ ε with the level of the first timestep, whatever the scheduler."""
    model = pixel_model(SCHEDULERS[name]())
    condition = model.condition(lr, ["cat", ""])
    state = rollout(model, condition, 1, generators(0, [0, 1]))
    noise = torch.cat([torch.randn(1, 3, 32, 32, generator=g) for g in generators(0, [0, 1])])
    alpha, sigma = closed_form(name, state.process, 0)
    torch.testing.assert_close(
        state.latents, alpha * model.encode(condition.image) + sigma * noise, rtol=1e-4, atol=1e-3
    )
    assert sigma / math.hypot(alpha, sigma) > 0.95  # almost only noise


def test_training_shows_the_network_what_sampling_shows_it(name, lr):
    """The step with gradient and the rollout's own step feed the network the same latents."""
    model = pixel_model(SCHEDULERS[name]())
    condition = model.condition(lr, ["cat", ""])
    seen = []
    predict = model.predict
    model.predict = lambda z, t, c: seen.append((z, float(t))) or predict(z, t, c)
    with torch.no_grad():
        list(trajectory(model, condition, generators(0, [0, 1])))
        sampled, step = list(seen), 4
        state = rollout(model, condition, step, generators(0, [0, 1]))
        denoise(model, state.process, state.latents, state.timestep, condition)
    assert seen[-1][1] == sampled[step - 1][1]
    torch.testing.assert_close(seen[-1][0], sampled[step - 1][0])
    alpha, sigma = closed_form(name, state.process, step - 1)
    spread = state.latents.std().item() / seen[-1][0].std().item()
    data = 0.5 if name == "EDM" else 1.0
    assert spread == pytest.approx(math.hypot(sigma, data) if alpha == 1.0 else 1.0, rel=1e-3)


def test_upscaling_takes_every_evaluation(name, lr):
    """PNDM evaluates the network once more than it was asked for, Heun almost twice as often."""
    model = pixel_model(SCHEDULERS[name]())
    evaluations = len(model.process())
    assert evaluations == {"PNDM": STEPS + 1, "PNDM, Runge-Kutta": STEPS + 9, "Heun": 2 * STEPS - 1}.get(name, STEPS)
    calls = []
    predict = model.predict
    model.predict = lambda z, t, c: calls.append(float(t)) or predict(z, t, c)
    whole = sample(model, lr[:1], ["cat"], generators(3, [0]))[0]
    assert len(calls) == evaluations
    up = upscale(model, lr[0], "cat", seed=3, color_fix=None, progress=False)
    torch.testing.assert_close(up, whole, atol=1e-5, rtol=0)


def test_the_loop_is_the_schedulers_own(name, lr):
    """Our trajectory is what anybody would write with diffusers alone."""
    model = pixel_model(SCHEDULERS[name]())
    condition = model.condition(lr, ["cat", ""])
    scheduler, noise = SCHEDULERS[name](), generators(5, [0, 1])
    scheduler.set_timesteps(6)
    latents = model.initial_latents(condition, model.process(6), noise)
    options = {"generator": noise} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        with torch.no_grad():
            output = model.predict(scaled, t, condition)
        latents = scheduler.step(output, t, latents, **options).prev_sample
    *_, (_, end) = trajectory(model, condition, generators(5, [0, 1]), 6)
    torch.testing.assert_close(end, latents, rtol=1e-4, atol=1e-3)


# -- windows ----------------------------------------------------------------------------------------------------------


def test_windows_in_three_units():
    process = Process(SCHEDULERS["DDIM"](), 50)
    steps = TimestepWindows.from_process(process, (1, 20), (41, 50))
    assert steps == TimestepWindows.from_process(process, (600, 1000), (0, 200), "timesteps")
    share = process.noise_share(torch.tensor([600, 200])).tolist()
    assert share == pytest.approx([0.839, 0.246], abs=1e-3)
    assert steps == TimestepWindows.from_process(process, (share[0], 1), (0, share[1]), "noise")
    flow = Process(SCHEDULERS["FlowMatchEuler"](), 50)
    windows = TimestepWindows.from_process(flow, (share[0], 1), (0, share[1]), "noise")
    for step in range(1, 51):
        sigma = flow._scheduler.sigmas[step - 1].item()
        assert windows.in_structure(step) == (sigma**2 / (sigma**2 + (1 - sigma) ** 2) >= share[0])
    with pytest.raises(ValueError, match="unit must be steps, timesteps or noise, got 'sigma'"):
        TimestepWindows.from_process(process, (1, 2), None, "sigma")


def test_overlap_is_allowed_in_every_unit():
    process = Process(SCHEDULERS["DDIM"](), 10)
    for unit, whole in (("steps", (1, 10)), ("timesteps", (0, 1000)), ("noise", (0, 1))):
        windows = TimestepWindows.from_process(process, whole, whole, unit, allow_overlap=True)
        assert windows.structure == windows.reward == (1, 10)
        with pytest.raises(ValueError, match="set allow_overlap"):
            TimestepWindows.from_process(process, whole, whole, unit)


# -- CCSR's timesteps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "t_max", "t_min", "evaluations"), [(45, 2 / 3, 1 / 3, 16), (6, 2 / 3, 0.5, 2), (1, 0, 0, 1)]
)
def test_non_uniform_timesteps(n, t_max, t_min, evaluations):
    """Evaluations as CCSR counts them; a perfect network is right at the end, from pure noise."""
    uniform, process = Process(SCHEDULERS["DDPM"](), n), NonUniformProcess(SCHEDULERS["DDPM"](), n, t_max, t_min)
    assert len(process) == evaluations == 1 + round(n * t_max) - round(n * t_min)
    kept = uniform.timesteps[n - round(n * t_max) : n - round(n * t_min)] if t_max else uniform.timesteps[:0]
    assert process.timesteps.tolist() == [uniform.timesteps[0].item(), *kept.tolist()]
    clean = torch.randn(64, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(clean.shape, dtype=torch.float64, generator=generator)
    for timestep in process.timesteps:
        latents = process.step(process.perfect_output(clean, timestep, latents), timestep, latents, generator)
        if timestep != process.timesteps[-1]:
            following = process.timesteps[process.timesteps.tolist().index(timestep) + 1]
            alpha, sigma = process.level(following)
            rest = (latents - alpha * clean) / sigma
            assert abs(rest.mean()) < 0.04 and abs(rest.std() - 1) < 0.04
    torch.testing.assert_close(latents, clean)


@pytest.mark.parametrize(
    ("n", "t_max", "t_min", "expected"),
    [
        (6, 0.6667, 0.5, [999, 499]),  # the authors' two steps
        (6, 0.6667, 1 / 3, [999, 499, 333]),
        (6, 0.6667, 0, [999, 499, 333, 167, 1]),
        (10, 0.6667, 0, [999, 601, 501, 401, 301, 201, 101, 1]),
        (1, 0.6667, 0, [999]),  # one step, whatever the shares
        (1, 1, 0, [999]),
        (1, 0.5, 0.5, [999]),
        (6, 0.05, 0, [999]),  # round(n t_max) is 0
        (6, 0.6667, 0.05, [999, 499, 333, 167, 1]),  # round(n t_min) is 0
        (6, 0.6667, 0.6, [999]),  # both are 4
        (6, 0.99, 0.5, [999, 831, 665, 499]),
        (6, 1, 0.5, [831, 665, 499]),  # no leap
        (6, 1, 1, [999]),
    ],
)
def test_timesteps_of_ccsr_v2(n, t_max, t_min, expected):
    """On Stable Diffusion 2.1's own timesteps, and defined where the authors' code stops or runs on."""
    process = NonUniformProcess(SCHEDULERS["DDPM"](), n, t_max, t_min, "v2", start_timestep=999)
    assert process.timesteps.tolist() == expected
    guided = [process.is_guided(t) for t in process.timesteps]
    assert guided == [expected[0] != 999] + [True] * (len(expected) - 1)


@pytest.mark.parametrize("n", [1, 2, 6, 20, 45, 50])
def test_timesteps_of_ccsr_v1(n):
    """Evenly from 999 to 0, both ends taken."""
    process = NonUniformProcess(SCHEDULERS["DDPM"](), n, 2 / 3, 1 / 3, "v1", start_timestep=999)
    uniform = [round(999 * i / (n - 1) - 1e-9) for i in range(n)] if n > 1 else []  # 499.5 becomes 499
    assert process.timesteps.tolist() == [999, *uniform[round(n / 3) : round(2 * n / 3)][::-1]]
    assert all(process.is_guided(t) for t in process.timesteps)


@pytest.mark.parametrize("n", [6, 20, 45, 50])
def test_leap_of_ccsr_v1(n):
    """20 and 50 are such that the leap's noise is one place above the next timestep's."""
    process = NonUniformProcess(SCHEDULERS["DDPM"](), n, 2 / 3, 1 / 3, "v1", start_timestep=999)
    uniform = [round(999 * i / (n - 1)) for i in range(n)]
    clean, latents = torch.full((4096,), 3.0, dtype=torch.float64), torch.zeros(4096, dtype=torch.float64)
    output = process.perfect_output(clean, 999, latents)
    leapt = process.step(output, 999, latents, torch.Generator().manual_seed(0))
    alpha, sigma = process.level(uniform[round((n - 1) * 2 / 3)])
    noise = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(leapt, alpha * clean + sigma * noise)
    assert (process.timesteps[1] == uniform[round((n - 1) * 2 / 3)]) == (n not in (20, 50))


@pytest.mark.parametrize(
    ("version", "first", "then"), [("v1", ["cat", "blurry"], (599, 400)), ("v2", ["cat"], (499, 333))]
)
def test_non_uniform_sampling_of_any_model(lr, version, first, then):
    """Through model.process: sample, tiles, rollout and the step with gradient all follow it."""
    shares = {"spacing": f"ccsr-{version}", "t_max": 0.6667, "t_min": 0.3333, "start_timestep": 999}
    model = tiny_model(0, 6, SCHEDULERS["DDPM"](), negative_prompt="blurry", start="noise", **shares)
    seen, predict = [], model.predict
    model.predict = lambda z, t, c: seen.append((float(t), c.prompts[0])) or predict(z, t, c)
    whole = sample(model, lr[:1], ["cat"], generators(3, [0]), guidance_scale=4.5)[0]
    assert seen == [(999, p) for p in first] + [(t, p) for t in then for p in ("cat", "blurry")]
    up = upscale(model, lr[0], "cat", seed=3, guidance_scale=4.5, color_fix=None, progress=False)
    torch.testing.assert_close(up, whole, atol=1e-5, rtol=0)
    seen.clear()
    sample(model, lr[:1], ["cat"], generators(3, [0]), 1, guidance_scale=4.5)
    assert seen == [(999, p) for p in first]
    condition = model.condition(lr[:1], ["cat"], ["blurry"])
    states = list(trajectory(model, condition, generators(3, [0]), None, 4.5))
    for step, (state, estimate) in enumerate(states[:-1], start=1):
        reached = rollout(model, condition, step, generators(3, [0]), None, 4.5)
        assert reached.timestep == state.timestep and torch.equal(reached.latents, state.latents)
        output = denoise(model, reached.process, reached.latents, reached.timestep, condition, 4.5)
        again = reached.process.pred_original_sample(output, reached.timestep, reached.latents)
        torch.testing.assert_close(again, estimate)
    assert torch.equal(states[-1][1], states[-2][1])  # the last estimate is the result


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_non_uniform_sampling_over_any_scheduler(name, version):
    """A perfect network that knows z_0 = 3 keeps z_t on α z_0 + σ ε, with one ε from the leap on."""
    if (name, version) == ("EDM", "v1"):
        return  # refused, see below
    process = NonUniformProcess(SCHEDULERS[name](), 6, 2 / 3, 1 / 3, version)
    n = 6 if version == "v1" else len(Process(SCHEDULERS[name](), 6).timesteps.unique())
    assert len(process) == 1 + round(2 * n / 3) - round(n / 3) and (process.timesteps.diff() < 0).all()
    clean = torch.full((4096, 1), 3.0, dtype=torch.float64)
    latents, noises = torch.zeros_like(clean), []
    for timestep in process.timesteps:
        if noises or timestep != process.timesteps[0]:
            alpha, sigma = process.level(timestep)
            noises.append((latents - alpha * clean) / sigma)
        output = process.perfect_output(clean, timestep, latents)
        latents = process.step(output, timestep, latents, torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents, clean)
    if version == "v2":  # v1's leap may hold more noise than the network is told
        assert abs(noises[0].std() - 1) < 0.05
    if name == "DDPM":
        assert not torch.allclose(noises[0], noises[1], atol=0.1)
    elif version == "v2":
        torch.testing.assert_close(noises[0], noises[1])


def test_non_uniform_refuses():
    with pytest.raises(ValueError, match="version must be v1 or v2, got 'v3'"):
        NonUniformProcess(SCHEDULERS["DDPM"](), 10, version="v3")
    with pytest.raises(ValueError, match="timestep must be in 0 … 999, got 1000"):
        NonUniformProcess(SCHEDULERS["DDPM"](), 10, start_timestep=1000)
    with pytest.raises(ValueError, match=r"t_max = 1 \(no leap\) or 0 <= t_min <= t_max < 1, got 1.5 and 0.5"):
        NonUniformProcess(SCHEDULERS["DDPM"](), 10, 1.5, 0.5)
    with pytest.raises(ValueError, match="0 <= t_min <= t_max < 1, got 0.3 and 0.5"):
        NonUniformProcess(SCHEDULERS["DDPM"](), 10, 0.3, 0.5)
    with pytest.raises(ValueError, match=r"must have timesteps from 0 to 999, got EDMEulerScheduler, whose .* ln\(σ\)"):
        NonUniformProcess(SCHEDULERS["EDM"](), 10, version="v1")
    with pytest.raises(ValueError, match="spacing must be one of uniform, ccsr-v1, ccsr-v2, got 'ccsr'"):
        tiny_model(spacing="ccsr")
    with pytest.raises(ValueError, match="t_max and t_min must satisfy .* got 0.3 and 0.5"):
        tiny_model(spacing="ccsr-v2", t_max=0.3, t_min=0.5)


# -- what cannot serve is refused when the model is built -------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffusers.DDIMScheduler(**SD), "DDIMScheduler cannot serve: before timestep .* clip_sample=False"),
        (lambda: diffusers.KDPM2DiscreteScheduler(**SD), "KDPM2DiscreteScheduler cannot serve: before timestep"),
        (lambda: diffusers.DDIMInverseScheduler(**SD, clip_sample=False), "its timesteps rise"),
        (lambda: diffusers.IPNDMScheduler(), "IPNDMScheduler cannot serve"),
        (lambda: diffusers.DDPMWuerstchenScheduler(), "DDPMWuerstchenScheduler cannot serve"),
        (lambda: diffusers.RePaintScheduler(), "RePaintScheduler cannot serve"),
        (lambda: diffusers.DDIMScheduler(**SD, clip_sample=False, prediction_type="score"), "got 'score'"),
        (object, "scheduler must be a diffusers scheduler, got object"),
        (
            lambda: diffusers.DDIMScheduler(
                **SD, clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
            ),
            "DDIMScheduler cannot serve",  # noise prediction from pure noise: α is 0
        ),
    ],
)
def test_a_scheduler_that_cannot_serve_is_refused_when_the_model_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        check_scheduler(make())
    if hasattr(make(), "config"):
        with pytest.raises(ValueError, match=message):
            tiny_model(scheduler=make())


def test_what_can_serve_is_not_refused(name):
    check_scheduler(SCHEDULERS[name]())
    assert tiny_parts(scheduler=SCHEDULERS[name]())["scheduler"].config is not None


@pytest.mark.parametrize("steps", [0, 2.5])
def test_process_refuses_what_is_no_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"num_inference_steps must be a whole number of at least 1, got {steps}"):
        Process(SCHEDULERS["DDIM"](), steps)
