"""Held-out measurements of CCSR's stages: quality, and how much samples of one photograph differ."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rfsr_ext.data import Sample
from rfsr_ext.evaluation.measure import Scorer, evaluate
from rfsr_ext.evaluation.stability import Spread, stability_table
from rfsr_ext.models import ISRModel
from rfsr_ext.training.held_out import HeldOut

__all__ = ["HeldOutStability"]


class HeldOutStability(HeldOut):
    """Measures several samples of every held-out crop.

    The best weights are those with the lowest distance among the measurements whose PSNR is not more than
    ``max_psnr_drop`` below that of the first.

    Args:
        model, samples, judges, max_psnr_drop, seed, batch_size, num_inference_steps: as for `HeldOut`.
        distance: two batches of images to one number per image.
        seeds: samples per crop, from ``seed`` on.

    Attributes:
        measured: one row per measurement: means of fidelity, judges and ``distance``, ``g_std_…`` of PSNR, distance and
            judges, and ``l_std``.
    """

    chosen_by = "distance"

    def __init__(
        self,
        model: ISRModel,
        samples: Sequence[Sample],
        distance: Callable[[Tensor, Tensor], Tensor],
        judges: dict[str, Scorer],
        *,
        seeds: int,
        max_psnr_drop: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
        num_inference_steps: int | None = None,
    ):
        super().__init__(
            model, samples, (), judges, max_psnr_drop=max_psnr_drop, seed=seed, batch_size=batch_size,
            num_inference_steps=num_inference_steps,
        )  # fmt: skip
        self.distance, self.seeds = distance, range(seed, seed + seeds)

    def measure(self, iteration: int, log_images: Callable[[np.ndarray], None] | None = None) -> bool:
        spread, distances = Spread(), []

        def look(indices: range, sr: Tensor) -> None:
            gt = torch.stack([self.samples[i]["gt"] for i in indices]).to(sr.device)
            with torch.no_grad():
                distances.extend(self.distance(sr.float(), gt).tolist())
            spread.add(indices, sr)
            if log_images is not None and len(distances) == len(indices):  # of the first seed
                self._show(indices, sr, log_images)

        frame = evaluate(
            self.model, self.samples, self.judges, self.seeds, self.batch_size, self.num_inference_steps, "held-out",
            on_images=look,
        )  # fmt: skip
        frame["distance"] = distances
        table = stability_table(frame, {"held-out": spread}).droplevel("model")
        row = {"iteration": iteration} | table["mean"].drop("l_std").to_dict()
        row |= {f"g_std_{name}": table["std"][name] for name in ("psnr", "distance", *self.judges)}
        row["l_std"] = table["std"]["l_std"]
        return self._record(row, lambda row, best: row[self.chosen_by] < best[self.chosen_by])
