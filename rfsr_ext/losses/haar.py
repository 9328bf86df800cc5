"""The low-frequency structure constraint (paper eq. 2)."""

from torch import Tensor, nn

from rfsr_ext.ops import haar_ll_l1_loss

__all__ = ["HaarLLLoss"]


class HaarLLLoss(nn.Module):
    """L_dwt = ``mean |DWT(pred)_LL − DWT(target)_LL|`` of the orthonormal Haar transform.

    Accepts ``[N, 3, H, W]`` images of any size; see `rfsr_ext.haar_ll_l1_loss`, which it calls, for the arguments:
    ``mode`` (extension of odd sizes), ``level`` and ``input_range``, which is ``(-1, 1)`` for a decoder's output.
    """

    def __init__(
        self, *, mode: str = "symmetric", level: int = 1, input_range: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        self.options = {"mode": mode, "level": level, "input_range": input_range}

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return haar_ll_l1_loss(pred, target, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
