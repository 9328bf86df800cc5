"""A diffusion SR model so small that a training run takes seconds; random weights, real diffusers classes."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from rfsr_ext.mini import architecture
from rfsr_ext.models import ControlNetISRModel
from rfsr_ext.rewards import Reward, WeightedReward


def make_tiny_model(seed: int = 0, num_inference_steps: int = 5) -> ControlNetISRModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = architecture.tokenizer()
        text_encoder = architecture.text_encoder(tokenizer)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
        unet = UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
        for parameter in controlnet.parameters():  # the zero convolutions would hide the condition
            torch.nn.init.normal_(parameter, std=0.05) if not parameter.any() else None
    return ControlNetISRModel(
        vae,
        text_encoder,
        tokenizer,
        unet,
        controlnet,
        architecture.scheduler(),
        num_inference_steps=num_inference_steps,
    )


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
