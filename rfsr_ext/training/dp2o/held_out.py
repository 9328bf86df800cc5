"""Best, mean and worst of several results per held-out crop, and whether the reward rises by leaving the reference."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rfsr_ext.data import Sample
from rfsr_ext.evaluation.measure import Scorer
from rfsr_ext.evaluation.preferences import Measure, evaluate_measures
from rfsr_ext.models import ISRModel
from rfsr_ext.rewards.ranking import HybridReward
from rfsr_ext.training.held_out import HeldOut, paired_ratio

__all__ = ["HeldOutExtremes"]

logger = logging.getLogger(__name__)


class HeldOutExtremes(HeldOut):
    """Measures the hybrid reward of several results per held-out crop, by the base model's smallest and largest scores.

    The best weights are those with the highest mean reward among the measurements whose PSNR is not more than
    ``max_psnr_drop`` below the base model's.  Beside the warnings of `HeldOut` there is one when the reward has risen
    while the training losses since the last measurement say that even the winners are predicted worse than by the
    reference: the model then prefers them by unlearning losers faster, and leaves the reference.

    Args:
        model, samples, judges, max_psnr_drop, batch_size, num_inference_steps: as for `HeldOut`.
        measures: of the hybrid reward, and any others.
        hybrid: made of them.
        seeds: of the noise.
        history: gives the rows of training so far, with ``winner`` and ``drift`` of `diffusion_dpo_loss`.

    Attributes:
        measured: rows of means, with ``reward``, ``reward_best``, ``reward_worst`` (of an image's results, averaged
            over images) and ``reward_spread`` (their standard deviation, likewise).
    """

    def __init__(
        self,
        model: ISRModel,
        samples: Sequence[Sample],
        measures: Sequence[Measure],
        hybrid: HybridReward,
        judges: dict[str, Scorer],
        seeds: Sequence[int],
        history: Callable[[], list[dict[str, Any]]],
        **options,
    ):
        super().__init__(model, samples, judges=judges, **options)
        self.measures, self.hybrid, self.seeds, self.history = list(measures), hybrid, list(seeds), history
        self.bounds: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(self, iteration: int, log_images: Callable[[np.ndarray], None] | None = None) -> bool:
        best = super().measure(iteration, log_images)
        self._warn_of_leaving(iteration)
        return best

    def _evaluate(self, on_images: Callable[[range, Tensor], None] | None) -> pd.DataFrame:
        shown = False

        def first(indices: range, sr: Tensor) -> None:
            nonlocal shown
            if on_images is not None and not shown:
                on_images(indices, sr)
                shown = True

        return evaluate_measures(
            self.model,
            self.samples,
            self.measures,
            self.judges,
            self.seeds,
            first,
            batch_size=self.batch_size,
            num_inference_steps=self.num_inference_steps,
            name="held-out",
        )

    def _reward(self, frame: pd.DataFrame) -> pd.Series:
        lower_better = [measure.name for measure in self.measures if measure.lower_better]
        shape = len(self.seeds), len(self.samples)  # rows come seed by seed
        scores = {m.name: torch.tensor(frame[m.name].to_numpy(float)).reshape(shape).T for m in self.measures}
        self.bounds = self.bounds or self.hybrid.bounds(scores, lower_better)
        rewards = self.hybrid(scores, lower_better, self.bounds)
        return pd.Series(rewards.T.reshape(-1).numpy(), frame.index)

    def _row(self, frame: pd.DataFrame) -> dict[str, float]:
        by_image = frame.groupby("image")["reward"]
        found = {"best": by_image.max(), "worst": by_image.min(), "spread": by_image.std(ddof=0)}
        return super()._row(frame) | {f"reward_{name}": float(values.mean()) for name, values in found.items()}

    def _warn_of_hacking(self, frame: pd.DataFrame, iteration: int) -> None:
        super()._warn_of_hacking(frame.groupby("image").mean(numeric_only=True), iteration)
        self.now = frame.groupby("image")["reward"].mean().tolist()

    def _warn_of_leaving(self, iteration: int) -> None:
        since = self.measured[-2]["iteration"] if len(self.measured) > 1 else 0
        rows = [row for row in self.history() if row["iteration"] > since and not row["skipped"]]
        winner = [row["winner"] for row in rows]
        rise = paired_ratio(self.base_scores["reward"], self.now)
        if rows and rise > 2 and paired_ratio([0.0] * len(winner), winner) > 2:
            logger.warning(
                "iteration %d: the held-out reward has risen (%.4g to %.4g) while even winners are predicted worse "
                "than by the reference (error %+.2g %%, drift %.2g %%): the reward rises by leaving the reference, so "
                "raise beta or lower learning_rate, and look at the images",
                iteration, np.mean(self.base_scores["reward"]), np.mean(self.now), 100 * np.mean(winner),
                100 * np.mean([row["drift"] for row in rows]),
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        bounds = {name: [low.tolist(), high.tolist()] for name, (low, high) in self.bounds.items()}
        return super().state_dict() | {"bounds": bounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.bounds = {
            name: tuple(torch.tensor(x, dtype=torch.float64) for x in ends) for name, ends in state["bounds"].items()
        }
