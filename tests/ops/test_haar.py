"""Haar LL and its L1 loss against PyWavelets, fp64 formulas and finite differences."""

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsr_ext.ops import haar_ll, haar_ll_l1_loss, reference

SIZES = [(8, 8), (7, 8), (8, 7), (7, 9), (1, 6), (6, 1), (1, 1), (2, 3), (33, 65)]
WIDE = [(3, 1023), (2, 1025), (3, 2050)]  # beyond one tile of a CPU row, and beyond two
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6, torch.float64: 1e-14}


def pywt_ll(x):
    ll, _ = pywt.dwt2(x.detach().double().cpu().numpy(), "haar", mode="symmetric")
    return torch.from_numpy(np.asarray(ll))


def relative(result, wanted):
    scale = wanted.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((result.detach().double().cpu() - wanted).abs().max() / scale).item()


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES + WIDE, ids=str)
def test_haar_ll_is_pywavelets(size, dtype, device):
    x = torch.randn(2, 3, *size, device=device).to(dtype)
    result = haar_ll(x)
    assert result.dtype == dtype and result.shape == (2, 3, (size[0] + 1) // 2, (size[1] + 1) // 2)
    assert relative(result, pywt_ll(x)) <= HALF_ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES + WIDE, ids=str)
def test_loss_is_the_mean_distance_of_the_bands(size, dtype, device):
    pred, target = (torch.randn(2, 3, *size, device=device).to(dtype) for _ in range(2))
    loss = haar_ll_l1_loss(pred, target)
    wanted = (pywt_ll(pred) - pywt_ll(target)).abs().mean()
    assert loss.shape == () and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(loss, wanted) <= (1e-14 if dtype == torch.float64 else 1e-6)


def test_large_loss_keeps_six_digits(device):
    pred, target = torch.rand(2, 2, 3, 513, 700, device=device)
    wanted = (pywt_ll(pred) - pywt_ll(target)).abs().mean()
    assert relative(haar_ll_l1_loss(pred, target), wanted) <= 1e-6


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 19), st.integers(1, 19)),
    dtype=st.sampled_from(DTYPES),
    names=st.tuples(*[st.sampled_from(["contiguous", "channels_last", "sliced", "expanded", "transposed"])] * 2),
)
def test_any_shape_dtype_and_layout(shape, dtype, names, layouts, device):
    base = torch.arange(2 * np.prod(shape), dtype=torch.float64, device=device).mul(0.7).sin()
    pred, target = (
        layouts[name](x.reshape(shape).to(dtype))
        for name, x in zip(names, base.chunk(2) if len(base) else [base, base], strict=True)
    )
    result = haar_ll(pred)
    loss, wanted = haar_ll_l1_loss(pred, target), reference.haar_ll_l1_loss(pred.double(), target.double())
    if shape[0] == 0:
        assert result.shape == (0, shape[1], (shape[2] + 1) // 2, (shape[3] + 1) // 2) and loss.isnan()
        return
    assert relative(result, pywt_ll(pred)) <= HALF_ROUNDING[dtype]
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-12)


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("size", SIZES[:-1], ids=str)
def test_gradients_match_finite_differences(size, device):
    pred, target = (torch.randn(2, 2, *size, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(haar_ll, (pred,))
    assert torch.autograd.gradgradcheck(haar_ll, (pred,))
    assert torch.autograd.gradcheck(haar_ll_l1_loss, (pred, target))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5), (3, 1025)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_match_the_twin(size, dtype, layout, device):
    pred, target = (layout(torch.randn(2, 3, *size, device=device).to(dtype)) for _ in range(2))
    wide = [x.detach().double().requires_grad_() for x in (pred, target)]
    (3 * reference.haar_ll_l1_loss(*wide)).backward()
    narrow = [x.detach().requires_grad_() for x in (pred, target)]
    (3 * haar_ll_l1_loss(*narrow)).backward()
    for x, w in zip(narrow, wide, strict=True):
        assert x.grad.dtype == dtype
        # fp16 cannot hold small gradients to full precision: half a step of its subnormals is 3e-8.
        torch.testing.assert_close(
            x.grad.double(), w.grad, rtol=2 * HALF_ROUNDING[dtype], atol=3.1e-8 if dtype == torch.float16 else 0
        )


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["pred", "target", "both"])
def test_gradient_to_either_or_both(wanted, device):
    x, y = (torch.randn(1, 2, 5, 6, device=device, requires_grad=w) for w in wanted)
    haar_ll_l1_loss(x, y).backward()
    assert (x.grad is not None, y.grad is not None) == wanted
    if all(wanted):
        assert torch.equal(x.grad, -y.grad)


def test_gradient_of_equal_bands_is_zero(device):
    x = torch.randn(1, 1, 5, 5, device=device, requires_grad=True)
    loss = haar_ll_l1_loss(x, x.detach())
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_inputs_are_not_kept_alive_for_backward():
    pred, target = torch.randn(2, 1, 3, 64, 64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        haar_ll_l1_loss(pred.requires_grad_(), target)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 3 * 32 * 8)]


def test_second_derivative_of_the_loss_is_refused(device):
    x, y = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64, device=device)
    (g,) = torch.autograd.grad(haar_ll_l1_loss(x.requires_grad_(), y) ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="haar_ll_l1_loss has no second derivative"):
        g.sum().backward()


# --------------------------------------------------------------------------------------------- NaN


def test_nan_in_is_nan_out(device):
    x, y = torch.zeros(2, 1, 1, 6, 6, device=device)
    x[0, 0, 3, 4] = float("nan")
    x.requires_grad_()
    loss = haar_ll_l1_loss(x, y)
    loss.backward()
    assert loss.isnan()
    wanted = torch.zeros(6, 6, dtype=torch.bool)
    wanted[2:4, 4:6] = True  # the four pixels of the coefficient, and no other
    assert torch.equal(x.grad[0, 0].isnan().cpu(), wanted)
    assert torch.equal(haar_ll(x)[0, 0].isnan().cpu(), wanted[::2, ::2])


def test_infinity_stays_infinite(device):
    x, y = torch.zeros(2, 1, 1, 4, 4, device=device)
    x[0, 0, 0, 0] = float("inf")
    assert haar_ll_l1_loss(x, y) == float("inf")


# ---------------------------------------------------------------------------------------- mistakes

GOOD = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    "call, error, sentence",
    [
        (lambda: haar_ll([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: haar_ll(GOOD.int()), TypeError, "x must be float64, float32, float16 or bfloat16, got int32"),
        (lambda: haar_ll(GOOD[0]), ValueError, "x must have 4 dimensions [N, C, H, W], got shape (3, 8, 8)"),
        (lambda: haar_ll(GOOD[:, :, :0]), ValueError, "x must have C, H and W of at least 1, got shape (2, 3, 0, 8)"),
        (
            lambda: haar_ll_l1_loss(GOOD, torch.zeros(2, 3, 8, 9)),
            ValueError,
            "target must have pred's shape (2, 3, 8, 8), got (2, 3, 8, 9)",
        ),
        (
            lambda: haar_ll_l1_loss(GOOD, GOOD.half()),
            TypeError,
            "target must have pred's dtype float32, got float16",
        ),
        (
            lambda: haar_ll_l1_loss(GOOD, GOOD.to("meta")),
            ValueError,
            "target must be on pred's device cpu, got meta",
        ),
        (lambda: haar_ll_l1_loss(GOOD, None), TypeError, "target must be a torch.Tensor, got NoneType"),
    ],
)
def test_wrong_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence
