# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 09 · Hold the model
#
# **You will watch a reward being cheated, hold the model back in five ways, and compare what each gives up for it.**
#
# Three quarters of a minute on two cores; nothing to download. Needs the *style loss* (08), which is explained again
# in a sentence.
#
# NAVIGATION
#
# A reward is a network's opinion of a picture. Ask an optimizer for a higher opinion and it will find pictures that
# the network likes and nobody else. Something must hold the model near what it was. RFSR takes the *style loss* of
# notebook [08](08_hold_the_style.ipynb), the squared distance of the Gram matrices of two pictures' VGG19 features,
# which the paper calls Gram-KL. Others take a Kullback–Leibler divergence (KL), train few numbers (LoRA), or stop
# early. Afterwards you can
#
# * recognize reward hacking, and say why a rising score does not exclude it,
# * explain why the reference is the frozen model and not the truth, and what KL and LoRA do instead,
# * compare ways to hold a model as *fronts*, what is kept over what is gained, and not as single points,
# * say what whole training runs show of each way, and where the paper's table decides nothing.
#
# Two networks here are **stand-ins**: the reward is MiniIQA, a small network in CLIP-IQA's place, and VGG19 has
# *seeded random weights*. No number below says anything about the real ones.

# %%
import diffusers
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils import parametrize

from rfsr_ext.data import Degradation, load_photograph
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.metrics import Judge, ssim
from rfsr_ext.models import load_model
from rfsr_ext.notebook import COLORS, caught, check, exercise, explore, panels, pictures, show, spoken
from rfsr_ext.rewards import MiniIQA
from rfsr_ext.sampling import TimestepWindows, generators, rollout, sample
from rfsr_ext.training import RFSRObjective

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()

style = VGGGramLoss(weights="random")
model, reward, judge = load_model("mini"), MiniIQA.from_pretrained(), Judge.from_pretrained()
print(f"reward: {reward.label}")
print(f"style loss: {style.label}")

# %% [markdown]
# ## 1 · What is reward hacking?
#
# We let the mini model upscale a cup of coffee that it has never seen, and then change the picture itself, pixel by
# pixel, so that the reward rises. (RFSR changes the weights of the model and not the pixels, and so do we in section 4.
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


# %%
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

# %%
enlarged = F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)
trio = {"bicubic": enlarged, "pre-trained model": before, "reward climbed": hacked, "truth": gt}
with torch.no_grad():
    scores = {n: reward.score(x).item() for n, x in trio.items()}
likeness = {n: ssim(x, gt).item() for n, x in trio.items()}
judged = {n: judge.score(x).item() for n, x in trio.items()}
titles = [f"{n}\nreward {scores[n]:.2f} · SSIM {likeness[n]:.2f}\njudge {judged[n]:.0f}" for n in trio]
show(
    pictures([lr[0], *(x[0] for x in trio.values())], ["low resolution\n\n", *titles], tile=1.92),
    "A cup of coffee, 64 pixels wide: " + spoken(titles),
)
assert scores["reward climbed"] > scores["truth"] and likeness["reward climbed"] < likeness["pre-trained model"]
fell = judged["reward climbed"] < judged["pre-trained model"]
print(
    "the judge notices: its score fell" if fell else "the judge is fooled along with the reward: its score did not fall"
)

# %% [markdown]
# **What to see.** The reward now prefers our picture to the *true photograph*. Look at it, and at the truth beside it.
# SSIM (likeness to the truth, 1 for equal pictures) was never optimized; it fell. The *judge* is a held-out network
# built differently from the reward (about 0 for a ruined picture and 100 for an untouched one, but nothing keeps it in
# that range); the line above says whether it noticed. A score that rises while the picture spoils is *reward hacking*.
# The paper finds that in super-resolution it often shows "as strong stylization". So: watch the style.
#
# ## 2 · Why is the reference the frozen model?
#
# The style loss needs a reference picture, and the truth is at hand during training. Why not pull towards the truth's
# style? The paper gives two reasons: pre-trained models do not hack, and one wants to surpass the truth. A third shows
# in numbers. At the start of training our model *is* the pre-trained one:

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
# *condition* (low resolution and prompt), and its output implies a finished picture (notebook 02). In the package,
# `RFSRObjective` calls the frozen model on the *same* noisy state under the same condition, and compares the two
# pictures (or, for KL, section 3, the two outputs). We disturb the weights of a copy, the *student*, as training
# would, and compute the term by hand. A sampler of 10 steps keeps it short; step 9 is in the reward window, the late
# steps at which rewards and style loss act.

