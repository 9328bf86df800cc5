"""Overlapping tiles: one image through networks that only ever see a part of it.

The tiles share one noise and are blended at every sampling step, as in MultiDiffusion (Bar-Tal et al., 2023) and SeeSR,
so that neighbors agree on what they draw and no seam appears.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfsr_ext.models import Condition, ISRModel, Process

__all__ = ["Enlarged", "Tiled", "Tiles"]


@dataclass(frozen=True)
class Tiles:
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

    def part(self, corner: tuple[int, int], factor: int = 1) -> tuple:
        """The index of a tile in something ``factor`` times smaller than the image."""
        top, left = (n // factor for n in corner)
        height, width = (min(self.tile, n) // factor for n in (self.height, self.width))
        return ..., slice(top, top + height), slice(left, left + width)

    def blend(self, function: Callable[[Callable[[Tensor], Tensor], int], Tensor]) -> Tensor:
        """Outputs of the tiles of one image, put together with Hann windows as weights.

        Args:
            function: gets ``cut``, which takes a tensor ``[1, C, h, w]`` to a batch of its tiles, and their number;
                gives their outputs.  Tensors may be pixels or latents: how much smaller one is than the image follows
                from its size.

        Returns:
            ``[1, C, h, w]``.
        """
        result = None
        corners = self.corners()
        for first in range(0, len(corners), self.batch_size):
            batch = corners[first : first + self.batch_size]

            def cut(x: Tensor, batch=batch) -> Tensor:
                return torch.cat([x[self.part(corner, self.height // x.shape[-2])] for corner in batch])

            outputs = function(cut, len(batch))
            factor = min(self.tile, self.height) // outputs.shape[-2]
            if result is None:
                # float32 also for half-precision models, whose sums would lose digits
                size = self.height // factor, self.width // factor
                result = torch.zeros(1, outputs.shape[1], *size, device=outputs.device)
                # without the zeros at its ends, so that the image's own border has a weight too
                rows, columns = (
                    torch.hann_window(n + 2, periodic=False, device=outputs.device)[1:-1] for n in outputs.shape[-2:]
                )
                down, across = self._weights(rows, self.height, factor), self._weights(columns, self.width, factor)
            for (top, left), output in zip(batch, outputs, strict=True):
                result[self.part((top, left), factor)] += down[top][:, None] * across[left] * output
        return result.to(outputs.dtype)

    def _weights(self, window: Tensor, length: int, factor: int) -> dict[int, Tensor]:
        """Along one side, by a tile's first pixel: its window as a share of all tiles' there.

        Tiles stand in rows and columns, so that the shares in an image are the products of those along its sides.
        """
        places = {start: slice(start // factor, start // factor + len(window)) for start in self._starts(length)}
        total = window.new_zeros(length // factor)
        for place in places.values():
            total[place] += window
        return {start: window / total[place] for start, place in places.items()}


class Enlarged:
    """An LR image enlarged, as far as it is asked for: ``[..., rows, columns]`` gives a part, and no more is ever made.

    Args:
        model: whose enlargement it is, one of bicubic interpolation.
        lr: ``[N, 3, h, w]``.
    """

    _REACH = 3  # pixels of the LR image beyond a part that bicubic interpolation looks at, and one more

    def __init__(self, model: ISRModel, lr: Tensor):
        self.model, self.lr = model, lr
        self.shape = torch.Size((*lr.shape[:2], *(n * model.scale for n in lr.shape[2:])))

    def __getitem__(self, index: tuple) -> Tensor:
        scale, seen, kept = self.model.scale, [], []
        for part, length in zip(index[1:], self.shape[2:], strict=True):
            start, stop, _ = part.indices(length)
            first = max(start // scale - self._REACH, 0)
            seen.append(slice(first, -(-stop // scale) + self._REACH))
            kept.append(slice(start - first * scale, stop - first * scale))
        return self.model.first_stage(self.lr[..., *seen])[..., *kept]


class Tiled(ISRModel):
    """A model whose networks see one image through tiles; the model itself is untouched.

    The enlarged image is made tile by tile, whenever one is asked for.

    Args:
        model: any base model.
        tiles: of the image's size; the batch must hold one image.
    """

    def __init__(self, model: ISRModel, tiles: Tiles):
        # no super().__init__(): networks and scheduler are the model's, which has checked them
        self.model, self.tiles = model, tiles
        self.networks, self.trained, self.recipe = model.networks, model.trained, model.recipe
        self.scheduler, self.scale, self.multiple = model.scheduler, model.scale, model.multiple
        self.latent_channels, self.vae_scale_factor = model.latent_channels, model.vae_scale_factor

    def first_stage(self, lr: Tensor) -> Any:  # a tensor, or `Enlarged` in its place
        if type(self.model).first_stage is ISRModel.first_stage:
            return Enlarged(self.model, lr)
        return self.tiles.blend(lambda cut, count: self.model.first_stage(cut(lr)))

    def control(self, image: Any) -> dict[str, Any]:
        tile = image[self.tiles.part(self.tiles.corners()[0])]
        return {
            name: image  # what networks see is the image itself
            if seen is tile
            else self.tiles.blend(lambda cut, count, name=name: self.model.control(cut(image))[name])
            for name, seen in self.model.control(tile).items()
        }

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        return self.model.embed(prompts)

    def embed_image(self, lr: Tensor) -> dict[str, Tensor]:
        return self.model.embed_image(lr)

    def describe(self, lr: Tensor) -> list[str]:
        return self.model.describe(lr)

    def initial_latents(self, condition: Condition, process: Process, generator=None) -> Tensor:
        twin = copy.copy(self.model)
        twin.encode = self.encode  # the model's own rule for the start, but encoded in tiles
        return twin.initial_latents(condition, process, generator)

    def process(self, num_inference_steps: int | None = None, size: tuple[int, int] | None = None) -> Process:
        seen = tuple(min(self.tiles.tile, n) for n in (self.tiles.height, self.tiles.width))
        return self.model.process(num_inference_steps, seen)

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        def part(cut: Callable[[Tensor], Tensor], count: int) -> Tensor:
            return self.model.predict(cut(latents), timestep, condition.tiles(cut, count))

        return self.tiles.blend(part)

    def encode(self, images: Tensor) -> Tensor:
        return self.tiles.blend(lambda cut, count: self.model.encode(cut(images)))

    def decode(self, latents: Tensor) -> Tensor:
        return self.tiles.blend(lambda cut, count: self.model.decode(cut(latents)))
