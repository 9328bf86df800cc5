# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 07 · Hold the style
#
# **You will watch a reward being cheated, build the style loss that is meant to stop it, and test whether it
# does.**
#
# Three quarters of a minute on two cores; nothing to download. Needs no other notebook.
#
# NAVIGATION
#
# A reward is a network's opinion of a picture. Ask an optimizer for a higher opinion and it will find pictures that the
# network likes and nobody else. RFSR answers with a *style loss*, equation 6 of its paper, which the paper calls Gram-KL: it
# ties the style of the pictures to that of the *frozen model*, an untouched copy from before the training. Afterwards you can
#
# * compute a Gram matrix on paper and say what it keeps of a picture and what it forgets,
# * write equation 6 forwards and backwards, and choose its normalization knowingly,
# * explain why its reference is the frozen model and not the ground truth, and what KL and LoRA do instead.
#
# It is long. You can read it in two sittings: sections 1 to 6 (what a Gram matrix is) and 7 to 10 (holding a model).
#
# Two networks here are **stand-ins**: the reward is MiniIQA, a small network in CLIP-IQA's place, and VGG19 has *seeded
# random weights*. No number below says anything about the real ones.

# %%
import diffusers
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils import parametrize

from rfsr_ext import gram_loss, gram_matrix
from rfsr_ext.data import Degradation, load_photograph
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.metrics import Judge, ssim
from rfsr_ext.models import load_model
from rfsr_ext.notebook import COLORS, caught, check, exercise, explore, panels, pictures, show
from rfsr_ext.recordings import recorded, say_missing
from rfsr_ext.rewards import MiniIQA
from rfsr_ext.sampling import TimestepWindows, generators, rollout, sample
from rfsr_ext.training import RFSRObjective

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()

style = VGGGramLoss(weights="random")
shallow = VGGGramLoss({"conv1_2": 1.0, "conv2_2": 1.0, "conv3_4": 1.0}, weights="random")  # for section 6
model, reward, judge = load_model("mini"), MiniIQA.from_pretrained(), Judge.from_pretrained()
print(f"reward: {reward.label}")
print(f"style loss: {style.label}")

# %% [markdown]
# ## 1 · What is reward hacking?
#
# We let the mini model upscale a cup of coffee that it has never seen, and then change the picture itself, pixel by
# pixel, so that the reward rises. (RFSR changes the weights of the model and not the pixels, and so do we in section 8.
# Pixels cheat faster.)


