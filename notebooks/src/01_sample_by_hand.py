# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 01 · Sample by hand
#
# **You will write a diffusion sampler in ten lines and get the library's picture from it, number for number.**
#
# Half a minute on two cores; nothing to download. Needs only that you can read a little PyTorch.
#
# NAVIGATION
#
# A diffusion model makes a picture in many small steps, from noise. RFSR puts one loss on the early steps and another on
# the late ones. So its whole method rests on three things: what a step does, what the model believes at that step, and
# how steps are counted. Afterwards you can
#
# * add noise as the model expects it, and read its current guess of the clean picture from whatever it predicts,
# * take one DDIM step, and all fifty,
# * turn sampling steps into timesteps and back, and say why a *noise*-predicting model guesses badly at step 1.

# %%
import copy

import torch

from rfsr_ext.data import evaluation_crops
from rfsr_ext.metrics import psnr
from rfsr_ext.models import Process, load_model
from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show
from rfsr_ext.sampling import TimestepWindows, generators, sample, trajectory

model = load_model("mini")  # a small stand-in for SeeSR or PASD; see rfsr_ext/weights/README.md
scheduler = copy.deepcopy(model.scheduler)
scheduler.set_timesteps(50)
crop = evaluation_crops(["flower"], size=96, count=2)[1]  # a photograph the model has never seen
lr, gt, prompt = crop["lr"][None], crop["gt"][None], crop["prompt"]

# %% [markdown]
# ## 1 · What comes out?
#
# First the result, with the package: a flower that the model has never seen, four times smaller, and what it makes of it.

# %%
result = sample(model, lr, [prompt], generators(0, [0]))
condition = model.condition(lr, [prompt])
titles = ["low resolution\n24×24", f"sampled 96×96\n{psnr(result, gt)[0]:.1f} dB", "truth\n96×96"]
show(
    pictures([lr[0], result[0], gt[0]], titles, tile=2.5),
    "A dahlia in 24 by 24 coarse pixels, the sampled picture with 96 by 96 pixels at "
    f"{psnr(result, gt)[0]:.1f} dB, and the true photograph.",
)

# %% [markdown]
# **What to see.** The rim of the flower is sharp again, and there is texture, all of it invented: the low-resolution
# picture does not tell where one petal ends. The number is PSNR, the closeness to the truth in decibels:
# $-10\log_{10}$ of the mean squared error, so more is closer. The result is blotchy, because this is a model of 6.6 million
# parameters, trained for half an hour on twelve photographs; the published ones have two hundred times as many. The sampler
# around both is the same. Let us build it.
#
# ## 2 · How is noise added?
#
# The model works on *latents*: its autoencoder turns the 96×96 pixels into 24×24 positions with 12 numbers each, and
# decodes them back. Training mixes the clean latents $z_0$ with noise $\varepsilon$, more of it the larger the *timestep*
# $t$:
#
# $$z_t=\sqrt{\bar\alpha_t}\,z_0+\sqrt{1-\bar\alpha_t}\;\varepsilon,\qquad \bar\alpha_t=\prod_{s\le t}(1-\beta_s)$$
#
# The $\beta_s$ say how much noise each timestep adds. They are Stable Diffusion's: their roots grow evenly from
# $\sqrt{0.00085}$ to $\sqrt{0.012}$ over 1000 timesteps.

# %%
betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
alpha_bar = torch.cumprod(1 - betas, 0)  # diffusers: scheduler.alphas_cumprod
check("alpha_bar", alpha_bar, scheduler.alphas_cumprod, 1e-6)
print("t     alpha_bar  picture's share  noise's share")
for t in (1, 201, 401, 601, 801, 981):
    print(f"{t:4d}  {alpha_bar[t]:9.4f}  {alpha_bar[t].sqrt():15.3f}  {(1 - alpha_bar[t]).sqrt():13.3f}")


# %%
def add_noise(z0, noise, t):
    return alpha_bar[t].sqrt() * z0 + (1 - alpha_bar[t]).sqrt() * noise


z0 = model.encode(gt)
noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
for t in (1, 500, 981):
    check(f"noised latents, t = {t}", add_noise(z0, noise, t), scheduler.add_noise(z0, noise, torch.tensor([t])), 1e-6)

# %%
timesteps = [1, 51, 101, 201, 401, 981]
with torch.no_grad():
    noised = [model.decode(add_noise(z0, noise, t))[0] for t in timesteps]
