"""What the charts of a run show: one declaration, drawn twice.

The page draws it as text of its own, which follows the width of the screen, the reader's dark mode
and a pointer (`charts`); the files in `pictures/`, which cards and slides take, are drawn by
matplotlib (`pictures`, `training_pictures`). Figures, titles, names and colours stand here alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..figures import short, smoothed

LIGHT = {
    "before": "#ced4dc", "after": "#2b5f9e", "warm": "#b4532f", "cool": "#2b5f9e",
    "third": "#d9d4c7", "soft": "#5d636b", "rule": "#e0e0da", "ink": "#191b1f",
}  # fmt: skip
DARK = {
    "before": "#434a53", "after": "#7db0ee", "warm": "#e58a63", "cool": "#7db0ee",
    "third": "#575247", "soft": "#a0a6ae", "rule": "#303438", "ink": "#e6e6e2",
}  # fmt: skip
"""Colours by their role, on light screens and paper, and on dark screens."""

LAYER, STEP, TOKENS_TITLE = "decoder layer", "pruning step", "tokens trained on"
IMPORTANCE_TITLE = "Layer importance before each step"
TRAINING_TITLE = "Training loss over tokens, with the cuts"
LESS, MORE = "changes its input less", "more"
"""Ends of the scale of importance, which runs from -1 to 1."""
NUMBERED = 24
"""Layers, at most, of which the columns have their values written on them."""

UNITS = {"intermediate_size": "MLP neurons", "num_key_value_heads": "KV groups"}


@dataclass(frozen=True)
class Columns:
    """What each layer had of a unit, and has left."""

    key: str
    """The configuration's name of the width."""
    label: str
    before: list[int | None]
    """None: a layer without it."""
    after: list[int]

    @property
    def title(self) -> str:
        return f"{self.label} of each layer, before and after"

    @property
    def layers(self) -> list[tuple[int, int, int]]:
        """Number, before, after of the layers that have it."""
        pairs = enumerate(zip(self.before, self.after, strict=True))
        return [(i, before, after) for i, (before, after) in pairs if before is not None]


def columns_of(
    before: Sequence[Mapping[str, int]], after: Sequence[Mapping[str, int]]
) -> dict[str, Columns]:
    """For every kind of unit that some layer has, by the configuration's name of it."""
    return {
        key: Columns(
            key,
            label,
            [widths.get(key) for widths in before],
            [widths.get(key, 0) for widths in after],
        )
        for key, label in UNITS.items()
        if any(key in widths for widths in before)
    }


class _Scored(Protocol):
    layer_importance: list[float]


def importance_of(steps: Iterable[_Scored]) -> list[list[float]]:
    """A row for each step, a column for each layer (figure 1); empty where it was not measured."""
    rows = [list(step.layer_importance) for step in steps]
    return rows if rows and rows[0] else []


class _Trained(Protocol):
    tokens: int
    loss: float
    phase: int


class _Phase(Protocol):
    tokens_before: int
    parameters: int


@dataclass(frozen=True)
class Training:
    """Loss over tokens."""

    points: list[tuple[float, float]]
    """Tokens and loss of each step, nats per token."""
    means: list[tuple[float, float]]
    """The same of the running mean, which begins anew after a cut."""
    cuts: list[tuple[float, str]]
    """Tokens before a cut, and the parameters that it left, as people write them."""


def training_of(steps: Sequence[_Trained], phases: Sequence[_Phase]) -> Training:
    means = smoothed([step.loss for step in steps], [step.phase for step in steps])
    tokens = [float(step.tokens) for step in steps]
    return Training(
        list(zip(tokens, [step.loss for step in steps], strict=True)),
        list(zip(tokens, means, strict=True)),
        [(phase.tokens_before, short(phase.parameters)) for phase in phases],
    )
