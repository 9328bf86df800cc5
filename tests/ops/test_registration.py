"""The operators as torch sees them: opcheck, torch.compile, threads, streams, and what serves where."""

import inspect
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from torch.library import opcheck

from rfsr_ext.ops import build_info, gram_loss, gram_matrix, haar_ll, haar_ll_l1_loss, reference

OPS = torch.ops.rfsr_ext


def images(device, *shape, grad=True):
    return [torch.randn(shape, device=device, requires_grad=grad) for _ in range(2)]


# ------------------------------------------------------------------------------------------ opcheck


@pytest.mark.parametrize("size", [(6, 8), (5, 7)], ids=str)
def test_opcheck(size, device):
    x, y = images(device, 2, 3, *size)
    ll = torch.randn_like(haar_ll(x))
    kept = OPS.haar_ll_l1(x.detach(), y.detach(), 0, -1.0, 1.0, 0, True, True)[1]
    s = torch.randn(2, 3, 3, device=device, requires_grad=True)
    opcheck(OPS.haar_ll, (x, 0, torch.float32))
    opcheck(OPS.haar_ll_backward, (ll.requires_grad_(), 0, *size, torch.float32))
    opcheck(OPS.haar_ll_l1, (x, y, 0, -1.0, 1.0, 0, True, True))
    opcheck(OPS.haar_ll_l1, (x.detach(), y.detach(), 0, 0.0, 0.0, 0, False, False))
    options = 0, -1.0, 1.0, 0, 3, *size, torch.float32, 1
    opcheck(OPS.haar_ll_l1_backward, (torch.tensor(0.5, device=device), kept, *options))
    opcheck(OPS.gram_moments, (x, None))
    opcheck(OPS.gram_moments, (x, torch.randn(2, device=device)))
    opcheck(OPS.gram_distance, (x, y, 0))
    opcheck(OPS.gram_distance, (x, y.detach(), 1))
    opcheck(OPS.gram_distance, (x, y, 2))
    opcheck(OPS.gram_backward, (s, x, None))
    opcheck(OPS.gram_backward, (s, x, torch.randn(2, 3, device=device, requires_grad=True)))


@pytest.mark.parametrize("shape", [(1, 0, 2, 2), (1, 2, 0, 2), (0, 2, 2, 0)], ids=str)
def test_a_direct_call_refuses_images_without_channels_or_pixels(shape, device):
    """The functions check that before; a kernel would divide by zero, which ends the process."""
    if build_info()["devices"][device]["backend"] != "native":
        pytest.skip("only compiled kernels count tiles")
    x, s = torch.empty(shape, device=device), torch.empty(*shape[:2], shape[1], device=device)
    for call in (
        lambda: OPS.gram_moments(x, None),
        lambda: OPS.gram_distance(x, x, 0),
        lambda: OPS.gram_backward(s, x, None),
        lambda: OPS.haar_ll(x, 0, torch.float32),
        lambda: OPS.haar_ll_l1(x, x, 0, 0.0, 0.0, 0, True, True),
    ):
        with pytest.raises(RuntimeError, match="must have C, H and W of at least 1"):
            call()


@pytest.mark.cuda
def test_a_direct_call_refuses_tensors_of_two_devices():
    if build_info()["devices"]["cuda"]["backend"] != "native":
        pytest.skip("PyTorch refuses them itself")
    x, options = torch.zeros(1, 3, 4, 4), (0, 0.0, 0.0, 0)
    loss, kept = OPS.haar_ll_l1(x, x, *options, True, True)
    for call in (
        lambda: OPS.gram_distance(x.cuda(), x, 0),
        lambda: OPS.haar_ll_l1(x, x.cuda(), *options, True, True),
        lambda: OPS.haar_ll_l1_backward(loss.cuda(), kept, *options, 3, 4, 4, torch.float32, -1),
        lambda: OPS.haar_ll_l1_backward(loss, kept.cuda(), *options, 3, 4, 4, torch.float32, -1),
    ):
        with pytest.raises(RuntimeError, match="device"):
            call()


# ------------------------------------------------------------------------------------ torch.compile


