# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 06 · Ask CLIP-IQA
#
# **You will build a quality score from two sentences, send its gradient into a picture, and watch the score rise while
# the picture gets worse.**
#
# A quarter of a minute on two cores; nothing to download. Needs only that you can read a little PyTorch.
#
# NAVIGATION
#
# In its last sampling steps RFSR maximizes *rewards*: networks that look at a picture and say how good it is. The first
# of them is CLIP-IQA. Afterwards you can
#
# * compute its score and the gradient of that score on paper, and say what its temperature does,
# * tell which preprocessing lets the gradient through, and which silently stops it,
# * recognize reward hacking, and say why a score that ends at 1 does not prevent it,
# * turn scores into the loss that `RFSRTrainer` minimizes: sign, weight, cap, steps.

# %% [markdown]
# **What is scored by what.** CLIP's weights do not come with this course. So **the real CLIP-IQA scores no picture on this
# page**: all scores printed below are those of small stand-ins. The formula is the real one; what feeds it changes:
#
# | sections | what answers | is it CLIP-IQA? |
# |---|---|---|
# | 1, 2 | random numbers in place of CLIP's features | the formula, yes; the scores mean nothing |
# | 3 | the picture half of MiniPreference, with two learned directions | the same kind of network, small |
# | 4 | nothing: only the preprocessing | yes |
# | 5 to 8, 10 | `MiniIQA`, the reward that trains the mini model | a **stand-in**, made to behave like it |
# | 9 | the paper's own numbers, quoted; and the real network, if you have its file | yes |

# %%
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from rfsr_ext import haar_ll
from rfsr_ext.data import evaluation_crops, load_photograph, photographs
from rfsr_ext.metrics import Judge, psnr, ssim
from rfsr_ext.models import load_model
from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show, spoken, together
from rfsr_ext.recordings import recorded, say_missing
from rfsr_ext.rewards import (
    CallableReward,
    ImageReward,
    MiniIQA,
    MiniPreference,
    WeightedReward,
    create_reward,
    reward_loss,
)
from rfsr_ext.rewards.clip_iqa import prompt_pair_score
from rfsr_ext.sampling import generators, sample
from rfsr_ext.weights import registry

cat = torch.from_numpy(load_photograph("chelsea").copy()).movedim(-1, 0)  # [3, 300, 451] in [0, 1]
eye = cat[None, :, 80:176, 110:206]


def soften(x, factor=2):
    """Shrink and enlarge again: what was finer is gone."""
    small = F.interpolate(x, scale_factor=1 / factor, mode="bilinear", antialias=True)
    return F.interpolate(small, size=x.shape[-2:], mode="bilinear")


