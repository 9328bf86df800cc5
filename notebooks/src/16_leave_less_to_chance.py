# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 16 · Leave less to chance
#
# **You will measure how much of an upscaled picture is chance, and rebuild by hand the two stages of CCSR, which is made
# to leave less to it.**
#
# Three quarters of a minute on two cores; nothing to download. Helpful before it: notebook 02 (what a sampling step is).
#
# NAVIGATION
#
# A diffusion model starts from noise, so one photograph has as many results as there are seeds. CCSR (content consistent
# super-resolution, [arXiv 2401.00877](https://arxiv.org/abs/2401.00877)) wants them to agree. It gives structure to a few
# steps of diffusion and detail to a decoder, which draws no noise. Afterwards you can
#
# * measure how far the results of several seeds differ, and say what part of their error that is,
# * write CCSR's sampling from one table of timesteps, and see what each further evaluation brings and costs,
# * derive the losses of both its stages, and tune a decoder while all the rest stands still.
#
# The model is the package's mini model, which no stage of CCSR has trained; rewards are not used. The perceptual distance
# is that of a *random* VGG19 and the discriminator is a fresh one: **stand-ins**, as everything that is measured here.
# [CCSR in this package](../docs/ccsr.md) lists the commands, and what differs from the authors' code.

# %%
import copy
import io
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from diffusers import DDPMScheduler

from rfsr_ext.data import PhotographCrops, evaluation_crops, photographs
from rfsr_ext.evaluation import Spread, evaluate, stability_table
from rfsr_ext.evaluation.ways import total_error, ways_table
from rfsr_ext.losses import PatchDiscriminator, VGGFeatureLoss
from rfsr_ext.losses.adversarial import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from rfsr_ext.metrics import Judge, psnr
from rfsr_ext.models import NonUniformProcess, load_model
from rfsr_ext.notebook import COLORS, caught, check, exercise, explore, panels, pictures, show, spoken, together
from rfsr_ext.sampling import generators, sample, trajectory
from rfsr_ext.training.ccsr import CCSRStage1Config, CCSRStage2Config, Consistency, DecoderTuning

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()

# %%
model, judge = load_model("mini"), Judge.from_pretrained()
test = evaluation_crops(photographs("test"), size=64, count=6)  # two of a cup, two of a cat, two of a flower
whole = evaluation_crops(photographs("test"), size=128, count=18)[16]  # a cat's eye
lr, gt, words = whole["lr"][None, :, 2:18, 15:31], whole["gt"][None, :, 8:72, 60:124], whole["prompt"]
SEEDS = range(6)


def with_recipe(**changes):
    """The mini model, its networks shared, with other values in its recipe."""
    twin = copy.copy(model)
    twin.recipe = model.recipe.replace(**changes)
    return twin


def results(model, seeds=SEEDS, steps=None):
    """The cat's eye once for each seed, [S, 3, 64, 64]; the noise depends on the seed alone."""
    noise = [generators(seed, [0])[0] for seed in seeds]
    return sample(model, lr.expand(len(noise), -1, -1, -1), [words] * len(noise), noise, steps)


# %% [markdown]
# ## 1 · How much of a picture is chance?
#
# The same model upscales the same cat's eye six times, with 10 sampling steps (its recipe has 50, which takes five times as
# long). Only the noise in $x_T$ differs. Beside three of the results stand the mean of all six, and at each pixel their
# standard deviation over seeds.

# %%
six = results(model, steps=10)
deviation = six.double().numpy().std(axis=0)  # [3, 64, 64], over the seeds
disagreement = torch.from_numpy(deviation.mean(0))
enlarged = F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)
near = {f"base, seed {seed}": six[seed] for seed in (0, 1, 2)} | {"mean of six": six.mean(0)}
likeness = {n: psnr(x[None], gt).item() for n, x in ({"bicubic": enlarged[0]} | near).items()}
titles = [f"{name}\n{value:.1f} dB" for name, value in likeness.items()]
titles += [f"disagreement\nwhite: {disagreement.max():.3f}", "truth\n"]
tiles = [lr[0], enlarged[0], *near.values(), disagreement / disagreement.max(), gt[0]]
show(
    pictures(tiles, ["low resolution\n", *titles], columns=4, tile=1.92),
    "A cat's eye, 64 pixels wide: low resolution, bicubic, three of six results, their mean, a map of their standard "
    f"deviation, and the truth. {'; '.join(title.replace(chr(10), ' ') for title in titles[:-1])}.",
)
print(f"a pixel's standard deviation over seeds: {255 * deviation.mean():.1f} of 255 gray levels on average")

# %% [markdown]
# **What to see.** Look for differences between the three seeds before you look at the map. It shows where they disagree:
# along the rim of the eye and other edges more than on even fur. Two numbers sum it up (CCSR, section 4.1), over images $i$,
# seeds $s$, a metric $m$ and pixels $chw$ of pictures $y$ in [0, 1]:
#
# $$\text{G-STD}_m=\operatorname{mean}_i\,\operatorname{std}_s\,m(y_{is})\qquad
# \text{L-STD}=\operatorname{mean}_i\,\operatorname{mean}_{chw}\,\operatorname{std}_s\,y_{is,chw}$$
#
# *Global*: how far a score moves. *Local*: how far a pixel moves. Deviations are those of a population (divided by $S$),
# and L-STD leaves out a border of 4 pixels, as the authors' scripts do. We measure six crops with four seeds each.

# %%
scorers, noise_seeds = {"judge": judge.score}, range(4)


def measured(model, name, steps=None):
    """Rows of `evaluate`, the pictures [seeds, images, 3, 64, 64], and the package's spread."""
    made, spread = [], Spread()

    def look(images, sr):
        made.append(sr)
        spread.add(images, sr)

    with redirect_stderr(io.StringIO()):  # a progress bar
        rows = evaluate(model, test, scorers, noise_seeds, 8, steps, name, on_images=look)
    return rows, torch.stack(made), spread


