"""Which benchmarks are measured together, with which metric and how many shots: data.

Metric and shots are those of arXiv:2502.03460, table 6; tasks are lm-eval's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import EvaluationError, near_match


@dataclass(frozen=True)
class Benchmark:
    """One row of a results table."""

    name: str
    """As the papers call it."""
    tasks: tuple[str, ...]
    """Tasks or groups of lm-eval; the benchmark's value is the mean over them."""
    metric: str
    """As lm-eval reports it: metric, filter."""
    num_fewshot: int
    folder: str
    """Where lm-eval defines the tasks; spares reading all of its 14,000 definitions."""

    @property
    def is_accuracy(self) -> bool:
        return "perplexity" not in self.metric


@dataclass(frozen=True)
class Suite:
    benchmarks: tuple[Benchmark, ...]
    averages: dict[str, tuple[str, ...]]
    """Plain means over benchmarks, by the tables that show them."""


def _accuracy(name: str, task: str, metric: str, folder: str, num_fewshot: int = 0) -> Benchmark:
    return Benchmark(name, (task,), f"{metric},none", num_fewshot, folder)


COMMONSENSE = (
    _accuracy("ARC-e", "arc_easy", "acc_norm", "arc"),
    _accuracy("ARC-c", "arc_challenge", "acc_norm", "arc"),
    _accuracy("BoolQ", "boolq", "acc", "super_glue/boolq"),
    _accuracy("HellaSwag", "hellaswag", "acc_norm", "hellaswag"),
    _accuracy("OBQA", "openbookqa", "acc_norm", "openbookqa"),
    _accuracy("PIQA", "piqa", "acc_norm", "piqa"),
    _accuracy("SIQA", "social_iqa", "acc", "siqa"),
    _accuracy("WinoGrande", "winogrande", "acc", "winogrande"),
)
_NAMES = tuple(benchmark.name for benchmark in COMMONSENSE)

SUITES = {
    "commonsense": Suite(
        COMMONSENSE,
        {
            # Tables 1 and 7 have no BoolQ; table 8, and all of AdaPruner, have no SIQA.
            "average, Adapt-Pruner": tuple(name for name in _NAMES if name != "BoolQ"),
            "average, AdaPruner": tuple(name for name in _NAMES if name != "SIQA"),
        },
    ),
    "knowledge": Suite(
        (
            # lm-eval's `bbh`: three shots with a chain of thought.
            Benchmark("BBH", ("bbh",), "exact_match,get-answer", 3, "bbh/cot_fewshot"),
            # Of lm-eval's TruthfulQA tasks these two have an accuracy. The paper's figures are near
            # their mean: 30.41 for Llama-3.2-1B.
            Benchmark(
                "TruthfulQA", ("truthfulqa_mc1", "truthfulqa_mc2"), "acc,none", 1, "truthfulqa"
            ),
            # The group of lm-eval that aggregates acc_norm; the others aggregate acc.
            _accuracy("AGIEval", "agieval_nous", "acc_norm", "agieval"),
            _accuracy("MMLU", "mmlu", "acc", "mmlu/default", num_fewshot=5),
        ),
        {},
    ),
    "perplexity": Suite(
        (
            Benchmark("WikiText2", ("wikitext",), "word_perplexity,none", 0, "wikitext"),
            Benchmark("PTB", ("paloma_ptb",), "word_perplexity,none", 0, "paloma"),
        ),
        {},
    ),
}

DATA_NAMES = {
    "truthfulqa_mc1": "truthfulqa_mc",
    "truthfulqa_mc2": "truthfulqa_mc",
    "wikitext": "wikitext-2-raw",
    "paloma_ptb": "ptb",
}
"""What a local file with the data of a task may be called besides the task's own name."""

SUBJECT_COLUMNS = {"cais/mmlu": "subject"}
"""Data sets of which one file may hold all configurations: the column that tells them apart."""

PREPARED_COLUMNS = {"hellaswag": {"query", "choices", "label"}}
"""Columns that data may have in place of the hub's, once lm-eval's own preparation was applied."""


def find_suites(names: Sequence[str]) -> list[Suite]:
    """Look suites up by name.

    Raises:
        EvaluationError: for an unknown one, with the nearest name.
    """
    for name in names:
        if name not in SUITES:
            raise EvaluationError(
                f"There is no suite '{name}'.{near_match(name, SUITES)} Known: {', '.join(SUITES)}."
            )
    return [SUITES[name] for name in names]
