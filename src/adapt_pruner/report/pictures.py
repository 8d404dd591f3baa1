"""Pictures of a pruning run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomically

if TYPE_CHECKING:
    from ..result import PruningResult

BEFORE, AFTER, ACCENT = "#c9d3df", "#1f6feb", "#d1495b"


def draw_all(directory: Path, result: PruningResult) -> dict[str, str]:
    """Draw every picture as SVG and PNG. Returns the SVG files with a description of each."""
    if not result.steps:
        return {}
    drawn = {"widths.svg": ("Widths of each decoder layer before and after", draw_widths(result))}
    if result.steps[0].layer_importance:
        drawn["layer_importance.svg"] = (
            "Importance of each decoder layer over the pruning steps",
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
    rows = [("intermediate_size", "MLP neurons"), ("num_key_value_heads", "KV groups")]
    rows = [(key, label) for key, label in rows if any(key in w for w in result.widths_before)]
    figure, axes = make_figure(7.5, 2.3 * len(rows), len(rows))
    for axis, (key, label) in zip(axes, rows, strict=True):
        layers = [i for i, widths in enumerate(result.widths_before) if key in widths]
        old = [result.widths_before[i][key] for i in layers]
        new = [result.widths_after[i][key] for i in layers]
        axis.bar(layers, old, color=BEFORE, width=0.8, label="before")
        axis.bar(layers, new, color=AFTER, width=0.8, label="after")
        axis.set_ylabel(label)
        axis.set_xlim(-0.6, len(result.widths_before) - 0.4)
        if len(layers) <= 16:
            for i, width in zip(layers, new, strict=True):
                axis.annotate(
                    str(width), (i, width), ha="center", va="bottom", fontsize=8, color="#333",
                    xytext=(0, 1), textcoords="offset points",
                )  # fmt: skip
        axis.set_ylim(0, 1.15 * max(old))
    axes[0].legend(ncols=2, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    axes[0].set_title(
        f"{result.before.total:,} → {result.after.total:,} parameters", loc="left", fontsize=11
    )
    axes[-1].set_xlabel("decoder layer")
    return figure


def draw_layer_importance(result: PruningResult) -> Any:
    """Heat map: how much each layer changed its input before each step (figure 1 of the paper)."""
    from matplotlib.ticker import MaxNLocator

    importance = [step.layer_importance for step in result.steps]
    figure, (axis,) = make_figure(7.5, min(2.2 + 0.16 * len(importance), 7), 1)
    image = axis.imshow(
        importance, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest",
        extent=(-0.5, len(importance[0]) - 0.5, len(importance) + 0.5, 0.5),
    )  # fmt: skip
    axis.grid(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("decoder layer")
    axis.set_ylabel("pruning step")
    axis.set_title("Layer importance before each step", loc="left", fontsize=11)
    figure.colorbar(image, label="less  ←  change of the input  →  more", pad=0.02)
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
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, list(axes)


def use_log_scale(axis: Any) -> None:
    """Perplexities in equal ratios, written as plain numbers."""
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:,.4g}")
    axis.yaxis.set_minor_formatter("")
