"""How figures are written, and smoothed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def short(count: float) -> str:
    """A count as people write it: 260K, 1.24B.

    >>> short(214528)
    '214.5K'
    """
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= factor:
            return f"{count / factor:.4g}{letter}"
    return f"{count:.4g}"


def figure(value: float) -> str:
    """A measured value: two decimals below a thousand, none above.

    >>> figure(26.216), figure(22860.4)
    ('26.22', '22,860')
    """
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def steps_of(count: int) -> str:
    """A number of steps.

    >>> steps_of(1), steps_of(5)
    ('1 step', '5 steps')
    """
    return f"{count} step{'s' * (count != 1)}"


def change(old: float, new: float) -> str:
    """The relative change with its sign.

    >>> change(200, 150)
    '−25.0%'
    """
    if old == new or not old:
        return "0%" if old == new else ""
    return f"{(new - old) / old:+.1%}".replace("-", "−")


def promise(timing: Mapping[str, Any]) -> str:
    """What a target in time promised, and what was measured: the fields of `latency.Measured`.

    >>> promise({"promised_speedup": 1.5, "speedup": 1.47, "dense_ms": 24, "ms": 16.33,
    ...          "circumstances": "torch"})
    '1.47 times as fast, measured (24 ms, now 16.3 ms; −2.0% against the promised 1.50; torch)'
    """
    promised, found = timing["promised_speedup"], timing["speedup"]
    return (
        f"{found:.2f} times as fast, measured ({timing['dense_ms']:.3g} ms, now "
        f"{timing['ms']:.3g} ms; {change(promised, found)} against the promised {promised:.2f}; "
        f"{timing['circumstances']})"
    )


def in_ms(milliseconds: float) -> str:
    """A time as recipes have it, to the nanosecond.

    >>> in_ms(12), in_ms(0.0050004)
    ('12ms', '0.005ms')
    """
    return f"{milliseconds:.6f}".rstrip("0").rstrip(".") + "ms"


def in_bytes(count: float) -> str:
    """Bytes as people write them: 1.82 GB.

    >>> in_bytes(3643776)
    '3.644 MB'
    """
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """A span of time.

    >>> duration(4.11), duration(754)
    ('4.1 s', '12 min 34 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


class RunningMean:
    """Mean of the last values: of all of them at first, then with a memory of about `memory`."""

    def __init__(self, memory: int):
        self.memory, self.value, self.seen = memory, 0.0, 0

    def add(self, value: float) -> float:
        """Take in a value. Returns the new mean."""
        self.seen += 1
        self.value += (value - self.value) / min(self.seen, self.memory)
        return self.value


def smoothed(values: Sequence[float], phases: Sequence[int]) -> list[float]:
    """Running mean over about a fiftieth of all values. It begins anew where the phase changes,
    because a cut is a jump of the loss."""
    means: list[float] = []
    memory = max(5, len(values) // 50)
    mean, phase = RunningMean(memory), None
    for value, current in zip(values, phases, strict=True):
        if current != phase:
            mean, phase = RunningMean(memory), current
        means.append(mean.add(value))
    return means
