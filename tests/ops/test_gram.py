"""Gram matrix and Gram loss against fp64 formulas and finite differences."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsr_ext.ops import build_info, gram_loss, gram_matrix, reference

# (C, H, W): beside, at and across the 32-channel panels, the 64-channel tiles, the 128-pixel sums and the slices
SHAPES = [(1, 1, 1), (3, 5, 7), (16, 8, 8), (17, 4, 65), (20, 1, 300), (64, 17, 31), (70, 9, 1), (65, 33, 40)]
SHAPES += [(40, 65, 80), (1, 65, 66)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = st.sampled_from(["contiguous", "channels_last", "sliced", "offset", "expanded", "transposed"])
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6, torch.float64: 1e-13}


CRITERIA = ["l2", "l1", "fro"]


def exact(features, joint_layer_norm=False):
    f = features.detach().double()
    if joint_layer_norm:
        axes = (1, 2, 3)
        f = (f - f.mean(axes, keepdim=True)) / (f.var(axes, keepdim=True, correction=0) + 1e-5).sqrt()
    f = f.flatten(2)
    return torch.einsum("nik,njk->nij", f, f) / f[0].numel()


def size(difference, criterion):
    if criterion == "l1":
        return difference.abs().sum((1, 2)).mean()
    squares = difference.square().sum((1, 2))
    return (squares.sqrt() if criterion == "fro" else squares).mean()


def exact_loss(features, target, criterion="l2", joint_layer_norm=False):
    return size(exact(features, joint_layer_norm) - exact(target, joint_layer_norm), criterion)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_match_fp64(shape, dtype, device):
    # The one is twice the other: of two nearly equal Grams the difference, and with it the loss, has fewer digits.
    f, t = ((scale * torch.randn(2, *shape, device=device)).relu().to(dtype) for scale in (1, 2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    matrix, loss = gram_matrix(f), gram_loss(f, t)
    assert matrix.dtype == loss.dtype == wide and matrix.shape == (2, shape[0], shape[0]) and loss.shape == ()
    wanted = exact(f)
    assert (matrix.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    for criterion in CRITERIA:
        loss = gram_loss(f, t, criterion=criterion)
        torch.testing.assert_close(loss.double(), exact_loss(f, t, criterion), rtol=1e-6, atol=1e-30)
    assert torch.equal(matrix, matrix.mT)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 35), st.integers(1, 19), st.integers(1, 19)),
    dtype=st.sampled_from(DTYPES),
    names=st.tuples(LAYOUTS, LAYOUTS),
    criterion=st.sampled_from(CRITERIA),
    layer_norm=st.booleans(),
    cached=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape_dtype_layout_and_option(shape, dtype, names, criterion, layer_norm, cached, seed, layouts, device):
    random = torch.Generator().manual_seed(seed)
    f, t = (layouts[name](torch.randn(shape, generator=random).to(device, dtype)) for name in names)
    options = {"criterion": criterion, "joint_layer_norm": layer_norm}
    matrix = gram_matrix(f, joint_layer_norm=layer_norm)
    if cached:
        loss = gram_loss(f, target_gram=gram_matrix(t, joint_layer_norm=layer_norm), **options)
    else:
        loss = gram_loss(f, t, **options)
    if shape[0] == 0:
        assert loss.isnan() and matrix.shape == (0, shape[1], shape[1])
        return
    # With layer norm a matrix has the digits of one of size 1: it is divided by the variance.
    wanted, other = exact(f, layer_norm), exact(t, layer_norm)
    assert (matrix.double() - wanted).abs().max() <= (5e-6 if layer_norm else 1e-6) * wanted.abs().max() + 1e-12
    # The difference of two Grams keeps the digits of the Grams, so the bound is relative to those.
    error = (loss.double() - size(wanted - other, criterion)).abs()
    assert error <= (5e-6 if layer_norm else 1e-6) * (size(wanted, criterion) + size(other, criterion)) + 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_layers_of_aligned_planes(dtype, device):
    """Several tiles on CUDA, and planes of whole 16 bytes: forward and backward by the fast copies."""
    f, t = (torch.randn(2, 130, 6, 8, device=device).to(dtype) for _ in range(2))
    torch.testing.assert_close(gram_loss(f, t).double(), exact_loss(f, t), rtol=1e-6, atol=0)
    s = torch.randn(2, 130, 130, device=device, dtype=reference.acc_dtype(dtype))
    wanted = torch.einsum("npc,npk->nck", s.double(), f.double().flatten(2))
    error = (torch.ops.rfsr_ext.gram_backward(s, f, None).flatten(2) - wanted).abs().max() / wanted.abs().max()
    assert error <= ROUNDING[dtype]


def test_fp32_products_keep_what_one_rounding_keeps(device):
    """CUDA takes six products of bf16 numbers for one of fp32: they leave out 2^-24 of it, and would, were one of them
    missing, 2^-18 or more. The rest of the bound is for sums, which tensor cores may cut off 16 times."""
    wide = [2.0 ** torch.randint(-12, 12, size, device=device) for size in ((1, 40, 4, 4), (1, 16, 16), (1, 16, 4, 4))]
    f, s, x = (torch.randn_like(scale) * scale for scale in wide)
    p, q = f.flatten(2).double(), x.flatten(2).double()
    pairs = [
        (gram_matrix(f).double() * f.numel(), p, p.mT),
        (torch.ops.rfsr_ext.gram_backward(s, x, None).flatten(2), s.mT.double(), q),
    ]
    for result, a, b in pairs:
        assert ((result - a @ b).abs() <= 2**-20 * (a.abs() @ b.abs())).all()


def test_long_sums_keep_six_digits(device):
    f, t = torch.rand(2, 1, 24, 300, 301, device=device)
    torch.testing.assert_close(gram_loss(f, t).double(), exact_loss(f, t), rtol=1e-6, atol=0)


@pytest.mark.cuda
def test_a_plane_of_more_ranges_than_a_grid_has_rows():
    x = torch.ones(1, 1, 1, 1, device="cuda", dtype=torch.bfloat16).expand(1, 1, 2**15, 2**14 + 1)
    torch.testing.assert_close(gram_matrix(x), torch.ones(1, 1, 1, device="cuda"), rtol=1e-6, atol=0)


def test_close_features_keep_their_difference(device):
    t = torch.rand(1, 32, 64, 64, device=device)
    f = t + 1e-3 * torch.randn_like(t)
    torch.testing.assert_close(gram_loss(f, t).double(), exact_loss(f, t), rtol=1e-3, atol=0)  # D is 1e-5 of G
    assert gram_loss(t, t.clone()) == 0


def test_layer_norm_keeps_its_digits_under_a_large_mean(device):
    f = 300 + torch.randn(2, 24, 40, 41, device=device)
    wanted = exact(f, joint_layer_norm=True)
    assert (gram_matrix(f, joint_layer_norm=True).double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("layer_norm", [False, True], ids=["raw", "layer_norm"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_large_half_activations_stay_finite(criterion, layer_norm, device):
    constant = [torch.full((1, 8, 32, 32), v, dtype=torch.float16, device=device) for v in (300.0, 200.0)]
    varied = [(x + 20 * torch.randn(x.shape, device=device)).half() for x in constant]
    for f, t in (constant, varied):
        f.requires_grad_()
        loss = gram_loss(f, t, criterion=criterion, joint_layer_norm=layer_norm)
        loss.backward()
        assert loss.isfinite() and f.grad.isfinite().all()
        wanted = exact_loss(f, t, criterion, layer_norm)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-4 if layer_norm else 1e-6, atol=1e-8)


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("layer_norm", [False, True], ids=["raw", "layer_norm"])
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 4, 4), (3, 5, 3), (17, 1, 3)], ids=str)
def test_gradients_match_finite_differences(shape, layer_norm, device):
    f, t = (torch.randn(2, *shape, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: gram_matrix(x, joint_layer_norm=layer_norm), (f,))
    for criterion in CRITERIA:
        options = {"criterion": criterion, "joint_layer_norm": layer_norm}
        assert torch.autograd.gradcheck(lambda *x, o=options: gram_loss(*x, **o), (f, t))
    gram = gram_matrix(t, joint_layer_norm=layer_norm).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, g, o=options: gram_loss(x, target_gram=g, **o), (f, gram))


@pytest.mark.parametrize("layer_norm", [False, True], ids=["raw", "layer_norm"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_second_derivatives_match_finite_differences(criterion, layer_norm, device):
    f, t = (torch.randn(2, 3, 3, 2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda x: gram_matrix(x, joint_layer_norm=layer_norm), (f,))
    options = {"criterion": criterion, "joint_layer_norm": layer_norm}
    assert torch.autograd.gradgradcheck(lambda *x: gram_loss(*x, **options), (f, t))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_equal_features_have_gradient_zero(criterion, device):
    f = torch.randn(2, 5, 6, 7, device=device, requires_grad=True)
    gram_loss(f, f.detach().clone(), criterion=criterion).backward()
    assert torch.equal(f.grad, torch.zeros_like(f))


@pytest.mark.parametrize("layer_norm", [False, True], ids=["raw", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 9), (65, 12, 13)], ids=str)
def test_gradients_match_the_twin(shape, dtype, layer_norm, layout, device):
    inputs = [layout(torch.randn(2, *shape, device=device).to(dtype)) for _ in range(2)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(reference.gram_loss(*wide, joint_layer_norm=layer_norm), wide)
    scale = 1 / max(w.abs().max().item() for w in wanted)  # into the range of fp16
    narrow = [x.detach().requires_grad_() for x in inputs]
    (scale * gram_loss(*narrow, joint_layer_norm=layer_norm)).backward()
    for x, w in zip(narrow, wanted, strict=True):
        assert x.grad.dtype == dtype
        error = (x.grad.double() / scale - w).abs().max() / w.abs().max()
        assert (
            error <= (5 if layer_norm else 1) * ROUNDING[dtype]
        )  # with layer norm two rounded matrices are subtracted


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
    torch.testing.assert_close(gram_loss(f, target_gram=[gram_matrix(x) for x in t], weights=[0.1, 2.0]), loss)
    loss.backward()
    assert all(x.grad.abs().sum() > 0 for x in f)
    learned = torch.ones(2, device=device, requires_grad=True)  # 1 as a tensor is no reason to leave the factor out
    gram_loss(f, t, weights=learned).backward()
    torch.testing.assert_close(learned.grad, torch.stack([gram_loss(x, y) for x, y in zip(f, t, strict=True)]))


def test_nan_in_is_nan_out(device):
    f, t = torch.randn(2, 2, 3, 4, 4, device=device)
    f[1, 2, 3, 3] = float("nan")
    assert gram_loss(f, t).isnan()
    bad = gram_matrix(f).isnan()
    assert not bad[0].any() and bad[1, 2].all() and bad[1, :, 2].all() and not bad[1, :2, :2].any()


# ------------------------------------------------------------------- vmap, autocast, threads, memory


@pytest.mark.parametrize("layer_norm", [False, True], ids=["raw", "layer_norm"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_vmap_is_a_loop(criterion, layer_norm, device):
    f, t = torch.randn(2, 4, 3, 2, 5, 4, device=device)  # N at 1, the mapped dimension at 2

    def loss(f, t):
        return gram_loss(f, t, criterion=criterion, joint_layer_norm=layer_norm)

    f.requires_grad_()
    mapped = torch.vmap(loss, in_dims=(2, 2))(f, t)
    looped = torch.stack([loss(f.select(2, i), t.select(2, i)) for i in range(2)])
    torch.testing.assert_close(mapped, looped)
    torch.testing.assert_close(*[torch.autograd.grad(x.sum(), f)[0] for x in (mapped, looped)])
    shared = torch.vmap(loss, in_dims=(2, None))(f, t.select(2, 0))  # one target for all
    torch.testing.assert_close(shared, torch.stack([loss(f.select(2, i), t.select(2, 0)) for i in range(2)]))


def test_vmap_of_the_matrix(device):
    f = torch.randn(3, 2, 4, 5, 6, device=device)
    torch.testing.assert_close(torch.vmap(gram_matrix)(f), torch.stack([gram_matrix(x) for x in f]))


@pytest.mark.parametrize("layer_norm", [False, True], ids=["raw", "layer_norm"])
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16), (torch.float16,) * 2], ids=str
)
def test_autocast_keeps_dtypes_and_promotes_different_ones(dtypes, layer_norm, device):
    f, t = (torch.randn(2, 3, 4, 5, device=device).to(d).requires_grad_() for d in dtypes)
    with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
        loss = gram_loss(f, t, joint_layer_norm=layer_norm)
    loss.backward()
    assert loss.dtype == torch.float32 and (f.grad.dtype, t.grad.dtype) == dtypes
    torch.testing.assert_close(loss.double(), exact_loss(f, t, "l2", layer_norm), rtol=1e-5, atol=1e-9)


def results(f, t):
    """Every path through the operators, with gradients to both inputs."""
    f, t = f.detach().requires_grad_(), t.detach().requires_grad_()
    values = [gram_matrix(f, joint_layer_norm=True)]
    for criterion in CRITERIA:
        for layer_norm in (False, True):
            options = {"criterion": criterion, "joint_layer_norm": layer_norm}
            cached = gram_matrix(t, joint_layer_norm=layer_norm)
            values += [gram_loss(f, t, **options), gram_loss(f, target_gram=cached, **options)]
    return [
        *values,
        *[g for value in values for g in torch.autograd.grad(value.sum(), (f, t), allow_unused=True) if g is not None],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 200, 9, 17), (3, 37, 33, 65), (1, 66, 65, 66)], ids=str)
def test_bits_do_not_depend_on_threads(shape, dtype, device):
    if device != "cpu" or build_info()["devices"]["cpu"]["backend"] != "native":
        pytest.skip("threads are the CPU library's; the PyTorch implementation promises no order of sums")
    f, t = torch.randn(2, *shape).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = results(f, t)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(wanted, results(f, t), strict=True))
    finally:
        torch.set_num_threads(before)


def test_poisoned_outputs_and_workspaces_are_overwritten(device):
    inputs = [torch.randn(2, 35, 9, 17, device=device) for _ in range(2)]
    wanted = results(*inputs)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN
    try:
        assert torch.empty(3, device=device).isnan().all()
        poisoned = results(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(wanted, poisoned, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is glibc's")
def test_poisoned_buffers_are_overwritten():
    """The CPU kernels' own memory, which glibc fills with bytes that are huge numbers."""
    script = """
import torch
from rfsr_ext.ops import gram_loss, reference
for dtype, rtol in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
    f, t = torch.randn(2, 2, 35, 9, 17).to(dtype).requires_grad_()
    for layer_norm in (False, True):
        losses = [g(f, t, joint_layer_norm=layer_norm) for g in (gram_loss, reference.gram_loss)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*[torch.autograd.grad(x, f)[0] for x in losses], rtol=rtol, atol=1e-3 * rtol)
print("clean")
"""
    environment = {**os.environ, "MALLOC_PERTURB_": "1"}  # bytes 0xfe: -1.7e38
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "clean", run.stderr


