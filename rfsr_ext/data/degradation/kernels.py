"""Blur kernels of Real-ESRGAN (Wang et al. 2021, section 3.2): Gaussian, generalized, plateau and sinc."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import j1

__all__ = ["FAMILIES", "Kernel", "gaussian"]

FAMILIES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")

# NumPy's vectorized exp and power round differently on AVX2 and on AVX-512; the C library's, in `math`, do not.
_PROFILES = {
    "generalized": lambda q, beta: math.exp(-0.5 * math.pow(q, beta)),
    "plateau": lambda q, beta: 1 / (math.pow(q, beta) + 1),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel, ``size`` × ``size`` with ``size`` odd.

    With ``q = xᵀ Σ⁻¹ x``, where Σ has the axes ``sigma`` turned by ``theta``:

    - ``iso``, ``aniso``: exp(-q / 2);
    - ``generalized_iso``, ``generalized_aniso``: exp(-q^beta / 2);
    - ``plateau_iso``, ``plateau_aniso``: 1 / (q^beta + 1);
    - ``sinc``, the ideal circular low pass: cutoff · J₁(cutoff · r) / (2π r).

    Attributes:
        family: one of `FAMILIES` or ``sinc``.
        size: in pixels.
        sigma: standard deviations along both axes in pixels; equal if isotropic.
        theta: angle of the first axis in radians.
        beta: shape; 1 makes a generalized Gaussian a Gaussian.
        cutoff: of ``sinc``, in radians per pixel; π keeps every frequency of the axes.
    """

    family: str
    size: int
    sigma: tuple[float, float] = (1.0, 1.0)
    theta: float = 0.0
    beta: float = 1.0
    cutoff: float = math.pi

    def weights(self) -> np.ndarray:
        """``[size, size]`` float64, summing to 1."""
        offsets = np.arange(self.size) - self.size // 2.0
        x, y = np.meshgrid(offsets, offsets)
        if self.family == "sinc":
            r = np.sqrt(x * x + y * y)
            r[self.size // 2, self.size // 2] = 1
            weights = self.cutoff * j1(self.cutoff * r) / (2 * math.pi * r)
            weights[self.size // 2, self.size // 2] = self.cutoff**2 / (4 * math.pi)
        else:
            c, s = math.cos(self.theta), math.sin(self.theta)
            q = ((c * x + s * y) / self.sigma[0]) ** 2 + ((c * y - s * x) / self.sigma[1]) ** 2
            profile = _PROFILES["plateau" if self.family.startswith("plateau") else "generalized"]
            weights = np.reshape([profile(value, self.beta) for value in q.ravel().tolist()], q.shape)
        return weights / math.fsum(weights.ravel().tolist())


def gaussian(size: int) -> np.ndarray:
    """OpenCV's Gaussian of this odd size and the width it takes for it, ``[size, size]``."""
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    return Kernel("iso", size, (sigma, sigma)).weights()