base_rows, base_images, base_spread = measured(model, "base", 10)
pixels = base_images.double().numpy()
l_std = pixels.std(axis=0)[..., 4:-4, 4:-4].mean()
scores = base_rows.pivot(index="image", columns="seed", values="psnr").to_numpy(float)  # [images, seeds]
table = stability_table(base_rows, {"base": base_spread}).loc["base"]
check("L-STD: NumPy and package", 1000 * l_std, 1000 * table["std"]["l_std"], 1e-9)
check("G-STD of PSNR: NumPy and package", scores.std(axis=1).mean(), table["std"]["psnr"], 1e-12)
print(f"L-STD {table['std']['l_std']:.4f}, G-STD of PSNR {table['std']['psnr']:.2f} dB")

# %% [markdown]
# ### What could agreement buy?
#
# Chance has a price in fidelity, and it is exact. At one pixel with truth $x$,
#
# $$\operatorname{mean}_s\,(y_s-x)^2=(\bar y-x)^2+\operatorname{var}_s\,y_s$$
#
# The second term is what the seeds disagree about. A model whose results all equal $\bar y$ would save that and no more.

# %%
truths = torch.stack([crop["gt"] for crop in test]).double().numpy()
error = ((pixels - truths) ** 2).mean()
of_mean, variance = ((pixels.mean(0) - truths) ** 2).mean(), pixels.var(axis=0).mean()
check("error of the results = error of their mean + variance", 1e3 * error, 1e3 * (of_mean + variance), 1e-9)
share = variance / error
rise = -10 * np.log10(1 - share)
print(f"of the squared error {100 * share:.1f} % is chance; without it PSNR would rise by {rise:.2f} dB")
averaged = torch.from_numpy(pixels.mean(0)).float()
prompts = [crop["prompt"] for crop in test]
blur = judge.score(averaged, prompts).mean().item()
print(f"the judge: single results {base_rows['judge'].mean():.0f}, their mean {blur:.0f}")
assert blur < base_rows["judge"].mean(), "the mean picture must be the smoother one"

# %% [markdown]
# The judge, a quality score of about 0 to 100 that no training here uses, speaks against averaging: the mean of several
# sharp pictures is a less sharp one. So the question is not only how far a model agrees, but *on what*.
#
# ### What is the diversity made of?
#
# Of the noise in $x_T$: our sampler (DDIM) draws none later. The mini model's recipe multiplies that noise by a
# `temperature` of 0.7. What if it is another number?

# %%
temperatures, curves = [0.0, 0.2, 0.4, 0.7, 1.0], {"l_std": [], "PSNR": [], "judge": []}
shown = {}
for temperature in temperatures:
    same = temperature == model.recipe.temperature
    images = six if same else results(with_recipe(temperature=temperature), steps=10)
    shown[temperature] = images[0]
    curves["l_std"].append(images.double().numpy().std(axis=0)[..., 4:-4, 4:-4].mean())
    curves["PSNR"].append(psnr(images, gt.expand_as(images)).mean().item())
    curves["judge"].append(judge.score(images, [words] * len(images)).mean().item())
check("no noise, no spread", curves["l_std"][0], 0.0, 1e-7)
slope = curves["l_std"][1] / temperatures[1]
print("temperature    L-STD   of it in proportion    PSNR   judge")
for k, temperature in enumerate(temperatures):
    values = curves["l_std"][k], slope * temperature, curves["PSNR"][k], curves["judge"][k]
    print("{:11.1f}{:9.4f}{:16.4f}{:15.1f}{:8.0f}".format(temperature, *values))
assert np.all(np.diff(curves["l_std"]) > 0) and curves["PSNR"][0] > curves["PSNR"][-1]
assert curves["l_std"][-1] > 1.5 * slope, "with all of the noise the spread must be more than in proportion"
titles = [f"temperature {t:g}\nL-STD {v:.3f}" for t, v in zip(temperatures, curves["l_std"], strict=True)]
show(
    pictures([lr[0], enlarged[0], *shown.values(), gt[0]], ["low resolution\n", "bicubic\n", *titles, "truth\n"], columns=4, tile=1.92),
    "The cat's eye with five temperatures of the noise between low resolution, bicubic and the truth: "
    + spoken(titles),
)  # fmt: skip

# %% [markdown]
# **What to see.** Without noise all seeds are one picture, a smooth one. Little noise spreads the results in proportion,
# as the third column says (it continues the first step in a straight line). Then the spread grows faster, and with all of
# the noise a texture covers everything. PSNR falls on the way, and the judge's column says what it would rather have. So
# a factor on the noise already trades agreement against detail, with no training. CCSR's answer is another one.
#
# ## 2 · One leap, then few steps
#
# CCSR takes $T=999$, then leaps. Of $n$ uniform timesteps $u_1>\dots>u_n$ and two shares $t_{max}$ and $t_{min}$:
#
# 1. estimate $\hat z_0$ at $T$, and noise it again to the first of the timesteps below;
# 2. take those from the last $\text{round}(n\,t_{max})$ to the last $\text{round}(n\,t_{min})$, the latter left out;
# 3. decode the *estimate* made at the last of them, not the latents.
#
# There are two uniform grids: version 1 divides 999 … 0 with both ends, version 2 takes those of Stable Diffusion 2.1.


