"""How a low-resolution image is made from a sharp one.

`settings` holds the parameters of a degradation and its presets, `choices` what is drawn from them for one image,
`pipeline` the order of the stages, and `stages_cpu` and `stages_gpu` the stages themselves.
"""

from rfsr_ext.data.degradation.settings import DEGRADATIONS, Degradation, Round

__all__ = ["DEGRADATIONS", "Degradation", "Round"]
