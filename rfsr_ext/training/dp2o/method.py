"""Diffusion-DPO on pairs of a model's own results, as a `Method`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from rfsr_ext.data.candidates import CandidateFolder
from rfsr_ext.losses import diffusion_dpo_loss
from rfsr_ext.models import Condition, ISRModel, Process
from rfsr_ext.rewards.ranking import Pairs
from rfsr_ext.sampling import generators
from rfsr_ext.training import setup
from rfsr_ext.training.dp2o.config import DP2OConfig
from rfsr_ext.training.method import Method

__all__ = ["DP2O", "PreferencePairs"]

_PAIR, _TIMESTEP = 5, 6  # streams of a sample's random numbers


class PreferencePairs(Dataset):
    """Endless pairs: an image drawn uniformly, one of its winners and one of its losers, each a function of the index.

    Items are ``winner`` and ``loser`` ``[C, h, w]``, ``lr`` ``[3, h, w]``, ``prompt`` and ``weight``.

    Args:
        candidates: the folder.
        pairs: which of them, and what they count.
        seed: of the drawing.
    """

    def __init__(self, candidates: CandidateFolder, pairs: Pairs, seed: int):
        self.candidates, self.pairs, self.seed = candidates, pairs, seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        groups, best, worst = self.pairs.weights.shape
        rng = np.random.default_rng((self.seed, index, _PAIR))
        g, i, j = (int(rng.integers(n)) for n in (groups, best, worst))
        group = int(self.pairs.groups[g])
        chosen = [int(self.pairs.winners[g, i]), int(self.pairs.losers[g, j])]
        (winner, loser), prompt = self.candidates.latents(group, chosen)
        return {
            "winner": winner.float(),
            "loser": loser.float(),
            "lr": self.candidates.lr(group),
            "prompt": prompt,
            "weight": self.pairs.weights[g, i, j].float(),
        }


class DP2O(Method):
    """`diffusion_dpo_loss` of pairs at one drawn timestep and one noise for winner and loser.

    Args:
        config: its seed draws timesteps and noise.
        model: trained in place: its adapters where it has some, else what it declares as ``trained``.
        reference: the frozen model; None for the model with its adapters switched off.
        base: what the run started from, see `Method.fingerprint`.
    """

    def __init__(self, config: DP2OConfig, model: ISRModel, reference: ISRModel | None, base: str):
        self.config, self.model, self.reference, self.base = config, model, reference, base
        self.process = model.process(config.num_inference_steps, (config.crop_size, config.crop_size))
        if config.timestep_sampling != "sampler" and hasattr(model.scheduler, "precondition_outputs"):
            raise ValueError(
                f"timestep_sampling must be sampler for {type(model.scheduler).__name__}, whose timesteps are no "
                f"numbers of steps, got {config.timestep_sampling}"
            )
        self.players = {"model": model.trainable_networks()}

    def install(self, player: str, networks: dict[str, nn.Module]) -> None:
        self.model.networks |= networks

    def draw_timesteps(self, samples: Sequence[int]) -> Tensor:
        """One timestep per sample, by its number in the run."""
        rngs = [np.random.default_rng((self.config.seed, sample, _TIMESTEP)) for sample in samples]
        total = self.model.scheduler.config.num_train_timesteps
        return draw_timesteps(self.process, total, self.config.timestep_sampling, rngs)

    def loss(self, player: str, batch: dict[str, Any], iteration: int, samples: Sequence[int]):
        model, process = self.model, self.process
        latents = torch.stack([batch["winner"], batch["loser"]]).to(model.device, model.dtype)
        drawn = [torch.randn(latents.shape[2:], generator=g) for g in generators(self.config.seed, samples)]
        noise = torch.stack(drawn).to(latents).expand_as(latents).flatten(0, 1)
        timesteps = self.draw_timesteps(samples).to(model.device).repeat(2)
        clean = latents.flatten(0, 1)
        condition = _twice(model.condition(batch["lr"], batch["prompt"]))
        noise = model.training_noise(clean, noise, condition, process)
        noisy = process.scale_model_input(process.add_noise(clean, noise, timesteps), timesteps)
        with torch.no_grad(), setup.as_reference(model, self.reference) as reference:
            before = reference.predict(noisy, timesteps, condition)
        output = model.predict(noisy, timesteps, condition)
        target = process.target(clean, noise, timesteps)
        output, before, target = (x.unflatten(0, (2, -1)) for x in (output, before, target))
        beta, convention = self.config.beta, self.config.beta_convention
        return diffusion_dpo_loss(output, before, target, beta, convention, batch["weight"])

    def fingerprint(self) -> str:
        return self.base

    def export(self, folder: Path) -> None:
        setup.export_model(self.model, folder)


def draw_timesteps(process: Process, total: int, how: str, rngs: Sequence[np.random.Generator]) -> Tensor:
    """A timestep from each generator.

    Args:
        process: of the model.
        total: T, the number of timesteps it was trained with.
        how: "uniform", each of the timesteps of training alike; "logit-normal", sigmoid(n) of them for a standard
            normal n (Esser et al., 2024, FLUX's training); "sampler", one of those that the process samples at.
        rngs: one per sample.

    Returns:
        ``[len(rngs)]``: 0 … T − 1 of a diffusion model; of a flow model, for which 0 is the image, 1 … T.
    """
    if how == "sampler":
        return process.timesteps[torch.tensor([int(rng.integers(len(process))) for rng in rngs])]
    first = int(process.prediction_type == "flow")
    if how == "uniform":
        drawn = [int(rng.integers(total)) for rng in rngs]
    else:
        drawn = [int(total / (1 + np.exp(-rng.standard_normal()))) for rng in rngs]
    return torch.tensor(drawn) + first


def _twice(condition: Condition) -> Condition:
    """The condition of a batch and the same batch again."""

    def both(x: Tensor) -> Tensor:
        return torch.cat([x, x])

    return Condition(
        both(condition.image),
        condition.prompts * 2,
        {name: both(x) for name, x in condition.spatial.items()},
        {name: both(x) for name, x in condition.shared.items()},
    )
