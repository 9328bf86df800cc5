"""Evaluation: fidelity metrics, tables over images and seeds, and the figures made from them."""

from rfsr_ext.evaluation.figures import comparison_figure, curves_figure, trajectory_figure
from rfsr_ext.evaluation.judge import Judge
from rfsr_ext.evaluation.measure import (
    Scorer,
    compare,
    evaluate,
    evaluate_bicubic,
    measure_trajectory,
    summarise,
)
from rfsr_ext.evaluation.metrics import band_ssim, psnr, ssim

__all__ = [
    "Judge",
    "Scorer",
    "band_ssim",
    "compare",
    "comparison_figure",
    "curves_figure",
    "evaluate",
    "evaluate_bicubic",
    "measure_trajectory",
    "psnr",
    "ssim",
    "summarise",
    "trajectory_figure",
]
