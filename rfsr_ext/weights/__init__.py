"""The mini ISR model, the two small rewards and the judge that ship with the package, made by ``rfsr mini build``.

``README.md`` beside this file is their model card: data, command, time and measured quality.
"""

from pathlib import Path

__all__ = ["WEIGHTS"]

WEIGHTS = Path(__file__).parent