# %%
def photograph(name):
    """A whole photograph, [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(load_photograph(name).copy()).movedim(-1, 0)[None]


def miniature(name, top, left):
    """A photograph at a quarter of its size, cut to [1, 3, 64, 64], and its low resolution, [1, 3, 16, 16]."""
    gt = F.avg_pool2d(photograph(name), 4)[..., top : top + 64, left : left + 64]
    lr, _ = Degradation.preset("mini").degrade(gt[0].movedim(0, -1).numpy(), np.random.default_rng(1))
    return gt, torch.from_numpy(lr).movedim(-1, 0)[None]


(gt, lr), prompt = miniature("coffee", 14, 39), ["coffee, cup, spoon, wood, table"]
before = sample(model, lr, prompt, generators(0, [0]))  # what the pre-trained model makes

hacked = before.clone().requires_grad_()
adam = torch.optim.Adam([hacked], lr=0.02)
for _ in range(25):
    loss = -reward.score(hacked.clamp(0, 1)).mean()
    adam.zero_grad()
    loss.backward()
    adam.step()
hacked = hacked.detach().clamp(0, 1)

enlarged = F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)
trio = {"bicubic": enlarged, "pre-trained model": before, "reward climbed": hacked, "truth": gt}
with torch.no_grad():
    scores = {n: reward.score(x).item() for n, x in trio.items()}
likeness = {n: ssim(x, gt).item() for n, x in trio.items()}
judged = {n: judge.score(x).item() for n, x in trio.items()}
titles = [f"{n}\nreward {scores[n]:.2f} · SSIM {likeness[n]:.2f}\njudge {judged[n]:.0f}" for n in trio]
show(
    pictures([lr[0], *(x[0] for x in trio.values())], ["low resolution\n\n", *titles], tile=1.92),
    "A cup of coffee, 64 pixels wide: " + "; ".join(title.replace("\n", ", ") for title in titles) + ".",
)
assert scores["reward climbed"] > scores["truth"] and likeness["reward climbed"] < likeness["pre-trained model"]
fell = judged["reward climbed"] < judged["pre-trained model"]
print(
    "the judge notices: its score fell" if fell else "the judge is fooled along with the reward: its score did not fall"
)

# %% [markdown]
# **What to see.** The reward now prefers our picture to the *true photograph*. Look at it, and at the truth beside it. SSIM
# (likeness to the truth, 1 for equal pictures) was never optimized; it fell. The *judge* is a held-out network built
# differently from the reward (about 0 for a ruined picture and 100 for an untouched one, but nothing keeps it in that
# range); the line above says whether it noticed. A score that rises while the picture spoils is *reward hacking*. The paper
# finds that in super-resolution it often shows "as strong stylization". So: watch the style.
#
# ## 2 · What is style? A Gram matrix on paper
#
# A convolutional network turns a picture into $C$ feature maps, say one that answers to dark spots and one that
# answers to edges. Write each as a row of $F$. The Gram matrix holds how often two features occur *together*, summed
# over all places:
# $G=FF^\mathsf T$. Compute it for two features at four places before you run the cell:
#
# $$F=\begin{pmatrix}1&2&0&1\\0&1&3&1\end{pmatrix}$$

# %%
toy = torch.tensor([[1, 2, 0, 1], [0, 1, 3, 1]])
by_loop = torch.zeros(2, 2, dtype=torch.long)
for i in range(2):
    for j in range(2):
        for place in range(4):
            by_loop[i, j] += toy[i, place] * toy[j, place]
print(by_loop)
check("three loops and one product", by_loop, toy @ toy.T, 0)
check("on paper", by_loop, [[6, 3], [3, 11]], 0)
check("package, divided by C·H·W = 8", gram_matrix(toy.reshape(1, 2, 2, 2).double())[0], by_loop / 8, 1e-12)

# %% [markdown]
# The sum runs over places, so the Gram matrix *forgets where* anything is. Shuffle the columns and it stays the same
# to the last integer. That is what makes it a description of style: fur anywhere is fur.

# %%
shuffled = toy[:, [2, 0, 3, 1]]
check("places shuffled", shuffled @ shuffled.T, by_loop, 0)
swapped = toy[:, [2, 0, 3, 1]] * torch.tensor([[1], [0]]) + toy * torch.tensor([[0], [1]])  # only the first row moved
print("only one feature moved:", (swapped @ swapped.T).tolist())
assert (swapped @ swapped.T)[0, 1] != by_loop[0, 1], "which features meet must matter"

# %% [markdown]
# **What to see.** Moving one feature alone keeps the diagonal (how much of each there is) and changes the other
# entries (what goes with what).
#
# ## 3 · Three ways to normalize
#
# A large picture has more places, so a raw Gram matrix grows with it. The literature divides in different ways: by
# $HW$ (fastai's course), by $CHW$ (the book *Dive into Deep Learning*, and this package), and the released RFSR code
# divides by $CHW$ *after* a layer norm over channels and places together. Equation 6 does not say. Does it matter?

# %%
ways = {
    "raw": lambda f: f.flatten(2) @ f.flatten(2).mT,
    "/ HW": lambda f: f.flatten(2) @ f.flatten(2).mT / f[0, 0].numel(),
    "/ CHW": lambda f: f.flatten(2) @ f.flatten(2).mT / f[0].numel(),
    "layer norm, / CHW": lambda f: ways["/ CHW"](F.layer_norm(f, f.shape[1:])),
}
features = toy.double().reshape(1, 2, 2, 2)
changes = {
    "4 × places": features.repeat_interleave(2, 2).repeat_interleave(2, 3),
    "2 × contrast": 2 * features,
    "2 × channels": features.repeat(1, 2, 1, 1),
}
print(f"{'all entries grow by':20s}" + "".join(f"{name:>14s}" for name in changes))
factor = {}
for name, gram in ways.items():
    factor[name] = [(gram(f).abs().sum() / gram(features).abs().sum()).item() for f in changes.values()]
    print(f"{name:20s}" + "".join(f"{value:14.1f}" for value in factor[name]))
check("factors of / CHW", factor["/ CHW"], [1, 4, 2], 1e-6)
check("factors of layer norm", factor["layer norm, / CHW"], [1, 1, 2], 1e-3)

odd = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0)).double()
check("the package divides by CHW", gram_matrix(odd), ways["/ CHW"](odd), 1e-12)
check("its joint_layer_norm", gram_matrix(odd, joint_layer_norm=True), ways["layer norm, / CHW"](odd), 1e-12)

# %% [markdown]
# **What to see.** Dividing by places makes pictures of different sizes comparable. Every entry is a product of two
# features, so twice the contrast counts four times. Layer norm forgets contrast altogether: features that only grow
# *stronger* do not show in it. Twice the channels make four times as many entries (the table shows their sum). Dividing
# by $C$ halves each of them, so the sum of their *squares* stays the same: layers of 64 and of 512 channels can be
# added. And since the loss is a squared distance, whoever multiplies the Gram matrix by a factor must divide the weight
# of the loss, $\lambda_r$, by its square.
#
# ## 4 · Does it measure style, even at random?
#
# VGG19 usually carries ImageNet weights. Ours are random: seeded, never trained. Random filters still answer to
# orientations and scales. We take six patches of three textures and measure, between all pairs, the distance of
# equation 6: the squared difference of the Gram matrices, summed over five layers (section 5 has the formula; the
# weights 0.1, 0.1, 1, 1, 1 are those of the released code).


# %%
def patch(name, top, left, size=64):
    return photograph(name)[..., top : top + size, left : left + size]


names = ["grass", "gravel", "brick"]
patches = torch.cat([patch(name, *place) for name in names for place in ((100, 100), (300, 250))])
with torch.no_grad():
    maps = style.vgg(patches)  # five layers of [6, C, H, W]


def far_apart(i, j):
    return gram_loss([f[i, None] for f in maps], [f[j, None] for f in maps], weights=[0.1, 0.1, 1, 1, 1])


distance = torch.tensor([[far_apart(i, j) for j in range(6)] for i in range(6)])
within = torch.stack([distance[0, 1], distance[2, 3], distance[4, 5]]).mean()
between = (distance.sum() - 6 * within) / 24
check("the loss module says the same", 1e4 * style(patches[:1], patches[4:5]), 1e4 * distance[0, 4], 1e-3)
labels = [f"{name} {k}" for name in names for k in (1, 2)]
print(" " * 9 + "".join(f"{label:>10s}" for label in labels))
for label, row in zip(labels, 1e4 * distance, strict=True):
    print(f"{label:9s}" + "".join(f"{value:10.2f}" for value in row))
nearest = (distance + distance.max() * torch.eye(6)).argmin(1)
print("nearest to each:", ", ".join(f"{label}: {labels[k]}" for label, k in zip(labels, nearest, strict=True)))

show(
    pictures([*patches], labels, columns=3, tile=1.92),
    "Six patches of 64 pixels: two each of grass, gravel and brick. Style distances (times 10000): "
    + ", ".join(f"{labels[i]} to {labels[j]} {1e4 * distance[i, j]:.2f}" for i, j in ((0, 1), (2, 3), (4, 5), (0, 4)))
    + ".",
)
print(f"mean distance within a texture {1e4 * within:.2f}, between textures {1e4 * between:.2f}")
assert within < between

# %% [markdown]
# **What to see.** On average two patches of one texture are closer than two of different ones, with filters that never
# learned anything. But read the line *nearest to each*: a mean is not a proof, and not every patch finds its twin. This
# Gram distance also counts brightness and contrast (section 3), and two patches of grass may differ in both. A trained
# VGG19 has better filters; the arithmetic is the same.
#
# And the trained one? `rfsr record vgg19` measures the same six patches with ImageNet's VGG19. The units differ from
# ours, so compare what is independent of them: the ratio of the two means, and how many patches have their twin nearest.

# %% tags=["nbval-ignore-output"]
if (recording := recorded("vgg19")) is None:
    say_missing("vgg19")
else:
    print(recording.provenance)
    trained = recording.rows
    mean = trained.groupby("same")["distance"].mean()
    both = pd.concat([trained, trained.rename(columns={"a": "b", "b": "a"})], ignore_index=True)
    twins = both.loc[both.groupby("a")["distance"].idxmin(), "same"].sum()
    print(f"between over within: trained {mean[False] / mean[True]:.1f}, random {between / within:.1f}")
    print(f"twin nearest: trained {twins} of 6, random {sum(int(k) == i ^ 1 for i, k in enumerate(nearest))} of 6")

# %% [markdown]
# ## 5 · Equation 6, forwards and backwards
#
# $$\mathcal L_{gram\text{-}kl}=\sum_l w_l\,\frac1N\sum_n\bigl\|G(F^l_n)-G(F'^l_n)\bigr\|_2^2$$
#
# $\|\cdot\|_2^2$ is here the sum of all squared entries (for a matrix one says *Frobenius norm*). $F^l$ are VGG19's
# features of layer $l$ for the picture of the model in training, $F'^l$ for that of the frozen model, and $n$ counts
# the $N$ pictures of a batch. With $D=G-G'$ and $G=FF^\mathsf T/CHW$, the derivative is
# $\partial\mathcal L/\partial F=\frac{4}{N\,CHW}\,D\,F$ ($D$ is symmetric, and $F$ occurs twice).

# %%
g = torch.Generator().manual_seed(0)
f, f_frozen = torch.randn(2, 5, 6, 7, generator=g).double(), torch.randn(2, 5, 6, 7, generator=g).double()


def distance_by_hand(f, f_frozen):
    G, G_frozen = (x.flatten(2) @ x.flatten(2).mT / x[0].numel() for x in (f, f_frozen))
    return (G - G_frozen).square().sum((1, 2)).mean()


def gradient_by_hand(f, f_frozen):
    D = gram_matrix(f) - gram_matrix(f_frozen)
    return (4 / (len(f) * f[0].numel()) * D @ f.flatten(2)).reshape(f.shape)


f.requires_grad_()
(push,) = torch.autograd.grad(gram_loss(f, f_frozen), f)
check("forward: by hand and package", gram_loss(f, f_frozen), distance_by_hand(f, f_frozen), 1e-12)
check("backward: by hand and package", push, gradient_by_hand(f, f_frozen), 1e-12)
cached = gram_loss(f, target_gram=gram_matrix(f_frozen))
check("the target's Gram matrix computed once", cached, distance_by_hand(f, f_frozen), 1e-12)
assert torch.autograd.gradcheck(lambda x: gram_loss(x, f_frozen), f)


def released_by_hand(f, f_frozen):
    G, G_frozen = (ways["layer norm, / CHW"](x) for x in (f, f_frozen))
    return (G - G_frozen).abs().mean()


released = gram_loss(f, f_frozen, weights=[1 / f.shape[1] ** 2], criterion="l1", joint_layer_norm=True)
check("the released variant, forward", released, released_by_hand(f, f_frozen), 1e-12)
pushes = [torch.autograd.grad(loss, f)[0] for loss in (released, released_by_hand(f, f_frozen))]
check("the released variant, backward", *pushes, 1e-12)

# %%
x, reference = hacked.clone().requires_grad_(), before.clone().requires_grad_()
layers = style.vgg(x), style.vgg(reference)
whole = sum(w * distance_by_hand(a, b) for w, a, b in zip([0.1, 0.1, 1, 1, 1], *layers, strict=True))
value = style(x, reference)
value.backward()
(wanted,) = torch.autograd.grad(whole, x)
check("five layers: by hand and package", value / whole, 1.0, 1e-4)
check("gradient in the picture", x.grad / wanted.abs().max(), wanted / wanted.abs().max(), 1e-3)
assert reference.grad is None, "the reference must receive no gradient"
print("the reference received no gradient")

# %% [markdown]
# **Where is the KL?** Nowhere. The paper writes "We use KL divergence to regularize the Gram matrices", but its
# equation 6 is a squared distance of matrices, not a divergence of distributions. The released code takes the mean
# *absolute* difference after a layer norm ([all differences](paper_and_released_code.md)), which we checked
# above, too. We use the equation, and call it the style loss, or by its means the Gram loss.
#
# ## 6 · What the Gram distance alone can paint
#
# The classic proof that Gram matrices hold style is to paint with them. Start from a photograph of a cat and lower its
# distance to a texture: style transfer, in thirty lines. We take three shallow layers, whose filters see at most 48
# pixels, and L-BFGS, an optimizer for problems without random batches. The network is still the random stand-in;
# nothing here has learned from pictures.

# %%
y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")


def two_colors(mask, color, ground):
    return torch.where(mask, *(torch.tensor(c)[:, None, None] for c in (color, ground)))[None]


textures = {
    "stripes": two_colors((x + y) % 8 < 4, (0.95, 0.85, 0.3), (0.1, 0.2, 0.5)),
    "dots": two_colors((x % 8 - 3.5) ** 2 + (y % 8 - 3.5) ** 2 < 8, (0.9, 0.3, 0.2), (0.9, 0.9, 0.8)),
    "gravel": patch("gravel", 100, 100),
}


def paint(content, texture, steps=30):
    """``content`` with the Gram matrices of ``texture``."""
    wanted = shallow.target_gram(texture)
    picture = content.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([picture], max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = 1e4 * shallow(picture, target_gram=wanted)
        loss.backward()
        return loss

    optimizer.step(closure)
    return picture.detach().clamp(0, 1)


cat, _ = miniature("chelsea", 3, 21)
painted = {name: paint(cat, texture) for name, texture in textures.items()}
left = {n: (shallow(painted[n], textures[n]) / shallow(cat, textures[n])).item() for n in textures}
tiles = [picture[0] for picture in (cat, *textures.values(), hacked, *painted.values())]
titles = ["a cat", *textures, "section 1's hack", *(f"in {n}" for n in textures)]
show(
    pictures(tiles, titles, columns=4, tile=1.92),
    "A cat's face and 3 textures; below, the hack of section 1 and the cat in each: under 30 % of the distance left.",
)
assert max(left.values()) < 0.3

# %% [markdown]
# **What to see.** In dots and gravel the cat stays recognizable, because we started there; in stripes it drowns. Its
# fur turns into strokes of the texture. Nobody said where a stripe should go: the Gram matrix knows only which features
# occur together and how strongly. Set the hack of section 1, beside them, against these: it, too, is painted over the
# picture. A *small* Gram distance to the pre-trained model therefore means: same strokes, same colors and
# contrast, wherever they are.
#
# ## 7 · Why is the reference the frozen model?
#
# The truth is at hand during training. Why not pull towards the truth's style? The paper gives two reasons:
# pre-trained models do not hack, and one wants to surpass the truth. A third shows in numbers. At the start of
# training our model *is* the pre-trained one:

# %%
for name, target in (("frozen model", before), ("truth", gt)):
    x = before.clone().requires_grad_()
    value = style(x, target)
    (push,) = torch.autograd.grad(value, x)
    print(f"reference {name:12s}  distance {1e4 * value.item():.2g}e-4   norm of the gradient {push.norm().item():.1e}")
    if target is before:
        check("a leash at rest does not pull", push, torch.zeros_like(push), 0)
    else:
        assert push.norm() > 0, "the truth pulls from the first step on"

# %% [markdown]
# **What to see.** Towards the frozen model the style loss is silent until something changes: it is a leash. Towards the
# truth it pulls from the first step on: that is one more teacher, with an opinion on texture that competes with the
# reward.
#
# A sampler starts from noise and removes it step by step; at each step the network reads the *noisy state* and the
# *condition* (low resolution and prompt), and its output implies a finished picture (notebook 01). In the package,
# `RFSRObjective` calls the frozen model on the *same* noisy state under the same condition, and compares the two
# pictures. We disturb the weights of a copy, the *student*, as training would, and compute the term by hand. A sampler
# of 10 steps keeps it short; step 9 is in the reward window, the late steps at which rewards and style loss act.

# %%
student = model.reference()  # a copy of U-Net and ControlNet
with torch.no_grad():
    for weight in student.unet.parameters():
        weight += 0.05 * weight.std(correction=0) * torch.randn(weight.shape, generator=g)
windows = TimestepWindows.from_steps(4, 8, last=10)
options = dict(lambda_style=20.0, reference=model, num_inference_steps=10)

with torch.no_grad():
    condition = student.condition(lr, prompt)
    state = rollout(student, condition, 9, generators(0, [0]), num_inference_steps=10)
    outputs = [m.predict(state.latents, state.timestep, condition) for m in (student, model)]
    clean = [state.process.pred_original_sample(output, state.timestep, state.latents) for output in outputs]
    now, then = (model.decode(z).clamp(0, 1) for z in clean)
    by_hand = {"Gram": style(now, then), "KL": (outputs[0] - outputs[1]).square().mean()}
    objectives = {
        "Gram": RFSRObjective(student, windows, style_loss=style, **options),
        "KL": RFSRObjective(student, windows, kl=True, **options),
    }
    for name, objective in objectives.items():
        loss, log = objective(lr, gt, prompt, 9, generators(0, [0]))
        check(f"{name}: by hand and package", log["style"] / by_hand[name], 1.0, 1e-4)
        check(f"{name}: times its weight", loss / (20 * by_hand[name]), 1.0, 1e-4)

# %% [markdown]
# ## 8 · Four ways to hold a model back
#
# * **None.** Only the reward counts.
# * **KL.** Keep each denoising step's distribution near the frozen model's. With a sampler that adds noise, both are
#   Gaussians of the same width, and then the Kullback–Leibler divergence is the squared distance of their means over
#   $2\sigma^2$: the package takes the mean squared change of the network's output (`kl=True`).
# * **LoRA.** Train not the matrix $W$ but a thin product: $W+BA$ of rank $r$. Few numbers, so little room to cheat;
#   $B=0$ at the start, so training begins at the pre-trained model.
# * **Gram.** Change what you like, in whatever place, but keep the statistics of textures.
#
# The claims about KL and LoRA fit in a cell.

# %%
a, b, sigma = torch.randn(12, generator=g), torch.randn(12, generator=g), 0.3
normal = torch.distributions.Normal
kl = torch.distributions.kl_divergence(normal(a, sigma), normal(b, sigma)).sum()
check("KL of two Gaussians of one width", kl / ((a - b).square().sum() / (2 * sigma**2)), 1.0, 1e-5)


class LowRank(torch.nn.Module):
    """W to W + BA; convolutions count as matrices of one row per output channel."""

    def __init__(self, W, rank=4):
        super().__init__()
        self.A = torch.nn.Parameter(torch.randn(rank, W[0].numel()) / W[0].numel() ** 0.5)
        self.B = torch.nn.Parameter(torch.zeros(len(W), rank))

    def forward(self, W):
        return W + (self.B @ self.A).view_as(W)


W = torch.randn(128, 128, generator=g)
thin = LowRank(W)
check("LoRA begins at the pre-trained weights", thin(W), W, 0)
print(f"numbers to train: {W.numel()} in W, {sum(p.numel() for p in thin.parameters())} in A and B")

# %% [markdown]
# Now a small version of the paper's Table 4, with *direct* optimization: two pictures, one noisy state each (step 9 of
# 10), six steps of Adam on the weights for MiniIQA alone. That is not RFSR's training, it is a stress test of the four
# ways, and it shows the mechanism in seconds. (LoRA here is rank 4 on attention and convolutions with a thirty times
# larger step: other conditions than the other three have.)
#
# How hard should each hold? With one weight per way one compares the weights and not the ways. So KL and Gram are run with
# three each, and the unheld run is recorded on the way: *stopping it early* is a fifth way to hold a model back.

# %%
flower = miniature("flower", 21, 48)
gt2, lr2 = (torch.cat(both) for both in zip((gt, lr), flower, strict=True))  # the cup and a flower
condition = model.condition(lr2, [*prompt, "flower, petals, plant"])
state = rollout(model, condition, 9, generators(0, [0, 1]), num_inference_steps=10)


def estimate(m):
    """The network's output at the noisy state and the picture it implies."""
    output = m.predict(state.latents, state.timestep, condition)
    return output, m.decode(state.process.pred_original_sample(output, state.timestep, state.latents)).clamp(0, 1)


