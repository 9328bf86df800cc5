"""What is run: operator, shapes, dtype, pass, and the least work that can do it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMAGES = ((8, 3, 512, 512), (1, 3, 64, 64), (1, 3, 511, 509))
# Channels and downscaling of the VGG19 layers the Gram loss reads.
VGG19 = {"conv1_2": (64, 1), "conv2_2": (128, 2), "conv3_4": (256, 4), "conv4_4": (512, 8), "conv5_4": (512, 16)}


@dataclass(frozen=True)
class Case:
    operator: str  # "haar" or "gram"
    label: str  # of the shapes
    shapes: tuple[tuple[int, int, int, int], ...]
    dtype: torch.dtype
    backward: bool

    @property
    def title(self) -> str:
        loss = {"haar": "Haar-LL L1", "gram": "Gram loss"}[self.operator]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{loss}, {'fwd+bwd' if self.backward else 'fwd'}, {self.label}, {dtype}"

    @property
    def entry_bytes(self) -> int:
        return 2 * self._elements * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        return self.backward * self.entry_bytes // 2

    @property
    def _elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def floor(self, bandwidth: float, flops: float) -> float:
        """Seconds that reading, writing and multiplying take at least.

        Forward reads both inputs. Backward writes the gradient of one, and for Gram reads that one again. A Gram is
        symmetric and needs half a matrix product, C*C*HW FLOP; its backward is a whole one.
        """
        touched = 2 + self.backward * (2 if self.operator == "gram" else 1)
        moved = touched * self._elements * self.dtype.itemsize
        products = sum(n * c * c * h * w for n, c, h, w in self.shapes) if self.operator == "gram" else 0
        return max(moved / bandwidth, (2 + 2 * self.backward) * products / flops)

    def inputs(self, generator: torch.Generator, device: str) -> tuple:
        """(prediction, target): tensors for Haar, lists of layers for Gram; only the prediction wants a gradient."""
        pairs = [_PAIRS[self.operator](shape, generator, device) for shape in self.shapes]
        predictions = [p.to(self.dtype).requires_grad_() for p, _ in pairs]
        targets = [t.to(self.dtype) for _, t in pairs]
        return (predictions, targets) if self.operator == "gram" else (predictions[0], targets[0])


def _images(shape: tuple, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """Differences stay clear of zero and keep their sign within a 2x2 block, so that rounding flips no gradient."""
    n, c, h, w = shape
    signs = 2 * torch.randint(0, 2, (n, c, (h + 1) // 2, (w + 1) // 2), generator=generator, device=device) - 1
    signs = signs.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :h, :w]
    target = torch.rand(shape, generator=generator, device=device)
    return target + signs * (0.5 + torch.rand(shape, generator=generator, device=device)), target


def _features(shape: tuple, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """Channels differ in strength between the two, so that half-precision Grams do not cancel to noise."""
    strengths = (0.5 + torch.rand((2, *shape[:2], 1, 1), generator=generator, device=device)).unbind()
    return tuple(s * torch.randn(shape, generator=generator, device=device) for s in strengths)


_PAIRS = {"haar": _images, "gram": _features}


def vgg_shapes(side: int) -> dict[str, tuple[int, int, int, int]]:
    return {name: (1, c, side // down, side // down) for name, (c, down) in VGG19.items()}


def cases() -> Iterator[Case]:
    """Haar in every shape, dtype and pass; Gram over all layers in every dtype, and layer by layer in fp32."""
    for dtype in DTYPES:
        for shape in IMAGES:
            for backward in (False, True):
                yield Case("haar", "x".join(map(str, shape)), (shape,), dtype, backward)
    for side in (256, 512):
        for dtype in DTYPES:
            yield Case("gram", f"VGG19 of {side}², 5 layers", tuple(vgg_shapes(side).values()), dtype, True)
        for name, shape in vgg_shapes(side).items():
            yield Case("gram", f"VGG19 of {side}², {name}", (shape,), torch.float32, True)
