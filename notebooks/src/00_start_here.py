# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 00 · Start here
#
# **You will fine-tune a super-resolution model on this machine, see which of its losses does what, and find the notebook
# that answers your question.**
#
# A minute on two cores; nothing to download, no GPU. Needs only that you can read a little PyTorch.
#
# NAVIGATION
#
# ![A cup of coffee six times: low resolution, bicubic enlargement, the model before training, after training with the structure loss alone, with all losses, and the truth](before_after.webp)
#
# *Section 1 makes this picture, and says what of it is whose doing.*
#
# A super-resolution diffusion model enlarges a small photograph by removing noise in some 50 sampling steps. RFSR
# ([arXiv 2412.03268](https://arxiv.org/abs/2412.03268)) takes such a model, finished, and trains it a little further on
# *scores*: how much does a network like the picture? A model trained on scores alone learns to cheat. Two ideas keep it
# honest: early sampling steps are tied to the structure of the true photograph, and late ones to the style of the model
# before training. Afterwards you can
#
# * say what each of the four losses does to a picture, from having watched it,
# * read a table of such results without being misled by its best row,
# * predict which of the four losses notices which damage.
#
# **The map.** [01](01_make_such_a_model.ipynb) how such a model is made → [02](02_sample_by_hand.ipynb) the sampler →
# [03](03_split_bands.ipynb), [04](04_see_when_bands_form.ipynb) coarse and fine bands →
# [05](05_keep_the_low_band.ipynb) the structure loss → [06](06_ask_clip_iqa.ipynb), [07](07_ask_image_reward.ipynb) two
# rewards → [08](08_hold_the_style.ipynb) the style loss → [09](09_hold_the_model.ipynb) other ways to hold a model →
# [10](10_train_by_window.ipynb) training → [11](11_ablate_and_doubt.ipynb) its tables →
# [12](12_measure_the_doubt.ipynb) how sure a number is → [13](13_fuse_the_kernels.ipynb), [14](14_join_pytorch.ipynb)
# kernels → [15](15_reuse_and_scale.ipynb) your own model; beyond RFSR [16](16_leave_less_to_chance.ipynb) CCSR,
# [17](17_learn_from_pairs.ipynb) DP2O-SR and [18](18_open_other_models.ipynb) the published models. Section 4 says what
# each promises.

# %%
import io
import os
import tempfile
from contextlib import redirect_stderr

import diffusers
import torch
import torch.nn.functional as F
import transformers
from skimage.filters import gaussian

from rfsr_ext import gram_loss, haar_ll_l1_loss
from rfsr_ext.data import evaluation_crops, photographs
from rfsr_ext.losses import VGGGramLoss
from rfsr_ext.metrics import Judge, psnr, ssim
from rfsr_ext.models import load_model
from rfsr_ext.notebook import caught, check, exercise, explore, pictures, show, spoken
from rfsr_ext.rewards import create_reward
from rfsr_ext.sampling import TimestepWindows, generators, sample
from rfsr_ext.training import RFSRConfig, RFSRTrainer

os.environ["ACCELERATE_USE_CPU"] = "1"  # else training takes a GPU where there is one; everything here is on the CPU
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
crops = evaluation_crops(photographs("test"), size=128, count=6)
crops = {"cup": crops[0], "cat": crops[1], "flower": crops[5]}
lr, gt = (torch.stack([crop[key] for crop in crops.values()]) for key in ("lr", "gt"))
prompts = [crop["prompt"] for crop in crops.values()]

