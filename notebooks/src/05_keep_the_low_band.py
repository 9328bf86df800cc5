# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 05 · Keep the low band
#
# **You will derive RFSR's structure loss forwards and backwards, and measure which texture it leaves alone and which it
# smooths.**
#
# A quarter of a minute on two cores; nothing to download. Needs the 2×2 Haar block of notebook 03, which is repeated here
# in one line.
#
# NAVIGATION
#
# In its first sampling steps RFSR holds the *structure* of the picture with a loss on the Haar LL band (the picture at
# half size). Afterwards you can
#
# * compute that loss and its gradient on paper, and tell a right backward pass from one that is off by a factor,
# * say which changes of a picture the loss cannot see, and whether that is what ×4 super-resolution needs,
# * compare it with a plain pixel loss and with a coarser low-pass like that of the released code.

# %%
import pywt
import torch
import torch.nn.functional as F

from rfsr_ext import haar_ll, haar_ll_l1_loss
from rfsr_ext.data import load_photograph
from rfsr_ext.losses import HaarLLLoss
from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show, spoken

cat = torch.from_numpy(load_photograph("chelsea").copy()).movedim(-1, 0)  # [3, 300, 451] in [0, 1]


def patch(top, left, size=64):
    return cat[None, :, top : top + size, left : left + size]


fur = patch(10, 120)

# %% [markdown]
# ## 1 · What is the question?
#
# A low-resolution picture of fur tells where it is light and dark. It does not tell where each hair is. So many sharp
# pictures are right answers: all that become the *same low resolution*. For ×4 that means: all that have the same means
# of 4×4 pixels. Let us make eight of them. All share the 4×4 means of this piece of a cat's forehead, and each has its
# detail (what is finer than the means) from another piece of the same cat.
#
# Detail comes in two *octaves*. One Haar split takes out what repeats within 2 to 4 pixels, roughly: the bands LH, HL, HH.
# Splitting LL once more takes out 4 to 8 pixels. What is left after two splits are the 4×4 means: the low resolution.


# %%
def split(x):
    """[N, C, H, W] with even H and W to LL and the three fine bands (LH, HL, HH)."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2, ((a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2)


def merge(LL, fine):
    """The inverse of `split`."""
    LH, HL, HH = fine
    blocks = torch.stack([LL + LH + HL + HH, LL + LH - HL - HH, LL - LH + HL - HH, LL - LH - HL + HH], dim=2) / 2
    return F.pixel_shuffle(blocks.flatten(1, 2), 2)


def two_octaves(x):
    """The 4×4 means (times 4), the octave of 4 to 8 pixels, and that of 2 to 4."""
    LL, finest = split(x)
    means, next_octave = split(LL)
    return means, next_octave, finest


def from_octaves(means, next_octave, finest):
    return merge(merge(means, next_octave), finest)


check("merge undoes split", merge(*split(fur)), fur, 1e-6)
check("and twice", from_octaves(*two_octaves(fur)), fur, 1e-6)
check("two splits leave the 4×4 means", two_octaves(fur)[0], 4 * F.avg_pool2d(fur, 4), 1e-6)

# %%
means = two_octaves(fur)[0]
places = [(30, 230), (60, 60), (30, 40), (90, 210)]
details = [two_octaves(x)[1:] for place in places for x in (patch(*place), patch(*place).flip(-1))]
truths = torch.cat([from_octaves(means, *detail) for detail in details])  # eight pictures that are all right
lr = F.avg_pool2d(truths, 4)
check("all eight have one low resolution", lr, lr[:1].expand_as(lr), 1e-6)


def energies(x):
    """Sums of squares of the octaves of 4 to 8 and of 2 to 4 pixels, per picture."""
    octaves = two_octaves(x.double())[1:]
    return torch.stack([sum(band.square().sum((1, 2, 3)) for band in octave).mean() for octave in octaves])


blotches = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
blotches = F.interpolate(blotches, size=16, mode="bilinear")
start = from_octaves(means + 0.6 * blotches, *two_octaves(patch(10, 180))[1:])  # wrong colors, plausible fur
for name, x in (("truths", truths), ("start", start)):
    print("{:7s} energy of 4–8 pixels {:5.1f}, of 2–4 pixels {:5.1f}".format(name, *energies(x)))
enlarged = F.interpolate(lr[:1], scale_factor=4, mode="bicubic")
tiles = [lr[0], enlarged[0], *truths[[0, 2, 4, 6]], start[0]]
titles = ["low resolution", "bicubic", "truth 1", "truth 3", "truth 5", "truth 7", "start"]
show(
    pictures(tiles, titles, columns=4, tile=1.92),
    "A piece of fur, 64 pixels wide: its low resolution of 16 pixels, bicubic enlargement, four of the eight possible "
    f"truths, and the start: colored blotches, and fur of {energies(start)[0] / energies(truths)[0]:.1f} times their energy.",
)

# %% [markdown]
# **What to see.** All four truths are fur, and all four become the same small picture. The start has two properties: its
# structure is wrong (the blotches), and its texture is plausible, although it is the texture of none of the truths. *A
# good structure loss should mend the first and leave the second.* Three losses now move the pixels of the start: a plain
# pixel loss; the paper's, on the LL band of one split; and the same on the LL band of two. A fourth follows in section 4.


# %%
def improve(loss, steps=60):
    """Move the pixels of `start` by ``steps`` steps of Adam; the loss is the mean over all eight truths."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(x.expand_as(truths), truths).backward()
        optimizer.step()
        schedule.step()
    return x.detach()


