"""SeeSR at the width of layout.py, opened from its authors' layout."""

import copy
import functools
import tempfile
from pathlib import Path

from rfsr_ext.models.seesr import SeeSRModel
from tests.models.released.seesr import layout


@functools.cache
def _opened() -> SeeSRModel:
    with tempfile.TemporaryDirectory() as folder:
        # 512 pixels, to which smaller results are enlarged, are too many for a test
        return SeeSRModel.from_released(layout.write_layout(Path(folder)), min_side=0, num_inference_steps=10)


def seesr_model() -> SeeSRModel:
    """A model of its own for each test."""
    return copy.deepcopy(_opened())
