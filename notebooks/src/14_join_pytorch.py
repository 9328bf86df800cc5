# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 14 · Join PyTorch, and see what it is worth
#
# **You will make a function of your own an operator of PyTorch, count what a GPU would load for it, and weigh what fusing
# is worth.**
#
# Half a minute on two cores; nothing to download and no GPU needed. Goes on from notebook 13, which writes the kernels.
# What is needed of it, the LL band and the Gram matrix, is repeated here in a line.
#
# NAVIGATION
#
# A fast kernel is half of the work. The other half is that PyTorch knows it: its gradient, its shapes, its place in a
# compiled program. And when all is done, somebody should ask what it was for. Afterwards you can
#
# * register an operator with kernel, fake kernel and gradient, and say what breaks without each,
# * prove it right with three tests that need no second implementation,
# * count the memory sectors and bank conflicts of a warp from the index formulas of a CUDA kernel,
# * compute with the digits of tensor cores, and say when a Gram matrix is limited by bytes,
# * say how much faster a whole iteration becomes, before you write the kernel.

# %%
import operator
import time
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pywt
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from rfsr_ext import gram_loss, gram_matrix, haar_ll, haar_ll_l1_loss
from rfsr_ext.data import load_photograph
from rfsr_ext.models import load_model
from rfsr_ext.notebook import COLORS, caught, check, exercise, explore, panels, show
from rfsr_ext.ops import reference
from rfsr_ext.sampling import generators, rollout

cat = torch.from_numpy(load_photograph("chelsea").copy()).movedim(-1, 0)[None]  # [1, 3, 300, 451]
x = torch.cat([cat[..., 92:140, 128:192], cat[..., 10:58, 120:184]])  # [2, 3, 48, 64]
y = 0.7 * x.flip(-1) + 0.123  # no coefficient of x equals one of y, so no sign is in doubt
in_stripes = x.to(memory_format=torch.channels_last)  # the same numbers in another order in memory

# %% [markdown]
# ## 1 · Four registrations
#
# Our kernel is the LL band of even sizes, in NumPy. NumPy stands for C++: PyTorch must not look inside, so
# `torch.compiler.disable` locks the door. (Without it, `torch.compile` reads NumPy code as if it were PyTorch's.)
#
# An operator of PyTorch has a name, such as `torch.ops.course.ll`, and up to four parts:
#
# | part | says | who asks |
# |---|---|---|
# | schema | types of what goes in and comes out, and what is changed in place | everybody |
# | kernel, one per kind of device | the numbers | a call |
# | fake kernel | shape, number type and strides of the result, without numbers | `torch.compile`, `torch.export` |
# | gradient | what backward computes, and what it must keep | `backward()` |
#
# `join` registers them. `None` leaves a part out, which we shall do on purpose.


# %%
@torch.compiler.disable
def kernel(x):
    a = x.detach().numpy()
    pairs = a[..., ::2, :] + a[..., 1::2, :]
    return torch.from_numpy(np.ascontiguousarray((pairs[..., ::2] + pairs[..., 1::2]) / 2))


def fake(x):
    n, c, height, width = x.shape
    return x.new_empty(n, c, height // 2, width // 2)


def remember(ctx, inputs, output):
    """Runs after forward; LL is linear, so its backward needs no number of it."""


def backward(ctx, grad):
    return (grad / 2).repeat_interleave(2, -2).repeat_interleave(2, -1)


libraries = {}  # a registration lives as long as its library


def join(name, kernel, fake=None, backward=None):
    libraries.pop(name, None)  # of an earlier run of a cell
    library = libraries[name] = torch.library.Library(name, "FRAGMENT")
    library.define("ll(Tensor x) -> Tensor")
    if kernel:
        library.impl("ll", kernel, "CPU")
    if fake:
        torch.library.register_fake(f"{name}::ll", fake, lib=library)
    if backward:
        torch.library.register_autograd(f"{name}::ll", backward, setup_context=remember, lib=library)
    return getattr(torch.ops, name).ll.default


ll = join("course", kernel, fake, backward)
check("the operator and PyWavelets", ll(x), pywt.dwt2(x.double().numpy(), "haar")[0], 1e-6)
check("the operator and the package", ll(x), haar_ll(x), 1e-6)

# %% [markdown]
# Now four operators with parts missing, and four things that a user does with each. `graphs` compiles a line of
# PyTorch around the operator and counts the pieces that `torch.compile` makes of it. Its backend only takes notes and
# runs the graph as it is: no code is generated, and so it takes no time.


# %%
def graphs(ll, fullgraph):
    pieces = []

    def take_notes(graph, inputs):
        pieces.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: (ll(2 * x) + 1).sum(), backend=take_notes, fullgraph=fullgraph)
    assert torch.allclose(compiled(x), (ll(2 * x) + 1).sum()), "a compiled program computes the same"
    return f"{len(pieces)} graph{'s' * (len(pieces) > 1)}"


def gradient(ll):
    p = x.clone().requires_grad_()
    ll(p).sum().backward()
    return "none, with a warning" if p.grad is None else f"{p.grad.mean():.1f} per pixel"