# %% [markdown]
# ## 1 · Who does what?
#
# The model ships with the package and stands in for SeeSR or PASD, large models that the paper trains ([its
# card](../rfsr_ext/weights/README.md)). It has never seen these three photographs. We fine-tune four copies of it, live,
# on crops of *other* photographs, with 5 sampling steps instead of the paper's 50. The settings are those of the preset
# `mini` (a file in the package) but for what `RUN` names: eight iterations are few, so the rewards weigh more and the style
# loss less, that something is to be seen.
#
# * **structure only**: the coarse half of the picture is held to the true photograph,
# * **rewards only**: two networks score the picture, and training raises their scores. `MiniIQA` stands in for CLIP-IQA
#   (is the picture sharp and clean?), `MiniPreference` for ImageReward (does it fit the prompt? ours hardly asks,
#   notebook 07). The style loss is on,
# * **all of RFSR**: structure in steps 1 and 2, rewards and style loss in step 5 (of 50: 1 to 20 and 41 to 50),
# * **no style loss**: the same without what holds the style. This one may cheat.
#
# All are sampled from the same noise, so what differs between two pictures is the training alone. *Bicubic*
# enlargement, which needs no network, stands beside them: a model that does not look better than that has no use. You
# need not read `RUN`; it makes the run short.

# %%
RUN = {"num_inference_steps": 5, "structure_window": [1, 2], "reward_window": [5, 5], "iterations": 8, "batch_size": 2,
       "learning_rate": 1.5e-4, "seed": 1, "validation_crops": 1, "validation_size": 32,
       "rewards": {"mini-iqa": 0.1, "mini-preference": 0.005}, "lambda_style": 3000}  # fmt: skip
LOSSES = {
    "structure only": {"reward_window": None},
    "rewards only": {"structure_window": None},
    "all of RFSR": {},
    "no style loss": {"style_loss": "none"},
}
model = load_model("mini")


def upscale(model):
    return sample(model, lr, prompts, generators(0, range(3)), RUN["num_inference_steps"])


images = {"bicubic": F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1), "base": upscale(model)}
with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):  # no progress bars
    for name, changes in LOSSES.items():
        config = RFSRConfig.load("mini", {**RUN, **changes, "output_dir": f"{folder}/{name}"})
        images[name] = upscale(RFSRTrainer(config, model.reference()).train().model)
images["truth"] = gt

# %%
iqa, preference, judge = create_reward("mini-iqa"), create_reward("mini-preference"), Judge.from_pretrained()
with torch.no_grad():
    scores = {
        name: {"judge": judge.score(x), "PSNR": psnr(x, gt), "SSIM": ssim(x, gt),
               "MiniIQA": iqa.score(x), "MiniPreference": preference.score(x, prompts)}
        for name, x in images.items()
    }  # fmt: skip


def caption(name, k, what=("judge", "MiniIQA")):
    digits = {"judge": ".0f", "PSNR": ".1f", "MiniIQA": ".2f"}
    return f"{name}\n" + " · ".join(f"{w} {scores[name][w][k]:{digits[w]}}" for w in what)


columns = ["bicubic", "base", "structure only", "all of RFSR", "truth"]
show(
    pictures([lr[0], *(images[name][0] for name in columns)],
             ["low resolution\n", *(caption(name, 0) for name in columns)], columns=3, tile=2.56),
    "A cup of coffee, 32 by 32 coarse pixels, enlarged to 128: " + spoken(caption(name, 0) for name in columns),
)  # fmt: skip

# %% [markdown]
# **What to see.** Look at the rim of the cup and the edge of the coffee, first in *bicubic* and *base*: whose edges are
# sharper, and who draws things that the truth does not have? Then in *base*, *structure only* and *all of RFSR*. What
# is there with the structure loss alone is not the rewards' doing, whatever the picture is called; only what differs
# between the last two can be. If you see little between them, so did we: with the full preset, of 40 blind pairs of
# *base* and fine-tuned picture the fine-tuned one was chosen in 23, which 40 pairs cannot tell from chance (notebook
# [12](12_measure_the_doubt.ipynb)).
#
# Now all columns, as numbers. The *judge* is a score of about 0 (ruined) to 100 (untouched) that
# nothing was trained on, so it comes first; the two rewards come last, because they were told to rise.

