"""Widths that a machine likes: which multiple `--multiple auto` stands for."""

from __future__ import annotations

import numpy as np

from ..errors import InvalidSettings
from .cost import monotone
from .table import LatencyTable

TOLERANCE = 0.05
"""Share of its time that an MLP may take more than it must."""
LARGEST = 128


def divisor(width: int) -> int:
    """The largest power of two that divides a width.

    >>> divisor(1472), divisor(1535)
    (64, 1)
    """
    return width & -width


def odd_widths(width: int) -> list[int]:
    """Widths below a round one, of which each is a multiple of one more power of two.

    >>> odd_widths(1536)  # from 1280 down: 1280 - 1, - 2, - 4, ...
    [1279, 1278, 1276, 1272, 1264, 1248, 1216, 1152]
    """
    step = 2 * LARGEST
    while step > 2 and step > width // 4:
        step //= 2
    base = width * 7 // 8 // step * step
    found, power = [], 1
    while power < step and base > power:
        found.append(base - power)
        power *= 2
    return found


def choose_multiple(table: LatencyTable) -> int:
    """The smallest power of two of which every multiple that was measured takes at most 5 % more
    time than a line through round widths says; at least what the engine fills widths up to.

    Raises:
        InvalidSettings: if the table says nothing of odd widths.
    """
    if not table.odd_widths_ns:
        raise InvalidSettings(
            "multiple: auto needs the odd_widths_ns of a table, and this one has none. Name a "
            "number, or measure: adapt-pruner bench MODEL --latency-table FILE."
        )
    widths, times = zip(*((w, ns) for w, ns in table.mlp_ns if w), strict=True)
    line = monotone(times)
    slow = [
        divisor(width)
        for width, ns in table.odd_widths_ns
        if ns > (1 + TOLERANCE) * float(np.interp(width, widths, line))
    ]
    largest = max(divisor(width) for width, _ in table.odd_widths_ns)
    return max(table.width_block, min(2 * max(slow, default=0) or 1, 2 * largest))
