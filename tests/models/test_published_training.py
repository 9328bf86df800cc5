"""Every published model, at reduced width, goes all the way of RFSR: rollout, both windows, kill, resume, upscaling."""

import math
import multiprocessing
import signal
import time

import pandas as pd
import pytest
import torch

from rfsr_ext.models import load_model
from rfsr_ext.rewards import Reward, WeightedReward
from rfsr_ext.sampling import upscale
from rfsr_ext.training import RFSRConfig, RFSRTrainer
from tests.models.released.reduced import REDUCED

pytestmark = pytest.mark.slow

STEPS, ITERATIONS = 3, 6


class Contrast(Reward):
    """A reward without weights: the standard deviation of the picture."""

    name = "contrast"

    def score(self, images, prompts):
        return images.float().std(dim=(1, 2, 3))


class Noise(torch.utils.data.Dataset):
    """Random pictures and what is left of them."""

    def __init__(self, scale: int, side: int):
        self.scale, self.side = scale, side

    def __len__(self):
        return 100

    def __getitem__(self, index):
        gt = torch.rand(3, self.side, self.side, generator=torch.Generator().manual_seed(index))
        return {"gt": gt, "lr": torch.nn.functional.avg_pool2d(gt, self.scale), "prompt": "cat"}


def train(name: str, folder: str, side: int) -> None:
    """Fine-tune a reduced model; in a process of its own, which may be killed."""
    torch.set_num_threads(1)
    model = REDUCED[name]()
    data = Noise(model.scale, side)
    evaluations = len(model.process(STEPS))
    config = RFSRConfig.from_dict(
        {
            "crop_size": side, "num_inference_steps": STEPS, "structure_window": [1, 1], "ema_decay": 0.5,
            "reward_window": [evaluations, evaluations], "allow_overlap": True, "lambda_structure": 1.0,
            "style_loss": "kl", "learning_rate": 1e-3, "validate_every": 100, "checkpoint_every": 1,
            "iterations": ITERATIONS, "batch_size": 2, "output_dir": folder,
        }
    )  # fmt: skip
    rewards = [WeightedReward(Contrast(), 1.0)]
    RFSRTrainer(config, model, dataset=data, rewards=rewards, validation=[data[50]], judges={}).train()


@pytest.fixture(scope="module")
def processes():
    """Start processes that have everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rfsr_ext.training", "tests.models.released.reduced", "rfsr_ext.sampling"])
    return context


@pytest.mark.parametrize("name", REDUCED)
def test_rfsr_from_rollout_to_upscaling(name, processes, tmp_path):
    model = REDUCED[name]()
    side, folder = math.ceil(32 / model.multiple) * model.multiple, tmp_path / "run"  # what held-out SSIM needs
    first = processes.Process(target=train, args=(name, str(folder), side))
    first.start()
    while first.is_alive() and len(list((folder / "checkpoints").glob("*.safetensors"))) < 1:
        time.sleep(0.01)
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL and not (folder / "model").exists()
    second = processes.Process(target=train, args=(name, str(folder), side))
    second.start()
    second.join()
    assert second.exitcode == 0

    history = pd.read_csv(folder / "history.csv")
    assert history["iteration"].tolist() == list(range(1, ITERATIONS + 1))
    assert history["structure"].notna().any() and history["reward/contrast"].notna().any()
    tuned = load_model(folder / "model")
    assert type(tuned) is type(model) and tuned.recipe == model.recipe and tuned.trained == model.trained
    before = {n: p for n, p in model.trained_parameters().items()}
    changed = {n.partition(".")[0] for n, p in tuned.trained_parameters().items() if not torch.equal(p, before[n])}
    assert changed == set(model.trained)
    image = torch.rand(3, 37, 53, generator=torch.Generator().manual_seed(1))
    result = upscale(tuned, image, "cat", tile=2 * side, num_inference_steps=STEPS, progress=False)
    assert result.shape == (3, 37 * model.scale, 53 * model.scale) and result.isfinite().all()
    assert result.std() > 0
