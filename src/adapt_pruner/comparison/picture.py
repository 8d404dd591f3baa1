"""Pictures of a comparison: quality over size, and over a setting that was swept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report.pictures import make_figure, save_figure, use_log_scale
from .grid import MEAN_OVER_TEXTS
from .table import Metric, Tables
from .variants import Variant

COLOURS = ("#1f6feb", "#d1495b", "#2e8b57", "#e09f3e", "#7b5ea7", "#5f6b76", "#00838f", "#9e4f2f")
MARKERS = "osD^vPX<"
MOST_PANELS = 3


def style_of(number: int) -> dict[str, Any]:
    """How the line of that number looks; colours come again from the ninth on, with another marker
    and dashes."""
    turn, place = divmod(number, len(COLOURS))
    return {
        "color": COLOURS[place],
        "marker": MARKERS[(place + 3 * turn) % len(MARKERS)],
        "linestyle": "--" if turn % 2 else "-",
    }


def draw(directory: Path, tables: Tables) -> list[Path]:
    """Write SVG and PNG files. Returns the SVG files."""
    metrics = _headline(tables)
    drawn = {"quality_over_size": draw_sizes(tables, metrics)}
    varied = {name for variant in tables.variants for name, _ in variant.varied}
    if len(varied) == 1 and _is_numeric(tables.variants):
        (name,) = varied
        drawn[f"quality_over_{name}"] = draw_sweep(tables, metrics, name)
    for name, figure in drawn.items():
        save_figure(figure, directory / f"{name}.svg")
    return [directory / f"{name}.svg" for name in drawn]


def draw_sizes(tables: Tables, metrics: Sequence[Metric]) -> Any:
    """A line per method, error bars over the seeds, and the Pareto front behind them."""
    figure, axes = make_figure(7.5, 3.6 * len(metrics), len(metrics))
    dense = tables.comparison.dense
    for axis, metric in zip(axes, metrics, strict=True):
        score = metric.find(dense.scores)
        assert score is not None
        start = (dense.parameters, _scaled(metric, score.value))
        points = [start]
        for number, variant in enumerate(tables.variants):
            line = _line(tables, variant, metric)
            points += [(size, mean) for size, mean, _ in line]
            if line:
                _errorbar(axis, line, number, variant.name)
        front = pareto_front(points, metric.higher_is_better)
        axis.plot(*zip(*front, strict=True), color="#d7dde4", linewidth=7, zorder=0,
                  solid_capstyle="round", label="Pareto front")  # fmt: skip
        axis.plot(*start, "*", color="#222", markersize=11, label="dense", zorder=4)
        _label(axis, metric, tables.label(metric))
        axis.xaxis.set_major_formatter(_short)
    axes[0].legend(frameon=False, fontsize=8, ncols=2)
    axes[-1].set_xlabel("parameters")
    return figure


def draw_sweep(tables: Tables, metrics: Sequence[Metric], name: str) -> Any:
    """A line per method and sparsity over the values of the setting (table 8, figure 4)."""
    figure, axes = make_figure(7.5, 3.2 * len(metrics), len(metrics))
    families: dict[tuple[str, float], list[Variant]] = {}
    for sparsity in tables.sparsities:
        for variant in tables.variants:
            families.setdefault((variant.name.split(", ")[0], sparsity), []).append(variant)
    several = len({family for family, _ in families}) > 1
    for axis, metric in zip(axes, metrics, strict=True):
        for number, ((family, sparsity), variants) in enumerate(families.items()):
            line = []
            for variant in variants:
                if found := tables.summary(variant, sparsity, metric):
                    spread = _scaled(metric, found.stdev or 0.0)
                    line.append((dict(variant.varied)[name], _scaled(metric, found.mean), spread))
            if line:
                label = f"{sparsity:.0%}" + (f" {family}" if several else "")
                _errorbar(axis, sorted(line), number, label)
        _label(axis, metric, tables.label(metric))
    axes[0].legend(frameon=False, fontsize=8, ncols=3)
    axes[-1].set_xlabel(name.replace("_", " "))
    return figure


def pareto_front(
    points: Sequence[tuple[float, float]], higher_is_better: bool
) -> list[tuple[float, float]]:
    """The points that none other beats in size and quality, by size.

    >>> pareto_front([(1, 9.0), (2, 5.0), (2, 7.0), (3, 6.0)], higher_is_better=False)
    [(1, 9.0), (2, 5.0)]
    """
    sign = -1 if higher_is_better else 1
    front: list[tuple[float, float]] = []
    for size, quality in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * quality < sign * front[-1][1]:
            front.append((size, quality))
    return front


def _headline(tables: Tables) -> list[Metric]:
    """What to draw: means over suites and texts, or else the first metrics."""
    means = [m for m in tables.shown if m.metric == "mean" or m.name == MEAN_OVER_TEXTS]
    texts = [m for m in tables.shown if not m.is_share]
    return (means or texts or tables.shown)[:MOST_PANELS]


def _line(tables: Tables, variant: Variant, metric: Metric) -> list[tuple[float, float, float]]:
    line = []
    for sparsity in tables.sparsities:
        if found := tables.summary(variant, sparsity, metric):
            size = float(tables.parameters(variant, sparsity))
            spread = _scaled(metric, found.stdev or 0.0)
            line.append((size, _scaled(metric, found.mean), spread))
    return sorted(line)


def _errorbar(axis: Any, line: list[tuple[float, float, float]], number: int, label: str) -> None:
    x, y, spread = zip(*line, strict=True)
    axis.errorbar(
        x, y, yerr=spread, label=label, linewidth=1.4, markersize=4.5, capsize=2, elinewidth=0.8,
        zorder=3, **style_of(number),
    )  # fmt: skip


def _label(axis: Any, metric: Metric, label: str) -> None:
    better = "higher" if metric.higher_is_better else "lower"
    percent = ", %" if metric.is_share else ""
    axis.set_ylabel(f"{label}{percent}\n({better} is better)", fontsize=9)
    if not metric.is_share:
        use_log_scale(axis)


def _short(value: float, _: int) -> str:
    from ..figures import short

    return short(value)


def _scaled(metric: Metric, value: float) -> float:
    return 100 * value if metric.is_share else value


def _is_numeric(variants: Sequence[Variant]) -> bool:
    values = [value for variant in variants for _, value in variant.varied]
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