with torch.no_grad():
    output2, before2 = estimate(model)
wanted = style.target_gram(before2)
HOLDS = {"none": lambda output, image: 0.0, "LoRA": lambda output, image: 0.0}
for weight in (1, 10, 100):
    HOLDS[f"KL {weight}"] = lambda output, image, weight=weight: weight * F.mse_loss(output, output2)
for weight in (300, 3000, 30000):
    HOLDS[f"Gram {weight}"] = lambda output, image, weight=weight: weight * style(image, target_gram=wanted)


# %%
def tune(name, steps=6):
    """The picture after ``steps`` steps, and (reward, SSIM, judge) after every other."""
    torch.manual_seed(0)
    m, lora = model.reference(), name == "LoRA"
    for network in m.trainable_networks().values():
        network.requires_grad_(not lora)
        ends_of_names = "to_q", "to_k", "to_v", "conv1", "conv2"
        for layer in [layer for n, layer in network.named_modules() if lora and n.endswith(ends_of_names)]:
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
    trained = [p for network in m.trainable_networks().values() for p in network.parameters() if p.requires_grad]
    adam, path = torch.optim.Adam(trained, 6e-3 if lora else 2e-4), []
    for k in range(steps + 1):
        output, image = estimate(m)
        score, seen = reward.score(image).mean(), image.detach()
        if k % 2 == 0:
            path.append([score.item(), ssim(seen, gt2).mean().item(), judge.score(seen).mean().item()])
        if k < steps:
            adam.zero_grad()
            (HOLDS[name](output, image) - score).backward()
            adam.step()
    return seen, torch.tensor(path)


