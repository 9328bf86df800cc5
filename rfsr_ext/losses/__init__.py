"""The losses that fine-tune a diffusion super-resolution model, and its decoder."""

from rfsr_ext.losses.adversarial import DINODiscriminator, PatchDiscriminator
from rfsr_ext.losses.gram import VGG19Features, VGGGramLoss
from rfsr_ext.losses.haar import HaarLLLoss
from rfsr_ext.losses.perceptual import VGGFeatureLoss
from rfsr_ext.losses.preference import BETA_CONVENTIONS, diffusion_dpo_loss

__all__ = [
    "BETA_CONVENTIONS",
    "DINODiscriminator",
    "HaarLLLoss",
    "PatchDiscriminator",
    "VGG19Features",
    "VGGFeatureLoss",
    "VGGGramLoss",
    "diffusion_dpo_loss",
]