def level_2(x, y):
    return haar_ll_l1_loss(x, y, level=2)


losses = {"pixel L1": F.l1_loss, "Haar LL": haar_ll_l1_loss, "Haar LL, level 2": level_2}
results = {"start": start} | {name: improve(loss) for name, loss in losses.items()}


def report(results):
    """Error of the 4×4 means, and what share of each octave's energy is left, by result."""
    print(f"{'':18s}structure error   left of 4–8 pixels   of 2–4 pixels")
    left = {}
    for name, x in results.items():
        left[name] = (energies(x) / energies(start)).tolist()
        error = (F.avg_pool2d(x, 4) - lr[:1]).abs().mean()
        print(f"{name:18s}{error:15.3f}{100 * left[name][0]:19.0f} %{100 * left[name][1]:14.0f} %")
    return left


# %%
left = report(results)
titles = [f"{n}\n4–8 px: {100 * left[n][0]:.0f} % · 2–4 px: {100 * left[n][1]:.0f} %" for n in results]
show(
    pictures(
        [x[0] for x in (enlarged, *results.values(), truths)], ["bicubic\n", *titles, "truth 1\n"], columns=3, tile=1.92
    ),
    "The fur after 60 steps, with what is left of two octaves: " + spoken(titles),
)
assert left["pixel L1"][0] < 0.5 and left["pixel L1"][1] < 0.5, "the pixel loss must smooth both octaves"
check("Haar LL leaves the finest octave", left["Haar LL"][1], 1.0, 1e-4)
assert left["Haar LL"][0] < 0.5, "and smooths the next one like the pixel loss"
check("level 2 leaves both", left["Haar LL, level 2"], [1.0, 1.0], 1e-4)

