"""Reward feedback learning as a `Method`, and the trainer that puts it together from a configuration."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import Dataset

from rfsr_ext.data import Sample
from rfsr_ext.evaluation.measure import Scorer
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.memory import bytes_of, hold_weights
from rfsr_ext.models import ISRModel
from rfsr_ext.rewards import WeightedReward
from rfsr_ext.sampling import Rollout, generators
from rfsr_ext.training import setup
from rfsr_ext.training.config import RFSRConfig
from rfsr_ext.training.held_out import HeldOut
from rfsr_ext.training.loop import Loop, create_accelerator
from rfsr_ext.training.method import Method
from rfsr_ext.training.objective import RFSRObjective

__all__ = ["RFSR", "RFSRTrainer", "TrainingResult", "build_objective"]


def build_objective(
    config: RFSRConfig,
    model: ISRModel,
    rewards: Sequence[WeightedReward] | None = None,
    style_loss: VGGGramLoss | None = None,
) -> RFSRObjective:
    """The objective of a configuration for a model, on the model's device; what is not given is built.

    With ``lora_rank`` the model must have its adapters already; without them it is the reference.

    Raises:
        ValueError: if there is a reward window and no reward.
    """
    windows = setup.build_windows(config, model)
    rewards = setup.build_rewards(config.rewards) if rewards is None else list(rewards)
    if windows.reward and not rewards:
        raise ValueError("rewards must name at least one reward for a reward window, got none")
    for term in rewards:
        if not term.offload:
            term.reward.to(model.device)
    held = config.style_loss != "none" and windows.reward is not None
    if config.style_loss != "gram" or not held:
        style_loss = None
    elif style_loss is None:
        style_loss = VGGGramLoss(weights=config.vgg_weights)
    reference = model.reference() if held and not config.lora_rank else None
    if reference and config.offload_reference:
        for network in reference.trainable_networks().values():
            network.cpu()
    return RFSRObjective(
        model,
        windows,
        structure_loss=setup.structure_loss(config.structure_loss, config.structure_level),
        lambda_structure=config.lambda_structure,
        rewards=rewards,
        balance_rewards=config.balance_rewards,
        style_loss=style_loss.to(model.device) if style_loss else None,
        kl=held and config.style_loss == "kl",
        lambda_style=config.lambda_style,
        reference=reference,
        offload_reference=config.offload_reference,
        adapters=bool(config.lora_rank),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale or 1.0,
        negative_prompt=config.negative_prompt,
    )


class FirstOfEvery(Dataset):
    """Samples for the iterations that begin a trajectory, one after the other; nothing for those that go on with one.

    Args:
        dataset: indexable by any non-negative integer.
        batch_size: samples per iteration.
        points: iterations per trajectory.
    """

    def __init__(self, dataset: Dataset, batch_size: int, points: int):
        self.dataset, self.batch_size, self.points = dataset, batch_size, points

    def __getitem__(self, index: int) -> dict[str, Any]:
        iteration, place = divmod(index, self.batch_size)
        if iteration % self.points:
            return {}
        return self.dataset[iteration // self.points * self.batch_size + place]


class RFSR(Method):
    """Eq. 7 at one drawn sampling step per iteration, the same step for the whole batch (section 3.5).

    With ``points_per_rollout`` above 1 as many iterations share a batch and its trajectory: each goes on from where
    the last one trained, with the weights as they are now, and the trained output takes the sampling step.

    Args:
        config: its seed draws the steps and makes the noise; with ``lora_rank`` adapters are trained, else what
            the model declares as ``trained``.
        objective: the loss of a batch, with the model.

    Raises:
        ValueError: if the windows have fewer steps than ``points_per_rollout``.
    """

    def __init__(self, config: RFSRConfig, objective: RFSRObjective):
        self.seed, self.objective, self.model = config.seed, objective, objective.model
        self.steps = objective.windows.steps()
        self.batch_size, self.points = config.batch_size, config.points_per_rollout
        if self.points > len(self.steps):
            raise ValueError(
                f"points_per_rollout must be at most the number of steps in the windows ({len(self.steps)}), got "
                f"{self.points}"
            )
        self.rollouts: dict[int, tuple[dict[str, Any], Rollout]] = {}  # by the part of the batch, while they last
        self.base = self.model.fingerprint()
        if config.lora_rank:
            set_seed(config.seed)  # adapters start from random numbers
            setup.add_adapters(self.model, config.lora_rank, config.lora_targets)
        else:
            self.model.unfreeze()
        self.players = {"model": self.model.trainable_networks()}
        self.frozen: dict[str, nn.Module] = {}  # as they are saved, where training holds others
        if config.frozen_dtype:
            self._hold_frozen(getattr(torch, config.frozen_dtype))

    def _hold_frozen(self, dtype: torch.dtype) -> None:
        """Compute with frozen networks whose weights are in half precision; the model's own wait on the CPU."""
        model, objective = self.model, self.objective
        self.frozen = {name: network for name, network in model.networks.items() if name not in model.trained}
        held = {name: hold_weights(copy.deepcopy(network), dtype) for name, network in self.frozen.items()}
        model.networks |= held
        for network in self.frozen.values():
            network.cpu()
        if objective.reference is not None:
            objective.reference.networks |= held
            for network in objective.reference.trainable_networks().values():
                hold_weights(network, dtype)
        if objective.style_loss is not None:
            hold_weights(objective.style_loss, dtype)
        for term in objective.rewards:
            hold_weights(term.reward, dtype)

    def install(self, player: str, networks: dict[str, nn.Module]) -> None:
        self.model.networks |= networks

    def draw_step(self, iteration: int) -> int:
        """The sampling step of an iteration, the same on every process.

        A trajectory's steps are evenly spaced over both windows' steps from a uniformly drawn one on, cyclically: each
        is as likely as any other, as in the paper, and the windows have their shares of every trajectory.
        """
        number, point = divmod(iteration, self.points)
        count = len(self.steps)
        first = int(np.random.default_rng((self.seed, number, 2)).choice(count))
        return self.steps[sorted((first + i * count // self.points) % count for i in range(self.points))[point]]

    def loss(self, player: str, batch: dict[str, Any], iteration: int, samples: Sequence[int]):
        part = samples[0] - iteration * self.batch_size
        place = iteration % self.points
        if place == 0:
            rollout = self.objective.begin(batch["lr"], batch["prompt"], generators(self.seed, samples))
        else:
            batch, rollout = self.rollouts.pop(part)
        if place + 1 < self.points:  # it goes on; nothing is kept of one that ends here
            self.rollouts[part] = batch, rollout
        return self.objective(batch["lr"], batch["gt"], batch["prompt"], self.draw_step(iteration), rollout=rollout)

    def describe(self, iteration: int) -> dict[str, Any]:
        step, windows = self.draw_step(iteration), self.objective.windows
        inside = {"structure": windows.in_structure(step), "reward": windows.in_reward(step)}
        return {"step": step, "window": " and ".join(name for name, is_inside in inside.items() if is_inside)}

    def state_dict(self) -> dict[str, Any]:
        terms = self.objective.rewards
        return {"reward_statistics": {term.reward.name: term.statistics.state() for term in terms}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        statistics = state["reward_statistics"]
        names = [term.reward.name for term in self.objective.rewards]
        if set(statistics) != set(names):
            raise ValueError(
                f"rewards must be those of the checkpoint, {', '.join(statistics) or 'none'}, got "
                f"{', '.join(names) or 'none'}"
            )
        for term in self.objective.rewards:
            term.statistics.load(statistics[term.reward.name])

    def fingerprint(self) -> str:
        return self.base

    def export(self, folder: Path) -> None:
        setup.export_model(self.model, folder, self.frozen)

    def finish(self) -> None:
        """Give the model its frozen networks back as they were, and networks with adapters as they are saved."""
        setup.finish(self.model, self.frozen)


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind.

    Attributes:
        model: the fine-tuned model, with the moving average of its weights.
        folder: the run's folder: ``model/`` (the end), ``best/`` (best held-out), ``history.csv``, ``checkpoints/``;
            for adapters also ``model-adapters/`` and ``best-adapters/``.
        history: one row per iteration.
        validation: one row per held-out measurement, see `rfsr_ext.training.held_out.HeldOut`.
        best_iteration: of the weights in ``best/``; 0 is the base model.
        seconds: of `rfsr_ext.training.loop.Loop`.
    """

    model: ISRModel
    folder: Path
    history: pd.DataFrame
    validation: pd.DataFrame
    best_iteration: int
    seconds: float

    @property
    def summary(self) -> str:
        """Where the two models lie."""
        return (
            f"fine-tuned model: {self.folder / 'model'}\n"
            f"best held-out (iteration {self.best_iteration}): {self.folder / 'best'}"
        )


class RFSRTrainer:
    """Fine-tunes any `ISRModel` by reward feedback learning as the paper describes (sections 3.2 to 3.5).

    Every part can be given; what is not given is built from ``config``.  All randomness of iteration k comes from
    ``(config.seed, k)``, so that a resumed run, or one on several processes, does what a single uninterrupted one does.

    Args:
        config: all settings.
        model: the pre-trained model; it is trained in place.
        dataset: samples as `rfsr_ext.data.Sample`, one for every index that the run asks for.
        rewards: the weighted rewards.
        style_loss: the Gram loss, where ``config.style_loss`` is "gram".
        validation: held-out samples, measured during training.
        judges: scorers by name that training never uses, see `rfsr_ext.training.held_out.HeldOut`.
    """

    def __init__(
        self,
        config: RFSRConfig,
        model: ISRModel | None = None,
        *,
        dataset: Dataset | None = None,
        rewards: Sequence[WeightedReward] | None = None,
        style_loss: VGGGramLoss | None = None,
        validation: list[Sample] | None = None,
        judges: dict[str, Scorer] | None = None,
    ):
        accelerator = create_accelerator(config)
        self.model = setup.build_model(config, accelerator.device, model)
        self.objective = build_objective(config, self.model, rewards, style_loss)
        trajectories = -(-config.iterations // config.points_per_rollout)
        dataset = setup.build_samples(config, self.model, trajectories * config.batch_size, dataset)
        validation = setup.build_validation(config, self.model) if validation is None else validation
        judges = setup.build_judges(accelerator.device) if judges is None else judges
        self.method = RFSR(config, self.objective)
        self.held_out = HeldOut(
            self.model,
            validation,
            self.objective.rewards,
            judges,
            max_psnr_drop=config.max_psnr_drop,
            seed=config.seed,
            batch_size=config.batch_size,
            num_inference_steps=config.num_inference_steps,
        )
        dataset = FirstOfEvery(dataset, config.batch_size, config.points_per_rollout)
        self.loop = Loop(config, self.method, dataset, self.held_out, accelerator, name="RFSR")

    def held_memory(self) -> dict[str, int]:
        """Bytes that the run holds from beginning to end, on the GPU if there is one, by what they are for.

        Activations come on top, and what is off-loaded while it is used; several processes may share some of it.
        """
        objective, trained = self.objective, [p for s in self.loop.states.values() for p in s.parameters.values()]
        size = sum(p.nbytes for p in trained)
        scorers = [term.reward for term in objective.rewards if not term.offload]
        own = objective.reference is not None and not objective.offload_reference
        return {
            "weights": bytes_of(self.model.networks.values()),
            "gradients": size,
            "optimizer": 2 * (sum(p.numel() for p in trained) if self.loop.config.optimizer == "adam-8bit" else size),
            "average": size,
            "reference": bytes_of(objective.reference.trainable_networks().values()) if own else 0,
            "rewards and style loss": bytes_of(scorers + ([objective.style_loss] if objective.style_loss else [])),
        }

    def train(self, resume: bool = True) -> TrainingResult:
        """Train to ``config.iterations``, see `rfsr_ext.training.loop.Loop.train`."""
        history = self.loop.train(resume)
        self.method.finish()
        return TrainingResult(
            self.model, self.loop.folder, history, pd.DataFrame(self.held_out.measured), self.held_out.best_iteration,
            self.loop.seconds,
        )  # fmt: skip
