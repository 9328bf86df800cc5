# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 01 · Make such a model
#
# **You will make every part of a small super-resolution diffusion model by hand, and measure what each part is worth.**
#
# Half a minute on two cores; nothing to download. Needs only that you can read a little PyTorch.
#
# NAVIGATION
#
# RFSR begins with a pre-trained diffusion model: a network that has learned to say what lies under noise. A *sampler*
# starts from noise and calls it many times, each time taking a little noise away (the next notebook writes one). This
# notebook asks where such a model comes from: pairs of pictures, an autoencoder, a noise schedule, a loss, a
# ControlNet, a text encoder. Our example is the *mini model* of this package, a small stand-in ([its
# card](../rfsr_ext/weights/README.md)). What it does well or badly says nothing about published models; the formulas
# are theirs, too. Afterwards you can
#
# * make a low-resolution picture from a sharp one, to the bit like the package,
# * choose a noise schedule for given latents, and say what happens if the two do not fit,
# * turn one denoising loss into another, and compare a trained network with the best formula,
# * measure what ControlNet, prompt and guidance bring, and say so when the answer is "nothing".

# %%
import dataclasses
import io

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDIMScheduler
from PIL import Image
from scipy.fft import dctn, idctn
from torch import nn

from rfsr_ext.data import Degradation, PhotographCrops, evaluation_crops, photographs
from rfsr_ext.data.degradation import jpeg_transform
from rfsr_ext.data.images import jpeg, to_uint8
from rfsr_ext.metrics import psnr
from rfsr_ext.mini import architecture
from rfsr_ext.mini.linear_start import LinearAutoencoder, LinearEstimator, load_linear_estimate, load_linear_map
from rfsr_ext.mini.stage import Stage
from rfsr_ext.models import Process, load_model
from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show, together
from rfsr_ext.sampling import denoise

torch.set_grad_enabled(False)  # switched on where something learns
model = load_model("mini")
test = evaluation_crops(photographs("test"), size=64, count=16)  # of three photographs, never trained on
lr, gt = (torch.stack([crop[key] for crop in test]) for key in ("lr", "gt"))
prompts = [crop["prompt"] for crop in test]

# %% [markdown]
# ## 1 · From a sharp picture to a low-resolution one
#
# Nobody has two photographs of one moment, a sharp one and a poor one. So the poor one is *made*, and the network
# learns to undo exactly what was done to it. The mini model's pairs come from four operations: a Gaussian blur,
# shrinking to a quarter, a little noise, and a JPEG file. (Published models use a longer chain of the same operations,
# twice: [what each preset does to a photograph](../docs/degradations.png).) Their strengths are drawn at random. Each
# is a few lines of NumPy.
#
# * **Blur**: a weighted mean with $w_k\propto e^{-k^2/2\sigma^2}$, rows first, then columns; beyond the edge the last
#   pixel repeats. Weights farther than $4\sigma$ are left out.
# * **Shrinking**: every new pixel is a weighted mean of the old ones, by their distance $d$ in *new* pixels: all with
#   $d<\tfrac12$ (box), $1-d$ (triangle), or a cubic that is negative between 1 and 2.
#
# The next cell but one runs the whole chain beside the package's `Degradation`. Both get the same random generator, so
# the draws must come in the same order, too: blur, filter, noise, quality.


# %%
def blur(image, sigma):
    reach = int(4 * sigma + 0.5)
    w = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        margins = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(image, margins, mode="edge")
        image = np.lib.stride_tricks.sliding_window_view(padded, len(w), axis) @ (w / w.sum())
    return image


def cubic(d):
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0))


FILTERS = {"box": lambda d: 1.0 * (d < 0.5), "triangle": lambda d: np.maximum(0, 1 - d), "cubic": cubic}


def shrink(image, name, factor=4):
    new, old = np.arange(len(image) // factor) + 0.5, (np.arange(len(image)) + 0.5) / factor
    weights = FILTERS[name](abs(new[:, None] - old))
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("ij,jkc,lk->ilc", weights, image, weights)


# %%
def degrade(image, rng):
    """All four stages of one picture [64, 64, 3], and which filter was drawn."""
    image = blur(image, rng.uniform(0.2, 1.2))
    image = shrink(image, name := list(FILTERS)[rng.integers(3)])
    strength = rng.uniform(0, 1.5)
    image = image + rng.normal(0, strength / 255, image.shape)
    return jpeg(image, int(rng.integers(88, 99)), "4:4:4"), name


sharp = gt.movedim(1, -1).numpy()
package = Degradation.preset("mini")
by_hand, kinds = zip(
    *(degrade(x, np.random.default_rng((15, k))) for k, x in enumerate(sharp.astype(float))), strict=True
)
theirs = [package.degrade(x, np.random.default_rng((15, k)))[0] for k, x in enumerate(sharp)]
check("16 pictures through the whole chain", np.stack(by_hand), np.stack(theirs), 1e-6)
print("kinds of shrinking drawn:", *sorted(set(kinds)))


# %%
chosen = 5
rng = np.random.default_rng(0)
stages = {"sharp": sharp[chosen].astype(float)}
stages["blur 1.2"] = blur(stages["sharp"], 1.2)
stages["shrunk"] = shrink(stages["blur 1.2"], "triangle")
stages["noise 1.5"] = stages["shrunk"] + rng.normal(0, 1.5 / 255, stages["shrunk"].shape)
stages["JPEG 88, 4:4:4"] = jpeg(stages["noise 1.5"], 88, "4:4:4")
stages["JPEG 88, 4:2:0"] = jpeg(stages["noise 1.5"], 88, "4:2:0")
apart = {name: 255 * np.abs(stages[name] - stages["shrunk"]).mean() for name in list(stages)[3:]}
show(
    pictures([torch.from_numpy(x).movedim(-1, 0) for x in stages.values()], list(stages), columns=3, tile=1.92),
    f"One crop of 64 pixels ({prompts[chosen]}): sharp, blurred, shrunk to 16 pixels, with noise, and as two JPEGs. "
    "Mean distance from the shrunk one in levels of 255: " + ", ".join(f"{n} {a:.1f}" for n, a in apart.items()) + ".",
)

# %% [markdown]
# **What to see.** The chain is equal to the bit: before the JPEG both are rounded to 8 bits, and that swallows the last
# digits. The strip uses the strongest settings that training draws. Blur and shrinking take the detail, which is what
# the network shall invent. Noise and the first JPEG are hardly seen. The last tile is *not* drawn in training: a JPEG
# with colors of half the width and height ("4:2:0"), as most files have them. Why does it do more harm? Let us write a
# JPEG.
#
# A JPEG file keeps no pixels. It turns RGB into brightness Y and two color differences Cb and Cr, cuts each plane into
# blocks of 8×8, takes their cosine transform, and *rounds* each coefficient to a multiple of a step from a table. The
# file carries its two tables, so we read them from there; the rest is ours. libjpeg computes the same in whole numbers
# (coefficients in eighths), and its rounding now and then tips one to the next step: of sixteen pictures a few differ
# visibly in numbers, so we compare the median. The package has a copy of libjpeg's own arithmetic, too, for halved
# colors, and that must agree to the bit.

# %%
TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def tables(quality):
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "JPEG", quality=quality)
    found = Image.open(file).quantization
    return np.reshape(found[0], (8, 8)), np.reshape(found[1], (8, 8))


