"""Every published model at reduced width with random weights: its architecture, and nothing of what it has learned."""

from collections.abc import Callable

from rfsr_ext.models import ISRModel
from tests.models.released.ccsr.tiny import tiny_ccsr_v1, tiny_ccsr_v2
from tests.models.released.diffbir.fixture import diffbir
from tests.models.released.dp2o import tiny_csd2, tiny_flux
from tests.models.released.pasd.model import pasd
from tests.models.released.seesr.model import seesr_model

REDUCED: dict[str, Callable[[], ISRModel]] = {
    "SeeSR": seesr_model,
    "PASD": pasd,
    "PASD-light": lambda: pasd("pasd_light_rrdb"),
    "DiffBIR v1": lambda: diffbir("v1", min_side=0, num_inference_steps=10),
    "DiffBIR v2": lambda: diffbir("v2", min_side=0, num_inference_steps=10),
    "DiffBIR v2.1": lambda: diffbir("v2.1", min_side=0),
    "CCSR v1": tiny_ccsr_v1,
    "CCSR v2": tiny_ccsr_v2,
    "C-SD2": tiny_csd2,
    "C-FLUX": tiny_flux,
}
