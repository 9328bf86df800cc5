# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 13 · Fuse the kernels
#
# **You will turn one line of PyTorch into a kernel: as loop, vectors, simulated GPU threads, and C++ compiled here.**
#
# A quarter of a minute on two cores; nothing to download and no GPU needed. Needs the LL loss of notebook 05 and the Gram
# matrix of notebook 08, both repeated here in one line.
#
# NAVIGATION
#
# RFSR's structure loss and its Gram distance are short formulas over large arrays. How fast they run depends on how
# often they go to memory at least as much as on their arithmetic. Afterwards you can
#
# * count the bytes an operation moves, and say how fast it could be at best on a machine you only have a data sheet of,
# * see a race between threads, and cure it so that the result has the same bits every time,
# * write the backward pass so that no two threads write to one place, also at odd sizes,
# * compile a kernel and prove it right against the package.

# %%
import ctypes
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rfsr_ext import gram_loss, gram_matrix, haar_ll, haar_ll_l1_loss
from rfsr_ext.data import load_photograph
from rfsr_ext.notebook import COLORS, caught, check, exercise, explore, panels, pictures, show, together

cat = torch.from_numpy(load_photograph("chelsea").copy()).movedim(-1, 0)[None]  # [1, 3, 300, 451]: an odd width
coarse = F.interpolate(F.interpolate(cat, scale_factor=0.25, mode="area"), size=cat.shape[2:], mode="bilinear")
x13, y13 = coarse[:, :1, 100:113, 130:147], cat[:, :1, 100:113, 130:147]  # 13×17 pixels, both odd
a13, b13 = x13[0, 0].numpy(), y13[0, 0].numpy()

# %% [markdown]
# ## 1 · What is to be computed?
#
# Equation 2 of the paper: the mean absolute difference of two LL bands. `coarse` is the cat with its detail averaged
# away, `cat` is the truth. First the definition, word by word, as a loop. It may be slow; what counts is that one reads
# it and believes it.


# %%
def loss_loop(x, y):
    """Equation 2 for [H, W] arrays; an odd end repeats its last row or column."""
    height, width = x.shape
    distances = []
    for i in range(0, height, 2):
        for j in range(0, width, 2):
            r, c = min(i + 1, height - 1), min(j + 1, width - 1)
            ll_x = (x[i, j] + x[i, c] + x[r, j] + x[r, c]) / 2
            ll_y = (y[i, j] + y[i, c] + y[r, j] + y[r, c]) / 2
            distances.append(abs(ll_x - ll_y))
    return sum(distances) / len(distances)


check("loop and package, 13×17", loss_loop(a13, b13), haar_ll_l1_loss(x13, y13), 1e-6)

# %%
crop = (slice(None), slice(None), slice(92, 156), slice(128, 192))
d = haar_ll(coarse[crop]) - haar_ll(cat[crop])
shares = {name: 100 * (d.sign() == s).double().mean().item() for name, s in (("plus", 1), ("minus", -1))}
show(
    pictures(
        [coarse[crop][0], cat[crop][0], d[0, 0].sign() / 2 + 0.5],
        ["x: coarse", "y: cat", "sign of LL(x) − LL(y)"],
        tile=2.2,
    ),
    "The cat's eye, 64 pixels wide, coarse and sharp, and the sign of the difference of their LL bands in red: one "
    f"of 32 by 32 coefficients per 2 by 2 block. In all channels {shares['plus']:.0f} percent are plus (white) and "
    f"{shares['minus']:.0f} percent minus (black).",
)

# %% [markdown]
# **What to see.** The two pictures on the left are all that the loss must *read*. For the forward pass it must write one
# number; for the backward pass the picture on the right is enough, because the derivative of $|d|$ is the sign of $d$.
# Everything else that a program reads or writes is its own doing.
#
# ## 2 · The vector form
#
# In PyTorch nobody writes that loop. Slices do it for all blocks at once.


# %%
def ll_slices(x):
    if x.shape[2] % 2 or x.shape[3] % 2:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2


def loss_slices(x, y):
    return (ll_slices(x) - ll_slices(y)).abs().mean()


def loss_pooled(x, y):
    """LL is linear, so one band of the difference is enough; for even sizes."""
    return 2 * F.avg_pool2d(x - y, 2).abs().mean()


check("slices and package, 300×451", loss_slices(coarse, cat), haar_ll_l1_loss(coarse, cat), 1e-6)
check("pooled and package, 64×64", loss_pooled(coarse[crop], cat[crop]), haar_ll_l1_loss(coarse[crop], cat[crop]), 1e-6)

# %% [markdown]
# ## 3 · How many bytes does that move?
#
# Each PyTorch operation reads its inputs from memory and writes its result back. The next one reads it again. First
# on paper, for the forward pass, per pixel, which here means one number of one channel. A number takes $s=4$ bytes, and
# a band has a quarter of the pixels.
#
# | operation | slices | fused |
# |---|---|---|
# | both bands: three additions each, 2 read + 1 written | $2\cdot3\cdot\tfrac34s=4.5\,s$ | – |
# | both bands: halve, 1 read + 1 written | $2\cdot\tfrac24s=1\,s$ | – |
# | difference; absolute value; mean | $\tfrac34s+\tfrac24s+\tfrac14s=1.5\,s$ | – |
# | read x and y once | – | $2\,s$ |
# | write the signs, two bits per coefficient | – | $\tfrac1{16}$ B |
# | **sum** | $7\,s=28$ B | $8\tfrac1{16}$ B |
#
# Now let PyTorch report every operation as it runs, also during backward.