def coded(plane, table):
    high, wide = plane.shape
    blocks = plane.reshape(high // 8, 8, wide // 8, 8).swapaxes(1, 2) - 128
    scaled = np.rint(8 * dctn(blocks, axes=(2, 3), norm="ortho")) / 8 / table
    steps = np.sign(scaled) * np.floor(abs(scaled) + 0.5 + 1e-9)  # all that the file holds; halves go away from 0
    return (idctn(steps * table, axes=(2, 3), norm="ortho") + 128).swapaxes(1, 2).reshape(plane.shape)


def jpeg_by_hand(image, quality):
    planes = np.rint(to_uint8(image) @ TO_YCC.T + [0, 128, 128])
    luma, chroma = tables(quality)
    out = [coded(planes[..., k], chroma if k else luma) for k in range(3)]
    ycc = np.rint(np.stack(out, axis=-1)).clip(0, 255) - [0, 128, 128]
    return np.rint(ycc @ np.linalg.inv(TO_YCC).T).clip(0, 255) / 255


small = F.avg_pool2d(gt, 4)
thumbs = small.movedim(1, -1).numpy()
check("table of quality 60 from that of 50", tables(60), (np.array(tables(50)) * (200 - 2 * 60) + 50) // 100, 0)
ours = np.stack([jpeg_by_hand(image, 60) for image in thumbs])
files = np.stack([jpeg(image, 60, "4:4:4") for image in thumbs])
lost, apart = (255 * np.sqrt(((files - x) ** 2).mean((1, 2, 3))) for x in (thumbs, ours))
print(f"what JPEG 60 loses: rms {np.median(lost):.1f} levels of 255, median of 16 pictures")
check("JPEG by hand and from a file: apart in levels", np.median(apart), 0, 0.3)
halved = np.stack([np.moveaxis(jpeg(image, 90, "4:2:0"), -1, 0) for image in thumbs])
check("whole numbers, halved colors", jpeg_transform.jpeg(small, torch.full((16,), 90)), halved, 0)

# %%
print("rms error in levels of 255          Y     Cb     Cr     PSNR")
for side, images in ((64, sharp), (16, thumbs)):
    for subsampling in ("4:4:4", "4:2:0"):
        coded_images = np.stack([jpeg(image, 93, subsampling) for image in images])
        error = 255 * np.sqrt((((coded_images - images) @ TO_YCC.T) ** 2).mean((0, 1, 2)))
        near = psnr(torch.from_numpy(coded_images).movedim(-1, 1), torch.from_numpy(images).movedim(-1, 1)).mean()
        print(f"{side} pixels wide, JPEG 93, {subsampling}" + "".join(f"{e:7.1f}" for e in error) + f"{near:9.1f}")

# %% [markdown]
# **What to see.** Halving the colors leaves Y as it was and makes Cb and Cr worse. On a large photograph nobody minds,
# because neighboring pixels have nearly one color. A picture of 16 pixels has 8×8 color values left, and after the
# enlargement each of them covers 8×8 pixels of the result. Compare the Cb and Cr of both sizes. The true colors
# are not in such a picture any more. The mini model's preset leaves colors their size, 4:4:4.
#
# ## 2 · The autoencoder, and the ceiling it sets
#
# The denoiser works on *latents*: each patch of 4×4 pixels, 48 numbers, becomes 16. What the autoencoder loses there,
# no sampler brings back. Its own reconstruction is therefore a ceiling. How good could it be? The best *linear* way
# from 48 numbers to $k$ and back, patch by patch, is known: project on the first $k$ eigenvectors of the patches'
# covariance (PCA). The mean squared error is then the sum of the eigenvalues left out, over 48. We learn it from crops
# of four training photographs, and measure on the held-out ones.


# %%
crops = PhotographCrops(
    ["astronaut", "china", "motorcycle", "camera"], size=64, seed=0, dead_leaves_share=0, recolor=False
)
training = [crops[i] for i in range(150)]
lr_train, gt_train = (torch.stack([sample[key] for sample in training]) for key in ("lr", "gt"))


def patches(images):
    """[N, 3, H, W] to one row of 48 numbers per patch of 4×4 pixels."""
    return F.pixel_unshuffle(images.double(), 4).movedim(1, -1).flatten(0, 2)


def mean_square(x):
    return x.square().mean().item()


rows, held_out = patches(gt_train), patches(gt)
center = rows.mean(0)
values, vectors = torch.linalg.eigh((rows - center).T @ (rows - center) / len(rows))
values, vectors = values.flip(0), vectors.flip(1)  # the largest first


def through(x, k):
    """Patches from only k numbers each."""
    return (x - center) @ vectors[:, :k] @ vectors[:, :k].T + center


for k in (1, 16, 47):
    check(f"{k} numbers: error is what was left out", mean_square(through(rows, k) - rows), values[k:].sum() / 48, 1e-9)

# %%
latents = model.encode(gt)
ceiling = psnr(model.decode(latents).clamp(0, 1), gt)
counts = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
squares = {k: (through(held_out, k) - held_out).square().reshape(16, -1).mean(1) for k in counts}
linear = {k: -10 * squares[k].log10() for k in counts}
figure, axis = panels(width=6.4, height=3.0)
axis.plot(counts, [linear[k].mean() for k in counts], marker="o", label="PCA of 4×4 patches")
axis.plot(16, ceiling.mean(), "s", color="#D55E00", label="the mini model's autoencoder")
axis.axhline(psnr(model.first_stage(lr), gt).mean(), color="0.5", linestyle=":", label="bicubic enlargement")
axis.set(xlabel="numbers kept of 48", ylabel="PSNR on held-out crops (dB)")
axis.legend(frameon=False, fontsize=8)
show(
    figure,
    "PSNR of 16 held-out crops over the numbers kept per patch: PCA "
    + ", ".join(f"{linear[k].mean():.1f} dB at {k}" for k in (4, 8, 16, 32))
    + f"; the autoencoder of the mini model {ceiling.mean():.1f} dB at 16.",
)
for prompt in dict.fromkeys(prompts):
    own = torch.tensor([p == prompt for p in prompts])
    first = prompt.split(", ")[0]
    print(f"{first:7s} autoencoder {ceiling[own].mean():.1f} dB, PCA with 16 numbers {linear[16][own].mean():.1f} dB")

# %% [markdown]
# **What to see.** Two things. The ceiling lies far above bicubic enlargement: the autoencoder is not what limits this
# model. And the square lies *below the curve of PCA*, which needs no training and looks at one patch alone. Why not
# take PCA, then? Because a ceiling is not all that one wants of latents. The mini model's training also asked that the
# first three channels be the picture itself, four times smaller, and that the others be *zero for an enlarged
# picture*. Then what super-resolution must add is about as large in every channel. That costs decibels.
#
# **A linear start.** The encoder is an `AutoencoderKL` of diffusers, with group normalization and SiLU. Yet it was made
# *linear*: a small network without activations was trained, and then laid into that class
# ([`linear_start.py`](../rfsr_ext/mini/linear_start.py)). A linear map is known by what it does to a basis. So show it
# 48 pictures in which one number of one patch is lit, and put the 48 answers side by side. If the claim is true, they
# are the whole encoder: one convolution over 5×5 patches.
#
# How can a network with activations be linear? Two tricks. $\operatorname{silu}(x)-\operatorname{silu}(-x)=x$, so each
# value is there with both signs. And a group normalization divides by the deviation of its group; if one channel of the
# group holds a large constant $c$, that alone decides mean and deviation, and a fixed weight and bias undo both. Then
# random linear networks can be laid into the stock classes, too: also the *estimator*, which guesses the latents from
# the enlarged picture, and which the denoiser starts from.
#
# **One number is left**, `scaling_factor`. The noise of the next section has deviation 1 before it is scaled by
# $\sigma_t$, so the latents are multiplied with one over *their* deviation. Stable Diffusion has 0.18215, because its
# raw latents are large. Ours was chosen for forty photographs; we measure it on our 150 crops of four.
#
# The next four cells check all that: what the channels hold, the 48 answers, the two tricks, and the factor.

# %%
enlarged = model.first_stage(lr)
latents_lr = model.encode(enlarged)
raw = latents / model.scaling_factor  # as the encoder gives them
shrunk = 2 * F.avg_pool2d(2 * gt - 1, 4)  # pictures in [-1, 1], twice
print(
    f"first three channels: {mean_square(raw[:, :3] - shrunk) / mean_square(shrunk):.4f} of their power is not the picture"
)
smooth = model.encode(F.interpolate(F.avg_pool2d(gt, 4), scale_factor=4, mode="bicubic"))
for name, z in (("sharp", latents), ("enlarged", smooth)):
    print(f"the other thirteen, {name:8s} picture: rms {mean_square(z[:, 3:]) ** 0.5:.3f}")
assert mean_square(smooth[:, 3:]) < 0.2 * mean_square(latents[:, 3:])

# %%
lit = torch.full((49, 3, 28, 28), 0.5)  # the last one stays gray
lit[range(48), np.repeat(range(3), 16), 12 + np.tile(np.repeat(range(4), 4), 3), 12 + np.tile(range(4), 12)] += 0.5
answers = model.encode(lit)
of_gray = answers[48, :, 3, 3]
kernel = ((answers[:48] - answers[48]) * 2)[:, :, 1:6, 1:6].transpose(0, 1).flip(-1, -2)


def encode_fast(images):
    return F.conv2d(F.pixel_unshuffle(images - 0.5, 4), kernel, of_gray, padding=2)


inside = (..., slice(2, -2), slice(2, -2))  # at the borders each layer pads in its own way
check("one convolution is the encoder", encode_fast(gt)[inside], latents[inside], 0.02)
off = mean_square((encode_fast(gt) - latents)[inside]) / mean_square(latents[inside])
check("rms off, of the latents' rms", off**0.5, 0, 2e-3)

# %%
x = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0))
check("silu(x) - silu(-x)", F.silu(x) - F.silu(-x), x, 1e-6)
c, with_constant = 30.0, x.clone()
with_constant[:, 0] = c
deviation = (c**2 / 8 - (c / 8) ** 2) ** 0.5  # of one c and seven zeros
undone = F.group_norm(with_constant, 1) * deviation + c / 8
check("normalized and undone", undone[:, 1:], x[:, 1:], 0.05)

