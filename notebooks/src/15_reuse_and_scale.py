# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 15 · Reuse and scale
#
# **You will put RFSR's losses into training loops that are not ours, give the method a base model of your own, and weigh a
# full-size run before you pay for it.**
#
# Half a minute on two cores; nothing to download. Needs the losses of notebooks 05 and 08 and the training step of
# notebook 10, but only by name.
#
# NAVIGATION
#
# Afterwards you can
#
# * add the losses to a plain PyTorch loop, to a `diffusers` training script with `accelerate`, and to Lightning,
# * write the adapter that makes your own model trainable by RFSR, and test it before the first long run,
# * say what a run on SeeSR, PASD or DiffBIR needs: files, settings, and gigabytes, counted without owning the GPU.
#
# What cannot run here says **NOT RUN** and what is missing. Nothing is faked.

# %%
import copy
import importlib.util
import logging
import warnings
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel

from rfsr_ext import haar_ll_l1_loss
from rfsr_ext.data import PhotographCrops, evaluation_crops, photographs
from rfsr_ext.losses import HaarLLLoss, VGGGramLoss
from rfsr_ext.metrics import psnr
from rfsr_ext.models import ISRModel, Recipe, check_model, load_model
from rfsr_ext.notebook import caught, check, exercise, explore, panels, pictures, show
from rfsr_ext.rewards import MiniIQA, WeightedReward, create_reward
from rfsr_ext.sampling import TimestepWindows, generators, sample
from rfsr_ext.training import RFSRConfig, RFSRObjective
from rfsr_ext.weights import registry

style = VGGGramLoss(weights="random")  # a stand-in; "imagenet" reads torchvision's VGG19 file
names = [name for name in photographs("train") if name != "retina"]  # the largest, which takes memory
crops = PhotographCrops(names, 64, dead_leaves_share=0, empty_prompt_share=0, recolor=False)
held_out = evaluation_crops(photographs("test"), size=64, count=6)
test_lr, test_gt = (torch.stack([crop[key] for crop in held_out]) for key in ("lr", "gt"))
test_prompts = [crop["prompt"] for crop in held_out]


def batch(k, size=4):
    """Batch number k: coarse pictures, sharp ones, prompts."""
    samples = [crops[k * size + i] for i in range(size)]
    return *(torch.stack([s[key] for s in samples]) for key in ("lr", "gt")), [s["prompt"] for s in samples]


# %% [markdown]
# ## 1 · In a plain loop
#
# You have a super-resolution network and a loop. What must change to use the losses? One line. They are ordinary
# functions of two batches of pictures. Here is a small ×4 network (the smoothly enlarged picture plus a correction), and
# the loop. There is no frozen model, so the Gram distance is taken to the truth; the factors 0.5 and 10 are picked for
# this toy. (Twelve steps are far too few to enlarge any better. Here it only matters that the loops agree.)


# %%
class Enlarger(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 48, 3, padding=1), nn.PixelShuffle(4),
        )  # fmt: skip

    def forward(self, lr):
        return F.interpolate(lr, scale_factor=4, mode="bicubic") + 0.1 * self.layers(lr)


def loss_of(sr, gt):
    return F.l1_loss(sr, gt) + 0.5 * haar_ll_l1_loss(sr, gt) + 10 * style(sr.clamp(0, 1), gt)  # the only new line


batches = [batch(k, 2)[:2] for k in range(12)]
torch.manual_seed(0)
start = Enlarger()
losses = {"plain": []}

net = copy.deepcopy(start)
optimizer = torch.optim.Adam(net.parameters(), 2e-3)
for lr, gt in batches:
    loss = loss_of(net(lr), gt)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses["plain"].append(loss.item())
moved = max((p - q).abs().max().item() for p, q in zip(net.parameters(), start.parameters(), strict=True))
assert moved > 5e-3, "the loop must have trained"
print(f"losses of {len(batches)} batches, from {min(losses['plain']):.2f} to {max(losses['plain']):.2f}")


# %%
def same_weights(name, other):
    ours, theirs = (torch.cat([p.flatten() for p in m.parameters()]) for m in (net, other))
    check(f"weights after {len(batches)} steps, plain loop and {name}", ours, theirs, 1e-6)


check("the loss of the truth itself", loss_of(test_gt, test_gt), 0.0, 1e-6)

