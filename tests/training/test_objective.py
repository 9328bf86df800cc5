"""Eq. 7 against the same computed by hand, step by step."""

import copy

import pytest
import torch

from rfsr_ext.losses import HaarLLLoss
from rfsr_ext.rewards import WeightedReward
from rfsr_ext.sampling import TimestepWindows, generators
from rfsr_ext.training import RFSRConfig, RFSRObjective
from rfsr_ext.training.setup import build_windows
from tests.training.conftest import Brightness

WINDOWS = TimestepWindows((1, 2), (4, 5), 5)


@pytest.fixture
def batch(parts):
    samples = [parts["dataset"][i] for i in range(2)]
    return (*(torch.stack([s[key] for s in samples]) for key in ("lr", "gt")), [s["prompt"] for s in samples])


def by_hand(model, lr, prompts, step):
    """z_t after step − 1 DDIM steps, and the decoded z_0 estimate there, written out."""
    condition = model.condition(lr, prompts)
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(5)
    latents = model.initial_latents(condition, model.process(5), generators(0, range(2)))
    with torch.no_grad():
        for timestep in scheduler.timesteps[: step - 1]:
            output = model.predict(latents, timestep, condition)
            latents = scheduler.step(output, timestep, latents).prev_sample
    timestep = scheduler.timesteps[step - 1]
    output = model.predict(latents, timestep, condition)
    alpha_bar = scheduler.alphas_cumprod[timestep]
    estimate = alpha_bar.sqrt() * latents - (1 - alpha_bar).sqrt() * output
    return output, model.decode(estimate)


def trained(model):
    return list(model.unfreeze().trained_parameters().values())


def test_structure_window(tiny_model, batch):
    lr, gt, prompts = batch
    parameters = trained(tiny_model)
    objective = RFSRObjective(tiny_model, WINDOWS, structure_loss=HaarLLLoss(), lambda_structure=0.3)
    loss, logs = objective(lr, gt, prompts, 2, generators(0, range(2)))
    _, images = by_hand(tiny_model, lr, prompts, 2)
    bands = [(x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 2 for x in (images, gt)]
    expected = 0.3 * (bands[0] - bands[1]).abs().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    assert set(logs) == {"structure", "loss"}
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_losses_are_in_single_precision_under_autocast(tiny_model, batch):
    """What they are given is not rounded to half precision, and their own networks do not compute in it."""
    lr, gt, prompts = batch
    seen = {}

    class Convolution(torch.nn.Conv2d):
        """Stands for VGG19."""

        def forward(self, x):
            result = super().forward(x)
            seen["convolution"] = {x.dtype, result.dtype}
            return result

    network = Convolution(3, 1, 3)

    def structure(images, target):
        seen["structure"] = {images.dtype, target.dtype}
        assert torch.equal(target, gt)  # half precision would have rounded it
        return HaarLLLoss()(images, target)

    def style(images, before):
        return (network(images) - network(before)).square().mean()

    class Watched(Brightness):
        def score(self, images, prompts=None):
            seen["reward"] = {images.dtype}
            return super().score(images)

    objective = RFSRObjective(
        tiny_model, TimestepWindows((1, 5), (1, 5), 5, allow_overlap=True), structure_loss=structure, style_loss=style,
        rewards=[WeightedReward(Watched(), 1.0)], reference=tiny_model.reference(),
    )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16):
        seen.clear()
        with torch.autocast("cpu", dtype):
            loss, _ = objective(lr, gt, prompts, 2, generators(0, range(2)))
            decoded = tiny_model.decode(torch.zeros(1, 4, 8, 8))
        assert decoded.dtype == dtype and loss.dtype == torch.float32
        assert seen == dict.fromkeys(("structure", "convolution", "reward"), {torch.float32})


def test_reward_window_with_each_way_to_hold_the_style(tiny_model, batch, parts):
    lr, gt, prompts = batch
    reference = tiny_model.reference()
    trained(tiny_model)
    with torch.no_grad():  # the fine-tuned model has moved
        for parameter in tiny_model.unet.parameters():
            parameter.add_(0.01)
    output, images = by_hand(tiny_model, lr, prompts, 4)
    brightness = images.clamp(0, 1).mean()
    options = {"rewards": parts["rewards"], "reference": reference, "lambda_style": 0.7}

    plain, _ = RFSRObjective(tiny_model, WINDOWS, rewards=parts["rewards"])(lr, gt, prompts, 4, generators(0, range(2)))
    torch.testing.assert_close(plain, -brightness, rtol=1e-5, atol=1e-6)

    # the reference sees the z_t of the model being trained
    with torch.no_grad():
        condition = tiny_model.condition(lr, prompts)
        scheduler = copy.deepcopy(tiny_model.scheduler)
        scheduler.set_timesteps(5)
        latents = tiny_model.initial_latents(condition, tiny_model.process(5), generators(0, range(2)))
        for timestep in scheduler.timesteps[:3]:
            latents = scheduler.step(tiny_model.predict(latents, timestep, condition), timestep, latents)[0]
        before = reference.predict(latents, scheduler.timesteps[3], condition)
        alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps[3]]
        before_images = reference.decode(alpha_bar.sqrt() * latents - (1 - alpha_bar).sqrt() * before).clamp(0, 1)

    kl, logs = RFSRObjective(tiny_model, WINDOWS, kl=True, **options)(lr, gt, prompts, 4, generators(0, range(2)))
    torch.testing.assert_close(kl, -brightness + 0.7 * (output - before).square().mean(), rtol=1e-5, atol=1e-6)
    assert logs["style"] > 0

    style = torch.nn.MSELoss()
    gram, _ = RFSRObjective(tiny_model, WINDOWS, style_loss=style, **options)(
        lr, gt, prompts, 4, generators(0, range(2))
    )
    torch.testing.assert_close(
        gram, -brightness + 0.7 * (images.clamp(0, 1) - before_images).square().mean(), rtol=1e-5, atol=1e-6
    )