# %%
class Meter(TorchDispatchMode):
    """Notes the bytes that each operation reads and writes; a view of a tensor moves nothing."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        sides = [[t for t in tree_leaves(side) if isinstance(t, torch.Tensor)] for side in ((args, kwargs), out)]
        memory = [{t.untyped_storage().data_ptr() for t in side if t.numel()} for side in sides]
        if not memory[0] & memory[1]:
            # an expanded number is still one number
            self.lines.append([sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in side) for side in sides])
        return out


def bytes_per_pixel(loss, x, y):
    """(forward, backward, operations of both), the bytes divided by the numbers in x."""
    x = x.clone().requires_grad_()
    with Meter() as forward:
        value = loss(x, y)
    with Meter() as backward:
        torch.autograd.grad(value, x)
    moved = [sum(map(sum, meter.lines)) / x.numel() for meter in (forward, backward)]
    return *moved, len(forward.lines) + len(backward.lines)


versions = {"slices": loss_slices, "pooled": loss_pooled, "package": haar_ll_l1_loss}
even = coarse[..., :288, :448], cat[..., :288, :448]
moved = {name: bytes_per_pixel(loss, *even) for name, loss in versions.items()}
check("slices, forward", moved["slices"][0], 28, 1e-3)
check("package, forward", moved["package"][0], 8 + 1 / 16, 1e-3)
assert 4 + 1 / 16 <= moved["package"][1] < 4.2, "backward: write the gradient, read the signs"

# %%
forward, backward, operations = map(np.array, zip(*moved.values(), strict=True))
figure, axes = panels(width=6.4, height=2.3)
axes.barh(range(3), forward, color="#0072B2", label="forward")
bars = axes.barh(range(3), backward, left=forward, color="#E69F00", hatch="//", label="backward")
axes.bar_label(bars, [f"{total:.1f} B" for total in forward + backward], padding=4, size=9)
axes.set_yticks(range(3), [f"{name},\n{n} operations" for name, n in zip(versions, operations, strict=True)])
axes.set(xlabel="bytes read and written per pixel", xlim=(0, 120), ylim=(2.5, -0.5))
axes.legend(frameon=False, loc="lower right")
rows = "; ".join(f"{name} {f:.2f} and {b:.2f} in {n} operations" for name, (f, b, n) in moved.items())
show(figure, f"Bytes per pixel, forward and backward: {rows}.")

# %% [markdown]
# **What to see.** The formula is the same, the traffic is not. The slices are worst in *backward*: the gradient of each
# slice is a full picture of zeros with a quarter filled in, and four of those are added. `avg_pool2d` avoids that.
# Fusing both passes leaves only what must be moved.
#
# ## 4 · How fast could it be?
#
# A machine has two limits: how many bytes it moves per second, and how many additions and multiplications it does. No
# program is faster than either allows; the time that remains is the *floor*. Which limit counts follows from the
# *arithmetic intensity*, operations per byte. (From here on an *operation* is one addition or multiplication, a FLOP,
# except where a line counts PyTorch's.) We take a GPU's two numbers from its data sheet: NVIDIA names 4.8 TB/s and,
# without tensor cores (units for products of small matrices), 67 TFLOP/s for the H200 in fp32. **No GPU has run here;
# what follows is arithmetic, not measurement.** Section 9 measures this machine.

# %%
H200 = {"bytes": 4.8e12, "flops": 67e12}
pixels = 8 * 3 * 512 * 512  # a training batch
for name, (forward, backward, operations) in moved.items():
    floors = [1e6 * pixels * b / H200["bytes"] for b in (forward, backward)]
    print(f"{name:8s} floor on an H200: {floors[0]:5.1f} + {floors[1]:5.1f} µs, in {operations} operations")
balance = H200["flops"] / H200["bytes"]
print(f"the two limits meet at {balance:.0f} FLOP per byte")
for kind, flops, size in (
    ("no tensor cores, fp32", 67e12, 4),
    ("tensor cores, TF32", 494e12, 4),
    ("tensor cores, bf16", 989e12, 2),
):
    limits = {c: "arithmetic" if c / size > flops / H200["bytes"] else "bytes" for c in (64, 128, 256, 512)}
    print(f"  {kind:22s} they meet at {flops / H200['bytes']:4.0f}; Gram is limited by", limits)

# FLOP per block of four pixels: fused 4 differences, 3 sums, |d|, add it up; slices twice 3 sums and a halving, then
# the difference, |d|, add it up; pooled 4 differences, 3 sums and a division, |d|, add it up
work = {"slices": 11 / 4, "pooled": 10 / 4, "package": 9 / 4}
points = {"LL, slices": work["slices"] / 28, "LL, fused": work["package"] / 8}
points |= {f"Gram, C = {c}": c / 4 for c in (64, 512)}  # C FLOP for each number of 4 bytes that is read


# %%
def roofline(machine, points, rates=None):
    """Both limits over the intensity; the points lie on them unless rates say what was measured."""
    figure, axes = panels(width=6.4, height=3.0)
    x = np.geomspace(0.02, 300, 200)
    axes.loglog(x, np.minimum(machine["bytes"] * x, machine["flops"]) / 1e9, color="#000000")
    places = {"slices": {"xytext": (-7, -13), "ha": "right"}, "package": {"xytext": (8, 2)}}  # for the labels
    for (name, at), marker, color in zip(points.items(), "os^D", COLORS[1:4] + COLORS[:1], strict=False):
        rate = min(machine["bytes"] * at, machine["flops"]) / 1e9 if rates is None else rates[name]
        axes.loglog([at], [rate], marker, color=color, fillstyle="none", markeredgewidth=2)
        place = places.get(name, {"xytext": (8, -13)})
        axes.annotate(name, (at, rate), **place, textcoords="offset points", size=9, color=color)
    axes.set(xlabel="operations per byte", ylabel="GFLOP/s at most" if rates is None else "GFLOP/s")
    return figure


where = ", ".join(f"{n} at {at:.3g} on the {'slope' if at < balance else 'flat part'}" for n, at in points.items())
show(
    roofline(H200, points), f"Roofline of an H200: a slope up to {balance:.0f} operations per byte, then flat. {where}."
)

# %% [markdown]
# **What to see.** The LL loss lives far down the slope: its arithmetic is free, only bytes count, and fusing moves it
# to the right. The Gram loss is on the other side, limited by arithmetic: each number meets those of $C$ channels, with
# a multiplication and an addition each time, and symmetry saves half. So the two need different kernels: the first must
# touch memory once (sections 5 to 7), the second must use each loaded number often (section 8).
#
# That is so in the figure, which leaves the tensor cores out. With them products cost so little that the limits meet far
# to the right (the lines above; rates of dense products from the data sheet): the Gram of few channels is then limited by
# bytes, too. The package's CUDA kernel uses them, and so has both things to mind.
#
# There is a third cost: on a GPU each of PyTorch's operations is at least one *launch*, which takes some microseconds
# whatever it does. A floor of ten microseconds in two launches is worth more than the same floor in twenty.
#
# ## 5 · Threads, simulated
#
# A GPU runs one small function, the *kernel*, in thousands of *threads* at once. Threads come in *blocks*; a block
# has a little memory of its own (`shared`) and can wait for all its threads (`__syncthreads()`, a *barrier*). Nothing
# else is promised: threads advance in any order, and so do blocks. That can be simulated in fifteen lines. A kernel
# is a Python generator here; at a `yield` any other thread of the block may go on, and `yield "sync"` waits for all of
# them. (Whole blocks run one after another here, in any order; on a GPU they overlap as well.)


# %%
def launch(kernel, blocks, threads, *memory, schedule=0):
    """Run kernel(block, thread, shared, *memory) in every thread, in an order drawn by `schedule`."""
    draw = random.Random(schedule)
    for block in draw.sample(range(blocks), blocks):
        shared = np.zeros(threads, memory[-1].dtype)
        running = [kernel(block, thread, shared, *memory) for thread in range(threads)]
        while running:  # once per barrier
            waiting = []
            goes_to = {None: running, "sync": waiting, "end": []}
            while running:
                thread = running.pop(draw.randrange(len(running)))
                goes_to[next(thread, "end")].append(thread)
            running = waiting


# %%
def pair(i, size):
    """Pixels and weights that pair i is the sum of; the last of an odd size counts twice."""
    return [(2 * i, 1), (2 * i + 1, 1)] if 2 * i + 1 < size else [(2 * i, 2)]


def ll_kernel(block, thread, shared, x, out):
    k = block * len(shared) + thread  # which coefficient is mine?
    if k < out.size:
        i, j = divmod(k, out.shape[1])
        total = sum(u * v * x[r, c] for r, u in pair(i, x.shape[0]) for c, v in pair(j, x.shape[1]))
        yield  # somebody else may go on, it does not matter
        out[i, j] = total / 2


out = np.full((7, 9), np.nan)
launch(ll_kernel, 2, 32, a13, out)  # 64 threads for 63 coefficients
check("LL by simulated threads, 13×17", out, haar_ll(x13)[0, 0], 1e-6)

# %% [markdown]
# This is the package's kernel, nearly word for word. `RFSR_GRID_LOOP` computes the `k` of a thread (and gives it
# further ones if threads are too few), `plane` is sample and channel, `v` holds the sizes of `x`, and `h` and `w` are
# the band's. `Acc` is the number type of sums, and `haar_pair` is our `pair`, with section 6's rule `edge`:
#
# ```cpp
# // csrc/cuda/haar.cu
# RFSR_GRID_LOOP(k, v.n * v.c * h * w) {
#   const i64 j = k % w, i = k / w % h, plane = k / w / h;
#   const Acc sum = sum_pairs<Acc>(plane_of(x, v, plane / v.c, plane % v.c), haar_pair(i, v.h, edge),
#                                  haar_pair(j, v.w, edge));
#   out[k] = static_cast<Out>(sum * Acc(0.5));
# }
# ```
#
# As long as each output has one thread, the order does not matter. But the loss is *one* number for all threads.
# Three ways to add up:


# %%
def add_racing(block, thread, shared, values, total):
    old = total[0]  # read
    yield  # another thread may read the same old value ...
    total[0] = old + values[thread]  # ... and then one of the two additions is lost


def add_atomically(block, thread, shared, values, total):
    yield
    total[0] += values[thread]  # nobody can come between, but who comes first is open


def tree(thread, shared):
    """The block's sum ends in shared[0]."""
    yield "sync"
    half = len(shared) // 2
    while half:
        if thread < half:
            shared[thread] += shared[thread + half]
        yield "sync"
        half //= 2


