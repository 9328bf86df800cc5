"""Gram matrix and Gram loss against fp64 formulas and finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsr_ext.ops import gram_loss, gram_matrix, reference

# (C, H, W): beside, at and across the 16-channel panels, the 64-channel tiles and the 128-pixel sums
SHAPES = [(1, 1, 1), (3, 5, 7), (16, 8, 8), (17, 4, 65), (20, 1, 300), (64, 17, 31), (70, 9, 1), (65, 33, 40)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6, torch.float64: 1e-13}


def exact(features):
    f = features.detach().double().flatten(2)
    return torch.einsum("nik,njk->nij", f, f) / f[0].numel()


def exact_loss(features, target):
    return (exact(features) - exact(target)).square().sum((1, 2)).mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_match_fp64(shape, dtype, device):
    f, t = (torch.randn(2, *shape, device=device).relu().to(dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    matrix, loss = gram_matrix(f), gram_loss(f, t)
    assert matrix.dtype == loss.dtype == wide and matrix.shape == (2, shape[0], shape[0]) and loss.shape == ()
    wanted = exact(f)
    assert (matrix.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    torch.testing.assert_close(loss.double(), exact_loss(f, t), rtol=1e-6, atol=1e-30)
    assert torch.equal(matrix, matrix.mT)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 35), st.integers(1, 19), st.integers(1, 19)),
    dtype=st.sampled_from(DTYPES),
    names=st.tuples(*[st.sampled_from(["contiguous", "channels_last", "sliced", "expanded", "transposed"])] * 2),
    seed=st.integers(0, 9),
)
def test_any_shape_dtype_and_layout(shape, dtype, names, seed, layouts, device):
    random = torch.Generator().manual_seed(seed)
    f, t = (layouts[name](torch.randn(shape, generator=random).to(device, dtype)) for name in names)
    loss = gram_loss(f, t)
    if shape[0] == 0:
        assert loss.isnan() and gram_matrix(f).shape == (0, shape[1], shape[1])
        return
    wanted = exact(f)
    assert (gram_matrix(f).double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    # The difference of two Grams keeps the digits of the Grams, so the bound is relative to those.
    scale = wanted.square().sum((1, 2)).mean() + exact(t).square().sum((1, 2)).mean()
    assert (loss.double() - exact_loss(f, t)).abs() <= 1e-6 * scale


def test_long_sums_keep_six_digits(device):
    f, t = torch.rand(2, 1, 24, 300, 301, device=device)
    torch.testing.assert_close(gram_loss(f, t).double(), exact_loss(f, t), rtol=1e-6, atol=0)


def test_close_features_keep_their_difference(device):
    t = torch.rand(1, 32, 64, 64, device=device)
    f = t + 1e-3 * torch.randn_like(t)
    torch.testing.assert_close(gram_loss(f, t).double(), exact_loss(f, t), rtol=1e-3, atol=0)  # D is 1e-5 of G
    assert gram_loss(t, t.clone()) == 0


def test_large_half_activations_stay_finite(device):
    f, t = (torch.full((1, 8, 32, 32), v, dtype=torch.float16, device=device) for v in (300.0, 299.0))
    f.requires_grad_()
    loss = gram_loss(f, t)
    loss.backward()
    assert loss.isfinite() and f.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), exact_loss(f, t), rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 4), (3, 5, 3), (17, 1, 3)], ids=str)
def test_gradients_match_finite_differences(shape, device):
    f, t = (torch.randn(2, *shape, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(gram_matrix, (f,))
    assert torch.autograd.gradcheck(gram_loss, (f, t))


def test_second_derivatives_match_finite_differences(device):
    f, t = (torch.randn(2, 3, 3, 2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(gram_matrix, (f,))
    assert torch.autograd.gradgradcheck(gram_loss, (f, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 9), (65, 12, 13)], ids=str)
def test_gradients_match_the_twin(shape, dtype, layout, device):
    inputs = [layout(torch.randn(2, *shape, device=device).to(dtype)) for _ in range(2)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    (100 * reference.gram_loss(*wide)).backward()
    narrow = [x.detach().requires_grad_() for x in inputs]
    (100 * gram_loss(*narrow)).backward()
    for x, w in zip(narrow, wide, strict=True):
        assert x.grad.dtype == dtype
        error = (x.grad.double() - w.grad).abs().max() / w.grad.abs().max()
        assert error <= ROUNDING[dtype]


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["features", "target", "both"])
def test_gradient_to_either_or_both_keeps_only_what_it_needs(wanted, device):
    f, t = (torch.randn(1, 4, 6, 6, device=device, requires_grad=w) for w in wanted)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = gram_loss(f, t)
    loss.backward()
    assert (f.grad is not None, t.grad is not None) == wanted
    assert sorted(x.numel() for x in saved) == [16] + [144] * sum(wanted)


def test_layers_and_weights(device):
    f = [torch.randn(2, c, 4, 5, device=device, requires_grad=True) for c in (3, 8)]
    t = [torch.randn_like(x) for x in f]
    loss = gram_loss(f, t, weights=[0.1, 2.0])
    torch.testing.assert_close(loss, 0.1 * gram_loss(f[0], t[0]) + 2.0 * gram_loss(f[1], t[1]))
    torch.testing.assert_close(gram_loss(f, t), gram_loss(f[0], t[0]) + gram_loss(f[1], t[1]))
    loss.backward()
    assert all(x.grad.abs().sum() > 0 for x in f)


def test_nan_in_is_nan_out(device):
    f, t = torch.randn(2, 2, 3, 4, 4, device=device)
    f[1, 2, 3, 3] = float("nan")
    assert gram_loss(f, t).isnan()
    bad = gram_matrix(f).isnan()
    assert not bad[0].any() and bad[1, 2].all() and bad[1, :, 2].all() and not bad[1, :2, :2].any()


# ---------------------------------------------------------------------------------------- mistakes

GOOD = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    "call, error, sentence",
    [
        (lambda: gram_matrix(3), TypeError, "features must be a torch.Tensor, got int"),
        (
            lambda: gram_matrix(GOOD.long()),
            TypeError,
            "features must be float64, float32, float16 or bfloat16, got int64",
        ),
        (lambda: gram_matrix(GOOD[0]), ValueError, "features must have 4 dimensions [N, C, H, W], got shape (3, 8, 8)"),
        (
            lambda: gram_loss(GOOD, GOOD[:, :2]),
            ValueError,
            "target_features must have features's shape (2, 3, 8, 8), got (2, 2, 8, 8)",
        ),
        (
            lambda: gram_loss([GOOD, GOOD], [GOOD, GOOD.double()]),
            TypeError,
            "target_features[1] must have features[1]'s dtype float32, got float64",
        ),
        (
            lambda: gram_loss([GOOD, GOOD], [GOOD]),
            ValueError,
            "target_features must be a list of 2 layers as features is, got a list of 1 layer",
        ),
        (
            lambda: gram_loss(GOOD, [GOOD]),
            ValueError,
            "target_features must be one tensor as features is, got a list of 1 layer",
        ),
        (lambda: gram_loss([], []), ValueError, "features must hold at least one layer, got an empty list"),
        (lambda: gram_loss("conv", GOOD), TypeError, "features must be a torch.Tensor or a list of them, got str"),
        (
            lambda: gram_loss([GOOD], [GOOD], weights=[1, 2]),
            ValueError,
            "weights must hold one number per layer (1), got 2",
        ),
    ],
)
def test_wrong_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence
