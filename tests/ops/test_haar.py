"""Haar LL and its L1 loss against PyWavelets, fp64 formulas and finite differences."""

import numpy as np
import pytest
import pywt
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rfsr_ext.ops import build_info, haar_ll, haar_ll_l1_loss, reference

pytestmark = pytest.mark.filterwarnings("ignore:Level value")  # PyWavelets', where a band is one pixel wide

MODES = list(reference.MODES)
SIZES = [(8, 8), (7, 8), (8, 7), (7, 9), (1, 6), (6, 1), (1, 1), (2, 3), (33, 65)]
WIDE = [(3, 1023), (2, 1025), (3, 2050)]  # beyond one tile of a CPU row, and beyond two
WIDTHS = st.integers(1, 19) | st.integers(32, 71)  # without and with a whole register of a CPU that has wide ones
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = st.sampled_from(["contiguous", "channels_last", "sliced", "offset", "expanded", "transposed"])
HALF_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6, torch.float64: 1e-14}


def pywt_ll(x, mode="symmetric", level=1):
    bands = pywt.wavedec2(x.detach().double().cpu().numpy(), "haar", mode=mode, level=level)
    return torch.from_numpy(np.asarray(bands[0]))


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
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 19), WIDTHS),
    dtype=st.sampled_from(DTYPES),
    names=st.tuples(LAYOUTS, LAYOUTS),
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


# ------------------------------------------------------------------- modes, levels, ranges, reductions

OPTIONS = {
    "mode": st.sampled_from(MODES),
    "level": st.integers(1, 4),
    "input_range": st.sampled_from([None, (-1, 1), (-0.3, 0.8)]),
    "reduction": st.sampled_from(reference.REDUCTIONS),
}


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 19), WIDTHS),
    dtype=st.sampled_from(DTYPES),
    names=st.tuples(LAYOUTS, LAYOUTS),
    weighted=st.booleans(),
    options=st.fixed_dictionaries(OPTIONS),
)
def test_any_mode_level_range_and_reduction(shape, dtype, names, weighted, options, layouts, device):
    base = torch.arange(2 * np.prod(shape), dtype=torch.float64, device=device).mul(0.7).sin().mul(1.5)
    pred, target = (
        layouts[name](x.reshape(shape).to(dtype))
        for name, x in zip(names, base.chunk(2) if len(base) else [base, base], strict=True)
    )
    mode, level = options["mode"], options["level"]
    weight = torch.arange(1.0, shape[0] + 1, device=device) if weighted else None
    try:
        # PyWavelets transforms no empty batch; the sizes of the bands are those of one image.
        band = pywt_ll(pred if shape[0] else pred.new_zeros(1, *shape[1:]), mode, level)[: shape[0]]
    except ValueError as refusal:
        assert "greater than 1 for [anti]reflect" in str(refusal)
        for call in (lambda: haar_ll(pred, mode, level), lambda: haar_ll_l1_loss(pred, target, **options)):
            with pytest.raises(ValueError, match="needs a height and width of at least 2 at each level"):
                call()
        return

    result = haar_ll(pred, mode, level)
    assert result.dtype == dtype and result.shape == band.shape
    # A level adds up to 16 of its inputs, so that is how errors grow next to a sum that cancels.
    error = (1e-14 if dtype == torch.float64 else 1e-7) * 8**level
    torch.testing.assert_close(result.cpu().double(), band, rtol=HALF_ROUNDING[dtype], atol=error)
    torch.testing.assert_close(reference.haar_ll(pred.double(), mode, level).cpu(), band, rtol=1e-13, atol=1e-12)

    wanted = reference.haar_ll_l1_loss(pred.double(), target.double(), weight=weight, **options)
    loss = haar_ll_l1_loss(pred, target, weight=weight, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == wanted.shape
    terms = band.numel() if options["reduction"] == "sum" else 1
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=3 * error * max(1, terms), equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(3, 11), st.integers(3, 11)),
    options=st.fixed_dictionaries({**OPTIONS, "level": st.integers(1, 2)}),
    needs=st.sampled_from([(True, False), (False, True), (True, True)]),
)
@example(  # beyond one tile of a CPU row
    shape=(1, 1, 3, 2051),
    options={"mode": "reflect", "level": 1, "input_range": (-1, 1), "reduction": "none"},
    needs=(True, True),
)
@example(
    shape=(1, 1, 3, 1025),
    options={"mode": "smooth", "level": 1, "input_range": None, "reduction": "mean"},
    needs=(True, False),
)
def test_gradients_of_every_option(shape, options, needs, device):
    values = [torch.randn(shape, dtype=torch.float64, device=device) for _ in range(2)]
    weight = torch.rand(shape[0], dtype=torch.float64, device=device)
    gradients = []
    for function in (haar_ll_l1_loss, reference.haar_ll_l1_loss):
        inputs = [x.clone().requires_grad_(need) for x, need in zip(values, needs, strict=True)]
        wanted = [x for x in (*inputs, weight.requires_grad_()) if x.requires_grad]
        loss = function(*inputs, weight=weight, **options)
        gradients.append(torch.autograd.grad(loss, wanted, torch.ones_like(loss) / 3))
    for ours, twins in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, twins, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_every_mode_and_dtype(mode, dtype, layout, device):
    """Gradients of a half type are those of the wide one, rounded once."""
    pred, target = (layout(torch.randn(2, 2, 7, 9, device=device).to(dtype)) for _ in range(2))
    grads = []
    for inputs in ((pred, target), (pred.double(), target.double())):
        x, y = (t.detach().requires_grad_() for t in inputs)
        function = haar_ll_l1_loss if x.dtype == dtype else reference.haar_ll_l1_loss
        grads.append(torch.autograd.grad(function(x, y, mode=mode, input_range=(-1, 1), reduction="sum"), (x, y)))
    for narrow, wide in zip(*grads, strict=True):
        assert narrow.dtype == dtype and narrow.shape == wide.shape
        torch.testing.assert_close(narrow.double(), wide, rtol=HALF_ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("size", [(4, 6), (5, 4), (4, 3), (5, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_modes_match_finite_differences(mode, size, device):
    pred, target = (torch.randn(1, 1, *size, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(haar_ll, (pred, mode))
    assert torch.autograd.gradgradcheck(haar_ll, (pred, mode))
    assert torch.autograd.gradcheck(lambda x, y: haar_ll_l1_loss(x, y, mode=mode, input_range=(-1, 2)), (pred, target))


@pytest.mark.parametrize("mode", ["periodic", "smooth"])
def test_levels_match_finite_differences(mode, device):
    pred, target = (torch.randn(2, 1, 7, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device, requires_grad=True)

    def loss(x, y, w):
        return haar_ll_l1_loss(x, y, mode=mode, level=2, input_range=(-1, 1), reduction="none", weight=w)

    assert torch.autograd.gradcheck(lambda x: haar_ll(x, mode, 2), (pred,))
    assert torch.autograd.gradcheck(loss, (pred, target, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nothing_is_rounded_between_levels(dtype, device):
    x = torch.randn(1, 2, 16, 24, device=device).to(dtype)
    assert torch.equal(haar_ll(x, level=3), haar_ll(x.float(), level=3).to(dtype))


def test_range_is_that_of_a_decoder_and_has_a_gradient_inside(device):
    pred = torch.tensor([[-1.5, -1.0, 0.25, 1.0], [1.5, -0.5, 0.5, 2.0]], device=device).view(1, 1, 2, 4)
    target = torch.zeros_like(pred) - 3  # black: every coefficient's difference is positive
    pred.requires_grad_()
    loss = haar_ll_l1_loss(pred, target, input_range=(-1, 1), reduction="sum")
    loss.backward()
    image = ((pred / 2 + 0.5).clamp(0, 1)).detach()
    torch.testing.assert_close(loss, image.sum() / 2)
    wanted = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]], device=device) / 4
    torch.testing.assert_close(pred.grad[0, 0], wanted)


def test_a_bit_per_pixel_is_kept_for_a_range():
    pred, target = torch.randn(2, 1, 3, 64, 64)
    for wants_target, masks in ((False, 1), (True, 2)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t) or t, lambda t: t):
            haar_ll_l1_loss(pred.requires_grad_(), target.requires_grad_(wants_target), input_range=(-1, 1))
        assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 3 * 32 * 8 + masks * 3 * 64 * 8)]


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


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_second_derivatives_of_the_loss_match_finite_differences(reduction, device):
    pred, target = (torch.randn(2, 1, 3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))

    def loss(x, y):
        return haar_ll_l1_loss(x, y, mode="reflect", input_range=(-1, 1), reduction=reduction)

    assert torch.autograd.gradgradcheck(loss, (pred, target))
    half = pred.detach().half().requires_grad_()  # whose gradients round to 0 where they are not scaled
    value = haar_ll_l1_loss(half, torch.zeros_like(half), reduction=reduction).sum() * 2**-20
    factor = torch.tensor(1.0, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(value * factor, half, create_graph=True)
    (again,) = torch.autograd.grad((grad * half.detach()).sum(), factor)
    torch.testing.assert_close(again, value.detach(), rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_where_the_mode_does_not_look(mode, device):
    """The bands and gradients say NaN exactly where PyWavelets and its transpose reach the pixel."""
    for row, column in ((0, 0), (3, 5), (4, 6), (2, 3)):
        x, y = torch.zeros(2, 1, 1, 5, 7, device=device)
        x[0, 0, row, column] = float("nan")
        reached = pywt_ll(x.isnan().double() + 1, mode) != pywt_ll(torch.ones_like(x), mode)
        if mode == "antisymmetric":  # x - x is 0, but not for a NaN
            reached = pywt_ll(x, mode).isnan()
        assert torch.equal(haar_ll(x, mode).isnan().cpu(), reached)
        loss = haar_ll_l1_loss(x.requires_grad_(), y, mode=mode, input_range=(-1, 1))
        loss.backward()
        assert loss.isnan() and x.grad[0, 0, row, column].isnan()


# ------------------------------------------------------------------------------------- determinism


def some_results(x, y):
    """Values and gradients of a few combinations of options, one after the other."""
    results = []
    for mode, level, input_range, reduction in [
        ("symmetric", 1, None, "none"),
        ("reflect", 1, (-1, 1), "sum"),
        ("smooth", 2, None, "mean"),
    ]:
        a, b = (t.detach().requires_grad_() for t in (x, y))
        band = haar_ll(a, mode, level)
        loss = haar_ll_l1_loss(a, b, mode=mode, level=level, input_range=input_range, reduction=reduction)
        grads = torch.autograd.grad(loss.double().sum() + band.double().square().sum(), (a, b))
        results += [band, loss, *grads]
    return results


def same_bits(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    if build_info()["devices"]["cpu"]["backend"] != "native":
        pytest.skip("the PyTorch implementation promises no order of sums")
    x, y = (torch.randn(3, 5, 65, 129).to(dtype) for _ in range(2))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            results.append(some_results(x, y))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (6, 35)], ids=str)
def test_every_byte_of_the_outputs_is_written(size, device):
    x, y = torch.randn(2, 3, 2, *size, device=device)
    if 1 in size:
        pytest.raises(ValueError, some_results, x, y)
        x, y = (t.expand(3, 2, 2, 3) for t in (x, y))
    wanted = some_results(x, y)
    torch.use_deterministic_algorithms(True)  # from here on new tensors hold NaN, or the largest number
    try:
        assert torch.empty(3, device=device).isnan().all()
        poisoned = some_results(x, y)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same_bits(poisoned, wanted) and not any(t.isnan().any() for t in poisoned)


# ------------------------------------------------------------------------------ autocast, vmap, compile


def test_autocast_takes_mixed_dtypes_to_the_wider(device):
    x = torch.randn(1, 2, 6, 6, device=device)
    y = torch.randn(1, 2, 6, 6, device=device).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        loss = haar_ll_l1_loss(x.requires_grad_(), y.requires_grad_())
        same = haar_ll_l1_loss(x, x)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, haar_ll_l1_loss(x, y.float())) and same == 0
    assert x.grad.dtype == torch.float32 and y.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 2), (3, 1)], ids=str)
