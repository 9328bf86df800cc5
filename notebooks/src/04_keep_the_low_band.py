# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 04 · Keep the low band
#
# **You will derive RFSR's structure loss forwards and backwards, and see which texture it leaves alone.**
#
# A quarter of a minute on two cores; nothing to download. Needs the 2×2 Haar block of notebook 02, which is repeated here
# in one line.
#
# NAVIGATION
#
# In its first sampling steps RFSR holds the *structure* of the picture with a loss on the Haar LL band (the picture at
# half size). Afterwards you can
#
# * compute that loss and its gradient on paper, and tell a right backward pass from one that is off by a factor,
# * say which changes of a picture the loss cannot see, and why that is wanted,
# * compare it with a plain pixel loss and with a coarser low-pass like that of the released code.

# %%
import pywt
import torch
import torch.nn.functional as F

from rfsr_ext import haar_ll, haar_ll_l1_loss
from rfsr_ext.data import load_photograph
from rfsr_ext.losses import HaarLLLoss
from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show

cat = torch.from_numpy(load_photograph("chelsea").copy()).movedim(-1, 0)  # [3, 300, 451] in [0, 1]


def patch(top, left, size=64):
    return cat[None, :, top : top + size, left : left + size]


eye = patch(92, 128)

# %% [markdown]
# ## 1 · What is the question?
#
# A low-resolution picture of fur tells where the cat is. It does not tell where each hair is. So many sharp pictures
# are right answers. Let us make eight of them: all share the LL band of this cat's eye, and each has the fine bands (LH,
# HL and HH: what LL leaves out) of another piece of the same fur.


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


check("merge undoes split", merge(*split(eye)), eye, 1e-6)

# %%
places = [(150, 60), (180, 60), (200, 100), (60, 150), (120, 250), (150, 280), (180, 250), (210, 200), (90, 200)]
fur = [split(patch(*place))[1] for place in places]
truths = torch.cat([merge(split(eye)[0], fine) for fine in fur[:8]])  # eight pictures that are all right


def fine_energy(x):
    """Sum of squares of the three fine bands, per picture."""
    return sum(band.double().square().sum((1, 2, 3)) for band in split(x)[1]).mean().item()


blotches = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
blotches = F.interpolate(blotches, size=32, mode="bilinear")
start = merge(split(eye)[0] + 0.3 * blotches, fur[8])  # wrong colors, plausible fur
print(f"fine energy: truths {fine_energy(truths):.1f}, start {fine_energy(start):.1f}")

show(
    pictures([*truths[:4], start[0]], ["truth 1", "truth 2", "truth 3", "truth 4", "start"], tile=1.4),
    "Four of the eight possible truths, 64 pixels wide: the same cat's eye with different fine fur. Fifth, the start: "
    f"the eye with colored blotches and with fur of fine energy {fine_energy(start):.1f}.",
)

# %% [markdown]
# **What to see.** The start has two properties: its structure is wrong (the blotches), and its texture is plausible,
# although it is the texture of none of the truths. *A good structure loss should mend the first and leave the second.*
# Two losses now move the pixels of the start; a third follows in section 4.


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


results = {"start": start, "pixel L1": improve(F.l1_loss), "Haar LL": improve(haar_ll_l1_loss)}
kept = {name: fine_energy(x) / fine_energy(start) for name, x in results.items()}
structure = {name: haar_ll_l1_loss(x, eye).item() for name, x in results.items()}

titles = [f"{name}\nLL error {structure[name]:.3f}\nfine energy {100 * kept[name]:.0f} %" for name in results]
show(
    pictures([x[0] for x in results.values()], titles, tile=1.9),
    "The eye after 60 steps: " + "; ".join(title.replace("\n", ", ") for title in titles) + ".",
)
assert max(structure["pixel L1"], structure["Haar LL"]) < structure["start"] / 5, "both losses must mend the structure"
assert kept["pixel L1"] < 0.5, "the pixel loss must smooth"
check("share of fine energy that Haar LL leaves", kept["Haar LL"], 1.0, 1e-4)

