"""Evaluation: fidelity metrics, tables over images and seeds, and the figures made from them."""

from rfsr_ext.evaluation.figures import cases_figure, comparison_figure, curves_figure, trajectory_figure
from rfsr_ext.evaluation.folders import FolderResult, best_and_worst, evaluate_folder
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
from rfsr_ext.evaluation.suite import METRICS, PRESETS, Metric, Preset, Suite, get_preset

__all__ = [
    "METRICS",
    "PRESETS",
    "FolderResult",
    "Judge",
    "Metric",
    "Preset",
    "Scorer",
    "Suite",
    "band_ssim",
    "best_and_worst",
    "cases_figure",
    "compare",
    "comparison_figure",
    "curves_figure",
    "evaluate",
    "evaluate_bicubic",
    "evaluate_folder",
    "get_preset",
    "measure_trajectory",
    "psnr",
    "ssim",
    "summarise",
    "trajectory_figure",
]
