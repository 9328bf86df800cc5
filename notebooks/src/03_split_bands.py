# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 03 · Split an image into bands
#
# **You will take a photograph apart into coarse and fine, put it back without a trace, and measure each part.**
#
# Ten seconds on two cores; nothing to download. Needs only that you can read a little PyTorch.
#
# NAVIGATION
#
# RFSR treats the *low frequencies* of a picture (where things are, how bright) and its *high frequencies* (fur, grain,
# edges) differently. It separates them with the simplest of all wavelets, Haar's. Afterwards you can
#
# * compute the four Haar bands of a 2×2 block on paper, and of any image in five lines,
# * say why nothing is lost and no energy appears, and what happens at odd sizes,
# * write SSIM, the measure the paper applies to the bands, in ten lines.

# %%
import math

import pywt
import torch
import torch.nn.functional as F

from rfsr_ext import haar_ll
from rfsr_ext.data import evaluation_crops
from rfsr_ext.metrics import band_ssim, psnr, ssim
from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show, spoken, together

photo = evaluation_crops(["chelsea"], size=96, count=5)[4]["gt"][None]  # a cat, [1, 3, 96, 96] in [0, 1]

# %% [markdown]
# ## 1 · What do coarse and fine look like?
#
# First the result. PyWavelets splits the photograph into four pictures of half the height and width.

# %%
LL, (LH, HL, HH) = (torch.from_numpy(b) if not isinstance(b, tuple) else map(torch.from_numpy, b)
                    for b in pywt.dwt2(photo.numpy(), "haar"))  # fmt: skip
tiles = [photo[0], LL[0] / 2, *(0.5 + 2 * band[0] for band in (LH, HL, HH))]
energy = [float(band.square().sum() / photo.square().sum()) for band in (LL, LH, HL, HH)]
names = ["photograph", *(f"{n} {100 * e:.2f} %" for n, e in zip(("LL", "LH", "HL", "HH"), energy, strict=True))]
show(
    pictures(tiles, names, tile=1.9),
    f"The face of a cat, 96 pixels wide, and its four Haar bands of 48 pixels. LL is a small photograph and "
    f"holds {100 * energy[0]:.2f} percent of the energy. The other three are gray with faint outlines of eyes and fur.",
)

# %% [markdown]
# **What to see.** LL is the photograph at half size. The other three are nearly empty (gray is zero, and they are shown
# four times amplified): LH responds to horizontal lines, such as whiskers, HL to upright ones, such as the stripes of the
# forehead, HH to diagonals. The titles give each band's share of the energy, the sum of squares. Almost everything is in
# LL, and yet what makes fur look like fur is not.
#
# (Authors disagree on which band is called LH. Here the first letter is the filter along the width, the second along the
# height.)
#
# ## 2 · How is one block split?
#
# Take four neighboring pixels $\begin{pmatrix}a&b\\c&d\end{pmatrix}$. Along the rows you may add or subtract, along the
# columns too. That makes four ways. Halve each result:
#
# $$LL=\tfrac{a+b+c+d}{2}\qquad LH=\tfrac{a+b-c-d}{2}\qquad HL=\tfrac{a-b+c-d}{2}\qquad HH=\tfrac{a-b-c+d}{2}$$
#
# Do it on paper for $a=0.9,\ b=0.7,\ c=0.5,\ d=0.1$ before you run the next cell.