# %% [markdown]
# ## 2 · In Lightning
#
# Lightning takes the loop away and asks for the loss. The same line goes into `training_step`. The extra `notebooks`
# installs the package (`pip install 'rfsr_ext[notebooks]'`). In an older environment without it the cell says so, and the
# comparison is left to the other two loops.

# %% tags=["nbval-ignore-output"]
if importlib.util.find_spec("lightning") is None:
    print("NOT RUN: the package lightning is not installed; pip install lightning, then run this cell again")
else:
    import lightning

    class SuperResolution(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = copy.deepcopy(start), []

        def training_step(self, pair, index):
            lr, gt = pair
            loss = loss_of(self.net(lr), gt)
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.net.parameters(), 2e-3)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with warnings.catch_warnings(action="ignore"):
        module, trainer = SuperResolution(), lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)
        trainer.fit(module, DataLoader(batches, batch_size=None))
    losses["Lightning"] = module.seen
    same_weights("Lightning", module.net)

# %% [markdown]
# ## 3 · With `accelerate`, in a `diffusers` training script
#
# `accelerate` keeps your loop and changes two lines: `prepare` and `backward`. It brings several GPUs, mixed precision, and
# gradient accumulation.

# %%
accelerator = Accelerator(cpu=True)
prepared = copy.deepcopy(start)
optimizer = torch.optim.Adam(prepared.parameters(), 2e-3)
prepared, optimizer, loader = accelerator.prepare(prepared, optimizer, DataLoader(batches, batch_size=None))
losses["accelerate"] = []
for lr, gt in loader:
    loss = loss_of(prepared(lr), gt)
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    losses["accelerate"].append(loss.item())
same_weights("accelerate", accelerator.unwrap_model(prepared))
check("losses on the way", losses["plain"], losses["accelerate"], 1e-6)

# %% [markdown]
# A `diffusers` script for latent diffusion has no picture to put a loss on: it compares what the network predicts, mostly
# noise, with what it should have. But each prediction implies a picture, $\hat z_0$ of notebook 02, and the decoder makes
# it visible. (Ours predicts $\hat z_0$ itself; for noise it is $(z_t-\sigma\varepsilon)/\alpha$, for velocity
# $\alpha z_t-\sigma v$.) A script also draws *different* timesteps for the samples of a batch, so the window becomes a
# weight per sample: RFSR's structure loss counts where $t\ge600$.
#
# The example `train_controlnet.py` of diffusers computes its loss in one line and goes on to `backward`. These are the new
# lines (`noise_scheduler`, `vae`, `timesteps`, `batch` are the script's own names, `epsilon` is what Stable Diffusion
# predicts):
#
# ```diff
#  loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
# +# for noise only: velocity has another estimate
# +share = noise_scheduler.alphas_cumprod.to(noisy_latents)[timesteps].view(-1, 1, 1, 1)
# +estimate = (noisy_latents - (1 - share).sqrt() * model_pred) / share.sqrt()
# +images = vae.decode((estimate / vae.config.scaling_factor).to(vae.dtype)).sample.float() / 2 + 0.5
# +truth = batch["pixel_values"].float() / 2 + 0.5
# +loss = loss + 0.1 * haar_ll_l1_loss(images, truth, weight=(timesteps >= 600).float())
#
#  accelerator.backward(loss)
# ```
#
# The script already keeps its autoencoder frozen, so nothing else changes. (Mind the division by `share.sqrt()`: at the
# largest times it multiplies the error of a predicted noise by more than ten, notebook 02. With such a model begin with a
# small factor.) The script trains the ControlNet alone, and so does the new loss in it. The cell below is one step of
# such a loop, run with the mini model, which predicts $\hat z_0$ and trains its U-Net, too.

# %%
model = load_model("mini")
unet, controlnet, vae, noise_scheduler = model.unet, model.controlnet, model.vae, model.scheduler
unet.requires_grad_(True), controlnet.requires_grad_(True)  # the autoencoder stays frozen
lr, gt = test_lr[[0, 3]], test_gt[[0, 3]]
condition = model.condition(lr, [test_prompts[i] for i in (0, 3)])
g = torch.Generator().manual_seed(0)