# %% [markdown]
# **What to see.** *LL error* is the mean absolute difference of the LL bands, *fine energy* the sum of squares of the
# others. Both losses removed the blotches. The pixel loss also removed most of the fur: where eight truths
# disagree, the value with the least mean absolute error is their median, and the median of eight furs is smooth. The
# LL loss did not touch the fur at all. The paper reports just this "texture smoothing" when L1 takes the place of its
# loss (its section 4 and Table 5). How can a loss be so exact about what it leaves alone? Its formula tells.
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


check("a photograph: by hand and package", haar_ll_l1_loss(start, eye), loss_by_hand(start, eye), 1e-6)
check("the module of the trainer", HaarLLLoss()(start, eye), loss_by_hand(start, eye), 1e-6)
second = loss_by_hand(split(start)[0], split(eye)[0])
check("level=2: the LL band of the LL band", haar_ll_l1_loss(start, eye, level=2), second, 1e-6)
decoded = haar_ll_l1_loss(2 * start - 1, 2 * eye - 1, input_range=(-1, 1))  # a decoder gives pixels in [-1, 1]
check("input_range: shifted, halved, clamped", decoded, loss_by_hand(start.clamp(0, 1), eye), 1e-6)

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


check("gradient: by hand and autograd", gradient_by_hand(start, eye), gradient(loss_by_hand, start, eye), 1e-9)
check("gradient: by hand and package", gradient_by_hand(start, eye), gradient(haar_ll_l1_loss, start, eye), 1e-9)

# %%
speckle = 0.02 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
nearly = merge(split(eye)[0] + speckle, fur[8])  # every block a little too bright or too dark
fields = {name: gradient(loss, nearly, eye)[0, 0] for name, loss in (("pixel L1", F.l1_loss), ("LL", haar_ll_l1_loss))}
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
for name, band in zip(("LH", "HL", "HH"), split(gradient(haar_ll_l1_loss, start, eye))[1], strict=True):
    check(f"{name} of the gradient", band, torch.zeros_like(band), 0)
check("twice pixel L1: four times fewer terms, times ½", sizes["LL"], 2 * sizes["pixel L1"], 1e-9)

# %% [markdown]
# Three places where backward passes go wrong: the second argument, an exact zero, and odd sizes, whose last row or
# column is its own mirror partner and so counts twice.

# %%
target = eye.clone().requires_grad_()
(towards_target,) = torch.autograd.grad(haar_ll_l1_loss(start, target), target)
check("the second argument gets minus the gradient", towards_target, -gradient_by_hand(start, eye), 1e-9)
check("equal pictures: no push", gradient(haar_ll_l1_loss, eye, eye), torch.zeros_like(eye), 0)
odd, nothing = torch.ones(1, 1, 5, 7), torch.zeros(1, 1, 5, 7)
rows, columns = torch.tensor([1, 1, 1, 1, 2.0]), torch.tensor([1, 1, 1, 1, 1, 1, 2.0])
wanted = rows[:, None] * columns / (2 * 3 * 4)  # 3×4 coefficients
check("5×7 pixels", gradient(haar_ll_l1_loss, odd, nothing)[0, 0], wanted, 1e-8)

# %% [markdown]
# In training the ground truth is data and asks for no gradient, so the minus sign is never computed.
#
# ### Adjoint and gradient check
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
# Now a third loss. The released code does not use Haar: it takes the low-pass of a *three-level dual-tree complex
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


losses = {"pixel L1": F.l1_loss, "Haar LL": haar_ll_l1_loss, "9/7, 3 levels": coarse_loss}
periods = [2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32]
gray = torch.full((4, 1, 64, 64), 0.5)
seen = {}
for name, loss in losses.items():
    values = torch.tensor([loss(gray + 0.1 * stripes(period), gray) for period in periods])
    wide = loss(gray + 0.1, gray) * 2 / torch.pi  # 2/π is the mean of |sin|
    seen[name] = values / wide

