"""Which sampling steps get which loss: the paper's timestep-aware windows (section 3.5, eq. 7)."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["TimestepWindows"]


@dataclass(frozen=True)
class TimestepWindows:
    """Two windows of sampling steps; st = 1 is the first denoising step (the largest timestep), ``last`` the final one.

    The structure window holds the low-frequency loss, the reward window the rewards and their regulariser; a step in
    neither gets no loss.  Windows are inclusive ``(first, last)`` pairs or None for an empty one.

    Paper settings: ``from_steps(20, 40, 50)`` for SeeSR and DiffBIR, ``from_steps(8, 17, 20)`` for PASD.

    Raises:
        ValueError: if a window is reversed, leaves 1 … ``last``, or both are empty; or if they overlap although
            ``allow_overlap`` is False (Table 2 of the paper has one variant in which both cover every step).
    """

    structure: tuple[int, int] | None
    reward: tuple[int, int] | None
    last: int
    allow_overlap: bool = False

    def __post_init__(self):
        for name, window in (("structure", self.structure), ("reward", self.reward)):
            if window is not None and not 1 <= window[0] <= window[1] <= self.last:
                raise ValueError(
                    f"{name} window must lie within the sampling steps 1 to {self.last}, in order, got {list(window)}"
                )
        if self.structure is None and self.reward is None:
            raise ValueError("windows must hold at least one sampling step, got two empty windows")
        if self.structure and self.reward and self.structure[1] >= self.reward[0] and not self.allow_overlap:
            raise ValueError(
                f"structure window must end before the reward window begins, got {list(self.structure)} and "
                f"{list(self.reward)}; set allow_overlap to give steps both losses"
            )

    @classmethod
    def from_steps(cls, structure_last: int, reward_after: int, last: int) -> "TimestepWindows":
        """The paper's notation: st ∈ [1, st₁] and st ∈ [st₂ + 1, st_last]; 0 or ``last`` make a window empty."""
        structure = (1, structure_last) if structure_last else None
        reward = (reward_after + 1, last) if reward_after < last else None
        return cls(structure, reward, last)

    @classmethod
    def from_timesteps(
        cls,
        timesteps: Tensor | list[int],
        structure: tuple[int, int] | None = (600, 1000),
        reward: tuple[int, int] | None = (0, 200),
    ) -> "TimestepWindows":
        """The same windows for any sampler, from t ∈ [600, 1000] and t ∈ [0, 200] and the sampler's own timesteps.

        With 50 steps this gives the paper's 1–20 and 41–50.  With PASD's 20 it gives reward steps 17–20 where the paper
        names 18–20: step 17 is t = 151, so its two statements differ there; ``from_steps(8, 17, 20)`` is its wording.

        Args:
            timesteps: ``scheduler.timesteps``, largest first.
            structure, reward: inclusive ranges of timesteps, in 0 … 1000.
        """
        values = [float(t) for t in timesteps]

        def steps(name: str, interval: tuple[int, int] | None) -> tuple[int, int] | None:
            if interval is None:
                return None
            inside = [st for st, t in enumerate(values, start=1) if interval[0] <= t <= interval[1]]
            if not inside:
                raise ValueError(
                    f"{name} window of timesteps must contain one of the sampler's {len(values)} timesteps "
                    f"{values[0]:g} … {values[-1]:g}, got {list(interval)}"
                )
            return inside[0], inside[-1]

        return cls(steps("structure", structure), steps("reward", reward), len(values))

    def in_structure(self, step: int) -> bool:
        """Whether the low-frequency loss applies at sampling step ``step``."""
        return self.structure is not None and self.structure[0] <= step <= self.structure[1]

    def in_reward(self, step: int) -> bool:
        """Whether the rewards apply at sampling step ``step``."""
        return self.reward is not None and self.reward[0] <= step <= self.reward[1]

    def steps(self) -> list[int]:
        """All sampling steps that get a loss, in order: the ones training draws from, each equally likely."""
        return [step for step in range(1, self.last + 1) if self.in_structure(step) or self.in_reward(step)]