shares = [alpha_bar[t].sqrt().item() for t in timesteps]
show(
    pictures(noised, [f"t = {t}\nshare {a:.2f}" for t, a in zip(timesteps, shares, strict=True)], columns=3, tile=2.0),
    "The noised latents of the flower, decoded. "
    + ", ".join(f"t {t}: share of the picture {a:.2f}" for t, a in zip(timesteps, shares, strict=True))
    + ".",
)

# %% [markdown]
# **What to see.** The finest detail drowns first. At $t=201$ single petals are hard to tell, at $t=401$ the outline of the
# flower still stands, at $t=981$ nothing does. So a model that goes from large to small $t$ decides the outlines first and
# the texture last. That order is what RFSR is built on.
#
# Even at $t=981$, where our 50 steps will begin, the share of the picture is not 0, but 0.08. The eye sees nothing of it;
# a network does, above all the mean colors. So it matters what a sampler starts from (section 5).
#
# ## 3 · What does the model believe?
#
# The network (a U-Net, with a ControlNet beside it that reads the upscaled low-resolution photograph) sees $z_t$ and $t$
# and must say what is noise and what is picture. (That photograph and the encoded prompt are what the code calls
# `condition`.) It may answer in any of three ways, because $z_t$ and one answer determine the rest
# ($\alpha=\sqrt{\bar\alpha_t}$, $\sigma=\sqrt{1-\bar\alpha_t}$):
#
# | it predicts | `prediction_type` | the picture, `pred_original_sample` |
# |---|---|---|
# | noise $\varepsilon$ | `epsilon` | $z_0=(z_t-\sigma\varepsilon)/\alpha$ |
# | velocity $v=\alpha\varepsilon-\sigma z_0$ | `v_prediction` | $z_0=\alpha z_t-\sigma v$ |
# | the picture | `sample` | $z_0$ |
#
# (Velocity, because with $\alpha=\cos\varphi$ and $\sigma=\sin\varphi$ it is $dz_t/d\varphi$: how fast picture turns into
# noise.) **Check the second line on paper** before you run it: insert $z_t$ and $v$ and use $\alpha^2+\sigma^2=1$.


# %%
def z0_from_noise(z_t, noise, t):
    return (z_t - (1 - alpha_bar[t]).sqrt() * noise) / alpha_bar[t].sqrt()


def z0_from_velocity(z_t, v, t):
    return alpha_bar[t].sqrt() * z_t - (1 - alpha_bar[t]).sqrt() * v


t = 601
z_t = add_noise(z0, noise, t)
velocity = alpha_bar[t].sqrt() * noise - (1 - alpha_bar[t]).sqrt() * z0
check("true noise gives the picture back", z0_from_noise(z_t, noise, t), z0, 1e-5)
check("true velocity does, too", z0_from_velocity(z_t, velocity, t), z0, 1e-5)
check("velocity in diffusers", velocity, scheduler.get_velocity(z0, noise, torch.tensor([t])), 1e-6)
declared = type(scheduler).from_config(scheduler.config, prediction_type="epsilon")  # the same schedule, for noise
check("noise in the package", Process(declared, 50).pred_original_sample(noise, t, z_t), z0, 1e-5)

# %% [markdown]
# Now with the network's answer in place of the true one. Ours predicts velocity. The package's noise `Process` knows which
# it is: one object for one run of the sampler, with its timesteps and these formulas.

# %%
with torch.no_grad():
    model_output = model.predict(z_t, torch.tensor(t), condition)
process = model.process(50)
estimate = process.pred_original_sample(model_output, t, z_t)
check("z_0 estimate", z0_from_velocity(z_t, model_output, t), estimate, 1e-6)
print("prediction_type:", scheduler.config.prediction_type)
rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
print(f"root mean square: true velocity {rms(velocity):.2f}, the network's error {rms(model_output - velocity):.2f}")

# %% [markdown]
# ## 4 · Why is noise prediction fragile at step 1?
#
# Suppose the network's answer is off by $\delta$. What does that do to the estimate of the picture? The table of section 3
# says it: divided by $\alpha$ and times $\sigma$ for noise, only times $\sigma$ for velocity. At the first step $\alpha$ is
# small.

