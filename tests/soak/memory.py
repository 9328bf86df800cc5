"""A long run of a tiny model, whose memory must not grow beyond the history that it keeps on purpose."""

import gc
import os
import sys
import tempfile
from pathlib import Path

from rfsr_ext.rewards import WeightedReward
from rfsr_ext.training import RFSRConfig, RFSRTrainer
from tests.training.conftest import Brightness, Pixels, TinyData

EVERY = 100  # iterations between two looks at the memory
WARM = 0.2  # of the run, in which caches fill
MORE = 16  # MiB that it may grow by after that


def size_of(history: list[dict]) -> int:
    """Bytes of the rows, each with values of its own and keys that all share."""
    return sum(sys.getsizeof(row) + sum(map(sys.getsizeof, row.values())) for row in history)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(folder: str, iterations: int) -> list[float]:
    """Train in ``folder``, going on from what is there; MiB without the history, every so many iterations.

    Raises:
        AssertionError: if they grow.
    """
    data, found = TinyData(), []
    values = {
        "crop_size": 32, "structure_window": [1, 2], "reward_window": [4, 5], "lambda_structure": 1.0,
        "style_loss": "kl", "learning_rate": 1e-5, "validate_every": 1000, "checkpoint_every": 1000,
        "iterations": iterations, "batch_size": 1, "output_dir": folder,
    }  # fmt: skip
    trainer = RFSRTrainer(
        RFSRConfig.from_dict(values), Pixels(), dataset=data, rewards=[WeightedReward(Brightness(), 1.0)],
        validation=[data[500]], judges={},
    )  # fmt: skip
    step = trainer.loop._train_step

    def watched(batches, iteration: int):
        if iteration % EVERY == 0:
            gc.collect()
            found.append((resident() - size_of(trainer.loop.history)) / 2**20)
        return step(batches, iteration)

    trainer.loop._train_step = watched
    trainer.train()
    settled = found[int(WARM * len(found)) :]
    assert max(settled) - settled[0] <= MORE, f"memory grew from {settled[0]:.0f} to {max(settled):.0f} MiB"
    return found


if __name__ == "__main__":
    print(run(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(), int(sys.argv[1])))
