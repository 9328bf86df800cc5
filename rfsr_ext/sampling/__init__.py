"""Sampling: timestep windows, rollouts without gradient, and upscaling of images of any size."""

from rfsr_ext.sampling.rollout import Trajectory, generators, rollout, sample, trajectory
from rfsr_ext.sampling.upscale import upscale
from rfsr_ext.sampling.windows import TimestepWindows

__all__ = ["TimestepWindows", "Trajectory", "generators", "rollout", "sample", "trajectory", "upscale"]