def total(pred, target):
    """All four functions in one graph."""
    return (
        haar_ll(pred).square().mean()
        + haar_ll_l1_loss(pred, target)
        + gram_matrix(pred).mean()
        + gram_loss([pred, pred * 2], [target, target], weights=[1.0, 0.5])
        + gram_loss(pred, target, criterion="fro")
        + gram_loss(pred, target_gram=gram_matrix(target, joint_layer_norm=True), criterion="l1", joint_layer_norm=True)
    )


def reference_total(pred, target):
    return (
        reference.haar_ll(pred).square().mean()
        + reference.haar_ll_l1_loss(pred, target)
        + reference.gram_matrix(pred).mean()
        + reference.gram_loss([pred, pred * 2], [target, target], weights=[1.0, 0.5])
        + reference.gram_loss(pred, target, criterion="fro")
        + reference.gram_loss(pred, target, criterion="l1", joint_layer_norm=True)
    )


@pytest.mark.parametrize("function", [total, reference_total], ids=["operators", "twins"])
def test_compiles_without_a_graph_break(function, device):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(2, 3, 8, 8), (1, 3, 7, 9), (3, 3, 6, 11)]:
        x, y = images(device, *shape)
        compiled(x, y).backward()
        grads = x.grad, y.grad
        x.grad = y.grad = None
        function(x, y).backward()
        torch.testing.assert_close(grads, (x.grad, y.grad))


@pytest.mark.slow
def test_compiles_to_generated_code(device):
    torch._dynamo.reset()
    x, y = images(device, 2, 3, 7, 8)
    loss = torch.compile(total, fullgraph=True)(x, y)
    loss.backward()
    grad, x.grad = x.grad, None
    total(x, y).backward()
    torch.testing.assert_close(loss, total(x, y))
    torch.testing.assert_close(grad, x.grad)


def test_wrong_input_raises_under_compile_too():
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"target must have pred's shape"):
        torch.compile(haar_ll_l1_loss, backend="eager")(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5))


# ------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: haar_ll_l1_loss(x, y, input_range=(-1, 1)),
        gram_loss,
        lambda x, y: haar_ll(x).square().mean(),
        lambda x, y: gram_matrix(x).square().mean(),
    ],
    ids=["haar_ll_l1_loss", "gram_loss", "haar_ll", "gram_matrix"],
)
def test_a_checkpointed_decoder_gets_the_same_gradient(function, reentrant):
    decoder = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.SiLU(), torch.nn.Conv2d(3, 3, 3))
    z, gt = torch.randn(2, 2, 11, 12), torch.randn(2, 3, 7, 8)
    calls = []

    def loss(z):
        calls.append(1)
        return function(decoder(z), gt)

    gradients = []
    for run in (loss, lambda z: torch.utils.checkpoint.checkpoint(loss, z, use_reentrant=reentrant)):
        latents = z.clone().requires_grad_()
        decoder.zero_grad()
        run(latents).backward()
        gradients.append([latents.grad, *[p.grad for p in decoder.parameters()]])
    assert len(calls) == 3  # the checkpoint ran its function a second time
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*gradients, strict=True))


# -------------------------------------------------------------------------------------- determinism


def all_results(x, y):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    values = [haar_ll(x), haar_ll_l1_loss(x, y), gram_matrix(x), gram_loss(x, y)]
    grads = torch.autograd.grad(sum(v.double().sum() for v in values), (x, y))
    return [*values, *grads]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_do_not_depend_on_threads(dtype):
    if build_info()["devices"]["cpu"]["backend"] != "native":
        pytest.skip("the PyTorch implementation promises no order of sums")
    x, y = (torch.randn(3, 37, 65, 129).to(dtype) for _ in range(2))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            results.append(all_results(x, y))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bits_repeat(device):
    x, y = (torch.randn(2, 65, 40, 33, device=device) for _ in range(2))
    first, second = all_results(x, y), all_results(x, y)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def losses_and_gradients(images, features):
    """Of the Haar loss with some options, then of the Gram loss."""
    haar, gram = [], []
    for x, y in images:
        for options in (
            {},
            {"input_range": (-1, 1)},
            {"mode": "smooth"},
            {"mode": "reflect", "input_range": (-1, 0.5)},
        ):
            loss = haar_ll_l1_loss(x.requires_grad_(), y.requires_grad_(), reduction="none", **options)
            haar += [loss.detach(), *torch.autograd.grad(loss.sum(), (x, y))]
    for f, t in features:
        loss = gram_loss(f.requires_grad_(), t)
        gram += [loss.detach(), *torch.autograd.grad(2**12 * loss, f)]
    return haar, gram


