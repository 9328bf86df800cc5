"""DiffBIR at a reduced width: what `make` stored, and weights for it."""

import functools
import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rfsr_ext.networks.swinir import SwinIR
from tests.models.released.seeded import seeded

HERE = Path(__file__).parent
KEYS = json.loads((HERE / "keys.json").read_text())
EXPECTED = load_file(HERE / "expected.safetensors")


@functools.cache
def _weights(part: str, width: str, scale: float) -> dict[str, Tensor]:
    shapes = KEYS[width][part] if width else KEYS[part]
    tensors = seeded(shapes, scale=scale)
    if part == "swinir":  # buffers are what the class computes
        tensors |= dict(SwinIR(**SwinIR.config_of(tensors)).named_buffers())
    return tensors


def weights(part: str, width: str = "", scale: float = 1.0) -> dict[str, Tensor]:
    """The tensors of a network under its authors' names; not to be written to."""
    return dict(_weights(part, width, scale))
