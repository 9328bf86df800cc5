"""Stage 2 of CCSR: the VAE's decoder learns to make details of the truncated estimate, against a discriminator."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import Dinov2Model, ViTModel

from rfsr_ext.losses import DINODiscriminator, PatchDiscriminator, VGGFeatureLoss
from rfsr_ext.losses.adversarial import (
    adaptive_weight,
    class_token,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from rfsr_ext.models import ISRModel
from rfsr_ext.models.folders import open_part
from rfsr_ext.sampling import generators, trajectory
from rfsr_ext.training.ccsr.config import CCSRStage2Config
from rfsr_ext.training.method import Method
from rfsr_ext.weights.pyiqa import create_metric

__all__ = ["Decoder", "DecoderTuning", "build_discriminator", "build_perceptual_loss"]

_STAND_IN_LAYERS = ("conv1_2", "conv2_2", "conv3_4")  # half the time of all five

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images ``[N, 3, H, W]`` in [0, 1] to one number per image."""


class Decoder(nn.Module):
    """What a diffusers VAE decodes with, as a network of its own: it shares its modules with the VAE.

    Several processes wrap a network and see no call but ``forward``; that of a VAE encodes as well.

    Args:
        vae: of diffusers.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


class _DecodesWith:
    """Stands where a model has its VAE: decodes with one network, wrapped or not."""

    def __init__(self, decoder: nn.Module):
        self.decoder = decoder

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.decoder(latents),)


def build_perceptual_loss(name: str, device: torch.device) -> Distance | None:
    """The distance of that name in `CCSRStage2Config.perceptual_loss`, of images on ``device``.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: if its package or its weights are missing, or damaged.
    """
    if name == "none":
        return None
    if name == "lpips-vgg":
        metric = create_metric("lpips-vgg", device=device, as_loss=True, loss_reduction="none")
        return lambda pred, target: metric(pred, target).flatten()
    loss = VGGFeatureLoss("imagenet") if name == "vgg" else VGGFeatureLoss("random", _STAND_IN_LAYERS)
    return loss.to(device).distances


def build_discriminator(config: CCSRStage2Config) -> tuple[nn.Module, nn.Module | None]:
    """The discriminator, and the frozen network that tells it of the LR image.

    Raises:
        FileNotFoundError, ValueError: if a folder does not exist or holds another network.
    """
    if config.discriminator == "patch":
        channels, norm = config.discriminator_channels, config.discriminator_norm
        return PatchDiscriminator(channels, norm=norm, seed=config.seed), None
    describes = None
    if config.dino_condition is not None:
        describes = open_part(Dinov2Model, config.dino_condition, name="dino_condition").requires_grad_(False).eval()
    vit = open_part(ViTModel, str(config.dino), name="dino", add_pooling_layer=False)
    width = describes.config.hidden_size if describes is not None else 0
    return DINODiscriminator(vit, width, seed=config.seed), describes


class DecoderTuning(Method):
    """Two players: the decoder G, over estimates that the frozen model samples without gradient, and a discriminator D.

    G minimizes λ_rec ‖x̂ − x‖ + λ_perc d(x̂, x) + w λ_adv (−mean D(x̂)), D the hinge loss of x and x̂ (CCSR, arXiv
    2401.00877, section 3.4; VQGAN, arXiv 2012.09841, eqs. 5 to 7), with x̂ = G(ẑ_0) and images x in [−1, 1], as
    published. w is 1, or the ratio of the first two terms' gradient to the last one's at G's last convolution; it is 0
    before ``adversarial_start``. D sees what G made in its turn of the same iteration, before its step.

    ẑ_0 is what the model's recipe samples, so that training and inference are one: "one leap, few steps, the estimate
    at t_min" where its ``spacing`` is CCSR's, the end of the trajectory otherwise.

    Args:
        config: its seed makes noise and discriminator.
        model: its network ``vae``, an AutoencoderKL of diffusers, is trained in place.
        discriminator: by default that of the configuration, which sees ``describes`` too.
        perceptual: the same.

    Raises:
        ValueError: if the model has no such network.
    """

    def __init__(
        self,
        config: CCSRStage2Config,
        model: ISRModel,
        discriminator: nn.Module | None = None,
        perceptual: Distance | None = None,
    ):
        self.config, self.model = config, model
        vae = model.networks.get("vae")
        if not isinstance(vae, AutoencoderKL):
            raise ValueError(
                f"model must have a network 'vae' that is an AutoencoderKL of diffusers, whose decoder is trained, got "
                f"{type(model).__name__} with {', '.join(model.networks)}"
            )
        self.base = model.fingerprint()
        self.describes: nn.Module | None = None
        if discriminator is None:
            discriminator, self.describes = build_discriminator(config)
        for network in (discriminator, self.describes):
            if network is not None:
                network.to(model.device)
        if perceptual is None:
            perceptual = build_perceptual_loss(config.perceptual_loss, model.device)
        self.perceptual = perceptual
        for network in model.networks.values():
            network.requires_grad_(False)
        decoder = Decoder(vae).requires_grad_(True)
        self.last_layer = decoder.decoder.conv_out.weight
        self.players = {"decoder": {"decoder": decoder}, "discriminator": {"discriminator": discriminator}}
        self.installed: dict[str, nn.Module] = {}
        for player, networks in self.players.items():
            self.install(player, networks)
        self.made: dict[int, tuple[Tensor, Tensor | None]] = {}  # by the part of the batch, for the discriminator

    def install(self, player: str, networks: dict[str, nn.Module]) -> None:
        self.installed |= networks

    @torch.no_grad()
    def estimates(self, batch: dict[str, Any], samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the frozen model samples for a part of a batch, latents to decode; and the enlarged LR images."""
        condition = self.model.condition(batch["lr"], batch["prompt"])
        noise = generators(self.config.seed, samples)
        *_, (_, latents) = trajectory(self.model, condition, noise, self.config.num_inference_steps)
        return latents, condition.image

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in [−1, 1], by the decoder that is installed."""
        twin = copy.copy(self.model)
        twin.networks = self.model.networks | {"vae": _DecodesWith(self.installed["decoder"])}
        return twin.decode(latents) * 2 - 1

    def _judge(self, images: Tensor, condition: Tensor | None, samples: Sequence[int], turn: int) -> Tensor:
        changes = generators(self.config.seed + (turn + 1) * 2**32, samples)  # a run's own seeds are below
        return self.installed["discriminator"](images, condition, changes).float()

    def loss(self, player: str, batch: dict[str, Any], iteration: int, samples: Sequence[int]):
        config, target = self.config, batch["gt"] * 2 - 1
        part = samples[0] - iteration * config.batch_size
        if player == "discriminator":
            images, condition = self.made.pop(part)
            real = self._judge(target, condition, samples, 1)
            fake = self._judge(images, condition, samples, 2)
            loss = hinge_discriminator_loss(real, fake)
            logs = {"loss": loss, "real": real.mean(), "fake": fake.mean()}
            return loss, {name: value.detach() for name, value in logs.items()}
        latents, enlarged = self.estimates(batch, samples)
        images = self.decode(latents)
        distance = {"l1": F.l1_loss, "l2": F.mse_loss}[config.reconstruction_loss]
        logs = {config.reconstruction_loss: distance(images.float(), target.float())}
        loss = config.lambda_reconstruction * logs[config.reconstruction_loss]
        if self.perceptual is not None:
            logs["perceptual"] = self.perceptual(images.float() / 2 + 0.5, batch["gt"].float()).mean()
            loss = loss + config.lambda_perceptual * logs["perceptual"]
        condition = None if self.describes is None else class_token(self.describes, enlarged)
        self.made[part] = images.detach(), condition
        if iteration >= config.adversarial_start and config.lambda_adversarial:
            logs["adversarial"] = hinge_generator_loss(self._judge(images, condition, samples, 0))
            weight = config.lambda_adversarial
            if config.adaptive_weight:
                logs["weight"] = adaptive_weight(
                    loss, logs["adversarial"], self.last_layer, average=lambda g: reduce(g, "mean")
                )
                weight = weight * logs["weight"]
            loss = loss + weight * logs["adversarial"]
        return loss, {name: value.detach() for name, value in ({"loss": loss} | logs).items()}

    def fingerprint(self) -> str:
        return self.base

    def export(self, folder: Path) -> None:
        """The model as an ordinary folder; its VAE has the tuned decoder."""
        decoder, vae = self.installed["decoder"], self.model.networks["vae"]
        own = vae.post_quant_conv, vae.decoder
        vae.post_quant_conv, vae.decoder = decoder.post_quant_conv, decoder.decoder
        try:
            self.model.save_pretrained(folder)
        finally:
            vae.post_quant_conv, vae.decoder = own
