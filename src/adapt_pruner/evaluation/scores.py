"""Figures of an evaluation, and how they are made of what lm-eval reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import EvaluationError
from ..settings import EvaluationSettings
from .store import Record

if TYPE_CHECKING:
    from .harness import Loaded, WantedRow


@dataclass(frozen=True)
class Score:
    """One figure."""

    name: str
    """The benchmark as the papers call it, the task, or the text's file."""
    metric: str
    value: float
    """As lm-eval reports it: accuracies in [0, 1]."""
    stderr: float | None
    """Standard error of the value; None where lm-eval has none."""
    num_fewshot: int | None
    num_samples: int
    higher_is_better: bool

    @classmethod
    def of_text(
        cls, name: str, metric: str, value: float, stderr: float | None, num_tokens: int
    ) -> Score:
        """A figure of a text, of which less is better."""
        return cls(name, metric, value, stderr, num_fewshot=None, num_samples=num_tokens,
                   higher_is_better=False)  # fmt: skip


@dataclass
class Evaluation:
    """What a model scored, and everything needed to score it again."""

    model: str
    parameters: int
    scores: list[Score]
    settings: EvaluationSettings
    records: list[Record] = field(default_factory=list)
    """Per task or text: the key that determines the result, the result, date and git hash."""
    num_cached: int = 0
    """How many of the records were there already."""

    def score(self, name: str, metric: str | None = None) -> Score:
        """Find a figure by the name of its benchmark, task, text or average."""
        return next(s for s in self.scores if s.name == name and metric in (None, s.metric))

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.parameters,
            "scores": [asdict(score) for score in self.scores],
            "settings": self.settings.model_dump(mode="json"),
            "records": [asdict(record) for record in self.records],
        }


def scores_of(
    row: Loaded, metrics: dict[str, dict[str, Any]], records: Sequence[Record]
) -> Iterator[Score]:
    wanted: WantedRow = row.wanted
    parts = row.values_of(metrics)
    names = [wanted.metric] if wanted.metric else _metrics_of(parts[0])
    for metric in names:
        values = [part[metric] for part in parts if metric in part]
        if len(values) < len(parts):
            raise EvaluationError(
                f"lm-eval reports no '{metric}' for '{wanted.name}'; it has "
                f"{', '.join(_metrics_of(parts[0]))}."
            )
        errors = [part.get(_stderr(metric)) for part in parts]
        plain = metric.split(",")[0]
        better = [record.result["higher_is_better"].get(plain) for record in records]
        yield Score(
            name=wanted.name,
            metric=metric.removesuffix(",none"),
            value=sum(values) / len(values),
            stderr=_mean_error(errors),
            num_fewshot=records[0].key["num_fewshot"],
            num_samples=sum(record.result["num_samples"] for record in records),
            higher_is_better=better[0] is not False and "perplexity" not in plain,
        )


def _metrics_of(values: dict[str, Any]) -> list[str]:
    return [name for name in values if "," in name and "_stderr," not in name]


def _stderr(metric: str) -> str:
    name, _, filtered = metric.partition(",")
    return f"{name}_stderr,{filtered}"


def _mean_error(errors: Sequence[Any]) -> float | None:
    """Standard error of a mean of independent figures."""
    if not errors or not all(isinstance(error, (int, float)) for error in errors):
        return None
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)


def average(label: str, scores: Sequence[Score]) -> Score:
    value = sum(score.value for score in scores) / len(scores)
    error = _mean_error([score.stderr for score in scores])
    samples = sum(score.num_samples for score in scores)
    return Score(
        name=label,
        metric="mean",
        value=value,
        stderr=error,
        num_fewshot=None,
        num_samples=samples,
        higher_is_better=True,
    )
