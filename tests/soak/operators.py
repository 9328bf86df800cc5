"""Fuzzed calls of the losses: values and gradients against PyWavelets' matrices and plain formulas in fp64.

Trial i is a function of i alone.  ``python -m tests.soak.operators FIRST LAST`` runs some by themselves, which is how
they are run under sanitizers.
"""

import functools
import sys

import numpy as np
import pywt
import torch
from torch import Tensor

from rfsr_ext.ops import gram_loss, gram_matrix, haar_ll, haar_ll_l1_loss

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
MODES = ["symmetric", "reflect", "periodic", "zero", "constant", "smooth", "antisymmetric", "antireflect",
         "periodization"]  # fmt: skip


@functools.lru_cache(maxsize=64)  # of all that are asked for, 10⁵ calls would keep 19 GB
def band_matrix(size: int, mode: str, level: int) -> Tensor:
    """Of the LL band along one side, column by column from PyWavelets, times √2 per level: whole numbers, so that a
    difference that should be 0 is."""
    matrix = np.eye(size)
    for _ in range(level):
        matrix = np.stack([pywt.dwt(column, "haar", mode)[0] for column in matrix.T], axis=1)
    whole = np.round(matrix * 2 ** (level / 2))
    assert np.abs(whole - matrix * 2 ** (level / 2)).max() < 1e-12
    return torch.from_numpy(whole)