def test_a_trajectory_goes_on_from_a_trained_step(tiny_model, batch, parts):
    """z_4 after the weights have changed at step 2: the trained output took that step, the new weights the next."""
    lr, gt, prompts = batch
    parameters = trained(tiny_model)
    objective = RFSRObjective(tiny_model, WINDOWS, structure_loss=HaarLLLoss(), rewards=parts["rewards"])
    run = objective.begin(lr, prompts, generators(0, range(2)))
    first, _ = objective(lr, gt, prompts, 2, rollout=run)
    assert first == objective(lr, gt, prompts, 2, generators(0, range(2)))[0]

    condition, process = tiny_model.condition(lr, prompts), tiny_model.process(5)
    with torch.no_grad():
        z = tiny_model.initial_latents(condition, process, generators(0, range(2)))
        for t in process.timesteps[:2]:
            z = process.step(tiny_model.predict(z, t, condition), t, z)
        for parameter in parameters:
            parameter.add_(0.01)
        z = process.step(tiny_model.predict(z, process.timesteps[2], condition), process.timesteps[2], z)
    t = process.timesteps[3]
    images = tiny_model.decode(process.pred_original_sample(tiny_model.predict(z, t, condition), t, z))
    expected = -images.clamp(0, 1).mean()
    loss, _ = objective(lr, gt, prompts, 4, rollout=run)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_gradient_stays_in_unet_and_controlnet(tiny_model, batch, parts):
    trained(tiny_model)
    loss, _ = RFSRObjective(tiny_model, WINDOWS, rewards=parts["rewards"])(*batch, 4, generators(0, range(2)))
    loss.backward()
    assert all(p.grad is not None for p in tiny_model.unet.parameters())
    assert all(p.grad is None for p in [*tiny_model.vae.parameters(), *tiny_model.text_encoder.parameters()])


def test_sentences(tiny_model, batch, parts):
    lr, gt, prompts = batch
    objective = RFSRObjective(tiny_model, WINDOWS, rewards=parts["rewards"])
    with pytest.raises(
        ValueError, match=r"gt must have shape \[2, 3, 32, 32\] for lr of \[2, 3, 8, 8\], got \[2, 3, 30, 32\]"
    ):
        objective(lr, gt[..., :30, :], prompts, 4)
    with pytest.raises(ValueError, match=r"step must be one of \[1, 2, 4, 5\], got 3"):
        objective(lr, gt, prompts, 3)
    with pytest.raises(ValueError, match="lr must be finite and in"):
        objective(torch.full_like(lr, float("nan")), gt, prompts, 4)
    with pytest.raises(ValueError, match="reference must be the frozen pre-trained model"):
        RFSRObjective(tiny_model, WINDOWS, rewards=parts["rewards"], kl=True)(lr, gt, prompts, 4)


def test_guidance_acts_in_the_rollout_and_in_the_step_with_gradient(tiny_model, batch):
    lr, gt, prompts = batch
    trained(tiny_model)
    objective = RFSRObjective(
        tiny_model, WINDOWS, structure_loss=torch.nn.L1Loss(), lambda_structure=1.0, guidance_scale=3.0,
        negative_prompt="blurry",
    )  # fmt: skip
    loss, _ = objective(lr, gt, prompts, 2, generators(0, range(2)))
    condition, process = tiny_model.condition(lr, prompts, ["blurry"] * 2), tiny_model.process(5)

    def guided(z, t):
        with torch.set_grad_enabled(bool(t == process.timesteps[1])):
            p, n = (tiny_model.predict(z, t, c) for c in (condition, condition.negative))
        return n + 3 * (p - n)

    z = tiny_model.initial_latents(condition, process, generators(0, range(2)))
    z = process.step(guided(z, process.timesteps[0]), process.timesteps[0], z)
    t = process.timesteps[1]
    images = tiny_model.decode(process.pred_original_sample(guided(z, t), t, z))
    torch.testing.assert_close(loss, (images - gt).abs().mean(), rtol=1e-5, atol=1e-6)
    plain = RFSRObjective(tiny_model, WINDOWS, structure_loss=torch.nn.L1Loss(), lambda_structure=1.0)
    assert (plain(lr, gt, prompts, 2, generators(0, range(2)))[0] - loss).abs() > 1e-6


def test_windows_given_as_timesteps_need_no_steps(tiny_model):
    """With fewer steps than the default windows name, which then must not be looked at."""
    config = RFSRConfig(num_inference_steps=10, window_unit="timesteps", structure_window=(600, 1000),
                        reward_window=(0, 200))  # fmt: skip
    tiny_model.scheduler.set_timesteps(10)
    wanted = TimestepWindows.from_timesteps(tiny_model.scheduler.timesteps)
    assert build_windows(config, tiny_model) == wanted
