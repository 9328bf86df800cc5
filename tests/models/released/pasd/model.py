"""The reduced models, opened from the authors' layout."""

import tempfile
from pathlib import Path

from rfsr_ext.models.pasd import PASDModel
from tests.models.released.pasd import layout
from tests.once import built_once


@built_once
def pasd(variant: str = "pasd", seed: int = 0, **options) -> PASDModel:
    """One of ``layout.VARIANTS``; results may be smaller than the authors' 768 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        layout.write(Path(folder), variant, seed)
        return PASDModel.from_released(folder, **{"min_side": 0} | options)
