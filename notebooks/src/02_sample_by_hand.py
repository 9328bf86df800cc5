# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 02 · Sample by hand
#
# **You will write a diffusion sampler in ten lines and get the library's picture from it, number for number.**
#
# Half a minute on two cores; nothing to download. Needs only that you can read a little PyTorch.
#
# NAVIGATION
#
# A diffusion model makes a picture in many small steps, each of which takes some noise away. RFSR puts one loss on the
# early steps and another on the late ones. So its whole method rests on three things: what a step does, what the model
# estimates at that step, and how steps are counted. Afterwards you can
#
# * add noise as the model expects it, and read its current estimate of the clean picture from whatever it predicts,
# * take one DDIM step, and all fifty,
# * turn sampling steps into timesteps and back, and say why a *noise*-predicting model guesses badly at step 1.

# %%
import copy

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from rfsr_ext.data import Degradation, evaluation_crops
from rfsr_ext.metrics import psnr
from rfsr_ext.models import Process, load_model
from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show, spoken
from rfsr_ext.sampling import TimestepWindows, generators, sample, trajectory

model = load_model("mini")  # a small stand-in for SeeSR or PASD; see rfsr_ext/weights/README.md
scheduler = copy.deepcopy(model.scheduler)
scheduler.set_timesteps(50)
crop = evaluation_crops(["flower"], size=96, count=2)[1]  # a photograph the model has never seen
lr, gt, prompt = crop["lr"][None], crop["gt"][None], crop["prompt"]

# %% [markdown]
# ## 1 · What comes out?
#
# First the result, with the package: a flower that the model has never seen, and what it makes of it. The low resolution
# is four times smaller, and before and after the shrinking a little was spoiled: blur, noise and a JPEG file, drawn at
# random from the ranges below. Beside the model stands *bicubic* enlargement, which needs no network.

# %%
spoiled = Degradation.preset("mini").first
print(f"blur of σ {spoiled.blur_sigma} pixels, noise of σ {spoiled.noise_range} of 255, "
      f"JPEG of quality {spoiled.jpeg_range}, colors {spoiled.jpeg_subsampling}")  # fmt: skip
result = sample(model, lr, [prompt], generators(0, [0]))
condition = model.condition(lr, [prompt])
bicubic = F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)
check("what the model sees of the photograph is its bicubic enlargement", condition.image, bicubic, 1e-6)
by_both = {"bicubic": bicubic, "sampled": result}
titles = [f"{name}\n{psnr(x, gt)[0]:.1f} dB" for name, x in by_both.items()]
show(
    pictures([lr[0], bicubic[0], result[0], gt[0]], ["low resolution\n24×24", *titles, "truth\n96×96"], tile=1.92),
    "A dahlia in 24 by 24 coarse pixels; enlarged to 96 by 96 pixels, "
    + " and ".join(title.replace("\n", " ") for title in titles)
    + "; and the true photograph.",
)

# %% [markdown]
# **What to see.** Compare the two in the middle: whose edges are sharper, and who invents texture? The low resolution does
# not tell where one petal ends, so whatever is there must be invented. The number is PSNR, the closeness to the truth in
# decibels: $-10\log_{10}$ of the mean squared error, so more is closer. Bicubic enlargement invents nothing and is hard to
# beat in it: no network that draws new detail gets there by being sharp alone. This one is small and was trained for less
# than an hour; the published ones are hundreds of times as large. The sampler around both is the same. Let us build it.
#
# ## 2 · How is noise added?
#
# The model works on *latents*: its autoencoder turns 96×96 pixels into 24×24 positions with a few numbers each, and
# decodes them back. Clean latents $z_0$ are mixed with noise $\varepsilon$, more of it the larger the *timestep* $t$:
#
# $$z_t=\alpha_t\,z_0+\sigma_t\,\varepsilon,\qquad \alpha_t=\sqrt{\bar\alpha_t},\quad
# \sigma_t=\sqrt{1-\bar\alpha_t},\qquad \bar\alpha_t=\prod_{s\le t}(1-\beta_s)$$
#
# The $\beta_s$ say how much noise each timestep adds. In *Stable Diffusion*, on which the paper's models are built, their
# roots grow evenly from $\sqrt{0.00085}$ to $\sqrt{0.012}$ over 1000 timesteps. In our mini model all $\beta_s$ are equal
# and small.

