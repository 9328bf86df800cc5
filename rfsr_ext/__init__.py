"""RFSR: fine-tune diffusion super-resolution models by reward feedback learning (arXiv 2412.03268), in small parts.

Folders, each importing only those before it: ``ops``, ``files``, ``importing``, ``memory``, ``processes`` →
``weights``, ``presets`` → ``losses``, ``data``, ``networks`` → ``models``, ``rewards`` → ``sampling``, ``metrics`` →
``evaluation`` → ``training`` → ``mini`` (how the shipped weights are made) → ``cli``.  ``notebook`` imports none of
them.

The losses need torch and nothing of the rest: ``from rfsr_ext import haar_ll_l1_loss, gram_loss``.
"""

from importlib.metadata import PackageNotFoundError, version

from rfsr_ext.ops import build_info, gram_loss, gram_matrix, haar_ll, haar_ll_l1_loss

try:
    __version__ = version("rfsr_ext")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["build_info", "gram_loss", "gram_matrix", "haar_ll", "haar_ll_l1_loss"]
