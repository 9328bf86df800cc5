"""Who runs: our operators and every other way to compute the same losses, each in its best form.

Every contestant is ``f(prediction, target) -> scalar``; for Haar on tensors, for Gram on lists of layers.
Where one cannot run, a sentence stands in its place and in the table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import rfsr_ext

# On CUDA "max-autotune" replays CUDA graphs, which copies every new input; the third mode does not.
COMPILE_MODES = {"cpu": ("default", "max-autotune"), "cuda": ("default", "max-autotune", "max-autotune-no-cudagraphs")}

Loss = Callable[..., Tensor]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------------------------- Haar-LL L1
# All take LL(prediction - target), not LL(prediction) - LL(target): the transform is linear and this is one pass less.


def avg_pool2d(prediction: Tensor, target: Tensor) -> Tensor:
    # at an odd end ceil_mode averages what is left, which is what symmetric extension gives
    return 2 * F.avg_pool2d(prediction - target, 2, ceil_mode=True).abs().mean()


def avg_pool2d_fp32(prediction: Tensor, target: Tensor) -> Tensor:
    return avg_pool2d(prediction.float(), target.float())


def _even(x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    return F.pad(x, (0, w % 2, 0, h % 2), mode="replicate") if h % 2 or w % 2 else x


def slices(prediction: Tensor, target: Tensor) -> Tensor:
    d = _even(prediction - target)
    ll = d[..., ::2, ::2] + d[..., 1::2, ::2] + d[..., ::2, 1::2] + d[..., 1::2, 1::2]
    return ll.abs().mean() / 2


def conv2d(prediction: Tensor, target: Tensor) -> Tensor:
    d = _even(prediction - target)
    planes = d.reshape(-1, 1, *d.shape[-2:])
    return F.conv2d(planes, d.new_full((1, 1, 2, 2), 0.5), stride=2).abs().mean()


def pytorch_wavelets(dtype: torch.dtype, device: str) -> Loss:
    from pytorch_wavelets.dwt.transform2d import DWTForward

    transform = DWTForward(J=1, wave="haar", mode="symmetric").to(device, dtype)
    return lambda prediction, target: transform(prediction - target)[0].abs().mean()


def ptwt(dtype: torch.dtype, device: str) -> Loss:
    from ptwt import wavedec2

    return lambda prediction, target: wavedec2(prediction - target, "haar", mode="symmetric", level=1)[0].abs().mean()


# --------------------------------------------------------------------------------------------- Gram


def _over_layers(difference: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """Sum over layers of the squared Frobenius norm of ``difference(f, g)`` for f, g ``[N, C, HW]``, batch mean."""

    def loss(features: list[Tensor], targets: list[Tensor]) -> Tensor:
        total = 0
        for f, g in zip(features, targets, strict=True):
            total = total + difference(f.flatten(2), g.flatten(2)).square().sum((1, 2)).mean()
        return total

    return loss


@_over_layers
def bmm(f: Tensor, g: Tensor) -> Tensor:
    return _wide(torch.bmm(f, f.mT) - torch.bmm(g, g.mT)) / f[0].numel()


@_over_layers
def bmm_fp32(f: Tensor, g: Tensor) -> Tensor:
    f, g = f.float(), g.float()
    return (torch.bmm(f, f.mT) - torch.bmm(g, g.mT)) / f[0].numel()


@_over_layers
def baddbmm(f: Tensor, g: Tensor) -> Tensor:
    # scaled before it is rounded: what of bmm in fp16 does not overflow
    scale = 1 / f[0].numel()
    gram = torch.baddbmm(f.new_zeros(1, 1, 1), f, f.mT, beta=0, alpha=scale)
    return _wide(torch.baddbmm(gram, g, g.mT, alpha=-scale))


@_over_layers
def einsum(f: Tensor, g: Tensor) -> Tensor:
    return _wide(torch.einsum("nck,ndk->ncd", f, f) - torch.einsum("nck,ndk->ncd", g, g)) / f[0].numel()


def normalized(features: list[Tensor]) -> list[Tensor]:
    """Each sample's features with the mean and variance of all its channels and pixels taken out."""
    return [F.layer_norm(_wide(f), f.shape[1:]) for f in features]


def released(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The released RFSR code's form: fp32, joint layer norm, bmm. Its last step, rounding to fp16, is left out."""
    return bmm(normalized(features), normalized(targets))


def gram_of_normalized(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    return rfsr_ext.gram_loss(normalized(features), normalized(targets))


# ------------------------------------------------------------------------------------------ line-up


def unavailable(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in ("ptwt", "pytorch_wavelets"):
        return "not installed"
    return f"cannot run: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"


def line_up(operator: str, dtype: torch.dtype, device: str) -> dict[str, Loss | str]:
    """Contestants by name, ours first; a string says why one cannot run."""
    half = dtype in (torch.float16, torch.bfloat16)
    if operator == "haar":
        ours, eager = rfsr_ext.haar_ll_l1_loss, {"avg_pool2d": avg_pool2d, "slices": slices, "conv2d": conv2d}
        if half:
            eager["avg_pool2d fp32"] = avg_pool2d_fp32
    else:
        ours, eager = rfsr_ext.gram_loss, {"bmm": bmm, "baddbmm": baddbmm, "einsum": einsum}
        eager["released RFSR form"] = released
        if half:
            eager["bmm fp32"] = bmm_fp32
    found: dict[str, Loss | str] = {"ours": ours, **eager}
    for mode in COMPILE_MODES[device]:
        label = "compile" if mode == "default" else mode
        found |= {f"{label} {name}": torch.compile(f, mode=mode, dynamic=False) for name, f in eager.items()}
    for library in (pytorch_wavelets, ptwt) if operator == "haar" else ():
        try:
            found[library.__name__] = library(dtype, device)
        except Exception as error:  # whatever a third package does on import, the run goes on
            found[library.__name__] = unavailable(error)
    return found


def multiplies_in_its_dtype(operator: str, name: str) -> bool:
    """Whether a contestant multiplies matrices of the features' own dtype."""
    return operator == "gram" and name != "ours" and not name.endswith("fp32") and "released" not in name


def reference(operator: str, name: str) -> Loss:
    """What a contestant must agree with: our operator, on the features it sees."""
    if operator == "haar":
        return rfsr_ext.haar_ll_l1_loss
    if "released" in name:
        return gram_of_normalized
    return rfsr_ext.gram_loss
