"""``rfsr mini build``: everything under ``rfsr_ext/weights``, from the bundled photographs alone."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import conv2d

from rfsr_ext.data import DistortedCrops, PhotographCrops, photographs
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
    """How long each stage trains, in iterations, and on crops of which size."""

    size: int = 64
    autoencoder: int = 2000
    denoiser: int = 3600
    iqa: int = 1200
    preference: int = 1200
    judge: int = 1000


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
        work: where the state of unfinished stages is kept.
        output: receives ``model/``, ``rewards/`` and ``judge/``, each replaced as a whole once it is complete.
        plan: lengths of the stages.
        seed: of weights, data and noise.
        device: where to train.
        bf16: run the networks under bfloat16 autocast; None does so where `bf16_pays`.

    Returns:
        Seconds per stage.
    """
    plan = plan or BuildPlan()
    bf16 = bf16_pays(device) if bf16 is None else bf16
    options = {"seed": seed, "device": device, "bf16": bf16}
    crops = PhotographCrops(photographs("train"), plan.size, seed=seed)
    others = PhotographCrops(photographs("train"), plan.size, seed=seed + 7)  # rewards learn from crops of their own
    seconds: dict[str, float] = {}

    vae, seconds["autoencoder"] = train_autoencoder(crops, work, plan.autoencoder, **options)
    model, seconds["denoiser"] = train_denoiser(vae, crops, work, plan.denoiser, **options)
    iqa, seconds["iqa"] = train_iqa(DistortedCrops(others, INPUT_FAULTS), vae, work, plan.iqa, **options)
    preference, seconds["preference"] = train_preference(
        DistortedCrops(others, INPUT_FAULTS), vae, model.tokenizer, work, plan.preference, **options
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