# %%
def uniform(n, version):
    """u_1 > … > u_n."""
    if version == "ccsr-v2":
        return [(n - i) * (1000 // n) + 1 for i in range(1, n + 1)]
    t, found = 0.0, []
    for _ in range(n):
        found.append(round(t))
        t += 999 / max(n - 1, 1)  # added up, as the authors do: halves round to where the sum lies
    return found[::-1]


def taken(n, t_max, t_min, version):
    if n == 1:
        return [999]
    u = uniform(n, version)
    return [999] + [t for t in u[n - round(n * t_max) : n - round(n * t_min)] if t < 999]


diffusion = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                          timestep_spacing="leading")  # fmt: skip
shares = [(2 / 3, 1 / 3), (2 / 3, 1 / 2), (2 / 3, 0), (0.8, 0.2), (0.5, 0.5)]
for version in ("ccsr-v1", "ccsr-v2"):
    ours, theirs = [], []
    for n in (1, 2, 3, 6, 10, 20, 45, 50):
        for t_max, t_min in shares:
            process = NonUniformProcess(diffusion, n, t_max, t_min, version.removeprefix("ccsr-"), 999)
            ours += taken(n, t_max, t_min, version)
            theirs += process.timesteps.tolist()
            wanted = 1 + round(n * t_max) - round(n * t_min)
            assert n < 6 or len(process) == wanted, f"{len(process)} evaluations, wanted {wanted}"
    check(f"{version}: {len(ours)} timesteps of 40 tables", ours, theirs, 0)
print("version 1:", taken(45, 2 / 3, 1 / 3, "ccsr-v1"))
print("version 2:", taken(6, 2 / 3, 1 / 2, "ccsr-v2"))

# %% [markdown]
# These two lines are what the authors publish: 16 evaluations of the network for version 1, two for version 2. (Halves:
# Python rounds 2.5 to 2.) Move $n$ and watch which timesteps are evaluated.


# %%
def line_of_time(n):
    rows = {"uniform": uniform(n, "ccsr-v2"), "v1, ⅔ to ⅓": taken(n, 2 / 3, 1 / 3, "ccsr-v1"),
            "v2, ⅔ to ½": taken(n, 2 / 3, 1 / 2, "ccsr-v2")}  # fmt: skip
    figure, axis = panels(width=7.2, height=2.3)
    for place, (color, t) in enumerate(zip(COLORS, rows.values(), strict=False)):
        axis.plot(t, [-place] * len(t), "|", markersize=16, markeredgewidth=2, color=color)
        if place and len(t) > 1:
            axis.annotate("", (t[1], -place), (999, -place), arrowprops={"arrowstyle": "->", "color": color})
    axis.set(xlim=(1015, -15), ylim=(-2.6, 0.6), xlabel="timestep t (sampling runs from left to right)")
    axis.set_yticks([0, -1, -2], [f"{name}: {len(t)}" for name, t in rows.items()])
    text = "; ".join(f"{name} {len(t)}, from {t[0]} to {t[-1]}" for name, t in rows.items())
    return figure, f"Of n = {n} timesteps on lines from 999 to 0, evaluated: {text}."


line = explore(line_of_time, values=[1, 3, 6, 12, 20, 45], label="uniform timesteps n", start=6)
line

# %%
line.slider.value = 12
show(*line_of_time(12))

# %% [markdown]
# **What to see.** The arrow is the leap: what lies under it is never evaluated, and neither is anything after
# $t_{min}$. The number behind each name counts evaluations. $n$, $t_{max}$ and $t_{min}$ are free when sampling: none of
# them asks for other weights. With $n=1$ the first estimate is the result.
#
# ### The sampler in ten lines
#
# $\alpha_t$ and $\sigma_t$ of the mini model have a closed form, because its $\beta$ is one number:
# $\alpha_t^2=(1-\beta)^{t+1}$, $\sigma_t^2=1-\alpha_t^2$. It starts from the enlarged picture's latents, and its network
# answers with $\hat z_0$ itself. Its uniform timesteps are $u_i=\text{round}(1000\,(n+1-i)/n)-1$.

# %%
FEW = {"num_inference_steps": 6, "spacing": "ccsr-v2", "t_max": 2 / 3, "t_min": 1 / 2}
beta = model.scheduler.config.beta_start


def levels(t):
    """α and σ at one timestep."""
    return (1 - beta) ** ((t + 1) / 2), (1 - (1 - beta) ** (t + 1)) ** 0.5


@torch.no_grad()
def leap_and_few_steps(timesteps, condition, noise, leap_noise=1.0, bug=None):
    def draw():
        return torch.cat([torch.randn(1, 16, 16, 16, generator=g) for g in noise])

    alpha, sigma = levels(timesteps[0])
    z = alpha * model.encode(condition.image) + sigma * model.recipe.temperature * draw()
    for here, there in zip(timesteps, [*timesteps[1:], None], strict=True):
        estimate = model.predict(z, torch.tensor(here), condition)
        if there is None:
            return z if bug == "latents" else estimate
        found = (z - levels(here)[0] * estimate) / levels(here)[1]  # the noise that z holds beside the estimate
        alpha, sigma = levels(there)
        z = alpha * estimate + sigma * (leap_noise * draw() if here == timesteps[0] else found)  # the leap: fresh noise


def uniform_mini(n):
    return [round(1000 * (n + 1 - i) / n) - 1 for i in range(1, n + 1)]


condition = model.condition(lr.expand(2, -1, -1, -1), [words] * 2)
for n, t_min in ((1, 0.5), (6, 0.5), (12, 0.25)):
    spaced = with_recipe(**(FEW | {"num_inference_steps": n, "t_min": t_min}))
    times = [999] + uniform_mini(n)[n - round(n * 2 / 3) : n - round(n * t_min)] if n > 1 else [999]
    *_, (_, latents) = trajectory(spaced, condition, generators(0, [0, 1]))
    by_hand = leap_and_few_steps(times, condition, generators(0, [0, 1]))
    # the scheduler's α is a product of up to 1000 factors in 32 bits, hence the tolerance
    check(f"{len(times)} evaluations at {times}", by_hand, latents, 1e-3)

# %% [markdown]
# Only the leap draws noise after the start, because the package takes DDIM's steps here. DDPM, the authors' sampler,
# draws noise in each of its steps, too.
#
# ### What does each evaluation bring?
#
# One set of weights, 1, 2 and 3 evaluations, beside bicubic enlargement and the base of 10 uniform steps. Two more rows
# ask what the leap's own noise does, with the sampler from above: the recipe's `temperature` holds for $x_T$ alone, so the
# leap adds noise of full strength. *Quieter* takes the same 0.7 of it, *silent* none.


# %%
few = {count: with_recipe(**(FEW | change)) for count, change in
       ((1, {"num_inference_steps": 1}), (2, {}), (3, {"t_min": 1 / 3}))}  # fmt: skip
assert all(len(spaced.process()) == count for count, spaced in few.items())
lr_all, gt_all = (torch.stack([crop[key] for crop in test]) for key in ("lr", "gt"))
made = {"base, 10 steps": base_images}
for count, spaced in few.items():
    images = [sample(spaced, lr_all, prompts, generators(seed, range(6))) for seed in noise_seeds]
    made[f"{count} evaluation{'s'[: count - 1]}"] = torch.stack(images)
everything = model.condition(lr_all, prompts)
for name, factor in (("2, quieter leap", 0.7), ("2, silent leap", 0.0)):
    latents = [leap_and_few_steps([999, 666], everything, generators(s, range(6)), factor) for s in noise_seeds]
    made[name] = torch.stack([model.decode(z).detach().clamp(0, 1) for z in latents])


# %%
def summary(images):
    """PSNR and judge, how both move with the seed, and L-STD, of pictures [S, N, 3, H, W]."""
    fidelity = torch.stack([psnr(x, gt_all) for x in images]).double().numpy()
    quality = torch.stack([judge.score(x, prompts) for x in images]).double().numpy()
    l_std = images.double().numpy().std(axis=0)[..., 4:-4, 4:-4].mean()
    return fidelity.mean(), quality.mean(), fidelity.std(axis=0).mean(), quality.std(axis=0).mean(), l_std


enlarged_all = F.interpolate(lr_all, scale_factor=4, mode="bicubic").clamp(0, 1)
line_of = {name: summary(images) for name, images in made.items()}
print(f"{'':16s} PSNR  judge   G-STD of PSNR   of the judge    L-STD")
print("{:16s}{:5.1f}{:7.0f}{:>13s}{:>15s}{:>12s}".format("bicubic", *summary(enlarged_all[None])[:2], "-", "-", "-"))
for name, values in line_of.items():
    print("{:16s}{:5.1f}{:7.0f}{:15.2f}{:15.1f}{:11.4f}".format(name, *values))
check("the base's row is that of section 1", line_of["base, 10 steps"][::4], [base_rows["psnr"].mean(), l_std], 1e-4)
base, one, two, three = list(line_of.values())[:4]
assert one[4] < 0.6 * base[4] and one[0] > base[0], "one evaluation: agrees more, and is nearer to the truth"
for more in (two, three):
    assert more[4] > 1.2 * base[4] and more[0] < base[0] and more[1] > base[1] + 3, "more: the other way round"
quieter, silent = (line_of[f"2, {name} leap"][4] for name in ("quieter", "silent"))
assert silent < 0.75 * quieter and quieter < 0.75 * two[4], "much of the spread is the noise of the leap"

flower = 2
tiles = [lr_all[flower], enlarged_all[flower], *(images[0, flower] for images in made.values()), gt_all[flower]]
show(
    pictures(tiles, ["low resolution", "bicubic", *made, "truth"], columns=3, tile=1.92),
    "Petals of a flower, 64 pixels wide: low resolution, bicubic, the base, five ways of 1 to 3 evaluations, and the "
    "truth. L-STD over six crops: " + ", ".join(f"{name} {values[4]:.4f}" for name, values in line_of.items()) + ".",
)

# %% [markdown]
# **What to see.** *One* evaluation is nearest to the truth, and its scores move least from seed to seed; look whether it is
# also the picture that you would choose. With two and three the judge rises, fidelity falls, and the seeds disagree *more* than those of the base:
# the rows that speak against few steps. The last two rows say why. Much of that spread is the leap's own noise. And this
# model was never trained to go on from a leap: it sees states unlike those it learned from. What it makes of them looks
# sharper, is farther from the truth, and the judge likes it. Going on from a leap is what stage 1 teaches. (The authors'
# models have had it; nothing here says what theirs do.)
#
# ## 3 · Stage 1: make the estimate right
#
# Stage 1 trains the denoiser (in the authors' models the ControlNet alone) with three terms:
#
# $$\mathcal L=\|F(z_t)-y_t\|^2+\lambda\,\bigl(\|\hat z_0(z_T)-z_0\|^2+\|\hat z_0(z_\tau)-z_0\|^2\bigr),\qquad
# z_\tau=\alpha_\tau\,\hat z_0(z_T)+\sigma_\tau\,\varepsilon$$
#
# All are means. $F$ is the network's output and $y_t$ what it should be (here $z_0$), at a $t$ drawn below
# $\tau=\text{round}(1000\,t_{max})$: above it nothing is evaluated but $T$. The second term wants the estimate *before*
# the leap to be right, the third the one *after* it. Version 1 adds $\|\hat\varepsilon(z_\tau)-\varepsilon\|^2$, the
# noise found in $z_\tau$. Now by hand, with the package's rule for noise: each sample has generators of its own.

# %%
student = load_model("mini", **FEW, noising="plain")  # z_t = α z_0 + σ ε, as in the formula
data = PhotographCrops(photographs("train")[:6], size=64, seed=0, recolor=False)


def batch(k, n=2):
    samples = [data[i] for i in range(k * n, k * n + n)]
    part = {key: torch.stack([one[key] for one in samples]) for key in ("lr", "gt")}
    return part | {"prompt": [one["prompt"] for one in samples]}


def consistency_by_hand(batch, samples, lam, variant, cut=False):
    z0, condition = student.encode(batch["gt"]), student.condition(batch["lr"], batch["prompt"])
    first, second, third = torch.stack(
        [torch.randn(3, *z0.shape[1:], generator=g) for g in generators(0, samples)], dim=1
    )
    times = [int(torch.randint(667, (1,), generator=g)) for g in generators(2**32, samples)]  # round(1000 · 2/3) = 667

    def noised(x, noise, t):
        alpha, sigma = (torch.tensor(level)[:, None, None, None] for level in zip(*map(levels, t), strict=True))
        return (alpha * x + sigma * noise).float()

    def F_of(z, t):
        return student.predict(z, torch.tensor(t), condition)

    terms = [(F_of(noised(z0, first, times), times) - z0).square().mean()]
    leapt = F_of(noised(z0, second, [999] * 2), 999)
    z_tau = noised(leapt.detach() if cut else leapt, third, [667] * 2)
    estimate = F_of(z_tau, 667)
    terms += [(leapt - z0).square().mean(), (estimate - z0).square().mean()]
    if variant == "v1":
        alpha, sigma = levels(667)
        terms.append(((z_tau - alpha * estimate) / sigma - third).square().mean())
    return terms[0] + lam * sum(terms[1:]), terms


# %%
def slope_of(loss, parameters):
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([d.flatten() for d in found if d is not None])


slopes = {}
with together("each term, loss, and distance of gradients over length, in both versions"):
    for variant in ("v2", "v1"):
        method = Consistency(CCSRStage1Config(trained=None, lambda_consistency=0.5, variant=variant), student)
        parameters = list(student.trained_parameters().values())
        loss, terms = consistency_by_hand(batch(0), [0, 1], 0.5, variant)
        slopes[variant] = slope_of(loss, parameters)
        package, logs = method.loss("model", batch(0), 0, [0, 1])
        names = ["denoising", "at_T", "at_t_max", "noise_at_t_max"][: len(terms)]
        wanted = torch.stack([logs[n] for n in names])
        check(f"{variant}: each term", torch.stack(terms) / wanted, [1.0] * len(terms), 2e-3)
        check(f"{variant}: loss", loss / package, 1.0, 2e-3)
        theirs = slope_of(package, parameters)
        check(f"{variant}: gradient", (slopes[variant] - theirs).norm() / theirs.norm(), 0.0, 2e-3)
print("v2:", ", ".join(f"{name} {value.item():.2f}" for name, value in logs.items() if name in names[:3]))
without = slope_of(consistency_by_hand(batch(0), [0, 1], 0.5, "v2", cut=True)[0], parameters)
through = (slopes["v2"] - without).norm() / slopes["v2"].norm()
print(f"what comes back through the leap is {through.item():.2f} of the gradient's length")
assert through > 0.01, "the third term must reach the first evaluation"
assert logs["at_t_max"] > 3 * max(logs["at_T"], logs["denoising"]), "the untrained leap must show"

# %% [markdown]
# **What to see.** The term after the leap is by far the largest: that is the untrained leap of section 2, as a number.
# Its gradient passes through $\hat z_0(z_T)$ into the first evaluation, too: one step is trained for what the next one
# makes of it.
#
# ### Why does the term at T count 214-fold?
#
# The authors' networks answer with noise $\hat\varepsilon$, and $\hat z_0=(z_T-\sigma_T\hat\varepsilon)/\alpha_T$. With
# the true noise that is $z_0$. Subtract:
#
# $$\hat z_0-z_0=-\frac{\sigma_T}{\alpha_T}(\hat\varepsilon-\varepsilon)\quad\Rightarrow\quad
# \|\hat z_0-z_0\|^2=\frac{\sigma_T^2}{\alpha_T^2}\,\|\hat\varepsilon-\varepsilon\|^2$$
#
# For Stable Diffusion's schedule the factor follows from its thousand $\beta$. As a test on the real loss we tell a copy
# of the model that its answers are noise (they are not; the arithmetic does not care).

# %%
alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
gain = (1 - alpha_bar) / alpha_bar
print("counts, as a multiple of the squared error of the noise, at")
print(", ".join(f"t = {t}: {gain[t]:.4g}" for t in (999, 831, 667, 499, 166)))
teller = copy.copy(student)
teller.scheduler = DDPMScheduler.from_config(diffusion.config)
method = Consistency(CCSRStage1Config(trained=None), teller)
pair = batch(0)
_, logs = method.loss("model", pair, 0, [0, 1])
with torch.no_grad():
    z0, condition = teller.encode(pair["gt"]), teller.condition(pair["lr"], pair["prompt"])
    noise = torch.stack([torch.randn(3, *z0.shape[1:], generator=g)[1] for g in generators(0, [0, 1])])
    z_T = (alpha_bar[999] ** 0.5 * z0 + (1 - alpha_bar[999]) ** 0.5 * noise).float()
    error = (teller.predict(z_T, torch.tensor(999), condition) - noise).square().mean()
check("at_T over the error of the noise, over σ²/α²", logs["at_T"] / error / gain[999], 1.0, 1e-3)
print(f"so {error.item():.2f} becomes {logs['at_T'].item():.0f}; the mini model's own answer, z_0, counts once")

# %% [markdown]
# A small error of the noise is a large one of the picture at $T$: for an estimate that is off by 0.1, the noise must be
# right to 0.1/14.6. That is why one evaluation is hard for such networks, and why this term leads their training. The
# weight $\lambda$ means something else for a network that answers with velocity (exercise 3) or, as ours, with $z_0$.
#
# ## 4 · Stage 2: detail by a decoder
#
# Diffusion made the structure; now the VAE's decoder learns to add detail to the estimates. Encoder and denoiser stay as
# they are. The decoder $G$ has an opponent, the discriminator $D$, which says for each patch how real it looks:
#
# $$\mathcal L_G=\underbrace{\|\hat x-x\|_1+d(\hat x,x)}_{\text{rest}}-w\,\lambda\,\operatorname{mean}D(\hat x)\qquad
# \mathcal L_D=\tfrac12\operatorname{mean}\max(0,1-D(x))+\tfrac12\operatorname{mean}\max(0,1+D(\hat x))$$
#
# $\hat x$ is what $G$ makes of the sampled estimate, $x$ the truth, both in [-1, 1], and $d$ a perceptual distance. The
# hinge says: once a logit is beyond ±1 on its right side, enough. On paper, with logits 2, 0.5 of real patches and
# -3, 0 of made ones: $\mathcal L_D=\frac12\cdot\frac{0+0.5}2+\frac12\cdot\frac{0+1}2$.

# %%
real, fake = torch.tensor([2.0, 0.5], requires_grad=True), torch.tensor([-3.0, 0.0], requires_grad=True)
check("discriminator on paper", hinge_discriminator_loss(real, fake), 0.375, 1e-7)
check("decoder on paper: minus the mean", hinge_generator_loss(fake), 1.5, 1e-7)
pushes = torch.autograd.grad(hinge_discriminator_loss(real, fake), (real, fake))
check("logits beyond ±1 push no more", torch.stack(pushes), [[0, -0.25], [0, 0.25]], 0)

layers = [(4, 2), (4, 2), (4, 2), (4, 1), (4, 1)]  # PatchGAN's convolutions: kernel and stride
field = [1]
for kernel, stride in reversed(layers):  # from one logit back to the picture
    field.append((field[-1] - 1) * stride + kernel)
print("one logit sees, layer by layer towards the picture:", field)
assert field[-1] == 70

# %% [markdown]
# So one logit of PatchGAN judges 70×70 pixels. Does it? We ask for the gradient of one logit in a picture of 128 pixels.
# First without the normalizations between the convolutions, then with them.


# %%
def footprint(discriminator):
    """|gradient| of the middle logit in a picture of 128 pixels."""
    x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).requires_grad_()
    logits = discriminator(x)
    assert logits.shape[-2:] == (14, 14), "with three strides of 2 it must have 128 / 8 - 2 logits a side"
    return torch.autograd.grad(logits[0, 0, 7, 7], x)[0].abs().sum((0, 1))


