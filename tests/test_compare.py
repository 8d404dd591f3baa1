"""`compare`: arithmetic of its tables against values worked by hand, and runs that go on."""

from __future__ import annotations

import csv
import io
import math

import pytest

from adapt_pruner.comparison.cells import Cell, CellResult, Comparison, ComparisonRequest
from adapt_pruner.comparison.picture import pareto_front
from adapt_pruner.comparison.table import Metric, Summary, Tables, escape_latex
from adapt_pruner.comparison.variants import VARIANTS, Variant, make_variants, parse_sweep
from adapt_pruner.errors import InvalidSettings
from adapt_pruner.evaluation import Evaluation, Score
from adapt_pruner.methods import make_settings
from adapt_pruner.settings import EvaluationSettings

PERPLEXITY = Metric("text.txt", "token_perplexity", False)
ACCURACY = Metric("PIQA", "acc_norm", True)
A, B = (Variant(name, make_settings()) for name in ("a_1", "b|2"))


def score(metric: Metric, value: float) -> Score:
    return Score(metric.name, metric.metric, value, None, None, 10, metric.higher_is_better)


def tables(
    values: dict[tuple[Variant, float], list[dict[Metric, float]]], dense: dict[Metric, float]
) -> Tables:
    """Tables of given figures: a list of seeds per variant and sparsity."""
    request = ComparisonRequest("m", [A, B], [0.2, 0.4], range(2), text=["text.txt"])
    scores = [score(metric, value) for metric, value in dense.items()]
    comparison = Comparison(request, Evaluation("m", 1000, scores, EvaluationSettings()))
    for (variant, sparsity), seeds in values.items():
        for seed, found in enumerate(seeds):
            comparison.results.append(
                CellResult(
                    Cell(variant, sparsity, seed), round(1000 * (1 - sparsity)), 2.0 + seed,
                    [score(metric, value) for metric, value in found.items()],
                )
            )  # fmt: skip
    return Tables(comparison)


@pytest.fixture
def two() -> Tables:
    """One metric, two variants, two sparsities; one cell has one seed, one has none."""
    return tables(
        {
            (A, 0.2): [{PERPLEXITY: 4.0}, {PERPLEXITY: 7.0}],
            (B, 0.2): [{PERPLEXITY: 6.0}, {PERPLEXITY: 6.0}],
            (A, 0.4): [{PERPLEXITY: 1234.4}],
        },
        {PERPLEXITY: 3.0},
    )


