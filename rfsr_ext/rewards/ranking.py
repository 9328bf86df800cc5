"""From scores of several candidates for each image to weighted pairs of a better and a worse one (DP2O-SR).

Wu et al., 2025, arXiv 2510.18851: sections 4.1 (hybrid reward), 4.2 (pairs) and 4.3 (hierarchical weights).  A *group*
is the M candidates of one LR image; all tables of scores are ``[groups, M]``.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HybridReward", "Pairs", "pair_candidates"]

logger = logging.getLogger(__name__)

SCOPES = ("group", "set")


@dataclass(frozen=True)
class HybridReward:
    """One number per candidate from full-reference and no-reference metrics, in [0, 1], higher is better.

    Every metric is turned so that higher is better and brought to [0, 1] by its smallest and largest score; a metric
    that gives the same everywhere counts 1/2.  Then, with F full-reference and K no-reference metrics::

        R = 1/2 · 1/F · Σ s̄_f + 1/2 · 1/K · Σ s̄_k

    Where one kind is missing the other counts alone, which the paper warns of: full-reference metrics by themselves
    smooth, no-reference ones invent.

    Attributes:
        full_reference: names of metrics that compare with the ground truth.
        no_reference: names of metrics that do not.
        scope: smallest and largest of what: of the "group", the paper's, where R is comparable within a group alone; or
            of the whole "set", where a metric's extremes may be those of one easy and one hard image.

    Raises:
        ValueError: if there is no metric, one is named twice, or the scope is not known.
    """

    full_reference: tuple[str, ...]
    no_reference: tuple[str, ...]
    scope: str = "group"

    def __post_init__(self):
        names = (*self.full_reference, *self.no_reference)
        if not names:
            raise ValueError("full_reference and no_reference must name at least one metric, got none")
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise ValueError(f"full_reference and no_reference must name a metric once, got {twice!r} twice")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")

    def bounds(self, scores: Mapping[str, Tensor], lower_better: Collection[str] = ()) -> dict[str, tuple]:
        """Smallest and largest aligned score by metric, to measure later candidates by the scale of these.

        Raises:
            ValueError: as `__call__`.
        """
        found = {}
        for name, aligned in self._aligned(scores, lower_better).items():
            of = aligned if self.scope == "group" else aligned.reshape(1, -1)
            found[name] = of.amin(1, keepdim=True), of.amax(1, keepdim=True)
        return found

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        lower_better: Collection[str] = (),
        bounds: Mapping[str, tuple] | None = None,
    ) -> Tensor:
        """The reward of every candidate.

        Args:
            scores: by metric ``[groups, M]``; other metrics than those named may be among them.
            lower_better: metrics for which less is better.
            bounds: what `bounds` gave for other candidates of the same groups; R may then leave [0, 1].

        Returns:
            ``[groups, M]``, in double precision.

        Raises:
            ValueError: if a metric has no scores, or one of them is missing or not finite.
        """
        bounds = self.bounds(scores, lower_better) if bounds is None else bounds
        scaled = {}
        for name, aligned in self._aligned(scores, lower_better).items():
            low, high = bounds[name]
            spread = high - low
            scaled[name] = torch.where(spread > 0, (aligned - low) / spread.where(spread > 0, 1.0), 0.5)
        halves = [
            torch.stack([scaled[name] for name in names]).mean(0)
            for names in (self.full_reference, self.no_reference) if names
        ]  # fmt: skip
        return torch.stack(halves).mean(0)

    def _aligned(self, scores: Mapping[str, Tensor], lower_better: Collection[str]) -> dict[str, Tensor]:
        """Scores in double precision, higher is better."""
        found = {}
        for name in (*self.full_reference, *self.no_reference):
            if name not in scores:
                raise ValueError(f"scores must hold {name!r}, got {', '.join(scores) or 'none'}; score the candidates")
            values = scores[name].double()
            if not values.isfinite().all():
                group, candidate = (~values.isfinite()).nonzero()[0].tolist()
                raise ValueError(
                    f"scores of {name!r} must be finite, got {values[group, candidate].item():g} for candidate "
                    f"{candidate} of image {group}; leave the metric out, or score that candidate again"
                )
            found[name] = -values if name in lower_better else values
        return found


@dataclass(frozen=True)
class Pairs:
    """The best and the worst candidates of every group, and what each pair of one of either counts.

    Attributes:
        groups: ``[G]`` numbers of the groups that have pairs.
        winners, losers: ``[G, N]`` numbers of candidates, the best first and the worst first.
        gaps: ``[G, N, N]`` reward of the winner less that of the loser.
        weights: ``[G, N, N]``, what the pair counts; their mean is 1 in a group where the inter-group weight is off.
    """

    groups: Tensor
    winners: Tensor
    losers: Tensor
    gaps: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return self.weights.numel()


def pair_candidates(rewards: Tensor, selected: int, intra_group: bool = True, inter_group: bool = True) -> Pairs:
    """Top N × bottom N of M, with the weights of hierarchical preference optimization.

    For group g with rewards R::

        w_intra(i, j) = R_i − R_j + 1 − mean gap of the group's pairs
        w_inter(g)    = σ_g + 1 − mean of σ over the groups,   σ_g the deviation of all M rewards (divided by M)

    and a pair weighs w_intra · w_inter.  Of candidates with equal rewards the first counts as the better.

    Args:
        rewards: ``[groups, M]``.
        selected: N.
        intra_group, inter_group: whether each weight applies; without it, it is 1.

    Raises:
        ValueError: if M is below 2 N or in no group one candidate is better than another; groups of which this holds
            are left out, and a warning counts them.
    """
    groups, count = rewards.shape
    if not 1 <= selected <= count // 2:
        raise ValueError(
            f"selected must be from 1 to half of the {count} candidates of an image, because the best and the worst "
            f"must be others, got {selected}"
        )
    rewards = rewards.double()
    kept = (rewards.amax(1) > rewards.amin(1)).nonzero()[:, 0]
    if not len(kept):
        raise ValueError(
            f"rewards must differ within an image, but each of the {groups} images has equal rewards for all its "
            f"{count} candidates; give other metrics or another seed"
        )
    if len(kept) < groups:
        logger.warning(
            "%d of %d images are left out, because all their candidates have equal rewards", groups - len(kept), groups
        )
    rewards = rewards[kept]
    order = rewards.argsort(dim=1, descending=True, stable=True)
    winners, losers = order[:, :selected], order[:, -selected:].flip(1)
    gaps = rewards.gather(1, winners)[:, :, None] - rewards.gather(1, losers)[:, None, :]
    weights = torch.ones_like(gaps)
    if intra_group:
        weights = weights * (gaps + 1 - gaps.mean((1, 2), keepdim=True))
    if inter_group:
        spread = rewards.std(1, correction=0)
        weights = weights * (spread + 1 - spread.mean())[:, None, None]
    return Pairs(kept, winners, losers, gaps, weights)
