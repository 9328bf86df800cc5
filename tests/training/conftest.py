"""What trainings of a few seconds need."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rfsr_ext.files import load_tensors, save_tensors
from rfsr_ext.rewards import Reward, WeightedReward
from tests import tiny


def make_tiny_model(seed: int = 0):
    """Real networks, for tests of what becomes of them; an iteration takes a tenth of a second."""
    return tiny.tiny_model(seed, num_inference_steps=5)


class Pixels(tiny.PixelModel):
    """One convolution that can be saved, for tests of everything around it."""

    def __init__(self):
        super().__init__(num_inference_steps=5)

    def save_pretrained(self, path):
        save_tensors(path / "network.safetensors", self.networks["network"].state_dict())


class Brightness(Reward):
    """The simplest reward there is: how bright an image is."""

    name = "brightness"

    def score(self, images, prompts=None):
        return images.mean((1, 2, 3))


class TinyData(torch.utils.data.Dataset):
    """Random images, each a function of its index."""

    def __len__(self):
        return 1_000

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        gt = torch.from_numpy(rng.random((3, 32, 32), dtype=np.float32))
        lr = torch.nn.functional.avg_pool2d(gt, 4)
        return {"gt": gt, "lr": lr, "prompt": "cat" if index % 2 else ""}


class FewSamples(TinyData):
    """So many of them, and an error for any other."""

    def __init__(self, count):
        self.count = count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        return super().__getitem__(index)


def end_state(folder):
    """The tensors of a run's newest checkpoint."""
    return load_tensors(sorted((Path(folder) / "checkpoints").glob("*.safetensors"))[-1])[0]


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def tiny_model():
    return make_tiny_model()


@pytest.fixture
def parts():
    """Everything `RFSRTrainer` would otherwise build from the shipped weights."""
    data = TinyData()
    return {
        "dataset": data,
        "rewards": [WeightedReward(Brightness(), 1.0)],
        "validation": [data[i] for i in range(500, 503)],
        "judges": {"darkness": lambda images, prompts: -images.mean((1, 2, 3))},
    }


@pytest.fixture
def settings(tmp_path):
    """Keyword arguments of a configuration that trains the tiny model for a few iterations."""
    return {
        "crop_size": 32,
        "batch_size": 2,
        "structure_window": [1, 2],
        "reward_window": [4, 5],
        "lambda_structure": 1.0,
        "lambda_style": 0.1,
        "style_loss": "kl",
        "iterations": 6,
        "learning_rate": 1e-3,
        "ema_decay": 0.5,
        "validate_every": 3,
        "checkpoint_every": 2,
        "output_dir": str(tmp_path / "run"),
    }