torch.manual_seed(0)
vae, network = architecture.autoencoder(), LinearAutoencoder(16)
load_linear_map(vae, network)
z = network.encode(2 * gt - 1)
check("laid into AutoencoderKL", (vae.encode(2 * gt - 1).latent_dist.mode() - z).std() / z.std(), 0, 0.01)
check("and back", (vae.decode(z).sample - network.decode(z)).std() / network.decode(z).std(), 0, 0.01)
estimator, (unet, control) = LinearEstimator(16, architecture.LINEAR_WIDTHS), architecture.denoiser()
load_linear_estimate(unet, control, estimator)
t, text = torch.full((16,), 500), torch.zeros(16, 4, architecture.TEXT_WIDTH)
down, middle = control(0 * latents, t, text, enlarged, return_dict=False)
found = unet(0 * latents, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
check("estimator in U-Net and ControlNet", (found - estimator(enlarged)).std() / estimator(enlarged).std(), 0, 0.02)

# %%
pairs = (gt_train, model.first_stage(lr_train))
latents_train, latents_lr_train = (torch.cat([model.encode(part) for part in x.split(25)]) for x in pairs)
raw_deviation = (latents_train / model.scaling_factor).std().item()
print(f"1 / deviation of the raw latents {1 / raw_deviation:.2f}, scaling_factor {model.scaling_factor}")
check("deviation of the scaled latents", latents_train.std(), 1.0, 0.15)
check("the architecture says the same", architecture.autoencoder().config.scaling_factor, model.scaling_factor, 0)
check(
    "encode and decode: z times, z over", model.vae.encode(2 * gt[:2] - 1).latent_dist.mode() * 2.2, latents[:2], 1e-4
)
size = {"picture": latents[:, :3].std().item(), "detail": latents[:, 3:].std().item()}
missing = mean_square(latents - latents_lr) ** 0.5
print("deviation of the channels that are the picture {picture:.2f}, of the detail {detail:.2f}".format(**size))
print(f"what the low resolution lacks, z_0 - z_LR: rms {missing:.2f}")

# %% [markdown]
# ## 3 · The noise schedule, measured against the latents
#
# The network will see noised latents, $z_t=\alpha_tz_0+\sigma_t\varepsilon$: ε is Gaussian noise, and the *timestep* $t$
# runs from 0, nearly clean, to 999. A schedule says how $\alpha_t$ falls and $\sigma_t$ rises. How much noise is much?
# "Deviation 1" is a mean of two kinds: a few channels with large numbers and many with small ones. A channel with
# deviation $s$ has the signal-to-noise ratio
#
# $$\mathrm{SNR}_t=\frac{\alpha_t^2\,s^2}{\sigma_t^2}=\frac{s^2\,\bar\alpha_t}{1-\bar\alpha_t},\qquad
# \bar\alpha_t=\prod_{s\le t}(1-\beta_s).$$
#
# With a constant β, $\bar\alpha_t=(1-\beta)^{t+1}$, and as long as that is near 1, $\sigma_t\approx\sqrt{\beta(t+1)}$:
# it grows as $\sqrt t$. The mini model's β is chosen so that σ ends at 0.12. Stable Diffusion ends in pure noise.

# %%
process = model.process(50)
times = torch.arange(1000)
beta = 1 - (1 - 0.12**2) ** (1 / 1000)
bar = (1 - torch.full((1000,), beta, dtype=torch.float64)).cumprod(0)
sd_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
sd = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
alpha, sigma = process.level(times)
check("mini: closed form", (1 - beta) ** (times.double() + 1), bar, 1e-9)
check("mini: the package's α and σ", torch.stack([alpha, sigma]), torch.stack([bar.sqrt(), (1 - bar).sqrt()]), 1e-4)
check("the architecture's scheduler", architecture.scheduler().alphas_cumprod, bar, 5e-5)  # 32-bit
check("σ grows as the root of t", sigma / (beta * (times + 1)).sqrt(), torch.ones(1000), 0.01)
check("Stable Diffusion's", Process(sd, 50).level(times)[1], (1 - sd_bar).sqrt(), 1e-4)

figure, axis = panels(width=6.8, height=3.2)
for schedule, curve in (("mini", bar), ("Stable Diffusion", sd_bar)):
    for kind, s in size.items():
        axis.semilogy(times, s**2 * curve / (1 - curve), label=f"{schedule}, {kind} channels")
axis.axhline(1, color="0.6", linewidth=1)
axis.set(xlabel="timestep t", ylabel="signal-to-noise ratio", ylim=(1e-4, 1e6))
axis.legend(frameon=False, fontsize=8)
ends = {
    (n, k): (s**2 * c / (1 - c))[999].item()
    for n, c in (("mini", bar), ("Stable Diffusion", sd_bar))
    for k, s in size.items()
}
show(
    figure,
    "Signal-to-noise ratio over the timestep, four falling curves. At t = 999: "
    + "; ".join(f"{n}, {k} channels {end:.2g}" for (n, k), end in ends.items()) + ".",
)  # fmt: skip
for kind, s in size.items():
    drowned = int((s**2 * sd_bar / (1 - sd_bar) > 1).sum())
    print(f"Stable Diffusion's schedule: {kind} channels fall below 1 at t = {drowned}")

# %% [markdown]
# **What to see.** As t grows on Stable Diffusion's schedule, the detail drowns soon and the picture late. (Our latents
# are laid on it here; its own are others.) A sampler goes the other way, so its early steps decide the structure and
# its late ones the detail. The mini model's schedule ends long before: its picture channels stay clear. Only the detail
# meets noise of about its own size, and what the low resolution lacks is of that size, too. So this model is no
# generator of pictures. It repairs.
#
# The ratio holds $s$ squared. If someone forgets the `scaling_factor`, all the curves move, by its square, although
# nothing in the schedule changed. See it: the third tile uses Stable Diffusion's schedule, the fourth the mini model's
# on unscaled latents.

# %%
noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))


