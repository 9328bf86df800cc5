"""What CCSR v1's own losses give for what `inputs` makes; run by hand only, to write ccsr.json beside this file.

Repositories: https://github.com/csslc/CCSR at 15778ed541daa3715b3501640235fdf9484dcdc7, whose training code is that of
the later 40ba936; https://github.com/CompVis/taming-transformers at 3ba01b241669f5ade541ce990f7650a3b8f65318.
Command, from the root of this project:

    PYTHONPATH=. python tests/training/released/ccsr.py CCSR_FOLDER TAMING_FOLDER

Their functions are taken out of their files, without what these import. Stand-ins: `network` for the denoiser,
`distance` for LPIPS. Noise is that of `inputs`. Their reconstruction loss is divided by the batch size twice, so that
the whole of the decoder's loss is; it is multiplied by it here.
"""

import ast
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rfsr_ext.losses import PatchDiscriminator

EXPECTED = Path(__file__).with_suffix(".json")


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs():
    """Latents with their noises and timesteps; hidden features, the last layer's weight and the truth of a decoder."""
    return types.SimpleNamespace(
        clean=randn(0, 2, 3, 16, 16), noise=randn(1, 2, 3, 16, 16), first=randn(2, 2, 3, 16, 16),
        second=randn(3, 2, 3, 16, 16), timesteps=torch.tensor([17, 503]), weight=0.3 * randn(4, 3, 3, 3, 3),
        hidden=randn(5, 2, 4, 64, 64), last=0.2 * randn(6, 3, 4, 3, 3), truth=randn(7, 2, 3, 64, 64).clamp(-1, 1),
    )  # fmt: skip


def network(weight, latents, timestep):
    """Stands for the denoiser."""
    scale = 1 + torch.as_tensor(timestep).reshape(-1, 1, 1, 1) / 1000
    return torch.tanh(F.conv2d(latents, weight, padding=1)) * scale


def distance(pred, target):
    """Stands for LPIPS: one number per image."""
    return (F.avg_pool2d(pred, 4) - F.avg_pool2d(target, 4)).square().mean((1, 2, 3), keepdim=True)


def functions(path: Path, owner: str | None, names: set[str], scope: dict) -> dict:
    """Functions or classes of a file, or methods of one of its classes, in a scope of ours."""
    body = ast.parse(path.read_text()).body
    if owner is not None:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == owner).body
    wanted = [node for node in body if getattr(node, "name", None) in names]
    assert {node.name for node in wanted} == names
    exec(compile(ast.Module(wanted, []), str(path), "exec"), scope)
    return {name: scope[name] for name in names}


def stage_1(public: Path) -> dict:
    given, draws = inputs(), []
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = torch.tensor(np.cumprod(1 - betas), dtype=torch.float32)

    def extract_into_tensor(values, t, shape):
        return values.gather(-1, t).reshape(len(t), *[1] * (len(shape) - 1))

    scope = {
        "torch": types.SimpleNamespace(randn_like=lambda _: draws.pop(0), nn=nn, exp=torch.exp),
        "default": lambda value, make: make() if value is None else value,
        "extract_into_tensor": extract_into_tensor,
    }
    file = public / "ldm/models/diffusion/ddpm_ccsr_stage1.py"
    own = functions(file, "DDPM", {"q_sample", "predict_start_from_noise", "get_loss"}, scope)
    own |= functions(file, "LatentDiffusion", {"p_losses"}, scope)
    weight = given.weight.clone().requires_grad_()
    theirs = types.SimpleNamespace(
        sqrt_alphas_cumprod=alpha_bar.sqrt(), sqrt_one_minus_alphas_cumprod=(1 - alpha_bar).sqrt(),
        sqrt_recip_alphas_cumprod=(1 / alpha_bar).sqrt(), sqrt_recipm1_alphas_cumprod=(1 / alpha_bar - 1).sqrt(),
        loss_type="l2", parameterization="eps", training=True, logvar=torch.zeros(1000), learn_logvar=False,
        l_simple_weight=1.0, original_elbo_weight=0.0, lvlb_weights=torch.zeros(1000), device="cpu",
        apply_model=lambda x, t, _: network(weight, x, t),
    )  # fmt: skip
    for name, function in own.items():
        setattr(theirs, name, types.MethodType(function, theirs))
    last, leap = torch.full((2,), 999), torch.full((2,), 667)
    draws[:] = [given.noise]
    denoising, _ = theirs.p_losses(given.clean, None, given.timesteps, last, leap, 0)
    draws[:] = [given.first, given.second]
    consistency, logs = theirs.p_losses(given.clean, None, given.timesteps, last, leap, 1)
    (gradient,) = torch.autograd.grad(denoising + consistency, weight)
    return {
        "denoising": denoising.item(), "at_T": logs["train/loss_x0"].item(),
        "at_t_max": logs["train/loss_x0_from_tao"].item(),
        "noise_at_t_max": logs["train/loss_noise_from_tao"].item(), "gradient": gradient.flatten()[:20].tolist(),
    }  # fmt: skip


def stage_2(public: Path, taming: Path) -> dict:
    given, scope = inputs(), {"nn": nn, "torch": torch, "F": F, "functools": __import__("functools"), "ActNorm": None}
    functions(taming / "taming/modules/discriminator/model.py", None, {"NLayerDiscriminator", "weights_init"}, scope)
    functions(taming / "taming/modules/losses/vqperceptual.py", None, {"adopt_weight", "hinge_d_loss"}, scope)
    scope |= {"vanilla_d_loss": None, "LPIPS": lambda: Stand(distance)}
    kind = functions(public / "ldm/modules/losses/contperceptual.py", None, {"LPIPSWithDiscriminator"}, scope)
    theirs = kind["LPIPSWithDiscriminator"](disc_start=1, kl_weight=0, disc_weight=0.5)
    theirs.discriminator.load_state_dict(PatchDiscriminator(seed=0).state_dict(), strict=False)
    last = given.last.clone().requires_grad_()
    made = F.conv2d(given.hidden, last, padding=1)
    loss, logs = theirs(given.truth, made, 0, 5, last_layer=last)
    before, _ = theirs(given.truth, made, 0, 0, last_layer=last)
    other, _ = theirs(given.truth, made, 1, 5)
    return {
        "loss": loss.item() * 2, "before_start": before.item() * 2, "weight": logs["train/d_weight"].item() * 2,
        "adversarial": logs["train/g_loss"].item(), "discriminator": other.item(),
        "gradient": (torch.autograd.grad(loss, last)[0] * 2).flatten()[:20].tolist(),
    }  # fmt: skip


class Stand(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


if __name__ == "__main__":
    ccsr, taming_transformers = map(Path, sys.argv[1:])
    found = {"stage_1": stage_1(ccsr), "stage_2": stage_2(ccsr, taming_transformers)}
    EXPECTED.write_text(json.dumps(found, indent=1) + "\n")
