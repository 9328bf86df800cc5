"""What went into the fixture, made anew on every machine: a picture, noise and token numbers."""

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor

from tests.tiny import tiny_tokenizer

STEPS = 50


@functools.cache
def tokenizer():
    return tiny_tokenizer()


def text_ids(texts: list[str]) -> Tensor:
    """Token numbers ``[N, L]`` of the small tokenizer, which stands for OpenCLIP's; filled up with zeros as by that."""
    found = tokenizer()
    rows = [found(text, max_length=found.model_max_length, truncation=True).input_ids for text in texts]
    return torch.tensor([row + [0] * (found.model_max_length - len(row)) for row in rows])


def lr_image() -> Tensor:
    """``[1, 3, 16, 16]`` in [0, 1], smooth enough to be a picture."""
    rows, columns = np.meshgrid(np.linspace(0, 3, 16), np.linspace(0, 2, 16), indexing="ij")
    planes = [0.5 + 0.4 * np.sin(rows + k) * np.cos(2 * columns - k) for k in range(3)]
    return torch.from_numpy(np.stack(planes))[None].float()


def noise(count: int) -> Tensor:
    """x_T and the noise of every step, ``[count, 1, 4, 8, 8]`` of unit variance, the same on every machine."""
    uniform = np.random.default_rng(7).random((count, 1, 4, 8, 8))
    return torch.from_numpy((uniform - 0.5) * np.sqrt(12)).float()


def tell(shapes: dict[str, list[int]], parameters: int) -> dict:
    """A full-size network in three numbers."""
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    return {"tensors": len(shapes), "parameters": parameters, "sha256": hashlib.sha256(lines.encode()).hexdigest()}