def draw(t):
    z, e, f = latents[4:5], noise[4:5], model.scaling_factor
    held = {
        "mini": bar[t].sqrt() * z + (1 - bar[t]).sqrt() * e,
        "Stable Diffusion": sd_bar[t].sqrt() * z + (1 - sd_bar[t]).sqrt() * e,
        "mini, not scaled": f * (bar[t].sqrt() * z / f + (1 - bar[t]).sqrt() * e),
    }
    seen = model.decode(torch.cat(list(held.values())).float()).clamp(0, 1)
    near = psnr(seen, gt[4:5].expand_as(seen))
    titles = ["truth\n", *(f"{name}\n{n:.1f} dB" for name, n in zip(held, near, strict=True))]
    alt = (
        f"The truth with the noise of timestep {t}, decoded: "
        + "; ".join(x.replace("\n", " ") for x in titles[1:])
        + "."
    )
    return pictures([gt[4], *seen], titles, tile=1.92), alt


slider = explore(draw, values=[19, 99, 199, 399, 599, 799, 999], label="timestep t", start=999)
slider

# %%
slider.slider.value = 399
show(*draw(399))

# %% [markdown]
# ## 4 · The denoising loss
#
# Draw a timestep, add noise, let the network answer, and take the mean squared error of the answer. It may answer with
# noise, velocity $v=\alpha\varepsilon-\sigma z_0$, or the picture. Given $z_t$ the three are one: an error of $\delta$
# in the picture is an error of $\alpha\delta/\sigma$ in the noise and $\delta/\sigma$ in the velocity. (Solve
# $z_t=\alpha z_0+\sigma\varepsilon$ for ε, insert in $v$, and use $\alpha^2+\sigma^2=1$.) So three losses differ by
# factors of $t$ alone.

