"""What scores an image: metrics by name and presets of them.  `rfsr_ext.evaluation` measures models and folders."""

from rfsr_ext.metrics.fidelity import band_ssim, psnr, ssim
from rfsr_ext.metrics.judge import Judge
from rfsr_ext.metrics.suite import METRICS, PRESETS, Metric, Preset, Suite, get_preset

__all__ = [
    "METRICS",
    "PRESETS",
    "Judge",
    "Metric",
    "Preset",
    "Suite",
    "band_ssim",
    "get_preset",
    "psnr",
    "ssim",
]
