"""The two stages that make the mini base model: an autoencoder, then a denoiser with its ControlNet on its latents."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset

from rfsr_ext.mini import architecture
from rfsr_ext.mini.linear_start import LinearAutoencoder, LinearEstimator, load_linear_estimate, load_linear_map
from rfsr_ext.mini.stage import train_stage
from rfsr_ext.models import Condition, ControlNetISRModel, Recipe

__all__ = ["train_autoencoder", "train_denoiser"]


def train_autoencoder(
    dataset: Dataset, folder: Path, iterations: int, batch_size: int = 6, **options
) -> tuple[AutoencoderKL, LinearAutoencoder, float]:
    """Train a linear autoencoder and lay it into diffusers' class, see `rfsr_ext.mini.linear_start`.

    Loss: 10 ‖x − x̂‖² + ‖z₁₋₃ − 2 x↓‖² + 0.3 ‖z₄…(x↓↑)‖², all means.

    The last two terms make the first three latent channels the picture itself, four times smaller, and the others the
    detail that an enlarged picture does not have: what super-resolution adds is then as large in every channel.

    Returns:
        The autoencoder; the linear one, which gives the same latents to a thousandth at a fortieth of the cost; and the
        seconds spent.
    """
    torch.manual_seed(options.get("seed", 0))
    linear = LinearAutoencoder(architecture.LATENT_CHANNELS)

    def loss(batch: dict, generator: torch.Generator) -> Tensor:
        images = batch["gt"] * 2 - 1
        small = F.avg_pool2d(images, 4)
        latents = linear.encode(images)
        of_enlarged = linear.encode(F.interpolate(small, scale_factor=4, mode="bicubic"))
        picture = F.mse_loss(latents[:, :3], 2 * small)
        return 10 * F.mse_loss(linear.decode(latents), images) + picture + 0.3 * of_enlarged[:, 3:].square().mean()

    seconds = train_stage(
        "autoencoder", {"linear": linear}, dataset, loss, folder,
        iterations=iterations, batch_size=batch_size, learning_rate=5e-3, weight_decay=0.0, ema_decay=0.99, **options,
    )  # fmt: skip
    vae = architecture.autoencoder()
    load_linear_map(vae, linear.cpu())
    return vae, linear, seconds


def train_denoiser(
    vae: AutoencoderKL,
    linear: LinearAutoencoder,
    datasets: Mapping[str, tuple[Dataset, int, int]],
    folder: Path,
    **options,
) -> tuple[ControlNetISRModel, dict[str, float]]:
    """Train U-Net, ControlNet and text encoder together to predict z_0, from a linear estimate of it.

    Sampling starts from the LR image's latents, z_T = α_T z_LR + σ_T ε.  So that training sees the same, its noise is
    `Process.noise_towards` them.  The first estimate then is what the LR image tells of the truth, and the later ones
    fill in what it does not.  Timesteps are drawn more densely where sampling starts, t ∝ 1 − u²: the first estimate is
    what all others begin with.

    With all of the noise that it was trained with, the model makes a texture of it, like a canvas's, on everything; its
    recipe starts from 0.7 of it.

    A tenth of the prompts is empty already (see `PhotographCrops`), which leaves classifier-free guidance possible.

    Args:
        vae, linear: of `train_autoencoder`.
        datasets: by the name of the stage samples, iterations and batch size: the linear estimate, the denoiser, and
            the denoiser once more, now with a falling learning rate.
        folder: of the states.
        options: of `train_stage`.
    """
    torch.manual_seed(options.get("seed", 0) + 1)
    tokenizer = architecture.tokenizer()
    unet, controlnet = architecture.denoiser()
    model = ControlNetISRModel(
        vae, architecture.text_encoder(tokenizer), tokenizer, unet, controlnet, architecture.scheduler(),
        recipe=Recipe(temperature=0.7, noising="to-start", tile=128, overlap=32),
    )  # fmt: skip
    linear_estimator = LinearEstimator(architecture.LATENT_CHANNELS, architecture.LINEAR_WIDTHS)
    process = model.process()
    linear.to(options.get("device", "cpu"))

    def encode(images: Tensor) -> Tensor:
        return linear.encode(images * 2 - 1) * model.scaling_factor

    def linear_loss(batch: dict, generator: torch.Generator) -> Tensor:
        return F.mse_loss(linear_estimator(model.first_stage(batch["lr"])), encode(batch["gt"]))

    def loss(batch: dict, generator: torch.Generator) -> Tensor:
        n = len(batch["gt"])
        upscaled = model.first_stage(batch["lr"])
        with torch.no_grad():
            latents, start = encode(batch["gt"]), encode(upscaled)
        # stratified timesteps: every batch sees the whole schedule
        u = (torch.rand(n, generator=generator) + torch.arange(n)) / n
        timesteps = ((1 - u * u) * model.scheduler.config.num_train_timesteps).long().clamp_max(process.timesteps[0])
        noise = process.noise_towards(
            start, latents, torch.randn(latents.shape, generator=generator).to(latents.device)
        )
        condition = Condition(
            upscaled, batch["prompt"], {"controlnet_cond": upscaled},
            {"encoder_hidden_states": model.encode_prompts(batch["prompt"])},
        )  # fmt: skip
        output = model.predict(process.add_noise(latents, noise, timesteps), timesteps.to(latents.device), condition)
        return F.mse_loss(output.float(), process.target(latents, noise, timesteps))

    (start_name, start), *denoising = datasets.items()
    seconds = {
        start_name: train_stage(
            start_name, {"linear": linear_estimator}, start[0], linear_loss, folder, iterations=start[1],
            batch_size=start[2], learning_rate=4e-3, weight_decay=0.0, ema_decay=0.99, **options,
        )
    }  # fmt: skip
    load_linear_estimate(unet, controlnet, linear_estimator.cpu())
    trained = {"unet": unet, "controlnet": controlnet, "text_encoder": model.text_encoder}
    for name, (dataset, iterations, batch_size) in denoising:
        seconds[name] = train_stage(
            name, trained, dataset, loss, folder, iterations=iterations, batch_size=batch_size, learning_rate=8e-4,
            ema_decay=0.995, falling=name == denoising[-1][0], **options,
        )  # fmt: skip
    return model, seconds