# %%
betas = torch.linspace(scheduler.config.beta_start, scheduler.config.beta_end, 1000)
alpha_bar = torch.cumprod(1 - betas, 0)  # diffusers: scheduler.alphas_cumprod
check("alpha_bar of the mini model", alpha_bar, scheduler.alphas_cumprod, 1e-6)
sd = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
sd.set_timesteps(50)
sd_alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
check("alpha_bar of Stable Diffusion", sd_alpha_bar, sd.alphas_cumprod, 1e-6)
print(f"latents of {model.latent_channels} numbers, instead of {3 * 4 * 4} in 4×4 pixels\n")
print("        mini model          Stable Diffusion\n  t    picture   noise      picture   noise")
for t in (19, 199, 399, 599, 799, 999):
    shares = [share.sqrt().item() for bar in (alpha_bar, sd_alpha_bar) for share in (bar[t], 1 - bar[t])]
    print("{:4d}   {:6.3f}   {:6.3f}      {:6.3f}   {:6.3f}".format(t, *shares))


# %%
def add_noise(z0, noise, t, bar=alpha_bar):
    return bar[t].sqrt() * z0 + (1 - bar[t]).sqrt() * noise


z0 = model.encode(gt)
noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
for t in (19, 499, 999):
    check(f"noised latents, t = {t}", add_noise(z0, noise, t), scheduler.add_noise(z0, noise, torch.tensor([t])), 1e-6)

# %%
noised, titles = [], []
with torch.no_grad():
    for name, bar in (("Stable Diffusion", sd_alpha_bar), ("mini model", alpha_bar)):
        for t in (199, 599, 999):
            noised.append(model.decode(add_noise(z0, noise, t, bar))[0])
            titles.append(f"{name}, t = {t}\nnoise {(1 - bar[t]).sqrt():.2f}")
show(
    pictures(noised, titles, columns=3, tile=1.92),
    "The noised latents of the flower, decoded: " + spoken(titles),
)

# %% [markdown]
# **What to see.** The upper row is Stable Diffusion's. The finest detail drowns first, and at $t=999$ nothing of the flower
# is left. So a model that goes from large to small $t$ decides the outlines first and the texture last. That order is what
# RFSR is built on.
#
# The lower row is ours: even at $t=999$ the flower is there. A small model could not find a flower in noise. It does not
# have to: it starts from the *enlarged* photograph, whose latents $z_{LR}$ are not far from the truth's, and only fills in
# what that lacks. How far, the next cell says, and what the autoencoder alone loses. In training its noise also held the difference, so that the noisiest
# $z_T$ is the noised *enlarged* photograph, and every $z_t$ lies on the straight way from there to the truth (as in
# ResShift, another super-resolution model):
#
# $$z_t=\alpha_t\,z_0+\sigma_t\Bigl(\varepsilon+\frac{\alpha_T}{\sigma_T}(z_{LR}-z_0)\Bigr)
# \qquad\Rightarrow\qquad z_T=\alpha_T\,z_{LR}+\sigma_T\,\varepsilon$$

# %%
T = int(scheduler.timesteps[0])
alpha_T, sigma_T = alpha_bar[T].sqrt(), (1 - alpha_bar[T]).sqrt()
z_lr = model.encode(bicubic)
of_training = noise + (z_lr - z0) * alpha_T / sigma_T
with torch.no_grad():
    print(
        f"the truth, encoded and decoded: {psnr(model.decode(z0).clamp(0, 1), gt)[0]:.1f} dB, about the most that a sample can reach"
    )
