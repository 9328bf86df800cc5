"""CCSR at a reduced width, for the tests of all models."""

import dataclasses
import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import nn

from rfsr_ext.models.ccsr import CCSRv1Model, CCSRv2Model
from rfsr_ext.networks.controlnet import LatentControlNetModel
from tests.models.released.ccsr import layout
from tests.once import built_once
from tests.tiny import tiny_parts


@built_once
def tiny_ccsr_v1(**options) -> CCSRv1Model:
    """The parts of the tiny model under a ControlNet over latents; that of the fixtures takes larger images."""
    parts = tiny_parts(scheduler=DDPMScheduler(**layout.NOISE, clip_sample=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controlnet = LatentControlNetModel.from_config({**parts["controlnet"].config, "conditioning_channels": 4})
        for parameter in controlnet.parameters():
            if not parameter.any():  # zero convolutions, which would hide the condition
                nn.init.normal_(parameter, std=0.1)
    recipe = dataclasses.replace(CCSRv1Model.authors, min_side=0)
    return CCSRv1Model(**parts | {"controlnet": controlnet}, recipe=recipe, **options)


@built_once
def tiny_ccsr_v2(**options) -> CCSRv2Model:
    """Its fixture's model, from its authors' folders."""
    with tempfile.TemporaryDirectory() as folder:
        return CCSRv2Model.from_released(layout.write_v2(Path(folder) / "models"), min_side=0, **options)