# %%
steps = torch.arange(1, 51)
amplify_noise = ((1 - alpha_bar).sqrt() / alpha_bar.sqrt())[scheduler.timesteps]
amplify_velocity = (1 - alpha_bar).sqrt()[scheduler.timesteps]
figure, axes = panels(width=6.4, height=2.6)
axes.semilogy(steps, amplify_noise, label="noise prediction")
axes.semilogy(steps, amplify_velocity, label="velocity prediction")
axes.set(xlabel="sampling step", ylabel="error of z₀ per error δ")
axes.axhline(1, color="#999999", linewidth=0.8)
axes.legend(frameon=False)
show(
    figure,
    f"Two falling curves over the 50 sampling steps. An error in the noise is amplified {amplify_noise[0]:.1f} times at step "
    f"1, {amplify_noise[19]:.1f} times at step 20 and {amplify_noise[49]:.2f} times at step 50. For velocity the factor "
    f"never exceeds {amplify_velocity[0]:.2f}.",
)

# %% [markdown]
# See it in pictures: the same network, the same first step, the same small error of 0.05 in its answer, once in the
# velocity and once in the noise that this velocity implies.

# %%
t = int(scheduler.timesteps[0])
alpha, sigma = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
with torch.no_grad():
    start = model.initial_latents(condition, process, generators(0, [0]))
    v = model.predict(start, torch.tensor(t), condition)
    eps = alpha * v + sigma * start  # the same answer, said as noise
    error = 0.05 * noise
    guesses = {
        "no error": z0_from_velocity(start, v, t),
        "0.05 in velocity": z0_from_velocity(start, v + error, t),
        "0.05 in noise": z0_from_noise(start, eps + error, t),
    }
    decoded = {name: model.decode(z) for name, z in guesses.items()}
check("both answers mean the same picture", z0_from_noise(start, eps, t), guesses["no error"], 1e-4)
titles = [f"{name}\n{psnr(x, gt)[0]:.1f} dB" for name, x in decoded.items()]
show(
    pictures([x[0] for x in decoded.values()], titles, tile=2.0),
    "The model's guess of the flower at step 1: " + "; ".join(title.replace("\n", " ") for title in titles) + ".",
)

# %% [markdown]
# **What to see.** The same error is invisible in the middle and ruins the picture on the right. Published models that predict
# noise live with this because the first steps only need to be roughly right; but RFSR puts a *loss* on the estimate at
# steps 1 to 20, and there it matters. That is why the mini model predicts velocity. (It also explains the tolerance of
# `1e-4` in the check above: rounding is amplified, too.)
#
# ## 5 · What is one step?
#
# DDIM takes the model at its word: keep the estimated picture and the implied noise, and mix them again for a slightly
# smaller timestep $t'=t-20$ (1000 timesteps, 50 steps):
#
# $$z_{t'}=\sqrt{\bar\alpha_{t'}}\;\hat z_0+\sqrt{1-\bar\alpha_{t'}}\;\hat\varepsilon,\qquad
# \hat\varepsilon=\alpha v+\sigma z_t$$


# %%
def ddim_step(z_t, v, t):
    alpha, sigma = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
    z0, noise = alpha * z_t - sigma * v, alpha * v + sigma * z_t
    after = alpha_bar[max(t - 20, 0)]  # the last step ends at timestep 0
    return after.sqrt() * z0 + (1 - after).sqrt() * noise


by_diffusers = scheduler.step(v, scheduler.timesteps[0], start, return_dict=False)[0]
check("one DDIM step", ddim_step(start, v, 981), by_diffusers, 1e-6)

# %% [markdown]
# And the sampler is a loop over it. It begins as SeeSR does, one of the models that the paper trains: not at pure noise,
# but at the latents of the upscaled low-resolution photograph, noised to the first timestep.


# %%
@torch.no_grad()
def sample_by_hand(condition, noise):
    latents = add_noise(model.encode(condition.image), noise, 981)
    farthest = 0.0
    for t in range(981, 0, -20):
        model_output = model.predict(latents, torch.tensor(t), condition)
        theirs = scheduler.step(model_output, torch.tensor(t), latents, return_dict=False)[0]
        latents = ddim_step(latents, model_output, t)
        farthest = max(farthest, (latents - theirs).abs().max().item())
    check("50 steps, the farthest one", farthest, 0.0, 2e-6)
    return latents


