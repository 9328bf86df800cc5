"""Models and folders measured with `rfsr_ext.metrics`: tables over images and seeds, and the figures made of them."""

from rfsr_ext.evaluation.best_of import best_of
from rfsr_ext.evaluation.figures import (
    best_of_figure,
    cases_figure,
    comparison_figure,
    curves_figure,
    gaps_figure,
    save_figure,
    trajectory_figure,
)
from rfsr_ext.evaluation.folders import FolderResult, best_and_worst, evaluate_folder
from rfsr_ext.evaluation.measure import (
    Scorer,
    compare,
    enlarge_bicubic,
    evaluate,
    evaluate_bicubic,
    held_out_scorers,
    measure_trajectory,
    summarize,
)
from rfsr_ext.evaluation.pairs import PairResult, evaluate_pairs, evaluate_pairs_bicubic
from rfsr_ext.evaluation.preferences import Measure, create_measures, evaluate_measures, score_candidates
from rfsr_ext.evaluation.stability import Spread, disagreement_figure, stability_table
from rfsr_ext.evaluation.votes import bradley_terry

__all__ = [
    "FolderResult",
    "Measure",
    "PairResult",
    "Scorer",
    "Spread",
    "best_and_worst",
    "best_of",
    "best_of_figure",
    "bradley_terry",
    "cases_figure",
    "compare",
    "comparison_figure",
    "create_measures",
    "curves_figure",
    "disagreement_figure",
    "enlarge_bicubic",
    "evaluate",
    "evaluate_bicubic",
    "evaluate_folder",
    "evaluate_measures",
    "evaluate_pairs",
    "evaluate_pairs_bicubic",
    "gaps_figure",
    "held_out_scorers",
    "measure_trajectory",
    "save_figure",
    "score_candidates",
    "stability_table",
    "summarize",
    "trajectory_figure",
]
