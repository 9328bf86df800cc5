# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 04 · See when bands form
#
# **You will watch a sampler build a picture in 50 steps, and measure what is there when: the paper's Figure 1.**
#
# Three quarters of a minute on two cores; nothing to download. Needs the ideas *sampling step* (02) and *band* (03);
# both are repeated here in a few lines.
#
# NAVIGATION
#
# RFSR gives the early steps another loss than the late ones. Its reason is one figure. Afterwards you can
#
# * measure the low and the high band of a denoising model step by step, by hand and with the package,
# * say how sure such a curve is: spread over noise, error over photographs, and a comparison that pairs them,
# * read the paper's two descriptions of that figure against numbers, and turn its windows of steps into times and back.

# %%
import contextlib
import copy
import io

import pandas as pd
import torch
import torch.nn.functional as F

from rfsr_ext.data import evaluation_crops, photographs
from rfsr_ext.evaluation import measure_trajectory
from rfsr_ext.metrics import band_ssim
from rfsr_ext.models import load_model
from rfsr_ext.notebook import COLORS, caught, check, exercise, explore, panels, pictures, show, spoken
from rfsr_ext.sampling import TimestepWindows, generators, trajectory

model = load_model("mini")  # ×4, 50 steps
portrait = evaluation_crops(["chelsea"], size=96, count=5)[4]  # the face of a cat the model has never seen
gt, lr = portrait["gt"][None], portrait["lr"][None]  # [1, 3, 96, 96] and [1, 3, 24, 24] in [0, 1]
enlarged = F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)

# %% [markdown]
# ## 1 · What does the model think at each step?
#
# A sampler works on *latents*, 4 times smaller than the picture, which a decoder turns into pixels. It starts at noisy
# ones, $z_T$, and removes noise in 50 steps. While the step counts from 1 to 50, the *time* $t$ falls from 999 to 19. At
# every step the network also implies a *finished* picture, the estimate $\hat z_0$. That estimate is what we look at
# (not the noisy state $z_t$). The mini model answers with $\hat z_0$ itself; models that answer with noise or velocity
# imply it (notebook 02). One step keeps the estimate and the noise it implies, and mixes them anew for the next time;
# with the noise schedule $\alpha_t=\sqrt{\bar\alpha_t}$, $\sigma_t=\sqrt{1-\bar\alpha_t}$:
#
# $$z_{t'}=\alpha_{t'}\,\hat z_0+\sigma_{t'}\,\frac{z_t-\alpha_t\hat z_0}{\sigma_t}$$
#
# Here is the whole loop by hand, keeping every estimate.

# %%
scheduler = copy.deepcopy(model.scheduler)
scheduler.set_timesteps(50)
share = torch.cat(
    [scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)]
)  # after the last step no noise is left
process = model.process(50)  # the package's own copy of the noise schedule


@torch.no_grad()
def denoise(z, condition):
    """States and estimates of the 50 steps from the latents z."""
    states, estimates = [], []
    for k, t in enumerate(scheduler.timesteps):
        estimate = model.predict(z, t, condition)
        states.append(z), estimates.append(estimate)
        implied = (z - share[k].sqrt() * estimate) / (1 - share[k]).sqrt()
        z = share[k + 1].sqrt() * estimate + (1 - share[k + 1]).sqrt() * implied
    return states, estimates


condition = model.condition(lr, [portrait["prompt"]])
start = model.initial_latents(condition, process, generators(0, [0]))  # seed 0, image 0
states, estimates = denoise(start, condition)
images = [model.decode(estimate).clamp(0, 1) for estimate in estimates]  # images[0] is sampling step 1
theirs = scheduler.step(estimates[24], scheduler.timesteps[24], states[24])
check("step 25: by hand and diffusers", states[25], theirs.prev_sample, 1e-5)
*package, _ = trajectory(model, condition, generators(0, [0]))
check("step 50: state by hand and package", states[-1], package[-1][0].latents, 1e-3)
check("step 50: estimate by hand and package", estimates[-1], package[-1][1], 1e-3)

