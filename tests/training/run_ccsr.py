"""A stage of CCSR on the tiny model, and the same in a process of its own: STAGE FOLDER ITERATIONS [PROCESSES]."""

import sys
from pathlib import Path

import torch

from rfsr_ext.training.ccsr import CCSRStage1Config, CCSRStage2Config, CCSRStageTrainer
from tests.tiny import tiny_model
from tests.training.conftest import TinyData

SHARED = {
    "crop_size": 32, "batch_size": 2, "learning_rate": 1e-5, "ema_decay": 0.5, "validate_every": 100,
    "checkpoint_every": 1,
}  # fmt: skip
METHODS = {
    "stage1": {"kind": CCSRStage1Config, "config": {"variant": "v1"}},
    "stage2": {
        "kind": CCSRStage2Config,
        "config": {
            "reconstruction_loss": "l1", "perceptual_loss": "vgg-random", "discriminator_norm": "group",
            "discriminator_channels": 4,
            "lambda_adversarial": 0.5, "adaptive_weight": True, "adversarial_start": 1,
        },
    },
}  # fmt: skip


def make(stage, folder, **changes):
    """Its trainer, with held-out measurements only at the beginning and the end."""
    data, method = TinyData(), METHODS[stage]
    values = SHARED | {"validation_distance": "vgg-random"} | method["config"] | {"output_dir": str(folder)} | changes
    return CCSRStageTrainer(
        method["kind"](**values),
        tiny_model(0, 6, spacing="ccsr-v2", t_min=0.5),
        dataset=data,
        validation=[data[i] for i in range(500, 502)],
        judges={"darkness": lambda images, prompts: -images.mean((1, 2, 3))},
    )


def run(stage, folder, iterations):
    return make(stage, folder, iterations=iterations).loop.train()


def main(stage, folder, iterations, processes=1):
    trainer = make(stage, folder, iterations=int(iterations))
    assert trainer.loop.accelerator.num_processes == int(processes)
    trainer.train()
    if int(processes) > 1:
        assert torch.distributed.is_initialized() and torch.distributed.get_world_size() == int(processes)
        Path(folder, f"ended-{torch.distributed.get_rank()}").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
