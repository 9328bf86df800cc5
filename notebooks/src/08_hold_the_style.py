# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 08 · Hold the style
#
# **You will compute style on paper, build the paper's style loss forwards and backwards, and paint with it.**
#
# Half a minute on two cores; nothing to download. Needs no other notebook.
#
# NAVIGATION
#
# A model that is trained for a reward, a network's opinion of a picture, finds pictures that the network likes and
# nobody else ([notebook 09](09_hold_the_model.ipynb) watches it). RFSR answers with a *style loss*, equation 6 of its
# paper, which the paper calls Gram-KL: it ties the style of the pictures to that of the *frozen model*, an untouched
# copy from before the training. What is style, as a number? Afterwards you can
#
# * compute a Gram matrix on paper and say what it keeps of a picture and what it forgets,
# * write equation 6 forwards and backwards, and choose its normalization knowingly,
# * say what a small Gram distance promises of two pictures, and what it does not.
#
# VGG19, the network whose features are counted here, is a **stand-in** with *seeded random weights*. No number below
# says anything about the trained one.

# %%
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from rfsr_ext import gram_loss, gram_matrix
from rfsr_ext.data import load_photograph
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.notebook import caught, check, exercise, explore, pictures, show
from rfsr_ext.recordings import recorded, say_missing

style = VGGGramLoss(weights="random")
shallow = VGGGramLoss({"conv1_2": 1.0, "conv2_2": 1.0, "conv3_4": 1.0}, weights="random")  # for section 5
print(f"style loss: {style.label}")


def photograph(name):
    """A whole photograph, [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(load_photograph(name).copy()).movedim(-1, 0)[None]


# %% [markdown]
# ## 1 · What is style? A Gram matrix on paper
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
# ## 2 · Three ways to normalize
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
# ## 3 · Does it measure style, even at random?
#
# VGG19 usually carries ImageNet weights. Ours are random: seeded, never trained. Random filters still answer to
# orientations and scales. We take six patches of three textures and measure, between all pairs, the distance of
# equation 6: the squared difference of the Gram matrices, summed over five layers (section 4 has the formula; the
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
# Gram distance also counts brightness and contrast (section 2), and two patches of grass may differ in both. A trained
# VGG19 has better filters; the arithmetic is the same.
#
# And the trained one? `rfsr record vgg19` measures the same six patches with ImageNet's VGG19. The units differ from
# ours, so compare what is independent of them: the ratio of the two means, and how many patches have their
# twin nearest.

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
# ## 4 · Equation 6, forwards and backwards
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
x, reference = patches[:1].clone().requires_grad_(), patches[4:5].clone().requires_grad_()
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
# above, too. We use the equation, and call it the style loss, or by its means the Gram loss. [Notebook
# 09](09_hold_the_model.ipynb) sets a true KL term beside it.
#
# ## 5 · What the Gram distance alone can paint
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


# %%
cat = F.avg_pool2d(photograph("chelsea"), 4)[..., 3:67, 21:85]
noise = 0.5 + 0.1 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
painted = {f"cat in {name}": paint(cat, texture) for name, texture in textures.items()}
painted["noise in gravel"] = paint(noise, textures["gravel"])
left = {n: (shallow(painted[f"cat in {n}"], textures[n]) / shallow(cat, textures[n])).item() for n in textures}
left["gravel, from noise"] = (shallow(painted["noise in gravel"], textures["gravel"])
                              / shallow(noise, textures["gravel"])).item()  # fmt: skip
print("distance left:", ", ".join(f"{name} {value:.0%}" for name, value in left.items()))
tiles = [picture[0] for picture in (cat, *textures.values(), *painted.values())]
show(
    pictures(tiles, ["a cat", *textures, *painted], columns=4, tile=1.92),
    "A cat's face and 3 textures; below, the cat in each, and noise in gravel: under 30 % of the distance left.",
)
assert max(left.values()) < 0.3

# %% [markdown]
# **What to see.** In dots and gravel the cat stays recognizable, because we started there; in stripes it drowns. Its
# fur turns into strokes of the texture. Nobody said where a stripe should go: the Gram matrix knows only which
# features occur together and how strongly. Started from noise the distance falls just as far, and what is painted is
# no gravel: grain and gray tones of stones, and no stone. Three shallow layers of random filters ask for no more. A
# *small* Gram distance to the frozen model's picture therefore means: same strokes, same colors and contrast as far as
# the network's filters tell them apart, wherever they are.
#
# ## 6 · What does it not see?
#
# Both halves of that sentence can be tested. Change one picture in many ways and measure how far each change moves it,
# by equation 6 and by the variant with a layer norm. The unit is the mean distance between two textures of section 3,
# by the same measure. Guess first: which of these changes is the largest for the eye, and which for the Gram matrix?


# %%
def shuffle(x, size):
    """The picture's blocks of `size` pixels in another order."""
    blocks = F.unfold(x, size, stride=size)
    order = torch.randperm(blocks.shape[2], generator=torch.Generator().manual_seed(0))
    return F.fold(blocks[..., order], x.shape[-2:], size, stride=size)


