"""Upscaling a photograph of any size: reflection padding, tiles where it is large, color correction."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rfsr_ext.models import ISRModel
from rfsr_ext.sampling.color import COLOR_FIXES
from rfsr_ext.sampling.rollout import Rollout, generators, inference_condition
from rfsr_ext.sampling.tiles import Tiled, Tiles

__all__ = ["result_bytes", "tiling", "upscale"]


def _pad(image: Tensor, height: int, width: int) -> Tensor:
    """Extend to the right and below by reflection, or by the last pixel where there is too little to reflect."""
    below, right = height - image.shape[-2], width - image.shape[-1]
    image = F.pad(image, (0, right, 0, 0), mode="reflect" if right < image.shape[-1] else "replicate")
    return F.pad(image, (0, 0, 0, below), mode="reflect" if below < image.shape[-2] else "replicate")


def tiling(model: ISRModel, tile: int | None = None, overlap: int | None = None) -> tuple[int, int, int]:
    """Side and overlap of tiles and their unit, in pixels of the result; both are rounded up to the unit.

    What is None comes from ``model.recipe``, but an overlap is never more than a quarter of a tile that is given, or
    what that is rounded up to, and always fits into it.

    Raises:
        ValueError: if the overlap is not smaller than the tile.
    """
    recipe, unit = model.recipe, math.lcm(model.scale, model.multiple)
    given = overlap
    if overlap is None:
        overlap = recipe.overlap if tile is None else min(recipe.overlap, tile // 4)
    tile, overlap = (math.ceil(n / unit) * unit for n in (recipe.tile if tile is None else tile, overlap))
    if given is None:
        overlap = min(overlap, tile - unit)
    if not 0 <= overlap < tile:
        raise ValueError(
            f"overlap must be at least 0 and smaller than tile, both in steps of {unit} pixels for this model, got "
            f"overlap {overlap} and tile {tile}"
        )
    return tile, overlap, unit


def result_bytes(model: ISRModel, height: int, width: int) -> int:
    """Bytes that an LR image of this size takes, upscaled and in 8 bits, beside the model and its work on tiles."""
    pixels = height * width * model.scale**2
    # the result in float32 and in 8 bits, while sampling is over
    after = 4 * 3 + 3
    # noise and latents before and after a step, the network's output and what the sampler makes of it
    during = 6 * 4 * model.latent_channels / model.vae_scale_factor**2
    first_stage = 0 if type(model).first_stage is ISRModel.first_stage else 4 * 3
    return math.ceil(pixels * (first_stage + max(after, during)))


@torch.no_grad()
def upscale(
    model: ISRModel,
    image: Tensor,
    prompt: str = "",
    *,
    seed: int = 0,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int = 4,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    color_fix: str | None = "recipe",
    progress: bool = True,
) -> Tensor:
    """Upscale one photograph of any size.

    An image whose result fits into one tile is denoised whole and equals what `rfsr_ext.sampling.sample` gives for
    ``generators(seed, [0])``; of a larger one only ``batch_size`` tiles are in a network at a time, and nothing
    but the result is as large in memory (`result_bytes`).

    Args:
        model: makes the image.
        image: LR image ``[3, h, w]`` in [0, 1], one pixel or more.
        prompt: what the photograph shows; every tile gets it.
        seed: of the noise; the same seed gives the same result.
        tile: side of a tile in pixels of the result, rounded up to a multiple of what the model can take.
        overlap: how far neighboring tiles overlap at least, in the same pixels and rounded up in the same way.
        batch_size: tiles denoised at once.
        num_inference_steps, guidance_scale, negative_prompt: those of the model's recipe by default, like the three
            around them.
        color_fix: correct color shifts against ``condition.image``, the enlarged LR image: ``"wavelet"`` takes its low
            frequencies (StableSR), ``"adain"`` its channels' mean and standard deviation (SeeSR), None leaves colors
            alone, ``"recipe"`` does what the authors do.
        progress: show a progress bar.

    Returns:
        ``[3, scale·h, scale·w]`` in [0, 1], float32, on the image's device.

    Raises:
        TypeError: if ``image`` is not floating point, or ``prompt`` no text.
        ValueError: if its shape or values, the tiling or ``color_fix`` is wrong.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"image must have shape [3, h, w] with at least one pixel, got {list(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"image must be floating point in [0, 1], got {image.dtype}; divide 8-bit images by 255")
    if not (image.min() >= 0 and image.max() <= 1):  # also catches NaN
        raise ValueError(f"image must be finite and in [0, 1], got values from {image.min():g} to {image.max():g}")
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, got {prompt!r}")
    color_fix = model.recipe.color_fix if color_fix == "recipe" else color_fix
    if color_fix not in COLOR_FIXES:
        raise ValueError(f"color_fix must be one of {['recipe', *COLOR_FIXES]}, got {color_fix!r}")
    tile, overlap, unit = tiling(model, tile, overlap)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    lr = image[None].float()
    if (short := min(lr.shape[-2:])) * model.scale < model.recipe.min_side:
        larger = [math.ceil(n * model.recipe.min_side / (short * model.scale)) for n in lr.shape[-2:]]
        lr = F.interpolate(lr, larger, mode="bicubic").clamp(0, 1)
    crop = ..., slice(lr.shape[-2] * model.scale), slice(lr.shape[-1] * model.scale)
    lr = _pad(lr, *(math.ceil(n * model.scale / unit) * unit // model.scale for n in lr.shape[-2:])).to(model.device)
    height, width = (n * model.scale for n in lr.shape[-2:])
    if max(height, width) > tile:
        model = Tiled(model, Tiles(height, width, tile, overlap, unit, batch_size))
    condition, guidance_scale = inference_condition(model, lr, [prompt], guidance_scale, negative_prompt)
    run = Rollout(model, condition, generators(seed, [0]), num_inference_steps, guidance_scale)
    with tqdm(total=len(run.state.process), desc="upscale", unit="step", disable=not progress) as bar:
        while not run.finished:
            run.advance()
            bar.update()
    sr = model.decode(run.state.latents)[crop].float()
    sr = COLOR_FIXES[color_fix](sr, condition.image, inplace=True).clamp_(0, 1)
    wanted = [n * model.scale for n in image.shape[-2:]]
    if list(sr.shape[-2:]) != wanted:
        sr = F.interpolate(sr, wanted, mode="bicubic", antialias=True).clamp(0, 1)
    return sr[0].to(image.device)