# %%
answer = latents + 0.05 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))  # some network's z_0
with together("the factor of the loss: three kinds of answer at t = 100, 500 and 900"):
    for t in (100, 500, 900):
        a, s = sd_bar[t].sqrt(), (1 - sd_bar[t]).sqrt()
        z_t = (a * latents + s * noise).float()
        e_hat = (z_t - a * answer) / s
        answers = {"sample": answer, "epsilon": e_hat, "v_prediction": a * e_hat - s * answer}
        factors = {"sample": 1.0, "epsilon": a / s, "v_prediction": 1 / s}
        for kind, output in answers.items():
            same = Process(DDIMScheduler.from_config(sd.config, prediction_type=kind), 50)
            estimate = same.pred_original_sample(output.float(), t, z_t)
            assert (estimate - answer).abs().max() < 1e-3, "every answer means this picture"
            loss = mean_square(output - same.target(latents, noise, t))
            check(f"t = {t}, {kind}", loss / (factors[kind] ** 2 * mean_square(answer - latents)), 1, 1e-3)

# %% [markdown]
# The mini model answers with the picture, and its noise is not plain noise. Sampling starts from the enlarged picture,
# $z_T=\alpha_Tz_{LR}+\sigma_T\varepsilon$. So that training sees the same, a share of $z_{LR}-z_0$ is added to ε
# as well. With $d=z_0-z_{LR}$, what is missing, that makes
#
# $$z_t=\alpha_t\,(z_{LR}+k_t\,d)+\sigma_t\,\varepsilon,\qquad k_t=1-\frac{\sigma_t\,\alpha_T}{\alpha_t\,\sigma_T}.$$
#
# At $t=T$, $k=0$: nothing of $d$ is in there. Towards $t=0$ all of it is. How well could one estimate $d$ if one knew
# nothing but its variance $V$ in each channel? The best linear answer is Wiener's filter, one division:
#
# $$\hat d=\frac{\alpha kV}{\alpha^2k^2V+\sigma^2}\,(z_t-\alpha z_{LR}),\qquad \text{error }\frac{V\sigma^2}{\alpha^2k^2V+\sigma^2}.$$
#
# It is the yardstick. We even let it know the variances of the very crops that we measure on.

# %%
a_T, s_T = (x.item() for x in process.level(999))
of_training = noise + (latents_lr - latents) * a_T / s_T
check("noise of training", of_training, process.noise_towards(latents_lr, latents, noise), 1e-5)


def level(t):
    """α, σ and k at timesteps, ready to be multiplied with latents."""
    a, s = (x.float().reshape(-1, 1, 1, 1) for x in process.level(t))
    return a, s, 1 - s * a_T / (a * s_T)


def wiener(z_t, t, z_lr, V, d_mean=0.0):
    """z_0 if the missing part has mean ``d_mean`` and variance ``V``."""
    a, s, k = level(t)
    gain = a * k * V / (a**2 * k**2 * V + s**2)
    return z_lr + d_mean + gain * (z_t - a * (z_lr + k * d_mean))


V = (latents - latents_lr).square().mean((0, 2, 3)).reshape(1, -1, 1, 1)
with together("z_t, and the error that the formula promises, at t = 19, 399 and 999"):
    for t in (19, 399, 999):
        a, s, k = level(t)
        z_t = process.add_noise(latents, of_training, t)
        check(f"t = {t}: z_t", z_t, a * (latents_lr + k * (latents - latents_lr)) + s * noise, 1e-5)
        promised = (V * s**2 / (a**2 * k**2 * V + s**2)).mean().item()
        error = mean_square(wiener(z_t, t, latents_lr, V) - latents)
        check(f"t = {t}: error of the formula", error / promised, 1, 0.05)

# %%
condition = model.condition(lr, prompts)
TIMES = (19, 199, 399, 599, 799, 999)
noised = {t: process.add_noise(latents, of_training, t) for t in TIMES}
stored = {t: model.predict(noised[t], torch.tensor(t), condition) for t in TIMES}
losses = {
    "z_LR, whatever t": [mean_square(latents_lr - latents)] * 6,
    "z_t itself": [mean_square(noised[t] - latents) for t in TIMES],
    "Wiener's filter": [mean_square(wiener(noised[t], t, latents_lr, V) - latents) for t in TIMES],
    "the mini model": [mean_square(stored[t] - latents) for t in TIMES],
}
figure, axis = panels(width=6.4, height=3.0)
for (name, curve), marker in zip(losses.items(), "x^so", strict=True):
    axis.semilogy(TIMES, curve, marker=marker, label=name)
axis.set(xlabel="timestep t", ylabel="mean squared error of z_0")
axis.legend(frameon=False, fontsize=8)
show(
    figure,
    "Loss over the timestep, four estimates of z_0: "
    + "; ".join(f"{n} {c[0]:.4f} at t = 19, {c[3]:.4f} at 599, {c[5]:.4f} at 999" for n, c in losses.items()) + ".",
)  # fmt: skip
assert all(losses["the mini model"][i] < losses["Wiener's filter"][i] for i in (3, 5))
assert losses["the mini model"][0] > losses["z_t itself"][0], "the left end"

# %% [markdown]
# **What to see.** Where sampling starts, on the right, the trained network beats the formula: it has learned what
# enlarged pictures lack. The formula, which knows no picture, can there only answer $z_{LR}$. In the middle the network
# is better, too. But look at the left end: there $z_t$ holds nearly all, and the network is *farther from the truth
# than $z_t$ itself*. In a mean over all timesteps errors so small hardly count, and the timesteps of its training were
# drawn more densely where sampling starts. A training loss that falls says nothing about the left end; a curve over $t$
# does.

# %% [markdown]
# ## 5 · ControlNet: silent at first
#
# A ControlNet is a copy of the U-Net's shrinking half that reads the enlarged picture. What it finds goes through a
# $1\times1$ convolution with *zero* weights and is added to the U-Net. So a fresh one changes nothing: the pre-trained
# U-Net goes on as before. Can such a thing learn? For $y=Wx$ with $W=0$,
#
# $$\frac{\partial L}{\partial W}=g\,x^{\mathsf T}\ne0,\qquad\frac{\partial L}{\partial x}=W^{\mathsf T}g=0,
# \qquad g=\frac{\partial L}{\partial y}.$$
#
# The zero convolution learns at once, all behind it waits for one step. And the branch that reads the picture ends in a
# zero convolution of its own, so its inner layers wait for two.
#
# The mini model made no use of that silence: its U-Net and ControlNet learned together, from a linear start. What
# does its ControlNet bring, now that it is trained? We take it away at $t=T$, or show it the wrong picture. In all rows
# the U-Net sees the same $z_T$, which holds the right enlarged picture under noise.

