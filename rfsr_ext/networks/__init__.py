"""Networks of other people's systems that diffusers and transformers do not have, under their authors' key names."""

from rfsr_ext.networks.ram import RAM
from rfsr_ext.networks.swin import Swin

__all__ = ["RAM", "Swin"]