latents = model.encode(gt)
noise, timesteps = torch.randn(latents.shape, generator=g), torch.tensor([200, 900])
noisy = noise_scheduler.add_noise(latents, noise, timesteps)
text, control = condition.shared["encoder_hidden_states"], condition.spatial["controlnet_cond"]
residuals, middle = controlnet(noisy, timesteps, text, control, return_dict=False)
prediction = unet(
    noisy, timesteps, text, return_dict=False,
    down_block_additional_residuals=residuals, mid_block_additional_residual=middle,
)[0]  # fmt: skip
assert noise_scheduler.config.prediction_type == "sample", "another answer has another target and another estimate"
loss = F.mse_loss(prediction, latents)
# new: the estimate of this step keeps the structure of the real picture
pred_original_sample = prediction
images = vae.decode(pred_original_sample / vae.config.scaling_factor).sample / 2 + 0.5
structure = haar_ll_l1_loss(images, gt, weight=(timesteps >= 600).float())
accelerator.backward(loss + 0.1 * structure)  # the script's optimizer.step() follows as before

theirs = model.process().pred_original_sample(prediction, timesteps, noisy)
check("estimate and the package", pred_original_sample, theirs, 1e-6)
each = haar_ll_l1_loss(images, gt, reduction="none")
check("only the second sample counts", structure, each[1] / 2, 1e-6)

# %%
norms = {
    name: sum(p.grad.square().sum() for p in m.parameters() if p.grad is not None) ** 0.5
    for name, m in {"unet": unet, "controlnet": controlnet, "vae": vae}.items()
}
assert norms["unet"] > 0 and norms["controlnet"] > 0 and norms["vae"] == 0
titles = [f"t = {t}, weight {int(t >= 600)}" for t in timesteps.tolist()]
enlarged = F.interpolate(lr, scale_factor=4, mode="bicubic")
tiles = [tile for row in zip(enlarged, images.detach(), gt, strict=True) for tile in row]
show(
    pictures(tiles, ["bicubic", titles[0], "truth", "bicubic", titles[1], "truth"], columns=3, tile=1.92),
    "Bicubic enlargement, what the mini model estimates, and the truth: a cup under the noise of timestep 200, and a saucer "
    f"under that of 900. The structure losses are {each[0]:.3f} and {each[1]:.3f}; only the second has weight 1.",
)
unet.zero_grad(), controlnet.zero_grad()
del loss, structure, images, pred_original_sample, theirs, prediction, residuals, middle, each  # and what they kept

# %% [markdown]
# **What to see.** Both estimates come from the noised *truth*, so they are nearer to it than a sample will be. The gradient
# went through the frozen decoder into U-Net and ControlNet.
#
# This is *a use of the loss*, not RFSR: the paper does not noise the truth, it rolls out the sampler from $x_T$ to $z_t$ and
# takes its gradient there. For that the package has `RFSRObjective`, which needs to know your model.
#
# ## 4 · Your own base model
#
# What must a model be able to do? The class `ISRModel` asks for three things: predict, encode and decode pictures. It
# asks for more only where a model is more than that: what its networks see of the enlarged picture (`control`), of the
# prompt (`embed`) and of the whole picture (`embed_image`), a first network that cleans it (`first_stage`). It has the rest:
# noise process, start, parts to train, a frozen copy of itself. Let us adapt a toy that has nothing in common with Stable
# Diffusion: no autoencoder, no text, ten steps, and a network that answers with the *picture*, not with noise (as our mini
# model does).