ends, paths = {}, {}
for name in HOLDS:
    ends[name], paths[name] = tune(name)
check("all begin at the same reward", [p[0, 0] for p in paths.values()], [paths["none"][0, 0]] * len(paths), 1e-5)

# %%
with torch.no_grad():
    strokes = {name: 1e4 * style(image, before2).item() for name, image in ends.items()}
print("held by      judge   SSIM   reward   style distance to the start (e-4)")
print("start        {2:5.0f}   {1:.3f}   {0:.3f}    0".format(*paths["none"][0].tolist()))
for name, path in paths.items():
    r, s, j = path[-1].tolist()
    print(f"{name:11s}  {j:5.0f}   {s:.3f}   {r:.3f}    {strokes[name]:.2g}")
half = (paths["none"][0, 0] + paths["none"][-1, 0]) / 2
shown = ["none", "LoRA"] + [min((n for n in paths if n.startswith(way)), key=lambda n: abs(paths[n][-1, 0] - half))
                            for way in ("KL", "Gram")]  # fmt: skip
tiles = [image[row] for row in (0, 1) for image in (before2, *(ends[name] for name in shown), gt2)]
titles = ["start", *shown, "truth"]
show(
    pictures(tiles, titles * 2, columns=6, tile=1.92),
    "A cup and a flower, before, after six steps held in four ways (of KL and Gram the weight whose reward ends nearest "
    "half the way of the unheld run), and the truth. Rewards: "
    + ", ".join(f"{name} {paths[name][-1, 0]:.2f}" for name in shown)
    + ".",
)
assert all(paths["none"][-1, 0] > paths[name][-1, 0] for name in ("KL 100", "Gram 30000")), "to be held costs reward"