check("z_T is the noised enlarged photograph", add_noise(z0, of_training, T), add_noise(z_lr, noise, T), 1e-5)
rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
print(f"root mean square of z_0 {rms(z0):.2f}, of z_LR − z_0 {rms(z_lr - z0):.2f}; noise at the start {sigma_T:.2f}")

# %% [markdown]
# ## 3 · What does the model estimate?
#
# The network is a U-Net, which first shrinks and then enlarges the latents, with a *ControlNet* beside it: a copy of its
# shrinking half that reads the enlarged photograph and adds what it finds at every size. Both see $z_t$ and $t$ and must
# say what is noise and what is picture. (Enlarged photograph and encoded prompt are what the code calls `condition`.)
#
# ```text
# z_t, t ──────────────────────▶ U-Net ↓ ─────────▶ U-Net ↑ ──▶ answer
# z_t, t, enlarged photograph ─▶ ControlNet ↓ ──(+ at every size)──┘
# prompt ─▶ text encoder ──(attention)──▶ both
# ```
#
# How it is trained: notebook [01](01_make_such_a_model.ipynb), section 4. The answer may be given in any of three ways,
# because $z_t$ and one answer determine the rest:
#
# | it predicts | `prediction_type` | the picture, `pred_original_sample` | for example |
# |---|---|---|---|
# | noise $\varepsilon$ | `epsilon` | $z_0=(z_t-\sigma\varepsilon)/\alpha$ | SeeSR, PASD |
# | velocity $v=\alpha\varepsilon-\sigma z_0$ | `v_prediction` | $z_0=\alpha z_t-\sigma v$ | Stable Diffusion 2.1 |
# | the picture | `sample` | $z_0$ | the mini model |
#
# (Velocity, because with $\alpha=\cos\varphi$ and $\sigma=\sin\varphi$ it is $dz_t/d\varphi$: how fast picture turns into
# noise.) **Check the second line on paper** before you run it: insert $z_t$ and $v$ and use $\alpha^2+\sigma^2=1$.


# %%
def z0_from_noise(z_t, noise, t, bar=alpha_bar):
    return (z_t - (1 - bar[t]).sqrt() * noise) / bar[t].sqrt()


def z0_from_velocity(z_t, v, t, bar=alpha_bar):
    return bar[t].sqrt() * z_t - (1 - bar[t]).sqrt() * v


t = 601
z_t = add_noise(z0, noise, t, sd_alpha_bar)
velocity = sd_alpha_bar[t].sqrt() * noise - (1 - sd_alpha_bar[t]).sqrt() * z0
check("true noise gives the picture back", z0_from_noise(z_t, noise, t, sd_alpha_bar), z0, 1e-5)
check("true velocity does, too", z0_from_velocity(z_t, velocity, t, sd_alpha_bar), z0, 1e-5)
check("velocity in diffusers", velocity, sd.get_velocity(z0, noise, torch.tensor([t])), 1e-6)
for kind, answer in (("epsilon", noise), ("v_prediction", velocity), ("sample", z0)):
    declared = type(sd).from_config(sd.config, prediction_type=kind)  # the same schedule for another answer
    check(f"{kind} in the package", Process(declared, 50).pred_original_sample(answer, t, z_t), z0, 1e-5)

# %% [markdown]
# Now with the network's answer in place of the true one, at the first step. The package's noise `Process` knows what kind
# of answer it is: one object for one run of the sampler, with its timesteps and these formulas.

# %%
process = model.process(50)
with torch.no_grad():
    start = model.initial_latents(condition, process, generators(0, [0]))
    model_output = model.predict(start, torch.tensor(T), condition)
print("prediction_type:", scheduler.config.prediction_type)
check("z_0 estimate", model_output, process.pred_original_sample(model_output, T, start), 0)
print(f"distance from the truth: enlarged photograph {rms(z_lr - z0):.3f}, first estimate {rms(model_output - z0):.3f}")