class TestArithmetic:
    def test_mean_and_sample_standard_deviation(self):
        found = Summary.of([2.0, 4.0, 9.0])
        assert found == Summary(5.0, math.sqrt((9 + 1 + 16) / 2), 3)

    def test_one_value_has_no_spread(self):
        assert Summary.of([2.0]) == Summary(2.0, None, 1)
        assert Summary.of([]) is None

    def test_markdown(self, two):
        # 4 and 7: mean 5.5, deviation sqrt((1.5² + 1.5²) / 1) = 2.12
        assert two.markdown().splitlines()[:5] == [
            "| method | 0% | 20% | 40% | s per run |",
            "| --- | --- | --- | --- | --- |",
            "| dense | 3.00 |  |  |  |",
            r"| a\_1 |  | **5.50 ± 2.12** | 1,234 (n=1) | 2.3 |",
            r"| b\|2 |  | 6.00 ± 0.00 | – | 2.5 |",
        ]

    def test_best_needs_a_rival(self, two):
        assert two.best(0.2, PERPLEXITY) == {"a_1"}
        assert two.best(0.4, PERPLEXITY) == set()

    def test_what_is_written_alike_is_best_alike(self):
        near = tables(
            {(A, 0.2): [{PERPLEXITY: 5.001}], (B, 0.2): [{PERPLEXITY: 5.004}]}, {PERPLEXITY: 3.0}
        )
        assert near.best(0.2, PERPLEXITY) == {"a_1", "b|2"}

    def test_several_metrics_as_in_table_1(self):
        found = tables(
            {
                (A, 0.2): [{PERPLEXITY: 5.0, ACCURACY: 0.5}],
                (B, 0.2): [{PERPLEXITY: 6.0, ACCURACY: 0.75}],
            },
            {PERPLEXITY: 3.0, ACCURACY: 0.8},
        )
        assert found.markdown().splitlines()[:5] == [
            "| method | sparsity | text.txt token perplexity | PIQA |",
            "| --- | --- | --- | --- |",
            "| dense | 0% | 3.00 | 80.00 |",
            r"| a\_1 | 20% | **5.00 (n=1)** | 50.00 (n=1) |",
            r"| b\|2 | 20% | 6.00 (n=1) | **75.00 (n=1)** |",
        ]

    def test_metrics_of_one_task_are_told_apart(self):
        found = tables({}, {ACCURACY: 0.5, Metric("PIQA", "acc", True): 0.4})
        assert found.markdown().startswith("| method | sparsity | PIQA acc norm | PIQA acc |\n")

    def test_latex_is_escaped(self, two):
        lines = two.latex().splitlines()
        assert r"a\_1 &  & \textbf{5.50 $\pm$ 2.12} & 1,234 (n=1) & 2.3 \\" in lines
        assert r"method & 0\% & 20\% & 40\% & s per run \\" in lines
        assert r"\begin{tabular}{lrrrr}" in lines
        assert escape_latex("a_b & 5% {x} $ # ~ ^ \\") == (
            r"a\_b \& 5\% \{x\} \$ \# \textasciitilde{} \textasciicircum{} \textbackslash{}"
        )

    def test_csv_has_figures_in_full(self, two):
        rows = list(csv.DictReader(io.StringIO(two.csv())))
        assert [row["method"] for row in rows] == ["dense", "a_1", "b|2", "a_1", "b|2"]
        assert float(rows[1]["stdev"]) == pytest.approx(math.sqrt(4.5), rel=1e-15)
        assert [row["best"] for row in rows[1:]] == ["1", "0", "0", "0"]
        assert (rows[4]["mean"], rows[4]["seeds"], rows[4]["parameters"]) == ("", "0", "")

    def test_errors_are_told(self, two):
        cell = Cell(B, 0.4, 0)
        two.comparison.results.append(CellResult(cell, 600, 0.0, [], error="it is NaN."))
        assert r"No result for b\|2, 0.4, seed 0: it is NaN." in two.markdown()

    @pytest.mark.parametrize(
        ("higher", "front"), [(False, [(1, 9), (2, 5)]), (True, [(1, 9), (4, 10)])]
    )
    def test_pareto_front(self, higher, front):
        points = [(1, 9), (2, 5), (2, 7), (3, 6), (4, 10)]
        assert pareto_front(points, higher) == front


class TestVariants:
    def test_methods_of_the_package_are_valid(self):
        assert [variant.name for variant in make_variants((), VARIANTS)] == list(VARIANTS)

    def test_sweep_is_a_product(self):
        sweeps = [parse_sweep("amplitude=0,1e-2"), parse_sweep("steps=5,10")]
        found = make_variants(["paper"], VARIANTS, sweeps, {"windows": 8})
        assert [variant.name for variant in found] == [
            "paper, amplitude 0, steps 5",
            "paper, amplitude 0, steps 10",
            "paper, amplitude 0.01, steps 5",
            "paper, amplitude 0.01, steps 10",
        ]
        assert found[3].settings.amplitude == 0.01
        assert found[3].varied == (("amplitude", 0.01), ("steps", 10))
        assert {variant.settings.windows for variant in found} == {8}

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("amplitude", "reads such as amplitude=0,0.01"),
            ("amplitude=", "reads such as"),
            ("amplitud=1", "no setting 'amplitud' to vary. Did you mean 'amplitude'?"),
            ("seed=1,2", "use --seeds"),
        ],
    )
    def test_bad_sweeps(self, text, says):
        with pytest.raises(InvalidSettings, match=says.replace("?", r"\?")):
            parse_sweep(text)

    def test_amplitude_without_effect(self):
        with pytest.raises(InvalidSettings, match="no effect; sweep it with --methods paper"):
            make_variants(["best"], VARIANTS, [parse_sweep("amplitude=0,0.1")])
