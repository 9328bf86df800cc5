# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 12 · Measure the doubt
#
# **You will find out what three training runs, 48 crops and 80 votes can say about one difference, and what they
# cannot.**
#
# A third of a minute on two cores; nothing to download. Needs the ideas *reward* (06) and *style loss* (08), and what
# an ablation is (11); each is explained again in one sentence.
#
# NAVIGATION
#
# RFSR fine-tunes a super-resolution model with a *structure loss*, which holds the coarse half of the picture to the
# truth, *rewards*, learned scores to be raised, and a *style loss*, which holds the style. An *ablation* leaves out
# one part and measures what is lost: notebook [11](11_ablate_and_doubt.ipynb) reads such tables. How far are their
# numbers to be trusted? Afterwards you can
#
# * compute a paired difference, its standard error and its bootstrap interval by hand, and say what each ignores,
# * tell an effect of the method from luck with one training run, with few photographs, or with many comparisons,
# * examine a judge, and say what "reward up, judge down" means,
# * turn the votes of a blind test into scores with intervals.

# %%
import itertools
import math

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from rfsr_ext.data import evaluation_crops, photographs
from rfsr_ext.data.distortions import DISTORTIONS, INPUT_FAULTS
from rfsr_ext.data.images import read_image, to_tensor
from rfsr_ext.evaluation import bradley_terry, compare
from rfsr_ext.metrics import Judge
from rfsr_ext.notebook import COLORS, blind, caught, check, exercise, explore, panels, show
from rfsr_ext.training.ablation import VARIANTS

judge = Judge.from_pretrained()

# %% [markdown]
# ## 1 · How good is the judge?
#
# A reward that is trained on cannot judge the training. The *judge* is a quality score that no training ever saw
# (about 0 for a ruined picture, 100 for an untouched one). Here is its own examination: held-out crops, each against a
# version with one fault, half as strong as the faults come. How often does it prefer the original?

# %%
sharp = [crop["gt"] for crop in evaluation_crops(photographs("test"), 64, 24)]
originals = judge.score(torch.stack(sharp))
right = {}
for kind, spoil in DISTORTIONS.items():
    rng = np.random.default_rng(0)
    spoiled = [spoil(x.movedim(0, -1).numpy(), 0.5, rng).clip(0, 1).astype(np.float32) for x in sharp]
    right[kind] = (originals > judge.score(torch.from_numpy(np.stack(spoiled)).movedim(-1, 1))).double().mean().item()
for name, kinds in (
    ("an input has", INPUT_FAULTS),
    ("rewards invite", [k for k in DISTORTIONS if k not in INPUT_FAULTS]),
):
    print(f"faults that {name:14s}:", ", ".join(f"{kind} {right[kind]:.0%}" for kind in kinds))

# %% [markdown]
# **What to see.** 50 % is a coin. A fault that the judge does not mind is one that it cannot report below: if it is
# one of the second line, hacking of that kind passes it. All that rests on the judge in this notebook is as good as
# these shares. And they are shares of 24 crops: 92 % are 22 of them.
#
# ## 2 · How large is the error of a difference?
#
# The package trained the mini model with every row of the paper's ablations, three times each, and measured it on
# held-out crops; the file lies beside this notebook ([11](11_ablate_and_doubt.ipynb) says how it was made). What
# changed against the model before the training?

# %%
NAMES = {"base": "base", "rfsr": "RFSR", "no-style": "no style loss", "structure-only": "structure only"}
NAMES |= {name: name.replace("-", " ") for name in VARIANTS if name not in NAMES}
STYLE = {name: {"color": COLORS[k % 6], "marker": "Dosv^<>PX*hpd"[k]} for k, name in enumerate(NAMES)}
MEASURES = ["psnr", "ssim", "low_ssim", "high_ssim", "mini-iqa", "mini-preference", "judge"]

