"""Results of `adapt-pruner evaluate --json FILE`, as rows of the report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from ..errors import LoadingError
from ..figures import change, figure
from .facts import FactRow, dense_model
from .record import StoredRun, parse


class _Score(BaseModel):
    name: str
    metric: str
    value: float
    stderr: float | None = None

    @property
    def is_share(self) -> bool:
        return "perplexity" not in self.metric and "bits_per" not in self.metric

    def written(self) -> str:
        factor = 100 if self.is_share else 1
        error = "" if self.stderr is None else f" ± {factor * self.stderr:.2f}"
        return figure(factor * self.value) + error


class _Evaluated(BaseModel):
    model: str
    parameters: int
    scores: list[_Score]
    settings: dict[str, Any] = {}


class _File(BaseModel):
    format: Literal[1]
    models: list[_Evaluated]


def score_rows(run: StoredRun, file: Path) -> list[FactRow]:
    """What the file says of the run, beside the dense model where that is in it, too.

    Raises:
        LoadingError: if the file is none of `evaluate`, or does not hold this run.
    """
    models = parse(_File, file).models
    mine = _find(models, [str(run.directory)], run.record.after.total)
    if mine is None:
        models = [dense_model(run) or "DENSE", str(run.directory), "--json", str(file)]
        raise LoadingError(
            f"'{file}' has no results of '{run.directory}'; make them by "
            f"`{shlex.join(['adapt-pruner', 'evaluate', *models])}`."
        )
    names = [name for name in (dense_model(run), run.record.source_model) if name]
    dense = _find(models, names, run.record.before.total)
    before = {(score.name, score.metric): score for score in dense.scores} if dense else {}
    limit = mine.settings.get("limit")
    part = f"limit {limit:g}" if limit else ""
    return [_row(score, before.get((score.name, score.metric)), part) for score in mine.scores]


def _find(models: Sequence[_Evaluated], names: list[str], parameters: int) -> _Evaluated | None:
    places = {Path(name).resolve() for name in names}
    for one in models:
        if Path(one.model).resolve() in places and one.parameters == parameters:
            return one
    return None


def _row(after: _Score, before: _Score | None, part: str) -> FactRow:
    if before is None:
        moved = ""
    elif after.is_share:
        moved = f"{100 * (after.value - before.value):+.2f}".replace("-", "−")
    else:
        moved = change(before.value, after.value)
    name = (
        after.name if after.metric == "mean" else f"{after.name} {after.metric.replace('_', ' ')}"
    )
    note = ", ".join(["%"] * after.is_share + [part] * bool(part))
    return FactRow(name, before.written() if before else "–", after.written(), moved, note)