# %%
g = torch.Generator().manual_seed(0)
student = model.reference()  # a copy of U-Net and ControlNet
with torch.no_grad():
    for weight in student.unet.parameters():
        weight += 0.05 * weight.std(correction=0) * torch.randn(weight.shape, generator=g)
windows = TimestepWindows.from_steps(4, 8, last=10)
options = dict(lambda_style=20.0, reference=model, num_inference_steps=10)

# %%
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
# ## 3 · Four ways to hold a model back
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


# %%
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
# ## 4 · The four ways under stress
#
# Now a small version of the paper's Table 4, with *direct* optimization: two pictures, one noisy state each (step 9 of
# 10), six steps of Adam on the weights for MiniIQA alone. That is not RFSR's training, it is a stress test of the four
# ways, and it shows the mechanism in seconds. (LoRA here is rank 4 on attention and convolutions with a thirty times
# larger step: other conditions than the other three have.)
#
# How hard should each hold? With one weight per way one compares the weights and not the ways. So KL and Gram are run
# with three each, and the unheld run is recorded on the way: *stopping it early* is a fifth way to hold a model back.

# %%
flower = miniature("flower", 21, 48)
gt2, lr2 = (torch.cat(both) for both in zip((gt, lr), flower, strict=True))  # the cup and a flower
condition = model.condition(lr2, [*prompt, "flower, petals, plant"])
state = rollout(model, condition, 9, generators(0, [0, 1]), num_inference_steps=10)


def estimate(m):
    """The network's output at the noisy state and the picture it implies."""
    output = m.predict(state.latents, state.timestep, condition)
    return output, m.decode(state.process.pred_original_sample(output, state.timestep, state.latents)).clamp(0, 1)


# %%
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


# %%
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

# %%
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


# %%
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
# **What to see.** First the pictures: what does the unheld run do to contrast, edges and colors? Which of the held
# ones still look like the start? A small style distance is what Gram minimizes, so that it has the smallest proves
# nothing: a model that is held hard enough does not move.
#
# Then the curves. A way to hold a model is not a point but a *front*: at the same reward, which keeps more likeness
# and a better judge? Compare the ways at one reward, as the last line does (nan: it never got there). The unheld curve
# stands for stopping early; a way is worth its effort where it lies above that one. Where it does not, this test shows
# no advantage of it, whatever the pictures suggest. Two pictures, one noise level, six steps and a random VGG19 decide
# nothing about the real one.
#
# Slide through the ways and compare the rims of the flower. Pictures as small as these show rims and contrast. For the
# look of an oil painting, of which the paper writes, they are too small.


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
# ## 5 · What do whole training runs say?
#
# The test of section 4 shows mechanisms. `rfsr compare benchmarks/fronts.yaml` trained the mini model by its preset,
# 80 iterations with the structure loss in the early steps, three seeds each: held by Gram, KL and LoRA, each at
# several strengths; not held, with the rewards' weights divided by 1, 4 and 16; and not held, but stopped after 20 and
# 40 iterations. Changes against the base model over 24 held-out crops, ± the standard error over crops:

# %%
fronts = pd.read_csv("results/fronts_mini.csv")
fronts["way"] = fronts["way"].replace("rewards / 1", "rewards / 1, 80 iterations")
MEASURES = ["mini-iqa", "mini-preference", "psnr", "ssim", "judge"]
by_crop = fronts.groupby(["way", "image"])[MEASURES].mean().groupby("way")  # seeds averaged
change, error = by_crop.mean(), by_crop.sem()
FRONTS = {
    "weaker rewards": ("rewards",),
    "stopped early": ("stopped", "rewards / 1,"),
    "LoRA": ("LoRA",),
    "KL": ("KL",),
    "Gram": ("Gram",),
}
fronts = fronts[fronts["way"].str.startswith(sum(FRONTS.values(), ()))]


def ends(label, table):
    """The rows of one front, from the smallest reward to the largest."""
    return table[table.index.str.startswith(FRONTS[label])].sort_values("mini-iqa")


# %%
print(f"{'':30s}" + "".join(f"{name:>20s}" for name in MEASURES))
for label in FRONTS:
    for name, row in ends(label, change).iterrows():
        cells = (f"{value:+.3f} ± {error.loc[name, measure]:.3f}" for measure, value in row.items())
        print(f"{name:30s}" + "".join(f"{cell:>20s}" for cell in cells))

# %%
figure, axes = panels(2, 2, width=8.4, height=6.4)
for (label, marker), color in zip(zip(FRONTS, "xDs^o", strict=True), COLORS, strict=False):
    mine = ends(label, change)
    for axis, column in zip(axes.T.flat, ("ssim", "ssim", "judge", "judge"), strict=True):
        spread = error.loc[mine.index]
        axis.errorbar(mine["mini-iqa"], mine[column], spread[column], spread["mini-iqa"], color=color, marker=marker,
                      markersize=5, linewidth=1, label=label)  # fmt: skip