# %%
a, b, c, d = 0.9, 0.7, 0.5, 0.1
by_hand = [(a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2]
print("LL, LH, HL, HH =", [round(band, 3) for band in by_hand])

# %% [markdown]
# **Why halve and not quarter?** A quarter would make LL the plain mean. With a half, the squares of the four bands add up
# to those of the four pixels, which is worth more (section 3). The price is that LL of an image in [0, 1] lies in [0, 2].
# (The paper's equations 1 and 2 do not say which factor; whoever takes another must scale the weight of the loss with it.)
#
# The same for a whole image: every second row and column, four slices.


# %%
def split(x):
    """[N, C, H, W] with even H and W to LL, LH, HL, HH of half the size."""
    a, b = x[..., ::2, ::2], x[..., ::2, 1::2]
    c, d = x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2


for name, ours, theirs in zip(("LL", "LH", "HL", "HH"), split(photo), (LL, LH, HL, HH), strict=True):
    check(f"{name} by hand and by PyWavelets", ours, theirs, 1e-6)

# %% [markdown]
# ## 3 · Why is nothing lost?
#
# Write the block as a column $(a,b,c,d)^\mathsf T$. Then the four formulas are one matrix $W$, and its rows are
# perpendicular and of length one. So $W$ is *orthogonal*, $W^\mathsf T W=I$: it turns (and mirrors) a four-dimensional
# space. Its transpose undoes it, and every length is kept.

# %%
W = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
check("matrix and paper", W @ torch.tensor([a, b, c, d]), by_hand, 1e-6)
check("rows are orthonormal", W @ W.T, torch.eye(4), 0)


# %%
def merge(LL, LH, HL, HH):
    """The inverse of `split`: the same signs, because W is symmetric."""
    a, b, c, d = (LL + LH + HL + HH) / 2, (LL + LH - HL - HH) / 2, (LL - LH + HL - HH) / 2, (LL - LH - HL + HH) / 2
    upper, lower = torch.stack([a, b], -1).flatten(-2), torch.stack([c, d], -1).flatten(-2)
    return torch.stack([upper, lower], -2).flatten(-3, -2)


check("inverse", merge(*split(photo)), photo, 1e-6)
shares = [band.double().square().sum() / photo.double().square().sum() for band in split(photo)]
check("Parseval: the shares of energy sum to 1", sum(shares), 1.0, 1e-6)

# %% [markdown]
# **What to see.** Both hold up to the rounding of 32-bit numbers. The second line is *Parseval's identity*. It is
# why one can speak of the energy of a band, and why an error in a band counts as much as the same error in pixels.
#
# ## 4 · How does a network see it?
#
# Four numbers times four pixels, then two pixels further: that is a convolution with four 2×2 filters and stride 2. Its
# filters are the rows of $W$.

# %%
filters = W.reshape(4, 1, 2, 2)
bands = F.conv2d(photo.reshape(3, 1, 96, 96), filters, stride=2)  # [3, 4, 48, 48]: one image per channel
for k, (name, band) in enumerate(zip(("LL", "LH", "HL", "HH"), split(photo), strict=True)):
    check(f"{name} by convolution", bands[:, k], band[0], 1e-6)
check("LL is twice the average pooling", split(photo)[0], 2 * F.avg_pool2d(photo, 2), 1e-6)

# %% [markdown]
# The package offers only what the loss needs, `haar_ll`, compiled for CPU and CUDA.
#
# **What does it cost?** Each pixel is read once and a quarter as many numbers are written: 1.25 floats moved per pixel.
# The convolution computes four bands to throw three away: 2 floats per pixel, even when perfectly implemented.

# %%
check("package", haar_ll(photo), split(photo)[0], 1e-6)
pixels, kept = photo.numel(), haar_ll(photo).numel()
print(f"LL alone: {(pixels + kept) * 4} bytes moved; all four bands: {(pixels + 4 * kept) * 4} bytes")

# %% [markdown]
# ### And if a side is odd?
#
# The last row or column has no partner. PyWavelets (`mode="symmetric"`) gives it its own mirror image, and so does the
# package; no pixel is dropped.

# %%
odd = torch.arange(35.0).reshape(1, 1, 5, 7) / 35
even = F.pad(odd, (0, 1, 0, 1), mode="replicate")  # 6×8: the mirror image of one pixel is that pixel
check("odd size, package and padding by hand", haar_ll(odd), split(even)[0], 1e-6)
check("odd size, package and PyWavelets", haar_ll(odd), pywt.dwt2(odd.numpy(), "haar", mode="symmetric")[0], 1e-6)

# %% [markdown]
# **Backwards.** Each pixel enters one coefficient with factor ½, so a gradient of 1 on LL puts ½ on every pixel. The
# pixel that was mirrored enters twice and gets 1, the corner four times and gets 2. A loss teaches only by its gradient,
# so we check that too.

# %%
leaf = odd.clone().requires_grad_()
haar_ll(leaf).sum().backward()
rows, columns = torch.tensor([1, 1, 1, 1, 2.0]), torch.tensor([1, 1, 1, 1, 1, 1, 2.0])
check("gradient at odd size", leaf.grad[0, 0], 0.5 * rows[:, None] * columns, 0)
print(leaf.grad[0, 0])

# %% [markdown]
# ## 5 · Which pattern lands in which band?
#
# Photographs mix all patterns. A drawn grating holds just one: stripes of a known width and direction.


# %%
def grating(period, angle, size=64):
    """Stripes ``period`` pixels apart, tilted by ``angle`` degrees; 0 draws upright stripes."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    turned = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
    return (0.5 + 0.5 * torch.cos(2 * math.pi * turned / period))[None, None]


def contrast(x):
    """Shares of the four bands in the energy of the stripes, the mean gray left out."""
    parts = torch.stack([band.double().square().sum() for band in split(x - x.mean())])
    return (parts / parts.sum()).tolist()


# %%
periods = [2.5, 3, 4, 5, 6, 8, 12, 16, 24]
curves = torch.tensor([contrast(grating(p, 0)) for p in periods])
figure, axes = panels(width=6.4, height=2.8)
for k, (name, marker) in enumerate(zip(("LL", "LH", "HL", "HH"), "osv^", strict=True)):
    axes.semilogx(periods, 100 * curves[:, k], marker=marker, label=name)
axes.set(xlabel="pixels between two upright stripes", ylabel="share of energy (%)", xticks=periods)
axes.set_xticks(periods, [f"{p:g}" for p in periods], minor=False)
axes.minorticks_off()
axes.axvspan(8, 25, color="0.9", linewidth=0, zorder=0)
axes.text(8.3, 45, "in a ×4\nlow resolution", size=8, color="0.3")
axes.set_xlim(2.4, 25)
axes.legend(frameon=False, loc="center right")
show(
    figure,
    f"Four lines of energy share over stripe distance. HL falls from {100 * curves[0, 2]:.0f} percent at 2.5 pixels to "
    f"{100 * curves[-1, 2]:.0f} percent at 24 pixels; LL rises from {100 * curves[0, 0]:.0f} to "
    f"{100 * curves[-1, 0]:.0f} percent. They cross at 4 pixels. LH and HH stay at 0. Gray: 8 pixels and more.",
)
check("at 4 pixels LL and HL share evenly", contrast(grating(4, 0)), [0.5, 0, 0.5, 0], 1e-5)
turned = contrast(grating(4, 90))
check("turned by 90 degrees, LH takes the part of HL", turned, [0.5, 0.5, 0, 0], 1e-5)


# %% [markdown]
# **What to see.** Upright stripes appear only in HL and LL. Fine ones are in HL, coarse ones in LL, and at four pixels
# they are split evenly. So "low frequency" in RFSR means *repeating after more than about four pixels*: a single hair is
# high frequency, a tabby's stripe is low. By symmetry, LH behaves like this for horizontal stripes.
#
# The gray field is what a picture four times smaller can hold: a stripe needs two pixels there, that is eight here. So
# between 4 and 8 pixels lies an octave that is *in LL and yet not in the low resolution* of ×4 super-resolution. A loss on LL
# holds the model to detail that nobody can know; notebook 05 measures what that does.
#
# Now turn the stripes yourself: click the slider's handle and use the arrow keys, or drag it.


# %%
def draw(angle):
    x = grating(3, angle)
    share = contrast(x)
    tiles = [x[0, 0], split(x)[0][0, 0] / 2, *(0.5 + band[0, 0] / 2 for band in split(x)[1:])]
    titles = ["stripes", *(f"{n} {100 * s:.0f} %" for n, s in zip(("LL", "LH", "HL", "HH"), share, strict=True))]
    text = ", ".join(titles[1:])
    return pictures(tiles, titles, tile=1.4), f"Stripes 3 pixels apart at {angle} degrees and their bands: {text}."


turner = explore(draw, values=range(0, 91, 15), label="angle")
turner

# %%
turner.slider.value = 45
show(*draw(45))

# %% [markdown]
# **What to see.** At 0° the fine stripes are in HL, at 90° in LH. In between they are in several bands at once, and not as
# one would guess: at 45° HH, the band of diagonals, is the smallest. That is *aliasing*. Every second sample of a fine
# pattern is not enough to follow it, and it turns up as a coarser one. (Try 15°: the small pictures show slow *beats* that
# are not in the original. The transform is lossless all the same, because the beats of the four bands cancel when they
# are merged.)
#
# ## 6 · How alike are two pictures? SSIM in ten lines
#
# The paper's Figure 1 compares bands by *structural similarity*. SSIM looks through a small Gaussian window and compares
# the means $\mu$, the variances $\sigma^2$ and the covariance $\sigma_{xy}$ of both pictures there:
#
# $$\text{SSIM}=\frac{(2\mu_x\mu_y+C_1)(2\sigma_{xy}+C_2)}{(\mu_x^2+\mu_y^2+C_1)(\sigma_x^2+\sigma_y^2+C_2)},
# \qquad C_1=0.01^2,\ C_2=0.03^2$$
#
# and takes the mean over all windows. ($C_1$ and $C_2$ keep the fraction from becoming 0/0 where both are flat and dark.)
# It is 1 only for equal pictures. The package clamps to [0, 1] before it measures, as
# saving the picture would; so must we.


# %%
def ssim_by_hand(x, y):
    x, y = (z.double().flatten(0, 1)[:, None] for z in (x, y))  # every channel is an image of its own
    g = torch.exp(-(torch.arange(-5, 6).double() ** 2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]  # 11×11, sums to 1
    blur = lambda z: F.conv2d(z, window)  # noqa: E731
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return value.mean()


# %%
blurred = F.avg_pool2d(F.pad(photo, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
error = (blurred - photo).square().mean().sqrt()
brighter = photo + error  # the same mean squared error, by construction
beyond = photo + 0.5  # most of it whiter than white
with together("SSIM with itself, blurred, brighter and beyond white"):
    for name, x in (("itself", photo), ("blurred", blurred), ("brighter", brighter), ("beyond white", beyond)):
        check(f"SSIM with {name}", ssim(x, photo)[0], ssim_by_hand(x.clamp(0, 1), photo), 1e-6)
for name, x in (("blurred", blurred), ("beyond white", beyond)):
    mse = (x.double().clamp(0, 1) - photo.double()).square().mean()
    check(f"PSNR of {name}", psnr(x, photo)[0], -10 * mse.log10(), 1e-5)

# %% [markdown]
# PSNR is the mean squared error in decibels, $-10\log_{10}\text{MSE}$: more is closer. Does SSIM tell us more? The three
# changed pictures below have the same squared error (the noisy one up to chance).

# %%
noisy = photo + error * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
versions = {"blurred": blurred, "brighter": brighter, "noisy": noisy}
titles = [f"{n}\nPSNR {psnr(x, photo)[0]:.1f} dB · SSIM {ssim(x, photo)[0]:.2f}" for n, x in versions.items()]
show(
    pictures([photo[0], *(x[0] for x in versions.values())], ["photograph\n", *titles], tile=1.92),
    "Four versions of the cat: " + spoken(["original", *titles]),
)

# %% [markdown]
# **What to see.** PSNR calls all three equally bad; you do not, and SSIM agrees with you that the brighter one is
# nearly perfect. Now the same per band, as the paper's Figure 1 does. Which damage sits where?

# %%
for name, x in versions.items():
    low, high = band_ssim(x, photo)
    print(f"{name:9s} low-band SSIM {low[0]:.2f}   high-band SSIM {high[0]:.2f}")
assert band_ssim(brighter, photo)[1] > 0.99, "a change of brightness must not reach the high bands"

# %% [markdown]
# Brightness touches only LL, and noise hurts the high bands most. Blurring takes nearly all detail out of the high bands;
# their SSIM stays far above 0 all the same, since most of their windows are nearly empty and $C_2$ forgives small numbers.
# (The bands have a range of 2, so `band_ssim` takes $C_1=0.02^2$ and $C_2=0.06^2$.) Read differences between high-band
# values, not the values themselves.
#
# ## 7 · A bug, and the check that catches it
#
# Someone writes `/ 4` for `/ 2`, because "LL is the average". Pictures would look the same after rescaling, shapes are
# right, and training would still work, with a loss half as strong. Parseval notices.


# %%
def wrong_split(x):
    LL, *rest = split(x)
    return LL / 2, *rest


caught(lambda: check("Parseval", sum(b.square().sum() for b in wrong_split(photo)) / photo.square().sum(), 1.0, 1e-4))

# %% [markdown]
# ## 8 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up).** What is LL of an image that is 0.3 everywhere? Predict the number, then return it.
# <details><summary>Hint</summary>What does section 2 do with the four pixels of a block?</details>


# %%
def constant_ll():
    raise NotImplementedError


exercise(1, lambda: check("LL of 0.3", constant_ll(), haar_ll(torch.full((1, 1, 2, 2), 0.3))[0, 0, 0, 0], 1e-6))


# %% [markdown]
# **Exercise 2.** Remove from a photograph everything finer than LL: keep LL, set the other bands to zero, merge.
# Predict the picture before you run: what do 2×2 pixels look like whose fine bands are zero?
# <details><summary>Hint</summary>`torch.zeros_like(LL)` three times.</details>


# %%
def coarse(x):
    raise NotImplementedError


def verify_coarse():
    low, *fine = split(coarse(photo))
    check("what is coarse stays", low, haar_ll(photo), 1e-6)
    check("nothing fine is left", torch.stack(fine), torch.zeros(3, *low.shape), 1e-6)


exercise(2, verify_coarse)


# %% [markdown]
# **Exercise 3 (harder).** RFSR's structure loss is $\operatorname{mean}|LL(x)-LL(y)|$. Find a change of the photograph that
# this loss cannot see although it alters every pixel by 0.1.
# <details><summary>Hint</summary>What does LL know of a block, and which changes of its four pixels keep that?</details>


# %%
def invisible(x):
    raise NotImplementedError


def verify_invisible():
    change = invisible(photo) - photo
    check("every pixel moved by 0.1", change.abs(), torch.full_like(photo, 0.1), 1e-6)
    check("and LL did not", haar_ll(invisible(photo)), haar_ll(photo), 1e-6)


exercise(3, verify_invisible)


# %% [markdown]
# That there are such changes is the point: the loss holds what is coarse and leaves the finest texture to the rewards.
# Where the border should lie is another question (section 5).
#
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Haar has the shortest filters. Which wavelet of PyWavelets keeps most energy of these photographs in a tenth of
#   its coefficients? An answer is a curve of energy over the share that is kept, for five wavelets and all
#   photographs.
# * Move a photograph by one pixel and take LL again. How much of the change is the movement, and how much is Haar's
#   grid? An answer is a map of the change, and a low-pass of the same size that changes less.
#
# ## Summary
#
# * Haar: four signed sums of each 2×2 block, halved; LL is twice the average.
# * As a matrix it is orthogonal: the transpose inverts it, energy is kept (Parseval).
# * As a convolution it has four 2×2 filters and stride 2; `haar_ll` computes just LL. Odd ends are mirrored.
# * Patterns wider than about four pixels are in LL; finer ones in the band of their direction.
# * SSIM compares means, contrasts and co-variation in 11×11 windows; `band_ssim` does so per band.
#
# NAVIGATION
