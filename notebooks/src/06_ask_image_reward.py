# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 06 · Ask ImageReward
#
# **You will turn "A is better than B" into a score, feed it pictures and prompts, and cap it where a picture is good
# enough.**
#
# A quarter of a minute on two cores; nothing to download. Notebook 05 explains what a reward is and how it can be fooled.
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
from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show
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
# and what notebooks 08 and 09 measure with it says nothing of prompts. A reward is only as good as what it was trained
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
# The same class can be built tiny. **The weights of this one are random**, so its scores mean nothing. But its wiring
# is the real one, and we can check that. First the text. BERT's vocabulary is not here either, so we write one of 14
# words; the package adds the two special tokens that BLIP has.

# %%
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "cat", "eyes", "fur", "moon", "cup", "##s", "a", "photo"]
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(folder)
torch.manual_seed(0)
width = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 72}
text = TEXT | width | {"vocab_size": len(tokenizer), "bos_token_id": 2, "sep_token_id": 3}
random_reward = ImageReward(ImageRewardModel(VISION | width, text), tokenizer)
ids, mask = random_reward.tokens(["Cat, fur", "cups, " * 40])
print(tokenizer.convert_ids_to_tokens(ids[0].tolist())[:6], "…", list(ids.shape))
print("words seen:", mask.sum(1).tolist(), "of 35 places")
check("cat , fur between [CLS] and [SEP]", ids[0, :6], [2, 6, 5, 8, 3, 0], 0)
check("a long prompt is cut, [SEP] kept", [ids.shape[1], ids[1, -1]], [35, 3], 0)

# %% [markdown]
# Then the head. Between its five linear layers stands *nothing*: no activation, only dropout in training. Five linear
# maps after one another are one linear map. So ImageReward's whole head is a scalar product with one vector, and then
# the standardization of section 1.


# %%
def head_by_hand(first_position):
    weight, bias = torch.eye(36), torch.zeros(36)
    for layer in random_reward.model.head.values():
        weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    raw = first_position @ weight[0] + bias[0]
    return (raw - 0.16717362830052426) / 1.0333394966054072


pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
seen = random_reward.model.vision(pixel_values=pixels).last_hidden_state
read = random_reward.model.text(
    input_ids=ids, attention_mask=mask, encoder_hidden_states=seen,
    encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
).last_hidden_state  # fmt: skip
check("random network: by hand and package", head_by_hand(read[:, 0]), random_reward.model(ids, mask, pixels), 1e-6)

# %% [markdown]
# ## 5 · What does it see of a picture?
#
# Always 224×224 pixels: the shorter side is resized to 224, and the middle cut out. The original does that with Pillow
# on 8-bit pictures, which lets no gradient through (notebook 05, section 10). The package writes it in PyTorch.
#
# Resizing is linear: each new pixel is a weighted mean of old ones, first along rows, then along columns, that is
# $Y=W_h\,X\,W_w^{\mathsf T}$. The weights are a *bicubic* curve, widened when the picture shrinks, so that no old pixel
# is skipped. Pillow stores 8 bits after each of the two passes, which cuts values to [0, 1]; we cut, too, but let the
# gradient pass as if we had not. So if $G$ is the gradient with respect to $Y$, that with respect to $X$ is
# $W_h^{\mathsf T}\,G\,W_w$.


# %%
def resizing(old, new):
    """The matrix [new, old] of antialiased bicubic resizing."""
    widen = max(old / new, 1)
    center = (torch.arange(new).double() + 0.5) * old / new
    x = ((torch.arange(old).double() + 0.5 - center[:, None]) / widen).abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)


mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]