# %% [markdown]
# **What to see.** All three remove the blotches. The pixel loss also removes most of the fur: where eight truths
# disagree, the value with the least mean absolute error is their median, and the median of eight furs is smooth. (It
# looks like blocks because 4×4 means are all that the eight agree on.) The paper's loss leaves the finest octave to the
# last digit. But it *smooths the octave of 4 to 8 pixels just as the pixel loss does*: the LL band of one split holds
# that octave, a ×4 low resolution does not, so the truths disagree there, and their median wins. Only `level=2`, whose LL
# band holds what the low resolution holds, leaves all detail alone.
#
# The paper reports "texture smoothing" when L1 takes the place of its loss (its section 4 and Table 5). So its loss
# avoids half of that smoothing at ×4. Keep another thing in mind: here the *pixels* are free. In training all bands come
# out of the same weights, and a loss that says nothing of the finest octave does not protect it either. The paper's
# text on Table 3 calls what it gets from the LL loss without rewards "extremely blurred"; notebook 11 shows ours.
# How can a loss be so exact about what it leaves alone? Its formula tells.
#
# ## 2 · The loss on paper
#
# Equations 1 and 2 of the paper. It leaves open whether to add up or to average; here it is the mean over all
# coefficients:
#
# $$LL_{ij}=\tfrac12\,(x_{2i,2j}+x_{2i,2j+1}+x_{2i+1,2j}+x_{2i+1,2j+1})\qquad
# \mathcal L_{dwt}=\frac1N\sum_{ij}\bigl|LL(x)_{ij}-LL(y)_{ij}\bigr|$$
#
# $N$ is the number of LL coefficients, a quarter of the number of pixels. Do it on paper for the block
# $x=\begin{pmatrix}.9&.7\\.5&.1\end{pmatrix}$ and $y=\begin{pmatrix}.8&.8\\.4&.4\end{pmatrix}$.

# %%
x = torch.tensor([[0.9, 0.7], [0.5, 0.1]])[None, None]
y = torch.tensor([[0.8, 0.8], [0.4, 0.4]])[None, None]
on_paper = abs((0.9 + 0.7 + 0.5 + 0.1) / 2 - (0.8 + 0.8 + 0.4 + 0.4) / 2)
check("one block: paper and package", haar_ll_l1_loss(x, y), on_paper, 1e-6)


def loss_by_hand(x, y):
    return (split(x)[0] - split(y)[0]).abs().mean()


check("a photograph: by hand and package", haar_ll_l1_loss(start, fur), loss_by_hand(start, fur), 1e-6)
check("the module of the trainer", HaarLLLoss()(start, fur), loss_by_hand(start, fur), 1e-6)
second = loss_by_hand(split(start)[0], split(fur)[0])
check("level=2: the LL band of the LL band", haar_ll_l1_loss(start, fur, level=2), second, 1e-6)
decoded = haar_ll_l1_loss(2 * start - 1, 2 * fur - 1, input_range=(-1, 1))  # a decoder gives pixels in [-1, 1]
check("input_range: shifted, halved, clamped", decoded, loss_by_hand(start.clamp(0, 1), fur), 1e-6)

# %% [markdown]
# Every pixel of the block differs, by 0.1 or 0.3, yet the loss is only 0.1: errors inside a block may cancel.
#
# ## 3 · The gradient on paper
#
# One pixel $x_p$ occurs in exactly one coefficient, with factor ½. The derivative of $|d|$ is the sign of $d$.
# Together:
#
# $$\frac{\partial\mathcal L}{\partial x_p}=\frac1{2N}\,\operatorname{sign}\bigl(LL(x)-LL(y)\bigr)_{\text{block of }p}$$
#
# All four pixels of a block get the *same* push, and its size never depends on how wrong they are.


# %%
def gradient_by_hand(x, y):
    sign = (split(x)[0] - split(y)[0]).sign()  # sign(0) is 0
    return (sign / (2 * sign.numel())).repeat_interleave(2, -2).repeat_interleave(2, -1)