# %% [markdown]
# Now Figure 1 (a) of the paper for our cat, at six steps. The rows are the estimate, its LL band (the picture at half
# size), and the magnitude of its three fine bands LH, HL and HH. `bands` makes four numbers of every block of 2×2
# pixels: half its sum (LL) and half the difference of its rows (LH), of its columns (HL) and of its diagonals (HH).


# %%
def bands(x):
    """[..., H, W] to LL, and LH, HL, HH stacked in front, all of half the size; an odd end is mirrored."""
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2, torch.stack([a + b - c - d, a - b + c - d, a - b - c + d]) / 2


def three_views(x):
    """A picture, its LL band, and the magnitude of its fine bands, 5 times amplified."""
    LL, fine = bands(x)
    return x[0], LL[0] / 2, 5 * fine.square().sum(0).sqrt().mean(1)[0]


# %%
shown = [1, 10, 20, 35, 50]
at = {step: [value.item() for value in band_ssim(images[step - 1], gt)] for step in shown}
bicubic_ssim = [value.item() for value in band_ssim(enlarged, gt)]
titles = [f"step {s}\nlow {a:.3f} · high {b:.3f}" for s, (a, b) in at.items()]
titles = ["low resolution\n", "bicubic\nlow {:.3f} · high {:.3f}".format(*bicubic_ssim), *titles, "truth\n"]
tiles = [lr[0], enlarged[0], *(images[step - 1][0] for step in shown), gt[0]]
show(
    pictures(tiles, titles, columns=4, tile=1.92),
    "A cat's face: low resolution, bicubic enlargement, the estimate at five steps, the truth, with the SSIM of low and high band: "
    + spoken(titles),
)  # fmt: skip

# %%
columns = [three_views(x)[1:] for x in (enlarged, images[0], images[19], images[49], gt)]
tiles = [column[row] for row in (0, 1) for column in columns]
titles = ["bicubic", "step 1", "step 20", "step 50", "truth"]
show(
    pictures(tiles, [f"{n}: LL" for n in titles] + [f"{n}: fine × 5" for n in titles], columns=5, tile=1.92),
    "Above the low band, below the magnitude of the three fine bands, 5 times amplified, of the cat's face: "
    "bicubic enlargement, the estimates at steps 1, 20 and 50, and the truth.",
)

# %% [markdown]
# **What to see.** At step 1 there already is a cat: unlike a text-to-image model, a super-resolution model *is given*
# the structure. The fine bands tell the steps apart better than the pictures do. Do their lines get brighter and more
# numerous towards step 50? And are they the *right* lines? Compare the last two pictures of the lower row, and the eyes.
# The titles above give a measure of that; the next section builds it.
#
# Given by what? The network gets the small photograph twice: its start is the enlarged photograph under noise, and the
# ControlNet reads the enlarged photograph at every step. Take away one of the two: start from a gray picture under the
# same noise; or let the ControlNet read gray. (Neither was trained, so the pictures show what each way carries, not what
# a model without it would do.)

# %%
gray = torch.full_like(lr, 0.5)
blind = model.condition(gray, [portrait["prompt"]])
starts = {"both": (start, condition), "start from gray": (model.initial_latents(blind, process, generators(0, [0])), condition),
          "ControlNet sees gray": (start, blind)}  # fmt: skip
tiles, titles = [], []
for name, (z, seen) in starts.items():
    _, path = denoise(z, seen)
    for step in (1, 50):
        tiles.append(model.decode(path[step - 1]).clamp(0, 1))
        low, high = (value.item() for value in band_ssim(tiles[-1], gt))
        titles.append(f"{name}, step {step}\nlow {low:.2f} · high {high:.2f}")
show(
    pictures([x[0] for x in tiles], titles, columns=2, tile=1.92),
    "Estimates at steps 1 and 50 with a part of the input taken away, and the SSIM of low and high band: "
    + spoken(titles),
)  # fmt: skip

# %% [markdown]
# **What to see.** Where the cat is still there, the other way carries it. So "when does structure form?" has no answer in
# the noise alone: in super-resolution it is carried in from the first step to the last.
#
# ## 2 · How close is each band to the truth?
#
# The paper measures with SSIM: it compares means, spreads and correlation in small windows, and is 1 for equal pictures
# (notebook 03). It needs the range of the values. LL lies in [0, 2] and the fine bands in [−1, 1], so for both it is 2.
# By hand (as in notebook 03, now for each band; skip it if you were there):


