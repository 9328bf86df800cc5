# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 07 · Ask ImageReward
#
# **You will turn "A is better than B" into a score, feed it pictures and prompts, and cap it where a picture is good
# enough.**
#
# A quarter of a minute on two cores; nothing to download. Notebook 06 explains what a reward is and how it can be fooled.
#
# NAVIGATION
#
# The second reward of RFSR, ImageReward, learned from people who compared pictures made for the same prompt. It reads
# the prompt, too. Afterwards you can
#
# * fit scores to comparisons (Bradley–Terry), and say why such scores have no zero and no unit of their own,
# * follow picture and prompt into the network, and say what it cannot see,
# * write $\text{relu}(2-r)$ and its gradient, and say when its dead zone helps,
# * balance rewards of different scales.

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from rfsr_ext.data import PHOTOGRAPHS, evaluation_crops, load_photograph, photographs
from rfsr_ext.data.distortions import INPUT_FAULTS, distort
from rfsr_ext.metrics import psnr
from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show, spoken
from rfsr_ext.recordings import recorded, say_missing
from rfsr_ext.rewards import (
    CallableReward,
    ImageReward,
    MiniIQA,
    MiniPreference,
    WeightedReward,
    create_reward,
    reward_loss,
)
from rfsr_ext.rewards.compose import RunningStatistics
from rfsr_ext.rewards.image_reward import TEXT, VISION, ImageRewardModel, load_tokenizer
from rfsr_ext.weights import registry

cat = torch.from_numpy(load_photograph("chelsea").copy()).movedim(-1, 0)  # [3, 300, 451] in [0, 1]
eye = cat[None, :, 80:176, 110:206]
small = F.interpolate(eye, scale_factor=0.5, mode="bilinear", antialias=True)
soft = F.interpolate(small, scale_factor=2, mode="bilinear")


