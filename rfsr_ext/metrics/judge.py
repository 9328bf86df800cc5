"""The held-out judge: a quality score that no training ever sees, to notice when a reward is being fooled.

A twin of the reward with another seed would be fooled along with it, so the judge is built differently: statistics of
natural images (Haar subbands and locally normalized contrast at three scales, as in BRISQUE) and a small multilayer
perceptron on them.  It has learned what rewards invite (over-sharpening, ringing, invented texture, painterly
flattening) as faults too.  Any judge can be fooled: read it together with PSNR and SSIM.
"""

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfsr_ext.files import save_tensors
from rfsr_ext.weights import WEIGHTS
from rfsr_ext.weights.reading import load_strictly, read_tensors

__all__ = ["Judge", "natural_scene_statistics"]

_SCALES = 3
_EPS = 1e-4


def _moments(x: Tensor) -> list[Tensor]:
    """Spread, and two shape ratios that tell a Gaussian from a peaked or a heavy-tailed distribution; all ``[N]``."""
    x = x.flatten(1)
    absolute, spread = x.abs().mean(1), x.square().mean(1).sqrt()
    return [(spread + _EPS).log(), absolute / (spread + _EPS), x.pow(4).mean(1).sqrt() / (spread.square() + _EPS)]


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).mean(1) / (a.square().mean(1).sqrt() * b.square().mean(1).sqrt() + _EPS)


def natural_scene_statistics(images: Tensor) -> Tensor:
    """Statistics of ``[N, 3, H, W]`` images in [0, 1], H and W at least 32, as ``[N, features]``.

    At each of three scales: moments of the three Haar detail bands, their correlation with themselves one pixel on
    (ringing and stripes repeat), of their magnitudes with one another and with the next scale's (edges persist across
    scales, noise and invented texture do not); moments of the locally normalized luminance and of its products with
    its neighbors; chroma detail against luma detail.
    """
    r, g, b = images.float().unbind(1)
    luma = (0.299 * r + 0.587 * g + 0.114 * b)[:, None]
    chroma = torch.stack([b - luma[:, 0], r - luma[:, 0]], dim=1)
    features: list[Tensor] = []
    coarser: Tensor | None = None
    levels = []
    for _ in range(_SCALES):
        levels.append((luma, chroma))
        luma, chroma = F.avg_pool2d(luma, 2), F.avg_pool2d(chroma, 2)
    for luma, chroma in reversed(levels):
        a, b_, c, d = (
            luma[:, 0, i::2, j::2][:, : luma.shape[2] // 2, : luma.shape[3] // 2] for i in (0, 1) for j in (0, 1)
        )
        bands = [(a - b_ + c - d) / 2, (a + b_ - c - d) / 2, (a - b_ - c + d) / 2]
        for band in bands:
            features += _moments(band)
        for band in bands[:2]:
            for lag in (1, 2):
                features += [
                    _correlation(band[:, lag:], band[:, :-lag]),
                    _correlation(band[..., lag:], band[..., :-lag]),
                ]
        magnitude = bands[0].abs() + bands[1].abs() + bands[2].abs()
        features += [_correlation(bands[0].abs(), bands[1].abs()), _correlation(bands[0].abs(), bands[2].abs())]
        if coarser is not None:
            up = F.interpolate(coarser[:, None], size=magnitude.shape[-2:], mode="nearest")[:, 0]
            features += [
                _correlation(magnitude, up),
                (magnitude.mean((1, 2)) + _EPS).log() - (up.mean((1, 2)) + _EPS).log(),
            ]
        coarser = magnitude
        mean = F.avg_pool2d(F.pad(luma, (3, 3, 3, 3), mode="reflect"), 7, 1)
        variance = F.avg_pool2d(F.pad(luma.square(), (3, 3, 3, 3), mode="reflect"), 7, 1) - mean.square()
        normalized = ((luma - mean) / (variance.clamp_min(0).sqrt() + 0.01))[:, 0]
        features += _moments(normalized)
        for product in (
            normalized[:, 1:] * normalized[:, :-1],
            normalized[..., 1:] * normalized[..., :-1],
            normalized[:, 1:, 1:] * normalized[:, :-1, :-1],
        ):
            features += [product.mean((1, 2)), product.abs().mean((1, 2))]
        steps = chroma.diff(dim=-1).abs().mean((1, 2, 3)) + chroma.diff(dim=-2).abs().mean((1, 2, 3))
        plain = luma.diff(dim=-1).abs().mean((1, 2, 3)) + luma.diff(dim=-2).abs().mean((1, 2, 3))
        features += [(steps + _EPS).log() - (plain + _EPS).log()]
        extreme = (luma < 0.01) | (luma > 0.99)
        features += [extreme.float().mean((1, 2, 3))]
    return torch.stack(features, dim=1)


class Judge(nn.Module):
    """Quality of images, about 0 (ruined) to 100 (untouched), from their statistics alone; no prompt, no reference."""

    name = "judge"

    def __init__(self):
        super().__init__()
        count = natural_scene_statistics(torch.zeros(1, 3, 32, 32)).shape[1]
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("std", torch.ones(count))
        self.network = nn.Sequential(
            nn.Linear(count, 96), nn.SiLU(), nn.Linear(96, 64), nn.SiLU(), nn.Linear(64, 1)
        )  # fmt: skip

    def from_statistics(self, statistics: Tensor) -> Tensor:
        """``[N, features]`` to a quality of about 0 to 1."""
        return self.network(((statistics - self.mean) / self.std).clamp(-5, 5))[:, 0]

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str] | None = None) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1] to ``[N]``.  Without gradient, on purpose: a judge must not be trained against."""
        if min(images.shape[-2:]) < 32:
            raise ValueError(f"images must be at least 32 pixels high and wide, got {list(images.shape[-2:])}")
        return 100 * self.from_statistics(natural_scene_statistics(images))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``judge.safetensors``."""
        save_tensors(Path(folder) / f"{self.name}.safetensors", self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path = WEIGHTS / "judge") -> Self:
        """Load what `save_pretrained` wrote; without a folder, the shipped weights."""
        path = Path(folder) / f"{cls.name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"judge weights {str(path)!r} do not exist; `rfsr mini build` makes them")
        judge = cls()
        load_strictly(judge, read_tensors(path, "judge weights"), path, "the judge")
        return judge.requires_grad_(False).eval()