# %%
def ssim_by_hand(x, y, span):
    """SSIM of [C, H, W] pictures whose values span ``span``, over 11×11 Gaussian windows."""
    g = torch.exp(-(torch.arange(-5, 6).double() ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]
    x, y = x.double()[:, None], y.double()[:, None]  # every channel is an image of its own
    mx, my = F.conv2d(x, window), F.conv2d(y, window)
    vx, vy = F.conv2d(x * x, window) - mx**2, F.conv2d(y * y, window) - my**2
    cov = F.conv2d(x * y, window) - mx * my
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


def band_ssim_by_hand(x, y):
    """[low, high] of two pictures [C, H, W]; high is the mean over the three fine bands."""
    (low_x, fine_x), (low_y, fine_y) = bands(x.double()), bands(y.double())
    high = [ssim_by_hand(a, b, span=2) for a, b in zip(fine_x, fine_y, strict=True)]
    return torch.stack([ssim_by_hand(low_x, low_y, span=2), sum(high) / 3])


# %%
by_hand = torch.stack([band_ssim_by_hand(x[0], gt[0]) for x in images])  # [50, 2]
package = torch.stack([torch.cat(band_ssim(x, gt)) for x in images])
check("low-band SSIM, 50 steps", by_hand[:, 0], package[:, 0], 1e-6)
check("high-band SSIM, 50 steps", by_hand[:, 1], package[:, 1], 1e-6)
odd = (..., slice(41), slice(53))
ours, theirs = band_ssim_by_hand(images[49][odd][0], gt[odd][0]), torch.cat(band_ssim(images[49][odd], gt[odd]))
check("both bands of 41×53 pixels", ours, theirs, 1e-6)

# %% [markdown]
# ## 3 · What does the whole curve look like?
#
# One cat and one noise prove little. `measure_trajectory` measures every step for several pictures and seeds: here six
# held-out crops of 40 pixels, two of each photograph, with two seeds. (It draws a progress bar; we keep that out of
# the stored page.)
#
# **What does it cost?** 50 network calls per picture, as in any sampling, and on top one decoding and one SSIM for each
# step. The estimates themselves are free: the sampler computes them anyway.

# %%
samples = evaluation_crops(photographs("test"), size=40, count=6)
truths, inputs = (torch.stack([sample[key] for sample in samples]) for key in ("gt", "lr"))
with contextlib.redirect_stderr(io.StringIO()):
    frame = measure_trajectory(model, samples, seeds=(0, 1))
print(frame.drop(columns="model").head(3).round(2).to_string(index=False))

# %% [markdown]
# Is that table what our own functions would have measured? We need the pictures again, so we sample seed 0 with the
# package's `trajectory`, which yields every state and its estimate.

# %%
with torch.no_grad():
    condition = model.condition(inputs, [sample["prompt"] for sample in samples])
    *steps, _ = trajectory(model, condition, generators(0, range(6)))
    six = [model.decode(estimate).clamp(0, 1) for _, estimate in steps]  # 50 × [6, 3, 40, 40]
for step in (1, 25, 50):
    mine = torch.stack([band_ssim_by_hand(x, y) for x, y in zip(six[step - 1], truths, strict=True)])
    rows = frame[(frame["seed"] == 0) & (frame["step"] == step)]
    check(f"step {step}, by hand and package", mine, rows[["low_ssim", "high_ssim"]].to_numpy(), 1e-6)

# %%
BANDS = {"low_ssim": "low band (LL)", "high_ssim": "high bands (LH, HL, HH)"}
bicubic = F.interpolate(inputs, scale_factor=4, mode="bicubic").clamp(0, 1)
floor = dict(zip(BANDS, (value.mean().item() for value in band_ssim(bicubic, truths)), strict=True))
curve = frame.groupby(["seed", "step"])[list(BANDS)].mean()  # mean over crops
mean = curve.groupby("step").mean()


def draw_curve(axis, column, color):
    spread = curve[column].unstack("seed")
    axis.fill_between(mean.index, spread.min(axis=1), spread.max(axis=1), color=color, alpha=0.3, linewidth=0)
    axis.plot(mean.index, mean[column], color=color)
    axis.axhline(floor[column], color="0.4", linestyle=":")
    axis.text(2, floor[column], "bicubic", va="bottom", size=8, color="0.3")
    axis.axvspan(0.5, 20.5, facecolor="none", edgecolor="0.85", hatch="//", linewidth=0, zorder=0)
    axis.axvspan(40.5, 50.5, color="0.88", linewidth=0, zorder=0)
    axis.set_title(BANDS[column], size=10)
    axis.set(xlabel="sampling step", xticks=[1, 10, 20, 30, 40, 50])
    axis.margins(x=0.02, y=0.15)


def say(column):
    at = mean[column]
    return f"{at[1]:.3f} at step 1, {at[20]:.3f} at 20, {at[40]:.3f} at 40, {at[50]:.3f} at 50"


# %%
figure, axes = panels(1, 2, width=7.6, height=3.0, sharey=True)
for axis, column, color in zip(axes, BANDS, COLORS, strict=False):
    draw_curve(axis, column, color)
axes[0].set_ylabel("SSIM with the truth")
show(
    figure,
    f"SSIM over sampling step, mean of 6 crops and 2 seeds. Low band {say('low_ssim')}; high bands {say('high_ssim')}. "
    f"Bicubic interpolation reaches {floor['low_ssim']:.3f} and {floor['high_ssim']:.3f}. "
    "Hatched: steps 1 to 20; gray: 41 to 50.",
)

# %% [markdown]
# **What to see.** Both panels have one range, so slopes may be compared. Three questions to answer from it. At which step
# is each band closest to the truth? Which of the two falls more afterwards, and in which of the hatched, white and gray
# windows? And does the finished picture end above bicubic interpolation (dotted: enlarged without a network) or below?
# The ribbon reaches from one seed to the other: where it is thin, the curve is no accident of the noise. (Hatched
# and gray are the steps 1 to 20 and 41 to 50, for section 6.)

# %%
for column, title in BANDS.items():
    best = int(mean[column].idxmax())
    verdict = "above" if mean[column][50] > floor[column] else "below"
    print(
        f"{title:25s} best at step {best}: {mean[column][best]:.3f}; {say(column)}: {verdict} bicubic, {floor[column]:.3f}"
    )

# %% [markdown]
# But six crops are few, and crops differ from each other far more than steps do. The fair question is *paired*: by how
# much does the SSIM of one and the same crop change between two steps? The *standard error* says how far a mean over
# six crops is usually off: their spread, divided by √6.

# %%
per_crop = frame.groupby(["image", "step"])[list(BANDS)].mean()  # an image's seeds first: they are no new evidence
alone = per_crop.groupby("step").sem()
paired = {}
for column, title in BANDS.items():
    table = per_crop[column].unstack("step")
    print(f"{title}: standard error of one step's mean {alone[column][1]:.3f}")
    for a, b in ((1, 10), (20, 50)):
        paired[column, a] = change = table[b] - table[a]
        errors = abs(change.mean()) / change.sem()
        says = "no chance" if errors > 4 else "undecided" if errors < 2 else "likely, not sure"
        print(f"    step {a:2d} to {b}: change {change.mean():+.4f}, standard error {change.sem():.4f}: {says}")

# %% [markdown]
# **What to see.** One step's mean is uncertain by as much as the crops differ from each other; one would have to shrug at
# most of the curve. A paired change is uncertain only by how differently the crops *move*, which is far less. Where six
# crops stay undecided, more crops may decide. A notebook has no time for them, so they were measured once and stored:
# 48 crops of 64 pixels, three seeds, the first and every fifth step (`python -m benchmarks.bands` does it again). Each
# line below is the *change since step 1*, with a ribbon of two standard errors to each side.

# %%
stored = pd.read_csv("results/bands_mini.csv")
many = stored.groupby(["photograph", "image", "step"])[list(BANDS)].mean()  # again an image's seeds first
figure, axes = panels(1, 2, width=7.6, height=3.0, sharey=True)
drawn = []
for axis, (column, title), color in zip(axes, BANDS.items(), COLORS, strict=False):
    for name, table, shade in (("6 crops", per_crop, 0.12), ("48 crops", many, 0.35)):
        table = table[column].unstack("step")
        moved = table.sub(table[1], axis=0)
        middle, error = moved.mean(), 2 * moved.sem()
        axis.fill_between(middle.index, middle - error, middle + error, color=color, alpha=shade, linewidth=0)
        axis.plot(middle.index, middle, color=color, linestyle="--" if name == "6 crops" else "-", label=name)
        drawn.append(f"{title}, {name}: {middle[50]:+.3f} ± {error[50]:.3f}")
    axis.axhline(0, color="0.4", linestyle=":")
    axis.legend(frameon=False, fontsize=9)
    axis.set_title(title, size=10)
    axis.set(xlabel="sampling step", xticks=[1, 10, 20, 30, 40, 50])
axes[0].set_ylabel("SSIM, change since step 1")
show(figure, "Change of SSIM since step 1, with two standard errors. At step 50: " + "; ".join(drawn) + ".")
for column, title in BANDS.items():
    table = many[column].unstack("step")
    for a, b in ((1, 10), (20, 50)):
        change = table[b] - table[a]
        each = change.groupby("photograph").mean()
        errors = abs(change.mean()) / change.sem()
        says = "no chance" if errors > 4 else "undecided" if errors < 2 else "likely, not sure"
        print(f"{title:25s} step {a:2d} to {b}, 48 crops: {change.mean():+.4f}, standard error {change.sem():.4f}: {says}; "
              f"falls in {(change < 0).sum()} crops, in {(each < 0).sum()} of {len(each)} photographs")  # fmt: skip

# %% [markdown]
# **What to see.** With eight times as many crops the ribbon is nearly three times as narrow ($\sqrt8$). Which of the six
# crops' "undecided" do the 48 decide, and do both agree on the direction? But crops of one photograph are not independent:
# what can be said about *photographs* rests on three of them, however many crops are cut. That is why the last column
# counts photographs. The model card's tables measure finished pictures on the same 48 crops.
#
# ## 4 · Right detail, or just more detail?
#
# SSIM measures agreement. Count instead *how much* detail there is: the root mean square of the fine bands, against
# that of the truth.


# %%
def amount(x):
    """Root mean square of the fine bands of each picture of a batch."""
    return bands(x.double())[1].square().mean((0, 2, 3, 4)).sqrt()


growth = torch.stack([amount(x) / amount(truths) for x in six])  # [50, 6]
figure, axes = panels(width=6.2, height=2.6)
axes.plot(range(1, 51), growth, color=COLORS[4], linestyle="-", linewidth=0.8)
axes.plot(range(1, 51), growth.mean(1), color=COLORS[0], linestyle="-", linewidth=2, label="mean of the six crops")
axes.axhline(1, color="0.4", linestyle=":")
axes.text(1, 1, "the truth", va="bottom", size=9, color="0.3")
axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.9))
axes.set(xlabel="sampling step", ylabel="amount of fine detail", xticks=[1, 10, 20, 30, 40, 50])
show(
    figure,
    "Amount of fine detail relative to the truth over the step, six crops thin and their mean thick: "
    + ", ".join(f"{growth[step - 1].mean():.2f} at step {step}" for step in (1, 20, 40, 50))
    + ".",
)
gained = int((growth[49] > growth[0]).sum())
print(
    f"more fine detail at step 50 than at step 1 in {gained} of 6 crops; most of it in steps",
    max(
        ((a, b) for a, b in ((1, 20), (20, 40), (40, 50))),
        key=lambda w: growth[w[1] - 1].mean() - growth[w[0] - 1].mean(),
    ),
)