# %%
figure, axes = panels(1, 2, width=8.4, height=3.4)
WAYS = {"none": "x", "LoRA": "s", "KL": "^", "Gram": "o"}
for (way, marker), color in zip(WAYS.items(), COLORS, strict=False):
    ended = torch.stack([path[-1] for name, path in paths.items() if name.startswith(way)])
    points = paths[way] if way in paths else ended[ended[:, 0].argsort()]
    for axis, column in zip(axes, (1, 2), strict=True):
        axis.plot(points[:, 0], points[:, column], marker=marker, color=color, markersize=5, label=way)
axes[0].set(xlabel="reward (MiniIQA)", ylabel="SSIM with the truth")
axes[1].set(xlabel="reward (MiniIQA)", ylabel="judge")
axes[0].legend(frameon=False, fontsize=8)
show(
    figure,
    "Likeness to the truth and the judge's opinion over the reward: the paths of the unheld and the LoRA run, one point "
    "every two steps, and the ends of KL and Gram, one point a weight. Ends: "
    + "; ".join(f"{n} reward {p[-1, 0]:.2f}, SSIM {p[-1, 1]:.2f}, judge {p[-1, 2]:.0f}" for n, p in paths.items())
    + ".",
)


def at_reward(way, column):
    """Column at the reward `half`, between the nearest points of a way; nan where it never gets there."""
    ended = torch.stack([path[-1] for name, path in paths.items() if name.startswith(way)])
    points = paths[way] if way in paths else torch.cat([paths["none"][:1], ended])
    points = points[points[:, 0].argsort()].numpy()
    return np.interp(half, points[:, 0], points[:, column], left=np.nan, right=np.nan)


