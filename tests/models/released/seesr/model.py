"""SeeSR at the width of layout.py, opened from its authors' layout."""

import tempfile
from pathlib import Path

from rfsr_ext.models.seesr import SeeSRModel
from tests.models.released.seesr import layout
from tests.once import built_once


@built_once
def seesr_model() -> SeeSRModel:
    with tempfile.TemporaryDirectory() as folder:
        # 512 pixels, to which smaller results are enlarged, are too many for a test
        return SeeSRModel.from_released(layout.write_layout(Path(folder)), min_side=0, num_inference_steps=10)
