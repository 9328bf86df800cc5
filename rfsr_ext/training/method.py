"""What a training run optimizes: the contract between a method and the loop that runs it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfsr_ext.models.base import fingerprint
from rfsr_ext.training.config import RunConfig

__all__ = ["Method"]


class Method(ABC):
    """Networks to train, what to minimize, and nothing of the loop.

    A *player* is a set of networks with an optimizer of its own.  Most methods have one; an adversarial one has two,
    which take turns in every iteration.  All randomness of iteration k must come from the seed and k alone: a resumed
    run then ends as an uninterrupted one, and several processes do what one does.

    Attributes:
        players: by player its networks by name.  Exactly the parameters that ask for a gradient are trained.
    """

    players: dict[str, dict[str, nn.Module]]

    @abstractmethod
    def loss(
        self, player: str, batch: dict[str, Any], iteration: int, samples: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a part of the iteration's batch, a mean over its samples, and what to log (detached scalars).

        Args:
            player: whose networks will get the gradient.
            batch: what the data loader makes of the samples, its tensors on the method's device.
            iteration: from 0.
            samples: the samples' numbers in the run; noise made from them is the same however the batch is cut.
        """

    def install(self, player: str, networks: dict[str, nn.Module]) -> None:  # noqa: B027, doing nothing is the default
        """Compute with these networks from now on: the player's own, or what wraps them for several processes."""

    def optimizer(self, player: str, parameters: list[nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
        """The player's optimizer; by default the one that the configuration names."""
        options = {"lr": config.learning_rate, "betas": config.adam_betas, "weight_decay": config.weight_decay}
        if config.optimizer == "adam":
            return torch.optim.AdamW(parameters, **options)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)

    def learning_rate_factor(self, player: str, iteration: int) -> float:
        """What the configured learning rate is multiplied by in an iteration; 1 by default."""
        return 1.0

    def describe(self, iteration: int) -> dict[str, Any]:
        """Plain values for the iteration's row in the history, such as the drawn sampling step."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive an interruption besides weights and optimizers, as plain JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027, doing nothing is the default
        """Take over what `state_dict` gave.

        Raises:
            ValueError: if it is of another method.
        """

    def fingerprint(self) -> str:
        """Tells what the run started from; by default names, shapes and first values of the players' parameters."""
        return fingerprint({f"{player}.{name}": n for player, own in self.players.items() for name, n in own.items()})

    def export(self, folder: Path) -> None:  # noqa: B027, doing nothing is the default
        """Write the result as it stands, complete or not at all; nothing by default."""