def without_norms(discriminator):
    bare = copy.deepcopy(discriminator)
    for place, module in enumerate(bare.main):
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.BatchNorm2d)):
            bare.main[place] = torch.nn.Identity()
    return bare


patch_gan = PatchDiscriminator(16, norm="group")
seen = {"without norms": footprint(without_norms(patch_gan)), "with group norms": footprint(patch_gan)}
for axis in (0, 1):
    touched = torch.nonzero(seen["without norms"].sum(axis)).flatten()
    check("pixels that reach the logit", [touched.numel(), touched[-1] - touched[0] + 1], [70, 70], 0)
bare, normed = seen.values()
outside = (normed[bare == 0].sum() / normed.sum()).item()
logs10 = [(field / field.max()).clamp_min(1e-4).log10() / 4 + 1 for field in seen.values()]
show(
    pictures(logs10, [*seen], tile=2.56),
    "How much each of 128 by 128 pixels moves one logit, in powers of ten from white (most) down to black (a 10000th or "
    f"nothing). Left: a square of 70 pixels. Right: all pixels; {100 * outside:.0f} percent lie outside of that square.",
)
couple = torch.stack([torch.from_numpy(pixels[0, i]).float() for i in (0, 2)]) * 2 - 1
for norm in ("batch", "group"):
    discriminator = PatchDiscriminator(16, norm=norm)
    with torch.no_grad():
        apart = (discriminator(couple)[:1] - discriminator(couple[:1])).abs().max().item()
    moves = f"moves by up to {apart:.1f}" if apart > 1e-4 else "does not move"
    print(f"{norm} norm: beside another picture a logit {moves}")
    assert (apart > 1e-4) == (norm == "batch")