def plan(height, width):
    rows, columns = (224 * n // min(height, width) for n in (height, width))
    window = [slice((n - 224) // 2, (n - 224) // 2 + 224) for n in (rows, columns)]
    return resizing(height, rows), resizing(width, columns), window


def preprocess_by_hand(x):
    along, across, (down, right) = plan(*x.shape[-2:])
    x = (x @ across.T).clamp(0, 1)
    x = (along @ x).clamp(0, 1)
    return (x[..., down, right] - mean) / std


def pull_back(push, height, width):
    """The gradient of the pixels from that of the preprocessed ones."""
    along, across, (down, right) = plan(height, width)
    wide = push.new_zeros(*push.shape[:2], len(along), len(across))
    wide[..., down, right] = push / std
    return along.T @ wide @ across


# %%
push = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2)).double()
whole = cat[None].double()
for name, x in {
    "300×451, smaller": whole,
    "97×131, larger": whole[..., 60:157, 90:221],
    "300×451, black and white": (whole > 0.5).double(),  # overshoots at every edge, so that both cuts act
    "224×224": whole[..., :224, :224],
}.items():
    check(name, preprocess_by_hand(x), random_reward.preprocess(x), 1e-9)
    package = gradient(lambda x: random_reward.preprocess(x) * push, x)
    check("its gradient", pull_back(push, *x.shape[-2:]), package, 1e-9)
photograph = Image.fromarray((255 * cat.movedim(0, -1)).round().byte().numpy())
by_pillow = photograph.resize((336, 224), Image.Resampling.BICUBIC).crop((56, 0, 280, 224))
ours = (random_reward.preprocess(cat[None]) * std + mean)[0].movedim(0, -1)
check("gray levels between ours and Pillow's", 255 * ours, np.asarray(by_pillow), 1.5)

# %% [markdown]
# About one gray level of difference comes from Pillow's two roundings. Now the consequence. RFSR trains at 512×512; at
# 224 each new pixel stands for 2.3×2.3 old ones. What is left of stripes?

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
# Picture, prompt, gradient: here is the whole way once, still with random weights. The cell after it asks the published
# weights, if they are on this machine, and otherwise says what is missing.

# %%
scores = random_reward.score(torch.cat([cat[None], cat[None]]), [prompt, "moon"])
assert scores[0] != scores[1], "another prompt, another score"
push = gradient(lambda x: random_reward.score(x, [prompt]), cat[None])
assert push.isfinite().all()
columns = (push[0] != 0).any(0).any(0).nonzero()
print(f"the gradient reaches columns {columns.min():d} to {columns.max():d} of 451: the middle that was cut out")

# %% tags=["nbval-ignore-output"]
needed = {"the file ImageReward.pt": "image-reward", "the file vocab.txt of bert-base-uncased": "bert-vocabulary"}
missing = [what for what, name in needed.items() if registry.find(name) is None]
if missing:
    print("NOT RUN, missing:", " and ".join(missing))
    print("to get them: `rfsr weights fetch image-reward` and `rfsr weights fetch bert-vocabulary`")
else:
    real = create_reward("image-reward")
    for text in ("a photo of a cat", "a photo of the moon"):
        print(f"{text:20s} ImageReward {real.score(cat[None], [text]).item():.2f}")

# %% [markdown]
# ## 6 · When is a picture good enough?
#
# This score has no upper bound, so maximizing it has no end. The released code (and ReFL, the reward feedback learning
# of ImageReward's own authors, from which it comes) minimizes
#
# $$\mathcal L=\frac1N\sum_n\text{relu}\bigl(2-r_n\bigr),\qquad
# \frac{\partial\mathcal L}{\partial r_n}=\begin{cases}-1/N&r_n<2\\0&r_n\ge2\end{cases}$$
#
# instead of the plain $-r$: two standard deviations above the average is good enough. Beyond that is the **dead zone**:
# no loss, no gradient. The package writes it as the option `cap` of a term; without it, the loss is $-r$.


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
# The ascent of notebook 05 shows what that means for a picture, here with MiniPreference: steps of equal length along
# the gradient, until 40 are done or no gradient is left.


# %%
def ascend(cap, x, steps=40, length=0.5):
    term = [WeightedReward(preference, weight=1.0, cap=cap)]
    for step in range(steps):
        g = gradient(lambda x: reward_loss(term, x, [prompt])[0], x)
        if not g.any():
            return x, step
        x = (x - length * g / g.norm()).clamp(0, 1)
    return x, steps


def draw(cap):
    x, steps = ascend(cap, soft)
    score, fidelity = preference.score(x, [prompt]).item(), psnr(x, eye)[0].item()
    before, after = preference.score(soft, [prompt]).item(), f"{steps} steps: score {score:.1f}\n{fidelity:.0f} dB"
    titles = [f"start: score {before:.1f}\n{psnr(soft, eye)[0]:.0f} dB", after]
    what = "no cap" if cap is None else f"cap {cap:g}"
    return pictures([eye[0], soft[0], x[0]], ["truth\n", *titles], tile=1.92), (
        f"The softened eye at score {before:.1f}, and with {what} after {steps} steps: score {score:.1f}, {fidelity:.0f} dB."
    )


content = explore(draw, values=[0.0, 0.5, 1.0, 2.0, 3.0, 5.0], label="cap")
content

# %%
content.slider.value = 1.0
results = {"start": (soft, 0)} | {f"cap {cap}": ascend(cap, soft) for cap in (1, 2, 5)} | {"no cap": ascend(None, soft)}
titles = [
    f"{n}: {k} steps\nscore {preference.score(x, [prompt]).item():.1f}, {psnr(x, eye)[0]:.0f} dB"
    for n, (x, k) in results.items()
]
show(
    pictures([eye[0], *(x[0] for x, _ in results.values())], ["truth\n", *titles], tile=1.92, columns=3),
    "The cat's eye, softened, and after four ascents: " + "; ".join(t.replace("\n", ", ") for t in titles) + ".",
)
assert results["cap 1"][1] <= results["cap 2"][1] <= results["cap 5"][1] <= results["no cap"][1]
print("ended by itself, before step 40:", ", ".join(name for name, (_, k) in results.items() if 0 < k < 40) or "none")

# %% [markdown]
# **What to see.** With a cap the ascent stops by itself once the score has reached it; without one it goes on. But the cap is
# no protection by itself: where it lies decides, and it is measured on the reward's own scale. Compare the fidelity that
# each cap costs from where this picture started. A reward that ends at 1, such as CLIP-IQA, never reaches a cap of 2, so
# there the cap changes nothing.
#
# ## 7 · Two rewards, two scales
#
# CLIP-IQA moves between 0 and 1, ImageReward between −2 and 2. Which one wins depends on the weights *and* on those
# scales. The paper gives both the weight $5\cdot10^{-5}$; the released script gives ImageReward a tenth of that. The
# package has two ways to take the scale out, both off by default. The first: **standardize** by a running mean and
# variance, exponential averages over batches (a bar is the mean of a batch),
#
# $$m\leftarrow\beta m+(1-\beta)\,\overline{r},\qquad v\leftarrow\beta v+(1-\beta)\,\overline{(r-m)^2},\qquad
# r'=\frac{r-m}{\sqrt v}$$
#
# with the new $m$ in the second formula; $m$ starts as the mean of the first batch, and $v$ as 1. Only a training step
# moves them; a loss computed without gradient leaves them as they are. In the loss $m$ and $v$ are constants: only the
# factor $1/\sqrt v$ reaches the gradient. In training $\beta$ is 0.99.

# %%
batches = [torch.tensor([0.2, 0.4]), torch.tensor([0.9, 0.5]), torch.tensor([-0.3, 0.1])]
beta, m, v = 0.9, None, 1.0
statistics = RunningStatistics(decay=beta)
check("before the first batch: untouched", statistics(batches[0]), batches[0], 0)
for number, batch in enumerate(batches, 1):
    m = batch.mean() if m is None else beta * m + (1 - beta) * batch.mean()
    v = beta * v + (1 - beta) * (batch - m).square().mean()
    statistics.update(batch)
    check(f"batch {number}: mean and variance", [statistics.mean, statistics.variance], [m, v], 1e-6)
check("standardized", statistics(batches[2]), (batches[2] - m) / v.sqrt(), 1e-6)
statistics.update(torch.tensor([float("nan"), 0.1]))
check("a broken batch is left out", [statistics.mean, statistics.variance], [m, v], 1e-6)

iqa = MiniIQA.from_pretrained()
pair, both = torch.cat([eye, soft]), [prompt, prompt]
normal = WeightedReward(iqa, weight=1.0, normalize=True)
scores = iqa.score(pair)
m, v = scores.mean(), 0.99 + 0.01 * scores.var(correction=0)
check("only looked at: untouched", reward_loss([normal], pair, both)[0], -scores.mean(), 1e-6)
training = reward_loss([normal], pair.clone().requires_grad_(), both)[0].detach()
check("loss", training, -((scores - m) / v.sqrt()).mean(), 1e-6)
v = 0.99 * v + 0.01 * scores.var(correction=0)  # the next call is the next batch; its mean is the same
wanted = gradient(lambda x: -iqa.score(x).mean() / v.sqrt(), pair)
check("gradient", gradient(lambda x: reward_loss([normal], x, both)[0], pair), wanted, 1e-7)

# %% [markdown]
# The second way looks at what really meets in the picture, the gradients. **Balance** scales each term so that the
# picture's gradients have the same norm, the mean of their norms. Weights then are shares of the update.

# %%
terms = [WeightedReward(iqa, weight=0.75), WeightedReward(preference, weight=0.25)]
losses = [-iqa.score(pair).mean().item(), -preference.score(pair, both).mean().item()]
pushes = [gradient(lambda x: -iqa.score(x).mean(), pair), gradient(lambda x: -preference.score(x, both).mean(), pair)]
norms = [g.norm().item() for g in pushes]
print(f"norms of the gradients: MiniIQA {norms[0]:.2f}, MiniPreference {norms[1]:.2f}")
factors = [sum(norms) / 2 / norm for norm in norms]
wanted = sum(w * f * g for w, f, g in zip((0.75, 0.25), factors, pushes, strict=True))
check("gradient", gradient(lambda x: reward_loss(terms, x, both, balance=True)[0], pair), wanted, 1e-6)
wanted = sum(w * f * loss for w, f, loss in zip((0.75, 0.25), factors, losses, strict=True))
check("loss", reward_loss(terms, pair.clone().requires_grad_(), both, balance=True)[0], wanted, 1e-5)
dead = [*terms[:1], WeightedReward(preference, weight=0.25, cap=-10.0)]  # content with everything
ours = gradient(lambda x: reward_loss(dead, x, both, balance=True)[0], pair)
check("a term in its dead zone does not count", ours, 0.75 * pushes[0], 1e-6)

# %% [markdown]
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
# * $\text{relu}(2-r)$ is $-r$ with a point of content; beyond it no gradient. A reward that never reaches 2 gets the
#   gradient of $-r$.
# * Running standardization divides a gradient by $\sqrt v$; balancing gives all terms the same norm.
#
# NAVIGATION