def test_smaller_processors_get_the_same_numbers(tmp_path):
    """Without AVX-512 and AMX, which a larger processor leaves alone where PyTorch's own variable says so."""
    if (capability := torch.backends.cpu.get_cpu_capability()) != "AVX512":
        pytest.skip(f"this processor has no AVX-512 to leave alone, or it is left alone already: it uses {capability}")
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    images = 1.5 * torch.randn(2, 2, 3, 7, 71)
    for k, value in enumerate([torch.nan, torch.inf, -torch.inf, 1.0, -1.0, 0.0]):
        images[0, 1, k % 3, :4, 11 * k] = value  # in one sample, of the first image
    features = torch.randn(2, 1, 70, 33, 40)
    inputs = [[x.to(dtype).unbind() for dtype in dtypes] for x in (images, features)]
    torch.save(inputs, tmp_path / "inputs.pt")
    script = f"""
import torch
from rfsr_ext.ops import gram_loss, haar_ll_l1_loss
{inspect.getsource(losses_and_gradients)}
torch.save(losses_and_gradients(*torch.load("inputs.pt")), "found.pt")
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)
    found, wanted = torch.load(tmp_path / "found.pt", weights_only=True), losses_and_gradients(*inputs)
    for x, y in zip(found[0], wanted[0], strict=True):  # the same sums in the same order
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    # Two sums that differ by little may round to two neighbours in half precision: that is a unit of the last place.
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6, torch.float64: 1e-13}
    for x, y in zip(found[1], wanted[1], strict=True):
        assert (x.double() - y.double()).abs().max() <= rounding[y.dtype] * y.double().abs().max()


@pytest.mark.cuda
def test_runs_on_the_current_stream_and_in_a_graph():
    x, y = (torch.randn(2, 16, 33, 47, device="cuda") for _ in range(2))
    wanted = haar_ll_l1_loss(x, y), gram_loss(x, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x + 0  # ready only after the sleep: a kernel on another stream would read it too early
        results = haar_ll_l1_loss(late, y), gram_loss(late, y)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))

    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        captured = haar_ll_l1_loss(static, y), gram_loss(static, y)
    static.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_own_gpu():
    x, y = (torch.randn(2, 16, 33, 47, device="cuda:1") for _ in range(2))
    with torch.cuda.device(0):
        loss = haar_ll_l1_loss(x, y)
    assert loss.device == x.device
    torch.testing.assert_close(loss.cpu(), haar_ll_l1_loss(x.cpu(), y.cpu()))


@pytest.mark.cuda
def test_cuda_matches_cpu():
    x, y = (torch.randn(2, 70, 33, 47) for _ in range(2))
    for a, b in zip(all_results(x, y), all_results(x.cuda(), y.cuda()), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------ what serves it


def test_a_library_serves_where_one_can_be_compiled():
    """Or else every comparison of an operator with its PyTorch twin would be one of the twin with itself."""
    if os.environ.get("RFSR_BACKEND") == "reference":
        pytest.skip("RFSR_BACKEND=reference asks for the PyTorch implementation")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    assert build_info()["devices"]["cpu"]["backend"] == "native", build_info()["devices"]["cpu"]


def test_build_info_gives_a_reason_for_every_device():
    devices = build_info()["devices"]
    assert set(devices) == {"cpu", "cuda", "other"}
    for served in devices.values():
        assert served["backend"] in ("native", "reference") and served["why"]
        assert (served["library"] is not None) == (served["backend"] == "native")
        assert served["backend"] == "reference" or served["build"]["compiler"]
    assert devices["other"]["backend"] == "reference"


def test_reference_serves_when_asked_for():
    """The same operators, gradients included, with no library loaded."""
    script = """
import torch
from rfsr_ext.ops import build_info, gram_loss, haar_ll_l1_loss, reference
served = build_info()["devices"]["cpu"]
assert served["backend"] == "reference" and "RFSR_BACKEND" in served["why"], served
for shape in [(2, 2, 3, 4), (0, 3, 4, 4), (1, 1, 1, 1)]:
    x, y = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if shape[0]:
        assert torch.autograd.gradcheck(haar_ll_l1_loss, (x, y)) and torch.autograd.gradcheck(gram_loss, (x, y))
        assert torch.autograd.gradgradcheck(gram_loss, (x, y))
    else:
        haar_ll_l1_loss(x, y).backward()
        assert x.grad.shape == x.shape
