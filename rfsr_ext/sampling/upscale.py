"""Upscaling a photograph of any size: reflection padding, overlapping tiles at every sampling step, colour correction.

The tiles share one noise and are blended at every step, as in MultiDiffusion (Bar-Tal et al., 2023) and SeeSR, so that
neighbours agree on what they draw and no seam appears; nothing but single tiles ever passes through a network.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rfsr_ext.models import Condition, ISRModel
from rfsr_ext.sampling.rollout import generators, trajectory

__all__ = ["adain_color_fix", "upscale", "wavelet_color_fix"]


def adain_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """Give each channel of ``image`` the mean and spread of ``reference``, both ``[N, 3, H, W]`` (SeeSR)."""
    (mean, std), (wanted_mean, wanted_std) = (
        (x.mean(dim=(2, 3), keepdim=True), (x.var(dim=(2, 3), keepdim=True, correction=0) + 1e-5).sqrt())
        for x in (image, reference)
    )
    return (image - mean) / std * wanted_std + wanted_mean


def _low_frequencies(image: Tensor, levels: int = 5) -> Tensor:
    """À-trous approximation: binomial 3×3 blurs with holes of 1, 2, 4 … pixels, together a Gaussian of σ ≈ 13."""
    row = image.new_tensor([[0.25, 0.5, 0.25]]).repeat(image.shape[1], 1, 1, 1)
    for radius in (2**level for level in range(levels)):
        image = F.pad(image, (radius,) * 4, mode="replicate")
        image = F.conv2d(image, row, dilation=radius, groups=image.shape[1])
        image = F.conv2d(image, row.mT, dilation=radius, groups=image.shape[1])
    return image


def wavelet_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """Replace the low frequencies of ``image`` by those of ``reference``, both ``[N, 3, H, W]`` (StableSR)."""
    return image + _low_frequencies(reference - image)


_COLOR_FIXES = {"wavelet": wavelet_color_fix, "adain": adain_color_fix, None: lambda image, reference: image}


def _pad(image: Tensor, height: int, width: int) -> Tensor:
    """Extend to the right and below by reflection, or by the last pixel where there is too little to reflect."""
    below, right = height - image.shape[-2], width - image.shape[-1]
    image = F.pad(image, (0, right, 0, 0), mode="reflect" if right < image.shape[-1] else "replicate")
    return F.pad(image, (0, 0, 0, below), mode="reflect" if below < image.shape[-2] else "replicate")


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Overlapping tiles over an image of ``height`` × ``width`` pixels; every number is a multiple of ``unit``."""

    height: int
    width: int
    tile: int
    overlap: int
    unit: int
    batch_size: int

    def _starts(self, length: int) -> list[int]:
        """First pixels of the fewest tiles that overlap enough, spread evenly."""
        if length <= self.tile:
            return [0]
        count = math.ceil((length - self.overlap) / (self.tile - self.overlap))
        return [round((length - self.tile) * i / (count - 1) / self.unit) * self.unit for i in range(count)]

    def corners(self) -> list[tuple[int, int]]:
        """Top and left of each tile, in pixels."""
        return list(itertools.product(self._starts(self.height), self._starts(self.width)))

    def blend(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function`` of the tiles of one image's ``inputs``, put together with Hann windows as weights.

        Inputs and output ``[1, C, h, w]`` may be pixels or latents: how much smaller one is than the image follows from
        its size.
        """
        tile_height, tile_width = min(self.tile, self.height), min(self.tile, self.width)

        def part(corner: tuple[int, int], factor: int) -> tuple:
            (top, left), h, w = (n // factor for n in corner), tile_height // factor, tile_width // factor
            return ..., slice(top, top + h), slice(left, left + w)

        result = weights = None
        corners = self.corners()
        for first in range(0, len(corners), self.batch_size):
            batch = corners[first : first + self.batch_size]
            tiles = [torch.cat([x[part(corner, self.height // x.shape[-2])] for corner in batch]) for x in inputs]
            outputs = function(*tiles)
            factor = tile_height // outputs.shape[-2]
            if result is None:
                # float32 also for half-precision models: windows multiply to 1e-7 in the corners
                size = self.height // factor, self.width // factor
                result = torch.zeros(1, outputs.shape[1], *size, device=outputs.device)
                weights = torch.zeros_like(result[:, :1])
                # without the zeros at its ends, so that the image's own border has a weight too
                rows, columns = (
                    torch.hann_window(n + 2, periodic=False, device=outputs.device)[1:-1] for n in outputs.shape[-2:]
                )
                window = rows[:, None] * columns
            for corner, output in zip(batch, outputs, strict=True):
                result[part(corner, factor)] += window * output
                weights[part(corner, factor)] += window
        return (result / weights).to(outputs.dtype)


def _tiled(model: ISRModel, tiles: _Tiles) -> ISRModel:
    """The same model, whose networks see one image through ``tiles``."""

    def predict_noise(latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        def predict(latents: Tensor, controlnet_cond: Tensor) -> Tensor:
            n, embeds = len(latents), condition.prompt_embeds
            part = dataclasses.replace(
                condition,
                controlnet_cond=controlnet_cond,
                prompt_embeds=None if embeds is None else embeds.expand(n, -1, -1),
                prompts=condition.prompts * n,
            )
            return model.predict_noise(latents, timestep, part)

        return tiles.blend(predict, latents, condition.controlnet_cond)

    view = copy.copy(model)  # initial_latents of the copy goes through its tiled encode
    view.predict_noise = predict_noise
    view.encode = lambda images: tiles.blend(model.encode, images)
    view.decode = lambda latents: tiles.blend(model.decode, latents)
    return view


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
        overlap: how far neighbouring tiles overlap at least, in the same pixels and rounded up in the same way.
        batch_size: tiles denoised at once.
        num_inference_steps: the model's own by default.
        color_fix: correct colour shifts against the bicubically upscaled image: ``"wavelet"`` takes its low frequencies
            (StableSR), ``"adain"`` its channels' mean and standard deviation (SeeSR), None leaves colours alone.
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
    if color_fix not in _COLOR_FIXES:
        raise ValueError(f"color_fix must be one of {list(_COLOR_FIXES)}, got {color_fix!r}")
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
        model = _tiled(model, _Tiles(height, width, tile, overlap, model.multiple, batch_size))
    condition = model.encode_condition(lr, [prompt])
    steps = num_inference_steps or model.num_inference_steps
    states = trajectory(model, condition, generators(seed, [0]), steps)
    for _ in tqdm(itertools.islice(states, steps), total=steps, desc="upscale", unit="step", disable=not progress):
        pass
    _, latents = next(states)
    crop = ..., slice(image.shape[-2] * model.scale), slice(image.shape[-1] * model.scale)
    sr, reference = (x[crop].float() for x in (model.decode(latents), condition.controlnet_cond))
    return _COLOR_FIXES[color_fix](sr, reference).clamp(0, 1)[0].to(image.device)