wall, normed = patches[4:5], VGGGramLoss(weights="random", joint_layer_norm=True)  # bricks
CHANGES = {
    "nothing": wall,
    "moved by 16 pixels": wall.roll(16, -1),
    "mirrored": wall.flip(-1),
    "turned by 90°": wall.rot90(1, (-2, -1)),
    "blocks of 16 shuffled": shuffle(wall, 16),
    "blocks of 4 shuffled": shuffle(wall, 4),
    "single pixels shuffled": shuffle(wall, 1),
    "blurred": F.avg_pool2d(wall, 5, 1, 2, count_include_pad=False),
    "half the contrast": (wall + wall.mean((2, 3), keepdim=True)) / 2,
    "darker by 0.1": (wall - 0.1).clamp(0, 1),
    "twice as near to VGG's gray": (wall + style.vgg.mean) / 2,
    "tinted": (wall + torch.tensor([0.1, 0.0, -0.1]).view(1, 3, 1, 1)).clamp(0, 1),
}

# %%
with torch.no_grad():
    tables = [torch.tensor([[f(p[None], q[None]) for q in patches] for p in patches]) for f in (style, normed)]
    same = torch.arange(6)[:, None] // 2 == torch.arange(6) // 2
    units = [table[~same].mean() for table in tables]
    moved = {n: [(f(x, wall) / unit).item() for f, unit in zip((style, normed), units, strict=True)]
             for n, x in CHANGES.items()}  # fmt: skip
check("the unit is the mean of section 3", units[0] / between, 1.0, 1e-4)
check("layer norm forgets the contrast of features", moved["twice as near to VGG's gray"][1], 0.0, 1e-3)
ratios = [(unit / (table[same].sum() / 6)).item() for unit, table in zip(units, tables, strict=True)]
print("between textures over within: equation 6 {:.1f}, layer norm {:.1f}".format(*ratios))
print(f"{'':28s}equation 6   layer norm")
for name, (plain, layer_norm) in moved.items():
    print(f"{name:28s}{plain:10.3f}   {layer_norm:10.3f}")


# %%
def draw(name):
    plain, layer_norm = moved[name]
    titles = ["bricks", name, "difference"]
    tiles = [wall[0], CHANGES[name][0], 0.5 + (CHANGES[name] - wall)[0] / 2]
    return pictures(tiles, titles, tile=1.92), (
        f"Bricks, 64 pixels wide, {name}, and the difference on gray; style distance {plain:.3f} of that between two "
        f"textures, with layer norm {layer_norm:.3f}."
    )


changes = explore(draw, values=list(CHANGES), label="change")
changes

# %%
changes.slider.value = "blocks of 16 shuffled"
show(*draw("blocks of 16 shuffled"))

# %% [markdown]
# **What to see.** By equation 6, to move, mirror or turn the wall costs next to nothing, and so does cutting it into
# 16 large blocks and laying them in another order, though the eye sees a broken wall. The smaller the blocks, the more
# features change at the cuts: single pixels in another order have lost every texture, though each color is still
# there. Darker, tinted or of less contrast, the same wall moves farther than one in 16 shuffled blocks. So the style
# loss also holds brightness and color, which are no style.
#
# The column of the layer norm speaks against a simple story. It should forget contrast, and where the *features* lose
# half of their contrast (the line *twice as near to VGG's gray*: this network without biases answers half as strongly)
# it does, to the last digit. But half the contrast round the wall's own gray is another thing, and *darker* costs it
# more than cutting into blocks of 4. Moved and mirrored walls, too, are far away for it, measured by the distance
# between its textures, which has become small: the line above the table says how much better equation 6 tells the
# textures apart. What these three differed in was above all how strongly their features answer.
#
# ## 7 · What does it cost?
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
# VGG19 itself takes about a hundred billion. `gram_loss` never writes the two Gram matrices, only their difference,
# and adds in 32 bits even for half-precision features (exercise 3 shows why).
#
# ## 8 · A bug, and the check that catches it
#
# A well-known tutorial computes the Gram matrix of a whole batch at once: view `[N, C, H, W]` as a matrix of $N\cdot
# C$ rows and multiply it with itself. For style transfer, where $N$ is 1, that is right. In training $N$ is the batch,
# and now each picture is held to the other pictures' features as well. Nothing fails, and for one picture the check
# passes.


# %%
def tutorial_gram(f):
    n, c, h, w = f.shape
    rows = f.reshape(n * c, h * w)
    return rows @ rows.T / (n * c * h * w)


def tutorial_loss(f, f_frozen):
    return (tutorial_gram(f) - tutorial_gram(f_frozen)).square().sum()


check("one picture", tutorial_loss(f[:1], f_frozen[:1]), gram_loss(f[:1], f_frozen[:1]), 1e-12)
caught(lambda: check("two pictures", tutorial_loss(f, f_frozen), gram_loss(f, f_frozen), 1e-12))

# %% [markdown]
# ## 9 · Exercises
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
# * Which of the five layers paints which size of texture? Repeat section 5 with one layer at a time. An answer is a
#   row of pictures and, for each, the energy of its Haar bands over three levels beside that of the original.
# * Which changes of section 6 does a Gram loss on *shifted* features see, one that counts which features occur one
#   place to the right of which? An answer is the table of section 6 with one more column, and an example of two
#   pictures that only the new column tells apart.
#
# ## Summary
#
# * A Gram matrix counts which features occur together and forgets where: it describes texture.
# * Equation 6 is the squared distance of two Gram matrices; despite its name it is no KL divergence.
# * Normalization decides what counts: $CHW$ compares sizes and layers, layer norm forgets contrast.
# * Lowering the distance alone paints a texture, with no word on where a stroke should go.
# * Each picture has a Gram matrix of its own. The reference gets no gradient, and its matrix can be computed once.
#
# NAVIGATION