x = torch.full((1, 1, 2, 6), float("nan"), requires_grad=True)
haar_ll_l1_loss(x, torch.zeros_like(x)).backward()
assert x.grad.isnan().all()
print("served")
"""
    environment = {**os.environ, "RFSR_BACKEND": "reference"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and "served" in run.stdout, run.stderr


# ------------------------------------------------------------------- derivatives of every kind and order


def band(x):
    return 2 * torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True)


def gram(x, layer_norm=False):
    if layer_norm:  # by hand: torch's own layer_norm has a wrong third derivative
        x = (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    return torch.einsum("nchw,ndhw->ncd", x, x) / x[0].numel()


DERIVED = {  # ours, and the formula
    "haar_ll": (lambda x, y: haar_ll(x).pow(3).sum(), lambda x, y: band(x).pow(3).sum()),
    "haar_ll_l1_loss": (lambda x, y: haar_ll_l1_loss(x, y) ** 3, lambda x, y: band(x - y).abs().mean() ** 3),
    "its target": (lambda x, y: haar_ll_l1_loss(y, x) ** 3, lambda x, y: band(x - y).abs().mean() ** 3),
    "gram_matrix": (lambda x, y: gram_matrix(x).square().sum(), lambda x, y: gram(x).square().sum()),
    "gram_loss": (gram_loss, lambda x, y: (gram(x) - gram(y)).square().sum((1, 2)).mean()),
    "gram_loss, fro, layer norm": (
        lambda x, y: gram_loss(x, y, criterion="fro", joint_layer_norm=True),
        lambda x, y: (gram(x, True) - gram(y, True)).square().sum((1, 2)).sqrt().mean(),
    ),
}


def reverse_over_reverse(function, x, v):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad((slope * v).sum(), x)[0]


def dual_numbers(function, x, v):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(function(torch.autograd.forward_ad.make_dual(x, v))).tangent


def third(function, x, v):
    def along_v(function):
        return lambda x: (torch.func.grad(function)(x) * v).sum()

    return torch.func.grad(along_v(along_v(function)))(x)


KINDS = {
    "reverse over reverse": reverse_over_reverse,
    "dual numbers": dual_numbers,
    "jvp": lambda function, x, v: torch.func.jvp(function, (x,), (v,)),
    "forward over reverse": lambda function, x, v: torch.func.jvp(torch.func.grad(function), (x,), (v,))[1],
    "reverse over forward": lambda function, x, v: torch.func.grad(lambda x: KINDS["jvp"](function, x, v)[1])(x),
    "gradient of each": lambda function, x, v: torch.vmap(torch.func.grad(function))(torch.stack([x, v])),
    "third": third,
}


@pytest.mark.parametrize("name", DERIVED)
def test_derivatives_of_every_kind_are_those_of_the_formula(name, device):
    x, y, v = torch.rand(3, 2, 3, 6, 5, dtype=torch.float64, device=device)
    ours, formula = DERIVED[name]
    for derivative in KINDS.values():
        found, wanted = (derivative(lambda x, f=f: f(x, y), x, v) for f in (ours, formula))
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
        assert all(t.abs().max() > 0 for t in (found if isinstance(found, tuple) else [found]))


def test_a_transform_rounds_nothing_under_autocast(device):
    x = torch.rand(2, 1, 3, 6, 5, device=device)
    plain = torch.vmap(gram_matrix)(x)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(torch.vmap(gram_matrix)(x), plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jvp", "forward over reverse", "gradient of each"])
def test_derivatives_compile(kind, device):
    x, y, v = (torch.rand(2, 3, 6, 5, device=device) for _ in range(3))

    def function(x):
        return gram_loss(x, y, criterion="fro", joint_layer_norm=True) + haar_ll_l1_loss(x, y) ** 2 + haar_ll(x).sum()

    torch._dynamo.reset()
    compiled = torch.compile(lambda: KINDS[kind](function, x, v), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), KINDS[kind](function, x, v))
