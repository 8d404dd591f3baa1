"""What a method has to beat: every layer gives up the same share, by a simple score."""

from __future__ import annotations

from ..settings import with_defaults
from .adapt_pruner import CAN_CUT, PRESETS, AdaptPrunerSettings, adapt_pruner, in_phase, outline
from .base import Method

ALIKE = {"allocation": "adaptive", "amplitude": 0.0, "compensation": "none", "tuning_steps": 0}
"""Adapt-Pruner with every layer alike, and nothing to make up for what goes."""


def _baseline(method: str, summary: str, needs: str, **defaults) -> Method:
    return Method(
        run=adapt_pruner,
        settings=with_defaults(AdaptPrunerSettings, method, **ALIKE, **defaults),
        summary=summary,
        cuts=CAN_CUT,
        needs=needs,
        outline=outline,
        meets_several_targets=True,
        in_phase=in_phase,
    )


_PUBLISHED = {name: value for name, value in PRESETS["paper"].items() if name not in ALIKE}

UNIFORM = _baseline(
    "uniform",
    "Adapt-Pruner as published, but every layer gives up the same share.",
    needs="gradients",
    **_PUBLISHED,
)
MAGNITUDE = _baseline(
    "magnitude",
    "The units of the smallest weights, the same share of every layer.",
    needs="forward",
    importance="magnitude-l2",
)
RANDOM = _baseline(
    "random",
    "Units by lot, the same share of every layer.",
    needs="forward",
    importance="random",
)