# %%
figure, axes = panels(width=6.6, height=3.0)
for (name, values), marker in zip(seen.items(), "so^", strict=True):
    axes.semilogx(periods, 100 * values, marker=marker, label=name)
axes.set(xlabel="pixels between two stripes", ylabel="seen (% of a wide stripe)", ylim=(0, 125))
axes.set_xticks(periods, [f"{p:g}" for p in periods])
axes.minorticks_off()
axes.legend(frameon=False, ncols=3, loc="upper left")
at = {name: dict(zip(periods, values.tolist(), strict=True)) for name, values in seen.items()}
show(
    figure,
    "How much three losses see of stripes 3, 6 and 24 pixels apart: "
    + "; ".join(f"{n} {100 * a[3]:.0f}, {100 * a[6]:.0f} and {100 * a[24]:.0f} percent" for n, a in at.items())
    + ".",
)
assert at["9/7, 3 levels"][6] < 0.2 < 0.7 < at["Haar LL"][6] and at["pixel L1"][3] > 0.8

# %% [markdown]
# **What to see.** The pixel loss minds all stripes about equally. The Haar loss minds stripes of eight pixels and more
# in full, those of three pixels half, and those of two hardly. The deep low-pass hardly minds anything up to eight
# pixels. So the deeper loss leaves more freedom: besides fur, it leaves small shapes. Does that show?

# %%
results["9/7, 3 levels"] = improve(coarse_loss)
structure = {name: loss_by_hand(x, eye).item() for name, x in results.items()}
kept = {name: 100 * fine_energy(x) / fine_energy(start) for name, x in results.items()}
for name in results:
    print(f"{name:14s} LL error {structure[name]:.3f}   fine energy kept {kept[name]:.0f} %")
show(
    pictures([results[n][0] for n in ("start", *losses)], ["start", *losses], tile=1.75),
    "The start and the results of three losses. LL errors: "
    + ", ".join(f"{n} {structure[n]:.3f}" for n in losses)
    + ".",
)

# %% [markdown]
# **What to see.** All three remove the blotches, which are wider than eight pixels. The deep low-pass leaves the
# texture too, and even adds a faint colored speckle, because its smooth filters do not fit the 2×2 blocks. In LL its
# error is several times larger than that of the others, because it does not see the finer part of LL. That is the trade.
# Paper and released code agree on *low frequencies only*, and differ in how low.
#
# Slide between the Haar loss and the pixel loss and watch the texture fade.


# %%
def draw(share):
    x = improve(lambda a, b: (1 - share) * haar_ll_l1_loss(a, b) + share * F.l1_loss(a, b))
    left = 100 * fine_energy(x) / fine_energy(start)
    title = f"{100 * share:.0f} % pixel L1\nfine energy {left:.0f} %"
    return pictures([start[0], x[0]], ["start\n", title], tile=2.2), (
        f"The start, and the eye after 60 steps with {100 * share:.0f} percent pixel L1 and the rest Haar LL: "
        f"{left:.0f} percent of the fine energy is left."
    )


blend = explore(draw, values=[0.0, 0.1, 0.25, 0.5, 1.0], label="share of pixel L1")
blend

# %%
blend.slider.value = 0.25
show(*draw(0.25))

# %% [markdown]
# **What to see.** A small share of the pixel loss is enough to smooth. Its gradient is weaker, but in the fine bands
# nothing opposes it.
#
# ## 5 · What does it cost?
#
# Written with PyTorch operations, the loss stores intermediate results for its backward pass. The package's operator
# needs two bits per coefficient, for the sign (plus, minus or zero). PyTorch lets us weigh what each keeps.


# %%
def bytes_kept(loss):
    kept = {}
    x = eye.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        loss(x, start)
    return sum(kept.values())


for name, loss in (("by hand", loss_by_hand), ("F.l1_loss", F.l1_loss), ("package", haar_ll_l1_loss)):
    print(f"{name:10s} keeps {bytes_kept(loss):6d} bytes; the picture has {eye.nbytes}")
