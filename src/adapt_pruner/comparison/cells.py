"""What is compared, and what came of it, model for model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluation import Evaluation, Score
from ..settings import EvaluationSettings
from .variants import Variant


@dataclass(frozen=True)
class ComparisonRequest:
    """What is compared, and how it is measured."""

    model: str
    variants: Sequence[Variant]
    sparsities: Sequence[float]
    seeds: Sequence[int]
    text: Sequence[str] = ()
    suite: Sequence[str] = ()
    tasks: Sequence[str] = ()
    task_data: Sequence[Path] = ()
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    save_to: Path | None = None
    """Keep every model below this directory; default: none is kept."""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Cell:
    """One model that is made and measured."""

    variant: Variant
    sparsity: float
    seed: int

    def __str__(self) -> str:
        return f"{self.variant.name}, {self.sparsity:.3g}, seed {self.seed}"


@dataclass
class CellResult:
    """What came of it."""

    cell: Cell
    parameters: int
    seconds: float
    """Of pruning."""
    scores: list[Score]
    was_cached: bool = False
    error: str = ""
    """Why there are no scores, if there are none."""
    commits: frozenset[str] = frozenset()
    """States of the code, as git tells them, at which the figures were computed."""


@dataclass
class Comparison:
    """All results so far."""

    request: ComparisonRequest
    dense: Evaluation
    results: list[CellResult] = field(default_factory=list)

    def of(self, variant: Variant, sparsity: float) -> list[CellResult]:
        """The results of all seeds."""
        return [
            result
            for result in self.results
            if result.cell.variant == variant and result.cell.sparsity == sparsity
        ]


class ComparisonListener:
    """What happens during a comparison, for displays. All methods do nothing by default."""

    def on_dense(self, comparison: Comparison) -> None: ...
    def on_cell(self, cell: Cell, number: int, count: int) -> None: ...
    def on_result(self, comparison: Comparison, result: CellResult) -> None: ...