# %%
fresh = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(12, 24, 48)).requires_grad_()
few, T = model.condition(lr[:2], prompts[:2]), torch.tensor([999, 999])
given = {"encoder_hidden_states": few.shared["encoder_hidden_states"], "return_dict": False}
z_few = noised[999][:2]


def with_control(control):
    down, middle = control(z_few, T, controlnet_cond=few.image, **given)
    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return model.unet(z_few, T, **more, **given)[0]


check("a fresh ControlNet changes nothing", with_control(fresh), model.unet(z_few, T, **given)[0], 0)
kept, block = {}, fresh.controlnet_mid_block
block.register_forward_hook(
    lambda module, inputs, output: (output.retain_grad(), kept.update(x=inputs[0], y=output))[1]
)
optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
with torch.enable_grad():
    for step in (1, 2, 3):
        optimizer.zero_grad()
        F.mse_loss(with_control(fresh), latents[:2]).backward()
        if step == 1:
            by_rule = torch.einsum("nohw,nihw->oi", kept["y"].grad, kept["x"])
            check("gradient of a zero convolution over g xᵀ", block.weight.grad.norm() / by_rule.norm(), 1, 1e-4)
        moved = [bool(p.grad is not None and p.grad.any()) for p in fresh.parameters()]
        print(f"step {step}: {sum(moved)} of {len(moved)} tensors of weights have a gradient")
        optimizer.step()
silent = [n for n, m in architecture.denoiser()[1].named_modules() if isinstance(m, nn.Conv2d) and not m.weight.any()]
check("silent convolutions in the mini model's own start", len(silent), 0, 0)


# %%
def seeing(image):
    return dataclasses.replace(condition, spatial={"controlnet_cond": image})


start = noised[999]
shared = condition.shared["encoder_hidden_states"]
cases = {
    "no ControlNet": model.unet(start, torch.full((16,), 999), shared, return_dict=False)[0],
    "another picture's": model.predict(start, torch.tensor(999), seeing(condition.image.roll(1, 0))),
    "with its own": stored[999],
}
seen = {"bicubic": condition.image} | {name: model.decode(z).clamp(0, 1) for name, z in cases.items()}
near = {name: psnr(x, gt) for name, x in seen.items()}
for name, values in near.items():
    print(f"{name:18s} {values.mean():.1f} dB")
tiles, titles = [], []
for k in (4, 5):
    tiles += [lr[k], *(x[k] for x in seen.values()), gt[k]]
    titles += ["low resolution\n", *(f"{name}\n{near[name][k]:.1f} dB" for name in seen), "truth\n"]
show(
    pictures(tiles, titles, columns=6, tile=1.92),
    "Two crops: low resolution, bicubic enlargement, the first estimate without ControlNet, with another picture in it, "
    "and with its own, and the truth. Means of 16 crops: " + ", ".join(f"{n} {v.mean():.1f} dB" for n, v in near.items()) + ".",
)  # fmt: skip
assert near["no ControlNet"].mean() < near["bicubic"].mean()

# %% [markdown]
# **What to see.** Without the branch the estimate falls apart, although the enlarged picture is there in $z_T$: the two
# were trained together, and the U-Net expects what the other half adds. That says how much this U-Net *leans* on its
# ControlNet, not how well a U-Net trained without one would do. With another picture's condition, look for its colors
# and shapes in the result: the branch is believed, although $z_T$ says otherwise.
#
# ## 6 · Does the prompt help?
#
# Text enters by cross-attention in the middle block. In training a tenth of the prompts was empty. We ask for the
# estimate with the right prompt (the photograph's tags), with none, and with another photograph's, and compare errors
# *crop by crop*. A mean of 16 differences has a standard error; below two of them we call it nothing.
#
# Models that sample with *classifier-free guidance* go further in the direction in which the prompt moves the answer.
# With $p$ the answer to the prompt and $n$ that to a negative one (or none), the output is $n+g\,(p-n)$. At $g=1$ it is
# $p$, at $g=0$ it is $n$, and beyond 1 one trusts the direction more than the network does.

# %%
names = list(dict.fromkeys(prompts))
next_one = dict(zip(names, names[1:] + names[:1], strict=True))
texts = {"no prompt": [""] * 16, "another photograph's": [next_one[prompt] for prompt in prompts]}
print("  t  prompt                 moves the estimate   error against the right prompt's")
for t in (199, 599, 999):
    right = (stored[t] - latents).square().mean((1, 2, 3))
    for name, given_texts in texts.items():
        answer = model.predict(noised[t], torch.tensor(t), model.condition(lr, given_texts))
        moved = mean_square(answer - stored[t]) ** 0.5 / mean_square(stored[t] - latents) ** 0.5
        change = 100 * ((answer - latents).square().mean((1, 2, 3)) / right - 1)
        mean, error = change.mean().item(), change.std().item() / 4
        verdict = "nothing" if abs(mean) < 2 * error else "worse" if mean > 0 else "better"
        print(f"{t:3d}  {name:21s}  {100 * moved:5.0f} % of its error   {verdict} ({abs(mean):.1f} ± {error:.1f} %)")

# %%
guided = model.condition(lr, prompts, negative_prompts=[""] * 16)
p, n = stored[599], model.predict(noised[599], torch.tensor(599), model.condition(lr, [""] * 16))
for g in (0.5, 1, 4):
    theirs = denoise(model, process, noised[599], torch.tensor(599), guided, guidance_scale=g)
    check(f"guidance {g}", n + g * (p - n), theirs, 1e-5)
for g in (0, 1, 4, 16, 64):
    estimate = model.decode(n + g * (p - n)).clamp(0, 1)
    print(f"guidance {g:2d}: {psnr(estimate, gt).mean():.1f} dB at t = 599")

