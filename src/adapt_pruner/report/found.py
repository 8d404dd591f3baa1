"""What a search left about itself in study.json, for the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MaxLen
from markupsafe import Markup
from pydantic import BaseModel

from ..figures import figure
from . import charts
from .record import FiniteNumber, WholeNumber, parse

STUDY_FILE = "study.json"
MOST = 20
"""Rows of a table, and points with a label."""


class ChosenSample(BaseModel):
    """A text that the model was calibrated on."""

    sample: WholeNumber
    group: WholeNumber | None
    source: str
    loss: FiniteNumber
    text: str


class Trial(BaseModel):
    number: WholeNumber
    state: str
    value: FiniteNumber | None


class Study(BaseModel):
    """Of a study.json, what is read of it."""

    format: Literal[1]
    dense: FiniteNumber
    value: FiniteNumber
    heldout: dict[str, Any] | None = None
    objectives: dict[str, FiniteNumber]
    best_trial: WholeNumber
    rule: str
    front: Annotated[list[dict[str, FiniteNumber]], MaxLen(100_000)]
    importances: dict[str, FiniteNumber]
    samples: Annotated[list[ChosenSample], MaxLen(1_000_000)]
    trials: Annotated[list[Trial], MaxLen(100_000)]


@dataclass
class FoundSettings:
    """What the template shows of a search."""

    study: Study
    quality: str
    states: str
    rows: list[tuple[str, str, str]]
    """Text, quality of the dense model and of this one."""
    course: Markup | None
    """Best quality so far over trials."""
    fronts: list[tuple[str, Markup]]
    """Name of each cost -> quality over it."""


def read_found(directory: Path, id: str) -> FoundSettings | None:
    """What the search in a directory found; None if there was none. Raises LoadingError."""
    file = directory / STUDY_FILE
    if not file.is_file():
        return None
    study = parse(Study, file)
    quality, *costs = study.objectives
    stopped = sum(trial.state == "pruned" for trial in study.trials)
    failed = sum(trial.state == "fail" for trial in study.trials)
    rows = [("validation", figure(study.dense), figure(study.value))]
    if study.heldout:
        dense, value = figure(study.heldout["dense"]), figure(study.heldout["value"])
        rows.append(("held out", dense, value))
    return FoundSettings(
        study=study,
        quality=quality,
        states=f"{len(study.trials)} trials, {stopped} stopped early, {failed} failed",
        rows=rows,
        course=_course(study, quality, id),
        fronts=[(cost, _front(study, quality, cost, id)) for cost in costs],
    )


def _course(study: Study, quality: str, id: str) -> Markup | None:
    best, points = None, []
    for trial in study.trials:
        if trial.value is not None:
            best = trial.value if best is None else min(best, trial.value)
            points.append((float(trial.number), best))
    if len(points) < 2:
        return None
    return charts.line(f"{id}-search", f"Best {quality} so far over trials", "trial", points)


def _front(study: Study, quality: str, cost: str, id: str) -> Markup:
    points = [
        charts.Point(
            one[cost], one[quality], f"{one['number']:.0f}", one["number"] == study.best_trial
        )
        for one in study.front[:MOST]
    ]
    said = "; ".join(f"trial {p.label}: {p.x:,.4g}, {figure(p.y)}" for p in points)
    return charts.scatter(
        f"{id}-front-{cost}", f"{quality} over {cost}", cost, points, said,
        is_log=quality == "perplexity",
    )  # fmt: skip