frame = pd.read_csv("results/ablation_mini.csv")
RUN = [name for name in VARIANTS if name in set(frame["model"])]
CROPS, SEEDS = frame["image"].nunique(), frame["seed"].dropna().nunique()
counted = frame[frame["model"].isin(NAMES)].groupby(["model", "seed"]).size().unique().tolist()
assert counted == [CROPS] and SEEDS == 3, "every model over all crops, three times"
rows = {name: frame[frame["model"] == name].set_index(["image", "seed"]) for name in ["base", *RUN]}
difference = {name: rows[name][MEASURES] - rows["base"][MEASURES] for name in RUN}  # crops × seeds
print(f"mean difference to the base model, {CROPS} crops, {SEEDS} seeds")
shown = ("rfsr", "no-style", "structure-only")
print(pd.DataFrame({NAMES[name]: difference[name].mean() for name in shown}).T.round(3).to_string())

# %% [markdown]
# Each crop is enlarged by both models from the same low-resolution pixels *and the same noise*. So we subtract crop by
# crop, first averaging a crop's three seeds. The mean of these $n$ numbers is the effect, their spread over $\sqrt n$
# its standard error.


# %%
def paired(name, measure):
    """One difference per crop."""
    return difference[name][measure].groupby("image").mean().to_numpy()


def standard_error(values):
    return values.std(ddof=1) / math.sqrt(len(values))


d = paired("rfsr", "judge")
summary = compare(frame, "base", "rfsr")
check("difference by hand and package", d.mean(), summary["difference"]["judge"], 1e-9)
check("standard error by hand and package", standard_error(d), summary["standard_error"]["judge"], 1e-9)
apart = [rows[name]["judge"].groupby("image").mean() for name in ("base", "rfsr")]
unpaired = math.hypot(*(standard_error(x.to_numpy()) for x in apart))
print(f"judge, RFSR − base: {d.mean():+.2f}; standard error paired {standard_error(d):.2f}, not paired {unpaired:.2f}")
print(f"that is {abs(d.mean()) / standard_error(d):.1f} paired errors and {abs(d.mean()) / unpaired:.1f} unpaired ones")

# %% [markdown]
# **What to see.** Crops differ much more from each other than models do; not paired, a difference drowns in that.
# Pairing costs nothing but the same noise for both.
#
# The *bootstrap* needs no formula for the error. Draw $n$ of the $n$ crops again, with replacement, take the mean,
# repeat ten thousand times; the middle 95 % of these means is the interval.

# %%
generator = np.random.default_rng(0)
means = np.array([d[generator.integers(CROPS, size=CROPS)].mean() for _ in range(10_000)])
interval = np.quantile(means, [0.025, 0.975])
check("bootstrap interval by hand and package", interval, summary.loc["judge", ["low", "high"]].to_numpy(), 1e-9)
print(f"95 % of the means lie between {interval[0]:.2f} and {interval[1]:.2f}; ±2 errors would give "
      f"{d.mean() - 2 * standard_error(d):.2f} and {d.mean() + 2 * standard_error(d):.2f}")  # fmt: skip

# %% [markdown]
# Both agree, as they should for so many numbers. **Cost:** ten thousand sums, a moment. The trained networks cost an
# hour and a half. Statistics are cheap.
#
# ## 3 · What does a second training run say?
#
# The error above answers: *would other crops give the same, with these trained models?* It says nothing about training
# again. For that we have three seeds. Take them one at a time, for the reward of the "structure only" models.

# %%
print("MiniIQA, structure only − base")
seen = []
for seed, part in difference["structure-only"]["mini-iqa"].groupby("seed"):
    error = standard_error(part.to_numpy())
    print(f"  seed {seed}: {part.mean():+.4f} ± {error:.4f} over crops, that is {part.mean() / error:+.1f} errors")
    seen.append(part.mean())
by_runs = np.array(seen).std(ddof=1)
print(f"spread between runs {by_runs:.4f}, {by_runs / error:.1f} times the error over crops of one run")

# %% [markdown]
# **What to see.** Each line alone is what somebody with one training run would report. Do the three agree, in sign,
# and within the errors they state? Where runs spread by more than one run's error, that error is not the error of the
# *method*: each line is true of its own network only. This is why a table without a spread over seeds tells less than
# its four digits promise.
#
# Look at every measure: each group is one variant, each dot one training run with its error over crops.