def layout(x: Tensor, kind: int) -> Tensor:
    """The same numbers in another order in memory."""
    if kind == 1:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == 2:
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == 3:
        wide = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), torch.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, what: str, scale: float = 0) -> None:
    """Equal but for one rounding to ``dtype``, relative to the largest number wanted, or to ``scale`` if that is more.

    Of the smallest numbers a rounding is half the step between them.
    """
    assert found.shape == wanted.shape, f"{what} has shape {list(found.shape)}, not {list(wanted.shape)}"
    if not wanted.numel():
        return
    assert torch.equal(found.isnan(), wanted.isnan()), f"{what} is NaN elsewhere"
    error = (found.double() - wanted).nan_to_num().abs().max().item()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    bound = ROUNDING[dtype] * max(wanted.nan_to_num().abs().max().item(), scale) + 1.01 * smallest
    assert error <= bound, f"{what} is off by {error:.3g}, more than {bound:.3g}"


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return (
        list(torch.autograd.grad(loss, inputs, torch.ones_like(loss), retain_graph=True)) if loss.requires_grad else []
    )


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Eighths from -1.5 to 1.5, of which every type and every sum here keeps all digits: signs and ties are certain."""
    return torch.from_numpy(rng.integers(-12, 13, shape) / 8).to(dtype)


def haar(rng: np.random.Generator) -> None:
    """One call of `haar_ll` and of `haar_ll_l1_loss` with their gradients."""
    height, width = rng.integers(1, 24, 2)
    if rng.random() < 0.1:  # beyond one tile of a row
        width = rng.integers(1000, 2100)
    shape = tuple(int(n) for n in (rng.integers(0, 4), rng.integers(1, 4), height, width))
    dtype, mode, level = DTYPES[rng.integers(4)], MODES[rng.integers(9)], int(rng.integers(1, 4))
    ranged = [None, (-1.0, 1.0), (0.0, 1.0), (-0.5, 0.25)][rng.integers(4)]
    reduction, weighted = ["mean", "sum", "none"][rng.integers(3)], rng.random() < 0.3
    options = {"mode": mode, "level": level, "input_range": ranged, "reduction": reduction}
    x, y = (layout(numbers(rng, shape, dtype), rng.integers(4)).requires_grad_(rng.random() < 0.8) for _ in range(2))
    weight = torch.from_numpy(rng.integers(0, 5, shape[0]) / 4.0) if weighted else None
    try:
        rows, columns = (band_matrix(n, mode, level) for n in shape[2:])
    except ValueError:  # PyWavelets reflects no single sample
        for call in (lambda: haar_ll(x, mode, level), lambda: haar_ll_l1_loss(x, y, **options)):
            try:
                call()
            except ValueError as error:
                assert "needs a height and width of at least 2 at each level" in str(error)
            else:
                raise AssertionError(f"{mode} of {shape[2:]} was not refused")
        return

    def band(image: Tensor) -> Tensor:
        return rows @ image @ columns.T / 2**level

    low, high = ranged or (-torch.inf, torch.inf)

    def clamped(image: Tensor) -> Tensor:
        return torch.where((image > low) & (image < high), image, image.detach().clamp(low, high))

    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, y)]
    found, wanted = haar_ll(x, mode, level), band(wide[0])
    close(found, wanted, dtype, "the band")
    cotangent = numbers(rng, tuple(found.shape), dtype)
    if x.requires_grad:
        (grad,) = torch.autograd.grad(found, x, cotangent)
        (true,) = torch.autograd.grad(wanted, wide[0], cotangent.double())
        close(grad, true, dtype, "the band's gradient")

    loss = haar_ll_l1_loss(x, y, weight=weight, **options)
    difference = (band(clamped(wide[0])) - band(clamped(wide[1]))).abs() / (1 if ranged is None else high - low)
    each = difference.mean((1, 2, 3))
    if weight is not None:
        each = each * weight
    size = difference[0].numel() if shape[0] else 1
    wanted = {"mean": each.mean(), "sum": each.sum() * size, "none": each}[reduction]
    close(loss, wanted, torch.float64 if dtype == torch.float64 else torch.float32, "the loss")
    pairs = [(t, w) for t, w in zip((x, y), wide, strict=True) if t.requires_grad]
    if pairs and shape[0]:
        for grad, true in zip(
            gradients(loss, [t for t, _ in pairs]), gradients(wanted, [w for _, w in pairs]), strict=True
        ):
            close(grad, true, dtype, "the loss's gradient")


def gram(rng: np.random.Generator) -> None:
    """One call of `gram_matrix` and of `gram_loss` with their gradients."""
    wide_layer = rng.random() < 0.1
    channels = int(rng.integers(60, 140) if wide_layer else rng.integers(1, 20))
    shape = tuple(int(n) for n in (rng.integers(0, 3), channels, rng.integers(1, 16), rng.integers(1, 16)))
    dtype, criterion = DTYPES[rng.integers(4)], ["l2", "l1", "fro"][rng.integers(3)]
    normed = bool(rng.random() < 0.4) and criterion != "l1"  # signs of what is rounded are not certain
    f, t = (layout(numbers(rng, shape, dtype), rng.integers(4)).requires_grad_(rng.random() < 0.8) for _ in range(2))
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (f, t)]

    def centred(x: Tensor) -> Tensor:
        return x - x.mean((1, 2, 3), keepdim=True)

    def deviation(x: Tensor) -> Tensor:
        return (centred(x).square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()

    def normalized(x: Tensor) -> Tensor:
        return centred(x) / deviation(x) if normed else x

    def matrix(x: Tensor) -> Tensor:
        x = x.flatten(2)
        return torch.einsum("nik,njk->nij", x, x) / (x.shape[1] * x.shape[2])

    sums = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = (matrix(normalized(x)) for x in wide)
    digits = 5 if normed else 1  # its matrix is a difference of two, divided by the variance
    close(gram_matrix(f, joint_layer_norm=normed), a, sums, "the Gram matrix", digits * (1.0 if normed else 0))
    loss = gram_loss(f, t, criterion=criterion, joint_layer_norm=normed)

    def size(x: Tensor) -> Tensor:
        if criterion == "l1":
            return x.abs().sum((1, 2)).mean()
        squares = x.square().sum((1, 2))
        return (squares.sqrt() if criterion == "fro" else squares).mean()

    wanted = size(a - b)
    # the difference of two matrices has the digits of the matrices
    scale = (size(a) + size(b)).item() if shape[0] else 0
    close(loss, wanted, sums, "the Gram loss", digits * scale)
    pairs = [(x, w) for x, w in zip((f, t), wide, strict=True) if x.requires_grad]
    if not pairs or not shape[0] or (a - b).abs().amax((1, 2)).min() < 1e-3:  # fro has a corner where both are equal
        return
    # So has the gradient: of what it is before the difference is taken and the normalization takes out all that mean
    # and variance do not feel. "fro" divides by the size of the difference.
    steep = 0.0
    for x in wide if normed else []:
        leaf = normalized(x).detach().requires_grad_()
        steep = max(steep, (gradients(size(matrix(leaf)), [leaf])[0] / deviation(x)).abs().max().item())
    if criterion == "fro":
        norms = [m.square().sum((1, 2)).sqrt() for m in (a, b, a - b)]
        steep *= ((norms[0] + norms[1]) / norms[2]).max().item()
    for (x, _), grad, true in zip(
        pairs, gradients(loss, [x for x, _ in pairs]), gradients(wanted, [w for _, w in pairs]), strict=True
    ):
        close(grad, true, x.dtype, "the Gram loss's gradient", digits * max(true.abs().max().item(), steep))


def trial(i: int) -> None:
    """Fuzzed call i.

    Raises:
        AssertionError: if it is wrong.
    """
    rng = np.random.default_rng((1, i))
    (haar if i % 2 else gram)(rng)


if __name__ == "__main__":
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        trial(number)
