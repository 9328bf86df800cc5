"""A diffusion SR model of a few thousand parameters: random weights, real diffusers classes."""

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from rfsr_ext.mini import architecture
from rfsr_ext.models import ControlNetISRModel


@pytest.fixture(scope="session")
def make_model():
    """A function of (seed, further arguments of `ControlNetISRModel`, scheduler options) that builds one."""

    def make(seed: int = 0, options: dict | None = None, **scheduler_options) -> ControlNetISRModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = architecture.tokenizer()
            vae = AutoencoderKL(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                norm_num_groups=4,
                mid_block_add_attention=False,
                scaling_factor=0.7,
            )
            unet = UNet2DConditionModel(
                in_channels=4,
                out_channels=4,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=architecture.TEXT_WIDTH,
                attention_head_dim=4,
                norm_num_groups=4,
            )
            controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
            for parameter in controlnet.parameters():
                if not parameter.any():  # zero convolutions, which would hide the condition
                    torch.nn.init.normal_(parameter, std=0.1)
            text_encoder = architecture.text_encoder(tokenizer)
            scheduler = type(architecture.scheduler()).from_config(architecture.scheduler().config, **scheduler_options)
        return ControlNetISRModel(vae, text_encoder, tokenizer, unet, controlnet, scheduler, **(options or {}))

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def lr():
    return torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