# %%
def draw(measure):
    figure, axes = panels(width=max(6.4, 1.1 * len(RUN)), height=3.2)
    parts = []
    for place, name in enumerate(RUN):
        by_seed = difference[name][measure].groupby("seed")
        effect, error = by_seed.mean().to_numpy(), by_seed.sem().to_numpy()
        x = place + np.array([-0.15, 0, 0.15])
        axes.errorbar(x, effect, error, linestyle="none", capsize=3, **STYLE[name])
        parts.append(f"{NAMES[name]} {', '.join(f'{value:+.3f}' for value in effect)}")
    axes.axhline(0, color="0.4", linestyle=":")
    axes.set_xticks(range(len(RUN)), [NAMES[name].replace(" ", "\n") for name in RUN])
    axes.set_ylabel("change against base")
    axes.set_title(f"{measure}: three training runs each", size=10)
    return figure, f"Change of {measure} against the base model in three runs each: {'; '.join(parts)}."


choose = explore(draw, values=MEASURES, label="measure")
choose

# %%
choose.slider.value = "judge"
show(*draw("judge"))

# %% [markdown]
# **What to see.** Step through the measures with the arrow keys. Where three dots stand together, far from zero, there
# is an effect of the method. Where they lie on both sides of zero, there is luck. Where they stand far from zero *and*
# far from each other, the method does something, but nobody can say how much: a sign of hacking, which is an unstable
# process.
#
# ### What can three numbers prove?
#
# Little, and the little is easy to compute. If there were no effect at all, three signs would agree by chance in
# $2\cdot(\tfrac12)^3=25\,\%$ of cases. And "two standard errors" are not 95 % any more: with three values
# the error itself is a rough guess. For $n=3$ the ratio $T$ of mean to standard error has the distribution function in
# closed form, $P(|T|<t)=t/\sqrt{2+t^2}$.

# %%
draws = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)).double()
ratio = draws.mean(1) / (draws.std(1) / math.sqrt(3))
check("beyond 2 errors by pure chance", (ratio.abs() > 2).double().mean(), 1 - 2 / math.sqrt(2 + 2**2), 0.003)
check("three equal signs by pure chance", (draws > 0).sum(1).remainder(3).eq(0).double().mean(), 0.25, 0.003)
t95 = math.sqrt(2 * 0.95**2 / (1 - 0.95**2))  # solves t / √(2 + t²) = 0.95
print(f"{1 - 2 / math.sqrt(6):.0%} of nothing looks like 2 errors; for 95 % one needs {t95:.2f} errors")

for measure in ("psnr", "low_ssim", "mini-iqa", "mini-preference", "judge"):
    runs = difference["rfsr"][measure].groupby("seed").mean().to_numpy()
    half = t95 * standard_error(runs)
    print(
        f"RFSR {measure:15s} {runs.mean():+.3f}, over runs 95 % from {runs.mean() - half:+.3f} to {runs.mean() + half:+.3f}"
    )

by_photo = difference["rfsr"]["judge"].groupby(rows["rfsr"]["photograph"]).mean()
print("judge, RFSR − base:", ", ".join(f"{name} {value:+.1f}" for name, value in by_photo.items()))

# %% [markdown]
# **What to see.** With honest intervals over three runs, which of them exclude zero? Of a measure whose interval does
# not we know only that it changed little.
#
# The last line is about something else. Our crops are cut from few photographs, and crops of one photograph are
# cousins. Where the photographs disagree, the small error of section 2 speaks of *other crops of these photographs*
# and of nothing else. No bootstrap over crops can mend that; more photographs could.
#
# ## 4 · What if one asks many questions?
#
# All variants times seven measures are many differences. Call a difference over its standard error, over crops as in
# section 2, its *ratio*. Each ratio has a 5 % chance to pass 2 by luck, so of twenty about one would. How far must the
# *largest* lie from zero before we believe it? If a variant changed nothing, every crop's difference could as well
# have had the other sign. So flip signs at random, and look at the largest ratio.

# %%
D = np.concatenate([difference[name].groupby("image").mean().to_numpy() for name in RUN], axis=1)  # [crops, questions]
QUESTIONS = D.shape[1]
signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(5000, CROPS))
flipped = signs @ D / CROPS  # what the means could have been
largest = np.abs(flipped / np.sqrt(((D**2).mean(0) - flipped**2) / (CROPS - 1))).max(1)
threshold = np.quantile(largest, 0.95)
print(f"by luck alone, the largest of {QUESTIONS} ratios exceeds 2 in {(largest > 2).mean():.0%} of cases")
print(f"it exceeds {threshold:.1f} in 5 % of cases: our threshold")