# %% [markdown]
# **What to see.** The middle column says that the text does reach the picture. The last says whether it helps: "worse"
# means that the right prompt was better. Forty photographs with a few tags each are no school for words, and the low
# resolution already shows what is there. For a published model the same table may look different: make it before you
# believe in prompts.
#
# Guidance costs a second pass of the networks. Here it buys no closeness to the truth, as the table above makes one
# expect, and far out it destroys. So the mini model's recipe has guidance 1.
#
# ## 7 · Train one, live
#
# Now a denoiser of our own: four convolutions, a fortieth of the mini model, on 150 crops of four photographs, for some
# seconds. It gets $z_t$, $z_{LR}$ and σ and answers with $z_0$. We train it twice. Once from random weights. Once from
# a *linear start*, as the mini model was: all that can be solved is solved, and the network adds a correction that
# begins at zero. What can be solved is the best linear filter over 3×3 latents for the missing $d$ (a system of
# equations, no training), and on top of it the Wiener formula of section 4 for what $z_t$ adds.
#
# The loop uses the package's `Stage`, which gives each iteration its own random generator and the learning rate: up
# over 100 iterations, then down along a cosine to a hundredth. Timesteps are spread over the batch, with
# $t=1000\,(1-u^2)$.


# %%
def around(z):
    """[N, 16, h, w] to one row per position: its 3×3 neighbors and a 1."""
    columns = F.unfold(F.pad(z, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).flatten(0, 1).double()
    return torch.cat([columns, torch.ones(len(columns), 1)], dim=1)


missing_train = latents_train - latents_lr_train
weight = 1 / (missing_train.square().mean((1, 2, 3)) + 0.01)  # every crop counts about alike, busy or smooth
weight = (weight / weight.mean()).reshape(-1, 1, 1, 1)
X, Y = around(latents_lr_train), missing_train.movedim(1, -1).reshape(-1, 16).double()
w = weight.double().flatten().repeat_interleave(len(X) // len(weight))[:, None]
solution = torch.linalg.solve(X.T @ (w * X) + 1e-3 * torch.eye(145), X.T @ (w * Y))
check(
    "solved: what is left does not depend on the input",
    X.T @ (w * (Y - X @ solution)) / len(X),
    torch.zeros(145, 16),
    1e-6,
)


def filtered(z_lr):
    return (around(z_lr) @ solution).reshape(len(z_lr), *z_lr.shape[2:], 16).movedim(-1, 1).float()


d_train, d_test = filtered(latents_lr_train), filtered(latents_lr)
V_train = (weight * (missing_train - d_train).square()).mean((0, 2, 3)).reshape(1, -1, 1, 1)
print(f"held-out error: z_LR {mean_square(latents_lr - latents):.4f}, filtered {mean_square(latents_lr + d_test - latents):.4f}, "
      f"mini model {losses['the mini model'][5]:.4f}")  # fmt: skip


# %%
class Tiny(nn.Module):
    """Four convolutions; with a linear start their answer is added to that of the formulas."""

    def __init__(self, linear_start, width=32):
        super().__init__()
        widths = (33, width, width, width, 16)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False))
        self.linear_start = linear_start
        if linear_start:
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)

    def forward(self, z_t, t, z_lr, d):
        known = wiener(z_t, t, z_lr, V_train, d) if self.linear_start else z_t
        plane = (level(t)[1] / s_T).expand(len(z_t), 1, *z_t.shape[2:])
        x = torch.cat([known - z_lr, z_lr, plane], dim=1)
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        x = self.layers[-1](x)
        return known + x if self.linear_start else x


print(f"{sum(p.numel() for p in Tiny(True).parameters())} weights; the mini model's U-Net and ControlNet have "
      f"{sum(p.numel() for p in model.trained_parameters().values())}")  # fmt: skip

# %%
ITERATIONS, BATCH = 400, 8


def train(linear_start):
    torch.manual_seed(0)
    network, snapshots = Tiny(linear_start), {}

    def loss(batch, generator):
        u = (torch.rand(BATCH, generator=generator) + torch.arange(BATCH)) / BATCH
        t = ((1 - u * u) * 1000).long().clamp_max(999)
        e = process.noise_towards(batch["z_lr"], batch["z"], torch.randn(batch["z"].shape, generator=generator))
        answer = network(process.add_noise(batch["z"], e, t), t, batch["z_lr"], batch["d"])
        return (batch["weight"] * (answer - process.target(batch["z"], e, t)).square()).mean()

    stage = Stage({"tiny": network}, loss, ITERATIONS)
    optimizer, log = torch.optim.AdamW(network.parameters(), weight_decay=0), []
    order = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for i in range(ITERATIONS):
            k = torch.randint(len(weight), (BATCH,), generator=order)
            batch = {"z": latents_train[k], "z_lr": latents_lr_train[k], "d": d_train[k], "weight": weight[k]}
            value, _ = stage.loss("stage", batch, i, k.tolist())
            optimizer.param_groups[0]["lr"] = 3e-3 * stage.learning_rate_factor("stage", i)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            log.append(value.item())
            if i + 1 in (20, ITERATIONS):
                snapshots[i + 1] = network(noised[999], torch.tensor(999), latents_lr, d_test).detach()
    return network, np.array(log), snapshots, stage


threads = torch.get_num_threads()
torch.set_num_threads(1)  # convolutions as small as these gain nothing from more
runs = {"random start": train(False), "linear start": train(True)}
torch.set_num_threads(threads)
wanted = [min(1, (i + 1) / 100) * max(0.01, (1 + np.cos(np.pi * i / 400)) / 2) for i in range(400)]
check("learning rate", [runs["linear start"][3].learning_rate_factor("stage", i) for i in range(400)], wanted, 1e-9)

# %%
figure, axis = panels(width=6.4, height=3.0)
averages = {name: log.reshape(-1, 20).mean(1) for name, (_, log, _, _) in runs.items()}
for name, average in averages.items():
    axis.semilogy(np.arange(10, 400, 20), average, label=name)
axis.set(xlabel="iteration", ylabel="loss, means of 20")
axis.legend(frameon=False, fontsize=8)
show(
    figure,
    "Training loss of two runs of 400 iterations, averaged over 20: "
    + "; ".join(f"{name} from {a[0]:.2g} to {a[-1]:.2g}" for name, a in averages.items()) + ".",
)  # fmt: skip
assert averages["random start"][-1] < averages["random start"][0] / 10
assert averages["random start"][-1] > averages["linear start"][-1]
print("held-out error   " + "".join(f"{name:>16s}" for name in ("Wiener, solved", *runs, "mini model")))
for t in (199, 599, 999):
    tt = torch.tensor(t)
    ours = [wiener(noised[t], tt, latents_lr, V_train, d_test)]
    ours += [network(noised[t], tt, latents_lr, d_test) for network, *_ in runs.values()]
    print(f"t = {t:3d}          " + "".join(f"{mean_square(z - latents):16.3f}" for z in (*ours, stored[t])))