def gradient(score, x):
    """d (sum of scores) / dx by automatic differentiation."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(score(x).sum(), x)[0]


# %% [markdown]
# ## 1 · How can two sentences measure quality?
#
# CLIP is two networks, one for pictures and one for text. Both answer with a list of numbers, its *features*. Training has
# made the two lists point in the same direction where a picture and a sentence belong together. The cosine of the angle
# between them says how well they agree. CLIP-IQA trains nothing more. It asks: does the picture point more towards
# *"Good image"* or more towards *"bad image"*?
#
# $$r=\frac{e^{s\,c_+}}{e^{s\,c_+}+e^{s\,c_-}},\qquad c_\pm=\cos(\text{picture},\text{sentence}_\pm),\qquad s=100$$
#
# That is a softmax over two cosines, each multiplied by CLIP's own scale $s$. Divide numerator and denominator by
# $e^{s\,c_+}$ and it gets simpler: **only the difference counts**, $r=\sigma\bigl(s\,(c_+-c_-)\bigr)$ with
# $\sigma(u)=1/(1+e^{-u})$.
#
# Published CLIP-IQA, as the package pyiqa has it, asks five pairs (good/bad, sharp/blurry image, sharp/blurry edges,
# high/low resolution, noise-free/noisy) and takes the mean of the five answers. Random numbers serve as features below;
# they are enough to check the formula.


# %%
def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def score_by_hand(features, pairs, scale):
    """Features ``[N, D]`` of pictures and a list of pairs (good, bad) to ``[N]``."""
    answers = [1 / (1 + torch.exp(-scale * (cosine(features, good) - cosine(features, bad)))) for good, bad in pairs]
    return sum(answers) / len(answers)


random = torch.Generator().manual_seed(0)
features = 3 * torch.randn(4, 16, generator=random)  # of four pictures, of any length
text = F.normalize(torch.randn(10, 16, generator=random), dim=-1)  # five pairs: good, bad, good, bad, ...
pairs = list(zip(text[::2], text[1::2], strict=True))
hot = torch.tensor(5.0)
check(
    "five pairs: by hand and package", score_by_hand(features, pairs, hot), prompt_pair_score(features, text, hot), 1e-6
)
one = prompt_pair_score(features, text[:2], hot)
check("good and bad exchanged", prompt_pair_score(features, text[:2].flip(0), hot), 1 - one, 1e-6)
check("features ten times longer", prompt_pair_score(10 * features, text[:2], hot), one, 1e-6)

# %% [markdown]
# The last line says that the length of the features carries nothing, only their direction.
#
# ## 2 · What does the temperature do?
#
# Cosines of CLIP lie close together: 0.26 and 0.23 would be a clear answer. Without the scale $s$ the score would
# hardly move. ($1/s$ is called temperature.)

# %%
gap = torch.linspace(-0.1, 0.1, 201)
figure, (left, right) = panels(columns=2, width=7.2, height=2.7)
for s in (1, 10, 100):
    r = torch.sigmoid(s * gap)
    left.plot(gap, r, label=f"s = {s}")
    right.semilogy(gap, s * r * (1 - r), label=f"s = {s}")
left.set(xlabel="difference of the cosines", ylabel="score r", ylim=(0, 1))
right.set(xlabel="difference of the cosines", ylabel="slope dr/d(difference)")
left.legend(frameon=False, fontsize=9)
at = torch.sigmoid(torch.tensor(3.0)).item()
show(
    figure,
    f"Left, the score over the difference of two cosines from -0.1 to 0.1: flat for s = 1, a steep S for s = 100, where "
    f"a difference of 0.03 gives {at:.3f}. Right, the slope: for s = 100 it is 25 at 0 and falls to "
    f"{100 * torch.sigmoid(torch.tensor(10.0)) * torch.sigmoid(torch.tensor(-10.0)):.4f} at 0.1.",
)
check("difference 0.03, s = 100", at, 0.953, 5e-4)

# %% [markdown]
# **What to see.** With $s=100$ a difference of 0.03 is a score of 0.95. The price is on the right: the slope
# $s\,r(1-r)$ is 25 in the middle and almost nothing at both ends. Remember it for section 7.
#
# The chain rule makes the gradient with respect to the features $f$:
#
# $$\frac{\partial r}{\partial f}=s\,r(1-r)\left(\frac{\partial c_+}{\partial f}-\frac{\partial c_-}{\partial f}\right),
# \qquad\frac{\partial c_\pm}{\partial f}=\frac{t_\pm-c_\pm\,f/|f|}{|f|}$$
#
# for sentences $t_\pm$ of length one.


# %%
def feature_gradient(features, good, bad, scale):
    length = features.norm(dim=-1, keepdim=True)
    r = score_by_hand(features, [(good, bad)], scale)[:, None]

    def cosine_gradient(t):
        return (t - cosine(features, t)[:, None] * features / length) / length

    return scale * r * (1 - r) * (cosine_gradient(good) - cosine_gradient(bad))


pushed = gradient(lambda f: prompt_pair_score(f, text[:2], hot), features)
check("gradient: by hand and package", feature_gradient(features, *pairs[0], hot), pushed, 1e-6)
check("no push along the features", (pushed * features).sum(-1), torch.zeros(4), 1e-6)
mean = sum(feature_gradient(features, *pair, hot) for pair in pairs) / 5
check("five pairs: the mean push", mean, gradient(lambda f: prompt_pair_score(f, text, hot), features), 1e-6)

# %% [markdown]
# ## 3 · Can we see it work without CLIP?
#
# CLIP's weights do not come with this course. But the package ships a small network of the same kind: MiniPreference of
# notebook 07 also compares picture and text by a cosine. We take its picture half. Its text half has learned the
# tags of a few dozen photographs, and *good* and *blurry* are not among them. So we do what **CLIP-IQA+** does: leave the
# network alone and *learn* the two sentences, here directly as two directions. Sharp crops should point to the first,
# softened ones to the second.

# %%
preference = MiniPreference.from_pretrained()


@torch.no_grad()
def look(images):
    """The picture half: [N, 3, H, W] in [0, 1] to [N, 64]."""
    return preference.image_projection(preference.features(images * 2 - 1).mean((2, 3)))


def crops(split, count):
    return torch.stack([sample["gt"] for sample in evaluation_crops(photographs(split), 64, count)])


train, test = crops("train", 96), crops("test", 48)
sharp, soft = look(train), torch.cat([look(soften(train[::2], 2)), look(soften(train[1::2], 4))])
pair = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
optimizer, scale = torch.optim.Adam([pair], lr=0.02), torch.tensor(20.0)  # 64 numbers tell less apart than CLIP's 1024
for _ in range(300):
    optimizer.zero_grad()
    sentences = F.normalize(pair, dim=-1)
    good, bad = (prompt_pair_score(f, sentences, scale).clamp(1e-6, 1 - 1e-6) for f in (sharp, soft))
    (-good.log().mean() - (1 - bad).log().mean()).backward()
    optimizer.step()
sentences = F.normalize(pair, dim=-1).detach()

# %%
for name, images in (("crops it learned from", train), ("crops of other photographs", test)):
    good, bad = (prompt_pair_score(look(x), sentences, scale) for x in (images, soften(images)))
    right = (good > bad).double().mean().item()
    mixed = (good[:, None] > bad[None, :]).double().mean().item()
    print(f"{name:27s} sharp {good.mean():.2f}  softened {bad.mean():.2f}  sharp wins in {100 * right:.0f} % within a picture, "
          f"{100 * mixed:.0f} % between pictures")  # fmt: skip
assert right > 0.5, "on held-out photographs the learned pair must usually prefer the sharp version"
shown = test[[3, 7, 2]]  # a saucer, a cat, a flower: photographs that the pair was not learned from
versions = torch.stack([shown, soften(shown)], dim=1).flatten(0, 1)
learned = prompt_pair_score(look(versions), sentences, scale).tolist()
show(
    pictures(
        [*versions],
        [f"{n}\nr = {r:.2f}" for n, r in zip(["sharp", "softened"] * 3, learned, strict=True)],
        4,
        tile=1.92,
    ),
    "Three crops of held-out photographs, each sharp and softened. Scores of the learned pair: "
    + "; ".join(f"{a:.2f} and {b:.2f}" for a, b in zip(learned[::2], learned[1::2], strict=True))
    + ".",
)

# %% [markdown]
# **What to see.** Two directions are enough to tell mostly which version of *one* picture is the sharp one, even of
# photographs that were not learned from. Between *different* pictures the same score is right less often: compare the two
# shares, and look for a softened crop above that got more than a sharp one. So *compare versions of one picture, never two
# different pictures.* The same holds for the rest of this notebook.
#
# ## 4 · How does a picture enter?
#
# CLIP wants every color shifted and scaled: $(x-\text{mean})/\text{std}$ per channel, with three fixed means and
# deviations. CLIP-IQA takes the picture at its full size (for that it drops CLIP's position embedding, which knows only
# 224×224), so this is all of its preprocessing. Its gradient is $1/\text{std}$, nothing more. (`CLIPIQA` itself cannot be
# built without its weight file; the check compares with `ImageReward`, which takes the same six numbers from CLIP, and
# the package's tests compare `CLIPIQA` with pyiqa's.)

# %%
clip_mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
clip_std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def normalize(x):
    return (x - clip_mean) / clip_std


square = cat[None, :, 40:264, 100:324]  # 224 pixels, where ImageReward's preprocessing resizes nothing
package = ImageReward(None, None).preprocess  # the same three means: it also comes from CLIP
check("CLIP's normalization", normalize(square), package(square), 1e-5)
check("its gradient", (1 / clip_std).expand_as(square), gradient(package, square), 1e-5)

# %% [markdown]
# Everything between picture and score must be *differentiable*: written in PyTorch, on tensors, without rounding. Many
# published preprocessing functions are not: they go through PIL and 8-bit numbers, which is right for measuring and
# useless for training. Section 10 shows how quietly that fails.
#
# ## 5 · The stand-in: MiniIQA
#
# From here on we use the reward that the mini model is trained with. MiniIQA plays CLIP-IQA's part and is made to
# resemble it where it matters: no prompt, no reference, any size, a sigmoid at the end. Its network gives one number
# $q$, the mean of a score map, and
#
# $$r=\sigma\!\left(\frac{q-\text{mean}}{\text{std}}\right)$$
#
# Mean and std are fixed: those of $q$ over the pictures it was trained on, so an average one of them gets 0.5. Compare
# with section 1: $q$ takes the place of the difference of cosines, $1/\text{std}$ that of the scale.

# %%
iqa = MiniIQA.from_pretrained()
print(iqa.label)


def iqa_by_hand(images):
    score_map = iqa.head(iqa.features(2 * images - 1))  # from [0, 1] to [-1, 1]: its whole preprocessing
    q = score_map.mean((1, 2, 3))
    return 1 / (1 + torch.exp(-(q - iqa.mean) / iqa.std))


for x in (eye, cat[None, :, 30:78, 50:120]):
    check(f"score of {x.shape[2]}×{x.shape[3]} pixels", iqa_by_hand(x), iqa.score(x), 1e-6)
    check("its gradient", gradient(iqa_by_hand, x), gradient(iqa.score, x), 1e-6)
z = torch.tensor([[0.4, -0.2]])
check("softmax of two and sigmoid", z.softmax(-1)[0, 0], torch.sigmoid(z[0, 0] - z[0, 1]), 1e-6)

# %% [markdown]
# What is a high score? Here are 24 held-out crops: the truth, what the mini model makes of their low resolution, its
# bicubic enlargement, and the truth softened. Each line is one crop.

# %%
model, some = load_model("mini"), evaluation_crops(photographs("test"), 64, 24)
sharp, lr = (torch.stack([s[key] for s in some]) for key in ("gt", "lr"))
made = {"bicubic": F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1),
        "model": sample(model, lr, [s["prompt"] for s in some], generators(0, range(24)), 20),
        "softened": soften(sharp), "truth": sharp}  # fmt: skip
with torch.no_grad():
    spread = {name: iqa.score(x) for name, x in made.items()}
figure, axes = panels(width=6.0, height=2.8)
axes.plot(torch.stack(list(spread.values())), color="0.75", linestyle="-", linewidth=0.7, zorder=0)
for k, values in enumerate(spread.values()):
    axes.plot(torch.full((24,), k), values, "o", markersize=4)
axes.set_xticks(range(4), made)
axes.set(ylabel="MiniIQA", ylim=(0, 1))
wins = {name: int((spread["truth"] > values).sum()) for name, values in spread.items() if name != "truth"}
show(
    figure,
    "MiniIQA of 24 held-out crops in 4 versions: "
    + ", ".join(f"{name} {x.mean():.2f} on average, {x.min():.2f} to {x.max():.2f}" for name, x in spread.items()) + ".",
)  # fmt: skip
print("the truth scores higher than:", ", ".join(f"{name} in {n} of 24" for name, n in wins.items()))

# %% [markdown]
# **What to see.** The columns overlap, because crops differ more than versions: a number such as 0.45 alone says nothing.
# Along a line the order is what the reward was taught. Where the truth does *not* win, the reward already prefers
# something to the real photograph, before anybody has climbed it.
#
# ## 6 · What does the reward ask for?
#
# Take the softened eye, as a super-resolution model might leave it, and follow the gradient of the score uphill. Every
# step has the same length: on average a pixel moves by 0.003, less than one gray level of 255. Beside the score we
# watch two measures of closeness to the truth (SSIM, which is 1 for equal pictures, and PSNR in decibels) and the
# *judge*: a second quality score, about 0 for a ruined and 100 for an untouched picture (nothing keeps it in that
# range), that no model here was trained to please.


# %%
def ascend(score, x, steps, length=0.5):
    """Pictures along normalized gradient ascent, the start included; ends early where no gradient is left."""
    states = [x]
    for _ in range(steps):
        g = gradient(score, states[-1])
        if not g.any():
            break
        states.append((states[-1] + length * g / g.norm()).clamp(0, 1))
    return torch.cat(states)


start = soften(eye)
path = ascend(iqa.score, start, steps=80)
scores = torch.cat([iqa.score(x) for x in path.split(1)])
last = min(30, len(path) - 1)
similarity = ssim(path, eye.expand_as(path))
loss_of_signal = psnr(path, eye.expand_as(path))

# %%
chosen = [0, 5, 10, 20, last]
titles = ["truth\n" + f"score {iqa.score(eye).item():.2f}"]
titles += [f"step {k}: score {scores[k]:.2f}\n{loss_of_signal[k]:.0f} dB" for k in chosen]
show(
    pictures([eye[0], *path[chosen]], titles, columns=3, tile=1.92),
    "The cat's eye: the truth, and the softened eye along the ascent. " + spoken(titles),
)

# %%
judge = Judge.from_pretrained().score(path) / 100
figure, axes = panels(width=6.4, height=2.8)
for values, name in ((scores, "score (MiniIQA)"), (similarity, "SSIM to the truth"), (judge, "judge / 100")):
    axes.plot(values[: last + 1], label=name)
axes.set(xlabel="step of ascent")
axes.legend(frameon=False, fontsize=9)
show(
    figure,
    f"Three curves over {last} steps of ascent. The score goes from {scores[0]:.2f} to {scores[last]:.3f}, SSIM to the truth "
    f"from {similarity[0]:.2f} to {similarity[last]:.2f}, the judge, which was not asked, from {100 * judge[0]:.0f} to "
    f"{100 * judge[last]:.0f} of 100.",
)
assert scores[last] > scores[0] and similarity[last] < similarity[0], "score up, fidelity down"
first = next((k for k in range(last + 1) if scores[k] > iqa.score(eye)), None)
says = "likes" if judge[last] > judge[0] else "dislikes"
print(
    f"the score passes that of the truth at step {first}; at step {last} the judge {says} the picture against the start"
)

# %% [markdown]
# **What to see.** Score up, fidelity down: slowly in the first steps, then faster. From the step named above on, the score
# is higher than that of the truth itself. This is **reward hacking**, Figure 2 of the paper in small. (If the judge, too,
# likes what comes out, it is being fooled along with the reward: nothing here is a better cat.) The paper describes "a
# specific stylization" and "strange lines". Is there a pattern in ours? We take the Fourier transform of the change: it
# says how much of it repeats, and after how many pixels.


# %%
def share_on_grid(change):
    """The part of a change [3, 96, 96] that repeats every 4 pixels, by energy."""
    power = torch.fft.fft2(change).abs().square().sum(0)
    every_4 = torch.arange(0, 96, 24)  # frequencies that repeat every 4 pixels, or every 2, or are constant
    return (power[every_4][:, every_4].sum() / power.sum()).item()


share = share_on_grid(path[last] - start[0])
print(
    f"{100 * share:.0f} % of the change repeats every 4 pixels; such patterns fill {100 * 16 / 96**2:.1f} % of all frequencies"
)
assert share > 10 * 16 / 96**2, "the pattern must follow the reward's grid"

# %% [markdown]
# MiniIQA first folds 2×2 pixels into channels and later skips every second position. So it looks at the picture through a
# grid of period 4, and the cheapest way to please it is a pattern on that grid. Any network with strides or patches has
# such a grid. *What is changed in free pixels shows the signature of the reward.*
#
# RFSR does not change pixels, which may become anything, but the weights of a diffusion model, which cannot draw just any
# pattern: hacking then comes later and looks like a style, contrast and rims (notebook 09), and need not show the grid at
# all. Slide through the ascent:


# %%
def draw(step):
    title = f"step {step}: score {scores[step]:.2f}\nSSIM {similarity[step]:.2f}, {loss_of_signal[step]:.0f} dB"
    change = path[step] - start[0]
    largest = change.abs().max()
    alt = f"After {step} steps of ascent the score is {scores[step]:.2f} and SSIM {similarity[step]:.2f}."
    tiles = [path[step], 0.5 + change / largest / 2]
    return pictures(tiles, [title, f"its change, enlarged\nup to {largest:.2f} per pixel"], tile=1.92), alt


climber = explore(draw, values=[1, 2, 5, 10, 15, 20, last], label="step of ascent")
climber

# %%
climber.slider.value = 10
show(*draw(10))

# %% [markdown]
# **What to see.** The right picture is the change, enlarged so that you see it at every position. Some of it may be honest:
# outlines, darker on the dark side and brighter on the bright side. Look for the grid in it, from the first step on. At
# which step do you notice it on the left? Compare with the step at which the score passed that of the truth.
#
# All this was the stand-in. Whether the *real* CLIP-IQA likes this picture is another question: a pattern made for one
# network need not please a second one. Section 9 asks it, if its file is there.

# %% [markdown]
# ## 7 · Does a bounded score not stop by itself?
#
# A score cannot exceed 1. And by the chain rule its gradient carries the factor $r(1-r)$, which vanishes there:
#
# $$\frac{\partial r}{\partial x}=\frac{r(1-r)}{\text{std}}\,\frac{\partial q}{\partial x}$$

# %%
raw = torch.stack([gradient(iqa.raw_score, x).norm() for x in path[:50].split(1)])
size = torch.stack([gradient(iqa.score, x).norm() for x in path[:50].split(1)])
factor = scores[:50].detach() * (1 - scores[:50].detach()) / iqa.std
check("size of the gradient", factor[: last + 1] * raw[: last + 1], size[: last + 1], 1e-5)
figure, axes = panels(width=6.4, height=2.6)
axes.semilogy(raw, label="of q, before the sigmoid")
axes.semilogy(size, label="of the score r")
axes.set(xlabel="step of ascent", ylabel="size of the gradient")
axes.legend(frameon=False, fontsize=9)
show(
    figure,
    f"Sizes of two gradients along the ascent, on a logarithmic axis. That of q stays between {raw.min():.1f} and "
    f"{raw.max():.1f}; that of the score falls from {size[0]:.2f} to {size[last]:.4f} at step {last}.",
)
end = "the score is exactly 1 and no gradient is left" if len(path) < 81 else f"the score is {scores[-1]:.6f}"
print(
    f"after {len(path) - 1} of 80 steps {end}; its gradient is {size[0] / size[size > 0].min():.0f} times smaller at its smallest than at the start"
)

# %% [markdown]
# **What to see.** $q$ never gets tired, the score does, by the factor printed. In 32-bit numbers it can finally *be* 1, and
# its gradient exactly 0. So saturation may stop the ascent, but long after the picture is ruined.
# It slows down only those who step by the size of the gradient. Our step is normalized, and Adam's nearly is: for them a
# thousandth of a gradient is as good as a whole one. A bounded reward needs a style loss like any other; notebook 08 has it.
#
# The released code takes $\text{relu}(2-r)$ as the loss of both rewards. For a score below 1 that is the line $2-r$:
# the same gradient as $-r$, everywhere. (For ImageReward it is not: notebook 07.)
#
# ## 8 · From score to loss
#
# Equations 4 and 5 of the paper, for rewards $r_k$ with weights $\lambda_k$ and a batch of $N$ pictures. The paper does
# not say how a reward becomes a loss; here a minus sign turns "higher is better" into something to minimize:
#
# $$\mathcal L_{reward}=\sum_k\lambda_k\,\frac1N\sum_{n}\bigl(-r_k(x_n)\bigr)$$
#
# `WeightedReward` is one term, `reward_loss` the sum. The paper's weights are $5\cdot10^{-5}$; ours here are larger to
# be readable.
#
# The gradient also has to go on, into whatever made the pictures. The package scores one reward at a time, keeps only
# its image gradient and lets the rest go, so it needs memory for the largest reward, not for all. The result must be the
# same as without this trick. As a stand-in for the diffusion model we take one brightness $w$ per picture.

# %%
batch = torch.cat([eye, start, path[20:21]])
prompts = ["cat, eyes, fur"] * 3
terms = [WeightedReward(iqa, weight=0.5), WeightedReward(preference, weight=0.2)]


def loss_by_hand(x):
    return -0.5 * iqa.score(x).mean() - 0.2 * preference.score(x, prompts).mean()


loss, seen = reward_loss(terms, batch, prompts)
check("loss", loss, loss_by_hand(batch), 1e-6)
check("its gradient", gradient(lambda x: reward_loss(terms, x, prompts)[0], batch), gradient(loss_by_hand, batch), 1e-7)
check("the scores it reports", seen["mini-iqa"], iqa.score(batch), 1e-6)
assert not seen["mini-iqa"].requires_grad, "reported scores are for tables, not for training"

w = torch.tensor([0.9, 1.0, 1.1]).view(3, 1, 1, 1)
through_package = gradient(lambda w: reward_loss(terms, (w * batch).clamp(0, 1), prompts)[0], w)
through_hand = gradient(lambda w: loss_by_hand((w * batch).clamp(0, 1)), w)
check("gradient of what made the pictures", through_package, through_hand, 1e-6)

# %% [markdown]
# A term has three options: the **cap** of the released code (a cap $c$ makes the loss $\text{relu}(c-r)$), the **steps**
# at which it counts, and the **views** of the picture that the reward gets to see. The first two in one cell: a score
# that stays below its cap has the same gradient as without, and a term for the paper's reward window is silent before
# step 41 and after step 50.

# %%
capped = WeightedReward(iqa, weight=0.5, cap=2.0)
plain = gradient(lambda x: reward_loss(terms[:1], x, prompts)[0], batch)
check(
    "relu(2 - r) of a bounded score: same gradient",
    gradient(lambda x: reward_loss([capped], x, prompts)[0], batch),
    plain,
    0,
)
check("and the loss is shifted", reward_loss([capped], batch, prompts)[0], 0.5 * (2 - iqa.score(batch).mean()), 1e-6)
late = WeightedReward(iqa, weight=0.5, steps=(41, 50))  # the paper's reward window
with together("it acts at steps 41, 42, 49 and 50, and not at 39, 40 and 51"):
    for step in (39, 40, 41, 42, 49, 50, 51):
        push = gradient(lambda x, step=step: reward_loss([late], x, prompts, step=step)[0], batch)
        acts = 41 <= step <= 50
        check(f"step {step}: {'acts' if acts else 'silent'}", push, plain if acts else torch.zeros_like(plain), 1e-9)

# %% [markdown]
# The third may do something against hacking. Section 6 found a pattern on the reward's grid, which lies at the same
# pixels in every step. Let the reward see a *random crop* of 64 pixels in each step, and its grid lies elsewhere each
# time: a pattern that pleased it once is out of place in most of the others. **Predict**: is the pattern gone? And is
# the picture better? First the option by hand, then the same ascent with it.

# %%
double = WeightedReward(iqa, weight=1.0, views=("1", "0.5"))
half = F.interpolate(batch, size=(48, 48), mode="bilinear", antialias=True)
check("mean over two sizes", double.score(batch, prompts), (iqa.score(batch) + iqa.score(half)) / 2, 1e-6)
places = torch.Generator().manual_seed(3)
cut = []
for x in batch:
    top, left = (int(torch.randint(96 - 64 + 1, (), generator=places)) for _ in range(2))
    cut.append(x[:, top : top + 64, left : left + 64])
cropped = WeightedReward(iqa, weight=1.0, views=("crop-64",))
ours = cropped.score(batch, prompts, torch.Generator().manual_seed(3))
check("random crops of 64 pixels", ours, iqa.score(torch.stack(cut)), 1e-6)

# %%
places, marks = torch.Generator().manual_seed(0), Judge.from_pretrained()
roaming = ascend(lambda x: cropped.score(x, prompts[:1], places), start, steps=last)
ends = {"start": start, "whole picture": path[last : last + 1], "random crops": roaming[-1:]}
shares = {name: share_on_grid(x[0] - start[0]) for name, x in ends.items() if name != "start"}
titles = [
    f"{name}: score {iqa.score(x).item():.2f}\n{psnr(x, eye)[0]:.0f} dB, judge {marks.score(x).item():.0f}"
    for name, x in ends.items()
] + [f"truth\nscore {iqa.score(eye).item():.2f}"]
titles += [f"change by {name}\non the grid: {100 * share:.0f} %" for name, share in shares.items()]
changes = [x[0] - start[0] for name, x in ends.items() if name != "start"]
changes = [0.5 + change / change.abs().max() / 2 for change in changes]  # enlarged as far as it goes
show(
    pictures([*(x[0] for x in ends.values()), eye[0], *changes], titles, columns=3, tile=1.92),
    f"The eye at the start and after {last} steps of ascent on two kinds of view, the truth, and both changes. "
    + spoken(titles),
)
assert shares["random crops"] < shares["whole picture"], "a grid that moves must leave less of a pattern"
same = int((scores >= iqa.score(roaming[-1:])).nonzero()[0])
print(f"the ascent on the whole picture passes the score of the crops at step {same}; there it has "
      f"{loss_of_signal[same]:.1f} dB and judge {100 * judge[same]:.0f}, the crops {psnr(roaming[-1:], eye)[0]:.1f} dB and "
      f"judge {marks.score(roaming[-1:]).item():.0f}")  # fmt: skip

# %% [markdown]
# **What to see.** With random crops a tenth of the change lies on the grid, not nearly all of it, and the rest follows
# outlines. But compare fairly: their score has not risen as far. The last line has the whole picture *at the score of the crops*. Is
# the crops' picture better than that one, by PSNR and by the judge? Where it is not, the crops have slowed the hacking
# down and have not turned it round.
#
# **What does it cost?** Per reward one forward and one backward pass through its picture network. The sentences never
# change, so CLIP-IQA's text network is used once and let go.
#
# ## 9 · What does the paper report?
#
# From Tables 3 and 4: SeeSR, one of the paper's diffusion models, trained with different rewards and measured on
# DIV2K-val. These are the paper's numbers, not ours. CLIPIQA is the reward itself; LPIPS is a distance to the truth,
# lower is closer. Gram-KL is the paper's name of the style loss of notebook 08.
#
# | rewards | style loss | CLIPIQA ↑ | LPIPS ↓ |
# |---|---|---|---|
# | none | – | 0.7146 | 0.3311 |
# | ImageReward | Gram-KL | 0.6671 | 0.3310 |
# | CLIP-IQA | Gram-KL | 0.7934 | 0.3373 |
# | both | Gram-KL | 0.7944 | 0.3369 |
# | both | none | 0.8964 | 0.4062 |
#
# (Table 3 does not name its style loss; its last row is Table 4's with Gram-KL. In Table 1, SeeSR before any of this
# training has 0.6989 and 0.3329.) The score that was trained on rises, as it must; that alone proves nothing. The last
# row is section 6 at full size: the best CLIPIQA of the table with the worst LPIPS.
#
# Does the real CLIP-IQA fall for MiniIQA's pattern? This cell asks it if it is there, and otherwise says what is
# missing.

# %% tags=["nbval-ignore-output"]
needed = {"the package pyiqa": find_spec("pyiqa"), "the file RN50.pt": registry.find("clip-rn50")}
missing = [name for name, found in needed.items() if not found]
if missing:
    print("NOT RUN, missing:", " and ".join(missing))
    print("to get them: pip install 'rfsr_ext[rewards]' and `rfsr weights fetch clip-rn50`")
else:
    real = create_reward("clipiqa")
    for k in chosen:
        print(f"step {k:2d}: MiniIQA {scores[k]:.2f}, CLIP-IQA {real.score(path[k : k + 1]).item():.2f}")

# %% [markdown]
# What did the real CLIP-IQA say where somebody had its weights? `rfsr record clip-iqa` asks it for three held-out
# photographs: the truth, four faults in three strengths, a pattern of 4×4 pixels in three amplitudes, and `climbed`, the
# bicubic enlargement after 10, 20 and 30 steps along *MiniIQA's* gradient ([docs/recordings.md](../docs/recordings.md)).
# The column to read is `above truth`: how many of the three photographs CLIP-IQA likes better in that version. MiniIQA
# rises along `climbed`, because it was climbed; if CLIP-IQA does not, the pattern is MiniIQA's own and no common taste.

# %% tags=["nbval-ignore-output"]
if (recording := recorded("clip-iqa")) is None:
    say_missing("clip-iqa")
else:
    print(recording.provenance)
    table = recording.rows.set_index(["photograph", "version", "strength"])
    truth = table.xs(("truth", 0), level=(1, 2))["score"]
    table["above truth"] = table["score"] > truth.reindex(table.index.get_level_values(0)).to_numpy()
    summary = table.groupby(level=(1, 2), sort=False)
    print(summary.agg({"score": "mean", "mini_iqa": "mean", "above truth": "sum"}).round(3).to_string())

# %% [markdown]
# ## 10 · A bug, and the check that catches it
#
# Someone rounds the picture to 8 bits before scoring, as a file would. The scores are right to three digits. But the
# derivative of rounding is 0: no error, no warning, and a reward that never trains anything.


# %%
def score_of_file(x):
    return iqa.score((255 * x).round() / 255)


check("score", score_of_file(start), iqa.score(start), 2e-3)  # sees nothing
caught(lambda: check("gradient", gradient(score_of_file, start), gradient(iqa.score, start), 1e-5))

# %% [markdown]
# ## 11 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up, predict then run).** A picture has cosine 0.25 with "Good image" and 0.24 with "bad image",
# $s=100$. What is its score, and what the slope of the score with respect to the difference of cosines?
# <details><summary>Hint</summary>Section 1 has the score, with σ of s times the difference; section 2 has the slope.</details>


# %%
def score_and_slope():
    raise NotImplementedError


def verify_score_and_slope():
    r, slope = score_and_slope()
    two = torch.tensor([[0.25, 0.24]])  # with axes as sentences, the features are the cosines (times any length)
    f = torch.cat([two, (1 - two.square().sum()).sqrt()[None, None]], dim=1)
    check("score", r, prompt_pair_score(f, torch.eye(2, 3), torch.tensor(100.0))[0], 1e-3)
    check("slope", slope, gradient(lambda d: torch.sigmoid(100 * d), torch.tensor(0.01)), 2e-2)


exercise(1, verify_score_and_slope)


# %% [markdown]
# **Exercise 2.** Some metrics are better when lower, for example roughness, the mean absolute difference of neighbors
# in a row. Make it a reward named "smooth" that prefers smooth pictures, with `CallableReward`.
# <details><summary>Hint</summary>The function takes (images, prompts) and returns one number per picture; an argument of
# `CallableReward` turns the sign.</details>


# %%
def roughness(images, prompts):
    return images.diff(dim=-1).abs().mean((1, 2, 3))


def smooth_reward():
    raise NotImplementedError


def verify_smooth():
    reward = smooth_reward()
    assert isinstance(reward, CallableReward) and reward.name == "smooth"
    check("score", reward.score(batch, prompts), -roughness(batch, prompts), 1e-7)
    ours, _ = reward_loss([WeightedReward(reward, weight=2.0)], batch, prompts)
    check("loss", ours, 2 * roughness(batch, prompts).mean(), 1e-7)


exercise(2, verify_smooth)


# %% [markdown]
# **Exercise 3 (harder).** A second term like the structure loss of notebook 05: climb for 20 steps of length 0.5 as `ascend`
# does (leave out its `clamp`), but do not touch the Haar LL band, the half-size picture of 2×2 sums, halved. Return the
# last picture. Predict first: will it stay nearer to the truth?
# <details><summary>Hint</summary>Take away from every gradient the part that moves LL. Which picture has the LL
# band of the gradient and nothing finer?</details>


# %%
def held_ascent(x):
    raise NotImplementedError


def verify_held():
    x = held_ascent(start)
    check("LL band", haar_ll(x), haar_ll(start), 1e-4)
    assert iqa.score(x) > iqa.score(start), "it must still climb"
    print(f"score {iqa.score(x).item():.2f}, {psnr(x, eye)[0]:.0f} dB; without this {loss_of_signal[20]:.0f} dB")


exercise(3, verify_held)


# %% [markdown]
# The numbers of the last verdict say whether it stays nearer. What they cannot be is a proof of safety: whatever the
# reward wants finds room enough in the fine bands. A structure loss holds structure, not texture.
#
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Score the mean over random shifts and sizes of a picture, and climb that. Is the picture still ruined? An answer
#   is PSNR and the judge at equal score, with and without the mean, for six crops.
# * Write a detector for the pattern that section 6 finds, as a `CallableReward`, and climb score and detector
#   together. An answer says which pattern the ascent finds next, or shows that it finds none at three weights of the
#   detector.
#
# ## Summary
#
# * CLIP-IQA asks whether a picture points more to a good or to a bad sentence: $r=\sigma(100\,(c_+-c_-))$, mean over pairs.
# * Its gradient is $s\,r(1-r)$ times that of the difference of cosines, through a preprocessing without any rounding.
# * Followed blindly it ruins the picture while the score rises; in free pixels the pattern shows the reward's own grid.
# * A bound at 1 makes the gradient small, not harmless: optimizers that normalize do not notice.
# * Views that move, such as random crops, take the pattern off the grid. Judge them at equal score: here they only slowed
#   the climb.
# * $\mathcal L_{reward}=\sum\lambda_k\,\text{mean}(-r_k)$; relu(2 − r) has the same gradient as long as r stays below 2.
#
# NAVIGATION
