"""Train the tiny model, here or in a process of its own that can be killed: FOLDER ITERATIONS BATCH_SIZE."""

import sys

from rfsr_ext.rewards import WeightedReward
from rfsr_ext.training import RFSRConfig, RFSRTrainer
from tests.training.conftest import Brightness, TinyData, make_tiny_model


def make_trainer(folder, iterations, batch_size, **changes):
    data = TinyData()
    settings = {
        "crop_size": 32, "structure_window": [1, 2], "reward_window": [4, 5], "lambda_structure": 1.0,
        "style_loss": "kl", "learning_rate": 1e-3, "ema_decay": 0.5, "validate_every": 7, "checkpoint_every": 1,
        "iterations": int(iterations), "batch_size": int(batch_size), "output_dir": str(folder),
    }  # fmt: skip
    return RFSRTrainer(
        RFSRConfig.from_dict(settings | changes),
        make_tiny_model(),
        dataset=data,
        rewards=[WeightedReward(Brightness(), 1.0, normalize=True)],
        validation=[data[i] for i in range(500, 502)],
        judges={"darkness": lambda images, prompts: -images.mean((1, 2, 3))},
    )


if __name__ == "__main__":
    make_trainer(*sys.argv[1:]).train()
