"""Pictures of a pruning run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomically
from .series import (
    IMPORTANCE_TITLE,
    LAYER,
    LESS,
    LIGHT,
    MORE,
    NUMBERED,
    STEP,
    columns_of,
    importance_of,
)

if TYPE_CHECKING:
    from ..result import PruningResult

BEFORE, AFTER, ACCENT = LIGHT["before"], LIGHT["after"], LIGHT["warm"]


def draw_all(directory: Path, result: PruningResult) -> dict[str, str]:
    """Draw every picture as SVG and PNG. Returns the SVG files with a description of each."""
    if not result.steps:
        return {}
    drawn = {"widths.svg": ("Widths of each decoder layer before and after", draw_widths(result))}
    if importance_of(result.steps):
        drawn["layer_importance.svg"] = (
            IMPORTANCE_TITLE,
            draw_layer_importance(result),
        )
    for name, (_, figure) in drawn.items():
        save_figure(figure, directory / name)
    return {name: description for name, (description, _) in drawn.items()}


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure as SVG to `file`, and as PNG beside it. The same figure gives the same SVG."""
    for suffix, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 150})):
        content = io.BytesIO()
        figure.savefig(content, format=suffix[1:], **options)
        write_atomically(file.with_suffix(suffix), content.getvalue())


def draw_widths(result: PruningResult) -> Any:
    """Bars of what each layer had and has left: MLP neurons and KV groups."""
    drawn = columns_of(result.widths_before, result.widths_after).values()
    figure, axes = make_figure(7.5, 2.3 * len(drawn), len(drawn))
    for axis, units in zip(axes, drawn, strict=True):
        layers, old, new = zip(*units.layers, strict=True)
        axis.bar(layers, old, color=BEFORE, width=0.8, label="before")
        axis.bar(layers, new, color=AFTER, width=0.8, label="after")
        axis.set_ylabel(units.label)
        axis.set_xlim(-0.6, len(units.before) - 0.4)
        if len(layers) <= NUMBERED:
            for i, width in zip(layers, new, strict=True):
                axis.annotate(
                    str(width), (i, width), ha="center", va="bottom", fontsize=8,
                    color=LIGHT["ink"], xytext=(0, 1), textcoords="offset points",
                )  # fmt: skip
        axis.set_ylim(0, 1.15 * max(old))
    axes[0].legend(ncols=2, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    axes[0].set_title(
        f"{result.before.total:,} → {result.after.total:,} parameters", loc="left", fontsize=11
    )
    axes[-1].set_xlabel(LAYER)
    return figure


def draw_layer_importance(result: PruningResult) -> Any:
    """Heat map: how much each layer changed its input before each step (figure 1 of the paper)."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = [LIGHT["cool"], "white", LIGHT["warm"]]
    return draw_heat_map(
        importance_of(result.steps), IMPORTANCE_TITLE, STEP, f"{LESS}  ←  →  {MORE}",
        cmap=LinearSegmentedColormap.from_list("importance", colors), vmin=-1, vmax=1,
    )  # fmt: skip


def draw_heat_map(
    rows: Sequence[Sequence[float]], title: str, row: str, scale: str = "", **colors: Any
) -> Any:
    """A row for each `row`, counted from 1 at the top, a column for each decoder layer."""
    from matplotlib.ticker import MaxNLocator

    figure, (axis,) = make_figure(7.5, min(2.2 + 0.16 * len(rows), 7), 1)
    image = axis.imshow(
        rows, aspect="auto", interpolation="nearest",
        extent=(-0.5, len(rows[0]) - 0.5, len(rows) + 0.5, 0.5), **colors,
    )  # fmt: skip
    axis.grid(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(LAYER)
    axis.set_ylabel(row)
    axis.set_title(title, loc="left", fontsize=11)
    figure.colorbar(image, label=scale, pad=0.02)
    return figure


def make_figure(
    width: float, height: float, rows: int, sharex: bool = True
) -> tuple[Any, list[Any]]:
    """A figure with `rows` axes, drawn without a display and without global state."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, 1, sharex=sharex, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=LIGHT["rule"], linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, list(axes)


def use_log_scale(axis: Any) -> None:
    """Perplexities in equal ratios, written as plain numbers."""
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:,.4g}")
    axis.yaxis.set_minor_formatter("")
