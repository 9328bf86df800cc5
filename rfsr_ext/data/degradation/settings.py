"""The parameters of a degradation: presets, YAML, checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rfsr_ext.data.degradation import pipeline
from rfsr_ext.data.degradation.checks import (
    interval,
    known,
    merged,
    plain,
    probabilities,
    probability,
    set_field,
    whole_number,
)
from rfsr_ext.data.degradation.choices import Choices, draw
from rfsr_ext.data.degradation.kernels import FAMILIES
from rfsr_ext.presets import read_settings

__all__ = ["DEGRADATIONS", "Degradation", "Round"]

DEGRADATIONS = ("mini", "realesrgan-a", "realesrgan-b", "realesrgan-c")

_STREAM = 2  # of a sample's random numbers; what else is drawn for it, its crop say, takes others


@dataclass(frozen=True)
class Round:
    """Blur, resize, noise and JPEG of one round; every range is drawn from uniformly.

    Attributes:
        blur_prob: probability that the image is blurred.
        kernel_prob: probabilities of the kernel families: iso, aniso, generalized_iso, generalized_aniso, plateau_iso,
            plateau_aniso.
        sinc_prob: probability that the kernel is a sinc filter instead.
        blur_sigma: standard deviation of a kernel along each axis, in pixels.
        betag_range: shape of generalized Gaussians, drawn below 1 and above 1 with the same probability.
        betap_range: shape of plateau kernels, drawn likewise.
        resize_prob: probabilities of enlarging, reducing and keeping the size.
        resize_range: factor of the size, drawn from [1, high] or [low, 1].
        gaussian_noise_prob: probability of Gaussian noise; otherwise the noise is Poisson's.
        noise_range: standard deviation of Gaussian noise, in gray levels of 255.
        poisson_scale_range: factor of Poisson noise.
        gray_noise_prob: probability of one noise for all channels.
        jpeg_range: libjpeg quality, whole numbers, both ends included; the public code draws real numbers.
        jpeg_subsampling: of its colors, "4:2:0" (half as wide and high) or, with one round only, "4:4:4".
    """

    blur_prob: float = 1.0
    kernel_prob: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    sinc_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.2, 1.2)
    betag_range: tuple[float, float] = (1.0, 1.0)
    betap_range: tuple[float, float] = (1.0, 1.0)
    resize_prob: tuple[float, float, float] = (0.0, 0.0, 1.0)
    resize_range: tuple[float, float] = (1.0, 1.0)
    gaussian_noise_prob: float = 1.0
    noise_range: tuple[float, float] = (0.0, 1.5)
    poisson_scale_range: tuple[float, float] = (0.0, 0.0)
    gray_noise_prob: float = 0.0
    jpeg_range: tuple[int, int] = (88, 98)
    jpeg_subsampling: str = "4:2:0"

    def __post_init__(self) -> None:
        for name in ("blur_prob", "sinc_prob", "gaussian_noise_prob", "gray_noise_prob"):
            set_field(self, name, probability(name, getattr(self, name)))
        set_field(self, "kernel_prob", probabilities("kernel_prob", self.kernel_prob, len(FAMILIES)))
        set_field(self, "resize_prob", probabilities("resize_prob", self.resize_prob, 3))
        set_field(self, "blur_sigma", interval("blur_sigma", self.blur_sigma, 0.01, 100))
        for name, low, high in (("betag_range", 0.01, 100), ("betap_range", 0.01, 100), ("resize_range", 0.01, 16)):
            set_field(self, name, interval(name, getattr(self, name), low, high, around=1))
        set_field(self, "noise_range", interval("noise_range", self.noise_range, 0, 255))
        set_field(self, "poisson_scale_range", interval("poisson_scale_range", self.poisson_scale_range, 0, 255))
        set_field(self, "jpeg_range", interval("jpeg_range", self.jpeg_range, 1, 100, whole=True))
        if self.jpeg_subsampling not in ("4:2:0", "4:4:4"):
            raise ValueError(f"jpeg_subsampling must be 4:2:0 or 4:4:4, got {self.jpeg_subsampling!r}")


# What a degradation of one round leaves out.
_ONE_ROUND = {name: getattr(Round(), name) for name in Round.__dataclass_fields__} | {
    name: None for name in ("blur_sigma", "noise_range", "jpeg_range", "jpeg_subsampling")
}


@dataclass(frozen=True)
class Degradation:
    """A random degradation of images, the same for a sample wherever and with whichever others it is made.

    With two rounds it is that of Real-ESRGAN (Wang et al. 2021, section 3): blur, resize to a random size, noise and
    JPEG; the same once more with the final size as the measure; and, before the second JPEG or after it, resizing to
    the final size and a sinc filter.  Where the public code draws the resize factor, the resize mode and the kind of
    noise once per batch, here every sample draws its own, so that no pool of pairs is needed to mix them.

    With one round, ``second: null``, it is a small relative for images of 64 to 128 pixels, with Gaussian blur, an
    antialiased resize to the final size, Gaussian noise and JPEG, which may leave colors their size.  It is what the
    small weights were made with.

    Attributes:
        scale: how many times smaller the result is.
        sharpens_gt: the ground truth is sharpened by an unsharp mask, and degraded after that.
        kernel_size: smallest and largest side of blur kernels and sinc filters; odd, as all sizes between them.
        first: the first round.
        second: the second one; None for none.
        final_sinc_prob: probability of a sinc filter at the end.

    Raises:
        ValueError: for the first value that is no use, in one sentence.
    """

    scale: int = 4
    sharpens_gt: bool = False
    kernel_size: tuple[int, int] = (7, 21)
    first: Round = Round(jpeg_subsampling="4:4:4")
    second: Round | None = None
    final_sinc_prob: float = 0.0

    def __post_init__(self) -> None:
        set_field(self, "scale", whole_number("scale", self.scale, 1, 64))
        if not isinstance(self.sharpens_gt, bool):
            raise ValueError(f"sharpens_gt must be true or false, got {self.sharpens_gt!r}")
        set_field(self, "kernel_size", interval("kernel_size", self.kernel_size, 1, 255, whole=True))
        if not all(side % 2 for side in self.kernel_size):
            raise ValueError(f"kernel_size must be two odd numbers, got {list(self.kernel_size)}")
        set_field(self, "final_sinc_prob", probability("final_sinc_prob", self.final_sinc_prob))
        if not isinstance(self.first, Round) or not isinstance(self.second, Round | None):
            raise ValueError("first must be a Round and second a Round or None; from_dict makes them from mappings")
        if self.second is None:
            used = [name for name, value in _ONE_ROUND.items() if value not in (None, getattr(self.first, name))]
            if used or self.final_sinc_prob:
                name = f"first.{used[0]}" if used else "final_sinc_prob"
                raise ValueError(
                    f"{name} must be left out without a second round, which blurs with isotropic Gaussians, adds "
                    "Gaussian noise and resizes once; give second, or start from the preset realesrgan-a"
                )
            return
        for name in ("first", "second"):
            if getattr(self, name).jpeg_subsampling != "4:2:0":
                raise ValueError(f"{name}.jpeg_subsampling must be 4:2:0 with a second round, got 4:4:4")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A published set of parameters, with ``changes``: ``preset("realesrgan-a", first={"jpeg_range": (30, 95)})``.

        - ``realesrgan-a``: PASD's, SeeSR's and RFSR's online degradation;
        - ``realesrgan-b``: SeeSR's offline set and DiffBIR v2.1, harsher, with sharpened ground truth;
        - ``realesrgan-c``: CCSR's, with milder blur;
        - ``mini``: that of the small weights, one mild round.

        Raises:
            ValueError: if there is no such preset, or a change is no use.
        """
        if name not in DEGRADATIONS:
            raise ValueError(f"degradation must be one of the presets {', '.join(DEGRADATIONS)}, got {name!r}")
        return cls.load(name, **changes)

    @classmethod
    def load(cls, source: str | Path, **changes: Any) -> Self:
        """A preset by name or a YAML file of the fields, with ``changes``.

        Raises:
            FileNotFoundError: if it is neither.
            ValueError: if the file is no YAML mapping, or a key or value is no use.
        """
        values, name = read_settings(source, DEGRADATIONS, "degradation", "degradation")
        if not isinstance(values, Mapping):
            raise ValueError(f"{name} must hold 'key: value' lines, got a {type(values).__name__}")
        return cls.from_dict(merged(values, changes), name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "degradation") -> Self:
        """From plain values, as they stand in YAML; ``source`` begins the sentence of an error.

        Raises:
            ValueError: for the first key or value that is no use.
        """
        try:
            arguments = known("", cls, values)
            for name in ("first", "second"):
                if name in arguments:
                    arguments[name] = _round(name, arguments[name])
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they may stand in YAML or JSON."""
        return plain(asdict(self))

    def draw(self, rng: np.random.Generator) -> Choices:
        """What a degradation of two rounds chooses for one image."""
        return draw(self, rng)

    @staticmethod
    def generator(seed: tuple[int, int]) -> np.random.Generator:
        """Of a sample's choices and noise, by the seed of the run and the sample's index."""
        return np.random.default_rng((*seed, _STREAM))

    def __call__(self, gt: Tensor, seeds: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Degrade a batch; what happens to a sample depends on it and on its own seed alone.

        Args:
            gt: ``[N, 3, H, W]`` in [0, 1], on the CPU or a GPU, H and W multiples of ``scale``.
            seeds: for each sample the seed of the run and the sample's index.

        Returns:
            The low-resolution images ``[N, 3, H/scale, W/scale]``, 8 bits deep, and the ground truth, sharpened if the
            degradation says so; both float32 in [0, 1] and where ``gt`` is.

        On the CPU a sample comes out the same to the bit whatever the batch, the number of threads and the process, on
        every x86-64 processor with the same versions of NumPy, SciPy and Pillow.  A GPU makes the same choices,
        draws the same random numbers and rounds its JPEGs alike; its blurs and resizes differ in the last bits, which
        rounding to 8 bits can turn into a level.

        Raises:
            ValueError: for images of another shape or type, or another number of seeds.
        """
        self._check(gt, seeds)
        return pipeline.degrade_batch(self, gt, [self.generator(seed) for seed in seeds])

    def degrade(self, gt: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The same for one image as an array, with the numbers this generator gives next.

        Args:
            gt: ``[H, W, 3]`` float32 in [0, 1], H and W multiples of ``scale``.
            rng: drawn from.

        Returns:
            ``[H/scale, W/scale, 3]``, 8 bits deep, and the ground truth ``[H, W, 3]``.

        Raises:
            ValueError: for an array of another shape or type.
        """
        if gt.ndim != 3 or gt.shape[2] != 3 or gt.dtype != np.float32:
            raise ValueError(f"gt must be float32 [H, W, 3], got {gt.dtype} {list(gt.shape)}")
        self._check_sides(gt.shape[:2])
        return pipeline.degrade_image(self, gt, rng)

    def _check_sides(self, sides: Sequence[int]) -> None:
        if 0 in sides or any(side % self.scale for side in sides):
            raise ValueError(f"gt must have sides that are multiples of scale {self.scale}, got {list(sides)}")

    def _check(self, gt: Tensor, seeds: Sequence[tuple[int, int]]) -> None:
        if gt.ndim != 4 or gt.shape[1] != 3 or gt.dtype != torch.float32:
            raise ValueError(f"gt must be float32 [N, 3, H, W], got {gt.dtype} {list(gt.shape)}")
        self._check_sides(gt.shape[2:])
        if len(seeds) != len(gt):
            raise ValueError(f"seeds must hold a (seed, index) for each of the {len(gt)} samples, got {len(seeds)}")


def _round(name: str, values: Any) -> Round | None:
    if values is None and name == "second":
        return None
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a mapping of a round's parameters, got {values!r}")
    values = known(f"{name}.", Round, values)
    try:
        return Round(**values)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None