def gradient(score, x):
    """d (sum of scores) / dx by automatic differentiation."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(score(x).sum(), x)[0]


# %% [markdown]
# ## 1 · How do comparisons become scores?
#
# Ask people for a mark from 1 to 10, and everyone means something else. Ask *which of these two is better*, and they
# agree more often. Bradley and Terry's model turns such answers into scores $r$: the larger the difference, the more
# often A wins,
#
# $$P(A\text{ beats }B)=\sigma(r_A-r_B),\qquad \mathcal L=-\frac1N\sum\log\sigma(r_{\text{winner}}-r_{\text{loser}}).$$
#
# **On paper:** the derivative of $-\log\sigma(d)$ is $-\bigl(1-\sigma(d)\bigr)$. So a comparison pushes the winner up
# and the loser down by the probability with which the scores had it wrong. Let five pictures with hidden scores play
# 2000 matches, and find the scores from the results alone.


# %%
def votes_loss(r, winner, loser):
    return -(1 / (1 + torch.exp(r[loser] - r[winner]))).log().mean()


def votes_gradient(r, winner, loser):
    surprise = (1 - torch.sigmoid(r[winner] - r[loser])) / len(winner)
    push = torch.zeros_like(r)
    return push.index_add(0, winner, -surprise).index_add(0, loser, surprise)


hidden = torch.tensor([-1.5, -0.5, 0.0, 0.5, 1.5])
random = torch.Generator().manual_seed(0)
first = torch.randint(5, (2000,), generator=random)
second = (first + torch.randint(1, 5, (2000,), generator=random)) % 5
wins = torch.rand(2000, generator=random) < torch.sigmoid(hidden[first] - hidden[second])
winner, loser = torch.where(wins, first, second), torch.where(wins, second, first)
r = torch.zeros(5)
for _ in range(300):
    r = r - 2 * votes_gradient(r, winner, loser)
print("hidden   ", *(f"{x:6.1f}" for x in hidden))
print("recovered", *(f"{x:6.1f}" for x in r))
check("gradient", votes_gradient(hidden, winner, loser), gradient(lambda r: votes_loss(r, winner, loser), hidden), 1e-6)
check("five hidden scores", r, hidden, 0.3)
check("all scores higher by 7: the same loss", votes_loss(r + 7, winner, loser), votes_loss(r, winner, loser), 1e-5)

# %% [markdown]
# **What to see.** The scores come back from nothing but results. The last line is important: comparisons fix only
# *differences*. The scores of a trained network may lie anywhere, so its makers move them to a common place.
# ImageReward subtracts the mean 0.1672 of its raw scores and divides by their standard deviation 1.0333: 0 is an
# average picture, ±1 a usual deviation, and there is no upper bound.
#
# ## 2 · A small network trained like that
#
# ImageReward learned from about 137 000 comparisons and is too large to come with this course. MiniPreference plays
# its part: a small network trained with the same loss, on pairs made by machine. In each pair one picture is a worse
# version of the other, or the prompt is that of another picture. Ask it about photographs it has never seen.

# %%
preference = MiniPreference.from_pretrained()
print(preference.label)
samples = evaluation_crops(photographs("test"), 64, 48)
clean, prompts = torch.stack([s["gt"] for s in samples]), [s["prompt"] for s in samples]
rng = np.random.default_rng(0)
worse = [distort(x.movedim(0, -1).numpy(), list(INPUT_FAULTS), rng) for x in clean]
worse = torch.from_numpy(np.stack(worse)).movedim(-1, 1)
good, bad = (preference.score(x, prompts) for x in (clean, worse))
right = (good > bad).double().mean().item()
figure, axes = panels(width=4.6, height=3.4)
axes.axline((0, 0), slope=1, color="#999999", linestyle="-", linewidth=1)
axes.plot(bad, good, "o", markersize=5)
axes.set(xlabel="score of the distorted version", ylabel="score of the original")
show(
    figure,
    "48 crops of held-out photographs: score of the original over the score of a blurred, shrunk, noisy or JPEG version. "
    f"{100 * right:.0f} percent of the points lie above the diagonal, where the original wins.",
)
expected = [torch.sigmoid(unit * (good - bad)).mean().item() for unit in (1, preference.std)]
print(f"original wins {100 * right:.0f} %")
print(f"σ of the differences: {100 * expected[0]:.0f} % on average, before standardizing {100 * expected[1]:.0f} %")
print(f"the standard deviation that standardizing divided by: {preference.std:.1f}")
assert right > 0.5, "the stand-in must prefer most originals"

# %% [markdown]
# **What to see.** How often does the original win? Now take the differences with more care. By section 1, σ of a difference
# should be the chance that the original wins. But it is no probability any more: standardizing divided the scores by the
# number printed and took their unit away (exercise 1). In the unit of the loss σ is another number. If even that is below
# the share of wins, this weak network is right more often than it believes.
#
# ## 3 · What does the prompt do?
#
# The text half of MiniPreference cuts the prompt into pieces with numbers (*tokens*), looks up 64 trained values for
# each, averages and projects them. The picture half gives 64 values, too, and a quality $q$. Together, with a trained
# factor $a$ and the mean and std of the training pairs:
#
# $$r=\frac{q+a\cos(\text{picture},\text{text})-\text{mean}}{\text{std}}$$
#
# In SeeSR, one of the paper's models, the prompt comes from a *tagger*, a network that lists what it recognizes: "cat,
# eyes, fur". Such a list is not a sentence, and a wrong tag may hide among right ones. So a term of the loss has the
# option `tags`: each part between commas is asked by itself, and the mean or the worst answer counts.
#
# The first cell below checks all this. The second exchanges prompts between four of the photographs the network was
# trained on. The third does the same with more of them, and with photographs it has not seen.

# %%
prompt = ", ".join(PHOTOGRAPHS["chelsea"].tags)
ids = preference.tokenizer(prompt).input_ids
print(prompt)
print(ids, preference.tokenizer.convert_ids_to_tokens(ids))


def preference_by_hand(images, prompt):
    words = preference.words.weight[preference.tokenizer(prompt).input_ids].mean(0)
    text = preference.text_projection(words)
    maps = preference.features(2 * images - 1)
    picture = preference.image_projection(maps.mean((2, 3)))
    cos = (picture * text).sum(-1) / (picture.norm(dim=-1) * text.norm())
    q = preference.quality(maps).mean((1, 2, 3))
    return (q + preference.temperature * cos - preference.mean) / preference.std


for x in (eye, cat[None, :, 30:78, 50:120]):
    check(f"score of {x.shape[2]}×{x.shape[3]}", preference_by_hand(x, prompt), preference.score(x, [prompt]), 1e-5)
    package = gradient(lambda x: preference.score(x, [prompt]), x)
    check("its gradient", gradient(lambda x: preference_by_hand(x, prompt), x), package, 1e-6)
two = preference.score(torch.cat([eye, eye]), [prompt, "moon"])  # a batch pads the shorter prompt
check("padding changes nothing", two, torch.cat([preference.score(eye, [p]) for p in (prompt, "moon")]), 1e-5)
parts = torch.cat([preference.score(eye, [tag]) for tag in ("cat", "eyes", "fur", "whiskers")])
for tags, wanted in (("mean", parts.mean()), ("worst", parts.min())):
    found = WeightedReward(preference, weight=1.0, tags=tags).score(eye, [prompt])[0]
    check(f"tags: {tags}", found, wanted, 1e-6)

# %%
names = ["astronaut", "brick", "china", "motorcycle"]
texts = [", ".join(PHOTOGRAPHS[name].tags) for name in names]
table = torch.zeros(4, 4)
for row, name in enumerate(names):
    x = torch.stack([s["gt"] for s in evaluation_crops([name], 64, 8)])
    for column, text in enumerate(texts):
        table[row, column] = preference.score(x, [text] * 8).mean()
strip = [torch.from_numpy(load_photograph(name).copy()).movedim(-1, 0)[None, :, :300, 80:380] for name in names]
strip = torch.cat([F.interpolate(x, size=72, mode="bilinear", antialias=True)[0] for x in strip], dim=1)
figure, (left, axes) = panels(columns=2, width=6.8, height=3.3, width_ratios=[1, 7])
left.imshow(strip.clamp(0, 1).movedim(0, -1), aspect="auto")
left.set_axis_off()
axes.imshow(table - table.mean(1, keepdim=True), cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
axes.set_xticks(range(4), [f"“{PHOTOGRAPHS[name].tags[0]}, …”" for name in names])
axes.set_yticks(range(4), names)
for row in range(4):
    for column in range(4):
        axes.text(column, row, f"{table[row, column]:.2f}", ha="center", va="center", fontsize=10)
axes.set(xlabel="prompt")
others = (table.sum(1) - table.diag()) / 3
rows = [f"{name} {table[i, i]:.2f} with its own prompt, {others[i]:.2f}" for i, name in enumerate(names)]
show(
    figure,
    "Scores of four photographs (rows) with four prompts (columns): "
    + "; ".join(rows)
    + " on average with the others.",
)
print("the own prompt scores highest in", int((table.argmax(1) == torch.arange(4)).sum()), "of 4 rows")


# %%
NO_SCENES = "hubble_deep_field", "immunohistochemistry", "moon", "retina"  # bundled, too, but not trained on


def own_prompt_wins(split):
    samples = evaluation_crops([name for name in photographs(split) if name not in NO_SCENES], 64, 48)
    images, own = torch.stack([s["gt"] for s in samples]), [s["prompt"] for s in samples]
    wins = preference.score(images, own) > preference.score(images, own[1:] + own[:1])
    return 100 * wins.double().mean().item()


for split in ("train", "test"):
    print(f"{split:5s}: own prompt beats the next picture's in {own_prompt_wins(split):.0f} % of 48 crops")

# %% [markdown]
# **What to see.** Read along a row: the same picture gets another score with another prompt (violet above the row's mean,
# orange below). Is the own prompt the darkest violet? (Down a column you would compare different pictures, which differ in
# quality as well.) But we picked four photographs whose words differ. The last two lines ask more of them. 50 % is a coin.
# If the share falls towards it on photographs not seen, the network knows *these prompts with these pictures*, not words: a
# few dozen photographs teach no English. Then, on every held-out picture, our second reward is a second *quality* score,
# and what notebooks 10 and 11 measure with it says nothing of prompts. A reward is only as good as what it was trained
# on. The real ImageReward has seen far more and has limits of the same kind.
#
# ## 4 · The real network
#
# ImageReward is built on BLIP, a network for pictures and their captions: a vision transformer, and a BERT (a
# transformer for text) that at each of its 12 layers also looks at the picture. Of the text's output only the first
# position goes on, through five linear layers to one number.

# %%
with torch.device("meta"):  # shapes only, no memory
    full = ImageRewardModel()
parts = {
    "picture: 24 layers, 1024 wide": full.vision,
    "text: 12 layers, 768 wide": full.text,
    "head: 5 linear layers": full.head,
}
for name, part in parts.items():
    print(f"{name:30s} {sum(p.numel() for p in part.parameters()) / 1e6:6.1f} million")
total = sum(p.numel() for p in full.parameters())
print(f"{'all':30s} {total / 1e6:6.1f} million; {2 * total / 2**30:.1f} GiB in bfloat16")
print(f"{'MiniPreference':30s} {sum(p.numel() for p in preference.parameters()) / 1e6:6.1f} million")

# %% [markdown]
# Between the five linear layers stands *nothing*: no activation, only dropout in training. Five linear maps after one
# another are one linear map. So ImageReward's whole head is a scalar product with one vector, and then the
# standardization of section 1. The same class built tiny shows it. **Its weights are random** and it knows two words, so
# its scores mean nothing, but its wiring is the real one.


# %%
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "cat", "fur"]
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(folder)
torch.manual_seed(0)
width = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 72}
text = TEXT | width | {"vocab_size": len(tokenizer), "bos_token_id": 2, "sep_token_id": 3}
random_reward = ImageReward(ImageRewardModel(VISION | width, text), tokenizer)


def head_by_hand(first_position):
    weight, bias = torch.eye(36), torch.zeros(36)
    for layer in random_reward.model.head.values():
        weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    raw = first_position @ weight[0] + bias[0]
    return (raw - 0.16717362830052426) / 1.0333394966054072


ids, mask = random_reward.tokens(["Cat, fur", "fur, " * 40])  # the first is padded to 35 places, the second cut
pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
seen = random_reward.model.vision(pixel_values=pixels).last_hidden_state
read = random_reward.model.text(
    input_ids=ids, attention_mask=mask, encoder_hidden_states=seen,
    encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
).last_hidden_state  # fmt: skip
check("one vector and the package", head_by_hand(read[:, 0]), random_reward.model(ids, mask, pixels), 1e-6)

# %% [markdown]
# What does this network see of a picture? Always 224×224 pixels: the shorter side is resized to 224, and the middle cut
# out. The original does that with Pillow on 8-bit pictures, which lets no gradient through (notebook 06, section 10). The
# package does it in PyTorch. One gray level of difference comes from Pillow's roundings. Resizing is linear, so its
# gradient is the same for every picture, also where the result is cut to [0, 1], as at the edges of a black and white one.

# %%
mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
photograph = Image.fromarray((255 * cat.movedim(0, -1)).round().byte().numpy())
by_pillow = photograph.resize((336, 224), Image.Resampling.BICUBIC).crop((56, 0, 280, 224))
ours = (random_reward.preprocess(cat[None]) * std + mean)[0].movedim(0, -1)
check("gray levels, package and Pillow", 255 * ours, np.asarray(by_pillow), 1.5)
push = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2)).double()
contrasts = (cat[None] > 0.5).double(), 0.4 + 0.2 * (cat[None] > 0.5).double()
strong, weak = (gradient(lambda x: random_reward.preprocess(x) * push, x) for x in contrasts)
check("the gradient passes where pixels were cut", strong, weak, 1e-9)
columns = (weak[0] != 0).any(0).any(0).nonzero()
print(f"it reaches columns {columns.min():d} to {columns.max():d} of 451")

# %% [markdown]
# Now the consequence. RFSR trains at 512×512; at 224 each new pixel stands for 2.3×2.3 old ones. What is left of stripes?

# %%
periods = [2, 3, 4, 5, 6, 8, 12, 16, 24, 32]


def left_of_stripes(period):
    wave = 0.1 * torch.sin(2 * torch.pi * torch.arange(512) / period + 0.5)
    gray = torch.full((1, 3, 512, 512), 0.5)
    change = (random_reward.preprocess(gray + wave) - random_reward.preprocess(gray)) * std
    return (change.std() / wave.std()).item()


shares = {period: left_of_stripes(period) for period in periods}
figure, axes = panels(width=6.0, height=2.6)
axes.semilogx(periods, [100 * shares[p] for p in periods], marker="o")
axes.set(xlabel="pixels between two stripes, in a picture of 512", ylabel="left at 224 (%)", ylim=(0, 110))
axes.set_xticks(periods, [str(p) for p in periods])
axes.minorticks_off()
show(
    figure,
    "How much of the contrast of stripes ImageReward's preprocessing leaves of a 512-pixel picture: "
    + ", ".join(f"{100 * shares[p]:.0f} percent at {p} pixels" for p in (2, 3, 4, 6, 8, 16, 32))
    + ".",
)
assert max(shares[2], shares[3]) < 0.1 < 0.9 < shares[16]

# %% [markdown]
# **What to see.** Stripes two or three pixels apart are gone before the network begins, and of those four pixels apart
# two thirds of the contrast. ImageReward judges what a picture shows and how it is composed; it can hardly ask for fine
# texture, nor see it go wrong. CLIP-IQA looks at the picture in full size. That fits what the paper writes of its Table
# 3: with ImageReward alone pictures are coherent but less clear, with CLIP-IQA alone sharp but with wrong textures and
# noise.
#
# The next cell asks the published weights, if they are on this machine, and otherwise says what is missing.

# %% tags=["nbval-ignore-output"]
needed = {"the file ImageReward.pt": "image-reward", "the file vocab.txt of bert-base-uncased": "bert-vocabulary"}
missing = [what for what, name in needed.items() if registry.find(name) is None]
if missing:
    print("NOT RUN, missing:", " and ".join(missing))
    print("to get them: `rfsr weights fetch image-reward` and `rfsr weights fetch bert-vocabulary`")
else:
    real = create_reward("image-reward")
    for sentence in ("a photo of a cat", "a photo of the moon"):
        print(f"{sentence:20s} ImageReward {real.score(cat[None], [sentence]).item():.2f}")

# %% [markdown]
# Does the real ImageReward read the prompt? `rfsr record image-reward` gives each of seven photographs its own prompt
# and the six others'. Read along a row, as in section 3: is the own prompt the highest?

# %% tags=["nbval-ignore-output"]
if (recording := recorded("image-reward")) is None:
    say_missing("image-reward")
else:
    print(recording.provenance)
    table = recording.rows.pivot(index="photograph", columns="prompt_of", values="score")
    print(table.round(2).to_string())
    print(f"the own prompt scores highest in {(table.idxmax(axis=1) == table.index).sum()} of {len(table)} rows")

# %% [markdown]
# ## 5 · Can a prompt be hacked?
#
# Notebook 06 climbed a score that knows no prompt. This one reads a prompt, so climb it with a *wrong* one. We start from
# a face, a photograph that MiniPreference was trained on, and follow the gradient in three ways: with the face's own
# prompt; with the prompt of the motorcycle; and with the *difference* of the two scores. In the difference the quality $q$
# drops out, and only the prompts are left. Every step moves a pixel by 0.003 on average.


# %%
own, other = texts[0], texts[3]
face = torch.from_numpy(load_photograph("astronaut").copy()).movedim(-1, 0)[None, :, 20:212, 120:312]
face = F.interpolate(face, size=64, mode="bilinear", antialias=True)


def ascend(loss, x, steps=40, length=0.33):
    """Follow the negative gradient of a loss; the end, and how many steps it took until no gradient was left."""
    for step in range(steps):
        g = gradient(loss, x)
        if not g.any():
            return x, step
        x = (x - length * g / g.norm()).clamp(0, 1)
    return x, steps


def asked(x):
    """The scores with both prompts."""
    return torch.stack([preference.score(x, [text] * len(x)) for text in (own, other)])


ways = {
    "its own prompt": lambda x: -asked(x)[0],
    "the motorcycle's": lambda x: -asked(x)[1],
    "the difference": lambda x: asked(x)[0] - asked(x)[1],
}
ends = {"start": face} | {name: ascend(loss, face)[0] for name, loss in ways.items()}
both_scores = {name: asked(x)[:, 0].tolist() for name, x in ends.items()}

# %%
changes = {name: x[0] - face[0] for name, x in ends.items() if name != "start"}
largest = max(change.abs().max() for change in changes.values())
titles = [f"{n}\nown {a:.1f}, motorcycle {b:.1f}" for n, (a, b) in both_scores.items()]
tiles = [x[0] for x in ends.values()] + [torch.full_like(face[0], 0.5)]
tiles += [0.5 + change / largest / 2 for change in changes.values()]
show(
    pictures(tiles, titles + ["", *(f"change by {name}" for name in changes)], tile=1.92, columns=4),
    "A face before and after 40 steps of ascent in three ways, below the changes. Scores with the own and with the "
    "motorcycle's prompt: " + spoken(titles),
)  # fmt: skip
gaps = {name: b - a for name, (a, b) in both_scores.items()}
for name, gap in gaps.items():
    print(f"{name:17s} the motorcycle's prompt scores {'higher' if gap > 0 else 'lower'} than the own one: {gap:+.1f}")
flat = [change.flatten() for change in changes.values()]
same = F.cosine_similarity(flat[0], flat[1], dim=0).item()
print(f"the changes by the two prompts are alike: cosine {same:.2f} (1: the same, 0: nothing in common)")
assert gaps["the difference"] > max(0, gaps["start"]), "the prompt's part of the score must be climbed"

# %% [markdown]
# **What to see.** Compare the second picture with the third, one climbed with the right prompt, one with the wrong. The
# cosine printed says how alike the two changes are. At 1 the prompt decided nothing: both ascents raised the quality $q$,
# and both scores rose together, whichever was asked for. The third way shows what the prompts alone can do. It moves the
# gap between the two scores, by little, and no motorcycle appears; both scores fall on the way, because nobody asked for
# quality.
#
# So the wrong prompt does no harm here, for a bad reason: this reward hardly reads. Look at the gap of the *start*, too. If
# the motorcycle's prompt scores higher there, the network does not even know this face by its own prompt. MiniPreference
# is a stand-in with 0.2 million numbers, and this says nothing of what ImageReward does. But the test is the one to make
# with any reward that takes a prompt: climb it with a wrong one, and see whether anything changes. For a reward that does
# read, a wrong tag is a wrong goal.
#
# ## 6 · When is a picture good enough?
#
# This score has no upper bound, so maximizing it has no end. The released code (and ReFL, the reward feedback learning
# of ImageReward's own authors, from which it comes) minimizes
#
# $$\mathcal L=\frac1N\sum_n\text{relu}\bigl(2-r_n\bigr),\qquad
# \frac{\partial\mathcal L}{\partial r_n}=\begin{cases}-1/N&r_n<2\\0&r_n\ge2\end{cases}$$
#
# instead of the plain $-r$. A picture two standard deviations above the average is good enough: there the loss ends at 0,
# as a hinge does, and beyond lies the **dead zone**, without loss and without gradient. The package calls the 2 the `cap`
# of a term; without a cap, the loss is $-r$.


# %%
def brightness(images, prompts):
    return images.mean((1, 2, 3))


marks = torch.tensor([-1.0, 0.0, 1.0, 1.99, 2.0, 3.0])
images = marks[:, None, None, None].expand(-1, 3, 4, 4)  # pictures whose "score" is their brightness
capped = [WeightedReward(CallableReward(brightness, "brightness"), weight=1.0, cap=2.0)]
plain = [WeightedReward(CallableReward(brightness, "brightness"), weight=1.0)]
nobody = [""] * 6
check("loss with cap", reward_loss(capped, images, nobody)[0], (3 + 2 + 1 + 0.01 + 0 + 0) / 6, 1e-6)
check("loss without", reward_loss(plain, images, nobody)[0], -marks.mean(), 1e-6)
slopes = gradient(lambda x: reward_loss(capped, x, nobody)[0], images).sum((1, 2, 3))
check("slopes with cap", slopes, torch.tensor([-1, -1, -1, -1, 0, 0]) / 6, 1e-6)
check(
    "slopes without",
    gradient(lambda x: reward_loss(plain, x, nobody)[0], images).sum((1, 2, 3)),
    -torch.ones(6) / 6,
    1e-6,
)
r = torch.linspace(-2, 4, 121)
figure, (left, right) = panels(columns=2, width=7.0, height=2.5)
left.plot(r, -r, label="−r")
left.plot(r, F.relu(2 - r), label="relu(2 − r)")
right.plot(r, -torch.ones_like(r))
right.plot(r, -(r < 2).float())
left.set(xlabel="score r", ylabel="loss")
right.set(xlabel="score r", ylabel="slope of the loss", ylim=(-1.2, 0.2))
left.legend(frameon=False)
show(
    figure,
    "Left, two losses over scores from -2 to 4: minus r falls for ever; relu(2 - r) falls with it and is 0 from r = 2 on. "
    "Right, their slopes: -1 everywhere, and -1 that jumps to 0 at r = 2.",
)

# %% [markdown]
# What does the cap mean for a picture? The face again, with its own prompt, until 40 steps are done or no gradient is left.


# %%
def capped_ascent(cap):
    term = [WeightedReward(preference, weight=1.0, cap=cap)]
    return ascend(lambda x: reward_loss(term, x, [own])[0], face)


def draw(cap):
    x, steps = capped_ascent(cap)
    score, fidelity = preference.score(x, [own]).item(), psnr(x, face)[0].item()
    titles = [f"start\nscore {preference.score(face, [own]).item():.1f}"]
    titles += [f"cap {cap:g}, {steps} steps\nscore {score:.1f}, {fidelity:.0f} dB"]
    alt = f"The face, and with cap {cap:g} after {steps} steps: score {score:.1f}, {fidelity:.0f} dB from where it started."
    return pictures([face[0], x[0]], titles, tile=1.92), alt


cap_slider = explore(draw, values=[2.0, 3.0, 4.0, 5.0, 6.0], label="cap", start=3.0)
cap_slider

# %%
cap_slider.slider.value = 5.0
show(*draw(5.0))
taken = {cap: capped_ascent(cap)[1] for cap in (1.0, 2.0, 5.0, None)}
assert taken[1.0] <= taken[2.0] <= taken[5.0] <= taken[None] == 40
print("steps:", ", ".join(f"{'no cap' if cap is None else f'cap {cap:g}'} {steps}" for cap, steps in taken.items()))

# %% [markdown]
# **What to see.** The face starts at a score of 2. With the released cap of 2 it is good enough already: no step is taken,
# the picture stays as it is (PSNR of equal pictures is infinite). With a higher cap the ascent goes on until the score has
# reached it; without one it goes on for ever. But the cap is no protection by itself: where it lies decides, and it is
# measured on the reward's own scale. Move the slider, and compare how far from the start (in dB) each cap lets the picture
# go. A reward that ends at 1, such as CLIP-IQA, never reaches a cap of 2, so there the cap changes nothing.
#
# ## 7 · Two rewards, two scales
#
# CLIP-IQA moves between 0 and 1, ImageReward between −2 and 2. Which one wins depends on the weights *and* on those
# scales. The paper gives both the weight $5\cdot10^{-5}$; the released script gives ImageReward a tenth of that. The
# package has two ways to take the scale out, both off by default.
#
# **Standardize:** divide by a running standard deviation. Mean and variance are exponential averages over batches,
# $m\leftarrow\beta m+(1-\beta)\,\overline{r}$ and $v\leftarrow\beta v+(1-\beta)\,\overline{(r-m)^2}$ with the new $m$; $m$
# starts as the mean of the first batch, $v$ as 1, and $\beta$ is 0.99. Only $1/\sqrt v$ reaches the gradient.
#
# **Balance:** scale each term so that the picture's gradients have the same norm, the mean of their norms. The weights then
# are shares of the update.

# %%
batches = [torch.tensor([0.2, 0.4]), torch.tensor([0.9, 0.5]), torch.tensor([-0.3, 0.1])]
beta, m, v = 0.9, None, 1.0
statistics = RunningStatistics(decay=beta)
for batch in batches:
    m = batch.mean() if m is None else beta * m + (1 - beta) * batch.mean()
    v = beta * v + (1 - beta) * (batch - m).square().mean()
    statistics.update(batch)
check("running mean and variance", [statistics.mean, statistics.variance], [m, v], 1e-6)
check("standardized", statistics(batches[2]), (batches[2] - m) / v.sqrt(), 1e-6)

iqa = MiniIQA.from_pretrained()
pair, both = torch.cat([eye, soft]), [prompt, prompt]
terms = [WeightedReward(iqa, weight=0.5), WeightedReward(preference, weight=0.5)]
pushes = [gradient(lambda x: -iqa.score(x).mean(), pair), gradient(lambda x: -preference.score(x, both).mean(), pair)]
norms = [g.norm().item() for g in pushes]
factors = [sum(norms) / 2 / norm for norm in norms]
wanted = sum(0.5 * f * g for f, g in zip(factors, pushes, strict=True))
check("balanced", gradient(lambda x: reward_loss(terms, x, both, balance=True)[0], pair), wanted, 1e-6)

# %%
spread = []
for reward in (iqa, preference):
    running, scores = RunningStatistics(), reward.score(torch.cat([clean, worse]), prompts * 2)
    for k in range(600):
        running.update(scores[torch.randint(96, (4,), generator=torch.Generator().manual_seed(k))])
    spread.append(running.variance**0.5)
sizes = {
    "as they are": norms,
    "standardized": [n / s for n, s in zip(norms, spread, strict=True)],
    "balanced": [n * f for n, f in zip(norms, factors, strict=True)],
}
figure, axes = panels(width=6.4, height=2.0)
share = {name: 100 * a / (a + b) for name, (a, b) in sizes.items()}
axes.barh(list(share), list(share.values()), color="#0072B2", label="MiniIQA")
axes.barh(
    list(share), [100 - x for x in share.values()], left=list(share.values()), color="#E69F00", label="MiniPreference"
)
axes.axvline(50, color="black", linestyle=":", linewidth=1)
axes.invert_yaxis()
axes.set(xlabel="share of the gradient (%), equal weights", xlim=(0, 100))
axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
show(
    figure,
    "Share of MiniIQA in the sizes of both gradients at equal weights: "
    + ", ".join(f"{name} {x:.0f} percent" for name, x in share.items()) + "; MiniPreference has the rest.",
)  # fmt: skip
print(f"after 600 batches the standard deviations are: MiniIQA {spread[0]:.2f}, MiniPreference {spread[1]:.2f}")

# %% [markdown]
# **What to see.** With equal weights the two rewards do not count the same. Standardizing evens out the scales of the
# *scores*; how steep a score is at this picture is another thing, so the shares need not become equal. Balance makes them
# equal by definition, also where one of the rewards has nothing useful to say. No preset uses either: the paper does not,
# and weights chosen by hand do the same as long as the rewards stay as they are.
#
# **What does it cost?** One forward and one backward pass through 446 million parameters at 224 pixels, whatever the
# size of the picture. Prompts are tokenized once each and remembered.
#
# ## 8 · A bug, and the check that catches it
#
# Someone takes the mean first and the relu afterwards: $\text{relu}(2-\overline r)$. As long as all scores are below 2
# nothing differs. But one excellent picture then pays for a bad one.


# %%
def mean_first(r):
    return F.relu(2 - r.mean())


term = WeightedReward(preference, weight=1.0, cap=2.0)
usual, mixed = torch.tensor([-0.5, 0.5, 1.0]), torch.tensor([-0.5, 0.5, 6.0])
check("usual scores", mean_first(usual), term.loss(usual), 1e-6)  # sees nothing
caught(lambda: check("one excellent picture", mean_first(mixed), term.loss(mixed), 1e-6))

# %% [markdown]
# ## 9 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up, predict then run).** A has score 1.2, B has 0.2. How often does A win? And how often, if someone
# had divided all scores by 0.5?
# <details><summary>Hint</summary>Section 1 has the formula. The unit of the scores matters, their zero does not.</details>


# %%
def chances():
    raise NotImplementedError  # return both probabilities


def verify_chances():
    luck = -torch.empty(2, 500_000).exponential_(generator=torch.Generator().manual_seed(0)).log()
    score = torch.tensor([[1.2], [0.2]])  # plus luck of this kind: a contest as Bradley and Terry see it
    wins = [(a > b).double().mean() for a, b in (score + luck, score / 0.5 + luck)]
    check("half a million contests", chances(), wins, 3e-3)


exercise(1, verify_chances)


# %% [markdown]
# **Exercise 2.** Where the dead zone begins, the slope jumps. Soften it: the loss is $\frac1N\sum\log(1+e^{2-r})$.
# Write its gradient with respect to the scores.
# <details><summary>Hint</summary>Chain rule: section 1 has the function that is the derivative of log(1 + exp(u)).</details>


# %%
def soft_gradient(r):
    raise NotImplementedError


exercise(2, lambda: check("slopes", soft_gradient(marks), gradient(lambda r: F.softplus(2 - r).mean(), marks), 1e-6))


# %% [markdown]
# **Exercise 3 (harder).** A panorama has 100 rows and 300 columns. Which columns does ImageReward see? Return the first and
# the last. (Two or three more at each side count a little, for the bicubic curve reaches over.)
# <details><summary>Hint</summary>The picture becomes 224×672. Which part of 672 is the middle 224, and where was that
# before?</details>


# %%
def columns_seen():
    raise NotImplementedError


def verify_columns():
    panorama = torch.full((1, 3, 100, 300), 0.5)
    reached = (gradient(random_reward.preprocess, panorama)[0, 0, 0].abs() > 1e-3).nonzero()
    check("columns", columns_seen(), [reached.min(), reached.max()], 3)


exercise(3, verify_columns)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * One voter in five answers at random. How many comparisons of ten pictures does a fit need until its order is
#   right? An answer is a curve of the rank correlation over the number of comparisons, for three shares of such
#   voters.
# * Damage a wide picture at its border alone. Feed it to the network as a middle square, as a squeezed square and as
#   several squares. An answer says which way notices, and which share of its gradient lies outside the middle.
#
# ## Summary
#
# * Comparisons become scores by $P(A\text{ beats }B)=\sigma(r_A-r_B)$; only differences are fixed, hence the standardization.
# * The same picture gets another score with another prompt, as far as the training data taught it words.
# * ImageReward sees the middle 224×224 pixels of a reduced picture: no fine texture, and nothing outside that square.
# * $\text{relu}(2-r)$ is $-r$ up to a cap, beyond which there is no gradient. A reward that never reaches 2 gets the
#   gradient of $-r$.
# * Running standardization divides a gradient by $\sqrt v$; balancing gives all terms the same norm.
#
# NAVIGATION