everything = pd.concat({name: compare(frame, "base", name, resamples=1)["ratio"] for name in RUN})
check("the ratios", D.mean(0) / [standard_error(column) for column in D.T], everything, 1e-9)
for (name, measure), value in everything.items():
    if 2 < abs(value) < threshold:
        print(f"past 2 but not past the threshold: {NAMES[name]}, {measure}, {value:+.1f}")
print(
    f"{(everything.abs() > 2).sum()} of {QUESTIONS} pass 2, {(everything.abs() > threshold).sum()} pass the threshold"
)

# %% [markdown]
# **What to see.** Related measures err together, so that luck strikes less often than in as many independent
# questions, but the first line says how often it still does. What passes 2 but not the threshold is named: do not
# believe it yet. (Passing speaks of other crops only. What another training run would give, section 3 has to say.) The
# same caution is due to the paper: its four tables hold 15 rows of five columns, and the text rests on a few of them.
#
# ## 5 · Is it hacking?
#
# *Hacking* means: the score that is trained on rises, and what it should stand for falls. If the reward were a faithful
# measure of quality, an independent measure would rise with it. Crop by crop:

# %%
figure, axes = panels(1, 3, width=8.4, height=2.8, sharex=True, sharey=True)
share = {}
for axis, name in zip(axes, ("rfsr", "no-style", "structure-only"), strict=True):
    x, y = paired(name, "mini-iqa"), paired(name, "judge")
    share[name] = ((x > 0) & (y < 0)).mean()
    axis.plot(x, y, linestyle="none", markersize=4, **STYLE[name])
    axis.axhline(0, color="0.4", linestyle=":")
    axis.axvline(0, color="0.4", linestyle=":")
    axis.set_title(f"{NAMES[name]}: {share[name]:.0%} lower right", size=10)
    axis.set_xlabel("change of MiniIQA")
axes[0].set_ylabel("change of the judge")
show(
    figure,
    "Change of the judge over change of MiniIQA, one dot a crop. Share of crops with reward up and judge down: "
    + ", ".join(f"{NAMES[name]} {value:.0%}" for name, value in share.items())
    + ".",
)

# %% [markdown]
# **What to see.** Lower right is the corner of hacking. How many crops are in it without the style loss, how many with
# RFSR, and how deep? The style loss shortens the way; the picture says whether it turns it round. For "structure only"
# neither is trained on: its cloud shows how far both scatter without anybody climbing.

# %%
sentence = []
for measure in ("psnr", "mini-iqa", "mini-preference", "judge"):
    runs = difference["rfsr"][measure].groupby("seed").mean().tolist()
    way = "rises" if min(runs) > 0 else "falls" if max(runs) < 0 else "is undecided"
    sentence.append(f"{measure} {way} ({np.mean(runs):+.2f})")
print("RFSR against the base, in all three runs:", "; ".join(sentence))

# %% [markdown]
# That is the honest sentence about our RFSR run, on crops of few photographs. It would be wrong to report the rewards
# alone. It would also be wrong to say from the judge alone that the pictures got better, or worse: for that one would
# have to ask people.
#
# ## 6 · Ask people
#
# A *blind test* shows two pictures, which is left and which right by chance, and asks for the better one. This project
# made two such tests of 40 pairs each, with held-out crops of 128 pixels: the base model against bicubic enlargement,
# and a fine-tuned model against the base. The answers were written down before the key was opened. They lie beside this
# notebook, made by `python -m benchmarks.laboratory count`.
#
# Notebook 07 turned such answers into scores: $P(a\text{ beats }b)=\sigma(s_a-s_b)$. With two things, chosen $w$ and
# $l$ times, the best fit is the logarithm of the odds, and its standard error has a closed form:
#
# $$s_a-s_b=\log\frac wl,\qquad\text{error}=\sqrt{\frac1w+\frac1l}.$$