# %% [markdown]
# ## 4 · Why is noise prediction fragile at step 1?
#
# Suppose the network's answer is off by $\delta$. What does that do to the estimate of the picture? The table of section 3
# says it: divided by $\alpha$ and times $\sigma$ for noise, times $\sigma$ for velocity, nothing for the picture itself. At
# the first step of Stable Diffusion's schedule $\alpha$ is small.

# %%
steps = torch.arange(1, 51)
factors = {
    "noise, Stable Diffusion": ((1 - sd_alpha_bar).sqrt() / sd_alpha_bar.sqrt())[sd.timesteps],
    "velocity, Stable Diffusion": (1 - sd_alpha_bar).sqrt()[sd.timesteps],
    "noise, on the mini model's schedule": ((1 - alpha_bar).sqrt() / alpha_bar.sqrt())[scheduler.timesteps],
    "picture, the mini model": torch.ones(50),
}
figure, axes = panels(width=6.4, height=3.0)
for name, factor in factors.items():
    axes.semilogy(steps, factor, label=name)
axes.set(xlabel="sampling step", ylabel="error of z₀ per error δ")
axes.legend(frameon=False, fontsize=8)
show(
    figure,
    "Four curves over the 50 sampling steps: by how much an error of the answer is multiplied. "
    + "; ".join(f"{name}: {x[0]:.2f} at step 1, {x[19]:.2f} at 20, {x[49]:.2f} at 50" for name, x in factors.items())
    + ".",
)

# %% [markdown]
# See it in pictures: Stable Diffusion's first step, the *true* answer, and on it the same small error of 0.05, given once
# as picture, once as velocity and once as noise. (No network takes part: the four pictures show the formulas alone.)

# %%
t = int(sd.timesteps[0])
z_t = add_noise(z0, noise, t, sd_alpha_bar)
velocity = sd.get_velocity(z0, noise, torch.tensor([t]))
error = 0.05 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(1))
guesses = {
    "no error": z0_from_noise(z_t, noise, t, sd_alpha_bar),
    "0.05 in the picture": z0 + error,
    "0.05 in the velocity": z0_from_velocity(z_t, velocity + error, t, sd_alpha_bar),
    "0.05 in the noise": z0_from_noise(z_t, noise + error, t, sd_alpha_bar),
}
check("all true answers mean the same picture", guesses["no error"], z0, 1e-4)
with torch.no_grad():
    decoded = {name: model.decode(z) for name, z in guesses.items()}
titles = [f"{name}\n{psnr(x, gt)[0]:.1f} dB" for name, x in decoded.items()]
show(
    pictures([x[0] for x in decoded.values()], titles, tile=1.92),
    "The flower as step 1 would estimate it: " + spoken(titles),
)

# %% [markdown]
# **What to see.** The same error is hardly seen in the two in the middle and ruins the picture on the right. Published
# models that predict noise live with this because the first steps only need to be roughly right; but RFSR puts a *loss* on
# the estimate at steps 1 to 20, and there it matters twice. The estimate is bad, and by the chain rule the gradient that
# comes back to the network is multiplied by the same factor: the next cell says how much harder step 1 pushes than step
# 20. (It also explains the tolerance of `1e-4` above: rounding is amplified, too.) The paper does not speak of it.
#
# Our model's schedule has no such step: there even noise would be safe. It answers with the picture for another reason,
# which its makers found by trying: a small network does not understand all of the noise, and what it does not understand,
# a noise-predicting one leaves in the picture as speckle. One that answers with the picture leaves it away.

# %%
answer = noise.clone().requires_grad_()
(pushed,) = torch.autograd.grad(z0_from_noise(z_t, answer, t, sd_alpha_bar).sum(), answer)
amplified = factors["noise, Stable Diffusion"]
check("gradient per gradient at the picture", pushed, -amplified[0].expand_as(pushed), 1e-4)
print(f"noise prediction, Stable Diffusion: step 1 pushes {amplified[0] / amplified[19]:.1f} times as hard as step 20")

