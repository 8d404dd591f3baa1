"""Helpers of the tests of comparisons."""

from __future__ import annotations

from adapt_pruner.comparison.cells import Comparison


def values(comparison: Comparison) -> list[float]:
    return [result.scores[0].value for result in comparison.results]
