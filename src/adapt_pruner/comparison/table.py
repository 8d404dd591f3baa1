"""The results of a comparison as tables: mean ± spread over the seeds, the best in bold."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..evaluation import Score, fingerprint
from ..evaluation.store import git_hash
from .cells import Comparison
from .grid import commits_of
from .variants import Variant

MISSING = "–"
NOT_SHOWN = ("bits_per_byte",)
"""Metrics that stand in the CSV and JSON files alone."""


@dataclass(frozen=True)
class Summary:
    """One figure over several seeds."""

    mean: float
    stdev: float | None
    """Sample standard deviation (n - 1); None for a single value."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        if not values:
            return None
        stdev = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.mean(values), stdev, len(values))


@dataclass(frozen=True)
class Metric:
    """A column: what was measured."""

    name: str
    metric: str
    higher_is_better: bool

    @classmethod
    def of(cls, score: Score) -> Metric:
        return cls(score.name, score.metric, score.higher_is_better)

    @property
    def is_share(self) -> bool:
        """Whether it is shown in percent."""
        return "perplexity" not in self.metric and "bits_per" not in self.metric

    def find(self, scores: Sequence[Score]) -> Score | None:
        return next((s for s in scores if (s.name, s.metric) == (self.name, self.metric)), None)

    def written(self, value: float) -> str:
        """Enough digits for a table."""
        if self.is_share:
            return f"{100 * value:.2f}"
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


@dataclass(frozen=True)
class Figure:
    """One place of a table."""

    text: str
    is_best: bool = False


TableRow = tuple[str, list[Figure]]