def outcome(action):
    """What it returns, or which error it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return action()
        except Exception as error:
            return type(error).__name__


parts, table = {"schema": (None,), "kernel": (kernel,), "fake": (kernel, fake), "grad": (kernel, fake, backward)}, {}
for number, (name, registered) in enumerate(parts.items(), start=1):
    trial = join(f"course_{name}", *registered)
    uses = {
        "a call": lambda ll=trial: "×".join(map(str, ll(x).shape)), "backward()": lambda ll=trial: gradient(ll),
        "compile": lambda ll=trial: graphs(ll, False), "fullgraph": lambda ll=trial: graphs(ll, True),
    }  # fmt: skip
    table[f"{number} part{'s' * (number > 1)}"] = {use: outcome(action) for use, action in uses.items()}
print(pd.DataFrame(table).T.to_string())
assert table["2 parts"]["backward()"] == "none, with a warning"
assert [row["fullgraph"] for row in table.values()] == ["Unsupported", "Unsupported", "1 graph", "1 graph"]

# %% [markdown]
# **What to see.** Each part cures one column.
#
# * Without a *kernel* nothing runs.
# * Without a *fake kernel* the program falls into two graphs, before and after the operator: a *graph break*. Nothing
#   is optimized across it, and `fullgraph=True` refuses it.
# * Without a *gradient* the worst happens: backward ends without an error, and `x.grad` is `None`. A training run would go
#   on and learn nothing from this loss. PyTorch prints a warning, once, which is easily lost in a log.
#
# ## 2 · Three tests that need no second implementation
#
# `torch.library.opcheck` runs an operator on your inputs, with its schema, its fake kernel and compiled, and compares.
# `gradcheck` compares the gradient with finite differences, in 64-bit numbers. The *adjoint* test holds for every linear
# operator: $\langle Wx,v\rangle=\langle x,W^\mathsf Tv\rangle$. None of them needs to know what the operator computes.


# %%
def failing(ll, *inputs, **options):
    """The tests of opcheck that do not pass."""
    results = outcome(lambda: torch.library.opcheck(ll, inputs, raise_exception=False, **options))
    return [name.removeprefix("test_") for name, result in results.items() if result != "SUCCESS"]


QUICK = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
p = x[:1, :1, :6, :8].clone().requires_grad_()
for name in ("course", "course_kernel", "course_fake"):
    print(f"{name:14s}", failing(getattr(torch.ops, name).ll.default, p) or "opcheck finds nothing")
p = p.detach().double().requires_grad_()
v = torch.rand(1, 1, 3, 4, generator=torch.Generator().manual_seed(0)).double()
(transposed,) = torch.autograd.grad((ll(p) * v).sum(), p)
check("adjoint", (ll(p) * v).sum(), (p * transposed).sum(), 1e-12)
assert torch.autograd.gradcheck(ll, p) and torch.autograd.gradgradcheck(ll, p)
print("gradcheck of course_fake:", outcome(lambda: torch.autograd.gradcheck(torch.ops.course_fake.ll.default, p)))

# %% [markdown]
# Read the third line twice. `opcheck` is content with an operator that has no gradient: it asks whether what is
# registered is consistent, not whether it is all there. `gradcheck` is not content. One needs both.
#
# ### A fake kernel that lies about strides
#
# Leave out `np.ascontiguousarray` above. NumPy lays the result out as its input was, so a picture in `channels_last`
# order gives a band in `channels_last` order. The fake kernel says it is contiguous. All values are right, so every
# comparison of numbers passes. In a compiled program `reshape` becomes a *view*, because by the fake's word no copy is
# needed.


# %%
@torch.compiler.disable
def untidy_kernel(x):
    a = x.detach().numpy()
    pairs = a[..., ::2, :] + a[..., 1::2, :]
    return torch.from_numpy((pairs[..., ::2] + pairs[..., 1::2]) / 2)


untidy = join("course_untidy", untidy_kernel, fake, backward)
check("untidy: numbers", untidy(in_stripes), haar_ll(x), 1e-6)
for name, op in (("tidy", ll), ("untidy", untidy)):
    plain = lambda x, op=op: op(x).reshape(-1).mean()  # noqa: E731
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    eager, fast = (outcome(lambda f=f: f"{f(in_stripes):.3f}") for f in (plain, compiled))
    print(f"{name}: eager {eager}, compiled {fast}, opcheck", failing(op, in_stripes, **QUICK) or "finds nothing")
on_paper = in_stripes.to("meta")  # shape and strides, no numbers: the fake kernel answers
caught(lambda: check("strides, untidy", untidy(in_stripes).stride(), untidy(on_paper).stride(), 0))

# %% [markdown]
# So test an operator with inputs that are not contiguous, and with odd sizes. That is also how the package is tested.
#
# ## 3 · How the package does it
#
# `rfsr_ext/ops/_library.py` registers a schema, a fake kernel and a kernel in plain PyTorch, its *twin*, for every
# device. A compiled library, if there is one, adds a faster kernel for its device. Therefore all operators exist on every
# machine, and the twin is a second opinion. Seven operators, two layouts, two number types, odd sizes:

# %%
ops = torch.ops.rfsr_ext
for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
    a, b = (z[..., :7, :9].to(dtype).contiguous(memory_format=layout) for z in (x, y))
    wide = torch.float32
    g, s, one = haar_ll(a).to(wide), gram_matrix(a), torch.ones((), dtype=wide)
    kept = ops.haar_ll_l1(a, b, 2, 0.1, 0.9, 0, True, True)[1]
    calls = {
        "haar_ll": (a.clone().requires_grad_(), 0, wide),
        "haar_ll_backward": (g, 1, 7, 9, dtype),
        "haar_ll_l1": (a.clone().requires_grad_(), b, 2, 0.1, 0.9, 0, True, False),
        "haar_ll_l1_backward": (one, kept, 2, 0.1, 0.9, 0, 3, 7, 9, dtype, 1),
        "gram_moments": (a.clone().requires_grad_(), None),
        "gram_distance": (a.clone().requires_grad_(), b, 2),
        "gram_backward": (s, a, None),
    }
    found = {name: failing(getattr(ops, name).default, *given, **QUICK) for name, given in calls.items()}
    assert not any(found.values()), f"opcheck finds {found}"
    for mode in range(9):
        for low, high in ((0.0, 0.0), (0.2, 0.7)):
            ours, theirs = (f(a, b, mode, low, high, 0, True, True) for f in (ops.haar_ll_l1, reference.haar_ll_l1))
            assert torch.equal(ours[1], theirs[1]), f"rule {mode} keeps other bytes than its twin"
            rest = mode, low, high, 0, 3, 7, 9, wide, -1 if low == high else 1
            ours, theirs = (f(one, ours[1], *rest) for f in (ops.haar_ll_l1_backward, reference.haar_ll_l1_backward))
            assert torch.allclose(ours, theirs, atol=1e-7), f"rule {mode}: backward differs from its twin"
    print(
        f"{str(dtype):14s} opcheck finds nothing in {len(calls)} operators; 9 rules with 2 ranges agree with their twins"
    )
single, double = (haar_ll_l1_loss(z(x), z(y)) for z in (torch.Tensor.float, torch.Tensor.double))
check("fp32 and fp64", single, double, 1e-6)

# %% [markdown]
# ### Forward mode and torch.func
#
# A registered gradient serves `backward()` and nothing else. `torch.func` has more: forward mode (`jvp`, the derivative
# in one direction, the *tangent*), per-sample gradients (`vmap` of `grad`), Hessians. Our operator refuses `grad` there,
# and for `jvp` it does worse: it answers 0, without a word. The package's answer is short: if such a transform is at work,
# call the twin in place of the operator. The twin is made of PyTorch's own operations, which follow every transform.

# %%
odd, v = x[..., :7, :9], y[..., :7, :9]


def dual(function):
    """Forward mode without torch.func."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(odd, v))).tangent


