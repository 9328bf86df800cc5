# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 17 · Learn from pairs
#
# **You will rank a model's own results, train it on pairs of a better and a worse one without the gradient of any
# reward, and find out what keeps it from running away.**
#
# A minute on two cores; nothing to download. Helpful before it: notebook 02 (what the noise is) and 10 (training with
# gradients of rewards, the other way to the same goal).
#
# NAVIGATION
#
# RFSR sends the gradient of a reward through the decoder into the network. DP2O-SR
# ([arXiv 2510.18851](https://arxiv.org/abs/2510.18851)) needs no such gradient. The model makes many results of one
# photograph, metrics rank them, and the model learns to prefer its best to its worst. Afterwards you can
#
# * turn scores of any metrics into one reward, into pairs, and into the weights of the pairs, on paper,
# * derive the loss of Diffusion-DPO in four lines, and tell its three meanings of β apart,
# * read accuracy, margin, winner, loser and drift together, and see a model run away before its pictures do.
#
# Model, rewards and judge are **small stand-ins**. Nothing below says anything about the published models.

# %%
import copy
import io
import math
import os
import tempfile
from contextlib import redirect_stderr

import diffusers
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers

from rfsr_ext.data import PhotographCrops, evaluation_crops, photographs
from rfsr_ext.data.candidates import CandidateFolder
from rfsr_ext.evaluation import best_of, create_measures, evaluate_measures, score_candidates
from rfsr_ext.evaluation.best_of import add_reward
from rfsr_ext.evaluation.ways import best_of_ways, total_error, ways_table
from rfsr_ext.losses import diffusion_dpo_loss
from rfsr_ext.metrics import Judge
from rfsr_ext.models import load_model
from rfsr_ext.notebook import COLORS, caught, check, exercise, explore, panels, pictures, show
from rfsr_ext.rewards.ranking import HybridReward, pair_candidates
from rfsr_ext.sampling import decode_candidates, generators, sample_candidates
from rfsr_ext.training.dp2o import DP2O, DP2OConfig, PreferencePairs

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()

# %% [markdown]
# ## 1 · How different are many results of one photograph?
#
# Five training crops (the data set mixes painted shapes with photographs), sixteen results each, which differ in their
# noise alone. (The preset `dp2o-mini` takes more crops and ten sampling steps; we take five steps, here and in every
# measurement below.) Four metrics score them: PSNR and SSIM compare with the ground truth, MiniIQA and MiniPreference
# see the picture alone. A judge stays apart: no pair depends on it.
#
# A candidate is a function of the model, the image and two numbers: its noise comes from the generator number
# $i+2^{32}m$ for image $i$ and candidate $m$. So anybody can make it again, and the file holds only the last latents,
# in half precision. The second cell makes number 3 of image 2 by hand; the third shows what the noise does to the
# scores.

# %%
STEPS, IMAGES, M = 5, 5, 16
model, judge = load_model("mini"), Judge.from_pretrained()
FULL, NONE = ("psnr", "ssim"), ("mini-iqa", "mini-preference")  # with and without ground truth
measures = create_measures(FULL, NONE)
names = [name for name in photographs("train") if name != "retina"]  # the largest, which takes memory
data = PhotographCrops(names, size=64, seed=0, recolor=False)
folder = tempfile.TemporaryDirectory()
with redirect_stderr(io.StringIO()):  # hides progress bars
    sample_candidates(model, data, folder.name, IMAGES, M, num_inference_steps=STEPS, batch_size=8)
    candidates = CandidateFolder(folder.name)
    scores = score_candidates(model, candidates, measures, batch_size=8)
results = [decode_candidates(model, candidates.latents(i)[0], candidates.lr(i)) for i in range(IMAGES)]
with torch.no_grad():
    judged = torch.stack([torch.cat([judge.score(part) for part in images.split(8)]) for images in results])
print(f"{IMAGES} crops × {M} results; metrics: {', '.join(scores.values)}")


# %%
@torch.no_grad()
def candidate_by_hand(i, m):
    lr, prompt = candidates.lr(i)[None], [candidates.latents(i)[1]]
    condition, scheduler = model.condition(lr, prompt), copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(STEPS)
    z = model.initial_latents(condition, model.process(STEPS), generators(0, [i + (m << 32)]))
    for t in scheduler.timesteps:
        z = scheduler.step(model.predict(z, t, condition), t, z, return_dict=False)[0]
    return z[0]


stored = candidates.latents(2, [3])[0][0].float()
check("candidate 3 of image 2, by hand and from the file", candidate_by_hand(2, 3), stored, 5e-3)
others = torch.stack([candidates.latents(2, [m])[0][0].float() for m in (2, 4)])
assert (others - stored).abs().amax((1, 2, 3)).min() > 0.1, "its neighbors are other results"

# %%
spread = torch.stack([255 * x.std(0, correction=0).mean() for x in results])  # gray levels, mean over pixels
print("crop  gray levels   " + "   ".join(f"{name:>18s}" for name in (*scores.values, "judge")))
for i in range(IMAGES):
    columns = [*(values[i] for values in scores.values.values()), judged[i]]
    text = [f"{x.mean():9.3g} ± {x.std(correction=0):.1g}" for x in columns]
    print(f"{i:4d}  {spread[i]:11.1f}   " + "   ".join(f"{x:>18s}" for x in text))

# %%
hybrid = HybridReward(FULL, NONE)
rewards = hybrid(scores.values, scores.lower_better)  # section 2 makes this number by hand
tiles, order = [], spread.argsort().tolist()
for i in (order[-1], order[1]):
    lr, gt = candidates.images(i)
    bicubic = F.interpolate(lr[None], scale_factor=4, mode="bicubic")[0].clamp(0, 1)
    tiles += [lr, bicubic, results[i][rewards[i].argmin()], results[i][rewards[i].argmax()], gt]
titles = ["low resolution", "bicubic", f"base, worst of {M}", f"base, best of {M}", "truth"] * 2
apart = [255 * (tiles[k + 3] - tiles[k + 2]).abs().mean().item() for k in (0, 5)]
sharpened = [255 * (tiles[k + 3] - tiles[k + 1]).abs().mean().item() for k in (0, 5)]
show(
    pictures(tiles, titles, columns=5, tile=1.92),
    f"Two training crops: low resolution, bicubic, the worst and the best of {M} results by the hybrid reward, and the "
    f"truth. Best and worst differ by {apart[0]:.0f} and {apart[1]:.0f} gray levels on average, best and bicubic by "
    f"{sharpened[0]:.0f} and {sharpened[1]:.0f}.",
)

# %% [markdown]
# **What to see.** First the table. Behind each ± stands the deviation over sixteen noises. Compare it with how the
# means differ from crop to crop: which photograph it is decides the score, and the noise moves it a little. This small
# deviation is all that DP2O-SR learns from.
#
# Does the eye see it? Cover the titles and guess which is the best. Edges and colors are the same in all, and what
# differs is fine texture, because the mini model starts from the enlarged low resolution with little noise. Big models
# start from pure noise and invent more, and the more they differ, the more there is to learn from them. Where best and
# worst look alike, their *order* may still be real, if the metrics agree about it. Do they? Rank the sixteen results of
# a crop by each metric and correlate the ranks (Spearman): 1 is the same order, −1 the opposite one, 0 none.


