"""The losses RFSR adds to a diffusion super-resolution model."""

from rfsr_ext.losses.gram import VGG19Features, VGGGramLoss
from rfsr_ext.losses.haar import HaarLLLoss

__all__ = ["HaarLLLoss", "VGG19Features", "VGGGramLoss"]