# %%
class Denoiser(nn.Module):
    """The enlarged picture plus a correction that looks at z_t and t; the correction starts at 0."""

    def __init__(self, width=32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(7, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip
        nn.init.zeros_(self.layers[-1].weight), nn.init.zeros_(self.layers[-1].bias)

    def forward(self, latents, timestep, enlarged):
        time = (
            (torch.as_tensor(timestep) / 1000).expand(len(latents)).view(-1, 1, 1, 1).expand(-1, 1, *latents.shape[2:])
        )
        return enlarged * 2 - 1 + 0.3 * self.layers(torch.cat([latents, enlarged * 2 - 1, time], dim=1))


# %%
class PixelISR(ISRModel):
    """Latents are the picture itself, in [-1, 1]; the network answers with the picture."""

    scale, multiple, latent_channels, vae_scale_factor = 4, 4, 3, 1

    def __init__(self, network):
        self.networks, self.trained = {"network": network}, {"network": ""}  # all of it is trained
        self.recipe = Recipe(num_inference_steps=10, start="noise")
        self.scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
        super().__init__()

    def control(self, image):
        return {"enlarged": image}  # by default the LR picture enlarged bicubically; tiles would cut it

    def predict(self, latents, timestep, condition):
        return self.networks["network"](latents, timestep, condition.spatial["enlarged"])

    def encode(self, images):
        return images * 2 - 1

    def decode(self, latents):
        return latents / 2 + 0.5


# %% [markdown]
# An adapter can be wrong in ways that no error message tells: training runs, and learns nothing. So test it first. Five
# facts hold for every correct model, whatever it is made of: sizes and ranges fit; the right answer of the network gives
# the latents back; images of a batch do not mix; the gradient goes from a picture into every part to train, and nowhere
# else; and the reference is frozen and shares no weight with the model. `check_model` tries all five.


# %%
def preflight(model):
    print(f"{type(model).__name__}:", *check_model(model), sep="\n  ")


torch.manual_seed(0)
toy = PixelISR(Denoiser())
preflight(toy)
preflight(model)

# %% [markdown]
# Now RFSR on the toy, with the package's objective. Of its ten steps the first four get the structure loss and the last two
# the reward, here the stand-in `MiniIQA`, held by the style loss. Which weights? We try two settings: those of the preset
# `mini`, and a greedy one: a reward thirty times heavier, a style loss a hundred times lighter.

# %%
iqa, preset = MiniIQA.from_pretrained(), RFSRConfig.load("mini")


def objective_for(model, reward, style_weight):
    return RFSRObjective(
        model, TimestepWindows((1, 4), (9, 10), 10), structure_loss=HaarLLLoss(), lambda_structure=preset.lambda_structure,
        rewards=[WeightedReward(iqa, reward)], style_loss=style, lambda_style=style_weight,
        reference=model.reference(),
    )  # fmt: skip


def tune(model, reward, style_weight, iterations=24):
    objective = objective_for(model, reward, style_weight)
    optimizer = torch.optim.Adam(model.unfreeze().trained_parameters().values(), 1e-3)
    draw, steps = torch.Generator().manual_seed(0), objective.windows.steps()
    for k in range(iterations):
        step = steps[int(torch.randint(len(steps), (1,), generator=draw))]
        loss, _ = objective(*batch(k), step, generators(0, range(4 * k, 4 * k + 4)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


# %%
results, weights = {}, (preset.rewards["mini-iqa"], preset.lambda_style)
settings = {"before": None, "preset": weights, "greedy": (30 * weights[0], weights[1] / 100)}
for name, options in settings.items():
    candidate = PixelISR(copy.deepcopy(toy.networks["network"]))
    if options:
        tune(candidate, *options)
    images = sample(candidate, test_lr, test_prompts, generators(0, range(6)))
    results[name] = images, iqa.score(images).mean().item(), psnr(images, test_gt).mean().item()
    changes = [results[name][k] - results["before"][k] for k in (1, 2)]
    print(
        "{:7s} reward {:.3f}   PSNR {:.2f} dB   change {:+.3f}, {:+.2f} dB".format(name, *results[name][1:], *changes)
    )
enlarged = toy.condition(test_lr, test_prompts).image
check("untrained, the toy only enlarges", results["before"][0], enlarged, 1e-4)

# %%
tiles = [images[2] for images in (test_lr, *(r[0] for r in results.values()), test_gt)]
titles = [f"{name}\nreward {r[1]:.2f}, {r[2]:.1f} dB" for name, r in results.items()]
titles = ["low resolution\n", *titles, "truth\n"]
show(
    pictures(tiles, titles, tile=1.92),
    "The heart of a dahlia in low resolution, as the toy enlarges it (before training bicubically), and the truth. Mean of six held-out crops: "
    + "; ".join(f"{name} reward {r[1]:.2f} and {r[2]:.1f} dB" for name, r in results.items()) + ".",
)  # fmt: skip
assert results["greedy"][1] > results["preset"][1], "a heavier reward must rise further"

# %% [markdown]
# **What to see.** (The numbers are means of six crops, of which one is shown; *before* is bicubic enlargement.) The
# machinery works: with no line changed it trains a model it has never heard of. But the weights need not transfer. Do
# those of the mini model move the toy at all? Hardly, as printed; this shows that the machine runs, not that it helps.
# Does the greedy reward rise by something you would call better, or by contrast and color, at the price of fidelity?
# *Each base model needs its own balance*, found on a few hundred iterations with held-out fidelity in view, before the
# long run.
#
# `sample`, `upscale`, and `RFSRTrainer(config, model=toy)` take the adapter as well.
#
# ### A bug, and the check that catches it
#
# `copy.copy` instead of `copy.deepcopy` in `reference`: the "frozen" copy shares its weights with the model. Then
# the style loss compares the model with itself. Every number looks fine, and nothing holds against reward hacking.
# (Notebook 09 has this bug too, with RFSR's own loss.)


# %%
class SharedISR(PixelISR):
    def reference(self):
        return copy.copy(self)


careless = SharedISR(candidate.networks["network"])
frozen = {"right": toy, "careless": careless.reference()}
for name, reference in frozen.items():
    objective = objective_for(careless, 1.0, 200.0)
    objective.reference = reference
    _, logs = objective(test_lr, test_gt, test_prompts, 10, generators(0, range(6)))
    print(f"{name:8s} reference: the style loss is {'exactly 0' if logs['style'] == 0 else 'above 0'}")
caught(lambda: preflight(careless))

# %% [markdown]
# ## 5 · How much memory does it take?
#
# Training is limited by what must be *kept for backward*. Start with one piece, VGG19 up to conv5_4, at 512×512 in fp32.
# On paper, in millions of numbers: a convolution of block 1 has $64\cdot512^2=16.8$, of block 2 $128\cdot256^2=8.4$, then
# 4.2, 2.1, 0.5, and there are 2, 2, 4, 4, 4 of them.
#
# | kept | for | MB |
# |---|---|---|
# | the picture, normalized | first convolution | 3.1 |
# | output of every ReLU (15; none follows conv5_4) | ReLU and next convolution | 308.3 |
# | output of 4 max-poolings, fp32 | next convolution | 31.5 |
# | their places, 8-byte whole numbers | max-pooling | 62.9 |
# | five features before their ReLU | Gram | 128.2 |
#
# PyTorch lets us weigh what it keeps. And it has a device that has shapes but no memory: `meta`. There, the largest model
# "runs" in a moment.


# %%
def weigh(run, modules=()):
    """(result, bytes that run() keeps for backward), the modules' own weights not counted."""
    kept, weights = {}, {p.untyped_storage()._cdata for m in modules for p in (*m.parameters(), *m.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (tensor, storage.nbytes())  # held, so that the number stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(size for name, (_, size) in kept.items() if name not in weights)


def picture(side, device="meta"):
    return torch.ones(1, 3, side, side, device=device, requires_grad=True)


conv = [n * c * (512 // d) ** 2 * 4 for n, c, d in ((2, 64, 1), (2, 128, 2), (4, 256, 4), (4, 512, 8), (3, 512, 16))]
pools = [c * (256 // d) ** 2 for c, d in ((64, 1), (128, 2), (256, 4), (512, 8))]
taps = sum(c * (512 // d) ** 2 * 4 for c, d in ((64, 1), (128, 2), (256, 4), (512, 8), (512, 16)))
on_paper = 3 * 512**2 * 4 + sum(conv) + sum(pools) * (4 + 8) + taps

with torch.device("meta"):
    light = VGGGramLoss(weights="random")
target = [torch.empty(1, c, c, device="meta") for c in (64, 128, 256, 512, 512)]
_, features_only = weigh(lambda: light.vgg(picture(512)), [light])
check("VGG19, on paper and on meta, MB", (on_paper - taps) / 1e6, features_only / 1e6, 0)
_, whole = weigh(lambda: light(picture(512), target_gram=target), [light])
check("with the Gram loss, relative; its C×C matrices are small", whole / on_paper, 1, 0.02)
_, really = weigh(lambda: style.vgg(picture(64, "cpu")), [style])
check("a real run at 64×64 has a 64th", features_only / 64, really, 0)
print(f"VGG19 keeps {features_only / 1e6:.0f} MB per picture of 512×512, with the Gram loss {on_paper / 1e6:.0f} MB")

# %% [markdown]
# Half a gigabyte for each picture of a batch, and that is the *smallest* piece. Now the large ones: U-Net, ControlNet and
# autoencoder of Stable Diffusion 2, the base of SeeSR. Their public configurations are a few numbers; no weights are
# needed to build them on `meta`. Attention is counted as the fused kernels of GPUs do it, which keep queries, keys, values
# and output and never the large matrix.


# %%
class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def attention(query, key, value, *_, **__):
    return FusedAttention.apply(query, key, value)


heads = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
text_config = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, vocab_size=49408
)
with torch.device("meta"):
    sd2 = {
        "U-Net": UNet2DConditionModel(sample_size=64, **heads),
        "ControlNet": ControlNetModel(**heads),
        "autoencoder": AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks),
        "text encoder": CLIPTextModel(text_config),
    }
parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in sd2.items()}
sd2["autoencoder"].requires_grad_(False)
for name, number in parameters.items():
    print(f"{name:12s} {number / 1e6:6.1f} million parameters")
check("the U-Net that Stability AI published has", parameters["U-Net"], 865_910_724, 0)


# %%
def kept_for_backward(side):
    """Bytes per picture of side×side pixels in fp32, by part."""
    with torch.device("meta"):
        latents, text, t = torch.empty(1, 4, side // 8, side // 8), torch.empty(1, 77, 1024), torch.empty(1)
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention):
        run = [sd2["ControlNet"], sd2["U-Net"], sd2["autoencoder"]]
        (down, mid), control = weigh(lambda: run[0](latents, t, text, picture(side).detach(), return_dict=False), run)
        options = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid, "return_dict": False}
        (noise,), unet = weigh(lambda: run[1](latents, t, text, **options), run)
        _, decoder = weigh(lambda: run[2].decode(noise, return_dict=False), run)
    return {"ControlNet": control, "U-Net": unet, "decoder": decoder, "VGG19 and Gram": on_paper * (side / 512) ** 2}


trained = parameters["U-Net"] + parameters["ControlNet"]
fixed = {
    # weight, gradient, two moments of Adam, moving average: 4 bytes each
    "trained weights": 20 * trained,
    "frozen weights": 4 * (trained + parameters["autoencoder"] + parameters["text encoder"]),  # with the reference
}


def draw(side, pictures_per_gpu=4):
    parts = fixed | {name: pictures_per_gpu * size for name, size in kept_for_backward(side).items()}
    figure, axes = panels(width=6.8, height=2.7)
    left, total = 0.0, sum(parts.values()) / 1e9
    for place, (name, size) in enumerate(parts.items()):
        axes.barh(len(parts) - place, size / 1e9, left=left, color="#0072B2" if name in fixed else "#E69F00")
        axes.text(left + size / 1e9 + 1, len(parts) - place, f"{size / 1e9:.1f}", va="center", size=9)
        left += size / 1e9
    axes.axvline(80, color="#000000", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(parts), 0, -1), parts)
    axes.set_xlim(0, max(95, 1.12 * total))
    axes.set_xlabel("GB for 4 pictures in fp32; dashed: one A100-80G")
    axes.set_title(f"{side}×{side}: {total:.0f} GB", size=10)
    each = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    return figure, f"Memory for four pictures of {side} by {side} pixels, in gigabytes: {each}; together {total:.0f}."


sides = explore(draw, values=[256, 384, 512, 640, 768], label="side of the crops")
sides

# %%
sides.slider.value = 512
show(*draw(512))
per_picture = kept_for_backward(512)
check("activations grow with the area", sum(kept_for_backward(256).values()) / sum(per_picture.values()), 0.25, 0.01)

# %% [markdown]
# **What to see.** The paper trains "batches of 8" on two A100 with 80 GB; we read that as four pictures on each.
# Counted this way they fit, in plain fp32. (The count is a count: no GPU has run it.) Weights and what belongs to them
# take nearly half: a trained number needs 20 bytes, for itself, its gradient, two moments of Adam, and the moving
# average. Of what each picture adds (orange), the *decoder* is by far the largest: RFSR's losses look at pixels, and
# the gradient passes through the decoder to reach the latents. Left out are the two rewards (they see one picture at a
# time; ImageReward has 446 million numbers, 0.8 GiB in bfloat16, notebook 07), SeeSR's extra attentions, temporary
# memory of kernels, and what PyTorch keeps in reserve. In practice one takes `mixed_precision=bf16`, which stores most
# activations in half the bytes. For smaller cards there are `lora_rank`, `gradient_checkpointing`, `frozen_dtype`,
# `offload_reference` and `optimizer: adam-8bit`; what each saves, `python -m benchmarks.memory` counts. SeeSR's
# iteration in fp32, in GiB ([how it is counted, and all rows](../docs/published_models.md#memory)): with all weights
# trained 76 at batch 4 and 43 at batch 1, with LoRA of rank 8 49 and 19. By this count, which leaves out rewards and
# workspaces, a card of 24 GB can train LoRA at batch 1.
#
# ## 6 · What does a full run need?
#
# | | SeeSR | PASD | DiffBIR v1 |
# |---|---|---|---|
# | base | Stable Diffusion 2-base | Stable Diffusion 1.5 | Stable Diffusion 2.1-base |
# | files | `seesr/unet`, `seesr/controlnet`, `DAPE.pth`, `ram_swin_large_14m.pth` | `pasd/…/unet`, `…/controlnet` | `general_full_v1.ckpt`, `general_swinir_v1.ckpt` |
# | what its networks add to stock parts | 16 + 7 image attentions | 12 pixel attentions | a ControlNet that reads 8 channels |
# | prompt in RFSR's paper | tags by DAPE | a caption | tags by DAPE ("DiffBIR-tag") |
# | sampling steps | 50 | 20 | 50 |
# | structure, reward steps | 1–20, 41–50 | 1–8, 18–20 | 1–20, 41–50 |
#
# Files and additions are those of the authors' public code, steps those of RFSR's paper. The package has an adapter for
# each (`rfsr models` lists them, [docs/published_models.md](../docs/published_models.md) says how they were compared with
# the authors' code); **the published weights were never opened here**, so no figure of this course is theirs. The repositories from which the three Stable
# Diffusion bases were first published have been taken down; look for mirrors.
#
# The paper's own settings are the preset `paper`: two A100-80G, 10 000 iterations. **How many hours that took the paper
# does not say**, and we have not run it.

# %%
paper, mini = RFSRConfig.load("paper").to_dict(), RFSRConfig.load("mini").to_dict()
print(f"{'':22s} {'paper':40s} mini")
for key in ("crop_size", "batch_size", "iterations", "learning_rate", "ema_decay", "structure_window", "reward_window",
            "lambda_structure", "rewards", "lambda_style", "vgg_weights"):  # fmt: skip
    print(f"{key:22s} {str(paper[key]):40s} {mini[key]}")
assert (paper["structure_window"], paper["reward_window"]) == ([1, 20], [41, 50]), "section 4.1 of the paper"
assert (paper["lambda_structure"], paper["lambda_style"]) == (5e-4, 5e-5), "section 4.1 of the paper"
assert set(paper["rewards"].values()) == {5e-5}, "section 4.1 of the paper"
assert (paper["learning_rate"], paper["batch_size"], paper["iterations"]) == (5e-6, 8, 10_000)

# %% [markdown]
# Do not compare the weights λ across the two columns. A factor common to all of them hardly matters to Adam, and the
# rewards and VGG19 of the two presets are different networks, with gradients of different size.
#
# Four more files make the paper's losses real. On your machine:

# %% tags=["nbval-ignore-output"]
needed = {"clipiqa": ["clip-rn50"], "image-reward": ["image-reward", "bert-vocabulary"], "imagenet VGG19": ["vgg19"]}
make = {name: lambda name=name: create_reward(name) for name in paper["rewards"]}
make["imagenet VGG19"] = lambda: registry.locate("vgg19")
for name, build in make.items():
    try:
        build()
    except (FileNotFoundError, ModuleNotFoundError) as reason:
        absent = [
            f"{registry.FILES[key].file} ({registry.FILES[key].purpose})" for key in registry.missing(needed[name])
        ]
        if isinstance(reason, ModuleNotFoundError):
            absent.append(" ".join(str(reason).split()))
        print(f"NOT RUN: {name}; missing: {'; '.join(absent)}")
    else:
        print(f"{name}: ready")

# %% [markdown]
# ```sh
# rfsr weights                                      # every file: where it is looked for, whether it is there
# rfsr weights fetch clip-rn50 image-reward bert-vocabulary vgg19
# rfsr train paper --set model=my_model/ --set data=my_photos/ --set iterations=2     # try two iterations first
# torchrun --nproc-per-node 2 -m rfsr_ext train paper \
#     --set model=my_model/ --set data=my_photos/ --set output_dir=runs/paper --set mixed_precision=bf16
# ```
#
# `batch_size` counts over all processes: two processes take four pictures each. All randomness of an iteration
# follows from the seed and its number, so one GPU and two do the same run up to rounding, and the same command resumes
# an interrupted one.
#
# ## 7 · Exercises
#
# Replace the line that raises, run the cell, and read the verdict. SOLUTIONS.
#
# **Exercise 1 (warm-up, predict then run).** How many pictures of 512×512 fit into `memory` bytes, by the count of
# section 5?
# <details><summary>Hint</summary>How much is left for pictures when everything in `fixed` is there?</details>


# %%
def pictures_that_fit(memory):
    raise NotImplementedError


def verify_fit():
    for memory in (48e9, 80e9, 141e9):
        n = pictures_that_fit(memory)
        used = [sum(fixed.values()) + k * sum(per_picture.values()) for k in (n, n + 1)]
        assert n == int(n) and used[0] <= memory < used[1], f"{n} pictures for {memory / 1e9:.0f} GB"


exercise(1, verify_fit)


# %% [markdown]
# **Exercise 2.** Only two pictures fit at a time. Fill `net`'s gradients with those of the batch's mean loss, two pictures
# after another.
# <details><summary>Hint</summary>`backward` adds to what is there. Each part's mean must count as its share.</details>


# %%
def accumulate(net, lr, gt):
    raise NotImplementedError


def verify_accumulate():
    lr, gt, _ = batch(5)
    lr, gt = lr[..., :8, :8], gt[..., :32, :32]  # a corner of each will do
    gradients = []
    for run in (lambda n: loss_of(n(lr), gt).backward(), lambda n: accumulate(n, lr, gt)):
        fresh = copy.deepcopy(start)
        run(fresh)
        gradients.append(torch.cat([p.grad.flatten() for p in fresh.parameters()]))
    check("gradient", *gradients, 1e-5)


exercise(2, verify_accumulate)


# %% [markdown]
# **Exercise 3.** The target of a style loss often stays the same while the picture changes. Return a function of the
# picture alone that computes the target's Gram matrices once.
# <details><summary>Hint</summary>One method of `style` computes them alone, and a call of `style` takes them in the target's place:
# `help(VGGGramLoss)`.</details>


# %%
def style_towards(target):
    raise NotImplementedError


def verify_style():
    counted = mock.Mock(wraps=style.vgg.forward)
    with mock.patch.object(style.vgg, "forward", counted):
        towards = style_towards(test_gt[:1])
        values = [towards(test_gt[k : k + 1]) for k in range(3)]
    check("values", torch.stack(values), torch.stack([style(test_gt[k : k + 1], test_gt[:1]) for k in range(3)]), 1e-5)
    check("passes through VGG19: one for the target, three for pictures", counted.call_count, 4, 0)


exercise(3, verify_style)


# %% [markdown]
# **Open projects.** They have no verdict, and an afternoon is enough for each.
#
# * Put the structure loss into a training of a super-resolution network of your own, three layers will do, with the
#   package's photographs. An answer is held-out PSNR and low-band SSIM with and without it, for three seeds.
# * Plan a run for one model and one GPU that you can rent. Which of smaller pictures, checkpointed decoder and lower
#   precision saves most? An answer is a table on paper, with one row confirmed on `meta`.
#
# ## Summary
#
# * The losses are functions of two batches of pictures: one new line in any loop, and the same numbers wherever they ran here.
# * In a diffusion script they look at the estimate of a step; the window becomes a weight per sample.
# * RFSR itself needs an `ISRModel`; an adapter is forty lines, and five facts test it before the first long run.
# * A reference that shares weights switches the style loss off in silence.
# * On `meta`, PyTorch weighs a model that is not there; at full size the decoder keeps most.
# * Missing files are named, and nothing pretends to have run.
#
# NAVIGATION