# ---------------------------------------------------------------------------------------- mistakes

GOOD = torch.zeros(2, 3, 8, 8)
GRAM = torch.zeros(2, 3, 3)


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
        (lambda: gram_loss(GOOD), ValueError, "one of target_features and target_gram must be given, got neither"),
        (
            lambda: gram_loss(GOOD, GOOD, target_gram=GRAM),
            ValueError,
            "one of target_features and target_gram must be given, got both",
        ),
        (
            lambda: gram_loss(GOOD, target_gram=GRAM[:, :2]),
            ValueError,
            "target_gram must have features's Gram shape (2, 3, 3), got (2, 2, 3)",
        ),
        (
            lambda: gram_loss([GOOD.half()], target_gram=[GRAM.half()]),
            TypeError,
            "target_gram[0] must have features[0]'s Gram dtype float32, got float16",
        ),
        (
            lambda: gram_loss([GOOD], target_gram=[3]),
            TypeError,
            "target_gram[0] must be a torch.Tensor, got int",
        ),
        (
            lambda: gram_loss(GOOD, target_gram=GRAM.to("meta")),
            ValueError,
            "target_gram must be on features's device cpu, got meta",
        ),
        (lambda: gram_loss(GOOD, GOOD, criterion="l3"), ValueError, "criterion must be 'l2', 'l1' or 'fro', got 'l3'"),
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