# %%
names = ("judge", "PSNR", "SSIM", "MiniIQA", "MiniPreference")
print(f"{'mean of three':15s}" + "".join(f"{name:>16s}" for name in names))
for name, row in scores.items():
    print(f"{name:15s}" + "".join(f"{row[n].mean():16.2f}" for n in names))
print("\nchange against base:")
for name in LOSSES:
    change = {n: (scores[name][n] - scores["base"][n]).mean().item() for n in names}
    words = [f"{n} {'up' if c > 0 else 'down'} {abs(c):.2f}" for n, c in change.items()]
    print(f"{name:15s}" + ", ".join(words))
above = [crop for k, crop in enumerate(crops) if scores["all of RFSR"]["MiniIQA"][k] > scores["truth"]["MiniIQA"][k]]
print("\nMiniIQA likes the result of RFSR better than the true photograph:", ", ".join(above) or "nowhere")

# %% [markdown]
# **What to see.** Read the table by columns. Rewards that rise prove nothing: they were trained on. Do judge, PSNR and SSIM
# rise with them, stay, or fall? A score above that of the *truth* is a warning: no picture should be a better photograph
# than the photograph. *A reward can be pleased by a picture that is less true*; that is called **reward hacking**, and
# where the style loss is missing it has its way. Here are the pictures that belong to the numbers.

# %%
place = ((1, 40, 64), (2, 8, 20))  # cat and flower: number, top, left
columns = ["bicubic", "base", "rewards only", "all of RFSR", "no style loss", "truth"]
tiles, titles = [], []
for k, top, left in place:
    for column in columns:
        tiles.append(images[column][k, :, top : top + 64, left : left + 64])
        titles.append(caption(column, k))
show(
    pictures(tiles, titles, columns=6, tile=1.92),
    "Details of 64 pixels, above a cat's and below a flower's, with the scores of the whole pictures: "
    + spoken(titles),
)

# %% [markdown]
# **What to see.** What does *no style loss* do to contrast, edges and color? Is there a trace of the same in *rewards only*
# and *all of RFSR*? That is what the rewards ask for; the style loss makes it smaller, it does not forbid it.
#
# *How much is luck?* Much: this is a short run, with one seed, on three photographs. Change `seed` in the second code cell
# and see what stays. So this is a demonstration, not evidence. Evidence is the full preset, measured on many held-out crops
# and over training seeds: [the card](../rfsr_ext/weights/README.md) has the table, the row of the judge included, and
# notebook [12](12_measure_the_doubt.ipynb) doubts it. `make demo` runs the preset once.
#
# ## 2 · What did training change?
#
# Take the difference that all of RFSR made, and exaggerate it. Run the next cell in JupyterLab, click the handle and
# press →. (No slider? See [Start](README.md#start).)

# %%
before, after = images["base"], images["all of RFSR"]


def draw(times):
    exaggerated = (before + times * (after - before)).clamp(0, 1)
    with torch.no_grad():
        values = zip(crops, iqa.score(exaggerated), judge.score(exaggerated), strict=True)
    titles = [f"{name}\nMiniIQA {liking:.2f} · judge {judged:.0f}" for name, liking, judged in values]
    alt = (
        f"The three pictures with {times} times the change that training made. "
        + ", ".join(titles).replace("\n", " ")
        + "."
    )
    return pictures(list(exaggerated), titles, tile=2.56), alt


change = explore(draw, values=range(5), label="times the change")
change

# %%
change.slider.value = 3
assert "with 3 times the change" in change.panel.value, "the slider must redraw its panel"
show(*draw(3))

# %% [markdown]
# **What to see.** At 3 the direction of the training is plain: look for edges, shadows and shifted colors. Which of the two
# scores goes on rising, and which does not? Notebook 09 lets a training run far in the direction of the reward.
#
# ## 3 · Which loss notices what?
#
# RFSR has four loss terms. **Predict first**: which of them complain when the photograph is (a) blurred, (b) moved by one
# pixel, (c) made noisy, (d) brightened? Write down four times four yes or no, then run. (No model takes part here, so the
# style loss compares with the untouched photograph.)
#
# | term | compares with | through |
# |---|---|---|
# | structure | the true photograph | 2×2 averages |
# | quality reward | nothing | a network, one number |
# | preference reward | the prompt | a network, one number |
# | style loss | the model before training | Gram matrices of VGG19's layers (here with random weights, a stand-in) |

