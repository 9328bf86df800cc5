"""Diffusion models of a few thousand parameters for tests: random weights, real diffusers classes."""

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from rfsr_ext.data import PHOTOGRAPHS
from rfsr_ext.mini import architecture
from rfsr_ext.models import ControlNetISRModel, ISRModel, Recipe
from tests.once import built_once


def sd_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule and timesteps, predicting velocity."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def tiny_tokenizer() -> CLIPTokenizer:
    """Of the bundled photographs' tags."""
    return architecture.tokenizer(PHOTOGRAPHS)


@built_once
def _networks(seed: int) -> dict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        text_encoder = architecture.text_encoder(tokenizer)
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
                nn.init.normal_(parameter, std=0.1)
    return {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "controlnet": controlnet}


def tiny_parts(seed: int = 0, scheduler=None, **scheduler_options) -> dict:
    """The parts of a Stable-Diffusion-like model: 4 latent channels, 2 pixels per latent, text in both networks."""
    scheduler = sd_scheduler() if scheduler is None else scheduler
    if scheduler_options:
        scheduler = type(scheduler).from_config(scheduler.config, **scheduler_options)
    return _networks(seed) | {"scheduler": scheduler}


def tiny_model(
    seed: int = 0, num_inference_steps: int = 10, scheduler=None, scale: int = 4, trained=None, **recipe
) -> ControlNetISRModel:
    """A `ControlNetISRModel` of `tiny_parts`."""
    parts = tiny_parts(seed, scheduler)
    recipe = Recipe(num_inference_steps=num_inference_steps, **recipe)
    return ControlNetISRModel(**parts, scale=scale, recipe=recipe, trained=trained)


class PixelModel(ISRModel):
    """The smallest `ISRModel`: latents are pixels, and one convolution predicts the image itself from z_t and LR."""

    scale, multiple, latent_channels, vae_scale_factor = 4, 4, 3, 1

    def __init__(self, num_inference_steps: int = 4, start: str = "noise"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.networks = {"network": nn.Conv2d(6, 3, 3, padding=1)}
        self.trained = {"network": ""}
        self.recipe = Recipe(num_inference_steps=num_inference_steps, start=start)
        self.scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
        super().__init__()

    def first_stage(self, lr):
        return lr.repeat_interleave(4, -1).repeat_interleave(4, -2)

    def control(self, image):
        return {"lr": image}

    def predict(self, latents, timestep, condition):
        return self.networks["network"](torch.cat([latents, condition.spatial["lr"]], dim=1))

    @torch.no_grad()
    def encode(self, images):
        return images * 2 - 1

    def decode(self, latents):
        return latents / 2 + 0.5