def gradient(loss, x, y):
    """d loss / dx by automatic differentiation."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x, y), x)[0]


check("gradient: by hand and autograd", gradient_by_hand(start, fur), gradient(loss_by_hand, start, fur), 1e-9)
check("gradient: by hand and package", gradient_by_hand(start, fur), gradient(haar_ll_l1_loss, start, fur), 1e-9)

# %%
speckle = 0.02 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
nearly = merge(split(fur)[0] + speckle, split(patch(10, 180))[1])  # every block a little too bright or too dark
fields = {name: gradient(loss, nearly, fur)[0, 0] for name, loss in (("pixel L1", F.l1_loss), ("LL", haar_ll_l1_loss))}
small = [field[24:48, 24:48] / field.abs().max() for field in fields.values()]
sizes = {name: field.abs().max().item() for name, field in fields.items()}
show(
    pictures(small, [f"gradient of {name}\n±{sizes[name]:.1e}" for name in fields], tile=2.2, span=(-1, 1)),
    "Signs of two gradients on the same 24×24 pixels of the red channel, white plus and black minus. Left, pixel L1: "
    f"single pixels of size {sizes['pixel L1']:.1e}. Right, LL: one sign per 2×2 block, of size {sizes['LL']:.1e}.",
)

# %% [markdown]
# **What to see.** The pixel loss pushes single pixels up and down: it edits texture. The LL loss pushes whole blocks:
# it can change only LL. In Haar's terms its gradient has no LH, HL or HH at all, which we can assert.

# %%
for name, band in zip(("LH", "HL", "HH"), split(gradient(haar_ll_l1_loss, start, fur))[1], strict=True):
    check(f"{name} of the gradient", band, torch.zeros_like(band), 0)
check("twice pixel L1: four times fewer terms, times ½", sizes["LL"], 2 * sizes["pixel L1"], 1e-9)

# %% [markdown]
# Three places where backward passes go wrong: the second argument, an exact zero, and odd sizes, whose last row or
# column is its own mirror partner and so counts twice.

# %%
target = fur.clone().requires_grad_()
(towards_target,) = torch.autograd.grad(haar_ll_l1_loss(start, target), target)
check("the second argument gets minus the gradient", towards_target, -gradient_by_hand(start, fur), 1e-9)
check("equal pictures: no push", gradient(haar_ll_l1_loss, fur, fur), torch.zeros_like(fur), 0)
odd, nothing = torch.ones(1, 1, 5, 7), torch.zeros(1, 1, 5, 7)
rows, columns = torch.tensor([1, 1, 1, 1, 2.0]), torch.tensor([1, 1, 1, 1, 1, 1, 2.0])
wanted = rows[:, None] * columns / (2 * 3 * 4)  # 3×4 coefficients
check("5×7 pixels", gradient(haar_ll_l1_loss, odd, nothing)[0, 0], wanted, 1e-8)

# %% [markdown]
# In training the ground truth is data and asks for no gradient, so the minus sign is never computed.
#
# ### Adjoint and gradient check
#
# For those who write operators; others go on to section 4.
#
# `haar_ll` is linear, $LL=Wx$, so its backward pass must be $W^\mathsf T$. The test of that needs no formula at all:
# $\langle Wx,\,v\rangle=\langle x,\,W^\mathsf Tv\rangle$ for any $x$ and $v$. `gradcheck` does the same with finite
# differences, in 64-bit numbers.

# %%
g = torch.Generator().manual_seed(0)
p, v = torch.randn(2, 3, 7, 9, generator=g).double().requires_grad_(), torch.randn(2, 3, 4, 5, generator=g).double()
(transposed,) = torch.autograd.grad((haar_ll(p) * v).sum(), p)
check("adjoint", (haar_ll(p) * v).sum(), (p * transposed).sum(), 1e-10)
q = torch.randn(2, 3, 7, 9, generator=g).double()
assert torch.autograd.gradcheck(haar_ll, p) and torch.autograd.gradcheck(lambda p: haar_ll_l1_loss(p, q), p)
assert torch.autograd.gradgradcheck(haar_ll, p)
print("gradcheck: both operators agree with finite differences, and LL with its second derivative")

# %% [markdown]
# ## 4 · What can each loss see?
#
# Now a fourth loss. The released code does not use Haar: it takes the low-pass of a *three-level dual-tree complex
# wavelet* ([all differences](paper_and_released_code.md)). That transform is not installed here. As a stand-in we take
# three levels of a plain biorthogonal wavelet (9/7, the one of JPEG 2000): another kind of tree, but like it a
# low-pass with long smooth filters that is three octaves deep. (The released band is H/4 × W/4, the stand-in's
# H/8 × W/8: take from it the direction, not the amount.)


# %%
low_pass = torch.tensor(pywt.Wavelet("bior4.4").dec_lo, dtype=torch.float32)[:, None]


def coarse(x, levels=3):
    """Low-pass band of ``levels`` levels, image borders mirrored."""
    channels = x.shape[1]
    for _ in range(levels):
        for kernel in (low_pass, low_pass.T):
            k = kernel.flip(0, 1).expand(channels, 1, *kernel.shape)
            pad = [4, 5, 0, 0] if kernel.shape[1] > 1 else [0, 0, 4, 5]
            stride = [2 if n > 1 else 1 for n in kernel.shape]
            x = F.conv2d(F.pad(x, pad, mode="reflect"), k, stride=stride, groups=channels)
    return x


def coarse_loss(x, y):
    return (coarse(x) - coarse(y)).abs().mean()


constant = coarse(torch.ones(1, 1, 64, 64))
check("a constant picture is doubled by every level", constant, torch.full((1, 1, 8, 8), 8.0), 1e-4)

# %% [markdown]
# Add stripes of a known width to a gray picture, at four angles, and ask each loss how much it minds them, compared with
# very wide ones.


# %%
def stripes(period, size=64):
    """Stripes ``period`` pixels apart at four angles, [4, 1, size, size], zero mean."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    angles = torch.tensor([0.0, 30.0, 60.0, 90.0]).deg2rad()[:, None, None]
    return torch.sin(2 * torch.pi * (x * angles.cos() + y * angles.sin()) / period + 0.5)[:, None]


