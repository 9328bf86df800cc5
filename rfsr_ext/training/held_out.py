"""Measurements on held-out samples during training: which weights are best, and whether a reward is being hacked."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from rfsr_ext.data import Sample
from rfsr_ext.evaluation.measure import Scorer, evaluate
from rfsr_ext.models import ISRModel
from rfsr_ext.rewards import WeightedReward

__all__ = ["HeldOut", "paired_ratio"]

logger = logging.getLogger(__name__)


class HeldOut:
    """Measures a model on held-out samples with fixed noise, and judges the measurements.

    The best weights are those with the highest Σ_k λ_k · mean(min(r_k, cap_k)) among the measurements whose PSNR is not
    more than ``max_psnr_drop`` below that of the first, the base model.  The caps count as they do in training: a score
    beyond its cap is good enough, and to choose by the excess would choose whatever fools the reward most.  A
    standardized reward counts by how many standard deviations of the base model's held-out scores it has risen above
    their mean, and without its cap, which is relative to a running mean.  Views, tags, windows and balancing belong to
    training alone.

    Args:
        model: measured as it stands at each call.
        samples: held-out samples.
        rewards: those of training.
        judges: scorers by name that training never uses, higher is better; a warning appears when one of them has
            fallen since the base model while the held-out reward has risen, both by more than twice the standard error
            of the paired difference over images.
        max_psnr_drop: in dB.
        seed: of the noise.
        batch_size: images at once.
        num_inference_steps: the recipe's by default.

    Attributes:
        measured: one row per measurement: means of fidelity, rewards and judges, and ``reward``, the sum above.
        best_iteration: that of the best row; 0 is the base model.
    """

    chosen_by = "reward"  # the column of ``measured`` that says which weights are best

    def __init__(
        self,
        model: ISRModel,
        samples: Sequence[Sample],
        rewards: Sequence[WeightedReward] = (),
        judges: dict[str, Scorer] | None = None,
        *,
        max_psnr_drop: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
        num_inference_steps: int | None = None,
    ):
        self.model, self.samples = model, samples
        self.rewards, self.judges = list(rewards), judges or {}
        self.max_psnr_drop, self.seed, self.batch_size = max_psnr_drop, seed, batch_size
        self.num_inference_steps = num_inference_steps
        self.measured: list[dict[str, Any]] = []
        self.best_iteration = 0
        self.scales: dict[str, tuple[float, float]] = {}  # mean and deviation of the base model's held-out scores
        self.base_scores: dict[str, list[float]] = {}  # its held-out reward and judges, image by image

    def measure(self, iteration: int, log_images: Callable[[np.ndarray], None] | None = None) -> bool:
        """Measure, append a row to ``measured``, and say whether these are the best weights so far.

        Args:
            iteration: of the weights.
            log_images: gets the first batch as rows of (LR, SR, ground truth), ``[N, H, 3·W, 3]`` in [0, 1].
        """
        frame = self._evaluate(None if log_images is None else lambda indices, sr: self._show(indices, sr, log_images))
        frame["reward"] = self._reward(frame)
        self._warn_of_hacking(frame, iteration)
        row = {"iteration": iteration} | self._row(frame)
        return self._record(row, lambda row, best: row[self.chosen_by] > best[self.chosen_by])

    def _record(self, row: dict[str, Any], is_better: Callable[[dict[str, Any], dict[str, Any]], bool]) -> bool:
        """Append a row to ``measured``, and say whether its weights are the best so far, at a PSNR that is kept."""
        self.measured.append(row)
        best = next(r for r in self.measured if r["iteration"] == self.best_iteration)
        fallen = self.measured[0]["psnr"] - row["psnr"]
        kept = fallen <= self.max_psnr_drop
        if fallen > max(self.max_psnr_drop, 0):
            logger.warning(
                "iteration %d: held-out PSNR is %.2f dB, %.2f below the base model's, more than max_psnr_drop (%g) "
                "allows; if it stays so, lower learning_rate",
                row["iteration"], row["psnr"], fallen, self.max_psnr_drop,
            )  # fmt: skip
        if row is not self.measured[0] and not (kept and is_better(row, best)):
            return False
        self.best_iteration = row["iteration"]
        return True

    def _evaluate(self, on_images: Callable[[range, Tensor], None] | None) -> pd.DataFrame:
        """Rows of `rfsr_ext.evaluation.evaluate`."""
        return evaluate(
            self.model,
            self.samples,
            {term.reward.name: term.measure for term in self.rewards} | self.judges,
            seeds=(self.seed,),
            batch_size=self.batch_size,
            num_inference_steps=self.num_inference_steps,
            name="held-out",
            on_images=on_images,
        )

    def _row(self, frame: pd.DataFrame) -> dict[str, float]:
        """What is kept of them."""
        return frame.drop(columns=["model", "image", "seed", "prompt"]).mean().to_dict()

    def _reward(self, frame: pd.DataFrame) -> pd.Series:
        """Σ λ · min(r, cap) of every held-out image, see the class."""
        total = pd.Series(0.0, frame.index)
        for term in self.rewards:
            name, scores = term.reward.name, frame[term.reward.name].astype(float)
            if term.normalize:
                mean, deviation = self.scales.setdefault(name, (scores.mean(), scores.std(ddof=0) or 1.0))
                total += term.weight * (scores - mean) / deviation
            else:
                total += term.weight * scores.clip(upper=term.cap)
        return total

    def _show(self, indices: range, sr: Tensor, log_images: Callable[[np.ndarray], None]) -> None:
        if indices.start:
            return
        samples = [self.samples[i] for i in indices]
        lr = F.interpolate(torch.stack([s["lr"] for s in samples]), scale_factor=self.model.scale, mode="nearest")
        rows = torch.cat([lr, sr.cpu(), torch.stack([s["gt"] for s in samples])], dim=3)
        log_images(np.moveaxis(rows.numpy(), 1, -1))

    def _warn_of_hacking(self, frame: pd.DataFrame, iteration: int) -> None:
        """Compare with the base model image by image: what may be chance is passed over."""
        now = {name: frame[name].astype(float).tolist() for name in ("reward", *self.judges)}
        first = self.base_scores = self.base_scores or now
        ratios = {name: paired_ratio(first[name], now[name]) for name in now}
        change = {name: f"({np.mean(first[name]):.4g} to {np.mean(now[name]):.4g})" for name in now}
        for name in self.judges:
            if ratios["reward"] > 2 and ratios[name] < -2:
                logger.warning(
                    "iteration %d: the training reward has risen %s while the held-out %s has fallen %s; "
                    "this is what reward hacking looks like, so look at the images",
                    iteration, change["reward"], name, change[name],
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What must survive an interruption."""
        return {
            "measured": self.measured,
            "best_iteration": self.best_iteration,
            "scales": self.scales,
            "base_scores": self.base_scores,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError, TypeError: if it is something else.
        """
        measured, scores = state["measured"], state["base_scores"]
        for name, kind, values in (("measured", dict, measured), ("base_scores", list, list(scores.values()))):
            if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
                raise TypeError(f"{name} are no {kind.__name__}s")
        for row in measured:
            numbers = {name for name, value in row.items() if isinstance(value, (int, float))}
            if missing := {"iteration", "psnr", self.chosen_by, *self.judges} - numbers:
                raise KeyError(min(missing))
        if measured and state["best_iteration"] not in [row["iteration"] for row in measured]:
            raise KeyError("best_iteration")
        if scores and (missing := {"reward", *self.judges} - scores.keys()):
            raise KeyError(min(missing))
        self.measured, self.best_iteration = measured, state["best_iteration"]
        self.scales, self.base_scores = {name: (low, high) for name, (low, high) in state["scales"].items()}, scores


def paired_ratio(first: Sequence[float], now: Sequence[float]) -> float:
    """Mean difference over images in units of its standard error; not a number for a single image."""
    difference = pd.Series(now) - pd.Series(first)
    with np.errstate(divide="ignore", invalid="ignore"):
        return difference.mean() / difference.sem()
