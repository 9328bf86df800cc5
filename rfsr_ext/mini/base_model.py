"""The two stages that make the mini base model: an autoencoder, then a denoiser with its ControlNet on its latents."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from rfsr_ext.mini import architecture
from rfsr_ext.mini.stage import train_stage
from rfsr_ext.models import Condition, ControlNetISRModel, Recipe

__all__ = ["train_autoencoder", "train_denoiser"]


def _differences(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def train_autoencoder(dataset: Dataset, folder: Path, iterations: int, batch_size: int = 16, **options):
    """Train the autoencoder on pixels and their differences; ``scaling_factor`` gives its latents unit scale.

    Loss: |x − x̂| + ½ (|∂ₓ(x − x̂)| + |∂ᵧ(x − x̂)|) + 5·10⁻⁴ KL + ‖z₁₋₃ − 2 x↓‖², all means.

    The last term makes the first three latent channels the picture itself, four times smaller.  Left alone, the group
    normalization of the encoder ties every latent to statistics of the whole picture, and a small denoiser then cannot
    tell from the condition what color its output should have (tried: half of its squared error was a color cast).
    """
    torch.manual_seed(options.get("seed", 0))
    vae = architecture.autoencoder()

    def loss(batch: dict, generator: torch.Generator) -> Tensor:
        images = batch["gt"] * 2 - 1
        posterior = vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        output = vae.decode(mean + noise * (0.5 * logvar).exp()).sample.float()
        edges = sum(F.l1_loss(a, b) for a, b in zip(_differences(output), _differences(images), strict=True))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        picture = F.mse_loss(mean[:, :3], 2 * F.avg_pool2d(images, 4))
        return F.l1_loss(output, images) + 0.5 * edges + 5e-4 * kl + picture

    seconds = train_stage(
        "autoencoder", {"vae": vae}, dataset, loss, folder,
        iterations=iterations, batch_size=batch_size, learning_rate=1e-3, **options,
    )  # fmt: skip
    with torch.no_grad():
        images = torch.stack([dataset[10_000_000 + i]["gt"] for i in range(128)]).to(vae.device)
        latents = vae.encode(images * 2 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae, seconds


def train_denoiser(vae, dataset: Dataset, folder: Path, iterations: int, batch_size: int = 32, **options):
    """Train U-Net, ControlNet and text encoder together from scratch to predict velocity, in the latents of ``vae``.

    A tenth of the prompts is empty already (see `PhotographCrops`), which leaves classifier-free guidance possible.
    """
    torch.manual_seed(options.get("seed", 0) + 1)
    tokenizer = architecture.tokenizer()
    unet, controlnet = architecture.denoiser()
    model = ControlNetISRModel(
        vae, architecture.text_encoder(tokenizer), tokenizer, unet, controlnet, architecture.scheduler(),
        recipe=Recipe(tile=128, overlap=32),
    )  # fmt: skip

    process = model.process()

    def loss(batch: dict, generator: torch.Generator) -> Tensor:
        n = len(batch["gt"])
        with torch.no_grad():
            latents = model.encode(batch["gt"]).float()
            upscaled = F.interpolate(batch["lr"], scale_factor=model.scale, mode="bicubic").clamp(0, 1)
        # stratified timesteps: every batch sees the whole schedule
        u = (torch.rand(n, generator=generator) + torch.arange(n)) / n
        timesteps = (u * model.scheduler.config.num_train_timesteps).long()
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        condition = Condition(
            upscaled, batch["prompt"], {"controlnet_cond": upscaled},
            {"encoder_hidden_states": model.encode_prompts(batch["prompt"])},
        )  # fmt: skip
        output = model.predict(process.add_noise(latents, noise, timesteps), timesteps.to(latents.device), condition)
        return F.mse_loss(output.float(), process.target(latents, noise, timesteps))

    trained = {"unet": unet, "controlnet": controlnet, "text_encoder": model.text_encoder}
    seconds = train_stage(
        "denoiser", trained, dataset, loss, folder,
        iterations=iterations, batch_size=batch_size, learning_rate=1e-3, **options,
    )  # fmt: skip
    return model, seconds