assert bytes_kept(haar_ll_l1_loss) == 3 * 32 * 32 // 4, "two bits for each of 3×32×32 coefficients"

# %% [markdown]
# Forward, both pictures are read once: 2 floats per pixel and no intermediate written. Notebook 10 builds that kernel.
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


check("forward", Forgetful.apply(start, eye), loss_by_hand(start, eye), 1e-6)  # sees nothing
caught(lambda: check("backward", gradient(Forgetful.apply, start, eye), gradient_by_hand(start, eye), 1e-9))

# %% [markdown]
# ## 8 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. A solution is folded away under each.
#
# **Exercise 1 (warm-up, predict then run).** A 64×64 gray picture (one channel) is 0.2 too bright everywhere. What is
# the LL loss, and what is the gradient at one pixel?
# <details><summary>Hint</summary>Each coefficient is off by half of four times 0.2. There are 32·32 of them.</details>


# %%
def too_bright():
    raise NotImplementedError  # return the loss and the gradient


def verify_too_bright():
    dark, bright = torch.full((1, 1, 64, 64), 0.4), torch.full((1, 1, 64, 64), 0.6)
    loss, push = too_bright()
    check("loss", loss, haar_ll_l1_loss(bright, dark), 1e-6)
    check("gradient at a pixel", push, gradient(haar_ll_l1_loss, bright, dark)[0, 0, 0, 0], 1e-9)


exercise(1, verify_too_bright)


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution to exercise 1 (expand to read)
def too_bright():
    return 4 * 0.2 / 2, 1 / (2 * 32 * 32)


exercise(1, verify_too_bright)

# %% [markdown]
# **Exercise 2.** Write the gradient when the loss is *squared* instead of absolute, $\frac1N\sum(LL(x)-LL(y))^2$.
# <details><summary>Hint</summary>Only the derivative of the outer function changes: 2d for sign(d).</details>


# %%
def squared_gradient(x, y):
    raise NotImplementedError


def verify_squared():
    wanted = gradient(lambda x, y: (haar_ll(x) - haar_ll(y)).square().mean(), start, eye)
    check("squared", squared_gradient(start, eye), wanted, 1e-8)


exercise(2, verify_squared)


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution to exercise 2 (expand to read)
def squared_gradient(x, y):
    d = split(x)[0] - split(y)[0]
    return (d / d.numel()).repeat_interleave(2, -2).repeat_interleave(2, -1)  # ½ · 2d / N


exercise(2, verify_squared)

# %% [markdown]
# **Exercise 3.** Repair a picture in one step, without an optimizer: return the picture that has the structure of
# `eye` and the texture of `start`. Its loss must be zero and its fine bands those of `start`.
# <details><summary>Hint</summary>`merge` and two calls of `split`.</details>


# %%
def repaired():
    raise NotImplementedError


def verify_repaired():
    check("loss", haar_ll_l1_loss(repaired(), eye), 0.0, 1e-6)
    check("fine bands", torch.stack(split(repaired())[1]), torch.stack(split(start)[1]), 1e-6)


exercise(3, verify_repaired)


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution to exercise 3 (expand to read)
def repaired():
    return merge(split(eye)[0], split(start)[1])


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


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution to exercise 4 (expand to read)
def best_for_squares():
    return truths.mean(0, keepdim=True)


exercise(4, verify_best)

# %% [markdown]
# ## Summary
#
# * The structure loss is the mean absolute difference of LL bands; errors inside a 2×2 block may cancel.
# * Its gradient is ±1/(2N), the same on all four pixels of a block; ties get none.
# * It cannot see the fine bands and so leaves texture alone; a pixel loss pulls texture to the median of all truths.
# * The released code uses a deeper low-pass, which also leaves shapes of a few pixels free.
# * A forward check misses a wrong backward pass; compare gradients, and test the adjoint.
# * The fused operator keeps two bits per coefficient for its backward pass.
#
# NAVIGATION
