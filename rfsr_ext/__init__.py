"""RFSR: fine-tune diffusion super-resolution models by reward feedback learning (arXiv 2412.03268), in small parts.

Folders, each importing only those before it: ``ops``, ``files``, ``importing``, ``memory``, ``processes`` →
``weights``, ``presets`` → ``losses``, ``data``, ``networks`` → ``models``, ``rewards`` → ``sampling``, ``metrics`` →
``evaluation`` → ``recordings`` → ``training`` → ``mini`` (how the shipped weights are made) → ``cli``.  ``notebook``
imports none of them.

The losses need torch and nothing of the rest: ``from rfsr_ext import haar_ll_l1_loss, gram_loss``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rfsr_ext.ops import build_info, gram_loss, gram_matrix, haar_ll, haar_ll_l1_loss

    __version__: str

__all__ = ["build_info", "gram_loss", "gram_matrix", "haar_ll", "haar_ll_l1_loss"]


def __getattr__(name: str) -> Any:
    """Imports take seconds, torch's above all: the command line does them when it can answer an interruption."""
    if name in __all__:
        return getattr(importlib.import_module("rfsr_ext.ops"), name)
    if name == "__version__":
        metadata = importlib.import_module("importlib.metadata")
        try:
            return metadata.version("rfsr_ext")
        except metadata.PackageNotFoundError:
            return "0+unknown"  # used from a source tree that was never installed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