print(
    f"at the reward {half:.2f}:",
    "; ".join(f"{way} SSIM {at_reward(way, 1):.3f}, judge {at_reward(way, 2):.0f}" for way in WAYS),
)

# %% [markdown]
# **What to see.** First the pictures: what does the unheld run do to contrast, edges and colors? Which of the held ones
# still look like the start? A small style distance is what Gram minimizes, so that it has the smallest proves nothing: a
# model that is held hard enough does not move.
#
# Then the curves. A way to hold a model is not a point but a *front*: at the same reward, which keeps more likeness and a
# better judge? Compare the ways at one reward, as the last line does (nan: it never got there). The unheld curve stands
# for stopping early; a way is worth its effort where it lies above that one. Where it does not, this test shows no
# advantage of it, whatever the pictures suggest. Two pictures, one noise level, six steps and a random VGG19 decide
# nothing about the real one.
#
# What do whole training runs say? They stand in the file that notebook 09 examines: changes against the base model, means
# over held-out crops and three training seeds.

# %%
means = pd.read_csv("results/ablation_mini.csv").groupby("model")[["judge", "psnr", "low_ssim", "mini-iqa"]].mean()
held = {"rfsr": "Gram", "kl": "KL", "lora": "LoRA", "no-style": "none"}
for name, way in held.items():
    if name in means.index:
        change = means.loc[name] - means.loc["base"]
        print(f"held by {way:5s}", "   ".join(f"{measure} {value:+.3f}" for measure, value in change.items()))
    else:
        print(f"held by {way:5s} NOT RUN")