def test_vmap_is_a_loop(in_dims, reduction, device):
    shapes = [[2, 3, 5, 4] if dim is None else [*[2, 3, 5, 4][:dim], 6, *[2, 3, 5, 4][dim:]] for dim in in_dims]
    x, y = (torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes)

    def loss(a, b):
        bands = haar_ll(a, "periodic", 2).sum((1, 2, 3)) if reduction == "none" else haar_ll(b).sum()
        return haar_ll_l1_loss(a, b, mode="reflect", input_range=(-1, 1), reduction=reduction) + bands

    mapped = torch.vmap(loss, in_dims)(x, y)
    slices = [[t] * 6 if dim is None else t.unbind(dim) for t, dim in zip((x, y), in_dims, strict=True)]
    looped = torch.stack([loss(a, b) for a, b in zip(*slices, strict=True)])
    torch.testing.assert_close(mapped, looped)
    grad = torch.randn_like(mapped)
    for a, b in zip(*(torch.autograd.grad(out, (x, y), grad) for out in (mapped, looped)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_batched_gradients_are_a_loop(reduction, device):
    x, y = (torch.randn(2, 3, 5, 4, device=device, requires_grad=True) for _ in range(2))
    loss = haar_ll_l1_loss(x, y, input_range=(-1, 1), reduction=reduction)
    grads = torch.randn(4, *loss.shape, device=device)
    batched = torch.autograd.grad(loss, (x, y), grads, is_grads_batched=True, retain_graph=True)
    looped = [torch.autograd.grad(loss, (x, y), g, retain_graph=True) for g in grads]
    for ours, each in zip(batched, zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(each))


@pytest.mark.parametrize("mode", range(len(MODES)), ids=MODES)
def test_operators_pass_opcheck_in_every_mode(mode, device):
    ops, size = torch.ops.rfsr_ext, (5, 7)
    x, y = (torch.randn(2, 3, *size, device=device).bfloat16().requires_grad_() for _ in range(2))
    few = ("test_schema", "test_autograd_registration", "test_faketensor")
    check = torch.library.opcheck
    band = ops.haar_ll(x, mode, torch.float32)
    check(ops.haar_ll, (x, mode, torch.float32), test_utils=few)
    check(ops.haar_ll_backward, (torch.randn_like(band), mode, *size, torch.bfloat16), test_utils=few)
    for low, high, reduction, mask in ((0.0, 0.0, 0, -1), (-1.0, 1.0, 2, 1)):
        loss, kept = ops.haar_ll_l1(x, y, mode, low, high, reduction, True, True)
        check(ops.haar_ll_l1, (x, y, mode, low, high, reduction, True, True), test_utils=few)
        args = loss.detach(), kept, mode, low, high, reduction, 3, *size, torch.bfloat16, mask
        check(ops.haar_ll_l1_backward, args, test_utils=few)


def test_compiles_with_every_option(device):
    def total(x, y, weight):
        bands = [haar_ll(x, mode).mean() for mode in MODES]
        losses = [
            haar_ll_l1_loss(x, y, mode=mode, level=level, input_range=input_range, reduction=reduction, weight=w).mean()
            for mode, level, input_range, reduction, w in [
                ("symmetric", 1, (-1, 1), "mean", None),
                ("reflect", 1, None, "sum", weight),
                ("periodic", 2, (-1, 1), "none", weight),
                ("smooth", 2, None, "mean", weight),
            ]
        ]
        return torch.stack(bands + losses).sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(2, 3, 8, 8), (3, 2, 7, 9)]:
        x, y = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
        weight = torch.rand(shape[0], device=device, requires_grad=True)
        results = [torch.autograd.grad(function(x, y, weight), (x, y, weight)) for function in (compiled, total)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


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
        (
            lambda: haar_ll(GOOD, "mirror"),
            ValueError,
            "mode must be one of symmetric, reflect, periodic, zero, constant, smooth, antisymmetric, antireflect, "
            "periodization, got 'mirror'",
        ),
        (lambda: haar_ll(GOOD, level=0), ValueError, "level must be a whole number of at least 1, got 0"),
        (lambda: haar_ll(GOOD, level=1.0), ValueError, "level must be a whole number of at least 1, got 1.0"),
        (
            lambda: haar_ll_l1_loss(GOOD, GOOD, mode="reflect", level=4),
            ValueError,
            "mode 'reflect' needs a height and width of at least 2 at each level, got (8, 8) and level 4",
        ),
        (
            lambda: haar_ll_l1_loss(GOOD, GOOD, reduction="max"),
            ValueError,
            "reduction must be one of mean, sum, none, got 'max'",
        ),
        (
            lambda: haar_ll_l1_loss(GOOD, GOOD, input_range=(1, -1)),
            ValueError,
            "input_range must be two numbers (low, high) with low < high, or None, got (1, -1)",
        ),
        (
            lambda: haar_ll_l1_loss(GOOD, GOOD, input_range=2),
            ValueError,
            "input_range must be two numbers (low, high) with low < high, or None, got 2",
        ),
        (
            lambda: haar_ll_l1_loss(GOOD, GOOD, weight=[1, 1]),
            TypeError,
            "weight must be a torch.Tensor or None, got list",
        ),
        (
            lambda: haar_ll_l1_loss(GOOD, GOOD, weight=torch.ones(3)),
            ValueError,
            "weight must have one number per sample of pred, shape (2,), got shape (3,)",
        ),
        (
            lambda: haar_ll_l1_loss(GOOD, GOOD, weight=torch.ones(2).int()),
            TypeError,
            "weight must be float64, float32, float16 or bfloat16, got int32",
        ),
    ],
)
def test_wrong_input_gets_one_sentence(call, error, sentence):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence
