"""Sampling: timestep windows, rollouts without gradient, and upscaling of images of any size."""

from rfsr_ext.sampling.candidates import decode_candidates, sample_candidates
from rfsr_ext.sampling.color import adain_color_fix, wavelet_color_fix
from rfsr_ext.sampling.rollout import (
    Rollout,
    State,
    denoise,
    generators,
    inference_condition,
    rollout,
    sample,
    trajectory,
)
from rfsr_ext.sampling.tiles import Tiled, Tiles
from rfsr_ext.sampling.upscale import upscale
from rfsr_ext.sampling.windows import TimestepWindows

__all__ = [
    "Rollout",
    "State",
    "Tiled",
    "Tiles",
    "TimestepWindows",
    "adain_color_fix",
    "decode_candidates",
    "denoise",
    "generators",
    "inference_condition",
    "rollout",
    "sample",
    "sample_candidates",
    "trajectory",
    "upscale",
    "wavelet_color_fix",
]