# %%
votes = pd.read_csv("results/blind_votes.csv")
strengths = bradley_terry(votes, zero="base")  # strength 0 for the base: only differences are fixed
for test, part in votes.groupby("test"):
    name, other = test.split("-against-")
    won = int((part["chosen"] == name).sum())
    lost = len(part) - won
    odds, error = math.log(won / lost), math.sqrt(1 / won + 1 / lost)
    print(f"{name} before {other}: {won} of {len(part)}, log odds {odds:+.2f}, error {error:.2f}")
    sign, found = (-1, strengths.loc[other]) if name == "base" else (1, strengths.loc[name])
    check("log odds by hand and package", odds, sign * found["strength"], 1e-9)
    check("error by hand and package", error, found["standard_error"], 1e-9)
left = (votes["chosen"] == votes["left"]).mean()
print(f"the left picture was chosen in {left:.0%} of {len(votes)} pairs")

# %%
figure, axes = panels(width=6.4, height=2.2)
for place, row in enumerate(strengths[::-1].itertuples()):
    reach = [[row.strength - row.low], [row.high - row.strength]]
    axes.errorbar(row.strength, place, xerr=reach, marker="o", capsize=4, color=COLORS[place])
axes.axvline(0, color="0.4", linestyle=":")
axes.set_yticks(range(3), [f"{name}\n{wins} of {count}" for name, wins, count in
                           strengths[::-1][["wins", "votes"]].itertuples()])  # fmt: skip
axes.set(xlabel="strength, base at 0; lines are 95 % intervals", ylim=(-0.6, 2.6))
told = [f"{name} {row['strength']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
        for name, row in strengths.drop("base").iterrows()]  # fmt: skip
show(figure, f"Strengths by {len(votes)} blind votes, the base at 0, with 95 % intervals: {'; '.join(told)}.")
odds, error = strengths.loc["fine-tuned", ["strength", "standard_error"]]
enough = 40 * (1.96 * error / odds) ** 2
print(f"if the share stayed as it is, {enough:.0f} pairs would be needed for an interval without 0")

# %% [markdown]
# **What to see.** An interval that excludes 0 says: better or worse than the base. Which of the two does? The last
# line says how many pairs the smaller difference needs (the error falls with the root of their number). And the test
# itself: was one *side* chosen more often than half? Sides are random, so that favors no model, but it drowns small
# differences.
#
# What the intervals do not know: each pair was looked at once, and votes of one pair of eyes are no independent
# evidence of what other people like.
#
# Now choose yourself. There are two scenes, a cat and a cup of coffee, each in four versions without their names: 12
# pairs. The low resolution stands in the middle. Tab moves to the buttons, Enter or Space presses. Every answer goes
# at once to `my_votes.csv`, so you can stop and go on later; to begin again, delete the file. Your own scores are then
# `bradley_terry(pd.read_csv("my_votes.csv"), prior=0.5, zero="base")`. Do they put the four in the order of the judge,
# or of PSNR? (Both stand in the titles of section 1 of notebook 11.) How wide is the narrowest interval?

# %%
scenes, strip = [], to_tensor(read_image("results/ablation_mini.png"))  # 2 × 4 pictures of 96 pixels
for row, (name, count) in enumerate([("chelsea", 5), ("coffee", 6)]):
    lr = evaluation_crops([name], 96, count)[-1]["lr"]
    base, rfsr, no_style, _ = strip[:, 96 * row : 96 * (row + 1)].split(96, dim=2)
    bicubic_picture = F.interpolate(lr[None], scale_factor=4, mode="bicubic")[0].clamp(0, 1)
    scenes.append((lr, {"bicubic": bicubic_picture, "base": base, "RFSR": rfsr, "no style loss": no_style}))
blind(scenes, "my_votes.csv", tile=1.92)

# %% [markdown]
# A picture that you always chose has no finite score: any higher one would fit better still. `prior=0.5` adds half a
# vote for each side of every two things, which keeps scores finite and draws them together a little.
#
# ## 7 · A bug, and the check that catches it
#
# Someone takes all rows, every crop with each of three seeds, for independent evidence. The mean stays right, code gets
# shorter, and every result looks surer than it is.