class Tables:
    """Summaries of a comparison, and the tables made of them."""

    def __init__(self, comparison: Comparison):
        self.comparison, request = comparison, comparison.request
        self.metrics = [Metric.of(score) for score in comparison.dense.scores]
        self.shown = [metric for metric in self.metrics if metric.metric not in NOT_SHOWN]
        self.variants, self.sparsities = request.variants, request.sparsities
        self.num_seeds = len(request.seeds)

    def label(self, metric: Metric) -> str:
        """The name of a column; with what was measured, where it does not go without saying."""
        names = [shown.name for shown in self.shown]
        if metric.is_share and names.count(metric.name) == 1:
            return metric.name
        return f"{metric.name} {metric.metric.replace('_', ' ')}"

    def summary(self, variant: Variant, sparsity: float, metric: Metric) -> Summary | None:
        found = [metric.find(result.scores) for result in self.comparison.of(variant, sparsity)]
        return Summary.of([score.value for score in found if score])

    def best(self, sparsity: float, metric: Metric) -> set[str]:
        """The variants whose mean is the best as it is written, if there is more than one."""
        means = {}
        for variant in self.variants:
            if found := self.summary(variant, sparsity, metric):
                means[variant.name] = found.mean
        if len(means) < 2:
            return set()
        first = (max if metric.higher_is_better else min)(means.values())
        shown = metric.written(first)
        return {name for name, mean in means.items() if metric.written(mean) == shown}

    def figure(self, variant: Variant, sparsity: float, metric: Metric) -> Figure:
        found = self.summary(variant, sparsity, metric)
        if found is None:
            return Figure(MISSING)
        text = metric.written(found.mean)
        if found.stdev is not None:
            text += f" ± {metric.written(found.stdev)}"
        if found.n < self.num_seeds:
            text += f" (n={found.n})"
        return Figure(text, variant.name in self.best(sparsity, metric))

    def grid(self) -> tuple[list[str], list[TableRow]]:
        """Heads and rows: with one metric methods by sparsities, with several as in table 1."""
        dense = [score for m in self.shown if (score := m.find(self.comparison.dense.scores))]
        if len(self.shown) == 1:
            (metric,) = self.shown
            heads = ["method", "0%", *(f"{s:.3g}%" for s in self._percents()), "s per run"]
            blank = [Figure("")] * len(self.sparsities)
            rows = [("dense", [Figure(metric.written(dense[0].value)), *blank, Figure("")])]
            for variant in self.variants:
                figures = [self.figure(variant, s, metric) for s in self.sparsities]
                rows.append((variant.name, [Figure(""), *figures, self._seconds(variant)]))
            return heads, rows
        heads = ["method", "sparsity", *map(self.label, self.shown)]
        figures = [Figure(m.written(s.value)) for m, s in zip(self.shown, dense, strict=True)]
        rows = [("dense", [Figure("0%"), *figures])]
        for sparsity, percent in zip(self.sparsities, self._percents(), strict=True):
            for variant in self.variants:
                figures = [self.figure(variant, sparsity, metric) for metric in self.shown]
                rows.append((variant.name, [Figure(f"{percent:.3g}%"), *figures]))
        return heads, rows

    def markdown(self) -> str:
        heads, rows = self.grid()
        lines = [f"| {' | '.join(map(escape_markdown, heads))} |", "|" + " --- |" * len(heads)]
        for name, figures in rows:
            cells = [_wrapped(figure, "**{}**", escape_markdown) for figure in figures]
            lines.append(f"| {' | '.join([escape_markdown(name), *cells])} |")
        return "\n".join([*lines, "", *map(escape_markdown, self.notes()), ""])

    def latex(self) -> str:
        r"""A table for \usepackage{booktabs}."""
        heads, rows = self.grid()
        lines = [
            *(f"% {_one_line(note)}" for note in self.notes()),
            r"\begin{tabular}{l" + "r" * (len(heads) - 1) + "}",
            r"\toprule",
            " & ".join(map(escape_latex, heads)) + r" \\",
            r"\midrule",
        ]
        for name, figures in rows:
            cells = [_wrapped(figure, r"\textbf{{{}}}", escape_latex) for figure in figures]
            lines.append(" & ".join([escape_latex(name), *cells]) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])

    def csv(self) -> str:
        """One row per method, sparsity and metric, figures in full."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["method", "sparsity", "parameters", "task", "metric", "mean", "stdev", "seeds", "best"]
        )
        dense = self.comparison.dense
        for score in dense.scores:
            writer.writerow(
                ["dense", 0, dense.parameters, score.name, score.metric, score.value, "", "", ""]
            )
        for sparsity in self.sparsities:
            for variant in self.variants:
                for metric in self.metrics:
                    found = self.summary(variant, sparsity, metric)
                    best = variant.name in self.best(sparsity, metric)
                    writer.writerow(
                        [variant.name, sparsity, self.parameters(variant, sparsity), metric.name,
                         metric.metric, *self._csv(found), int(best)]
                    )  # fmt: skip
        return text.getvalue()

    def parameters(self, variant: Variant, sparsity: float) -> int | str:
        """Of the largest of the models that the seeds gave."""
        return max((r.parameters for r in self.comparison.of(variant, sparsity)), default="")

    def as_dict(self) -> dict[str, Any]:
        """Everything, for comparison.json."""
        request, dense = self.comparison.request, self.comparison.dense
        return {
            "format": 1,
            "model": request.model,
            "versions": fingerprint.versions(),
            "git_hash": git_hash(),
            "evaluation": request.evaluation.model_dump(mode="json"),
            "text": list(request.text),
            "suite": list(request.suite),
            "tasks": list(request.tasks),
            "seeds": list(request.seeds),
            "methods": {v.name: v.settings.model_dump(mode="json") for v in self.variants},
            "dense": {
                "parameters": dense.parameters,
                "scores": [asdict(score) for score in dense.scores],
            },
            "results": [
                {
                    "method": result.cell.variant.name,
                    "sparsity": result.cell.sparsity,
                    "seed": result.cell.seed,
                    "parameters": result.parameters,
                    "seconds": result.seconds,
                    "scores": [asdict(score) for score in result.scores],
                    **({"error": result.error} if result.error else {}),
                }
                for result in self.comparison.results
            ],
        }

    def notes(self) -> list[str]:
        """What the figures are, in sentences."""
        dense, request = self.comparison.dense, self.comparison.request
        said = [
            f"{_name(dense.model)}, {dense.parameters:,} parameters. Sparsity is the share of the "
            "decoder layers' parameters removed."
        ]
        if self.num_seeds > 1:
            said.append(f"Mean ± sample standard deviation over {self.num_seeds} seeds.")
        if any(metric.is_share for metric in self.shown):
            said.append("Accuracies in percent.")
        for record in dense.records:
            if record.key["kind"] == "text":
                said.append(
                    f"Token perplexity on {record.result['source']}: windows of "
                    f"{record.key['window']} tokens, stride {record.key['stride']}, "
                    f"{record.result['num_tokens']:,} tokens."
                )
        if request.evaluation.limit:
            said.append(f"Measured on a part (limit {request.evaluation.limit:g}).")
        said.append(f"Made with adapt-pruner {__version__}.")
        results = self.comparison.results
        commits = commits_of(dense.records).union(*(result.commits for result in results))
        if len(commits) > 1:
            said.append(
                f"Figures were computed at {len(commits)} commits "
                f"({', '.join(sorted(map(_short, commits)))}), with the same code for what "
                "determines them; seconds may differ."
            )
        for result in self.comparison.results:
            if result.error:
                said.append(f"No result for {result.cell}: {result.error}")
        return said

    def _percents(self) -> list[float]:
        return [100 * sparsity for sparsity in self.sparsities]

    def _seconds(self, variant: Variant) -> Figure:
        found = [
            r.seconds for s in self.sparsities for r in self.comparison.of(variant, s) if r.scores
        ]
        return Figure(f"{statistics.mean(found):.1f}" if found else MISSING)

    @staticmethod
    def _csv(found: Summary | None) -> list[Any]:
        if found is None:
            return ["", "", 0]
        return [found.mean, "" if found.stdev is None else found.stdev, found.n]


def _name(model: str) -> str:
    """A model's name on the hub, or that of its directory."""
    return Path(model).name if Path(model).exists() else model


def _short(commit: str) -> str:
    """
    >>> _short("0123456789abcdef-dirty")
    '0123456-dirty'
    """
    name, dash, state = commit.partition("-")
    return f"{name[:7]}{dash}{state}"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--",
}  # fmt: skip


def escape_latex(text: str) -> str:
    r"""Text as LaTeX prints it.

    >>> print(escape_latex("50% of a_b"))
    50\% of a\_b
    """
    return "".join(_LATEX.get(character, character) for character in text)


_MARKDOWN = re.compile(r"([\\`*_\[\]#|~<>&$])")


def escape_markdown(text: str) -> str:
    r"""Text as Markdown shows it, without HTML, links, emphasis or columns of its own.

    >>> print(escape_markdown("a_b <script> | 50%"))
    a\_b \<script\> \| 50%
    """
    return _MARKDOWN.sub(r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _wrapped(figure: Figure, bold: str, escape: Callable[[str], str]) -> str:
    text = escape(figure.text)
    return bold.format(text) if figure.is_best else text