# %% [markdown]
# **What to see.** Put this figure beside the last one. Where the amount of detail grows while its agreement with the truth
# falls, the model *invents*: most of the fine bands is not in the input, so that is what a generative model is for, and
# measures of fidelity must then fall. But invention explains the *fine* bands alone. The low band is in the input for
# the most part: what it loses is not a price of detail, it is lost structure. Keep its fall in mind for section 6.
#
# ## 5 · Do the paper's two descriptions fit?
#
# The paper describes its Figure 1 (b) twice.
#
# * **Caption:** at smaller steps both bands "are close to the ground truth"; with more steps they "gradually diverge
#   from the GT".
# * **Introduction:** the SSIM values of the low band "consistently improve during the initial phases"; later "high
#   frequency information gradually accumulates"; "after 40 steps, the SSIM score begins to decrease".
#
# Read literally, they do not describe one curve. Which one does *our* model follow? We turn them into four statements
# that can be false.

# %%
low_change = mean["low_ssim"].diff()
claims = {
    "caption: both bands end farther from the truth than they began": bool((mean.loc[50] < mean.loc[1]).all()),
    "introduction: the low band improves at every step from 1 to 10": bool((low_change.loc[2:10] > 0).all()),
    "introduction: fine detail accumulates in every crop": bool((growth[49] > growth[19]).all()),
    "introduction: high-band SSIM begins to fall only after step 40": bool(mean["high_ssim"].idxmax() >= 40),
}
for claim, holds in claims.items():
    print(f"{'seen' if holds else 'NOT seen':9s} {claim}")

