"""Random weights that are the same on every machine."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor


def seeded(shapes: dict[str, list[int]], seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """Random weights of a state dict, a function of name, shape and seed alone.

    NumPy's bit stream and no normal_, which differs between processors.
    """
    tensors = {}
    for name, shape in shapes.items():
        u = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(shape) * 2 - 1
        if len(shape) >= 2:
            u = u * scale * math.sqrt(3 / math.prod(shape[1:]))
        elif name.endswith("weight"):  # of norms
            u = 1 + 0.1 * u
        else:
            u = 0.1 * u
        tensors[name] = torch.from_numpy(np.asarray(u, np.float32))
    return tensors
