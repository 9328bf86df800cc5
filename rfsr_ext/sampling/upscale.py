"""Upscaling a photograph of any size: reflection padding, tiles where it is large, color correction."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rfsr_ext.models import ISRModel
from rfsr_ext.sampling.color import COLOR_FIXES
from rfsr_ext.sampling.rollout import generators, inference_condition, trajectory
from rfsr_ext.sampling.tiles import Tiled, Tiles

__all__ = ["upscale"]


def _pad(image: Tensor, height: int, width: int) -> Tensor:
    """Extend to the right and below by reflection, or by the last pixel where there is too little to reflect."""
    below, right = height - image.shape[-2], width - image.shape[-1]
    image = F.pad(image, (0, right, 0, 0), mode="reflect" if right < image.shape[-1] else "replicate")
    return F.pad(image, (0, 0, 0, below), mode="reflect" if below < image.shape[-2] else "replicate")


@torch.no_grad()
def upscale(
    model: ISRModel,
    image: Tensor,
    prompt: str = "",
    *,
    seed: int = 0,
    tile: int = 128,
    overlap: int = 32,
    batch_size: int = 4,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    color_fix: str | None = "wavelet",
    progress: bool = True,
) -> Tensor:
    """Upscale one photograph of any size.

    An image whose result fits into one tile is denoised whole and equals what `rfsr_ext.sampling.sample` gives for
    ``generators(seed, [0])``; of a larger one only ``batch_size`` tiles are in a network at a time.

    Args:
        model: makes the image.
        image: LR image ``[3, h, w]`` in [0, 1], one pixel or more.
        prompt: what the photograph shows; every tile gets it.
        seed: of the noise; the same seed gives the same result.
        tile: side of a tile in pixels of the result, rounded up to a multiple of ``model.multiple``.
        overlap: how far neighboring tiles overlap at least, in the same pixels and rounded up in the same way.
        batch_size: tiles denoised at once.
        num_inference_steps, guidance_scale, negative_prompt: those of the model's recipe by default.
        color_fix: correct color shifts against ``condition.image``, the enlarged LR image: ``"wavelet"`` takes its low
            frequencies (StableSR), ``"adain"`` its channels' mean and standard deviation (SeeSR), None leaves colors
            alone.
        progress: show a progress bar.

    Returns:
        ``[3, scale·h, scale·w]`` in [0, 1], float32, on the image's device.

    Raises:
        TypeError: if ``image`` is not floating point.
        ValueError: if its shape or values, the tiling or ``color_fix`` is wrong.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"image must have shape [3, h, w] with at least one pixel, got {list(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1], got {image.dtype}; divide 8-bit images by 255")
    if not (image.min() >= 0 and image.max() <= 1):  # also catches NaN
        raise ValueError(f"image must be finite and in [0, 1], got values from {image.min():g} to {image.max():g}")
    if color_fix not in COLOR_FIXES:
        raise ValueError(f"color_fix must be one of {list(COLOR_FIXES)}, got {color_fix!r}")
    tile, overlap = (math.ceil(n / model.multiple) * model.multiple for n in (tile, overlap))
    if not 0 <= overlap < tile:
        raise ValueError(
            f"overlap must be at least 0 and smaller than tile, both as multiples of {model.multiple}, got overlap "
            f"{overlap} and tile {tile}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    unit = math.lcm(model.scale, model.multiple) // model.scale
    lr = _pad(image[None].float(), *(math.ceil(n / unit) * unit for n in image.shape[-2:])).to(model.device)
    height, width = (n * model.scale for n in lr.shape[-2:])
    if max(height, width) > tile:
        model = Tiled(model, Tiles(height, width, tile, overlap, model.multiple, batch_size))
    condition, guidance_scale = inference_condition(model, lr, [prompt], guidance_scale, negative_prompt)
    states = trajectory(model, condition, generators(seed, [0]), num_inference_steps, guidance_scale)
    with tqdm(total=len(model.process(num_inference_steps)), desc="upscale", unit="step", disable=not progress) as bar:
        for state, _ in states:  # the last of them is the end
            bar.update(state.step - 1 - bar.n)
    crop = ..., slice(image.shape[-2] * model.scale), slice(image.shape[-1] * model.scale)
    sr, reference = (x[crop].float() for x in (model.decode(state.latents), condition.image))
    return COLOR_FIXES[color_fix](sr, reference).clamp(0, 1)[0].to(image.device)