# %%
def wrong_error(name, measure):
    values = difference[name][measure].to_numpy()  # three of each crop
    return standard_error(values)


print(
    f"judge, RFSR − base: error {standard_error(paired('rfsr', 'judge')):.2f}, with the bug {wrong_error('rfsr', 'judge'):.2f}"
)
caught(lambda: check("standard error", wrong_error("rfsr", "judge"), summary["standard_error"]["judge"], 1e-6))

# %% [markdown]
# ## 8 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up, predict then run).** There is no effect. With what chance do *four* runs agree in sign?
# <details><summary>Hint</summary>All up, or all down.</details>


# %%
def four_signs():
    raise NotImplementedError


def verify_signs():
    chance = (torch.randn(200_000, 4, generator=torch.Generator().manual_seed(1)) > 0).sum(1).remainder(4).eq(0)
    check("four equal signs", four_signs(), chance.double().mean(), 0.003)


exercise(1, verify_signs)

# %% [markdown]
# **Exercise 2.** A blind test: of $n$ pairs the share $p$ goes to one of two models. From which $n$ on does the 95 %
# interval of its score exclude 0? Return it as a number that need not be whole.
# <details><summary>Hint</summary>Put $w=pn$ and $l=(1-p)n$ into the error of section 6 and set 1.96 errors equal to the
# log odds.</details>


# %%
def pairs_needed(p):
    raise NotImplementedError


def verify_pairs():
    for p in (0.525, 0.575, 0.6, 0.75, 0.85):
        n, odds = pairs_needed(p), math.log(p / (1 - p))
        check(f"at {p:.1%} the interval ends at 0", 1.96 * math.sqrt(1 / (p * n) + 1 / ((1 - p) * n)) / odds, 1.0, 1e-6)
    check("the last line of section 6", pairs_needed(23 / 40), enough, 1e-6 * enough)


exercise(2, verify_pairs)

# %% [markdown]
# **Exercise 3 (harder).** *Holm's* method handles many questions without flipping signs. Sort the $m$ p-values; compare
# the smallest with $0.05/m$, the next with $0.05/(m-1)$, and so on; stop at the first that fails. Return for each
# p-value whether it is accepted, in the order given.
# <details><summary>Hint</summary>`np.argsort`; after the first failure nothing more is accepted.</details>


# %%
def holm(p):
    raise NotImplementedError


def verify_holm():
    draw = np.random.default_rng(0)
    for p in [draw.uniform(0, top, 5) for top in (0.05, 0.03, 0.02) for _ in range(20)]:
        # the slow way: a question passes if every group that it is in passes, by its smallest p and the group's size
        groups = [g for size in range(1, 6) for g in itertools.combinations(range(5), size)]
        passed = {g for g in groups if min(p[k] for k in g) <= 0.05 / len(g)}
        wanted = [all(g in passed for g in groups if k in g) for k in range(5)]
        assert list(holm(p)) == wanted, f"p-values {p.round(4).tolist()}: {sum(wanted)} pass, yours {sum(holm(p))}"
    p = [math.erfc(abs(value) / math.sqrt(2)) for value in everything]  # of all ratios
    check(
        "nearly as many as pass the threshold by flipped signs", sum(holm(p)), (everything.abs() > threshold).sum(), 3
    )


exercise(3, verify_holm)

# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * How many training runs would the smallest effect of section 3 need? Take the spread over seeds from
#   `results/ablation_mini.csv`. An answer is a curve from size of effect to runs that find it in eight cases of ten,
#   checked by simulation.
# * Let five people choose with `blind`, each under a name of their own. An answer is the four scores with their
#   intervals, how far the five agree, and whether judge or reward would have predicted them.
#
# ## Summary
#
# * Pair the comparison: same pixels, same noise, subtract, then average. The error over crops is not the error over
#   training runs, and neither knows about photographs you do not have.
# * Three runs: equal signs come by chance in one case of four; 95 % needs 4.3 errors.
# * Of many questions some come out by luck. Set the threshold for the largest, or sort as Holm does.
# * Say what the judge does in the same sentence as the rewards, and how good the judge is.
# * Votes have errors, too: 40 pairs decide a large difference and leave a small one open.
#
# NAVIGATION