# %%
style = VGGGramLoss(weights="random")
whole = gt[..., 32:96, 32:96]  # the middle of the three true photographs
damages = {
    "blurred": torch.from_numpy(gaussian(whole.numpy(), sigma=(0, 0, 1.5, 1.5))),
    "moved by 1": gt[..., 32:96, 33:97],
    "noisy": (whole + 0.08 * torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1),
    "brighter": (whole + 0.1).clamp(0, 1),
}
rows = {}
with torch.no_grad():
    for name, x in damages.items():
        likes = [(r.score(x, prompts) - r.score(whole, prompts)).mean().item() for r in (iqa, preference)]
        rows[name] = [haar_ll_l1_loss(x, whole).item(), *likes, 1e6 * style(x, whole).item()]
print("            structure    quality  preference   style (millionths)")
for name, (structure, quality, liking, apart) in rows.items():
    print(f"{name:11s} {structure:9.3f} {quality:+10.2f} {liking:+11.2f} {apart:14.1f}")
pleased = [f"{name} ({who})" for k, who in ((1, "quality"), (2, "preference")) for name in rows if rows[name][k] > 0]
print("\na damage that pleases a reward:", ", ".join(pleased) or "none")
assert max(rows, key=lambda name: rows[name][0]) == "brighter", "brightness is low-frequency"

# %% [markdown]
# **What to see.** The two reward columns are changes against the untouched photograph, so minus means dislike. Neither
# reward has a truth to compare with; what the last line names, they would even ask for. The structure loss has a truth, and
# answers the other way round: brightness is its loudest alarm, and blur, a lack of detail, one of its quietest. A shift by
# one pixel it minds about as much as the blur; the style loss, which forgets where things are, hardly at all. No term
# alone would do.
#
# Two of the four are compiled for CPU and CUDA, the structure loss and the Gram loss of the style loss. Where a compiler was
# missing, PyTorch serves instead, slower but to the same result (`rfsr doctor` says which it is). Their formulas, for
# pictures $x$ and $y$ whose features are the rows of $F$ and $G$ ($LL$ is twice the average of every 2×2 block):
#
# $$L_{structure}=\operatorname{mean}\,|LL(x)-LL(y)|\qquad L_{gram}=\Big\|\tfrac{FF^\mathsf T-GG^\mathsf T}{CHW}\Big\|_F^2$$
#
# `check` compares two results and prints one quiet line if they are equal (*exact*) or as near as it says. If not, it says
# how far apart they are, and stops the notebook. Sums taken in another order differ in their last digits.

# %%
by_hand = (2 * F.avg_pool2d(before - gt, 2)).abs().mean()
check("structure loss", haar_ll_l1_loss(before, gt), by_hand, 1e-6)
check("brightening by 0.1 costs 0.2 where nothing clips", haar_ll_l1_loss(0.5 * gt + 0.1, 0.5 * gt), 0.2, 1e-6)
f, g = before.flatten(2), gt.flatten(2)  # [3, 3, H·W]: the three colors serve as features
by_hand = ((f @ f.mT - g @ g.mT) / f[0].numel()).square().sum((1, 2)).mean()
check("Gram loss", gram_loss(before, gt), by_hand, 1e-6)

# %% [markdown]
# ## 4 · Where do I find what?
#
# Each notebook stands alone. In order they lead from how a diffusion model is made (01) and sampled (02) to the trained
# model (10), then to doubts (11, 12), speed (13, 14) and your own model (15). 16 and 17 teach two other methods that train
# such models, and 18 opens the models that people publish. The paper and the code published with it are not the same
# method: [all differences](paper_and_released_code.md).
#
# CONTENTS
#
# ## 5 · A bug, and the check that catches it
#
# Someone writes `sum` for `mean` in the structure loss. Training would still run, with a loss tens of thousands of
# times too large, which drowns the rewards. A comparison with the formula notices at once.