ours = sample_by_hand(condition, torch.randn(z0.shape, generator=generators(0, [0])[0]))

# %%
states = list(trajectory(model, condition, generators(0, [0])))  # the package: each state, with its z_0 estimate
check("latents at the end", ours, states[-1][1], 1e-3)
with torch.no_grad():
    check("and the picture of section 1", model.decode(ours).clamp(0, 1), result, 1e-3)

# %% [markdown]
# Each single step agrees with diffusers to the last bits of 32-bit numbers (latents take values of about 4, so `2e-6` is four
# roundings). Over fifty steps through a network such bits grow, which is why the end is compared with `1e-3`, a quarter of
# a gray level.
#
# **What does it cost?** One pass of U-Net and ControlNet per step. The text encoder (0.1 million more) and the decoder
# run once.

# %%
passes = len(scheduler.timesteps)
parameters = sum(p.numel() for p in model.trained_parameters().values())
print(f"{passes} passes through {parameters / 1e6:.1f} million parameters for one picture")

# %% [markdown]
# ## 6 · Which step is which timestep?
#
# The paper counts *sampling steps* st = 1 … 50 (1 is the noisiest) where it speaks of losses, and *timesteps* t = 1000 … 0
# where it speaks of noise. With 50 evenly spaced steps $t=1001-20\,\text{st}$. Its windows are: structure for
# $t\in[600,1000]$, reward for $t\in[0,200]$.


# %%
def timestep_of(st):
    return 1001 - 20 * st


check("all 50 timesteps", [timestep_of(st) for st in range(1, 51)], scheduler.timesteps, 0)
windows = TimestepWindows.from_timesteps(scheduler.timesteps, structure=(600, 1000), reward=(0, 200))
print(" st    t  loss")
for st in (1, 19, 20, 21, 39, 40, 41, 42, 50):
    loss = "structure" if windows.in_structure(st) else "reward" if windows.in_reward(st) else "-"
    print(f"{st:3d}  {timestep_of(st):3d}  {loss}")
assert (windows.structure, windows.reward) == ((1, 20), (41, 50)), "the paper's windows are 1-20 and 41-50"
ends = TimestepWindows.from_timesteps([1000, 600, 599, 201, 200, 0])  # a window holds its ends
assert (ends.structure, ends.reward) == ((1, 2), (5, 6))

# %% [markdown]
# Steps 21 to 40 get no loss at all: the paper trains only the two ends. Watch the estimate along the way: click the
# slider's handle and use the arrow keys. At every position the left picture is what the sampler holds, the middle one what
# the model estimates.

# %%
with torch.no_grad():
    held = torch.cat([model.decode(state.latents) for state, _ in states[:50]])
    believed = torch.cat([model.decode(estimate) for _, estimate in states[:50]])
quality = psnr(believed, gt.expand(50, -1, -1, -1))


def draw(st):
    tiles = [held[st - 1], believed[st - 1], gt[0]]
    titles = [f"z_t, decoded: t = {timestep_of(st)}", f"z_0 estimate: {quality[st - 1]:.1f} dB", "truth"]
    alt = f"Step {st} of 50, timestep {timestep_of(st)}: the estimate of the flower has {quality[st - 1]:.1f} dB."
    return pictures(tiles, titles, tile=2.0), alt


stepper = explore(draw, values=[1, *range(5, 51, 5)], label="sampling step")
stepper

# %%
stepper.slider.value = 20
chosen = [1, 10, 20, 30, 40, 50]
show(
    pictures([believed[st - 1] for st in chosen], [f"st {st}\n{quality[st - 1]:.1f} dB" for st in chosen], 3, tile=2.0),
    "The z_0 estimate at six steps: " + ", ".join(f"step {st} {quality[st - 1]:.1f} dB" for st in chosen) + ".",
)

# %% [markdown]
# **What to see.** The outlines are there at step 1, smooth and without texture, and the first half of the run hardly
# improves them. Then texture comes, and the picture moves *away* from the truth, because invented texture is rarely in the
# right place. A picture may look sharper and measure worse. RFSR works in the gap between the two.
#
# ## 7 · A bug, and the check that catches it
#
# The classic mistake: an index off by one, here $t'=t-19$. One step is then wrong by two thousandths, which no eye would
# find.


