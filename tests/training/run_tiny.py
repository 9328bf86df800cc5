"""Train the tiny model in a process of its own, to be killed or launched: FOLDER ITERATIONS BATCH_SIZE [PROCESSES]."""

import sys

from rfsr_ext.rewards import WeightedReward
from rfsr_ext.training import RFSRConfig, RFSRTrainer
from tests.training.conftest import Brightness, TinyData, make_tiny_model

folder, iterations, batch_size, *processes = sys.argv[1:]
data = TinyData()
trainer = RFSRTrainer(
    RFSRConfig.from_dict(
        {
            "crop_size": 32, "structure_window": [1, 2], "reward_window": [4, 5], "lambda_structure": 1.0,
            "style_loss": "kl", "learning_rate": 1e-3, "ema_decay": 0.5, "validate_every": 7, "checkpoint_every": 1,
            "iterations": int(iterations), "batch_size": int(batch_size), "output_dir": folder,
        }
    ),
    make_tiny_model(),
    dataset=data,
    rewards=[WeightedReward(Brightness(), 1.0)],
    validation=[data[i] for i in range(500, 502)],
    judges={"darkness": lambda images, prompts: -images.mean((1, 2, 3))},
)  # fmt: skip
assert trainer.loop.accelerator.num_processes == int(*processes or [1])
trainer.train()