# %%
for row, reach in zip(axes, (0.22, 0.08), strict=True):
    for axis, (name, column) in zip(row, (("SSIM with the truth", "ssim"), ("judge", "judge")), strict=True):
        inside = change.loc[fronts["way"].unique()].query("`mini-iqa` < @reach")
        low, high = (inside[column] - error[column]).min(), (inside[column] + error[column]).max()
        margin = 0.1 * (high - low)
        axis.axhline(0, color="0.4", linestyle=":")
        axis.set(xlim=(-0.05 * reach, reach), ylim=(low - margin, high + margin), ylabel=f"{name}, change")
        axis.set_xlabel("reward (MiniIQA), change")
axes[0, 0].set_title("ends with up to 0.22 of reward", size=10)
axes[1, 0].set_title("the first 0.08 of it", size=10)
axes[0, 0].legend(frameon=False, fontsize=8)
show(
    figure,
    "Changes of likeness and judge over that of the reward, whole trainings: "
    + "; ".join(f"{n} reward {r['mini-iqa']:+.3f}, SSIM {r['ssim']:+.3f}, judge {r['judge']:+.1f}"
                for label in FRONTS for n, r in ends(label, change).iterrows())
    + ".",
)  # fmt: skip

# %%
seeds = [part.groupby("way")[MEASURES].mean() for _, part in fronts.groupby("training_seed")]


def at_equal_reward(label, column, reward, table):
    """Between the nearest ends of a front; nan beyond them."""
    mine = ends(label, table)
    return np.interp(reward, mine["mini-iqa"], mine[column], left=np.nan, right=np.nan)


for reward in (0.02, 0.04, 0.06):
    for column in ("ssim", "judge"):
        at = {label: [at_equal_reward(label, column, reward, table) for table in seeds] for label in FRONTS}
        told = (f"{label} {' '.join(f'{v:+.3f}' if column == 'ssim' else f'{v:+.1f}' for v in values)}"
                for label, values in at.items() if not np.isnan(values).all())  # fmt: skip
        print(f"{column:5s} at {reward:.2f}, three seeds:", "; ".join(told))

# %% [markdown]
# **What to see.** First the upper panels. A training that nothing holds gains much reward and pays for it, in likeness
# and with the judge. Gram's ends keep more likeness, by SSIM, than the base has, at every reward that they reach; the run that
# was stopped after 20 iterations, with as much reward as the weakest Gram, has lost some, though by less than two
# errors. That speaks for the style loss.
#
# The judge speaks against it. At equal reward Gram's front lies *below* those of the weaker rewards and of the stopped
# run, in every seed in which both reach that reward (the lines above; nan: not reached). And a quarter of the rewards'
# weights keeps about as much likeness as Gram does for that reward. (Between the second and the third end of the
# weaker rewards lies no run, so the line there is a guess.) On this model, asking for less is at least as good a leash
# as the paper's.
#
# KL gains next to nothing at the two larger weights. Near +0.013 *KL 30*, *Gram 30000* and *rewards / 16* can be
# compared: look whether their differences are larger than their errors. LoRA depends on its learning rate and rank
# before anything else: one of its four ends lies in the figure, three are off it. Read their rows in the table: few
# numbers to train are no leash by themselves.
#
# Rewards, VGG19 and judge are stand-ins, and three seeds are few (notebook 12). What holds a real model, these runs do
# not say.
#
# ## 6 · What does the paper report?
#
# Table 4 of the paper, its numbers: SeeSR, one of the paper's models, on DIV2K-val. LPIPS is a distance to the truth,
# so less is better; the others are networks that judge a picture alone. Before the training LPIPS is 0.3329 and
# CLIPIQA 0.6989 (Table 1).
#
# | held by | LPIPS ↓ | MANIQA ↑ | MUSIQ ↑ | CLIPIQA ↑ | aesthetic ↑ |
# |---|---|---|---|---|---|
# | none | 0.4062 | 0.6615 | 70.86 | 0.8964 | 5.3612 |
# | LoRA | 0.3449 | 0.6171 | 71.20 | 0.7834 | 5.2669 |
# | KL | 0.3377 | 0.5908 | 69.89 | 0.8000 | 5.2719 |
# | Gram (the paper's Gram-KL) | 0.3369 | 0.5954 | 69.97 | 0.7944 | 5.2683 |
#
# Unheld, every *score* is higher than with Gram and LPIPS is far worse: the signature of hacking. Between KL and Gram
# the table hardly decides; the paper argues with pictures (its Figure 7). CLIPIQA is the very reward that was trained
# on, so its column cannot judge.
#
# ## 7 · What does each way cost?
#
# | way | in memory | in every iteration |
# |---|---|---|
# | Gram | a frozen copy and VGG19 | a step of the copy, its picture decoded, VGG19 for both pictures (notebook 08) |
# | KL | a frozen copy | a step of the copy; nothing is decoded |
# | LoRA | A and B; no copy, for without them the model is the frozen one | two thin products in each layer |
# | stopping early | nothing | nothing, but somebody must say when |
#
# The last line hides its price. To stop by the judge is to choose by it, and a judge that chooses is not held out any
# more.
#
# ## 8 · A bug, and the check that catches it
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
# ## 9 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up).** How many numbers does LoRA of rank $r$ train in place of a matrix with $m$ rows and $n$
# columns? And from which rank on does that save nothing? Return both; the second may be a fraction.
#
# <details><summary>Hint</summary>$B$ has $m$ rows and $r$ columns; $A$ has $r$ rows and $n$ columns.</details>