# %% [markdown]
# **What to see.** Left the square that was counted. Right the same network with its norms: they divide by a deviation over
# the whole picture, so every pixel has a small say. Batch norm, the published kind, goes on to the other pictures of the
# batch: a logit then depends on its neighbors, as the last lines say. With the group norm it does not.
#
# ### The adaptive weight
#
# How strong should the opponent be? VQGAN's answer: compare the gradients of both parts at the decoder's last
# convolution $W$, $w=\|\nabla_W\text{rest}\|/(\|\nabla_W\,(-\operatorname{mean}D)\|+10^{-4})$. Then $\lambda$ is a
# share: the opponent pulls at $W$ with $\lambda$ of the other's force. Here is $w$ without automatic differentiation of
# $W$: the last layer is $x=W*h$, so its gradient is the correlation of the picture's gradient with $h$.

# %%
SETTINGS = CCSRStage2Config(
    batch_size=2, reconstruction_loss="l1", perceptual_loss="vgg-random", discriminator_channels=32,
    discriminator_norm="group", lambda_adversarial=0.1, adaptive_weight=True, adversarial_start=0,
)  # fmt: skip
tuned = load_model("mini", **FEW)
original = copy.deepcopy(tuned.networks)
tuning = DecoderTuning(SETTINGS, tuned)
opponent = tuning.players["discriminator"]["discriminator"]
perceptual = VGGFeatureLoss("random", ("conv1_2", "conv2_2", "conv3_4"))  # a second one, built here
print("perceptual:", perceptual.label)
pair, hidden = batch(0), []
package, of_opponent = (tuning.loss(player, pair, 0, [0, 1])[1] for player in ("decoder", "discriminator"))