# %%
def wrong_step(z_t, v, t):
    z0, noise = z0_from_velocity(z_t, v, t), alpha_bar[t].sqrt() * v + (1 - alpha_bar[t]).sqrt() * z_t
    after = alpha_bar[t - 19]
    return after.sqrt() * z0 + (1 - after).sqrt() * noise


caught(lambda: check("one DDIM step", wrong_step(start, v, 981), by_diffusers, 1e-6))

# %% [markdown]
# ## 8 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. A solution is folded away under each. (`steps` is 1 to
# 50; `noise`, `start` and `v` are those of sections 2 and 4.)
#
# **Exercise 1 (warm-up).** Which sampling step has timestep `t`?
# <details><summary>Hint</summary>Solve t = 1001 − 20·st for st.</details>


# %%
def step_of(t):
    raise NotImplementedError


exercise(1, lambda: check("steps", [step_of(int(t)) for t in scheduler.timesteps], steps, 0))


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution to exercise 1 (expand to read)
def step_of(t):
    return (1001 - t) // 20


exercise(1, lambda: check("steps", [step_of(int(t)) for t in scheduler.timesteps], steps, 0))

# %% [markdown]
# **Exercise 2.** A colleague's model predicts noise. Turn its answer into the velocity our sampler wants.
# <details><summary>Hint</summary>First the picture from the noise, then v = αε − σz₀. It can be simplified to
# (ε − σ z_t)/α.</details>


# %%
def velocity_from_noise(z_t, noise, t):
    raise NotImplementedError


def verify_velocity():
    z_t = add_noise(z0, noise, 301)
    wanted = scheduler.get_velocity(z0, noise, torch.tensor([301]))
    check("velocity", velocity_from_noise(z_t, noise, 301), wanted, 1e-5)


exercise(2, verify_velocity)


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution to exercise 2 (expand to read)
def velocity_from_noise(z_t, noise, t):
    return (noise - (1 - alpha_bar[t]).sqrt() * z_t) / alpha_bar[t].sqrt()


exercise(2, verify_velocity)

# %% [markdown]
# **Exercise 3 (harder).** DDIM's $\eta$ replaces part of the implied noise by fresh noise $n$:
# $s=\eta\sqrt{\tfrac{1-\bar\alpha_{t'}}{1-\bar\alpha_t}}\sqrt{1-\tfrac{\bar\alpha_t}{\bar\alpha_{t'}}}$ and
# $z_{t'}=\sqrt{\bar\alpha_{t'}}\hat z_0+\sqrt{1-\bar\alpha_{t'}-s^2}\,\hat\varepsilon+s\,n$. Write that step.
# <details><summary>Hint</summary>Start from `ddim_step`; only its last line changes. Test with η = 0 first.</details>


# %%
def stochastic_step(z_t, v, t, eta, fresh):
    raise NotImplementedError


def verify_stochastic():
    t = scheduler.timesteps[10]
    theirs = scheduler.step(v, t, start, eta=0.7, variance_noise=noise, return_dict=False)[0]
    check("step with eta 0.7", stochastic_step(start, v, int(t), 0.7, noise), theirs, 1e-5)


exercise(3, verify_stochastic)


# %% tags=["solution"] jupyter={"source_hidden": true}
# Solution to exercise 3 (expand to read)
def stochastic_step(z_t, v, t, eta, fresh):
    alpha, sigma = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
    z0, implied = alpha * z_t - sigma * v, alpha * v + sigma * z_t
    before, after = alpha_bar[t], alpha_bar[max(t - 20, 0)]
    s = eta * ((1 - after) / (1 - before)).sqrt() * (1 - before / after).sqrt()
    return after.sqrt() * z0 + (1 - after - s**2).sqrt() * implied + s * fresh


exercise(3, verify_stochastic)

# %% [markdown]
# ## Summary
#
# * Noising mixes picture and noise: $z_t=\alpha z_0+\sigma\varepsilon$ with $\alpha^2+\sigma^2=1$.
# * From noise, velocity or picture the other two follow; `pred_original_sample` is the model's estimate at a step.
# * At step 1 an error in the noise reaches the picture thirteen times larger, an error in the velocity does not.
# * A DDIM step mixes estimate and implied noise anew for a smaller timestep; the sampler is that, fifty times.
# * st = 1 … 50 is t = 981 … 1; structure is trained at st 1–20, rewards at 41–50, nothing between.
#
# NAVIGATION