# %%
def numbers(m, n, r):
    raise NotImplementedError


def verify_numbers():
    for m, n, r in ((128, 128, 4), (320, 1280, 8), (64, 576, 3)):
        trained, limit = numbers(m, n, r)
        check("numbers", trained, sum(p.numel() for p in LowRank(torch.zeros(m, n), r).parameters()), 0)
        check("at that rank nothing is saved", numbers(m, n, limit)[0], m * n, 1e-6)


exercise(1, verify_numbers)

# %% [markdown]
# **Exercise 2.** Two Gaussians of *different* widths: write the KL divergence of $\mathcal N(a,s^2)$ from $\mathcal
# N(b,t^2)$, summed over all entries. For $s=t$ it must become the formula of section 3.
#
# <details><summary>Hint</summary>It is the mean under the first of the difference of the two log densities. The mean of
# $(x-b)^2$ under the first is $s^2+(a-b)^2$.</details>


# %%
def kl_of_widths(a, s, b, t):
    raise NotImplementedError


def verify_kl():
    for s, t in ((0.3, 0.3), (0.2, 0.5), (2.0, 0.7)):
        wanted = torch.distributions.kl_divergence(normal(a.double(), s), normal(b.double(), t)).sum()
        check(f"widths {s} and {t}", kl_of_widths(a.double(), s, b.double(), t) / wanted, 1.0, 1e-6)


exercise(2, verify_kl)

# %% [markdown]
# **Exercise 3 (harder).** A point is *beaten* if another has at least as much of everything and more of something.
# Return which points of `[count, measures]` nobody beats: the front. (The verdict then asks it for the ends of section
# 4.)
#
# <details><summary>Hint</summary>Compare all pairs at once: `points[:, None] >= points` has shape
# `[count, count, measures]`.</details>


# %%
def front(points):
    raise NotImplementedError


def verify_front():
    draw = torch.Generator().manual_seed(0)
    for count in (1, 5, 30):
        points = torch.randint(0, 6, (count, 3), generator=draw)
        beaten = [any((q >= p).all() and (q > p).any() for q in points) for p in points]
        check(f"front of {count}", torch.as_tensor(front(points)).int(), 1 - torch.tensor(beaten).int(), 0)
    stays = front(torch.stack([path[-1] for path in paths.values()]))
    print("nobody beats in reward, SSIM and judge:", ", ".join(n for n, s in zip(paths, stays, strict=True) if s))


exercise(3, verify_front)

# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Compare the four ways of section 4 at *equal* reward: choose each weight so that the reward rises by the same
#   amount. An answer is a table of judge and low-band SSIM for three seeds, with errors.
# * Does a better reward need less holding? Replace the reward of section 4 by the mean of MiniIQA and its score of the
#   mirrored, the shifted and the slightly noised picture. An answer is the figure of section 4 with one curve more.
#
# ## Summary
#
# * Climbing a reward alone finds pictures that only the reward likes; in super-resolution that looks like a style.
# * The reference is a frozen *copy* of the model: a leash that is slack at the start.
# * KL holds the network's output, Gram the statistics of textures, LoRA the number of numbers; stopping early needs
#   somebody who says when.
# * A way to hold is a front, not a point. Compare at equal reward, by what was not optimized, and look at the pictures.
# * In whole trainings of the mini model Gram kept the likeness, by SSIM, at every strength. At equal reward weaker rewards
#   without a hold kept about as much, and lost less with the judge.
#
# NAVIGATION