losses |= {"9/7, 3 levels": coarse_loss}
periods = [2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32]
gray = torch.full((4, 1, 64, 64), 0.5)
seen = {}
for name, loss in losses.items():
    values = torch.tensor([loss(gray + 0.1 * stripes(period), gray) for period in periods])
    wide = loss(gray + 0.1, gray) * 2 / torch.pi  # 2/π is the mean of |sin|
    seen[name] = values / wide

# %%
figure, axes = panels(width=6.6, height=3.0)
for (name, values), marker in zip(seen.items(), "sovD", strict=True):
    axes.semilogx(periods, 100 * values, marker=marker, label=name)
axes.set(xlabel="pixels between two stripes", ylabel="seen (% of a wide stripe)", ylim=(0, 145))
axes.set_xticks(periods, [f"{p:g}" for p in periods])
axes.minorticks_off()
axes.axvspan(8, 34, color="0.9", linewidth=0, zorder=0)
axes.text(8.3, 3, "in a ×4 low resolution", size=8, color="0.3")
axes.set_xlim(1.9, 34)
axes.legend(frameon=False, ncols=2, loc="upper left", fontsize=8)
at = {name: dict(zip(periods, values.tolist(), strict=True)) for name, values in seen.items()}
show(
    figure,
    "How much four losses see of stripes 3, 6 and 24 pixels apart; a low resolution at a quarter holds 8 and more: "
    + "; ".join(f"{n} {100 * a[3]:.0f}, {100 * a[6]:.0f} and {100 * a[24]:.0f} percent" for n, a in at.items())
    + ".",
)
assert at["9/7, 3 levels"][6] < 0.2 < 0.7 < at["Haar LL"][6] and at["pixel L1"][3] > 0.8

# %% [markdown]
# **What to see.** The pixel loss minds all stripes about equally. The Haar loss minds stripes of eight pixels and more
# in full, those of three pixels half, and those of two hardly. The gray field is what a ×4 low resolution can tell:
# stripes of eight pixels and more. Level 2 is the Haar loss whose rise fits its border; level 1 reaches an octave into
# the unknown; the deep low-pass stays outside, and leaves some of the known free as well. Does that show?

# %%
results["9/7, 3 levels"] = improve(coarse_loss)
left = report(results)
show(
    pictures([results[n][0] for n in ("start", *losses)], ["start", *losses], columns=5, tile=1.92),
    "The start and the results of four losses, with what they leave of the octaves of 4–8 and 2–4 pixels: "
    + "; ".join(f"{n} {100 * left[n][0]:.0f} and {100 * left[n][1]:.0f} percent" for n in losses)
    + ".",
)

