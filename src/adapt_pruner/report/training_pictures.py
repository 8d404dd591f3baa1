"""Pictures of a run of recovery training, from its log and its phases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..figures import short
from .pictures import ACCENT, AFTER, BEFORE, draw_heat_map, make_figure, save_figure
from .record import StoredPhase, TrainingStep, read_training
from .series import LIGHT, TOKENS_TITLE, TRAINING_TITLE, training_of


def draw_training(run: Path, pictures: Path) -> dict[str, str]:
    """Draw what training.jsonl and phases.json of `run` tell, as SVG and PNG.

    Returns the SVG files with a description of each.
    """
    log, phases = read_training(run)
    if not log or not phases:
        return {}
    drawn = {
        "training.svg": (TRAINING_TITLE, draw_loss(log, phases)),
        "phases.svg": ("MLP width of each decoder layer after each phase", draw_phases(phases)),
    }
    for name, (_, figure) in drawn.items():
        save_figure(figure, pictures / name)
    return {name: description for name, (description, _) in drawn.items()}


def draw_loss(log: Sequence[TrainingStep], phases: Sequence[StoredPhase]) -> Any:
    """Above the loss per step and its running mean, below the parameters; cuts are dotted lines."""
    measured = [(phase, phase.evaluation) for phase in phases if phase.evaluation]
    figure, axes = make_figure(7.5, 4.4 + 1.6 * bool(measured), 2 + bool(measured))
    curve, end = training_of(log, phases), log[-1].tokens
    axes[0].plot(*zip(*curve.points, strict=True), color=BEFORE, linewidth=0.8)
    axes[0].plot(*zip(*curve.means, strict=True), color=AFTER, linewidth=1.6)
    axes[0].set_ylabel("loss (nats per token)")
    cuts = [tokens for tokens, _ in curve.cuts]
    sizes = [phase.parameters for phase in phases]
    axes[1].stairs(sizes, [*cuts, end], baseline=None, color=LIGHT["soft"], linewidth=1.6)
    axes[1].set_ylim(0, 1.15 * max(sizes))
    axes[1].set_ylabel("parameters")
    if measured:
        ends = [phase.tokens_before + phase.tokens for phase, _ in measured]
        values = [found["perplexity"] for _, found in measured]
        axes[2].plot(ends, values, "o-", color=ACCENT, markersize=4, linewidth=1)
        axes[2].set_ylim(0, 1.15 * max(values))
        axes[2].set_ylabel("perplexity")
    for axis in axes:
        for cut in cuts:
            axis.axvline(cut, color=ACCENT, linewidth=0.7, linestyle=":")
    axes[0].set_title(
        f"{len(phases)} phases, {end:,} tokens; dotted: a cut", loc="left", fontsize=11
    )
    axes[-1].set_xlabel(TOKENS_TITLE)
    axes[-1].set_xlim(0, end)
    for axis in (axes[1].yaxis, axes[-1].xaxis):
        axis.set_major_formatter(lambda value, _: short(value))
    return figure


def draw_phases(phases: Sequence[StoredPhase]) -> Any:
    """Heat map: MLP neurons that each layer has left after each phase."""
    widths = [[layer["intermediate_size"] for layer in phase.widths] for phase in phases]
    return draw_heat_map(widths, "MLP neurons left after each phase", "phase", cmap="Blues", vmin=0)