# %%
def ranks(x):
    return np.argsort(np.argsort(np.asarray(x), axis=-1), axis=-1)


def spearman(x, y):
    """Per crop; without ties it is the correlation of the ranks."""
    x, y = (r - r.mean(-1, keepdims=True) for r in map(ranks, (x, y)))
    return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


values = {name: table.numpy() for name, table in scores.values.items()} | {"judge": judged.numpy()}
kinds = {"both with truth": [FULL], "both without": [NONE], "one of each": [(f, k) for f in FULL for k in NONE],
         "judge, with truth": [(f, "judge") for f in FULL], "judge, without": [(k, "judge") for k in NONE]}  # fmt: skip
agreement = {kind: np.mean([spearman(values[a], values[b]) for a, b in pairs], 0) for kind, pairs in kinds.items()}
same = pd.Series(values["psnr"][0]).corr(pd.Series(values["ssim"][0]), method="spearman")
check("rank correlation, by hand and pandas", spearman(values["psnr"], values["ssim"])[0], same, 1e-6)

# %%
figure, axis = panels(width=7.0, height=2.5)
for y, (_, found) in enumerate(agreement.items()):
    axis.plot(found, np.full(IMAGES, y), "o", color=COLORS[y], markersize=5, alpha=0.6)
    axis.plot(found.mean(), y, "|", color="black", markersize=18)
axis.axvline(0, color="0.6", linewidth=1, linestyle="-")
axis.set_yticks(range(len(agreement)), list(agreement))
axis.set(xlabel=f"rank correlation over {M} results", xlim=(-1.05, 1.05), ylim=(len(agreement) - 0.5, -0.5))
said = "; ".join(f"{k} {x.mean():.1f} ± {x.std(ddof=1) / IMAGES**0.5:.1f}" for k, x in agreement.items())
show(
    figure,
    f"Agreement of metrics about {M} results, one dot per crop for {IMAGES} crops. Mean ± standard error: {said}.",
)
print(said.replace("; ", "\n"))

# %% [markdown]
# **What to see.** Metrics of one kind agree: the two stand-ins without truth are almost one metric, so the second adds
# little. Between the kinds the dots lie on both sides of zero: *what is nearer to the truth is not what scores better
# by itself*. That is why the paper takes both, and also why the winner of both together is a compromise. The judge
# shows how far any of this order holds outside the metrics that made it.
#
# ## 2 · One number out of many metrics
#
# Section 4.1 of the paper. Turn every metric so that higher is better, scale it to [0, 1] by its smallest and largest
# score *among the results of one photograph*, and take the mean of two halves:
#
# $$\bar s=\frac{\tilde s-\min\tilde s}{\max\tilde s-\min\tilde s}\qquad
# R=\frac12\cdot\underset{\text{with truth}}{\operatorname{mean}}\ \bar s\;+\;
# \frac12\cdot\underset{\text{without}}{\operatorname{mean}}\ \bar s$$
#
# On paper, with three results, one metric with truth (a distance: lower is better) and two without:
#
# | result | distance | turned, scaled | A | scaled | B | scaled | R |
# |---|---|---|---|---|---|---|---|
# | 1 | 0.3 | 0 | 5 | 1 | 10 | 0 | ½·0 + ½·½ = 0.25 |
# | 2 | 0.1 | 1 | 1 | 0 | 20 | ½ | ½·1 + ½·¼ = 0.625 |
# | 3 | 0.2 | ½ | 2 | ¼ | 30 | 1 | ½·½ + ½·⅝ = 0.5625 |

# %%
paper = {"distance": [[0.3, 0.1, 0.2]], "A": [[5.0, 1.0, 2.0]], "B": [[10.0, 20.0, 30.0]]}
paper = {name: torch.tensor(table, dtype=torch.float64) for name, table in paper.items()}
three = HybridReward(("distance",), ("A", "B"))
check("on paper", three(paper, {"distance"})[0], [0.25, 0.625, 0.5625], 1e-12)
tied = paper | {"A": torch.ones(1, 3).double()}
check("a metric that cannot tell counts ½", three(tied, {"distance"})[0], [0.125, 0.75, 0.625], 1e-12)


def reward_by_hand(values, axis):
    """Our four metrics; ``axis`` 1 scales within a crop, None over all crops."""

    def scaled(x):
        low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
        return (x - low) / (high - low)

    halves = [np.mean([scaled(values[name].astype(float)) for name in names], axis=0) for names in (FULL, NONE)]
    return (halves[0] + halves[1]) / 2


check("group scope: by hand and package", reward_by_hand(values, 1), rewards, 1e-12)
over_all = HybridReward(FULL, NONE, scope="set")(scores.values)
check("set scope: by hand and package", reward_by_hand(values, None), over_all, 1e-12)

squeezed = {name: t.double().clone() for name, t in scores.values.items()}
for t in squeezed.values():
    t[0] = t[0].mean() + (t[0] - t[0].mean()) / 100
check("crop 0, scores a hundred times closer", hybrid(squeezed), rewards, 1e-9)
bounds = hybrid.bounds(scores.values)  # the scale of these results, to measure others by it
better = {name: t + 0.5 * (t.amax(1, keepdim=True) - t.amin(1, keepdim=True)) for name, t in scores.values.items()}
check("half a range better, on the old scale", hybrid(better, bounds=bounds), rewards + 0.5, 1e-4)

# %%
figure, axes = panels(1, 2, width=7.4, height=2.6, sharey=True)
for axis, (scope, table) in zip(axes, {"group": rewards, "set": over_all}.items(), strict=True):
    for i in range(IMAGES):
        axis.plot(np.full(M, i), table[i], "o", color=COLORS[0], markersize=4, alpha=0.4)
    axis.set(title=f"scope: {scope}", xlabel="crop", xticks=range(IMAGES), ylim=(-0.03, 1.03))
axes[0].set(ylabel="hybrid reward")
within = {
    s: (t.std(1, correction=0).mean() / t.std(correction=0)).item() for s, t in (("group", rewards), ("set", over_all))
}
show(
    figure,
    f"Rewards of {M} results of {IMAGES} crops. Of the deviation of all rewards the results of one crop have "
    f"{100 * within['group']:.0f} percent by the group's scale and {100 * within['set']:.0f} percent by the set's.",
)

# %% [markdown]
# **What to see.** Scaled within the group, every crop fills about the same range. Scaled by the set, a crop is one
# small heap, and its height says which photograph it is. Pairs never leave their group, so both scopes may order a
# group alike; what changes is how much a *gap* counts. The paper's choice makes all groups equal. It also erases
# something: if all scores of a crop lay a hundred times closer together, its rewards would be the same, to the last bit
# that matters.
#
# So a crop whose results differ by rounding alone gets the same rewards as one whose results truly differ. Keep this in
# mind for the weights.
#
# Why two halves? Train once with `FULL` alone and once with `NONE` alone: `rfsr train dp2o-mini` takes
# `--set "no_reference=[]"` or `--set "full_reference=[]"`. Which smooths, which invents? We have not run it.
#
# ## 3 · Which pairs count?
#
# Sections 4.2 and 4.3. The $N$ best and the $N$ worst of $M$ make $N^2$ pairs, each with a weight
# $w=w_{intra}\,w_{inter}$:
#
# $$w_{intra}=R_w-R_l+1-\operatorname{mean}_{\text{pairs of the group}}(R_w-R_l)\qquad
# w_{inter}=\sigma_g+1-\operatorname{mean}_{\text{groups}}\sigma_g$$
#
# $\sigma_g$ is the deviation of all $M$ rewards of the group. Two groups for paper, with $M=4$ and $N=2$:
#
# | | rewards | gaps | their mean | $w_{intra}$ | $\sigma_g$ | $w_{inter}$ |
# |---|---|---|---|---|---|---|
# | A | .85 .55 .45 .15 | .7 .4 / .4 .1 | .4 | 1.3 1 / 1 .7 | .25 | 1.1 |
# | B | .57 .51 .49 .43 | .14 .08 / .08 .02 | .08 | 1.06 1 / 1 .94 | .05 | 0.9 |
#
# The third cell below is a slider for $N$, the one after it a still figure.

