"""Metrics by name, and presets that fix what published tables leave unsaid.

PSNR and SSIM are this package's own; every other metric is pyiqa's of the same name, with its published weights.  Which
variant, color channel, border and seed were used decides a number as much as the images do, so `Preset` fixes them and
`Preset.label` is written beside every number.
"""

import contextlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from rfsr_ext.metrics.fidelity import check_floating, psnr, ssim
from rfsr_ext.metrics.judge import Judge
from rfsr_ext.rewards.clip_iqa import CLIPIQA
from rfsr_ext.weights import registry
from rfsr_ext.weights.pyiqa import create_metric
from rfsr_ext.weights.reading import reason
from rfsr_ext.weights.registry import METRIC_FILES

__all__ = ["METRICS", "PRESETS", "Metric", "Preset", "Suite", "get_preset"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        what: its name in papers.
        reference: whether it compares with the ground truth.
        lower_better: whether less is better.
        own: whether it is this package's instead of pyiqa's.
    """

    what: str
    reference: bool = False
    lower_better: bool = False
    own: bool = False


METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR (dB)", reference=True, own=True),
    "ssim": Metric("SSIM", reference=True, own=True),
    "judge": Metric("the mini model's judge", own=True),
    # the paper's five, and their variants
    "lpips": Metric("LPIPS (AlexNet)", True, True),
    "lpips-vgg": Metric("LPIPS (VGG16)", True, True),
    "maniqa": Metric("MANIQA (KonIQ-10k)"),
    "maniqa-kadid": Metric("MANIQA (KADID-10k)"),
    "maniqa-pipal": Metric("MANIQA (PIPAL)"),
    "musiq": Metric("MUSIQ (KonIQ-10k)"),
    "musiq-ava": Metric("MUSIQ (AVA)"),
    "musiq-paq2piq": Metric("MUSIQ (PaQ-2-PiQ)"),
    "musiq-spaq": Metric("MUSIQ (SPAQ)"),
    "clipiqa": Metric("CLIP-IQA"),
    "clipiqa+": Metric("CLIP-IQA+"),
    "clipiqa+_rn50_512": Metric("CLIP-IQA+ (RN50, fine-tuned)"),
    "clipiqa+_vitL14_512": Metric("CLIP-IQA+ (ViT-L/14, fine-tuned)"),
    "laion_aes": Metric("LAION aesthetic score"),
    # held out
    "nima": Metric("NIMA (AVA)"),
    "topiq_nr": Metric("TOPIQ without reference"),
    "topiq_fr": Metric("TOPIQ with reference", True),
    "dists": Metric("DISTS", True, True),
    "niqe": Metric("NIQE", lower_better=True),
    "brisque": Metric("BRISQUE", lower_better=True),
    # no file at all
    "ms_ssim": Metric("MS-SSIM (Y)", True),
    "cw_ssim": Metric("CW-SSIM (Y)", True),
    "fsim": Metric("FSIMc", True),
    "vif": Metric("VIF", True),
    "vsi": Metric("VSI", True),
    "gmsd": Metric("GMSD (Y)", True, True),
    "nlpd": Metric("NLPD (Y)", True, True),
    "mad": Metric("MAD", True, True),
    "piqe": Metric("PIQE", lower_better=True),
    "entropy": Metric("entropy (bits)"),
}


@dataclass(frozen=True)
class Preset:
    """Which metrics, and the settings that are theirs.

    Attributes:
        name: of the preset.
        metrics: names in `METRICS`.
        channel, crop: of PSNR and SSIM alone, see `rfsr_ext.metrics.psnr`.
        seed: of metrics that draw random crops, set anew for every image.
    """

    name: str
    metrics: tuple[str, ...]
    channel: str = "rgb"
    crop: int = 0
    seed: int = 0

    def __post_init__(self):
        for metric in self.metrics:
            if metric not in METRICS:
                raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {metric!r}")

    @property
    def label(self) -> str:
        """Everything that decides a number, in one line."""
        parts = []
        if {"psnr", "ssim"} & set(self.metrics):
            parts.append(f"PSNR and SSIM on {'Y' if self.channel == 'y' else 'RGB'}, border {self.crop}")
        if not all(METRICS[name].own for name in self.metrics):
            parts.append(f"pyiqa {version('pyiqa') if importlib.util.find_spec('pyiqa') else '(not installed)'}")
        return ", ".join([f"{self.name}: seed {self.seed}", *parts])


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("basic", ("psnr", "ssim", "judge")),
        # The paper does not name its variant of MANIQA.  It reports 0.5091 for SeeSR, and SeeSR's author (issue 30 of
        # cswry/SeeSR) explains 0.5050 against 0.6198 by maniqa-pipal against maniqa.
        Preset("rfsr-paper", ("lpips", "maniqa-pipal", "musiq", "clipiqa", "laion_aes")),
        # Y and four pixels of border: the author's answer in the same issue.  FID compares sets, not images.
        Preset("seesr", ("psnr", "ssim", "lpips", "dists", "niqe", "maniqa-pipal", "musiq", "clipiqa"), "y", 4),
        # What no reward here is made of, to notice when rewards are being fooled.
        Preset("held-out", ("dists", "topiq_fr", "topiq_nr", "nima", "niqe", "brisque")),
        Preset("weightless", ("psnr", "ssim", *(k for k, m in METRICS.items() if not m.own and k not in METRIC_FILES))),
    )
}


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: if there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Every generator a metric may draw crops from, seeded inside and as before outside."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _build(name: str, device: torch.device) -> Callable[..., Tensor]:
    """pyiqa's metric of this name."""
    if name in CLIPIQA.VARIANTS:  # the same numbers; pyiqa's own loader takes learned prompts of any shape
        return CLIPIQA(name).to(device).score
    return create_metric(name, device=device)


class Suite:
    """The metrics of a preset, ready to measure; everything they need is checked before any is built.

    Args:
        preset: what to measure.
        reference: False where there is no ground truth; metrics that need it are then left out.
        device: where networks measure, wherever the images are.

    Raises:
        ValueError: if no metric remains, or a file is damaged or another one.
        ModuleNotFoundError: if pyiqa is needed and not installed.
        FileNotFoundError: if weights are missing; the sentence names all of them.
    """

    def __init__(self, preset: Preset, reference: bool = True, device: str | torch.device = "cpu"):
        self.preset, self.device = preset, torch.device(device)
        self.metrics = tuple(name for name in preset.metrics if reference or not METRICS[name].reference)
        if not self.metrics:
            raise ValueError(f"preset {preset.name!r} has only metrics that compare with a ground truth; give one")
        published = [name for name in self.metrics if not METRICS[name].own]
        if published and importlib.util.find_spec("pyiqa") is None:
            raise ModuleNotFoundError(
                f"{', '.join(published)} come from pyiqa; pip install 'rfsr_ext[metrics]', or take preset basic",
                name="pyiqa",
            )
        absent = registry.missing(dict.fromkeys(file for name in published for file in METRIC_FILES.get(name, ())))
        if absent:
            files = ", ".join(f"{name} ({registry.FILES[name].file})" for name in absent)
            raise FileNotFoundError(
                f"preset {preset.name!r} lacks the weights {files}; `rfsr weights` says where each is looked for, and "
                f"`rfsr weights fetch NAME` gets it where there is a network"
            )
        options = {"channel": preset.channel, "crop": preset.crop}
        own: dict[str, Callable[..., Tensor]] = {
            "psnr": lambda sr, gt: psnr(sr, gt, **options),
            "ssim": lambda sr, gt: ssim(sr, gt, **options),
        }
        if "judge" in self.metrics:
            own["judge"] = Judge.from_pretrained().to(self.device).score
        self._measure = {name: own.get(name) or _build(name, self.device) for name in self.metrics}

    def __call__(self, sr: Tensor, gt: Tensor | None = None) -> dict[str, Tensor]:
        """Measure ``[N, 3, H, W]`` images in [0, 1] (clamped), image by image, so that a batch changes nothing.

        Returns:
            ``[N]`` values on the CPU by metric.

        Raises:
            TypeError: if images are not floating point.
            ValueError: if ``gt`` is wanted, or a metric cannot measure the images, too small ones for instance; the
                sentence names it.
        """
        compared = [name for name in self.metrics if METRICS[name].reference]
        if gt is None and compared:
            raise ValueError(
                f"gt must be given, {', '.join(compared)} compare with it; Suite(..., reference=False) does not"
            )
        for name, images in (("sr", sr), ("gt", gt)):
            if images is not None:
                check_floating(images, name)
        values: dict[str, list[float]] = {name: [] for name in self.metrics}
        with torch.no_grad():
            for i in range(len(sr)):
                for name in self.metrics:
                    both = (sr, gt) if gt is not None and METRICS[name].reference else (sr,)
                    images = (x[i : i + 1].detach().to(self.device).float().clamp(0, 1) for x in both)
                    try:
                        with _seeded(self.preset.seed):
                            values[name].append(float(self._measure[name](*images).reshape(())))
                    except (RuntimeError, AssertionError, IndexError, ValueError) as error:
                        raise ValueError(f"{name}: {reason(error)}") from error
        return {name: torch.tensor(column) for name, column in values.items()}