# %%
shots = {
    "random start\n20 iterations": runs["random start"][2][20],
    "random start\n400": runs["random start"][2][400],
    "linear start\n0": latents_lr + d_test,
    "linear start\n400": runs["linear start"][2][400],
    "mini model\n": stored[999],
}
seen = {"bicubic\n": condition.image} | {name: model.decode(z).clamp(0, 1) for name, z in shots.items()}
near = {name: psnr(x, gt) for name, x in seen.items()}
titles = ["low resolution\n\n", *(f"{name}\n{near[name][5]:.1f} dB" for name in seen), "truth\n\n"]
show(
    pictures([lr[5], *(x[5] for x in seen.values()), gt[5]], titles, columns=4, tile=1.92),
    "First estimates of one crop by two tiny networks and the mini model, with low resolution, bicubic and truth. Means of 16 crops: "
    + ", ".join(f"{n.strip()} {v.mean():.1f} dB".replace("\n", " ") for n, v in near.items()) + ".",
)  # fmt: skip

# %% [markdown]
# **What to see.** The curve from random weights falls steeply and looks like success. It ends where it has not even
# reached what algebra gave the other run at once. (Most of that head start is to begin at $z_{LR}$ at all; the line
# above the network's class says what the filter adds.) The other curve hardly falls: the seconds of training find
# little that a filter does not know. Now the table, which counts on held-out crops: did training help there at all,
# against "solved"? And where is the mini model far ahead, at large or at middle t? It has forty times the weights,
# forty photographs and an hour; ours is no substitute for it. The lesson is older than diffusion: solve what can be
# solved, train the rest.
#
# ## 8 · Two bugs, and the checks that catch them
#
# **The forgotten `scaling_factor`.** Nothing fails: shapes fit, the loss falls. Only the noise is now too strong for
# the latents, by that factor.
#
# **The condition in [−1, 1].** The autoencoder wants pictures in [−1, 1], the ControlNet in [0, 1]. Someone passes the
# wrong one. The network answers all the same, and the picture looks like a poorly trained model's. What sees it:
# compare the condition with what `model.condition` makes of the same picture.

# %%
unscaled = model.vae.encode(2 * gt_train[:16] - 1).latent_dist.mode()
caught(lambda: check("deviation of the latents", unscaled.std() / latents_train[:16].std(), 1.0, 0.05))
wrong = model.predict(start, torch.tensor(999), seeing(2 * condition.image - 1))
for name, z in (("right", stored[999]), ("wrong", wrong)):
    print(f"condition {name}: {psnr(model.decode(z).clamp(0, 1), gt).mean():.1f} dB")
caught(
    lambda: check("condition", 2 * condition.image - 1, model.condition(lr, prompts).spatial["controlnet_cond"], 1e-5)
)
caught(lambda: model.condition(2 * lr - 1, prompts))  # and the package's own check, of the low resolution

# %% [markdown]
# ## 9 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up).** Which constant β makes σ after `steps` timesteps equal to `end`?
# <details><summary>Hint</summary>By which factor does one timestep multiply $1-\sigma^2$?</details>


# %%
def constant_beta(end, steps):
    raise NotImplementedError


def verify_beta():
    for end, steps in ((0.12, 1000), (0.9, 50)):
        kept_share = (1 - torch.full((steps,), constant_beta(end, steps), dtype=torch.float64)).prod()
        check(f"σ = {end} after {steps}", (1 - kept_share).sqrt(), end, 1e-9)
    check("the mini model's, relative", constant_beta(0.12, 1000) / model.scheduler.config.beta_start, 1, 1e-3)


exercise(1, verify_beta)


# %% [markdown]
# **Exercise 2.** Newer autoencoders have a mean and a deviation per channel (`latents_mean`, `latents_std`) instead of
# one `scaling_factor`. Bring `[N, C, h, w]` to mean 0 and deviation 1 in every channel.
# <details><summary>Hint</summary>Mean and deviation over the dimensions 0, 2 and 3; keep them as dimensions of size
# 1.</details>


# %%
def standardized(z):
    raise NotImplementedError


def verify_standardized():
    z = standardized(latents_train)
    check("mean", z.mean((0, 2, 3)), torch.zeros(16), 1e-4)
    check("deviation", z.std((0, 2, 3)), torch.ones(16), 1e-3)


exercise(2, verify_standardized)


# %% [markdown]
# **Exercise 3 (harder).** A network answers with velocity. With which weight per timestep is its squared error that of
# the picture, $\lVert\hat z_0-z_0\rVert^2$? Give it for $\bar\alpha_t$.
# <details><summary>Hint</summary>Keep $z_t$ and move the picture by δ. By how much does the velocity move (section
# 4)?</details>


# %%
def weight_of_velocity(bar_t):
    raise NotImplementedError


def verify_weight():
    for t in (50, 500, 950):
        a, s = sd_bar[t].sqrt(), (1 - sd_bar[t]).sqrt()
        z_t, v_hat = a * latents + s * noise, answer  # any answer will do
        in_velocity = mean_square(v_hat - (a * noise - s * latents))
        in_picture = mean_square(a * z_t - s * v_hat - latents)
        check(f"t = {t}", weight_of_velocity(sd_bar[t]) * in_velocity / in_picture, 1, 1e-6)


exercise(3, verify_weight)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Train the network of section 7 with the latents scaled by a half, one and two, for equally many steps. An answer
#   is the loss over the signal-to-noise ratio for the three, with its spread over three seeds.
# * Which damage can the mini model repair? Upscale crops with blur, noise or JPEG alone, in four strengths. An answer
#   is the gain in PSNR over bicubic for each, and the strength at which the gain is gone.
#
# ## Summary
#
# * The poor pictures are made: blur, shrinking, noise, JPEG. Halved colors are too much for a picture of 16 pixels.
# * The autoencoder is a ceiling. PCA with as many numbers reaches a higher one; what latents look like counts as well.
# * Noise is large or small only against the latents: the signal-to-noise ratio goes with the square of
#   `scaling_factor`.
# * Noise, velocity and picture are one answer in three scales; watch the loss over $t$, beside the best formula.
# * A fresh ControlNet is silent and still learns. A trained one is leaned upon.
# * Whether a prompt helps is measured crop by crop. Here it is no better than none.
# * Solve what can be solved, then train: seconds of training do not catch up with a linear start.
#
# NAVIGATION