# %%
two = torch.tensor([[0.45, 0.85, 0.15, 0.55], [0.57, 0.43, 0.51, 0.49]], dtype=torch.float64)  # in any order
pairs_of_two = pair_candidates(two, selected=2)
check("winners, best first", pairs_of_two.winners, [[1, 3], [0, 2]], 0)
check("losers, worst first", pairs_of_two.losers, [[2, 0], [1, 3]], 0)
intra = np.array([[[1.3, 1.0], [1.0, 0.7]], [[1.06, 1.0], [1.0, 0.94]]])
check("both weights on paper", pairs_of_two.weights, intra * np.array([1.1, 0.9])[:, None, None], 1e-12)
check("intra alone", pair_candidates(two, 2, inter_group=False).weights, intra, 1e-12)
check("neither", pair_candidates(two, 2, False, False).weights, np.ones((2, 2, 2)), 0)


def weights_by_hand(R, N):
    R = np.sort(np.asarray(R), axis=1)
    gaps = R[:, ::-1][:, :N, None] - R[:, None, :N]
    sigma = np.sqrt(((R - R.mean(1, keepdims=True)) ** 2).mean(1))
    return (gaps + 1 - gaps.mean((1, 2), keepdims=True)) * (sigma + 1 - sigma.mean())[:, None, None]


pairs = pair_candidates(rewards, selected=4)
check("our candidates: by hand and package", weights_by_hand(rewards, 4), pairs.weights, 1e-12)
print(f"{len(pairs)} pairs; weights from {pairs.weights.min():.1f} to {pairs.weights.max():.1f}")


# %%
def draw(N, image=0):
    chosen, R = pair_candidates(rewards, N), rewards[image]
    figure, (left, right) = panels(1, 2, width=7.0, height=2.5, width_ratios=[1.6, 1])
    for m, color, label in ((range(M), "0.75", "not used"), (chosen.winners[image].tolist(), COLORS[0], "winners"),
                            (chosen.losers[image].tolist(), COLORS[1], "losers")):  # fmt: skip
        where = [1 + int((R[k] < R).sum()) for k in m]
        left.bar(where, [R[k].item() for k in m], color=color, label=label)
    left.set(xlabel="rank", ylabel="reward", ylim=(0, 1), xticks=range(1, M + 1, 3))
    left.legend(frameon=False, fontsize=8)
    right.imshow(chosen.weights[image], vmin=0.7, vmax=1.3, cmap="coolwarm")
    right.set(title="weight of every pair", xlabel="loser", ylabel="winner", xticks=[], yticks=[])
    gap = chosen.gaps.mean().item()
    return figure, (
        f"The {M} rewards of crop {image}, best first, with N = {N} winners and losers, and the weights of their "
        f"{N * N} pairs. Over all crops the mean gap of a pair is {gap:.2f}."
    )