results = {
    "ours, jvp": outcome(lambda: f"tangent up to {torch.func.jvp(ll, (x,), (y,))[1].abs().max():.1f}"),
    "ours, torch.func.grad": outcome(lambda: f"{torch.func.grad(lambda x: ll(x).sum())(x).mean():.1f} per pixel"),
    "package, jvp": outcome(lambda: f"tangent up to {torch.func.jvp(haar_ll, (x,), (y,))[1].abs().max():.1f}"),
    "package, torch.func.grad": outcome(
        lambda: f"{torch.func.grad(lambda x: haar_ll(x).sum())(x).mean():.1f} per pixel"
    ),
    "package, dual numbers": outcome(lambda: "a tangent" if dual(haar_ll) is not None else "no tangent"),
}
for name, result in results.items():
    print(f"{name:26s}{result}")
assert results["ours, jvp"] == "tangent up to 0.0", "LL of y is not 0"
assert results["package, torch.func.grad"] == "0.5 per pixel" and results["package, dual numbers"] == "a tangent"
check("jvp of a linear map is the map", torch.func.jvp(haar_ll, (odd,), (v,))[1], haar_ll(v), 1e-6)
check("with dual numbers", dual(haar_ll), haar_ll(v), 1e-6)

each = torch.func.vmap(torch.func.grad(lambda a, b: haar_ll_l1_loss(a[None], b[None])))(odd, v)
p = odd.clone().requires_grad_()
(wanted,) = torch.autograd.grad(haar_ll_l1_loss(p, v, reduction="sum") / (3 * 4 * 5), p)
check("gradients per sample", each, wanted, 1e-8)
slope = torch.func.jvp(lambda f: gram_loss(f, v), (odd,), (v,))[1]
with torch.autocast("cpu", dtype=torch.bfloat16):
    check(
        "autocast does not round the twin", torch.func.jvp(lambda f: gram_loss(f, v), (odd,), (v,))[1] / slope, 1, 1e-5
    )
    check("nor a pair of two number types", gram_loss(odd.bfloat16(), v), gram_loss(odd.bfloat16().float(), v), 1e-9)

# %% [markdown]
# ## 4 · One node of the graph
#
# To `torch.compile` an operator is one *node*: it goes in and comes out whole. Count the nodes that forward and backward
# consist of, for the loss written in three ways. (`aot_autograd` hands both graphs to a backend. Ours counts and runs them.)


# %%
def ll_slices(x):
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2


versions = {
    "slices": lambda x, y: (ll_slices(x) - ll_slices(y)).abs().mean(),
    "pooled": lambda x, y: 2 * F.avg_pool2d(x - y, 2).abs().mean(),
    "package": haar_ll_l1_loss,
}


