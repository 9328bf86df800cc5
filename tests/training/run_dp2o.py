"""Train by DP2O in a process of its own, to be killed or launched: FOLDER ITERATIONS [PROCESSES]."""

import json
import sys
from pathlib import Path

import torch

from rfsr_ext.evaluation import preferences
from rfsr_ext.sampling import candidates
from rfsr_ext.training.dp2o import DP2OConfig, DP2OTrainer
from tests.training.conftest import Pixels, TinyData
from tests.training.test_dp2o import parts

folder, iterations, *processes = sys.argv[1:]
config = DP2OConfig.from_dict(
    {
        "images": 6, "candidates": 4, "selected": 2, "full_reference": ["distance"], "no_reference": ["brightness"],
        "crop_size": 32, "batch_size": 4, "iterations": int(iterations), "learning_rate": 1e-3, "ema_decay": 0.5,
        "beta": 100.0, "validation_seeds": 2, "validate_every": 5, "checkpoint_every": 1, "rounds": 2,
        "output_dir": folder,
    }
)  # fmt: skip
counts = {"sampled": 0, "scored": 0}


def counted(module, name, what):
    function = getattr(module, name)

    def call(*arguments):
        counts[what] += 1
        return function(*arguments)

    setattr(module, name, call)


counted(candidates, "_group", "sampled")
counted(preferences, "_score", "scored")
trainer = DP2OTrainer(config, Pixels(), **parts() | {"dataset": TinyData()})
state = trainer.accelerator
assert state.num_processes == int(*processes or [1])
trainer.train()
if processes:
    assert torch.distributed.get_world_size() == int(*processes)
    share = counts | {"processes": state.num_processes}
    Path(folder, f"share-{state.process_index}.json").write_text(json.dumps(share))