chooser = explore(draw, values=list(range(1, M // 2 + 1)), label="N, best and worst that count", start=4)
chooser

# %%
chooser.slider.value = 2
show(*draw(2))
mean_gaps = [pair_candidates(rewards, N).gaps.mean().item() for N in range(1, M // 2 + 1)]
assert all(a > b for a, b in zip(mean_gaps, mean_gaps[1:], strict=False)), "more pairs, smaller gaps"

# %% [markdown]
# **What to see.** A small $N$ gives few pairs of a large gap, a large $N$ many pairs of small ones, and near the middle
# winner and loser change places with the next metric. The paper takes 8 of 32 for its Stable Diffusion model and 4 of
# 64 for FLUX.
#
# Each weight is 1 on average, so switching one on shifts attention and does not change the learning rate. The shift is
# mild, because rewards lie in [0, 1]. The paper's Table 3 (its numbers) gives a final reward of 0.645 without weights,
# 0.648 and 0.649 with one, and 0.651 with both. And $w_{inter}$ is meant to favor photographs whose results differ, but
# the group's scale has erased by how *much* they differ; what $\sigma_g$ still tells is how the sixteen are spread
# between their ends, and how far the four metrics agree.
#
# And $M$? Its use is statistics of extremes: the expected best of $M$ draws grows with $M$, ever more slowly. Of 16
# results we can average over *all* choices of $M$, without drawing: the $k$-th smallest is the largest of $M$ in
# $\binom{k-1}{M-1}$ of $\binom{16}{M}$ choices.


# %%
def expected_best(x, m):
    """Mean over all choices of m of the largest, for rows of x."""
    x, total = np.sort(np.asarray(x), axis=-1), np.shape(x)[-1]
    return x @ [math.comb(k, m - 1) / math.comb(total, m) for k in range(total)]


rows = pd.DataFrame({"model": "base", "image": np.repeat(range(IMAGES), M), "seed": list(range(M)) * IMAGES,
                     "reward": rewards.flatten().numpy()})  # fmt: skip
table = best_of(rows, counts=[1, 2, 4, 8, 16]).pivot(index="count", columns="of", values="value")
check("Best@M: by hand and package", [expected_best(rewards, m).mean() for m in table.index], table["best"], 1e-12)
check("Worst@M is −Best@M of −R", [-expected_best(-rewards, m).mean() for m in table.index], table["worst"], 1e-12)
check("uniform numbers: M / (M + 1)", expected_best(np.arange(1, 5000) / 5000, 3), 0.75, 1e-3)

# %%
counts = np.arange(2, M + 1)
deviation = rewards.std(1, correction=1).numpy()
gaps = np.stack([(expected_best(rewards, m) + expected_best(-rewards, m)) / deviation for m in counts])
normal = np.random.default_rng(0).standard_normal((20_000, M))
bell = [(normal[:, :m].max(1) - normal[:, :m].min(1)).mean() for m in counts]
figure, axis = panels(width=6.2, height=2.7)
axis.plot(counts, gaps.mean(1), marker="o", markersize=4, label=f"our {IMAGES} crops")
axis.plot(counts, bell, label="a normal distribution, simulated")
axis.plot(counts, (counts - 1) / (counts + 1) * 12**0.5, label="a uniform one, $(M-1)/(M+1)$")
axis.set(xlabel="results per photograph, M", ylabel="best − worst, in σ", ylim=(0, None))
axis.legend(frameon=False)
said = ", ".join(f"{gaps[k].mean():.1f} at M = {counts[k]}" for k in (0, 2, 6, 14))
ends = f"A normal distribution reaches {bell[-1]:.1f}, a uniform one {15 / 17 * 12**0.5:.1f}."
show(figure, f"Gap between best and worst of M results over M, in deviations. Our crops: {said}. {ends}")

# %% [markdown]
# **What to see.** From 2 to 4 results the gap nearly doubles; from 8 to 16 it grows little, at twice the cost of
# sampling. That is the paper's "diminishing returns" before any training.
#
# ## 4 · From a preference to a loss
#
# *Bradley and Terry:* the better one wins with probability $\operatorname{sigmoid}(r_w-r_l)$. *DPO:* the model $p$ that
# has the most reward for its divergence from $p_{ref}$ satisfies $r=\beta\log\frac{p}{p_{ref}}+\text{const}$; put that
# in, and the reward is gone: the margin is $\beta\,[\log\frac{p(w)}{p_{ref}(w)}-\log\frac{p(l)}{p_{ref}(l)}]$.
# *Diffusion:* a denoising step is a normal distribution around what the network says, so
# $\log p=-e/(2\sigma^2)+\text{const}$ with $e=\lVert\text{output}-\text{target}\rVert^2$. All constants go into β:
#
# $$\text{margin}=-\frac\beta2\bigl[(e-e_{ref})(w)-(e-e_{ref})(l)\bigr]\qquad
# \mathcal L=\operatorname{mean}\;w_{pair}\cdot\bigl(-\log\operatorname{sigmoid}(\text{margin})\bigr)$$
#
# Here $e$ is a *mean* over the elements. The derivative of $-\log\operatorname{sigmoid}(x)$ is
# $-(1-\operatorname{sigmoid}(x))$. So the winner's output is pulled to its target and the loser's pushed away from its
# own, with $n$ elements and $B$ pairs by
#
# $$\frac{\partial\mathcal L}{\partial\,\text{output}_w}
# =\frac{w_{pair}\,\beta}{B\,n}\bigl(1-\operatorname{sigmoid}(\text{margin})\bigr)
# (\text{output}_w-\text{target}_w),\quad\text{and the negative for }l.$$
#
# Training begins at the reference: all margins are 0, so the loss is $\log 2$ and the accuracy a coin's. But the force
# is not 0: it is half of what it can ever be. Then: what is β? Public code has three answers. A β without its
# convention is half a number.

# %%
g = torch.Generator().manual_seed(0)
output, reference, target = (torch.randn(2, 3, 4, 5, generator=g).double() for _ in range(3))  # 3 pairs of 20 numbers
reference, weight = output + 0.2 * reference, torch.tensor([0.8, 1.0, 1.3]).double()


def loss_by_hand(output, reference, target, beta, weight):
    change = ((output - target) ** 2).mean((2, 3)) - ((reference - target) ** 2).mean((2, 3))
    margin = -beta / 2 * (change[0] - change[1])
    return (weight * torch.log1p(torch.exp(-margin))).mean(), margin


def gradient_by_hand(output, reference, target, beta, weight):
    _, margin = loss_by_hand(output, reference, target, beta, weight)
    force = weight * beta / (len(weight) * target[0, 0].numel()) * (1 - torch.sigmoid(margin))
    return torch.tensor([1.0, -1.0])[:, None, None, None] * force[None, :, None, None] * (output - target)


free = output.clone().requires_grad_()
loss, log = diffusion_dpo_loss(free, reference, target, beta=6.0, weight=weight)
check("loss", loss_by_hand(output, reference, target, 6.0, weight)[0], loss, 1e-12)
check("margin", loss_by_hand(output, reference, target, 6.0, weight)[1].mean(), log["margin"], 1e-12)
gradient = torch.autograd.grad(loss, free)[0]
check("gradient", gradient_by_hand(output, reference, target, 6.0, weight), gradient, 1e-12)
normal = torch.distributions.Normal(output, 0.7)
difference = (normal.log_prob(target) - torch.distributions.Normal(reference, 0.7).log_prob(target)).sum((2, 3))
as_errors = -((output - target) ** 2 - (reference - target) ** 2).sum((2, 3)) / (2 * 0.7**2)
check("errors in the place of log p", as_errors, difference, 1e-10)

start = reference.clone().requires_grad_()
loss, log = diffusion_dpo_loss(start, reference, target, beta=6.0)
check("at the reference: log 2, accuracy ½", [loss.item(), log["accuracy"]], [math.log(2), 0.5], 1e-12)
assert torch.autograd.grad(loss, start)[0].norm() > 0.1
n = target[0, 0].numel()
equal = {"half-mean": 6.0, "mean": 3.0, "sum": 3.0 / n}
losses = [diffusion_dpo_loss(output, reference, target, b, c)[0].item() for c, b in equal.items()]
check("β, β/2 and β/(2n) in three conventions", losses, [losses[0]] * 3, 1e-12)
margins = {c: diffusion_dpo_loss(output, reference, target, 6.0, c)[1]["margin"].item() for c in equal}
check("one β, three margins: 1 : 2 : 2n", [m / margins["half-mean"] for m in margins.values()], [1, 2, 2 * n], 1e-9)
print(f"β = 5000 is {2500 / (4 * 64 * 64):.3f} of sum for latents 4×64×64, {2500 / (16 * 64 * 64):.3f} for 16×64×64")

# %% [markdown]
# With the mean, the same β is four times weaker per number of FLUX's latents. The paper uses 5000 for both.
#
# ## 5 · A model of one number
#
# Now a toy in which everything can be seen. A "photograph" has results $x\sim\mathcal N(0,1)$, one number each. Their
# true quality is $-(x-1)^2$: best at 1, and *worse again beyond it*. The model is the exact denoiser of
# $\mathcal N(m,1)$. Its only weight is $m$, the mean of what it makes, and the reference has $m=0$. At noise level
# $x_t=\alpha x+\sigma\varepsilon$ with $\alpha^2+\sigma^2=1$ it answers with $\sigma^2m+\alpha x_t$.
#
# Do the algebra. The error of an answer is $\bigl(\sigma^2(m-x)+\alpha\sigma\varepsilon\bigr)^2$. Subtract the
# reference's ($m=0$), then the loser's from the winner's. The squares of $m$ cancel, and the noise cancels as well,
# *because both share it*:
#
# $$\text{margin}=\beta\,m\,\sigma^4\,(x_w-x_l)$$
#
# With noise of its own for each a random term $\beta\,m\,\alpha\sigma^3(\varepsilon_l-\varepsilon_w)$ would stay: it
# says nothing of the pair. And see what has become of β: it occurs only in the product $\beta m$. *Half of β, twice as
# far.*
#
# So one number $u=\beta m$ solves the toy for every β: the zero of the loss's derivative, found by bisection. Training
# by Adam with the package's loss must end there.

# %%
g = torch.Generator().manual_seed(0)
x = torch.randn(64, 16, generator=g).double()  # 64 photographs, M = 16
toy_pairs = pair_candidates(HybridReward((), ("quality",))({"quality": -((x - 1) ** 2)}), selected=4)
winners = x.gather(1, toy_pairs.winners)[:, :, None].expand(64, 4, 4).flatten()
losers = x.gather(1, toy_pairs.losers)[:, None, :].expand(64, 4, 4).flatten()
alpha = torch.tensor([0.9, 0.7, 0.5, 0.3]).double().repeat_interleave(1024)[:, None]  # four noise levels for each pair
sigma = (1 - alpha**2).sqrt()
toy_x = torch.stack([winners, losers]).repeat(1, 4)[:, :, None]
toy_noise = torch.randn(4096, 1, generator=g).double()
toy_weight = toy_pairs.weights.flatten().repeat(4)


def toy_loss(m, beta, noise=toy_noise):
    noisy = alpha * toy_x + sigma * noise  # one noise for winner and loser
    return diffusion_dpo_loss(sigma**2 * m + alpha * noisy, alpha * noisy, toy_x, beta, weight=toy_weight)


grid = np.linspace(-12, 12, 20_001)
density = np.exp(-((grid - 2) ** 2) / 2 - (0.4 - 0.6 * grid) ** 2 / (2 * 0.64))  # x ~ N(2, 1), seen as x_t = 0.4
check("the exact denoiser, by integration", (grid * density).sum() / density.sum(), 0.64 * 2 + 0.6 * 0.4, 1e-9)
print(
    f"{len(toy_pairs)} pairs: winners {winners.mean():.2f} ± {winners.std():.2f}, "
    f"losers {losers.mean():.2f} ± {losers.std():.2f}"
)
print(f"the loser is the smaller number in {100 * (losers < winners).double().mean():.1f} % of the pairs")

m = torch.tensor(0.8).double()
margin = 2.0 * m * sigma[:, 0] ** 4 * (toy_x[0] - toy_x[1])[:, 0]
check("margin of the toy: algebra and package", toy_loss(m, 2.0)[1]["margin"], margin.mean(), 1e-12)
check("its loss", toy_loss(m, 2.0)[0], (toy_weight * F.softplus(-margin)).mean(), 1e-12)
check("half of β, twice as far", toy_loss(2 * m, 1.0)[0], toy_loss(m, 2.0)[0], 1e-12)
own_noise = torch.randn(2, 4096, 1, generator=g).double()
extra = 2.0 * m * (alpha * sigma**3 * (own_noise[1] - own_noise[0]))[:, 0]
check("own noise for each", toy_loss(m, 2.0, own_noise)[1]["margin"], (margin + extra).mean(), 1e-12)
print(f"deviation of a margin: shared noise {margin.std():.2f}, own noise {(margin + extra).std():.2f}")


# %%
def slope(u):
    d = sigma[:, 0] ** 4 * (toy_x[0] - toy_x[1])[:, 0]
    return -(toy_weight * d * torch.sigmoid(-u * d)).mean().item()


low, high = 0.0, 100.0
for _ in range(60):
    low, high = ((low + high) / 2, high) if slope((low + high) / 2) < 0 else (low, (low + high) / 2)
u = (low + high) / 2


def train_toy(beta, steps=250):
    m, path = torch.zeros((), dtype=torch.float64, requires_grad=True), []
    adam = torch.optim.Adam([m], 0.2, betas=(0.8, 0.99))
    for _ in range(steps):
        loss, log = toy_loss(m, beta)
        path.append({"m": m.item(), "quality": -1 - (m.item() - 1) ** 2} | {k: v.item() for k, v in log.items()})
        adam.zero_grad()
        loss.backward()
        adam.step()
    return pd.DataFrame(path)


BETAS = (0.7, 1.5, 4.0, 8.0, 32.0)
paths = {beta: train_toy(beta) for beta in BETAS}
print("   β   bisection: u/β   trained m   quality   accuracy   drift")
for beta, path in paths.items():
    end = path.iloc[-1]
    print(f"{beta:4g}   {u / beta:14.2f}   {end.m:9.2f}   {end.quality:7.2f}   {end.accuracy:8.2f}   {end.drift:.2f}")
check("β · m, trained", [beta * path.m.iloc[-1] for beta, path in paths.items()], [u] * len(paths), 0.03 * u)

# %%
figure, (left, right) = panels(1, 2, width=8.4, height=2.9)
across = np.linspace(-3.5, 9, 600)


def bell_at(mean):
    return np.exp(-((across - mean) ** 2) / 2) / (2 * np.pi) ** 0.5


left.fill_between(across, bell_at(0), color="0.85", linewidth=0, label="reference")
for beta in BETAS[:3]:
    left.plot(across, bell_at(paths[beta].m.iloc[-1]), label=f"β = {beta:g}")
left.plot(x.flatten(), np.full(x.numel(), -0.025), "|", color="0.4", markersize=6)
left.axvline(1, color="black", linestyle=":", linewidth=1)
left.set(xlabel="x; below, what was ranked; dotted, the best", yticks=[], ylim=(-0.05, 0.5))
left.legend(frameon=False, fontsize=8)
farthest, way = paths[BETAS[0]].iloc[-1], np.linspace(0.08, 5, 200)  # drift grows with m²
right.semilogx(farthest.drift * (way / farthest.m) ** 2, -1 - (way - 1) ** 2, color="0.6", linestyle="-")
for (beta, path), color in zip(paths.items(), COLORS, strict=False):
    right.plot(path.drift.iloc[-1], path.quality.iloc[-1], "o", color=color, label=f"β = {beta:g}")
right.axhline(-2, color="black", linestyle=":", linewidth=1)
right.set(xlabel="drift", ylabel="mean true quality")
right.legend(frameon=False, fontsize=8, loc="lower left")
ends = "; ".join(f"β {b:g}: mean {p.m.iloc[-1]:.1f}, quality {p.quality.iloc[-1]:.1f}" for b, p in paths.items())
show(
    figure,
    f"Where the toy ends for five β, from mean 0 and quality −2. {ends}. The largest x that was ranked is "
    f"{x.max():.1f}.",
)

# %% [markdown]
# **What to see.** Right: all β move along *one* curve, first up and then down, and β only says where on it they stop;
# the dotted line is the reference's quality. A large β stops before the top. A small β runs past the best x and past
# *all* that was ranked, and there the quality is far below the reference's. The loss has no way to know: a pair says
# "more to the right than the loser" and never "far enough". This is over-optimization, and no reward was hacked: every
# pair was ranked by the true quality. (A toy that can only shift exaggerates this; a network has more freedom, to do
# better or worse.)
#
# ### Read the logs together
#
# `accuracy` is the share of positive margins. `winner` and `loser` say how much worse than the reference each is
# predicted, relative to its error, and `drift` how far the outputs have moved, in the same unit. In the toy we know
# `winner` as well: it is proportional to $m^2-2m\bar x_w$ and becomes positive at $m=2\bar x_w$.

# %%
figure, axes = panels(1, 3, width=9.0, height=2.8)
for beta, color, style in ((0.7, COLORS[1], "--"), (8.0, COLORS[0], "-")):
    path = paths[beta]
    axes[0].plot(path.accuracy, color=color, linestyle=style, label=f"β = {beta:g}")
    axes[1].plot(path.winner, color=color, linestyle=style, label=f"winner, β = {beta:g}")
    axes[1].plot(path.loser, color=color, linestyle=":", label=f"loser, β = {beta:g}")
    axes[2].plot(path.quality, color=color, linestyle=style, label=f"β = {beta:g}")
axes[0].set(title="accuracy", xlabel="step", ylim=(0.45, 1.02))
axes[1].set(title="error above the reference's", xlabel="step", yscale="symlog")
axes[1].axhline(0, color="0.6", linewidth=1, linestyle="-")
axes[2].set(title="true quality (never logged)", xlabel="step")
for axis in axes:
    axis.legend(frameon=False, fontsize=7)
end, safe = paths[0.7].iloc[-1], paths[8.0].iloc[-1]
show(
    figure,
    f"Logs of two toy runs. β = 0.7 ends with accuracy {end.accuracy:.2f}, winner {end.winner:.1f}, quality "
    f"{end.quality:.0f}; "
    f"β = 8 with accuracy {safe.accuracy:.2f}, winner {safe.winner:.2f}, quality {safe.quality:.1f}.",
)
turn = (
    (toy_weight * 0 + 1) @ (sigma[:, 0] ** 4 * toy_x[0, :, 0]) / (sigma**4).sum()
)  # mean winner, weighted as `winner` is
at_turn = toy_loss(2 * turn, 1.0)[1]
cross = (
    2
    * (2 * turn)
    * (alpha * sigma**3 * toy_noise).mean()
    / ((sigma**2 * toy_x - alpha * sigma * toy_noise) ** 2).mean()
)
check("winner at m = 2 · mean winner, but for the noise", at_turn["winner"], cross, 1e-12)

# %% [markdown]
# **What to see.** The accuracy is the same for both and for good. *Accuracy cannot see a model run away.* What can is
# the sign of `winner`: where it is below 0 the model predicts winners better than before; where it is above 0 it
# prefers them only by unlearning losers faster. The package warns when that happens while the held-out reward rises.
#
# ## 6 · On the mini model, live
#
# The same on a network. A batch is drawn pair by pair, and everything random is a function of a sample's number: which
# pair, which timestep, which noise. The mini model answers with the clean latents, so these are its target.
#
# One thing is special. The sampler starts from $x_T=\alpha_Tz_{LR}+0.7\,\sigma_T\varepsilon$, the enlarged photograph
# under little noise, and goes from there straight to a result. A result with plain noise,
# $\alpha_tz+\sigma_t\varepsilon$, is a state that it never meets. So pairs are noised *towards the start*:
# $\varepsilon$ is replaced by $0.7\,\varepsilon+(z_{LR}-z)\,\alpha_T/\sigma_T$. (Where a sampler starts from noise
# alone, none of this is needed.)
#
# Now train: eight steps of four pairs with one learning rate, a large one so that eight steps show something, and two β.
# The larger β looks huge. It must be, because the mini model works with little noise and predicts its own results
# almost without error, so differences of errors are tiny. A β belongs to a model: do not carry it over.
#
# Last the question of section 5, on the network: what does sharing the noise save? For one student and the same pairs,
# many draws of timestep and noise; the deviation of the margin over the draws says nothing of the pairs.

# %%
dataset = PreferencePairs(candidates, pairs, seed=0)


def pair_by_hand(k):
    rng = np.random.default_rng((0, k, 5))
    group, i, j = (int(rng.integers(n)) for n in (IMAGES, 4, 4))
    order = rewards[group].argsort(descending=True)
    (winner, loser), _ = candidates.latents(group, [int(order[i]), int(order[M - 1 - j])])
    return winner.float(), loser.float(), pairs.weights[group, i, j]


for k in (0, 7):
    for ours, key in zip(pair_by_hand(k), ("winner", "loser", "weight"), strict=True):
        check(f"sample {k}: {key}", ours, dataset[k][key], 1e-6)


# %%
def batch(k, n):
    return torch.utils.data.default_collate([dataset[s] for s in range(k * n, k * n + n)])


times = model.process(STEPS).timesteps


def level(t):
    """α and σ at timesteps, for latents."""
    squared = model.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return squared.sqrt(), (1 - squared).sqrt()


def towards_start(clean, noise, t, condition):
    """z_t on the way from x_T, the noised LR image, to clean latents."""
    (alpha, sigma), (alpha_T, sigma_T) = level(t), level(times[:1])
    z_lr = model.encode(condition.image)
    return alpha * clean + sigma * (model.recipe.temperature * noise + (z_lr - clean) * alpha_T / sigma_T)


def loss_on_model(student, frozen, batch, numbers, beta):
    clean = torch.stack([batch["winner"], batch["loser"]])
    noise = torch.stack([torch.randn(clean.shape[2:], generator=g) for g in generators(0, numbers)])
    t = times[[int(np.random.default_rng((0, k, 6)).integers(STEPS)) for k in numbers]]
    condition = student.condition(batch["lr"], batch["prompt"])
    with torch.no_grad():
        noisy = [towards_start(z, noise, t, condition) for z in clean]  # one t and noise for winner and loser
    output = torch.stack([student.predict(z, t, condition) for z in noisy])
    with torch.no_grad():
        before = torch.stack([frozen.predict(z, t, condition) for z in noisy])
    change = ((output - clean) ** 2 - (before - clean) ** 2).mean((2, 3, 4))
    return (batch["weight"] * F.softplus(beta / 2 * (change[0] - change[1]))).mean()


# %%
def learner(beta):
    """A copy to train, its parameters, and the package's method."""
    student = model.reference()
    settings = {"beta": beta, "num_inference_steps": STEPS, "timestep_sampling": "sampler", "crop_size": 64}
    config = DP2OConfig.from_dict(settings)
    method = DP2O(config, student.unfreeze(), model, "notebook")
    return student, list(student.trained_parameters().values()), method


student, parameters, method = learner(1e5)
g = torch.Generator().manual_seed(0)
for name, noise_level in (("at the reference", 0.0), ("a little away from it", 0.003)):
    with torch.no_grad():
        for p in parameters:
            p += noise_level * p.std(correction=0) * torch.randn(p.shape, generator=g)
    few, numbers = batch(0, 4), range(4)
    by_hand = loss_on_model(student, model, few, numbers, 1e5)
    ours = torch.cat([d.flatten() for d in torch.autograd.grad(by_hand, parameters)])
    package, log = method.loss("model", few, 0, numbers)
    theirs = torch.cat([d.flatten() for d in torch.autograd.grad(package, parameters)])
    check(f"{name}: loss", by_hand, package, 2e-3)
    check(f"{name}: gradient, distance over length", (ours - theirs).norm() / theirs.norm(), 0, 1e-2)
    print(f"    loss {by_hand:.2f}, margin {log['margin']:.1f}, accuracy {log['accuracy']:.2f}")

# %%
RATE = 1e-4


def train(beta, steps=8):
    student, parameters, method = learner(beta)
    adam, rows = torch.optim.Adam(parameters, RATE), []
    for k in range(steps):
        loss, log = method.loss("model", batch(k, 4), k, range(4 * k, 4 * k + 4))
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        rows.append({name: value.item() for name, value in log.items()})
    return student, pd.DataFrame(rows)


runs = {f"β = {beta:.0e}".replace("e+0", "e"): train(beta) for beta in (1e3, 1e5)}
for name, (_, history) in runs.items():
    late = history.iloc[-4:].mean()
    print(f"{name}, last 4 steps: accuracy {late.accuracy:.1f}, margin {late.margin:.2g}, winner {late.winner:+.2g}, "
          f"loser {late.loser:+.2g}, drift {late.drift:.2g}")  # fmt: skip
(_, small), (_, large) = runs.values()
check("drift after the first step does not depend on β", small.drift[1] / large.drift[1], 1.0, 0.02)

# %%
student = runs["β = 1e3"][0]
pair = batch(0, 4)
clean = torch.stack([pair["winner"], pair["loser"]])
condition = model.condition(pair["lr"], pair["prompt"])


@torch.no_grad()
def change_of(z, t, noise):
    noisy = towards_start(z, noise, t, condition)
    errors = [((m.predict(noisy, t, condition) - z) ** 2).mean((1, 2, 3)) for m in (student, model)]
    return errors[0] - errors[1]


g = torch.Generator().manual_seed(1)
found = {"same timestep and noise": [], "same timestep": [], "neither": []}
for _ in range(5):
    t, t_other = times[torch.randint(STEPS, (2, 4), generator=g)]
    a, b = torch.randn(2, *clean.shape[1:], generator=g)
    of_winner = change_of(clean[0], t, a)
    for draws, other in zip(found.values(), ((t, a), (t, b), (t_other, b)), strict=True):
        draws.append(of_winner - change_of(clean[1], *other))
noisiness = {name: torch.stack(draws).std(0).mean().item() for name, draws in found.items()}
for name, deviation in noisiness.items():
    print(f"{name:24s} deviation {deviation / noisiness['same timestep and noise']:.1f} times that of the first")

# %% [markdown]
# **What to see.** The check of the first step is worth a thought. At the reference β is a factor of the gradient, and
# Adam (and the clipping before it) divides that factor out again. So the first step is as large for any β: *the
# learning rate decides how far one step goes, β decides when the force lets go*. A β that is too small for its learning
# rate never lets go.
#
# Then compare the two lines. Do accuracy or the signs of `winner` and `loser` tell the two runs apart? The margin does;
# the drift does so little after eight steps. A `winner` above 0 is section 5's warning.
#
# And the noise: half of the deviation is worth four times as many pairs, and it costs nothing. In this model the
# timestep counts most, because its noise is small. Does the training show on photographs that it has not seen?

# %%
test = evaluation_crops(photographs("test"), size=64, count=6)
SEEDS = 3
first = {}  # the first result of every crop, by model


def measure(name, m):
    def keep(indices, images):
        first.setdefault(name, images)  # batches come seed by seed

    with redirect_stderr(io.StringIO()):
        return evaluate_measures(
            m,
            test,
            measures,
            {"judge": judge.score},
            range(SEEDS),
            keep,
            batch_size=6,
            num_inference_steps=STEPS,
            name=name,
        )


frames = [measure("base", model), *(measure(name, student) for name, (student, _) in runs.items())]
held_out = add_reward(pd.concat(frames, ignore_index=True), hybrid)  # one scale for the three models
of_crop = held_out.groupby(["model", "image"], sort=False)
changes = {f"reward, {w} of {SEEDS}": of_crop["reward"].agg(how) for w, how in
           (("best", "max"), ("mean", "mean"), ("worst", "min"))}  # fmt: skip
changes |= {name: of_crop[name].mean() for name in (*FULL, *NONE, "judge")}
of_base = held_out[held_out.model == "base"].pivot(index="image", columns="seed", values="reward")
check("the worst of all", changes[f"reward, worst of {SEEDS}"]["base"], -expected_best(-of_base, SEEDS), 1e-9)

# %%
print(f"{'6 held-out crops':18s}   base   " + "   ".join(f"{'change, ' + name:>18s}" for name in runs))
for quantity, values_of in changes.items():
    t = values_of.unstack("model")
    line = f"{quantity:18s} {t['base'].mean():6.2f}   "
    for name in runs:
        d = t[name] - t["base"]
        digits = max(0, -int(np.floor(np.log10(d.sem()))))  # as many as the error leaves
        line += f"{f'{d.mean():+.{digits}f} ± {d.sem():.{digits}f}':>18s}   "
    print(line.rstrip())

tiles, titles = [], []
for i in (1, 3):
    lr, gt = test[i]["lr"], test[i]["gt"]
    bicubic = F.interpolate(lr[None], scale_factor=4, mode="bicubic")[0].clamp(0, 1)
    tiles += [lr, bicubic, *(images[i] for images in first.values()), gt]
    titles += ["low resolution", "bicubic", *first, "truth"]
moved = {name: 255 * (images - first["base"]).abs().mean().item() for name, images in first.items()}
show(
    pictures(tiles, titles, columns=6, tile=1.92),
    "A cat's eye and a cup that were not trained on: low resolution, bicubic, the base model, after 8 steps with two "
    "β, and the truth. From the base model a pixel moved by "
    + ", ".join(f"{v:.1f} gray levels ({k})" for k, v in moved.items() if k != "base")
    + ".",
)

# %% [markdown]
# **What to see.** Read the table in this order. *PSNR and the judge first*: PSNR is a quarter of the reward and may be
# sold for the other three, the judge is not in it. Which β pays more PSNR, and what do the two metrics without truth
# give for it? Look for it in colors and contrast, too. Eight steps hardly tell the two β apart, and where the quality
# turns, as in section 5's figure, they cannot tell at all. Then best, mean and worst: do they move together, or come
# closer? The paper promises the second; what moves all three alike is a shift. And what says that
# *nothing* has happened? A change below two of its errors. Six crops of three photographs make these errors too small
# if anything. Eight steps, one seed: this demonstrates the machine and decides nothing.
#
# ## 7 · At equal cost: gradients or pairs?
#
# `rfsr compare mini` gives RFSR and DP2O the same photographs and the same seconds, candidates and scores counted in,
# over several training seeds. Its rows are read here from `results/compare_mini.csv`. Lines stand in the order of what
# they may prove: the judge and fidelity, then what was trained on, then the spread.

# %%
RECORDED = "results/compare_mini.csv"
WAYS = ["base", "RFSR", "DP2O", "DP2O then RFSR"]


def recorded(path):
    """Rows of the ways compared here, or None where there is no recording."""
    if not os.path.exists(path):
        return None
    frame = pd.read_csv(path).sort_values(["model", "training_seed", "image", "seed"])
    return frame[frame["model"].isin(WAYS)]


def show_recorded(frame):
    names = ["judge", "psnr", "low_ssim", "mini-iqa", "mini-preference"]
    table = ways_table(frame, names)
    shown = [*names, *(f"reward_{of}" for of in ("best", "mean", "worst")), "g_std_psnr", "g_std_judge"]
    for quantity in (*shown, "training_seconds", "iterations"):
        part = table[table["quantity"] == quantity].set_index("model")
        base, *ways = (part.loc[name] for name in WAYS if name in part.index)
        if quantity in shown:
            errors = [total_error(row.difference_error_images, row.difference_error_seeds) for row in ways]
            cells = [f"{row.name} {row.difference:+.3g} ± {e:.1g}" for row, e in zip(ways, errors, strict=True)]
        else:
            cells = [f"{row.name} {row['mean']:.0f}" for row in ways]
        print(f"{quantity:17s} base {base['mean']:8.3g}   " + "   ".join(cells))


recording = recorded(RECORDED)
if recording is None:
    print("no recording yet")
else:
    show_recorded(recording)

# %%
if recording is None:
    print("no recording yet")
else:
    curves = best_of_ways(recording, "reward")
    figure, axis = panels(width=6.6, height=2.9)
    for name, color in zip(WAYS, COLORS, strict=False):
        for of, style in (("best", "-"), ("mean", ":"), ("worst", "--")):
            line = curves[(curves["model"] == name) & (curves["of"] == of)]
            axis.semilogx(line["count"], line["value"], style, color=color, label=name if of == "best" else None)
    axis.set(xlabel="M; lines: best, mean and worst of M", ylabel="hybrid reward", ylim=(0, 1))
    axis.set_xticks(curves["count"].unique(), curves["count"].unique())
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8, ncols=4)
    last = curves[curves["count"] == curves["count"].max()].pivot(index="model", columns="of", values="value")
    said = "; ".join(f"{n} {r['best']:.2f}, {r['mean']:.2f}, {r['worst']:.2f}" for n, r in last.iterrows())
    show(figure, f"Best, mean and worst of M over M. Best, mean and worst of {curves['count'].max()}: {said}.")

# %% [markdown]
# **What to see.** Which way moves the judge, and does fidelity pay for it? A way that raises what it was trained on and
# nothing else has learned its metrics. Sampling and scoring take their share of DP2O's seconds: compare the last line.
# And do best and worst come closer, or do all three lines move together?
#
# ### What the paper reports
#
# From its Table 1, its numbers: its synthetic test set, before and after DP2O-SR. MANIQA and Q-Align were trained on;
# VQ-R1 and PSNR were not.
#
# | | MANIQA | Q-Align | VQ-R1 | PSNR |
# |---|---|---|---|---|
# | C-SD2 | .6684 → .7165 | 4.248 → 4.553 | 4.43 → 4.57 | 22.46 → 21.48 |
# | C-FLUX | .6857 → .7199 | 4.427 → 4.706 | 4.53 → 4.65 | 21.26 → 21.27 |
#
# The held-out VQ-R1 rises in both; C-SD2 pays a decibel of PSNR for it, FLUX none. And of the two metrics with truth
# that the table has for C-SD2, LPIPS gets better (.4332 → .4268) and A-FINE-FR worse (−1.143 → −.896, lower is better),
# although both were trained on.
#
# ## 8 · Two bugs, and the checks that catch them
#
# First: winner and loser are noised with noise of their own. Every number looks plausible. Only the toy, where the
# margin is known, tells.
#
# Second: the trained model itself is passed as its reference (the bug of notebook 09; here it leaves another trace).
# Nothing fails. The loss stands still at $\log2$ times the mean weight, the drift is logged as 0, as if the model were
# perfectly held. But at a margin of 0 the force is never let go: it stays at half of its most, whatever β.

# %%
d = (toy_x[0] - toy_x[1])[:, 0]
exact = (2.0 * 0.8 * sigma[:, 0] ** 4 * d).square().mean()  # of squared margins, for β = 2 and m = 0.8


def margins_of(noise):
    """Margin of every pair: each as a batch of its own."""
    noise = noise.expand(2, *toy_noise.shape)
    noisy = alpha * toy_x + sigma * noise
    errors = [(sigma**2 * mean + alpha * noisy - toy_x) ** 2 for mean in (0.8, 0.0)]
    change = (errors[0] - errors[1])[..., 0]
    return -2.0 / 2 * (change[0] - change[1])


check("one noise for both", margins_of(toy_noise).square().mean(), exact, 1e-9)
caught(lambda: check("own noise for each: mean of squared margins", margins_of(own_noise).square().mean(), exact, 1e-9))

alias = DP2O(method.config, student.unfreeze(), student, "notebook")
some, numbers = batch(1, 4), range(4, 8)
loss, log = alias.loss("model", some, 1, numbers)
force = torch.autograd.grad(loss, list(student.trained_parameters().values()))
share = loss / some["weight"].mean()
print(f"loss over mean weight {share:.3f}, drift {log['drift']:.1f}, accuracy {log['accuracy']:.1f}")
assert max(p.abs().max() for p in force) > 0, "and yet there is a gradient"
true = DP2O(method.config, student, model, "notebook").loss("model", some, 1, numbers)[1]
caught(lambda: check("share of the true drift that is logged", log["drift"] / true["drift"], 1.0, 1e-3))

# %% [markdown]
# ## 9 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up).** A recipe for FLUX's latents, 16×64×64 numbers, says β = 0.02 and *sums* squared errors.
# Which β of `half-mean` is that?
# <details><summary>Hint</summary>Two factors stand between the margin of "sum" and that of "half-mean" (section 4).</details>


# %%
def beta_of_half_mean():
    raise NotImplementedError


def verify_beta():
    g = torch.Generator().manual_seed(3)
    a, b, c = 0.1 * torch.randn(3, 2, 1, 16, 64, 64, generator=g).double()
    theirs = diffusion_dpo_loss(a, b, c, 0.02, "sum")[1]["margin"]
    check("margin", diffusion_dpo_loss(a, b, c, beta_of_half_mean())[1]["margin"], theirs, 1e-9)


exercise(1, verify_beta)


# %% [markdown]
# **Exercise 2.** In the toy, return the β with which training ends where the quality is best.
# <details><summary>Hint</summary>Section 5 says where training ends for a β, and where the quality is best.</details>


# %%
def best_beta():
    raise NotImplementedError


def verify_best_beta():
    check("where training ends", train_toy(best_beta()).m.iloc[-1], 1.0, 0.05)


exercise(2, verify_best_beta)


# %% [markdown]
# **Exercise 3 (harder).** Later work adds a term that holds on to the winners: the plain denoising loss, $\lambda$
# times the mean over pairs of the winner's $e$. Write the gradient of that *sum* of losses in the outputs, for
# `output`, `reference`, `target` of section 4.
# <details><summary>Hint</summary>Add to what `gradient_by_hand` gives, for the winners
# only, the derivative of a mean of squares.</details>


# %%
def anchored_gradient(output, reference, target, beta, weight, anchor):
    raise NotImplementedError


def verify_anchored():
    weight, x = torch.tensor([0.8, 1.0, 1.3]).double(), output.clone().requires_grad_()
    total = diffusion_dpo_loss(x, reference, target, 6.0, weight=weight)[0] + 0.3 * F.mse_loss(x[0], target[0])
    ours = anchored_gradient(output, reference, target, 6.0, weight, 0.3)
    check("gradient", ours, torch.autograd.grad(total, x)[0], 1e-12)


exercise(3, verify_anchored)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Swap winner and loser in a share of the pairs, in the toy. From which share on does training no longer help, and
#   does the printed accuracy warn of it? An answer is quality and accuracy over the share of swapped pairs.
# * Find a rule that sees `winner`, `accuracy` and `drift` alone and stops the toy near its best quality. An answer is
#   the quality it loses against the best stop, for β over two powers of ten.
#
# ## Summary
#
# * DP2O-SR learns from the order of a model's own results; no reward needs a gradient, and any metric can vote.
# * The hybrid reward is comparable within a photograph alone, and its scale forgets by how much results differ.
# * More results per photograph give larger gaps with diminishing returns; more pairs of them give smaller ones.
# * The loss compares errors with the reference's. Its β is half a number without its convention.
# * Sharing timestep and noise takes what is no property of the pair out of the margin.
# * Pairs say "further" and never "far enough": only β and the number of steps stop the model.
# * Accuracy stays high while a model runs away. Read `winner` and `drift`, and measure what was not trained on.
#
# NAVIGATION
