"""Fast losses: Haar-LL and Gram, compiled for CPU and CUDA, in PyTorch everywhere else.

The operators are also reachable as ``torch.ops.rfsr_ext.*``; :func:`build_info` says what serves them.
"""

from ._library import build_info
from .gram import gram_loss, gram_matrix
from .haar import haar_ll, haar_ll_l1_loss

__all__ = ["build_info", "gram_loss", "gram_matrix", "haar_ll", "haar_ll_l1_loss"]