# %% [markdown]
# **What to see.** Read the line without a style loss against the others: what does it gain in reward, and what does it
# pay in fidelity and with the judge? That is the evidence for holding the style; the toy above shows the mechanism
# only. Compare only Gram and none. KL and LoRA learned little of the reward: they ran with the preset's learning rate
# and their weights as they come, under which they hold or learn too little to be compared
# ([card](../rfsr_ext/weights/README.md)).
#
# Slide through the ways of the toy and compare the rims of the flower. Pictures as small as these show rims and contrast.
# For the look of an oil painting, of which the paper writes, they are too small.


# %%
def draw(name):
    r, s, j = paths[name][-1].tolist()
    rows = [image[row] for row in (0, 1) for image in (before2, ends[name], gt2)]
    titles = ["start", f"held by: {name}", "truth"] * 2
    return pictures(rows, titles, columns=3, tile=1.92), (
        f"The cup and the flower at the start and after six steps, held by {name}: reward {r:.2f}, SSIM {s:.2f}, "
        f"judge {j:.0f}, style distance {strokes[name]:.2g}e-4."
    )


leash = explore(draw, values=list(HOLDS), label="held by")
leash

# %%
leash.slider.value = "Gram 3000"
show(*draw("Gram 3000"))

# %% [markdown]
# ### What the paper reports
#
# Table 4 of the paper, its numbers: SeeSR, one of the paper's models, on DIV2K-val. LPIPS is a distance to the truth,
# so less is better; the others are networks that judge a picture alone. Before the training LPIPS is 0.3329 and CLIPIQA
# 0.6989 (Table 1).
#
# | held by | LPIPS ↓ | MANIQA ↑ | MUSIQ ↑ | CLIPIQA ↑ | aesthetic ↑ |
# |---|---|---|---|---|---|
# | none | 0.4062 | 0.6615 | 70.86 | 0.8964 | 5.3612 |
# | LoRA | 0.3449 | 0.6171 | 71.20 | 0.7834 | 5.2669 |
# | KL | 0.3377 | 0.5908 | 69.89 | 0.8000 | 5.2719 |
# | Gram (the paper's Gram-KL) | 0.3369 | 0.5954 | 69.97 | 0.7944 | 5.2683 |
#
# Unheld, every *score* is higher than with Gram and LPIPS is far worse: the signature of hacking. Between
# KL and Gram the table hardly decides; the paper argues with pictures (its Figure 7). CLIPIQA is the very reward
# that was trained on, so its column cannot judge.
#
# ## 9 · What does it cost?
#
# One pass of VGG19 forwards and backwards for the new picture, one forwards for the frozen one, one more denoising
# step by the frozen model. The Gram matrices come on top. For one picture of 512×512 pixels:
#
# | layer | C | H×W | multiplications C²HW | F (fp32) | G |
# |---|---|---|---|---|---|
# | conv1_2 | 64 | 512² | 1.1 billion | 67 MB | 16 kB |
# | conv2_2 | 128 | 256² | 1.1 billion | 34 MB | 66 kB |
# | conv3_4 | 256 | 128² | 1.1 billion | 17 MB | 262 kB |
# | conv4_4 | 512 | 64² | 1.1 billion | 8 MB | 1 MB |
# | conv5_4 | 512 | 32² | 0.3 billion | 2 MB | 1 MB |
#
# VGG19 itself takes about a hundred billion. `gram_loss` never writes the two Gram matrices, only their difference, and
# adds in 32 bits even for half-precision features (exercise 3 shows why).
#
# ## 10 · A bug, and the check that catches it
#
# Someone forgets the *copy* and passes the model in training as its own reference. Nothing fails. The term is logged,
# it is zero, the curve looks perfectly held.