# %% [markdown]
# ## 5 · What is one step?
#
# DDIM takes the model at its word: keep the estimated picture and the noise that it implies, and mix them again for a
# slightly smaller timestep $t'=t-20$ (1000 timesteps, 50 steps). The last step ends without noise, $\bar\alpha=1$:
#
# $$z_{t'}=\alpha_{t'}\,\hat z_0+\sigma_{t'}\,\hat\varepsilon,\qquad
# \hat\varepsilon=\frac{z_t-\alpha_t\hat z_0}{\sigma_t}$$


# %%
def share_after(t):
    return alpha_bar[t - 20] if t >= 20 else torch.tensor(1.0)


def ddim_step(z_t, z0, t):
    implied = (z_t - alpha_bar[t].sqrt() * z0) / (1 - alpha_bar[t]).sqrt()
    after = share_after(t)
    return after.sqrt() * z0 + (1 - after).sqrt() * implied


by_diffusers = scheduler.step(model_output, scheduler.timesteps[0], start, return_dict=False)[0]
check("one DDIM step", ddim_step(start, model_output, T), by_diffusers, 1e-6)

# %% [markdown]
# And the sampler is a loop over it. It begins as SeeSR does, one of the models that the paper trains: not at pure noise,
# but at the latents of the enlarged photograph, noised to the first timestep. (On Stable Diffusion's schedule the share of
# the picture is then 0.08. The eye sees nothing of it; a network does, above all the mean colors.) The noise is multiplied
# with a *temperature*, 1 in most models. The mini model's recipe says 0.7: of all the noise it was trained with it makes
# a texture, like a canvas's, on every surface.


# %%
@torch.no_grad()
def sample_by_hand(condition, noise):
    latents = add_noise(model.encode(condition.image), model.recipe.temperature * noise, T)
    check("the start, by hand and package", latents, start, 1e-5)
    farthest = 0.0
    for t in scheduler.timesteps.tolist():
        estimate = model.predict(latents, torch.tensor(t), condition)
        theirs = scheduler.step(estimate, torch.tensor(t), latents, return_dict=False)[0]
        latents = ddim_step(latents, estimate, t)
        farthest = max(farthest, (latents - theirs).abs().max().item())
    check("50 steps, the farthest one", farthest, 0.0, 5e-6)
    return latents


ours = sample_by_hand(condition, torch.randn(z0.shape, generator=generators(0, [0])[0]))

# %%
states = list(trajectory(model, condition, generators(0, [0])))  # the package: each state, with its z_0 estimate
check("latents at the end", ours, states[-1][1], 1e-3)
with torch.no_grad():
    check("and the picture of section 1", model.decode(ours).clamp(0, 1), result, 1e-3)

# %% [markdown]
# Each single step agrees with diffusers to the last bits of 32-bit numbers. Over fifty steps through a network such bits
# grow, which is why the end is compared with `1e-3`, a quarter of a gray level.
#
# **What does it cost?** One pass of U-Net and ControlNet per step. The text encoder and the decoder run once. (SeeSR and PASD
# need two passes: they ask the network without the prompt, too, or with a *negative* one, "blurry, lowres", and move the
# answer away from that. This is *classifier-free guidance*; the mini model does without.)

# %%
passes = len(scheduler.timesteps)
parameters = sum(p.numel() for p in model.trained_parameters().values())
print(f"{passes} passes through {parameters / 1e6:.1f} million parameters for one picture")

# %% [markdown]
# ## 6 · Which step is which timestep?
#
# The paper counts *sampling steps* st = 1 … 50 (1 is the noisiest) where it speaks of losses, and *timesteps* t = 1000 … 0
# where it speaks of noise. Its windows are: structure for $t\in[600,1000]$, reward for $t\in[0,200]$. How 50 steps are laid
# over 1000 timesteps is a setting of the scheduler: of every twenty, ours takes the last, $t=1019-20\,\text{st}$
# (`trailing`), Stable Diffusion's the second, $t=1001-20\,\text{st}$ (`leading`). The windows are the same steps in both.


