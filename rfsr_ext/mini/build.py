"""``rfsr mini build``: everything under ``rfsr_ext/weights``, from bundled and packaged photographs."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import conv2d

from rfsr_ext.data import PACKAGED, DistortedCrops, PhotographCrops, load_photograph, photographs
from rfsr_ext.data.distortions import DISTORTIONS, INPUT_FAULTS
from rfsr_ext.files import replace_folder
from rfsr_ext.mini.base_model import train_autoencoder, train_denoiser
from rfsr_ext.mini.scores import train_iqa, train_judge, train_preference
from rfsr_ext.models import ControlNetISRModel
from rfsr_ext.weights import WEIGHTS

__all__ = ["BuildPlan", "bf16_pays", "build"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildPlan:
    """How long each stage trains, in iterations; the denoiser first on crops of 64 pixels, then on larger ones."""

    autoencoder: int = 4000
    estimator: int = 1600
    denoiser: int = 4000
    denoiser_128: int = 1500
    iqa: int = 1200
    preference: int = 600
    judge: int = 1000


# Bundled photographs that are no scenes, but a microscope's, a telescope's or an ophthalmoscope's.
_NO_SCENES = {"hubble_deep_field", "immunohistochemistry", "moon", "retina"}


def bf16_pays(device: str) -> bool:
    """Whether a convolution takes less time in bfloat16 than in float32, by measuring; some CPUs need 60 times."""

    def seconds(dtype: torch.dtype) -> float:
        x, weight = (torch.ones(shape, dtype=dtype, device=device) for shape in ((8, 32, 32, 32), (32, 32, 3, 3)))
        times = []
        for _ in range(4):  # the first prepares
            start = time.perf_counter()
            conv2d(x, weight, padding=1).sum().item()
            times.append(time.perf_counter() - start)
        return min(times)

    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    logger.info("networks run in %s: here a convolution in bfloat16 takes %.2f times as long as in float32",
                "bfloat16" if ratio < 1 else "float32", ratio)  # fmt: skip
    return ratio < 1


def build(
    packages: Path,
    work: Path,
    output: Path = WEIGHTS,
    *,
    plan: BuildPlan | None = None,
    seed: int = 0,
    device: str = "cpu",
    bf16: bool | None = None,
) -> dict[str, float]:
    """Train the mini model, both rewards and the judge; an interrupted build goes on where it stopped.

    Args:
        packages: where the packages of `rfsr_ext.data.PACKAGED` photographs are unpacked.
        work: where the state of unfinished stages is kept.
        output: receives ``model/``, ``rewards/`` and ``judge/``, each replaced as a whole once it is complete.
        plan: lengths of the stages.
        seed: of weights, data and noise.
        device: where to train.
        bf16: run the networks under bfloat16 autocast; None does so where `bf16_pays`.

    Returns:
        Seconds per stage.

    Raises:
        FileNotFoundError: if a photograph is missing; the sentence says how to get it.
    """
    for name in PACKAGED:
        load_photograph(name, packages)
    plan = plan or BuildPlan()
    bf16 = bf16_pays(device) if bf16 is None else bf16
    options = {"seed": seed, "device": device, "bf16": bf16}
    names = [name for name in photographs("train") if name not in _NO_SCENES] + photographs("train", packaged=True)

    def crops(size: int, number: int) -> PhotographCrops:
        """Crops of each stage's own; real photographs hold enough colors."""
        return PhotographCrops(names, size, seed + number, dead_leaves_share=0.05, recolor=False, folder=packages)

    seconds: dict[str, float] = {}
    vae, linear, seconds["autoencoder"] = train_autoencoder(crops(32, 0), work, plan.autoencoder, **options)
    stages = {
        "estimator": (crops(64, 3), plan.estimator, 8),
        "denoiser": (crops(64, 1), plan.denoiser, 16),
        "denoiser-128": (crops(128, 2), plan.denoiser_128, 4),
    }
    model, spent = train_denoiser(vae, linear, stages, work, **options)
    seconds |= spent
    others = crops(64, 7)
    iqa, seconds["iqa"] = train_iqa(DistortedCrops(others, INPUT_FAULTS), vae, work, plan.iqa, **options)
    preference, seconds["preference"] = train_preference(
        DistortedCrops(others, INPUT_FAULTS), vae, model.tokenizer, iqa, work, plan.preference, **options
    )
    judge, seconds["judge"] = train_judge(DistortedCrops(others, DISTORTIONS), work, plan.judge, **options)

    for module in (model.vae, model.unet, model.controlnet, model.text_encoder):
        module.to("cpu", torch.float16)
    model.save_pretrained(output / "model")
    with replace_folder(output / "rewards") as folder:
        iqa.save_pretrained(folder)
        preference.save_pretrained(folder)
    with replace_folder(output / "judge") as folder:
        judge.save_pretrained(folder)
    ControlNetISRModel.from_pretrained(output / "model")  # what was written can be read
    logger.info("wrote %s: %s", output, {name: round(s) for name, s in seconds.items()})
    return seconds
