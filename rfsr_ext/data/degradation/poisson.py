"""Poisson numbers for images: 256 levels have 256 distributions, so that one look into a table makes a number.

Walker's alias method.  A row of the table belongs to a level; each of its columns holds two counts, its own and an
alias, and how often it is its own.  The lowest bits of a random 32-bit number choose the column, the others one of the
two.  Probabilities are right to 2⁻³².
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

__all__ = ["alias_table", "column_bits", "levels_power", "offsets"]


def levels_power(levels: int) -> int:
    """The power of two not below a number of distinct levels."""
    return 1 << (levels - 1).bit_length()


def _span(mean: float) -> tuple[int, int]:
    """Counts of which no other has a probability that 32 bits can tell from 0."""
    return max(0, math.floor(mean - 7 * math.sqrt(mean))), math.ceil(mean + 7 * math.sqrt(mean)) + 14


def column_bits(power: int) -> int:
    """log₂ of the columns of `alias_table`."""
    low, high = _span(power)
    return (high - low).bit_length()


@lru_cache
def offsets(power: int) -> np.ndarray:
    """``[256]`` float32: what to add to a table's number over ``power`` for the noise of each level."""
    return np.array([_span(level / 255 * power)[0] / power - level / 255 for level in range(256)], np.float32)


@lru_cache
def alias_table(power: int) -> np.ndarray:
    """``[256 * columns]`` uint32 for means ``level / 255 * power``: high bits the threshold, low bits the alias.

    Numbers start at the lowest count of the row's span, see `offsets`.
    """
    bits = column_bits(power)
    rows = [_alias_row(level / 255 * power, 1 << bits) for level in range(256)]
    full = (1 << (32 - bits)) - 1
    table = np.empty((256, 1 << bits), np.uint32)
    for row, (thresholds, aliases) in zip(table, rows, strict=True):
        scaled = np.minimum(np.rint(np.array(thresholds) * (full + 1)), full).astype(np.uint32)
        row[:] = (scaled << np.uint32(bits)) | np.array(aliases, np.uint32)
    return table.ravel()


def _alias_row(mean: float, columns: int) -> tuple[list[float], list[int]]:
    """Share of each column that is its own, and its alias."""
    low, high = _span(mean)
    shares = [0.0] * columns
    for column in range(min(columns, high - low + 1)):
        count = low + column
        log = (count * math.log(mean) if count else 0.0) - mean - math.lgamma(count + 1) if mean else -math.inf * count
        shares[column] = columns * math.exp(log if mean or count else 0.0)
    aliases = list(range(columns))
    small = [c for c, share in enumerate(shares) if share < 1]
    large = [c for c, share in enumerate(shares) if share >= 1]
    while small and large:
        column, donor = small.pop(), large[-1]
        aliases[column] = donor
        shares[donor] -= 1 - shares[column]
        if shares[donor] < 1:
            small.append(large.pop())
    for column in small + large:  # 1 but for rounding: their own alias, whatever the threshold
        shares[column], aliases[column] = 1.0, column
    return shares, aliases