# %%
def timestep_of(st):
    return 1019 - 20 * st


check("all 50 timesteps", [timestep_of(st) for st in range(1, 51)], scheduler.timesteps, 0)
check("and Stable Diffusion's", [1001 - 20 * st for st in range(1, 51)], sd.timesteps, 0)
windows = TimestepWindows.from_timesteps(scheduler.timesteps, structure=(600, 1000), reward=(0, 200))
print(" st    t  noise  loss")
for st in (1, 19, 20, 21, 39, 40, 41, 42, 50):
    loss = "structure" if windows.in_structure(st) else "reward" if windows.in_reward(st) else "-"
    print(f"{st:3d}  {timestep_of(st):3d}   {(1 - alpha_bar[timestep_of(st)]).sqrt():.3f}  {loss}")
assert (windows.structure, windows.reward) == ((1, 20), (41, 50)), "the paper's windows are 1-20 and 41-50"
assert TimestepWindows.from_timesteps(sd.timesteps) == windows
ends = TimestepWindows.from_timesteps([1000, 600, 599, 201, 200, 0])  # a window holds its ends
assert (ends.structure, ends.reward) == ((1, 2), (5, 6))

# %% [markdown]
# Steps 21 to 40 get no loss at all: the paper trains only the two ends. Watch the estimate along the way: click the
# slider's handle and use the arrow keys. At every position the second picture is what the sampler holds, the third what
# the model estimates.

# %%
with torch.no_grad():
    held = torch.cat([model.decode(state.latents) for state, _ in states[:50]])
    estimates = torch.cat([model.decode(estimate) for _, estimate in states[:50]])
quality = psnr(estimates.clamp(0, 1), gt.expand(50, -1, -1, -1))


def draw(st):
    tiles = [bicubic[0], held[st - 1], estimates[st - 1], gt[0]]
    titles = ["bicubic", f"z_t, decoded: t = {timestep_of(st)}", f"z_0 estimate: {quality[st - 1]:.1f} dB", "truth"]
    alt = f"Step {st} of 50, timestep {timestep_of(st)}: the estimate of the flower has {quality[st - 1]:.1f} dB."
    return pictures(tiles, titles, tile=1.92), alt


stepper = explore(draw, values=[1, *range(5, 51, 5)], label="sampling step")
stepper

# %%
stepper.slider.value = 20
chosen = [1, 10, 20, 30, 40, 50]
titles = [f"st {st}\n{quality[st - 1]:.1f} dB" for st in chosen]
show(
    pictures([bicubic[0], *(estimates[st - 1] for st in chosen), gt[0]],
             [f"bicubic\n{psnr(bicubic, gt)[0]:.1f} dB", *titles, "truth\n"], columns=4, tile=1.92),
    "Bicubic enlargement, the z_0 estimate at six steps, and the truth: "
    + ", ".join(title.replace("\n", " ") for title in titles) + ".",
)  # fmt: skip
best = int(quality.argmax())
print(f"bicubic {psnr(bicubic, gt)[0]:.2f} dB; estimate at step 1 {quality[0]:.2f}, best at step {best + 1} "
      f"{quality[best]:.2f}, at step 50 {quality[49]:.2f}")  # fmt: skip

# %% [markdown]
# **What to see.** The outlines are there at step 1: they were given. Follow one petal's edge and one dark gap through the
# six estimates and say at which step it becomes sharp. Then read the line below. Sharper is not closer: invented texture is
# rarely in the right place, so wherever PSNR falls from its best step to step 50, the later steps pay fidelity for
# detail. RFSR works in the gap between the two, and CCSR asks whether most steps could go (notebook
# [16](16_leave_less_to_chance.ipynb), section 2).
#
# ## 7 · A bug, and the check that catches it
#
# The classic mistake: an index off by one, here $t'=t-19$. One step is then wrong by less than a thousandth, which no eye
# would find.