# %% [markdown]
# **What to see.** The deep low-pass leaves both octaves, and even adds a faint colored speckle, because its smooth
# filters do not fit the blocks. Its structure error is larger than that of the others: it does not see the finest of what
# the low resolution knows. So the paper's loss is one octave too shallow for ×4, the released one, as far as our stand-in
# shows it, deeper than it need be: one smooths what nobody knows, the other forgives errors in what is known. The package's trainer takes the paper's;
# `structure_level: 2` in a configuration, or `HaarLLLoss(level=2)` in an objective of yours, takes the one between.
# Notebook 11, section 5, has trained models with both.
#
# Slide between the loss of level 2 and the pixel loss and watch the texture fade.


# %%
def draw(share):
    x = improve(lambda a, b: (1 - share) * level_2(a, b) + share * F.l1_loss(a, b))
    kept = (100 * energies(x) / energies(start)).tolist()
    title = "{:.0f} % pixel L1\n4–8 px: {:.0f} % · 2–4 px: {:.0f} %".format(100 * share, *kept)
    return pictures([start[0], x[0], truths[0]], ["start\n", title, "truth 1\n"], tile=1.92), (
        f"The start, and the fur after 60 steps with {100 * share:.0f} percent pixel L1 and the rest Haar LL of level 2: "
        "{:.0f} and {:.0f} percent of the octaves of 4–8 and 2–4 pixels are left.".format(*kept)
    )


blend = explore(draw, values=[0.0, 0.1, 0.25, 0.5, 1.0], label="share of pixel L1")
blend

# %%
blend.slider.value = 0.25
show(*draw(0.25))

# %% [markdown]
# **What to see.** A small share of the pixel loss is enough to smooth. Its gradient is weaker, but in the fine bands
# the other loss does not oppose it.
#
# ## 5 · What does it cost?
#
# Written with PyTorch operations, the loss stores intermediate results for its backward pass. The package's operator
# needs two bits per coefficient, for the sign (plus, minus or zero). PyTorch lets us weigh what each keeps.


# %%
def bytes_kept(loss):
    kept = {}
    x = fur.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        loss(x, start)
    return sum(kept.values())


for name, loss in (("by hand", loss_by_hand), ("F.l1_loss", F.l1_loss), ("package", haar_ll_l1_loss)):
    print(f"{name:10s} keeps {bytes_kept(loss):6d} bytes; the picture has {fur.nbytes}")
assert bytes_kept(haar_ll_l1_loss) == 3 * 32 * 32 // 4, "two bits for each of 3×32×32 coefficients"

# %% [markdown]
# Forward, both pictures are read once: 2 floats per pixel and no intermediate written. Notebook 13 builds that kernel.
#
# ## 6 · What does the paper report?
#
# Table 5 of the paper, SeeSR on DIV2K-val; its numbers, not ours. LPIPS is a distance to the truth, so less is better.
# The others score the picture alone, and more is better.
#
# | structure loss | LPIPS ↓ | MANIQA ↑ | MUSIQ ↑ | CLIPIQA ↑ | aesthetic ↑ |
# |---|---|---|---|---|---|
# | none | 0.3382 | 0.6095 | 70.77 | 0.8153 | 5.2505 |
# | pixel L1 | 0.3390 | 0.5828 | 69.73 | 0.7922 | 5.2418 |
# | Haar LL | 0.3369 | 0.5954 | 69.97 | 0.7944 | 5.2683 |
#
# Read it with care. Against pixel L1 the LL loss wins every column, by little. Against *no* structure loss it wins
# fidelity (LPIPS) and the aesthetic score and loses the other three. The paper gives no spread over seeds. Our toy
# cannot confirm these numbers; it shows the mechanism that could produce them.
#
# ## 7 · A bug, and the check that catches it
#
# Someone fuses the backward pass and forgets the ½ of the Haar filter. Every loss value stays right and training goes
# on, with the weight of the loss silently doubled.