latents = leap_and_few_steps([999, 666], model.condition(pair["lr"], pair["prompt"]), generators(0, [0, 1]))
hook = tuned.vae.decoder.conv_out.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].detach()))
made_up = (2 * tuned.decode(latents) - 1).detach().requires_grad_()
hook.remove()
truth = 2 * pair["gt"] - 1
rest = (made_up - truth).abs().mean() + perceptual(made_up / 2 + 0.5, pair["gt"])
against = -opponent(made_up).mean()
norms = []
for part in (rest, against):
    (push,) = torch.autograd.grad(part, made_up, retain_graph=True)
    norms.append(torch.nn.grad.conv2d_weight(hidden[0], tuning.last_layer.shape, push, padding=1).norm())
w = norms[0] / (norms[1] + 1e-4)
check("adaptive weight: by hand and package", w / package["weight"], 1.0, 1e-2)
check("the decoder's loss", (rest + 0.1 * w * against) / package["loss"], 1.0, 1e-2)
logits = [opponent(x).detach().numpy() for x in (truth, made_up)]
by_hinge = np.maximum(0, 1 - logits[0]).mean() / 2 + np.maximum(0, 1 + logits[1]).mean() / 2
check("the opponent's", by_hinge, of_opponent["loss"], 2e-3)
print(f"w = {w.item():.2f}; the opponent's share of force at W: {(0.1 * w * norms[1] / norms[0]).item():.2f}")