# %%
with torch.no_grad():
    alias = RFSRObjective(student, windows, style_loss=style, **options | {"reference": student})
    _, log = alias(lr, gt, prompt, 9, generators(0, [0]))
print(f"style distance logged: {log['style'].item():.1f}")
caught(lambda: check("the style loss sees the change", log["style"] / by_hand["Gram"], 1.0, 1e-4))

# %% [markdown]
# ## 11 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up).** What is the Gram matrix, divided by $CHW$, of two features at two places,
# $F=\begin{pmatrix}2&0\\1&3\end{pmatrix}$?
# <details><summary>Hint</summary>$C=2$ and $HW=2$, so divide by 4.</details>


# %%
def small_gram():
    raise NotImplementedError


def verify_small():
    check("Gram", small_gram(), gram_matrix(torch.tensor([[2.0, 0], [1, 3]]).reshape(1, 2, 1, 2))[0], 1e-6)


exercise(1, verify_small)


# %% [markdown]
# **Exercise 2.** Spoil feature maps $[N,C,H,W]$ so that everything is in another place and the Gram matrix cannot tell.
# <details><summary>Hint</summary>Every entry is a sum over places. What may one do to the terms of a sum?</details>


# %%
def misplaced(f):
    raise NotImplementedError


def verify_misplaced():
    f = torch.arange(48.0).reshape(1, 3, 4, 4) / 48
    assert (misplaced(f) != f).all(), "something stayed in place"
    check("Gram", gram_matrix(misplaced(f)), gram_matrix(f), 1e-6)


exercise(2, verify_misplaced)


# %% [markdown]
# **Exercise 3.** A feature map of 256×256 places holds the same value $a$ everywhere. From which $a$ on does its *raw*
# Gram entry exceed 65504, the largest 16-bit float?
# <details><summary>Hint</summary>The entry is a sum with one product for each place, and all are equal.</details>


# %%
def overflow_from():
    raise NotImplementedError


def verify_overflow():
    for part, is_finite in ((0.999, True), (1.001, False)):
        f = torch.full((1, 256 * 256), part * overflow_from()).double()
        entry = (f @ f.mT).half().item()
        assert np.isfinite(entry) == is_finite, f"{part} times your number gives {entry}"


exercise(3, verify_overflow)


# %% [markdown]
# **Exercise 4 (harder).** Write the derivative of the *absolute* distance that the released code uses,
# $\operatorname{mean}|G-G'|$ over all $N\cdot C\cdot C$ entries, in $F$.
# <details><summary>Hint</summary>Which parts of equation 6's derivative come from the square, and what does an absolute
# value give in their place? Over how many entries is the mean?</details>


# %%
def absolute_gradient(f, f_frozen):
    raise NotImplementedError


def verify_absolute():
    x = f.detach().clone().requires_grad_()
    loss = (gram_matrix(x) - gram_matrix(f_frozen)).abs().mean()
    check("gradient", absolute_gradient(x.detach(), f_frozen), torch.autograd.grad(loss, x)[0], 1e-12)


exercise(4, verify_absolute)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Which of the five layers paints which size of texture? Repeat section 6 with one layer at a time. An answer is a
#   row of pictures and, for each, the energy of its Haar bands over three levels beside that of the original.
# * Compare the four ways of section 8 at *equal* reward: choose each weight so that the reward rises by the same
#   amount. An answer is a table of judge and low-band SSIM for three seeds, with errors.
#
# ## Summary
#
# * Climbing a reward alone finds pictures that only the reward likes; in super-resolution that looks like a style.
# * A Gram matrix counts which features occur together and forgets where: it describes texture.
# * Equation 6 is the squared distance of two Gram matrices; despite its name it is no KL divergence.
# * Normalization decides what counts: $CHW$ compares sizes and layers, layer norm forgets contrast.
# * The reference is a frozen *copy* of the model: a leash that is slack at the start.
# * Every way to hold the style gives up reward. Judge it by what was not optimized, and look at the pictures.
#
# NAVIGATION
