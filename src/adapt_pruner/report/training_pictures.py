"""Pictures of a run of recovery training, from its log and its phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LoadingError
from ..figures import smoothed
from ..files import read_json
from ..parsing import ParsingError, parse_json
from .pictures import ACCENT, AFTER, BEFORE, make_figure, save_figure

LINE = "#57606a"


def draw_training(run: Path, pictures: Path) -> dict[str, str]:
    """Draw what training.jsonl and phases.json of `run` tell, as SVG and PNG.

    Returns the SVG files with a description of each.
    """
    file = run / "training.jsonl"
    try:
        log = [parse_json(line) for line in file.read_bytes().splitlines()]
    except ParsingError as error:
        raise LoadingError(f"'{file}' is {error}; restore it.") from error
    phases = read_json(run / "phases.json")
    if not log or not phases:
        return {}
    drawn = {
        "training.svg": (
            "Loss and parameters over the tokens trained on, with the cuts",
            draw_loss(log, phases),
        ),
        "phases.svg": ("MLP width of each decoder layer after each phase", draw_phases(phases)),
    }
    for name, (_, figure) in drawn.items():
        save_figure(figure, pictures / name)
    return {name: description for name, (description, _) in drawn.items()}


def draw_loss(log: list[dict[str, Any]], phases: list[dict[str, Any]]) -> Any:
    """Above the loss per step and its running mean, below the parameters; cuts are dotted lines."""
    measured = [(phase, phase["evaluation"]) for phase in phases if phase["evaluation"]]
    figure, axes = make_figure(7.5, 4.4 + 1.6 * bool(measured), 2 + bool(measured))
    tokens, losses = [line["tokens"] for line in log], [line["loss"] for line in log]
    axes[0].plot(tokens, losses, color=BEFORE, linewidth=0.8)
    axes[0].plot(
        tokens, smoothed(losses, [line["phase"] for line in log]), color=AFTER, linewidth=1.6
    )
    axes[0].set_ylabel("loss (nats per token)")
    cuts = [phase["tokens_before"] for phase in phases]
    sizes = [phase["parameters"] for phase in phases]
    axes[1].stairs(sizes, [*cuts, tokens[-1]], baseline=None, color=LINE, linewidth=1.6)
    axes[1].set_ylim(0, 1.15 * max(sizes))
    axes[1].set_ylabel("parameters")
    if measured:
        ends = [phase["tokens_before"] + phase["tokens"] for phase, _ in measured]
        values = [found["perplexity"] for _, found in measured]
        axes[2].plot(ends, values, "o-", color=ACCENT, markersize=4, linewidth=1)
        axes[2].set_ylim(0, 1.15 * max(values))
        axes[2].set_ylabel("perplexity")
    for axis in axes:
        for cut in cuts:
            axis.axvline(cut, color=ACCENT, linewidth=0.7, linestyle=":")
    axes[0].set_title(
        f"{len(phases)} phases, {tokens[-1]:,} tokens; dotted: a cut", loc="left", fontsize=11
    )
    axes[-1].set_xlabel("tokens trained on")
    axes[-1].set_xlim(0, tokens[-1])
    return figure


def draw_phases(phases: list[dict[str, Any]]) -> Any:
    """Heat map: MLP neurons that each layer has left after each phase."""
    from matplotlib.ticker import MaxNLocator

    widths = [[layer["intermediate_size"] for layer in phase["widths"]] for phase in phases]
    figure, (axis,) = make_figure(7.5, min(2.0 + 0.2 * len(widths), 7), 1)
    image = axis.imshow(
        widths, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest",
        extent=(-0.5, len(widths[0]) - 0.5, len(widths) + 0.5, 0.5),
    )  # fmt: skip
    axis.grid(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("decoder layer")
    axis.set_ylabel("phase")
    axis.set_title("MLP neurons left after each phase", loc="left", fontsize=11)
    figure.colorbar(image, pad=0.02)
    return figure