# %% [markdown]
# Where the opponent pushes hardly at all, $w$ grows without bound, and a wrong opinion would be blown up. The package
# stops at $10^4$. A case on paper: $W=\frac12$, $h=2$, so $x=Wh=1$. With rest $=x^2$ and opponent $=c\,x$ the gradients at
# $W$ are $2xh=4$ and $ch=2c$.

# %%
W = torch.tensor([0.5], dtype=torch.float64).requires_grad_()
for c in (3.0, 1e-3, 0.0):
    x = 2 * W
    on_paper = min(4 / (2 * c + 1e-4), 1e4)
    check(f"c = {c:g}: w = {on_paper:.4g}", adaptive_weight((x**2).sum(), (c * x).sum(), W), on_paper, 1e-6 * on_paper)

# %% [markdown]
# ### Live: eight iterations
#
# Both players take turns, each with an Adam of its own: first the decoder, then the opponent, which sees what the decoder
# made before its step. Eight iterations of two pictures are a small part of a training. First question: what moved?

# %%
adams = {
    player: torch.optim.Adam(next(iter(networks.values())).parameters(), lr=5e-5, betas=(0.5, 0.9))
    for player, networks in tuning.players.items()
}
for k in range(8):
    for player, adam in adams.items():
        loss, _ = tuning.loss(player, batch(k), k, [2 * k, 2 * k + 1])
        adam.zero_grad()
        loss.backward()
        adam.step()
moved = {}
for name, network in tuned.networks.items():
    for key, parameter in network.named_parameters():
        part = f"vae.{key.split('.')[0]}" if name == "vae" else name
        change = parameter.detach() - original[name].get_parameter(key)
        moved.setdefault(part, []).append(change.abs().max().item())
for part, changes in moved.items():
    if part in ("vae.decoder", "vae.post_quant_conv"):
        print(f"{part}: {sum(change > 0 for change in changes)} of {len(changes)} tensors moved")
        assert min(changes) > 0
    else:
        check(f"{part}: {len(changes)} tensors did not move", changes, [0.0] * len(changes), 0)

# %% [markdown]
# Second: is the result an ordinary VAE? It is saved as a folder, opened again, and put into *another* model, the base of
# section 1. Third: what does it do to pictures? We sample latents of the six crops once and decode them with both
# decoders. The last row is a trick, for comparison: mix each result of the old decoder half and half with bicubic.

# %%
with tempfile.TemporaryDirectory() as folder:
    tuning.export(Path(folder))
    other = with_recipe()
    other.networks = model.networks | {"vae": load_model(folder).vae}
held_out = [list(trajectory(few[2], everything, generators(seed, range(6))))[-1][1] for seed in noise_seeds]
with torch.no_grad():
    before, after = (torch.stack([m.decode(z).clamp(0, 1) for z in held_out]) for m in (model, tuned))
    check("before: the pictures of section 2", before, made["2 evaluations"], 1e-5)
    check("another model with the tuned VAE", other.decode(held_out[0]).clamp(0, 1), after[0], 1e-4)
mixed = (before + enlarged_all) / 2
print(f"{'':18s} PSNR   distance   judge    L-STD")
for name, images in {"bicubic": enlarged_all[None], "decoder before": before, "decoder after": after,
                     "before, half mixed": mixed}.items():  # fmt: skip
    fidelity, quality, _, _, of_seeds = summary(images)
    distance = perceptual(images[0], gt_all).item()  # of the first seed
    last = "-" if name == "bicubic" else f"{of_seeds:.4f}"
    print(f"{name:18s}{fidelity:5.1f}{distance:10.2f}{quality:9.0f}{last:>10s}")
check("half mixed, half the spread", 2e3 * of_seeds, 1e3 * summary(before)[4], 1e-4)

cat = 1
change = (after[0, cat] - before[0, cat]).abs().mean(0)
tiles = [lr_all[cat], enlarged_all[cat], before[0, cat], after[0, cat], change / change.max(), gt_all[cat]]
titles = ["low resolution", "bicubic", "decoder before", "decoder after", f"change, white: {change.max():.2f}", "truth"]
show(
    pictures(tiles, titles, columns=3, tile=1.92),
    "A piece of a cat, 64 pixels wide, two evaluations decoded by the decoder before and after eight iterations, between "
    f"bicubic and the truth. The change of a pixel is {255 * change.mean():.1f} of 255 gray levels on average.",
)

# %% [markdown]
# **What to see.** Compare the rows of both decoders in every column: if the spread fell, who paid? The map shows where the
# picture changed; whether that is detail of the truth you can judge beside it. Now look at the last row: it has half the
# spread for nothing, exactly, by going half of the way to a picture that has none. So a smaller L-STD is a gain only where
# no other column pays for it. Eight iterations settle nothing about stage 2.
#
# A decoder draws no noise, but it passes on that of the latents: it can shrink or stretch the spread, and no more.
#
# ## 5 · What whole trainings gave
#
# `rfsr compare` ([how](../docs/comparison.md)) trains the mini model in several ways at equal cost, over several training
# seeds. If its table of results is stored beside this notebook, this cell reads it: CCSR's rows as differences to the
# untrained base on the same crops and noise, `±` the standard error over crops and training seeds.

# %%
RECORDING = Path("results/compare_mini.csv")
ROWS = ("psnr", "low_ssim", "judge", "mini-iqa", "g_std_psnr", "g_std_judge", "l_std")


def read_recording(path):
    if not path.exists():
        print("no recording yet")
        return
    rows = pd.read_csv(path)
    sums = ways_table(rows, [name for name in ("psnr", "ssim", "low_ssim", "mini-iqa", "judge") if name in rows])
    sums = sums.set_index(["quantity", "model"])
    ways = [way for way in rows["model"].unique() if "CCSR" in way]
    of_way = rows[rows["model"] == ways[0]].groupby("image")["l_std"].mean()
    of_base = rows[rows["model"] == "base"].groupby("image")["l_std"].mean()
    check("L-STD, pandas and table", (of_way - of_base).mean(), sums.loc[("l_std", ways[0]), "difference"], 1e-9)
    print(f"{'':12s}{'base':>9s}" + "".join(f"{way:>28s}" for way in ways))
    for quantity in (name for name in ROWS if name in sums.index.get_level_values(0)):
        digits = 4 if quantity == "l_std" else 1 if "judge" in quantity else 3
        cells = []
        for way in ways:
            row = sums.loc[(quantity, way)]
            error = total_error(row["difference_error_images"], row["difference_error_seeds"])
            cells.append(f"{row['difference']:+.{digits}f} ± {error:.{digits}f}")
        print(f"{quantity:12s}{sums.loc[(quantity, 'base'), 'mean']:9.{digits}f}" + "".join(f"{c:>28s}" for c in cells))


