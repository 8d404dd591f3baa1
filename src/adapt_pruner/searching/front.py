"""Which trials of a study no other one beats, and which of them is taken."""

from __future__ import annotations

import math
from typing import Any

from .request import SearchSettings

RULES = {
    "nearest": "nearest to the best of all objectives, each scaled from 0 to 1 over the front "
    "(perplexity by its logarithm)",
    "quality": "the best in {}",
}


def front_of(study: Any) -> list[Any]:
    """The trials that are not worse than another one in everything, the best in quality first. With
    one objective, the best trial alone."""
    return sorted(study.best_trials, key=lambda trial: (trial.values[0], trial.number))


def chosen_from(front: list[Any], how: SearchSettings) -> Any:
    """The trial whose model is written."""
    if how.choose == "quality":
        return front[0]
    scaled = list(zip(*(_scaled(column) for column in _columns(front, how)), strict=True))
    return front[min(range(len(front)), key=lambda i: (math.hypot(*scaled[i]), front[i].number))]


def rule(how: SearchSettings) -> str:
    """How the model was chosen, in words."""
    name = how.choose if how.costs else "quality"
    return RULES[name].format(how.quality)


def _columns(front: list[Any], how: SearchSettings) -> list[list[float]]:
    """The values of each objective over the front."""
    columns = [list(column) for column in zip(*(trial.values for trial in front), strict=True)]
    if how.quality == "perplexity":
        columns[0] = [math.log(value) for value in columns[0]]
    return columns


def _scaled(values: list[float]) -> list[float]:
    low, span = min(values), max(values) - min(values)
    return [(value - low) / span if span else 0.0 for value in values]