def add_as_tree(block, thread, shared, values, total):
    shared[thread] = values[thread]
    yield from tree(thread, shared)
    if thread == 0:
        total[0] = shared[0]


# %%
distance = np.abs(out - haar_ll(y13)[0, 0].numpy()).astype(np.float32).ravel()
values = np.append(distance, np.float32(0))  # 64 of them
exact = values.astype(np.float64).sum()
styles = {add_racing: ("x", COLORS[1]), add_atomically: (".", COLORS[0]), add_as_tree: ("_", "#000000")}
sums, (figure, (left, right)) = {}, panels(columns=2, height=2.7)
for kernel, (marker, color) in styles.items():
    results = []
    for schedule in range(40):
        results.append(np.zeros(1, np.float32))
        launch(kernel, 1, 64, values, results[-1], schedule=schedule)
    sums[kernel] = np.concatenate(results)
    left.plot(sums[kernel], marker, color=color, label=kernel.__name__)
    if kernel != add_racing:
        right.plot((sums[kernel] - exact) * 1e6, marker, color=color)
left.set(xlabel="schedule", ylabel="sum", ylim=(0, 1.75 * exact))
left.legend(frameon=False, loc="upper left", fontsize=9)
right.set(xlabel="schedule", ylabel="error (millionths)")
racing, distinct = sums[add_racing], {kernel: len(set(s.tolist())) for kernel, s in sums.items()}
show(
    figure,
    f"Sums of 64 numbers, {exact:.3f} exactly, in 40 schedules. Left: racing threads reach {racing.min():.3f} to "
    f"{racing.max():.3f}. Right, the errors: atomic additions give {distinct[add_atomically]} different results, the "
    f"tree {distinct[add_as_tree]}.",
)
assert racing.max() < 0.9 * exact and distinct[add_atomically] > 1 and distinct[add_as_tree] == 1
check("the tree, within fp32", sums[add_as_tree][0], exact, 1e-6)
caught(lambda: check("racing", racing[0], exact, 1e-6))