read_recording(RECORDING)

# %% [markdown]
# Three questions to such a table. Did the spread fall (`l_std`, `g_std_…`)? Did fidelity and the judge hold? And is the
# difference more than twice its error? CCSR's way samples with two evaluations and the base with more; so its row has the
# effect of training and that of fewer evaluations together.
#
# Must one ask for steadiness to get it? RFSR does not ask, and made results agree as well: its L-STD changed by
# −0.0029 ± 0.0004 of 0.0082, its judge by −2.7 ± 0.8 ([all ways](../docs/comparison.md)).
#
# ## 6 · Two bugs
#
# **The latents in place of the estimate.** At $t_{min}$ the sampler stops, and someone decodes what it holds there, with
# the noise of $t_{min}$ in it. Read the two scores: would they have told you?
#
# **One noise for all seeds.** Someone makes the generators from seed 0 inside the loop over seeds. Every table is filled,
# and the model looks perfectly consistent. A spread of exactly zero is the sign.


# %%
wrong = leap_and_few_steps([999, 666], everything, generators(0, range(6)), bug="latents")
for name, z in (("estimate", held_out[0]), ("latents", wrong)):
    values = summary(model.decode(z).detach().clamp(0, 1)[None])
    print("{} decoded: PSNR {:.1f}, judge {:.0f}".format(name, *values[:2]))
caught(lambda: check("what is decoded", wrong, held_out[0], 1e-3))


def has_spread(images):
    spread = images.double().numpy().std(axis=0).max()
    assert spread > 0, f"{len(images)} seeds made one picture, to the last bit: was the noise theirs?"


careless = torch.stack([sample(few[1], lr_all[:2], prompts[:2], generators(0, range(2))) for seed in noise_seeds])
has_spread(made["1 evaluation"])
caught(lambda: has_spread(careless))

# %% [markdown]
# ## 7 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up).** You can afford $k\ge2$ evaluations of $n=12$ with $t_{max}=2/3$. Return $t_{min}$.
# <details><summary>Hint</summary>How many of the 12 timesteps does section 2's table keep for a $t_{min}$, and what comes before
# them?</details>


# %%
def t_min_for(k):
    raise NotImplementedError


def verify_t_min():
    for k in (2, 4, 7, 9):
        process = NonUniformProcess(diffusion, 12, 2 / 3, t_min_for(k), "v2", 999)
        check(f"asked for {k}", len(process), k, 0)


exercise(1, verify_t_min)


# %% [markdown]
# **Exercise 2.** A hundred seeds of large pictures do not fit into memory. Return L-STD of one image whose samples
# [3, H, W] come one at a time, holding three pictures at most: border of 4, deviations of a population.
# <details><summary>Hint</summary>The variance is the mean of the squares minus the square of the mean, in 64 bits; it can
# come out slightly below zero.</details>


# %%
def streaming_l_std(samples):
    raise NotImplementedError


def verify_streaming():
    for images in (six, made["2 evaluations"][:, 0]):
        spread = Spread()
        for image in images:
            spread.add([0], image[None])
        check("one at a time", 1000 * streaming_l_std(iter(images)), 1000 * spread.l_std()[0], 1e-6)


exercise(2, verify_streaming)


# %% [markdown]
# **Exercise 3 (harder).** By what factor does the squared error of a network's answer become that of $\hat z_0$, for
# the three kinds of answer? $\alpha^2+\sigma^2=1$, and velocity is $v=\alpha\varepsilon-\sigma z_0$.
# <details><summary>Hint</summary>Write the estimate of z_0 as a function of the answer at fixed z_t. It is linear; square
# its slope. For velocity first show that z_0 = αz − σv.</details>


# %%
def error_factor(answer, alpha, sigma):
    """``answer`` is "epsilon", "v_prediction" or "sample"."""
    raise NotImplementedError


def verify_factor():
    for answer in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler.from_config(diffusion.config, prediction_type=answer)
        process = NonUniformProcess(scheduler, 6, start_timestep=999)
        for t in (999, 499):
            zero, one = (process.pred_original_sample(x * torch.ones(1, 1), t, torch.zeros(1, 1)) for x in (0, 1))
            ours = error_factor(answer, alpha_bar[t] ** 0.5, (1 - alpha_bar[t]) ** 0.5)
            check(f"{answer} at {t}", ours / (one - zero).square().item(), 1.0, 1e-3)


exercise(3, verify_factor)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Draw eight seeds, keep the result that a reward likes most, and compare it with their mean and with the first. An
#   answer is PSNR, judge and L-STD of the three ways, and what each costs in network calls.
# * Choose $t_{max}$ and $t_{min}$ for three evaluations by measuring a grid of both. An answer is a map of PSNR and
#   of L-STD, and the pairs that nothing else beats in both.
#
# ## Summary
#
# * Spread is a deviation over seeds: of scores G-STD, of pixels L-STD. Their variance is an exact part of the error.
# * Less noise, fewer evaluations, a mixture with bicubic: spread is easily lost. Read it beside fidelity and a judge.
# * CCSR's sampling is one table of timesteps: leap from 999, a few steps, and the estimate at the last one is decoded.
# * With the untrained mini model the scores of one evaluation moved least; two evaluations disagreed more than ten steps,
#   by the leap's own noise.
# * Stage 1 teaches both estimates, through the leap; for networks that answer with noise the first counts 214-fold.
# * Stage 2 moves the decoder alone, against a discriminator of 70 pixels whose share a ratio of gradients sets.
#
# NAVIGATION
