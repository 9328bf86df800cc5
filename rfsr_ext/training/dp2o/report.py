"""What DP2O promises, measured on other photographs: the worst case up, the spread down, and nothing else down."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from rfsr_ext.data import Sample
from rfsr_ext.evaluation import best_of_figure, compare, comparison_figure, save_figure
from rfsr_ext.evaluation.best_of import add_reward, best_of_table
from rfsr_ext.evaluation.measure import Scorer
from rfsr_ext.evaluation.preferences import Measure, evaluate_measures
from rfsr_ext.files import save_table
from rfsr_ext.models import ISRModel
from rfsr_ext.rewards.ranking import HybridReward

__all__ = ["WRITTEN", "Report"]

WRITTEN = ("results.csv", "best_of.csv", "changes.csv", "best_of.png", "worst_and_best.png")
_PICTURED = 6


class Report:
    """Several results of each model for each sample, with one reward for all: `rfsr_ext.evaluation.best_of.add_reward`.

    Args:
        samples: of photographs that training has not seen.
        measures, hybrid: of the reward.
        judges: scorers that training never uses.
        seeds: of the noise.
        options: for `rfsr_ext.evaluation.evaluate`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        measures: Sequence[Measure],
        hybrid: HybridReward,
        judges: dict[str, Scorer],
        seeds: Sequence[int],
        **options,
    ):
        self.samples, self.measures, self.hybrid, self.judges = samples, list(measures), hybrid, judges
        self.seeds, self.options = list(seeds), options
        self.frames: list[pd.DataFrame] = []
        self.images: dict[str, list[Tensor]] = {}  # by model those of every seed

    def measure(self, name: str, model: ISRModel) -> None:
        """Measure a model; the first one is what others are compared with."""
        parts: list[Tensor] = []

        def keep(indices: range, sr: Tensor) -> None:
            parts.append(sr[: max(0, _PICTURED - indices.start)].cpu())

        self.frames.append(
            evaluate_measures(
                model, self.samples, self.measures, self.judges, self.seeds, keep, name=name, **self.options
            )
        )
        shown = min(_PICTURED, len(self.samples))
        self.images[name] = list(torch.cat(parts).split(shown))

    @property
    def frame(self) -> pd.DataFrame:
        """Every result of every model with its reward."""
        lower_better = [measure.name for measure in self.measures if measure.lower_better]
        return add_reward(pd.concat(self.frames, ignore_index=True), self.hybrid, lower_better)

    def changes(self) -> pd.DataFrame:
        """`rfsr_ext.evaluation.compare` of the last with the first model: images' best, mean, worst and spread."""
        frame = self.frame
        by_image = frame.groupby(["model", "image"], sort=False)
        parts = {
            "reward best": by_image["reward"].max(),
            "reward mean": by_image["reward"].mean(),
            "reward worst": by_image["reward"].min(),
            "reward spread": by_image["reward"].std(ddof=0),
        }
        names = dict.fromkeys(["psnr", *(m.name for m in self.measures), *self.judges])
        parts |= {name: by_image[name].mean() for name in names}
        parts |= {f"{name} spread": by_image[name].std(ddof=0) for name in names}
        first, *_, last = frame["model"].unique()
        table = pd.DataFrame(parts)
        means = table.groupby(level="model", sort=False).mean().T
        return compare(table.reset_index(), first, last).join(means)

    @property
    def summary(self) -> str:
        """The changes as a table of text."""
        columns = ["base", "tuned", "difference", "standard_error", "low", "high"]
        shown = self.changes()[columns].round(4).to_string()
        return f"{len(self.samples)} held-out crops, {len(self.seeds)} results each:\n{shown}\n"

    def write(self, folder: Path) -> None:
        """The files `WRITTEN`."""
        frame = self.frame
        names = [*(measure.name for measure in self.measures), *self.judges]
        lower_better = {measure.name for measure in self.measures if measure.lower_better}
        curves = best_of_table(frame, ("reward", *names), lower_better)
        tables = {"results": frame, "best_of": curves, "changes": self.changes().reset_index()}
        for name, table in tables.items():
            save_table(folder / f"{name}.csv", table)
        figures = {"best_of": best_of_figure(curves), "worst_and_best": self._pictures(frame)}
        for name, figure in figures.items():
            save_figure(figure, folder / f"{name}.png")

    def _pictures(self, frame: pd.DataFrame):
        """One row per photograph: LR image, worst and best of each model, ground truth."""
        columns = [("worst", "idxmin"), ("best", "idxmax")]
        rewards = frame.pivot(index="image", columns=["model", "seed"], values="reward")
        rows = []
        for i, sample in enumerate(self.samples[:_PICTURED]):
            row = [(sample["lr"], "")]
            for _, extreme in columns:
                for model, images in self.images.items():
                    of = rewards.loc[i, model]
                    seed = getattr(of, extreme)()
                    row.append((images[self.seeds.index(seed)][i], f"reward {of[seed]:.2f} (mean {of.mean():.2f})"))
            rows.append([*row, (sample["gt"], "")])
        titles = [f"{model}: {kind} of {len(self.seeds)}" for kind, _ in columns for model in self.images]
        return comparison_figure(rows, ["low resolution", *titles, "ground truth"])