# %% [markdown]
# **What to see.** Racing threads lose most of the sum. *Atomic* additions, each of which reads and writes in one go,
# lose nothing, but rounding depends on the order, so a training run cannot be repeated bit for bit. The tree always
# adds the same pairs in the same order. It costs a barrier per level, and there are only six levels for 64 numbers.
# In the package:
#
# ```cpp
# // csrc/cuda/sums.cuh
# shared[threadIdx.x] = value;
# __syncthreads();
# for (int half = kThreads / 2; half > 0; half /= 2) {
#   if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
#   __syncthreads();
# }
# return shared[0];
# ```
#
# A block can wait for its threads, but not for another block. So each block writes its part to a cell of its own, and a
# second launch adds the parts, again as a tree. The package's CPU kernel has no tree but keeps the promise: it adds
# rows in groups that follow from the shape alone, and the groups in order, however many threads share them.


# %%
def loss_kernel(block, thread, shared, x, y, parts):
    k, wide = block * len(shared) + thread, (x.shape[1] + 1) // 2
    if k < wide * ((x.shape[0] + 1) // 2):
        i, j = divmod(k, wide)
        rows, columns = pair(i, x.shape[0]), pair(j, x.shape[1])
        shared[thread] = abs(sum(u * v * (x[r, c] - y[r, c]) for r, u in rows for c, v in columns)) / 2
    yield from tree(thread, shared)
    if thread == 0:
        parts[block] = shared[0]  # a cell of its own: no other block writes there


results = set()
for schedule in range(10):
    parts, total = np.zeros(4), np.zeros(1)
    launch(loss_kernel, 4, 16, a13.astype(float), b13.astype(float), parts, schedule=schedule)
    launch(add_as_tree, 1, 4, parts, total, schedule=schedule)
    results.add(total[0] / 63)
check("two launches and the package", results.pop(), haar_ll_l1_loss(x13, y13), 1e-6)
assert not results, "ten schedules, one result"

threads = torch.get_num_threads()
bits = {}
for n in (1, 2):
    torch.set_num_threads(n)
    bits[n] = haar_ll_l1_loss(coarse, cat)
torch.set_num_threads(threads)
check("the package with 1 and with 2 threads", bits[1], bits[2], 0)

# %% [markdown]
# ## 6 · Odd borders
#
# 13×17 pixels make 7×9 blocks, and the last row and column have no partner. PyWavelets knows nine rules for what
# stands there. All nine are three whole numbers: the missing sample is
# $x_n=\text{last}\cdot x_{n-1}+\text{before}\cdot x_{n-2}+\text{first}\cdot x_0$. So the pairs of an axis are the rows of a
# matrix. LL is half the picture with such a matrix on its left (it adds rows) and one, transposed, on its right (it
# adds columns).
#
# Edges are where kernels are wrong. The classic slip is one index: a partner of `width - 2` where `width - 1` was meant.
# A test on the usual 64×64 pixels is content with it, as the second cell shows.

# %%
EDGES = {
    "symmetric": (1, 0, 0), "constant": (1, 0, 0), "periodization": (1, 0, 0), "reflect": (0, 1, 0),
    "periodic": (0, 0, 1), "zero": (0, 0, 0), "antisymmetric": (-1, 0, 0), "smooth": (2, -1, 0),
    "antireflect": (2, -1, 0),
}  # fmt: skip


def pairs(size, edge):
    """The matrix whose row i adds up pair i of an axis; a missing last sample follows the rule."""
    eye = np.eye(size)
    if size % 2:
        eye = np.vstack([eye, edge @ eye[[-1, -2, 0]]])
    return eye[::2] + eye[1::2]


photo = cat[0, 0, :7, :9].double()
with together("7×9 pixels, every rule"):
    for mode, edge in EDGES.items():
        ll = pairs(7, edge) @ photo.numpy() @ pairs(9, edge).T / 2
        assert np.allclose(ll, pywt.dwt2(photo.numpy(), "haar", mode)[0], atol=1e-12), mode
        check(mode, haar_ll(photo[None, None], mode=mode)[0, 0], ll, 1e-12)


# %%
def loss_off_by_one(x, y):
    width = x.shape[3]
    columns = [*range(width), width - 2] if width % 2 else [*range(width)]  # should be width - 1
    return loss_slices(x[..., columns], y[..., columns])


check("64×64 sees nothing", loss_off_by_one(coarse[crop], cat[crop]), haar_ll_l1_loss(coarse[crop], cat[crop]), 1e-6)
caught(lambda: check("13×17", loss_off_by_one(x13, y13), haar_ll_l1_loss(x13, y13), 1e-6))

# %% [markdown]
# ## 7 · Backward without a race
#
# Backward, each coefficient gives its gradient to its pixels. The obvious kernel has a thread per *coefficient* that
# adds to those pixels: it *scatters*. Under the rule `periodic`, the last coefficient of an odd row also contains pixel 0,
# so two threads add to the same place. The cure is to turn the question round: a thread per *pixel* asks which
# coefficients it is part of, and *gathers*: it reads the columns of `pairs`, where the other kernel walks the rows. Then
# each place has one writer.
#
# And what must forward keep for it? Not the pictures, only the signs: four to a byte, the first one lowest, 1 for plus,
# 2 for minus, 0 for a tie.


# %%
def scatter_kernel(block, thread, shared, v, grad):
    for p in (2 * thread, (2 * thread + 1) % len(grad)):
        old = grad[p]
        yield
        grad[p] = old + v[thread]


expected, results = [1 + 4, 1, 2, 2, 4], []  # pixel 0 is in coefficients 0 and 2
for schedule in range(40):
    results.append(np.zeros(5))
    launch(scatter_kernel, 1, 3, np.array([1.0, 2.0, 4.0]), results[-1], schedule=schedule)
wrong = [grad for grad in results if list(grad) != expected]
print(f"wrong in {len(wrong)} of 40 schedules, for example {wrong[0]}")
caught(lambda: check("scattering", wrong[0], expected, 0))


# %%
def users(k, size, edge):
    """Coefficients that pixel k is part of, with weights: a column of the matrix."""
    column = pairs(size, edge)[:, k]
    return [(i, column[i]) for i in column.nonzero()[0]]


def gather_kernel(block, thread, shared, v, edge, grad):
    k = block * len(shared) + thread
    if k < grad.size:
        r, c = divmod(k, grad.shape[1])
        rows, columns = users(r, grad.shape[0], edge), users(c, grad.shape[1], edge)
        yield
        grad[r, c] = sum(a * b * v[i, j] for i, a in rows for j, b in columns)


for mode in ("symmetric", "reflect", "periodic", "smooth"):
    p = x13.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(haar_ll_l1_loss(p, y13, mode=mode), p)
    sign = haar_ll(x13 - y13, mode=mode)[0, 0].sign().numpy()
    grad = np.full((13, 17), np.nan)
    launch(gather_kernel, 4, 64, sign / (2 * sign.size), EDGES[mode], grad)
    check(f"gathered gradient, {mode:9s}", grad, wanted[0, 0], 1e-7)

# arguments: symmetric, no input range, mean, a gradient for x only
value, kept = torch.ops.rfsr_ext.haar_ll_l1(x13, y13, 0, 0.0, 0.0, 0, True, False)
sign = haar_ll(x13 - y13)[0, 0].sign().long()  # 7×9
codes = F.pad(torch.where(sign < 0, 2, sign), (0, 3)).view(7, 3, 4)  # rows end on whole bytes
check("bytes kept", (codes * torch.tensor([1, 4, 16, 64])).sum(2).flatten(), kept[0], 0)
print(f"{kept.nbytes} bytes are kept for backward; x and y would be {x13.nbytes + y13.nbytes}")

# %% [markdown]
# In the package, `users` is `haar_users`, whose comment says the same. Here is its even case, one pair per sample:
#
# ```cpp
# // csrc/index.h
# // The pairs that sample k is part of: the columns of the matrix whose rows are haar_pair. The gradient
# // gathers along them, so every pixel has one writer.
# RFSR_HD HaarTerms haar_users(i64 k, i64 size, HaarEdge edge) {
#   const i64 pair = k / 2, end = size - 1;
#   if (size % 2 == 0) return {{pair, pair, pair}, {1, 0, 0}};
# ```
#
# ## 8 · Gram: use each number often
#
# $G=FF^\mathsf T/(CHW)$ needs every pair of channels. A block of threads computes one *tile* of $T\times T$ results. It
# loads $2T$ rows of $F$, piece by piece, and uses every loaded number $T$ times. $G$ is symmetric, so the tiles of the lower
# triangle are enough. And because the loss wants only $D=G(F_1)-G(F_2)$, a tile adds up $F_1F_1^\mathsf T-F_2F_2^\mathsf T$ with
# its sign in one go: neither Gram matrix is ever written. In the CUDA kernel that is
#
# ```cpp
# // csrc/cuda/products.cuh
# for (int e = 0; e < 4; ++e) v[m][n][e] += sign * sum[n][e];
# ```
#
# once every 16 pixels (32 of a half type), with `sign` 1 and -1 in turn, for each of the 32 results `v` that a thread has.
# Tensor cores made `sum`, of one input alone, so equal features give exactly 0.
#
# `gram_loss` knows three distances: the squared norm of $D$ (`l2`, equation 6), the sum of its absolute values (`l1`)
# and the norm itself (`fro`). Backward, one small matrix $S$ serves all three: $\partial L/\partial F_1=SF_1/(CHWN)$,
# with $N$ samples in the batch and the table of $S$ in the second cell.
#
# For features we take the 5×5 neighborhood of each pixel of two places of the photograph: 75 channels, no multiple of
# any tile.


# %%
def neighborhoods(x):
    return F.unfold(x, 5).unflatten(2, (x.shape[2] - 4, x.shape[3] - 4))


places = [(92, 128), (180, 60)]
f1, f2 = (neighborhoods(torch.cat([x[..., r : r + 64, c : c + 64] for r, c in places])) for x in (coarse, cat))


def triangle(t):
    """Tile number t of a lower triangle, row by row, without a square root that could round."""
    i = 0
    while (i + 1) * (i + 2) // 2 <= t:
        i += 1
    return i, t - i * (i + 1) // 2


def gram_difference(f1, f2, tile=16, piece=128):
    """G(f1) - G(f2) of one sample [C, H, W], tile by tile."""
    a, b, side = f1.flatten(1), f2.flatten(1), -(-len(f1) // tile)
    D = torch.zeros(len(f1), len(f1))
    for t in range(side * (side + 1) // 2):
        i, j = (slice(tile * k, tile * (k + 1)) for k in triangle(t))
        total = torch.zeros(D[i, j].shape, dtype=torch.float64)
        for start in range(0, a.shape[1], piece):
            p = slice(start, start + piece)
            total += a[i, p] @ a[j, p].T - b[i, p] @ b[j, p].T
        D[i, j] = total / f1.numel()
        D[j, i] = D[i, j].T
    return D


D = torch.stack([gram_difference(*sample) for sample in zip(f1, f2, strict=True)])
check("difference", D, gram_matrix(f1) - gram_matrix(f2), 1e-7)

# %%
norm = D.square().sum((1, 2), keepdim=True).sqrt()
by_hand = {
    "l2": (D.square().sum((1, 2)).mean(), 4 * D),
    "l1": (D.abs().sum((1, 2)).mean(), 2 * D.sign()),
    "fro": (norm.mean(), 2 * D / norm),
}
with together("values and gradients of l2, l1 and fro, relative"):
    for criterion, (value, S) in by_hand.items():
        p, q = (f.clone().requires_grad_() for f in (f1, f2))
        loss = gram_loss(p, q, criterion=criterion)
        wanted, opposite = torch.autograd.grad(loss, (p, q))
        gradient = (S @ f1.flatten(2)).view_as(f1) / (f1[0].numel() * len(f1))
        check(f"{criterion} value, relative", value / loss, 1, 1e-4)
        check(f"{criterion} gradient, relative", *(g / wanted.abs().max() for g in (gradient, wanted)), 1e-3)
gradient = (-S @ f2.flatten(2)).view_as(f2) / (f2[0].numel() * len(f2))  # the target enters with a minus
check("fro gradient in the target", *(g / wanted.abs().max() for g in (gradient, opposite)), 1e-3)
check("equal features", gram_loss(f1, f1), 0, 0)


# %%
def draw(tile, channels=256):
    """How large should a tile be? Left: the tiles computed. Right: operations per byte, if each loads its rows."""
    side = channels // tile
    per_byte = tile * (channels + tile) / (4 * channels)  # (C + T) FLOP and C/T loads of 4 bytes per number of F
    figure, (left, right) = panels(columns=2, height=2.8)
    shade = np.fromfunction(
        lambda r, c: np.where(c // tile > r // tile, 0, 1 + (r // tile + c // tile) % 2), (channels,) * 2
    )
    left.imshow(shade, cmap="Blues", vmin=0, vmax=3, interpolation="nearest")
    left.set_title(f"{side * (side + 1) // 2} tiles, the rest mirrored", size=10)
    left.set(xlabel="channel", ylabel="channel")
    tiles = np.array([8, 16, 32, 64, 128])
    right.loglog(tiles, tiles * (channels + tiles) / (4 * channels), marker=".")
    right.loglog([tile], [per_byte], marker="o", color="#D55E00", markersize=9)
    right.axhline(balance, color="#000000", linestyle="--", linewidth=1)
    right.annotate("an H200's limits meet", (8, balance), xytext=(0, 4), textcoords="offset points", size=9)
    right.set_xticks(tiles, [str(t) for t in tiles])
    right.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    right.minorticks_off()
    right.set_title(f"{per_byte:.1f} operations per byte", size=10)
    right.set(xlabel="tile", ylabel="operations per byte")
    bound = "arithmetic" if per_byte > balance else "memory"
    return figure, (
        f"Tiles of {tile} by {tile} for 256 channels: {side * (side + 1) // 2} tiles are computed, {per_byte:.1f} operations per "
        f"byte loaded; {balance:.0f} are needed to be limited by arithmetic on an H200, so {bound} limits."
    )


tiles = explore(draw, values=[8, 16, 32, 64, 128], label="tile")
tiles

# %%
tiles.slider.value = 64
show(*draw(64))

# %% [markdown]
# **What to see.** Small tiles load everything again and again and are limited by memory. From 64 on, arithmetic limits (that
# of plain units; tensor cores are hungrier), and a larger tile gains nothing but leaves fewer blocks to share out among the
# GPU's processors. The package's CUDA kernel
# takes 64, or 128 beyond 64 channels, its CPU kernel 8×32, or 32×32 for bfloat16 on a processor with a matrix unit.
# (Caches help small tiles, so reality is kinder than this count.)
#
# ## 9 · Build it here
#
# Now a real kernel: section 1's loop in C++, compiled by your compiler into a temporary folder, in a second or two, and
# called through `ctypes`. (`torch.utils.cpp_extension.load_inline` does the same for functions of tensors;
# it compiles PyTorch's headers, too, and takes a minute.) First it is proved right, at odd sizes too. Then all versions are
# measured on this machine: the numbers and the roofline below are from the computer that built this page and differ on
# yours.

# %%
SOURCE = r"""
#include <cmath>
extern "C" double haar_ll_l1(const float* x, const float* y, long planes, long height, long width) {
  double sum = 0;
  for (long p = 0; p < planes; ++p, x += height * width, y += height * width)
    for (long i = 0; i < height; i += 2) {
      const long r = i + 1 < height ? i + 1 : i;
      for (long j = 0; j < width; j += 2) {
        const long c = j + 1 < width ? j + 1 : j;
        auto d = [&](long a, long b) { return x[a * width + b] - y[a * width + b]; };
        sum += std::fabs((d(i, j) + d(r, j)) + (d(i, c) + d(r, c))) / 2;
      }
    }
  return sum / (planes * ((height + 1) / 2) * ((width + 1) / 2));
}
"""


def build(source):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        file.write_text(source)
        command = [*compiler.split(), "-O3", "-shared", "-fPIC", file, "-o", library]
        subprocess.run(command, check=True, capture_output=True)
        function = ctypes.CDLL(str(library)).haar_ll_l1
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_void_p] * 2 + [ctypes.c_long] * 3
    return lambda x, y: function(x.data_ptr(), y.data_ptr(), x.shape[0] * x.shape[1], *x.shape[2:])


# %% tags=["nbval-ignore-output"]
compiled = build(SOURCE)
if compiled is None:
    print("NOT RUN: no C++ compiler was found; install one such as g++ and run these cells again")
else:
    for name, (p, q) in {"13×17": (x13, y13), "300×451": (coarse, cat)}.items():
        check(f"C++ and package, {name}", compiled(p.contiguous(), q.contiguous()), haar_ll_l1_loss(p, q), 1e-6)
if torch.cuda.is_available():
    check("GPU and CPU", haar_ll_l1_loss(coarse.cuda(), cat.cuda()), haar_ll_l1_loss(coarse, cat), 1e-6)
else:
    print("NOT RUN: the package's CUDA kernel; PyTorch finds no GPU on this machine")

# %% tags=["nbval-ignore-output"]
x, y = torch.rand(2, 8, 3, 512, 512, generator=torch.Generator().manual_seed(0))
a, copied = torch.rand(1024, 1024), torch.empty_like(x)


def seconds(action, repeats=5):
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times[1:])  # the first one warms up


here = {"bytes": 2 * x.nbytes / seconds(lambda: copied.copy_(x)), "flops": 2 * 1024**3 / seconds(lambda: a @ a)}
print(
    f"{torch.get_num_threads()} thread(s); {here['bytes'] / 1e9:.0f} GB/s in a copy, {here['flops'] / 1e9:.0f} GFLOP/s"
)
print(f"Python loop     {1e9 * seconds(lambda: loss_loop(a13, b13)) / a13.size:6.2f} ns per pixel")
ran = versions | ({"C++ of this page": compiled} if compiled else {})
timed = {name: 1e9 * seconds(lambda loss=loss: loss(x, y)) / pixels for name, loss in ran.items()}
p = x.clone().requires_grad_()
whole = {
    name: 1e9 * seconds(lambda loss=loss: torch.autograd.grad(loss(p, y), p)) / pixels
    for name, loss in versions.items()
}
for name, t in (timed | {"least possible": 1e9 * 8 / here["bytes"]}).items():
    both = f", forward and backward {whole[name]:6.2f}" if name in whole else ""
    print(f"{name:16s}{t:6.2f} ns per pixel{both}")

# %% tags=["nbval-ignore-output"]
at = {name: work.get(name, 9 / 4) / moved.get(name, [8])[0] for name in timed}
rates = {name: work.get(name, 9 / 4) / t for name, t in timed.items()}
rated = ", ".join(f"{name} {rate:.1f} GFLOP/s" for name, rate in rates.items())
show(roofline(here, at, rates), f"Roofline of this computer, measured, forward only: {rated}.")

# %% [markdown]
# **What to see.** A point far to the left moves bytes it need not move. A point below the slope moves its bytes more
# slowly than memory could. So the slices may be nearer to the slope than our C++ loop and still take longer. And
# fewer bytes need not take less time, as `pooled` showed when this page was built: bytes give a floor. (A program that
# only reads may even lie above the line, because a copy also writes.)
#
# The plain C++ loop reads each number once, as it should. What does the package's kernel add? Sixteen sums side by
# side, so that one addition need not wait for the last; threads; any memory layout and four number types; the signs;
# and a fixed order. Where a processor has AVX-512, instructions for sixteen fp32 numbers at once, the sixteen sums are
# one register, and everything between pictures and signs stays in registers. `python -m benchmarks` in the repository
# repeats this with care, against every other implementation we know.
#
# **Does that make training faster?** Amdahl's law: if a part takes the share $p$ of the time and becomes $s$ times as fast,
# the whole becomes $1/(1-p+p/s)$ times as fast. In RFSR the networks take nearly all the time, the
# structure loss a thousandth and the style loss's Gram matrices two hundredths.
# [The repository's own benchmark](../benchmarks/results/intel-xeon-processor-avx512-2-threads.md)
# says so: a whole iteration takes as long with the fused losses as with the best other ones (1.00 times in the structure
# window, 0.97 in the other; the times overlap in both). What the kernels do give there is memory, same bits for any
# number of threads, and speed in a loop whose network is small.

# %%
print("share p   the whole becomes faster by, if the loss becomes 2.6 or 100 times as fast")
for p in (0.001, 0.01, 0.1, 0.5):
    print(f"{p:7.3f}   " + ", ".join(f"{1 / (1 - p + p / s):.3f}" for s in (2.6, 100)))
check("no part can save more than its share", 1 / (1 - 0.001 + 0.001 / 1e9), 1 / (1 - 0.001), 1e-9)

# %% [markdown]
# Without a GPU, how does one trust a CUDA kernel? The package's tests do what section 5 does, in C++: they compile the
# same lines of `csrc/cuda/` for the host, threads and barriers simulated in orders that change, and compare them with
# PyTorch and PyWavelets, at odd and even sizes, for every rule and number type. That proves indices and sums. It cannot
# prove speed, and it finds no race that none of its orders shows.
#
# ## 10 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up, predict then run).** How many bytes does the fused forward pass read and write for one channel of
# `height` × `width` numbers of `s` bytes, with the signs but without the 4 bytes of the result? Rows of signs end on whole
# bytes.
# <details><summary>Hint</summary>Both inputs are read once. A coefficient keeps two bits, four share a byte; how many rows
# and columns of coefficients are there at odd sizes?</details>


# %%
def fused_bytes(height, width, s):
    raise NotImplementedError


def verify_bytes():
    for height, width, dtype in ((64, 64, torch.float32), (13, 17, torch.float32), (13, 17, torch.bfloat16)):
        p, q = torch.ones(2, 1, 1, height, width, dtype=dtype).requires_grad_()
        with Meter() as meter:
            haar_ll_l1_loss(p, q.detach())
        check(f"{height}×{width}, {dtype}", fused_bytes(height, width, dtype.itemsize), sum(meter.lines[-1]) - 4, 0)


exercise(1, verify_bytes)


# %% [markdown]
# **Exercise 2.** Write a kernel that puts the largest of `values` into `total[0]`, one value per thread, right in every
# schedule.
# <details><summary>Hint</summary>`add_as_tree` with another operation. Every thread must reach every barrier.</details>


# %%
def largest_kernel(block, thread, shared, values, total):
    raise NotImplementedError
    yield


def verify_largest():
    for schedule in range(20):
        total = np.zeros(1, np.float32)
        launch(largest_kernel, 1, 64, values, total, schedule=schedule)
        assert total[0] == values.max(), f"schedule {schedule} gives {total[0]}, not {values.max()}"


exercise(2, verify_largest)


# %% [markdown]
# **Exercise 3 (harder).** Write the backward kernel from the kept bytes alone (rule `symmetric`): a thread per pixel finds
# its coefficient, takes the two bits out of its byte, and writes plus or minus `push`, half of one over the number of
# coefficients, or 0 for a tie. `kept` has one row of bytes per row of coefficients.
# <details><summary>Hint</summary>The last pixel of an odd axis counts twice: `users` has its weight. The code of column
# `j` is `kept[i, j // 4] >> 2 * (j % 4) & 3`.</details>


# %%
def unpack_kernel(block, thread, shared, kept, push, grad):
    raise NotImplementedError
    yield


def verify_unpack():
    p = x13.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(haar_ll_l1_loss(p, y13), p)
    grad = np.full((13, 17), np.nan)
    launch(unpack_kernel, 4, 64, kept.view(7, 3).numpy(), 1 / (2 * 63), grad)
    check("gradient", grad, wanted[0, 0], 1e-7)


exercise(3, verify_unpack)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Write the loss of the second level, LL of LL, as one kernel in simulated threads that reads each input once. An
#   answer passes `check` against the package at odd sizes and comes with a table of its bytes.
# * A tree is one fixed order of many. Compare it with a plain sum, with sums of four lanes and with Kahan's sum on a
#   million numbers in 32 bits. An answer is the error of each against 64 bits, beside its count of additions.
#
# ## Summary
#
# * Bytes decide: the LL loss written in slices moves many times what the fused one must, most of it in backward. They
#   decide about the loss; a whole RFSR iteration hardly notices.
# * The floor is arithmetic: bytes over bandwidth, or operations over rate, whichever takes longer.
# * Threads that add to one place race; a tree with barriers adds in a fixed order and gives the same bits every time.
# * Backward gathers, so each pixel has one writer, also at odd borders; test odd sizes, where slips of one show.
# * Gram tiles use each loaded number many times, and one signed sum replaces two Gram matrices.
# * Two bits per coefficient are all that the backward pass of the LL loss needs.
#
# NAVIGATION