# %%
class Forgetful(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward((split(x)[0] - split(y)[0]).sign())
        return loss_by_hand(x, y)

    @staticmethod
    def backward(ctx, grad):
        (sign,) = ctx.saved_tensors
        return grad * (sign / sign.numel()).repeat_interleave(2, -2).repeat_interleave(2, -1), None


check("forward", Forgetful.apply(start, fur), loss_by_hand(start, fur), 1e-6)  # sees nothing
caught(lambda: check("backward", gradient(Forgetful.apply, start, fur), gradient_by_hand(start, fur), 1e-9))

# %% [markdown]
# ## 8 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up, predict then run).** A 64×64 gray picture (one channel) is 0.2 too bright everywhere. What is
# the LL loss, and what is the gradient at one pixel?
# <details><summary>Hint</summary>By how much is one LL coefficient off? How many are there, and how many
# of them does one pixel touch?</details>


# %%
def too_bright():
    raise NotImplementedError  # return the loss and the gradient


def verify_too_bright():
    dark, bright = torch.full((1, 1, 64, 64), 0.4), torch.full((1, 1, 64, 64), 0.6)
    loss, push = too_bright()
    check("loss", loss, haar_ll_l1_loss(bright, dark), 1e-6)
    check("gradient at a pixel", push, gradient(haar_ll_l1_loss, bright, dark)[0, 0, 0, 0], 1e-9)


exercise(1, verify_too_bright)


# %% [markdown]
# **Exercise 2.** Write the gradient when the loss is *squared* instead of absolute, $\frac1N\sum(LL(x)-LL(y))^2$.
# <details><summary>Hint</summary>Only the derivative of the outer function changes.</details>


# %%
def squared_gradient(x, y):
    raise NotImplementedError


def verify_squared():
    wanted = gradient(lambda x, y: (haar_ll(x) - haar_ll(y)).square().mean(), start, fur)
    check("squared", squared_gradient(start, fur), wanted, 1e-8)


exercise(2, verify_squared)


# %% [markdown]
# **Exercise 3.** Repair a picture in one step, without an optimizer: return the picture that has the structure of
# `fur` and the texture of `start`. Its loss must be zero and its fine bands those of `start`.
# <details><summary>Hint</summary>`merge` and two calls of `split`.</details>


# %%
def repaired():
    raise NotImplementedError


def verify_repaired():
    check("loss", haar_ll_l1_loss(repaired(), fur), 0.0, 1e-6)
    check("fine bands", torch.stack(split(repaired())[1]), torch.stack(split(start)[1]), 1e-6)


exercise(3, verify_repaired)


# %% [markdown]
# **Exercise 4 (harder).** The pixel loss ended at the *median* of the truths. Return the picture that the squared
# pixel loss would end at.
# <details><summary>Hint</summary>Which number has the least mean squared distance to eight given numbers?</details>


# %%
def best_for_squares():
    raise NotImplementedError


def verify_best():
    best = best_for_squares()
    push = gradient(lambda x, y: F.mse_loss(x.expand_as(y), y), best, truths)
    check("no push is left", push, torch.zeros_like(push), 1e-8)


exercise(4, verify_best)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * The octave between 4 and 8 pixels is in dispute. Build a structure loss with a Gaussian low-pass of any width and
#   repeat section 1. An answer is a curve of the texture that is left over the width, with both levels of Haar marked
#   in it.
# * The push ±1/(2N) never gets smaller near the goal. Compare the absolute, the squared and the Huber loss of LL as
#   in section 1. An answer is the steps that each needs and the texture that it leaves, over four learning rates.
#
# ## Summary
#
# * The structure loss is the mean absolute difference of LL bands; errors inside a 2×2 block may cancel.
# * Its gradient is ±1/(2N), the same on all four pixels of a block; ties get none.
# * It cannot see the fine bands and leaves the finest octave alone; a pixel loss pulls all texture to the median of all
#   truths, and at ×4 so does this one with the octave of 4 to 8 pixels.
# * `level=2` sees what a ×4 low resolution holds; a deeper low-pass, as the released code's, leaves some of that free.
# * A forward check misses a wrong backward pass; compare gradients, and test the adjoint.
# * The fused operator keeps two bits per coefficient for its backward pass.
#
# NAVIGATION
