"""Stage 1 of CCSR: denoising below t_max, and an estimate that is right already at T and at t_max."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfsr_ext.models import Condition, ISRModel
from rfsr_ext.sampling import generators
from rfsr_ext.training.ccsr.config import CCSRStage1Config
from rfsr_ext.training.method import Method

__all__ = ["Consistency"]


class Consistency(Method):
    """L = ‖F(z_t) − y_t‖² + λ (‖ẑ_0(z_T) − z_0‖² + ‖ẑ_0(z_τ) − z_0‖² [+ ‖ε̂(z_τ) − ε‖² in v1]), all of them means.

    z_t = α_t z_0 + σ_t ε_1 at a t of every sample's own, uniform in 0 … τ − 1, and y_t what the network is trained to
    give; z_T = α_T x + σ_T ε_2 at the last timestep, x = z_0 or the latents of the enlarged LR image; and
    z_τ = α_τ ẑ_0(z_T) + σ_τ ε at τ = round(1000 t_max). Gradients flow through ẑ_0(z_T) into the second term
    (CCSR, arXiv 2401.00877, section 3.3; its code). Encoder and text encoder stay.

    Args:
        config: its seed makes noise and timesteps.
        model: trained in place.

    Raises:
        ValueError: if timesteps of the model's scheduler are no numbers from 0 to T, τ is not below T, or ``trained``
            names nothing of the model.
    """

    def __init__(self, config: CCSRStage1Config, model: ISRModel):
        self.config, self.model = config, model
        self.process = model.process()
        self.last = model.recipe.start_timestep or self.process.last_timestep
        self.leap = round((self.process.last_timestep + 1) * config.t_max)
        if not 0 < self.leap < self.last:
            raise ValueError(
                f"t_max must lead to a timestep above 0 and below the first, {self.last}, got {config.t_max:g}, which "
                f"leads to {self.leap}"
            )
        asked = copy.copy(model)  # what is saved keeps what the model itself declares
        asked.trained = model.trained if config.trained is None else dict(config.trained)
        if strange := asked.trained.keys() - model.networks.keys():
            raise ValueError(f"trained must name networks among {', '.join(model.networks)}, got {min(strange)!r}")
        self.players = {"model": asked.unfreeze().trainable_networks()}

    def install(self, player: str, networks: dict[str, nn.Module]) -> None:
        self.model.networks |= networks

    def estimate(self, latents: Tensor, timestep: Tensor | int, condition: Condition) -> tuple[Tensor, Tensor]:
        """The network's output at z_t, and the z_0 estimate that it implies."""
        output = self.model.predict(
            self.process.scale_model_input(latents, timestep), torch.as_tensor(timestep), condition
        )
        return output, self.process.pred_original_sample(output, timestep, latents)

    def loss(self, player: str, batch: dict[str, Any], iteration: int, samples: Sequence[int]):
        config, process, model = self.config, self.process, self.model
        condition = model.condition(batch["lr"], batch["prompt"])
        clean = model.encode(batch["gt"])
        noise, first, second, timesteps = self._draw(clean, samples)
        latents = process.add_noise(clean, noise, timesteps)
        output, _ = self.estimate(latents, timesteps, condition)
        terms = {"denoising": F.mse_loss(output.float(), process.target(clean, noise, timesteps).float())}
        start = clean if config.start == "gt" else model.encode(condition.image)
        _, leapt = self.estimate(process.add_noise(start, first, self.last), self.last, condition)
        latents = process.add_noise(leapt, second, self.leap)
        _, truncated = self.estimate(latents, self.leap, condition)
        terms["at_T"] = F.mse_loss(leapt.float(), clean.float())
        terms["at_t_max"] = F.mse_loss(truncated.float(), clean.float())
        if config.variant == "v1":
            found = process.pred_noise(truncated, self.leap, latents)
            terms["noise_at_t_max"] = F.mse_loss(found.float(), second.float())
        loss = terms["denoising"] + config.lambda_consistency * sum(v for k, v in terms.items() if k != "denoising")
        return loss, {name: value.detach() for name, value in ({"loss": loss} | terms).items()}

    def _draw(self, clean: Tensor, samples: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Three noises and the timesteps, a function of seed and sample."""
        drawn = [torch.randn(3, *clean.shape[1:], generator=g) for g in generators(self.config.seed, samples)]
        places = generators(self.config.seed + 2**32, samples)  # seeds of a run are below
        timesteps = [int(torch.randint(self.leap, (1,), generator=g)) for g in places]
        return *torch.stack(drawn, dim=1).to(clean), torch.tensor(timesteps, device=clean.device)

    def fingerprint(self) -> str:
        return self.model.fingerprint()

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