# %% [markdown]
# **What to see.** The caption's statement and one of the introduction's can both be *seen*: a band may improve at first and
# end farther away all the same. But these are the six crops. The 48 of section 3 leave steps 1 to 10 undecided, so do not
# build on the second line. *Accumulates* may be read as amount, not as SSIM; even so it is not seen in every crop. This is
# a small model on crops of three photographs: it cannot tell what SeeSR, the paper's model, does on the photographs of
# DIV2K.
#
# Move through the steps yourself: click the slider's handle and use the arrow keys.


# %%
def draw(step):
    picture, _, fine = three_views(images[step - 1])
    figure, axes = panels(1, 4, width=9.6, height=2.4, width_ratios=[1, 1, 1.35, 1.35])
    for axis, view, title in ((axes[0], picture.movedim(0, -1), f"step {step}"), (axes[1], fine, "its fine bands")):
        axis.imshow(view.clamp(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, size=10)
        axis.set_axis_off()
    for axis, column, color in zip(axes[2:], BANDS, COLORS, strict=False):
        draw_curve(axis, column, color)
        axis.axvline(step, color="black", linewidth=1)
        axis.plot(step, mean[column][step], "o", color="black")
    a, b = mean.loc[step]
    return figure, (
        f"Step {step}, t = {int(scheduler.timesteps[step - 1])}: the cat and its fine bands; black line on the curves of "
        f"the six crops: low-band SSIM {a:.3f}, high-band SSIM {b:.3f}."
    )


walk = explore(draw, values=range(1, 51), label="sampling step")
walk

# %%
walk.slider.value = 45
show(*draw(45))

# %% [markdown]
# ## 6 · From the curve to the windows
#
# RFSR turns the figure into two windows of steps: *hold the structure* where it is settled (1 to 20) and *reward* where
# detail is invented (41 to 50). Steps 21 to 40 get no loss. The paper also states the windows as times, $t\in[600,1000]$
# and $t\in[0,200]$. Are these the same? The mini model's scheduler links sampling step $st$ and time by $t=1019-20\,st$.
# (This is the table of notebook 02, section 6. If you know it, go on to "Does our figure support the choice?")

# %%
times = scheduler.timesteps
check("t = 1019 − 20 st", times, 1019 - 20 * torch.arange(1, 51), 0)
by_step, by_time = TimestepWindows.from_steps(20, 40, last=50), TimestepWindows.from_timesteps(times)
print("step   t   structure reward")
for st in (1, 19, 20, 21, 39, 40, 41, 42, 50):
    hand = [1 <= st <= 20, 41 <= st <= 50]
    by_t = [600 <= times[st - 1] <= 1000, 0 <= times[st - 1] <= 200]
    assert hand == by_t == [by_step.in_structure(st), by_step.in_reward(st)], st
    print(f"{st:4d} {int(times[st - 1]):4d}   {'yes' if hand[0] else '–':9s} {'yes' if hand[1] else '–'}")
assert by_step == by_time and by_step.steps() == [*range(1, 21), *range(41, 51)]

# %% [markdown]
# **What to see.** Both ways to say it mean the same steps. The edges matter: 20 is in, 21 is out, 40 is out, 41 is in. In
# training, RFSR first samples without gradient from step 1 up to the step it trains (the *rollout*). So a step costs as
# many network calls as its number: on average 10.5 in the structure window and 45.5 in the reward window. Late
# supervision is the expensive one.
#
# Does our figure support the choice? If structure is to be *held*, the loss should act where the low band is lost. How
# much of its fall, and of the high bands', lies in which window?

# %%
windows = {"1–20, structure": (1, 20), "21–40, no loss": (20, 40), "41–50, rewards": (40, 50)}
for crops, table in (("6 crops", per_crop), ("48 crops", many)):
    falls = {}
    print(f"{crops:17s}{'low band':>19s}{'high bands':>19s}   (± standard error)")
    for name, (a, b) in windows.items():
        changes = [table[column].unstack("step")[b] - table[column].unstack("step")[a] for column in BANDS]
        falls[name] = [change.mean() for change in changes]
        print(f"{name:17s}" + "".join(f"{change.mean():+10.4f} ± {change.sem():.4f}" for change in changes))
for k, band in enumerate(("low band", "high bands")):  # of the 48: between the six crops' windows is too little
    worst, whole = min(falls, key=lambda name: falls[name][k]), sum(fall[k] for fall in falls.values())
    print(f"{band}: falls most in steps {worst}; over all steps {whole:+.4f}")

# %% [markdown]
# **What to see.** Where the low band loses most is where a structure loss has most to hold. If that is not the first
# window, the figure argues *against* the choice, at least for this model: structure would be lost late, where RFSR has no
# loss on it, and what training does in steps 1 to 20 could help there only because all steps share their weights. The
# verdict is of the 48 crops; look at their errors, and at how little six would have told. The paper does not test a
# structure loss in the late window alone; its Table 2 has one on all steps, and on 1 to 40.
#
# What does training say? `rfsr compare benchmarks/fronts.yaml` trained the mini model with the structure loss in the first
# window, as the paper does, and with one that goes on to the last step, where the rewards act, too; three seeds each.
# Changes against the base model over 24 held-out crops, ± the standard error over crops:

# %%
fronts = pd.read_csv("results/fronts_mini.csv").groupby(["way", "image"]).mean()  # over three training seeds
ENDS = {"low_ssim": 4, "high_ssim": 4, "mini-iqa": 3, "judge": 2}  # column: digits
for way, steps in (("Gram 10000", "1–20"), ("structure 1-10", "1–50")):  # 10 steps in training, as in the preset
    change = fronts.loc[way]
    cells = [f"{name} {change[name].mean():+.{n}f} ± {change[name].sem():.{n}f}" for name, n in ENDS.items()]
    print(f"structure loss in steps {steps}:", *cells, sep="   ")

# %% [markdown]
# **What to see.** The longer window holds more of both, the low band and the high bands, for nearly the same reward.
# That agrees with the figure: what is lost late can be held late. Two things speak against reading more into it. The
# judge falls further. And the windows differ in more than their place: an iteration draws one of the steps that have a
# loss, so with the longer window every iteration has a structure loss in place of two of three, and one of five has a
# reward in place of one of three.
#
# ## 7 · A bug, and the check that catches it
#
# Someone decodes the *state* $z_t$ in place of the estimate. The curve then looks even nicer: SSIM rises from step to
# step, just as the words "denoising builds the picture" suggest. It measures how much noise is left, and nothing else.

# %%
with torch.no_grad():
    noisy = {step: model.decode(states[step - 1]).clamp(0, 1) for step in (1, 25, 50)}
wrong = torch.stack([band_ssim_by_hand(x[0], gt[0]) for x in noisy.values()])
print("low-band SSIM of the states at steps 1, 25, 50:", [round(value, 2) for value in wrong[:, 0].tolist()])
show(
    pictures([*(x[0] for x in noisy.values()), gt[0]], ["state 1", "state 25", "state 50", "truth"], tile=1.92),
    "The decoded states at steps 1, 25 and 50, with less noise each time, and the truth. Low-band SSIM "
    + ", ".join(f"{value:.2f}" for value in wrong[:, 0])
    + ".",
)
caught(lambda: check("states for estimates", wrong, package[[0, 24, 49]], 1e-3))

# %% [markdown]
# ## 8 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up).** The mini model in 20 steps: they divide the 1000 times evenly too, and the first is again 999.
# Write $t$ as a function of the step.
# <details><summary>Hint</summary>How far apart are two steps? Check the first step first.</details>


# %%
def time_of(st):
    raise NotImplementedError


def verify_time():
    other = copy.deepcopy(model.scheduler)
    other.set_timesteps(20)
    check("20 steps", [time_of(st) for st in range(1, 21)], other.timesteps, 0)


exercise(1, verify_time)


# %% [markdown]
# **Exercise 2.** The paper avoids PSNR. Would it have told another story? Return the step with the best mean PSNR, and
# the change of the mean PSNR from there to step 50.
# <details><summary>Hint</summary>`frame` has a row for each seed, step and image: group it by step. `idxmax` finds the
# place of the largest value.</details>


# %%
def psnr_story():
    raise NotImplementedError


def verify_psnr():
    best, change = psnr_story()
    at = {step: rows["psnr"].to_numpy() for step, rows in frame.groupby("step")}  # seeds and images in one order
    for step in at:
        assert (at[best] - at[step]).mean() >= 0, f"step {step} is better than step {best}"
    check("change, image by image", change, (at[50] - at[best]).mean(), 1e-3)
    print(f"best at step {best}, then {change:+.1f} dB")


exercise(2, verify_psnr)


# %% [markdown]
# **Exercise 3.** How many network calls does one training step cost on average, when a step is drawn evenly from both
# windows together? The rollout to step $st$ takes $st-1$ calls, the step with gradient one more.
# <details><summary>Hint</summary>`by_step.steps()` lists all 30 steps.</details>


# %%
def mean_calls():
    raise NotImplementedError


def verify_calls():
    drawn = torch.randint(30, (100_000,), generator=torch.Generator().manual_seed(0))
    steps = by_step.steps()
    calls = [1 + len(range(1, steps[k])) for k in drawn.tolist()]  # one with gradient, and those of the rollout
    check("calls of 100 000 iterations", mean_calls(), sum(calls) / len(calls), 0.2)


exercise(3, verify_calls)


# %% [markdown]
# **Exercise 4 (harder).** PASD samples in 20 steps, $t=1001-50\,st$; the paper sets $st_1=8$ and $st_2=17$. Read as for SeeSR, where
# $st_2=40$ stands for 41 to 50, its windows are 1–8 and 18–20. The *times* $t\in[0,200]$ say something else. Return the
# reward window, as (first, last) step, that the times give.
# <details><summary>Hint</summary>List the times of all steps.</details>


# %%
def pasd_reward_window():
    raise NotImplementedError


def verify_pasd():
    check("PASD by its times", pasd_reward_window(), TimestepWindows.from_timesteps(range(951, 0, -50)).reward, 0)
    check("PASD by its steps", TimestepWindows.from_steps(8, 17, last=20).reward, (18, 20), 0)


exercise(4, verify_pasd)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Does detail come later in pictures that have more of it? Sort the crops by the share of energy in their fine
#   bands. An answer is the step at which the high band is best, for smooth and for rough crops, with a standard
#   error.
# * Write a rule that reads both windows from such curves, without a look at the paper. An answer is the windows it
#   gives for 10, 20 and 50 steps, and whether they lie at the same timesteps.
#
# ## Summary
#
# * At every step the network implies a finished picture; that estimate, not the noisy state, is what Figure 1 measures.
# * The mini model has the structure at step 1, as the paper says of SeeSR: it is given, by the start and by the ControlNet.
# * Ask of such a curve where it is best, where it falls, and how surely; a falling *low* band is lost structure.
# * The amount of detail and its agreement with the truth are two things: what grows in amount alone is invented.
# * Compare steps within one crop; between crops the differences are larger than the effect.
# * Windows: structure 1–20 ($t\ge 600$), reward 41–50 ($t\le 200$), nothing between. Whether a model loses its structure
#   inside the structure window is a question to measure.
#
# NAVIGATION
