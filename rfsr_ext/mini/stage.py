"""One stage of ``rfsr mini build``: networks that learn to minimize a function of a batch."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from rfsr_ext.training import Loop, Method, RunConfig
from rfsr_ext.training.loop import create_accelerator

__all__ = ["Stage", "train_stage"]


class Stage(Method):
    """AdamW with a warm-up over 100 iterations and, if ``falling``, a cosine to a hundredth of the learning rate.

    Args:
        networks: by name; all their parameters are trained.
        minimize: ``f(batch, generator)``, a mean over the batch; the generator follows from seed and iteration.
        iterations: length of the schedule.
        seed: of the generators.
        falling: whether the learning rate does; a stage whose networks another one goes on with may keep it.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        minimize: Callable[[dict, torch.Generator], Tensor],
        iterations: int,
        seed: int = 0,
        falling: bool = True,
    ):
        self.players = {"stage": networks}
        self.minimize, self.iterations, self.seed = minimize, iterations, seed
        self.falling = falling
        for network in networks.values():
            network.requires_grad_(True).train()

    def learning_rate_factor(self, player: str, iteration: int) -> float:
        rise = min(1.0, (iteration + 1) / 100)
        fall = 0.5 * (1 + math.cos(math.pi * iteration / self.iterations)) if self.falling else 1.0
        return rise * max(fall, 0.01)

    def loss(self, player: str, batch: dict[str, Any], iteration: int, samples: Sequence[int]):
        value = self.minimize(batch, torch.Generator().manual_seed(self.seed * 1_000_003 + iteration))
        return value, {"loss": value.detach()}

    def state_dict(self) -> dict[str, Any]:
        return {"iterations": self.iterations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.falling and state["iterations"] != self.iterations:
            raise ValueError(
                f"iterations of this stage must be {state['iterations']}, which its unfinished run began with, got "
                f"{self.iterations}; give another work folder"
            )


def train_stage(
    name: str,
    networks: dict[str, nn.Module],
    dataset: Dataset,
    minimize: Callable[[dict, torch.Generator], Tensor],
    folder: Path,
    *,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    ema_decay: float = 0.999,
    weight_decay: float = 1e-4,
    falling: bool = True,
    seed: int = 0,
    bf16: bool = True,
    device: torch.device | str = "cpu",
    checkpoint_every: int = 200,
) -> float:
    """Train ``networks`` in ``folder/name``, from its newest checkpoint if there is one, and load their moving average.

    Returns:
        Seconds spent, summed over all interrupted runs.
    """
    config = RunConfig(
        iterations=iterations, batch_size=batch_size, learning_rate=learning_rate, adam_betas=(0.9, 0.99),
        weight_decay=weight_decay, ema_decay=ema_decay, seed=seed, mixed_precision="bf16" if bf16 else "no",
        checkpoint_every=checkpoint_every, keep_checkpoints=1, num_workers=1, output_dir=str(folder / name),
    )  # fmt: skip
    accelerator = create_accelerator(config, cpu=torch.device(device).type == "cpu")
    stage = Stage(networks, minimize, iterations, seed, falling)
    loop = Loop(config, stage, dataset, accelerator=accelerator, name=name)
    loop.train()
    for network in networks.values():
        network.requires_grad_(False).eval()
    return loop.seconds