# %%
def wrong_loss(x, y):
    return (2 * F.avg_pool2d(x - y, 2)).abs().sum()


caught(lambda: check("structure loss", wrong_loss(before, gt), haar_ll_l1_loss(before, gt), 1e-6))

# %% [markdown]
# ## 6 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS. *Run All* never
# stops at an open one.
#
# **Exercise 1 (warm-up).** Training draws one sampling step per iteration, evenly from those that have a loss: of 50 steps,
# structure at 1 to 20 and rewards at 41 to 50. What share of the iterations trains structure?
# <details><summary>Hint</summary>Every step of either window is drawn equally often. How many has each?</details>


# %%
def share_of_structure():
    raise NotImplementedError


def verify_share():
    windows = TimestepWindows.from_steps(20, 40, 50)
    check("share", share_of_structure(), sum(map(windows.in_structure, windows.steps())) / len(windows.steps()), 1e-6)


exercise(1, verify_share)


# %% [markdown]
# **Exercise 2.** Find a picture, different from `gt`, whose Gram loss to `gt` is zero (a rounding error counts as zero).
# <details><summary>Hint</summary>A Gram matrix adds up over all pixels. It does not know where they are.</details>


# %%
def same_style(x):
    raise NotImplementedError


def verify_style():
    assert (same_style(gt) - gt).abs().mean() > 0.01, "this is still the same picture"
    check("Gram loss", gram_loss(same_style(gt), gt), 0.0, 1e-8)


exercise(2, verify_style)


# %% [markdown]
# **Exercise 3.** LPIPS in the paper's Table 1, before and after RFSR, for four models on three data sets (lower is closer
# to the truth). In how many of the twelve did fidelity get *worse*? Return the count.
# <details><summary>Hint</summary>Worse means the second number is larger.</details>

# %%
lpips = [(0.3659, 0.3882), (0.3556, 0.3693), (0.4410, 0.4277), (0.3329, 0.3369), (0.3497, 0.3933), (0.3480, 0.3729),
         (0.2413, 0.2654), (0.2346, 0.2761), (0.2760, 0.2838), (0.2969, 0.3153), (0.2252, 0.2468), (0.2354, 0.2642)]  # fmt: skip


def worse(pairs):
    raise NotImplementedError


def verify_worse():
    check("a case you can count", worse([(1, 2), (1, 3), (2, 1), (1, 1)]), 2, 0)
    check("one case after another", worse(lpips), sum(worse([pair]) for pair in lpips), 0)
    check("no case is both", worse(lpips) + worse([pair[::-1] for pair in lpips]), len(lpips), 0)
    print(f"LPIPS got worse in {worse(lpips)} of {len(lpips)}")


exercise(3, verify_worse)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Find a damage that you see at once and that none of the four losses of section 3 notices. An answer is the
#   picture, its four losses beside those of a harmless change, and a sentence for each loss that says why it misses
#   it.
# * Train with three weights of the rewards and let two friends rank the results without knowing which is which. Which
#   of the printed measures ranks them like your friends? An answer is a table of both orders for at least six crops.
#
# ## Summary
#
# * RFSR trains a finished model on scores: denoise without gradient, one step with it, decode, compute the loss, move
#   the weights.
# * What training changed is not all the rewards' doing: most iterations are supervised by the truth.
# * Quote a result with its whole row: judge and fidelity beside the rewards, and the truth's own score.
# * In the paper's Table 1 LPIPS, a distance to the truth, gets worse nearly everywhere (exercise 3).
# * Structure loss and style loss compare with a picture; the rewards compare with none, so they can be cheated.
#
# NAVIGATION