def nodes(loss):
    """What forward and backward consist of when compiled as a whole; the gradient is checked."""
    names = {}

    def counting(side):
        def compiler(graph, inputs):
            calls = [n for n in graph.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
            names[side] = [str(n.target) for n in calls]
            return make_boxed_func(graph.forward)

        return compiler

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward"))
    p = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(torch.compile(loss, backend=backend, fullgraph=True)(p, y), p)
    (wanted,) = torch.autograd.grad(haar_ll_l1_loss(p, y), p)
    return names, (ours - wanted).abs().max()


counted = {name: nodes(loss) for name, loss in versions.items()}
for name, (_, difference) in counted.items():
    check(f"gradient of {name}, compiled", difference, 0, 1e-7)
print("forward: ", *counted["package"][0]["forward"])
print("backward:", *counted["package"][0]["backward"])

# %%
sizes = {name: [len(found[side]) for side in ("forward", "backward")] for name, (found, _) in counted.items()}
figure, axes = panels(width=6.4, height=2.0)
ahead, behind = zip(*sizes.values(), strict=True)
axes.barh(range(3), ahead, color="#0072B2", label="forward")
bars = axes.barh(range(3), behind, left=ahead, color="#E69F00", hatch="//", label="backward")
axes.bar_label(bars, [f"{f} + {b}" for f, b in sizes.values()], padding=4, size=9)
axes.set_yticks(range(3), sizes)
axes.set(xlabel="nodes of the compiled graphs", xlim=(0, 1.15 * max(map(sum, sizes.values()))), ylim=(2.5, -0.5))
axes.legend(frameon=False, loc="lower right")
alt = ", ".join(f"{name} {f} and {b}" for name, (f, b) in sizes.items())
show(figure, f"Nodes of the graphs of the LL loss, forward and backward: {alt}.")
assert sum("rfsr_ext" in n for side in counted["package"][0].values() for n in side) == 2

# %% [markdown]
# **What to see.** The package is one node forward and one backward. A code
# generator such as `inductor` may fuse the slices' nodes into fewer kernels; then it competes with ours, and the
# repository's benchmark lets it. It cannot fuse *into* our node. That is the price of an operator: nobody
# can put a multiplication before it into the same pass over memory.
#
# ## 5 · What a warp loads
#
# A GPU runs threads in groups of 32, a *warp*. The 32 addresses of one load instruction go to memory together, as
# *sectors* of 32 bytes. If neighbors in the warp read neighbors in memory, few sectors serve all; that is called
# *coalescing*. Nobody needs a GPU to count them: the index formulas are in the source. Scalar, a thread per coefficient:
#
# ```cpp
# // csrc/cuda/haar.cu
# const i64 j = k % w, i = k / w % h, plane = k / w / h;
# ```
#
# And the fused loss, where a thread takes the eight pixels of two rows that one byte of signs stands for, in loads of 16
# bytes (a `Pack` of eight numbers is two loads in fp32 and one in bf16):
#
# ```cpp
# // csrc/cuda/haar.cu
# const i64 m = k % bytes, i = k / bytes % h, c = k / bytes / h;
# ```
#
# For comparison a mapping that reads well and is bad: `i = k % h, j = k / h`. **A simulation: the first warp, a plane of
# 512 × 512, one of the two pictures.** In the table below, *asked* counts sectors load by load, *moved* counts each one
# once, and *used* is how many the wanted bytes would fill.

# %%
WIDTH, HEIGHT = 512, 512
BAND, BYTES = (WIDTH + 1) // 2, ((WIDTH + 1) // 2 + 3) // 4  # coefficients of a row, and bytes of their signs


def scalar(lane):
    """haar_ll_kernel: four loads of one number, as (row, first column, numbers)."""
    i, j = divmod(lane, BAND)
    return [(2 * i + r, 2 * j + c, 1) for r in (0, 1) for c in (0, 1)]


def packs(lane, size):
    """haar_ll_l1_kernel: eight numbers of two rows, 16 bytes at a time."""
    i, m = divmod(lane, BYTES)
    count = 16 // size
    return [(2 * i + r, 8 * m + start, count) for r in (0, 1) for start in range(0, 8, count)]


def down(lane):
    j, i = divmod(lane, HEIGHT // 2)
    return [(2 * i + r, 2 * j + c, 1) for r in (0, 1) for c in (0, 1)]


def requests(loads, size):
    """For each load instruction the bytes that the 32 lanes want, as a set of addresses."""
    wanted = [set() for _ in loads(0)]
    for lane in range(32):
        for request, (row, column, count) in zip(wanted, loads(lane), strict=True):
            start = (row * WIDTH + column) * size
            request.update(range(start, start + count * size))
    return wanted


def sectors(addresses):
    return {address // 32 for address in addresses}


# %%
mappings = {
    "haar_ll, fp32": (scalar, 4), "loss, fp32": (lambda lane: packs(lane, 4), 4),
    "loss, bf16": (lambda lane: packs(lane, 2), 2), "down, fp32": (down, 4),
}  # fmt: skip
traffic = {}
for name, (loads, size) in mappings.items():
    wanted = requests(loads, size)
    asked, moved = sum(len(sectors(request)) for request in wanted), len(sectors(set().union(*wanted)))
    used, times = sum(map(len, wanted)) / 32, len(wanted)
    traffic[name] = {"loads": times, "asked": asked, "moved": moved, "used": used,
                     "loads per 128 coefficients": times * 4 * size * 4 / used}  # fmt: skip
print(pd.DataFrame(traffic).to_string(float_format=lambda value: f"{value:.0f}"))
check("bf16: no sector is asked for twice", traffic["loss, bf16"]["asked"], traffic["loss, bf16"]["used"], 0)
check("down: sectors moved", traffic["down, fp32"]["moved"], 4 * traffic["down, fp32"]["used"], 0)

# %%
figure, axes = panels(4, 1, width=7.2, height=4.6, sharex=True)
said = {n: "{loads} loads ask for {asked} sectors, {moved} different".format(**t) for n, t in traffic.items()}
for axis, (name, (loads, size)) in zip(axes, mappings.items(), strict=True):
    picture = np.zeros((HEIGHT, WIDTH * size // 4))  # words of 4 bytes
    for number, request in enumerate(requests(loads, size), start=1):
        picture.ravel()[[address // 4 for address in request]] = number
    axis.imshow(picture[:8, :256], cmap=ListedColormap(["white", *COLORS[:4]]), vmin=0, vmax=4, aspect="auto",
                interpolation="nearest", extent=(0, 1024, 8, 0))  # fmt: skip
    axis.vlines(range(0, 1025, 32), 0, 8, color="0.75", linewidth=0.4)
    axis.set_title(f"{name}: {said[name]}" + ", in 64 rows" * name.startswith("down"), size=9)
    axis.set(ylabel="row", yticks=[0, 4, 8])
axes[-1].set(xlabel="byte of the row; a line at each sector of 32")
alt = "; ".join(f"{name}: {text}" for name, text in said.items())
show(figure, f"What one warp reads of a plane, colored by load instruction, simulated. {alt}.")

# %% [markdown]
# **What to see.** Colors are load instructions. *down* touches a sector for each pair of numbers: three quarters of what
# memory sends is thrown away, unless a cache keeps it until a later warp comes. The other three use every byte they move.
# They differ in how often they ask. The scalar kernel needs 16 loads for 128 coefficients, the packs 4, in bf16 2. Each
# fp32 load leaves holes (the colors alternate), which the next load fills from the first-level cache; in bf16 there
# are none. Exercise 2 closes them in fp32.
#
# ### Banks
#
# Inside a block, shared memory has 32 *banks*, each 4 bytes wide: word $a$ lies in bank $a \bmod 32$. Two lanes that want
# different words of one bank wait for each other. A load of 16 bytes is served for eight lanes at a time, 128 bytes. (That
# is how NVIDIA's GPUs behave, not a promise of the manual.) In the backward pass of the Gram loss, lane $4g+t$ reads
# four numbers of row $t$ from column $4g$ on, and the package pads each row by 32 bytes:
#
# ```cpp
# // csrc/cuda/gram.cu
# // A slab of a matrix, one row per channel. The padding lets lanes that read different rows meet no bank twice.
# template <class T, int kColumns>
# using Slab = T[kSlab][kColumns + 32 / sizeof(T)];
# ```


# %%
def words_of(lane, pitch):
    """Words of 4 bytes that a lane reads; a row has `pitch` words."""
    g, t = divmod(lane, 4)
    return [t * pitch + 4 * g + e for e in range(4)]


def turns(pitch):
    """How often the busiest bank is asked, at worst, by eight lanes that are served together."""
    worst = 0
    for first in range(0, 32, 8):
        words = {word for lane in range(first, first + 8) for word in words_of(lane, pitch)}
        worst = max(worst, *Counter(word % 32 for word in words).values())
    return worst


figure, axes = panels(2, 1, width=6.8, height=2.9, sharex=True)
for axis, pitch in zip(axes, (128, 136), strict=True):
    picture = np.zeros((4, 32))
    for lane in range(8):
        for word in words_of(lane, pitch):
            picture[lane % 4, word % 32] = 1 + lane // 4
        middle = words_of(lane, pitch)[0] % 32 + 1.5
        axis.text(middle, lane % 4, f"lane {lane}", ha="center", va="center", size=8, color="white")
    axis.imshow(picture, cmap=ListedColormap(["0.93", COLORS[0], COLORS[1]]), vmin=0, vmax=2, aspect="auto")
    axis.set_title(f"rows of {pitch} words: {turns(pitch)} turn{'s' * (turns(pitch) > 1)}", size=9)
    axis.set(ylabel="row", yticks=range(4))
axes[1].set(xlabel="bank")
show(figure, "Banks that the first 8 lanes read, row by row, simulated. Rows of 128 words: all in banks 0 to 7, "
     f"{turns(128)} turns. Rows padded to 136 words: a staircase over all 32 banks, {turns(136)} turn.")  # fmt: skip
check("turns without and with padding", [turns(128), turns(136), turns(64), turns(72)], [4, 1, 4, 1], 0)

# %% [markdown]
# **What to see.** Without padding the rows lie exactly above each other, and four lanes queue at each of eight banks
# while 24 are idle. Eight words more per row shift each row by a quarter of the banks.
#
# Not in this notebook, because only a GPU can show them: how many warps a processor can keep in flight (*occupancy*), what
# the L2 cache saves, and a profiler's page of either. Whoever has one: `make bench` first, then NVIDIA's `ncu`.
#
# ## 6 · Tensor cores, as arithmetic
#
# A tensor core multiplies small matrices: one instruction of a warp does 16×16 times 16×8. Each lane holds a few entries
# of each, the *fragment*. With $g$ = lane / 4 and $t$ = lane mod 4, the comment in `csrc/cuda/instructions.cuh` says which.
# A lane's four entries of a row lie at depths $2t, 2t+1, 2t+8, 2t+9$: not neighbors, so four small loads. The package
# uses a freedom: in a sum over depth any order will do, as long as both matrices use the same. So lane $t$ loads 8
# neighbors of bf16, 16 bytes, and *declares* them to be those depths of two instructions.

# %%
rows = {"A": Counter(), "B": Counter(), "sum": Counter()}
order = np.full((2, 16), -1)  # pixel that stands at each depth of two instructions
for lane in range(32):
    g, t = divmod(lane, 4)
    depths = [2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9]
    rows["A"].update((g + down, depth) for down in (0, 8) for depth in depths)
    rows["B"].update((depth, g) for depth in depths)
    rows["sum"].update((g + down, 2 * t + right) for down in (0, 8) for right in (0, 1))
    for step in range(2):
        order[step, depths] = 8 * t + 4 * step + np.arange(4)  # Slice::set, from a pack of eight neighbors
assert all(set(held.values()) == {1} for held in rows.values()), "each entry has one lane"
print({name: f"{len(held)} entries, {len(held) // 32} per lane" for name, held in rows.items()})
print("pixels at depth 0 … 15 of the first instruction:", *order[0])
check("two instructions take each of 32 pixels once", np.sort(order.ravel()), np.arange(32), 0)
A, B = torch.randint(-9, 10, (2, 16, 32), generator=torch.Generator().manual_seed(0)).double().numpy()
check("any order of the depth gives the product", sum(A[:, at] @ B[:8, at].T for at in order), A @ B[:8].T, 0)

# %% [markdown]
# ### fp32 from three bf16 numbers
#
# Tensor cores take bf16, which has 8 significant bits, and fp32 has 24. But 24 is three times 8: each fp32 number is
# *exactly* the sum of three bf16 numbers, each what rounding left over of those before it. A product of two such sums has
# nine terms. How many are needed?
#
# ```cpp
# // csrc/cuda/products.cuh
# const uint32_t pair = bf16_pair(x, y);
# pairs[term][place] = pair;
# x -= float_of(pair << 16);  // exact
# y -= float_of(pair & 0xffff0000u);
# ```


# %%
def terms(x, count=3):
    """bf16 numbers, largest first, that add up to x."""
    found = []
    for _ in range(count):
        found.append(x.bfloat16().float())
        x = x - found[-1]
    return found


g = torch.Generator().manual_seed(0)
a, b = (torch.rand(2, 200_000, generator=g) + 1) * 2.0 ** torch.randint(-20, 20, (2, 200_000), generator=g)
x1, x2, x3 = terms(a)
check("three terms are the number", (x1.double() + x2.double() + x3.double() - a.double()).abs().max(), 0, 0)
assert ((x2 / a).abs() <= 2**-8).all() and ((x3 / a).abs() <= 2**-17).all(), "as products.cuh says"
exact = a.double() * b.double()


# %%
def largest(value):
    """Largest relative error of the products, in units of 2^-24: what rounding to fp32 may take off."""
    return ((value - exact).abs() / exact.abs()).max().item() * 2**24


split_a, split_b = ([part.double() for part in terms(z)] for z in (a, b))
errors = {}
for products, orders in ((1, 1), (3, 2), (6, 3), (9, 5)):  # x_i y_j of i + j below `orders`
    chosen = [(i, j) for i in range(3) for j in range(3) if i + j < orders]
    assert len(chosen) == products
    errors[products] = largest(sum(split_a[i] * split_b[j] for i, j in chosen))


def tf32(x):
    """x to 11 significant bits."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


tf = [(tf32(z).double(), tf32(z - tf32(z)).double()) for z in (a, b)]
others = {"rounding to fp32": largest((a * b).double()), "TF32 products: 1": largest(tf[0][0] * tf[1][0])}
others["TF32 products: 3"] = largest(tf[0][0] * tf[1][0] + tf[0][0] * tf[1][1] + tf[0][1] * tf[1][0])
for name, error in ({f"bf16 products: {n}": e for n, e in errors.items()} | others).items():
    print(f"{name:18s}{error:12.3g} · 2^-24")
assert errors[6] <= 1.001, "as products.cuh says"
check("9 products are the product", errors[9], 0, 1e-6)

# %%
figure, axes = panels(width=6.4, height=2.8)
axes.semilogy([1, 3, 6], [errors[n] for n in (1, 3, 6)], "o-", color=COLORS[0])
for (name, error), color, style in zip(
    others.items(), ("#000000", COLORS[1], COLORS[2]), ("-", "--", "-."), strict=True
):
    axes.axhline(error, color=color, linestyle=style, linewidth=1)
    axes.text(9.1, error, name, va="center", size=9, color=color)
axes.set(xlabel="bf16 products per fp32 product", ylabel="largest error / 2⁻²⁴", xlim=(0.5, 9), xticks=[1, 3, 6])
alt = ", ".join(f"bf16 products: {n}, {errors[n]:.3g}" for n in (1, 3, 6))
said = ", ".join(f"{name} {error:.3g}" for name, error in others.items())
show(figure, f"Largest relative error of a product, in units of 2 to the power of -24. {alt}; for comparison {said}.")

# %% [markdown]
# **What to see.** One product of bf16 is off by up to 0.7 percent. Each further order gains a factor of 300 to 450, two
# digits and a half. With six products the error is that of fp32 itself, and the last three would
# change nothing that fp32 can hold. (Tensor cores also cut sums off instead of rounding them. So the kernel lets
# them add only 16 numbers of fp32, and ordinary additions take it from there.)
#
# ### When is a Gram matrix limited by bytes?
#
# Each number of a feature map meets those of $C$ channels: $C$ operations for $s$ bytes, if the matrix is symmetric
# and everything is read from memory once. The rates are those that the package's benchmark takes from NVIDIA's data
# sheet of the H200 (`benchmarks/measure.py`; 4.8 TB/s, dense products). **An estimate; nothing below was measured.**

# %%
BANDWIDTH = 4.8e12
UNITS = {  # operations per second, bytes of a number
    "fp32, no tensor cores": (67e12, 4), "fp32, six bf16 products": (989e12 / 6, 4),
    "TF32": (495e12, 4), "bf16": (989e12, 2),
}  # fmt: skip
numbers = 8 * 512 * 512  # per channel: a batch of conv1_2's size
print("floors in µs of G of [8, C, 512, 512], by arithmetic / by bytes")
for name, (rate, size) in UNITS.items():
    floors = {c: (1e6 * numbers * c * c / rate, 1e6 * numbers * c * size / BANDWIDTH) for c in (64, 128, 256, 512)}
    print(f"{name:24s}" + "".join(f"C={c}: {f:5.0f} /{b:5.0f}   " for c, (f, b) in floors.items()),
          f"they meet at C = {rate / BANDWIDTH * size:.0f}")  # fmt: skip
meet = {name: rate / BANDWIDTH * size for name, (rate, size) in UNITS.items()}

figure, axes = panels(width=6.8, height=3.2)
intensity = np.geomspace(4, 600, 200)
styles = zip(UNITS.items(), COLORS, ("o", "s", "^", "D"), ("-", "--", "-.", ":"), strict=False)
for (name, (rate, size)), color, marker, line in styles:
    axes.loglog(intensity, np.minimum(BANDWIDTH * intensity, rate) / 1e12, line, color=color)
    points = np.array([64, 128, 256, 512]) / size
    axes.loglog(points, np.minimum(BANDWIDTH * points, rate) / 1e12, marker, color=color, fillstyle="none", label=name)
axes.set(xlabel="operations per byte", ylabel="TFLOP/s at most")
axes.legend(frameon=False, fontsize=8, loc="upper left", title="C = 64, 128, 256, 512", title_fontsize=8)
alt = ", ".join(f"{name} at C = {c:.0f}" for name, c in meet.items())
show(figure, f"Roofline of an H200, an estimate: Gram matrices of 64 to 512 channels. The limits meet for {alt}.")
check("without tensor cores every layer of VGG is limited by arithmetic", meet["fp32, no tensor cores"] < 64, True, 0)
check("with them C = 64 and 128 are limited by bytes", 128 < meet["fp32, six bf16 products"] < 256, True, 0)

# %% [markdown]
# **What to see.** Six products instead of one sound like six times the work. Yet they are two and a half times as fast
# as plain units, and lift the layers of 64 and 128 channels onto the slope, where only bytes count. There a faster
# product gains nothing: TF32 has the same floor and fewer digits. Half the bytes do gain: bf16 is twice as fast there.
#
# ## 7 · What is it worth?
#
# *Amdahl's law:* if a part takes the share $p$ of the time and becomes $s$ times as fast, the whole becomes
# $1/(1-p+p/s)$ times as fast. So ask for $p$ first. The repository's benchmark timed both, whole iterations and the loss
# alone, on two threads of a Xeon, in one run where all contestants took turns; times are medians with 20 % and 80 %
# quantiles. `results/loss_share.csv` holds these lines of its JSON. In the repository this makes it:
#
# ```python
# cases = json.load(open("benchmarks/results/intel-xeon-processor-avx512-2-threads.json"))["cases"]
# rows = [{"case": case["title"]} | row for case in cases for row in case["rows"] if "median" in row]
# frame = pd.DataFrame(rows)[["case", "name", "median", "q20", "q80", "peak_bytes"]]
# frame = frame[frame.case.str.contains("iteration|VGGGramLoss.*512")]
# frame.to_csv("notebooks/results/loss_share.csv", index=False, float_format="%.6g")
# ```
#
# From share and speed of the loss alone follows a *forecast* for the whole, which the measured whole can contradict.

# %%
stored = pd.read_csv("results/loss_share.csv").set_index(["case", "name"])
worth = []
for (case, name), peer in stored[[":" not in name and name != "ours" for _, name in stored.index]].iterrows():
    ours, our_loss, loss = (stored.loc[case, n] for n in ("ours", "ours: the loss alone", f"{name}: the loss alone"))
    p, s = loss["median"] / peer["median"], loss["median"] / our_loss["median"]
    worth.append({
        "case": case.replace("RFSR iteration, ", "").replace("VGGGramLoss, fwd+bwd, 512² image", "style loss alone"),
        "against": name, "share %": 100 * p, "loss faster": s, "forecast": 1 / (1 - p + p / s),
        "measured": peer["median"] / ours["median"], "low": peer["q20"] / ours["q80"],
        "high": peer["q80"] / ours["q20"], "memory": peer["peak_bytes"] / ours["peak_bytes"],
    })  # fmt: skip
worth = pd.DataFrame(worth)
print(worth.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
iterations = worth[worth.case != "style loss alone"]
assert iterations["share %"].max() < 4 and iterations["forecast"].max() < 1.015 and worth["forecast"].max() < 1.12

# %%
figure, (left, right) = panels(columns=2, width=7.2, height=4.2, sharey=True)
at = np.arange(len(worth))
left.errorbar(worth.measured, at, xerr=[worth.measured - worth.low, worth.high - worth.measured], fmt="o",
              color=COLORS[0], label="measured")  # fmt: skip
left.plot(worth.forecast, at, "|", color=COLORS[1], markersize=14, linestyle="none", label="forecast")
right.barh(at, worth.memory - 1, left=1, color=COLORS[2])
left.set_yticks(at, [f"{row.case}\n{row.against}" for row in worth.itertuples()], size=7)
left.set(xlabel="time, theirs / ours", xlim=(0.85, 1.2), ylim=(len(worth) - 0.5, -0.5))
left.legend(frameon=False, fontsize=8, loc="upper left")
right.set(xlabel="peak memory, theirs / ours")
for axis in (left, right):
    axis.axvline(1, color="#000000", linewidth=0.8)
inside = int(((worth.low <= worth.forecast) & (worth.forecast <= worth.high)).sum())
show(figure, f"Whole steps with other losses over those with ours. Time: forecasts of {worth.forecast.min():.3f} to "
     f"{worth.forecast.max():.3f}, {inside} of {len(worth)} within what was measured. Peak memory: {worth.memory.min():.2f} "
     f"to {worth.memory.max():.2f} times ours.")  # fmt: skip

# %% [markdown]
# **What to see.** Left, the structure loss takes less than half a percent of its iteration, so no kernel can make that
# iteration half a percent faster: **1.00 times, nothing.** In the reward window the style loss takes two to four percent,
# and the forecast is about one percent at most; what is measured scatters round one by more than that, and the quickest other
# way is *ahead* of ours. The style loss by itself, with its VGG network, should gain five to ten percent, and there the
# medians say 6 to 11. Right, memory: in the windows the others take from 9 percent *less* to 8 percent more, and for the
# style loss alone 7 to 20 percent more. That is not much either, but it may decide whether a batch fits.
#
# Do not believe a file. Measure the share here, on the mini model, for one iteration of the structure window (these
# numbers are of the computer that built this page, in processor time, so that other programs do not count):

# %% tags=["nbval-ignore-output"]
model = load_model("mini")
parameters = list(model.unfreeze().trained_parameters().values())
truth = cat[..., 92:156, 128:192]
condition = model.condition(F.avg_pool2d(truth, 4), [""])


def iteration(loss):
    """Three sampling steps without gradient, one with it, decoder, loss, gradient of all weights that are trained."""
    state = rollout(model, condition, 4, generators(0, [0]), num_inference_steps=10)
    image = model.decode(model.predict(state.latents, state.timestep, condition))
    torch.autograd.grad(loss(image, truth), parameters, allow_unused=True)


def seconds(action, repeats=3):
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return sorted(times[1:])[repeats // 2]  # the first one warms up


p = F.interpolate(condition.image, size=truth.shape[2:]).clone().requires_grad_()
alone = {name: seconds(lambda f=f: torch.autograd.grad(f(p, truth), p), 51) for name, f in versions.items()}
whole = {name: seconds(lambda f=f: iteration(f)) for name, f in versions.items()}
for name, seconds_whole in whole.items():
    print(
        f"{name:8s} loss {1e3 * alone[name]:6.3f} ms of {1e3 * seconds_whole:6.1f} ms: {100 * alone[name] / seconds_whole:.2f} %"
    )

# %% [markdown]
# Shares of a fraction of a percent, and the three wholes differ by more than that from run to run. A timing of
# whole iterations cannot even rank the losses.
#
# Now move the speed. The curves are Amdahl's law, the marks are shares from the table above.


# %%
def amdahl(p, s):
    return 1 / (1 - p + p / s)


MARKS = {
    "structure window": iterations[iterations.case == "structure window"]["share %"].max() / 100,
    "reward window": iterations[iterations.case == "reward window"]["share %"].max() / 100,
    "style loss alone": worth[worth.case == "style loss alone"]["share %"].max() / 100,
}


def draw(s):
    figure, axes = panels(width=6.4, height=2.8)
    shares = np.geomspace(5e-4, 1, 200)
    axes.semilogx(shares, amdahl(shares, 1e9), color="0.6", linestyle=":", label="a loss that takes no time")
    axes.semilogx(shares, amdahl(shares, s), color=COLORS[0], label=f"a loss {s:g} times as fast")
    for (name, p), marker, color in zip(MARKS.items(), "os^", COLORS[1:4], strict=True):
        axes.plot(p, amdahl(p, s), marker, color=color, label=f"{name}: {amdahl(p, s):.3f}")
    axes.set(xlabel="share of the loss in the whole", ylabel="the whole is faster by", ylim=(0.9, 3))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    said = ", ".join(f"{name} ({100 * p:.2g} percent) {amdahl(p, s):.3f}" for name, p in MARKS.items())
    return figure, f"Amdahl's law for a loss {s:g} times as fast. The whole becomes faster by, {said}."


speeds = explore(draw, values=[1.5, 2.6, 5, 20, 1000], label="the loss is faster by")
speeds

# %%
speeds.slider.value = 2.6
show(*draw(2.6))
check("no speed saves more than the share", amdahl(0.01, 1e12), 1 / 0.99, 1e-9)

# %% [markdown]
# **What to see.** The structure window's mark stays at 1.00 wherever the slider stands, and that of the reward window ends
# at 1.04, for a loss that takes no time at all. A share of one tenth is where a fast kernel begins to show. That happens
# where the network is small or is not run: in a pixel optimization (notebook 05), or in texture painted by Gram matrices
# (notebook 08).
#
# ### The better argument: what is kept
#
# For backward, PyTorch's operations keep tensors until backward has used them. They lie in memory beside everything that
# the network keeps, at the worst moment. `saved_tensors_hooks` shows them. What the loss was given is not counted: the
# network's own graph holds it anyhow.


# %%
def kept_bytes(loss, *inputs):
    """Bytes kept for backward beside the inputs, per number of the first input, which requires a gradient."""
    first, *rest = inputs
    first, kept = first.clone().requires_grad_(), {}
    given = {tensor.untyped_storage().data_ptr() for tensor in (first, *rest)}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(first, *rest)
    return sum(kept.values()) / first.numel()


# %%
def gram_eager(f, normalize=False):
    f = f.float()
    f = F.layer_norm(f, f.shape[1:]) if normalize else f
    return f.flatten(2) @ f.flatten(2).mT / f[0].numel()


features = torch.rand(1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
wanted = gram_matrix(features.flip(-1).square())
half, normal = features.bfloat16(), gram_matrix(features.square(), joint_layer_norm=True)
rows = {f"LL, {name}": kept_bytes(loss, x, y) for name, loss in versions.items()}
rows["Gram bf16, PyTorch"] = kept_bytes(lambda f: (gram_eager(f) - wanted).square().sum(), half)
rows["Gram bf16, package"] = kept_bytes(lambda f: gram_loss(f, target_gram=wanted), half)
rows["normed Gram, PyTorch"] = kept_bytes(lambda f: (gram_eager(f, True) - normal).square().sum(), features)
rows["normed Gram, package"] = kept_bytes(
    lambda f: gram_loss(f, target_gram=normal, joint_layer_norm=True), features
)  # fmt: skip
for name, kept in rows.items():
    print(f"{name:22s}{kept:7.4f} bytes kept per number of the input")
check("two bits for each of a quarter as many", rows["LL, package"], 2 / 8 / 4, 0)
check(
    "what it saves for 8 pictures of 512 × 512, MB", (rows["LL, pooled"] - 1 / 16) * 8 * 3 * 512**2 / 1e6, 31.06, 0.01
)
assert rows["Gram bf16, package"] < rows["Gram bf16, PyTorch"] / 10, "no copy of the features in fp32"
assert rows["normed Gram, package"] < rows["normed Gram, PyTorch"] / 10, "nor of the normalized ones"

# %% [markdown]
# The LL loss keeps a sixteenth or an eightieth. For features in bf16 or normalized ones, PyTorch's operations keep a
# second feature map of 4 bytes per number; the package keeps matrices of $C\times C$. For a VGG layer of 64 channels at
# 512 × 512 that is 67 MB for each picture. So say it this way: *the fused losses do not make RFSR faster. They make it
# need less, give the same bits with any number of threads, and are out of the way.*
#
# ## 8 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up).** Write the fake kernel of what the LL loss keeps: for pictures `x` of any size a tensor `[N, bytes]` of
# type `torch.uint8`. Two bits for each coefficient, four coefficients to a byte, each row rounded up to whole bytes. It must
# also work where `x` has no numbers.
# <details><summary>Hint</summary>`x.new_empty` makes a tensor beside `x`, with or without numbers. How many
# coefficients has a row of the LL band of an odd picture?</details>


# %%
def kept_fake(x):
    raise NotImplementedError


def verify_kept():
    for size in ((2, 3, 48, 64), (1, 3, 13, 17), (3, 1, 7, 2)):
        a = torch.rand(size)
        real = ops.haar_ll_l1(a, a, 0, 0.0, 0.0, 0, True, False)[1]
        ours = kept_fake(a.to("meta"))
        check(f"shape for {size}", ours.shape, real.shape, 0)
        assert ours.dtype == real.dtype and ours.is_meta, f"{ours.dtype} on {ours.device}"


exercise(1, verify_kept)


# %% [markdown]
# **Exercise 2.** Write a mapping for fp32 in which a warp reads the same 256 numbers of each of the rows 0 and 1, in four loads
# of 16 bytes per lane, and no load leaves holes.
# <details><summary>Hint</summary>In one load, neighbors in the warp read neighbors in memory: lane 0 the numbers 0 to 3,
# lane 1 the numbers 4 to 7. What is left for the second load of a row?</details>


# %%
def without_holes(lane):
    raise NotImplementedError  # a list of four (row, first column, numbers), as `packs` returns


def verify_holes():
    wanted = requests(without_holes, 4)
    theirs = requests(lambda lane: packs(lane, 4), 4)
    assert set().union(*wanted) == set().union(*theirs), "other bytes than those of packs"
    check("sectors of each load", [len(sectors(request)) for request in wanted], [16] * 4, 0)


exercise(2, verify_holes)


# %% [markdown]
# Then a lane no longer holds eight neighbors, and one byte of signs needs bits of two lanes. That is why the package does
# without it, and lets the cache fill the holes.
#
# **Exercise 3 (harder).** How many words must a row of `width` words be padded with, at least, so that lanes never wait for a
# bank? Rows begin at multiples of 16 bytes, so padding is a multiple of 4 words.
# <details><summary>Hint</summary>Eight lanes read pieces of 8 words in four rows. Where must row 1 begin, modulo 32,
# so that the four pieces fill all banks? There are two answers.</details>


# %%
def padding(width):
    raise NotImplementedError


def verify_padding():
    for width in (32, 36, 40, 64, 72, 100, 120, 128):
        ours = padding(width)
        assert ours % 4 == 0 and turns(width + ours) == 1, f"{width} + {ours} words: lanes wait"
        assert all(turns(width + less) > 1 for less in range(0, ours, 4)), f"{width} needs less than {ours}"


exercise(3, verify_padding)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Register an operator of your own trainer: the loss that takes most of its time. An answer names the share of a whole
#   step before you begin, what `opcheck` found, and the speed-up of the step beside Amdahl's forecast.
# * Find the smallest picture for which the fused loss holds less memory at its peak than `F.l1_loss` of slices, forward and
#   backward. An answer is a curve over size, counted from the tensors that autograd saves, and measured once.
#
# ## Summary
#
# * An operator has a schema, a kernel, a fake kernel and a gradient. Without a fake kernel a compiled program breaks in
#   two; without a gradient, training goes on and learns nothing.
# * `opcheck` finds wrong strides and shapes, `gradcheck` wrong and missing gradients. Test with odd sizes and with inputs
#   that are not contiguous.
# * Sectors and bank conflicts follow from index formulas and can be counted without a GPU; times cannot.
# * Six products of bf16 are as exact as one of fp32. With tensor cores, Gram matrices of few channels are limited by bytes.
# * In an RFSR iteration the losses take up to four percent, so a faster one is worth 1.00 or 1.01 times, which nobody can
#   measure. What the fused losses give is memory and equal bits.
#
# NAVIGATION
