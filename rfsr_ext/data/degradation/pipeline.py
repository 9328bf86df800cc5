"""The order of the stages, for one image and for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from rfsr_ext.data.degradation import stages_cpu, stages_gpu
from rfsr_ext.data.degradation.choices import RoundChoices
from rfsr_ext.data.degradation.kernels import gaussian
from rfsr_ext.data.images import jpeg, resize

if TYPE_CHECKING:
    from rfsr_ext.data.degradation.settings import Degradation

__all__ = ["degrade_batch", "degrade_image"]

_FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_UNSHARP = gaussian(51)


def degrade_batch(
    settings: Degradation, gt: Tensor, generators: Sequence[np.random.Generator]
) -> tuple[Tensor, Tensor]:
    """``[N, 3, H, W]`` to low-resolution images and ground truth, each sample with its own generator."""
    if not len(gt):
        return gt.new_empty(0, 3, *(side // settings.scale for side in gt.shape[2:])), gt
    samples = list(zip(gt, generators, strict=True))
    if gt.device.type != "cpu" and settings.second is not None:
        results = [_two_rounds(settings, image, rng, stages_gpu) for image, rng in samples]
    elif (threads := min(len(samples), torch.get_num_threads())) == 1:
        results = [_arrays_degraded(settings, image, rng) for image, rng in samples]
    else:
        with ThreadPoolExecutor(threads) as pool:  # NumPy and SciPy let the other threads run
            results = list(pool.map(lambda sample: _arrays_degraded(settings, *sample), samples))
    lr, sharp = zip(*results, strict=True)
    return torch.stack(lr).to(gt.device), torch.stack(sharp).to(gt.device) if settings.sharpens_gt else gt


def degrade_image(settings: Degradation, gt: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """``[H, W, 3]`` to the low-resolution image and the ground truth."""
    if settings.second is None:
        gt = np.moveaxis(_sharpened(np.moveaxis(gt, -1, 0), stages_cpu), 0, -1) if settings.sharpens_gt else gt
        return _one_round(settings, gt, rng), gt
    lr, sharp = _two_rounds(settings, np.ascontiguousarray(np.moveaxis(gt, -1, 0)), rng, stages_cpu)
    return np.ascontiguousarray(np.moveaxis(lr, 0, -1)), np.ascontiguousarray(np.moveaxis(sharp, 0, -1))


def _arrays_degraded(settings: Degradation, gt: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    image = gt.detach().cpu().contiguous().numpy()
    if settings.second is None:
        results = degrade_image(settings, np.ascontiguousarray(np.moveaxis(image, 0, -1)), rng)
        lr, sharp = (np.ascontiguousarray(np.moveaxis(result, -1, 0)) for result in results)
    else:
        lr, sharp = _two_rounds(settings, image, rng, stages_cpu)
    return torch.from_numpy(lr), torch.from_numpy(sharp)


def _one_round(settings: Degradation, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    sigma = rng.uniform(*settings.first.blur_sigma)
    image = gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
    image = resize(image, (height // settings.scale, width // settings.scale), _FILTERS[rng.integers(len(_FILTERS))])
    image = image + rng.normal(0, rng.uniform(*settings.first.noise_range) / 255, image.shape).astype(np.float32)
    low, high = settings.first.jpeg_range
    return jpeg(image, int(rng.integers(low, high + 1)), settings.first.jpeg_subsampling)


def _two_rounds(settings: Degradation, image: Any, rng: np.random.Generator, stages: ModuleType) -> tuple[Any, Any]:
    """``[3, H, W]`` of the kind that the stages take, to the low-resolution image and the ground truth."""
    choices = settings.draw(rng)
    gt = _sharpened(image, stages) if settings.sharpens_gt else image
    final = (gt.shape[1] // settings.scale, gt.shape[2] // settings.scale)

    def resized(image: Any, size: tuple[float, float], mode: str, scale: float | None = None) -> Any:
        return stages.resize(image, (max(1, int(size[0])), max(1, int(size[1]))), mode, scale)

    first, second = choices.first, choices.second
    image = _blurred(gt, first, stages)
    size = (gt.shape[1] * first.resize, gt.shape[2] * first.resize)
    image = resized(image, size, first.mode, first.resize)
    image = stages.jpeg(_noisy(image, first, rng, stages), first.quality)

    image = _blurred(image, second, stages)
    image = resized(image, (final[0] * second.resize, final[1] * second.resize), second.mode)
    image = _noisy(image, second, rng, stages)
    if not choices.jpeg_last:
        image = stages.jpeg(image, second.quality)
    image = resized(image, final, choices.final_mode)
    if choices.final_kernel is not None:
        image = stages.blur(image, choices.final_kernel.weights())
    image = stages.jpeg(image, second.quality) if choices.jpeg_last else stages.round_to_8_bits(image)
    return image, gt


def _blurred(image: Any, choices: RoundChoices, stages: ModuleType) -> Any:
    return image if choices.kernel is None else stages.blur(image, choices.kernel.weights())


def _noisy(image: Any, choices: RoundChoices, rng: np.random.Generator, stages: ModuleType) -> Any:
    """With noise, in [0, 1]."""
    add = {"gaussian": stages.add_gaussian_noise, "poisson": stages.add_poisson_noise}[choices.noise]
    return add(image, choices.strength, choices.gray, rng)


def _sharpened(image: Any, stages: ModuleType) -> Any:
    """Unsharp mask where the image differs from its blur by more than 10 levels, with soft edges; in [0, 1]."""
    detail = image - stages.blur(image, _UNSHARP)
    mask = stages.blur(stages.as_float(abs(detail) * 255 > 10), _UNSHARP)
    sharp = (image + 0.5 * detail).clip(0, 1)
    return (mask * sharp + (1 - mask) * image).clip(0, 1)
