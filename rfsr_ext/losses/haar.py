"""The low-frequency structure constraint (paper eq. 2)."""

from torch import Tensor, nn

from rfsr_ext.ops import haar_ll_l1_loss

__all__ = ["HaarLLLoss"]


class HaarLLLoss(nn.Module):
    """L_dwt = mean |DWT(pred)_LL − DWT(target)_LL|, one level of the orthonormal Haar transform.

    Accepts ``[N, 3, H, W]`` images of any size; see `rfsr_ext.haar_ll_l1_loss`, which it calls.
    """

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return haar_ll_l1_loss(pred, target)
