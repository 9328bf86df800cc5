"""The stages that train the two small rewards and the judge, all by comparing distorted versions of one picture."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from rfsr_ext.metrics.judge import Judge, natural_scene_statistics
from rfsr_ext.mini.stage import train_stage
from rfsr_ext.rewards import MiniIQA, MiniPreference

__all__ = ["similarity", "train_iqa", "train_judge", "train_preference"]


def similarity(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of gray versions with a 7×7 box window, ``[N, 3, H, W]`` in [0, 1] to ``[N]``."""
    x, y = images.mean(1, keepdim=True), originals.mean(1, keepdim=True)
    pooled = F.avg_pool2d(torch.cat([x, y, x * x, y * y, x * y], dim=1), 7, 1)
    mx, my, xx, yy, xy = pooled.unbind(1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    return (luminance * structure).mean((1, 2))


def _quality(versions: Tensor) -> Tensor:
    """``[N, V, 3, H, W]``, version 0 untouched, to the similarity of each version with version 0, ``[N, V]``."""
    originals = versions[:, :1].expand_as(versions)
    return similarity(versions.flatten(0, 1), originals.flatten(0, 1)).unflatten(0, versions.shape[:2])


def _ranking_loss(scores: Tensor, quality: Tensor) -> Tensor:
    """Bradley–Terry over all pairs of versions of a picture, ``[N, V]`` each; pairs of equal quality count little."""
    gap = quality[:, :, None] - quality[:, None, :]
    better = gap.clamp_min(0).clamp_max(0.2)
    return -(better * F.logsigmoid(scores[:, :, None] - scores[:, None, :])).sum() / better.sum().clamp_min(1e-6)


@torch.no_grad()
def _as_sampled(versions: Tensor, vae: AutoencoderKL, generator: torch.Generator) -> Tensor:
    """``[N, V, 3, H, W]`` with the last version replaced by one that fails as a diffusion sampler does: noisy latents.

    A reward that never saw the blotches this gives takes them for detail and asks the sampler for more (tried).
    """
    latents = vae.encode(versions[:, 0] * 2 - 1).latent_dist.mode()
    spread = torch.rand(len(latents), 1, 1, 1, generator=generator) * 0.8 / vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator) * spread
    decoded = vae.decode(latents + noise.to(latents)).sample / 2 + 0.5
    return torch.cat([versions[:, :-1], decoded.float().clamp(0, 1)[:, None]], dim=1)


@torch.no_grad()
def _standardize(reward: MiniIQA | MiniPreference, dataset: Dataset, raw_score: Callable[..., Tensor]) -> None:
    """Set mean and standard deviation of ``reward`` to those of its raw scores on samples it did not learn from."""
    samples = [dataset[10_000_000 + i] for i in range(64)]
    device = reward.mean.device
    scores = [raw_score(s["images"].to(device), [s["prompt"]] * len(s["images"])) for s in samples]
    reward.mean.copy_(torch.cat(scores).mean())
    reward.std.copy_(torch.cat(scores).std())


def train_iqa(dataset: Dataset, vae: AutoencoderKL, folder: Path, iterations: int, batch_size: int = 12, **options):
    """`MiniIQA`, by ranking; ``dataset`` gives versions of a picture with the faults a low-resolution input suffers."""
    torch.manual_seed(options.get("seed", 0) + 2)
    reward = MiniIQA()
    vae.to(options.get("device", "cpu"))

    def loss(batch: dict, generator: torch.Generator) -> Tensor:
        versions = _as_sampled(batch["images"], vae, generator)
        scores = reward.raw_score(versions.flatten(0, 1)).unflatten(0, versions.shape[:2])
        return _ranking_loss(scores, _quality(versions)) + 1e-3 * scores.square().mean()

    seconds = train_stage("iqa", {"iqa": reward}, dataset, loss, folder,
                  iterations=iterations, batch_size=batch_size, learning_rate=1e-3, **options)  # fmt: skip
    _standardize(reward, dataset, lambda images, prompts: reward.raw_score(images))
    return reward, seconds


def train_preference(
    dataset: Dataset,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    iqa: MiniIQA,
    folder: Path,
    iterations: int,
    batch_size: int = 12,
    **options,
):
    """`MiniPreference`, from pairs: less distorted over more, own prompt over another picture's.

    Its convolutions start as those of ``iqa``, as ImageReward's start from BLIP: from random ones it learns to tell the
    prompts apart and hardly to rank (tried for 800 iterations).
    """
    torch.manual_seed(options.get("seed", 0) + 3)
    reward = MiniPreference(tokenizer)
    vae.to(options.get("device", "cpu"))
    reward.features.load_state_dict(iqa.features.state_dict(), strict=False)  # all layers but its last

    def loss(batch: dict, generator: torch.Generator) -> Tensor:
        versions, prompts = _as_sampled(batch["images"], vae, generator), batch["prompt"]
        n, v = versions.shape[:2]
        text = reward.embed_text(prompts)
        other = text.roll(1, dims=0)
        images = versions.flatten(0, 1)
        scores = reward.raw_score(images, text.repeat_interleave(v, 0)).unflatten(0, (n, v))
        wrong = reward.raw_score(versions[:, 0], other)
        differs = torch.tensor(
            [float(bool(a) and bool(b) and a != b) for a, b in zip(prompts, prompts[-1:] + prompts[:-1], strict=True)]
        ).to(scores.device)
        matching = -(differs * F.logsigmoid(scores[:, 0] - wrong)).sum() / differs.sum().clamp_min(1)
        return _ranking_loss(scores, _quality(versions)) + matching + 1e-3 * scores.square().mean()

    seconds = train_stage("preference", {"preference": reward}, dataset, loss, folder,
                  iterations=iterations, batch_size=batch_size, learning_rate=1e-3, **options)  # fmt: skip
    _standardize(reward, dataset, lambda images, prompts: reward.raw_score(images, reward.embed_text(prompts)))
    return reward, seconds


def train_judge(dataset: Dataset, folder: Path, iterations: int, batch_size: int = 12, **options):
    """`Judge`, by regression of similarity and by ranking; ``dataset`` gives versions with every fault."""
    torch.manual_seed(options.get("seed", 0) + 4)
    judge = Judge()
    with torch.no_grad():
        statistics = torch.cat([natural_scene_statistics(dataset[20_000_000 + i]["images"]) for i in range(256)])
        judge.mean.copy_(statistics.mean(0))
        judge.std.copy_(statistics.std(0).clamp_min(1e-3))

    def loss(batch: dict, generator: torch.Generator) -> Tensor:
        versions = batch["images"]
        quality = _quality(versions)
        with torch.no_grad(), torch.autocast(versions.device.type, enabled=False):
            statistics = natural_scene_statistics(versions.flatten(0, 1))
        scores = judge.from_statistics(statistics).float().unflatten(0, versions.shape[:2])
        return F.mse_loss(scores, quality) * 4 + _ranking_loss(scores * 10, quality)

    seconds = train_stage("judge", {"judge": judge}, dataset, loss, folder,
                  iterations=iterations, batch_size=batch_size, learning_rate=2e-3, **options)  # fmt: skip
    return judge, seconds
