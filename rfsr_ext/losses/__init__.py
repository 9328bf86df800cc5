"""The losses RFSR adds to a diffusion super-resolution model, and those that fine-tune a decoder."""

from rfsr_ext.losses.adversarial import DINODiscriminator, PatchDiscriminator
from rfsr_ext.losses.gram import VGG19Features, VGGGramLoss
from rfsr_ext.losses.haar import HaarLLLoss
from rfsr_ext.losses.perceptual import VGGFeatureLoss

__all__ = ["DINODiscriminator", "HaarLLLoss", "PatchDiscriminator", "VGG19Features", "VGGFeatureLoss", "VGGGramLoss"]
