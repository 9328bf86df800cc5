"""Which sampling steps get which loss: the paper's timestep-aware windows (section 3.5, eq. 7)."""

from dataclasses import dataclass

from torch import Tensor

from rfsr_ext.models import Process

__all__ = ["TimestepWindows"]


@dataclass(frozen=True)
class TimestepWindows:
    """Two windows of sampling steps; st = 1 is the first denoising step (the largest timestep), ``last`` the final one.

    The structure window holds the low-frequency loss, the reward window the rewards and the style loss; a step in
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
        structure: tuple[float, float] | None = (600, 1000),
        reward: tuple[float, float] | None = (0, 200),
        allow_overlap: bool = False,
    ) -> "TimestepWindows":
        """The same windows for any sampler, from t ∈ [600, 1000] and t ∈ [0, 200] and the sampler's own timesteps.

        With 50 steps this gives the paper's 1–20 and 41–50.  With PASD's 20 it gives reward steps 17–20 where the paper
        names 18–20: step 17 is t = 151, so its two statements differ there; ``from_steps(8, 17, 20)`` is its wording.

        Args:
            timesteps: those of a `rfsr_ext.models.Process` or of a scheduler, in sampling order.
            structure, reward: inclusive ranges of timesteps, in 0 … 1000.
            allow_overlap: see the class.

        Raises:
            ValueError: if a range holds none of the timesteps, or the windows overlap.
        """
        return cls._from_values([float(t) for t in timesteps], "timesteps", structure, reward, allow_overlap)

    @classmethod
    def from_process(
        cls,
        process: Process,
        structure: tuple[float, float] | None,
        reward: tuple[float, float] | None,
        unit: str = "steps",
        allow_overlap: bool = False,
    ) -> "TimestepWindows":
        """The windows of a trajectory, from inclusive ranges in one of three units.

        Args:
            process: of the model that will be sampled; its timesteps are the sampling steps.
            structure, reward: ``(first, last)`` steps, or ``(low, high)`` of timesteps or noise; None for no window.
            unit: "steps", "timesteps" (0 … 1000), or "noise": the share σ² / (α² + σ²) of noise in z_t, from 0 to 1,
                which means the same for models with other schedules (t = 600 of Stable Diffusion is 0.84, t = 200 is
                0.25; FLUX reaches these shares at other timesteps).
            allow_overlap: see the class.

        Raises:
            ValueError: if the unit is not known, a range holds no step, or the windows overlap.
        """
        if unit == "steps":
            return cls(structure, reward, len(process), allow_overlap)
        values = {"timesteps": lambda: process.timesteps, "noise": lambda: process.noise_share(process.timesteps)}
        if unit not in values:
            raise ValueError(f"unit must be steps, timesteps or noise, got {unit!r}")
        return cls._from_values(values[unit]().tolist(), unit, structure, reward, allow_overlap)

    @classmethod
    def _from_values(
        cls,
        values: list[float],
        unit: str,
        structure: tuple[float, float] | None,
        reward: tuple[float, float] | None,
        allow_overlap: bool,
    ) -> "TimestepWindows":
        def steps(name: str, interval: tuple[float, float] | None) -> tuple[int, int] | None:
            if interval is None:
                return None
            inside = [st for st, value in enumerate(values, start=1) if interval[0] <= value <= interval[1]]
            if not inside:
                raise ValueError(
                    f"{name} window in {unit} must contain one of the sampler's {len(values)}, "
                    f"{values[0]:g} … {values[-1]:g}, got {list(interval)}"
                )
            return inside[0], inside[-1]

        return cls(steps("structure", structure), steps("reward", reward), len(values), allow_overlap)

    def in_structure(self, step: int) -> bool:
        """Whether the low-frequency loss applies at sampling step ``step``."""
        return self.structure is not None and self.structure[0] <= step <= self.structure[1]

    def in_reward(self, step: int) -> bool:
        """Whether the rewards apply at sampling step ``step``."""
        return self.reward is not None and self.reward[0] <= step <= self.reward[1]

    def steps(self) -> list[int]:
        """All sampling steps that get a loss, in order: the ones training draws from, each equally likely."""
        return [step for step in range(1, self.last + 1) if self.in_structure(step) or self.in_reward(step)]
