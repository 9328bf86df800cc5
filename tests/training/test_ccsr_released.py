"""CCSR's losses against those of its authors' code: see tests/training/released/ccsr.py."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from rfsr_ext.losses import PatchDiscriminator
from rfsr_ext.losses.adversarial import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from rfsr_ext.training.ccsr import CCSRStage1Config, Consistency
from tests.tiny import PixelModel
from tests.training.released.ccsr import EXPECTED, distance, inputs, network

expected = json.loads(EXPECTED.read_text())


class Published(PixelModel):
    """The stand-in of a denoiser that the authors' loss was run with, predicting noise."""

    def __init__(self):
        super().__init__()
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.scheduler = DDPMScheduler(**betas, clip_sample=False)
        self.networks["network"] = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.networks["network"].weight.data.copy_(inputs().weight)

    def predict(self, latents, timestep, condition):
        return network(self.networks["network"].weight, latents, timestep)


def test_stage_1_is_the_authors(monkeypatch):
    given, model = inputs(), Published()
    config = CCSRStage1Config(variant="v1", trained={"network": "weight"})
    method, wanted = Consistency(config, model), expected["stage_1"]
    monkeypatch.setattr(method, "_draw", lambda *_: (given.noise, given.first, given.second, given.timesteps))
    batch = {"gt": (given.clean + 1) / 2, "lr": torch.zeros(2, 3, 4, 4), "prompt": ["", ""]}
    loss, logs = method.loss("model", batch, 0, [0, 1])
    for name in ("denoising", "at_T", "at_t_max", "noise_at_t_max"):
        assert logs[name].item() == pytest.approx(wanted[name], rel=1e-5)
    loss.backward()
    gradient = model.networks["network"].weight.grad.flatten()[:20]
    torch.testing.assert_close(gradient, torch.tensor(wanted["gradient"]), rtol=1e-4, atol=1e-4 * gradient.abs().max())


def test_stage_2_is_the_authors():
    given, discriminator, wanted = inputs(), PatchDiscriminator(seed=0), expected["stage_2"]
    last = given.last.clone().requires_grad_()
    made = F.conv2d(given.hidden, last, padding=1)
    rest = F.l1_loss(made, given.truth) + distance(made, given.truth).mean()
    adversarial = hinge_generator_loss(discriminator(made))
    weight = adaptive_weight(rest, adversarial, last)
    loss = rest + 0.5 * weight * adversarial
    found = {"before_start": rest, "adversarial": adversarial, "weight": 0.5 * weight, "loss": loss}
    found["discriminator"] = hinge_discriminator_loss(discriminator(given.truth), discriminator(made.detach()))
    for name, value in found.items():
        assert value.item() == pytest.approx(wanted[name], rel=1e-4), name
    gradient = torch.autograd.grad(loss, last)[0].flatten()[:20]
    torch.testing.assert_close(gradient, torch.tensor(wanted["gradient"]), rtol=1e-4, atol=1e-6)