# %%
def wrong_step(z_t, z0, t):
    implied = (z_t - alpha_bar[t].sqrt() * z0) / (1 - alpha_bar[t]).sqrt()
    after = alpha_bar[t - 19]
    return after.sqrt() * z0 + (1 - after).sqrt() * implied


caught(lambda: check("one DDIM step", wrong_step(start, model_output, T), by_diffusers, 1e-6))

# %% [markdown]
# ## 8 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS. (`steps` is 1 to 50;
# `noise`, `start` and `model_output` are those of sections 2 and 3.)
#
# **Exercise 1 (warm-up).** Which sampling step of the mini model has timestep `t`?
# <details><summary>Hint</summary>Section 6 has the rule the other way round.</details>


# %%
def step_of(t):
    raise NotImplementedError


exercise(1, lambda: check("steps", [step_of(int(t)) for t in scheduler.timesteps], steps, 0))


# %% [markdown]
# **Exercise 2.** A colleague's model predicts velocity, your sampler wants noise. Translate.
# <details><summary>Hint</summary>First the picture from the velocity, then the noise that it implies; then
# simplify.</details>


# %%
def noise_from_velocity(z_t, v, t):
    raise NotImplementedError


def verify_noise():
    z_t = add_noise(z0, noise, 901)
    v = scheduler.get_velocity(z0, noise, torch.tensor([901]))
    check("noise", noise_from_velocity(z_t, v, 901), noise, 1e-4)


exercise(2, verify_noise)


# %% [markdown]
# **Exercise 3 (harder).** DDIM's $\eta$ replaces part of the implied noise by fresh noise $n$:
# $s=\eta\sqrt{\tfrac{1-\bar\alpha_{t'}}{1-\bar\alpha_t}}\sqrt{1-\tfrac{\bar\alpha_t}{\bar\alpha_{t'}}}$ and
# $z_{t'}=\sqrt{\bar\alpha_{t'}}\hat z_0+\sqrt{1-\bar\alpha_{t'}-s^2}\,\hat\varepsilon+s\,n$. Write that step.
# <details><summary>Hint</summary>Start from `ddim_step`; only its last line changes. Test with η = 0 first.</details>


# %%
def stochastic_step(z_t, z0, t, eta, fresh):
    raise NotImplementedError


def verify_stochastic():
    t = scheduler.timesteps[10]
    theirs = scheduler.step(model_output, t, start, eta=0.7, variance_noise=noise, return_dict=False)[0]
    check("step with eta 0.7", stochastic_step(start, model_output, int(t), 0.7, noise), theirs, 2e-5)


exercise(3, verify_stochastic)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * How few steps are enough? Sample six photographs in 50, 20, 10, 5, 2 and 1 steps from the same noise. An answer is
#   PSNR over the number of steps with its spread over seeds, and the number that you would use.
# * Write a step of second order, which extrapolates the estimates of two steps. Do ten such steps come nearer to the
#   result of fifty than ten DDIM steps? An answer is both distances, over several seeds and photographs.
#
# ## Summary
#
# * Noising mixes picture and noise: $z_t=\alpha z_0+\sigma\varepsilon$ with $\alpha^2+\sigma^2=1$.
# * Stable Diffusion's schedule ends in noise; the mini model's in the noised enlarged photograph, its start.
# * From noise, velocity or picture the other two follow; `pred_original_sample` is the model's estimate at a step.
# * At Stable Diffusion's step 1 an error in the noise reaches the picture thirteen times larger, and so does the gradient
#   that comes back.
# * A DDIM step mixes estimate and implied noise anew for a smaller timestep; the sampler is that, fifty times.
# * st = 1 … 50 is t = 999 … 19 here; structure is trained at st 1–20, rewards at 41–50, nothing between.
#
# NAVIGATION
