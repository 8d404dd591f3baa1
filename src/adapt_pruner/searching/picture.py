"""A picture of a search: the objective over trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report.pictures import make_figure


def draw_trials(
    directory: Path, trials: list[dict[str, Any]], dense: float, objective: str
) -> None:
    """Write search.svg and search.png: every trial, the best so far, and the dense model."""
    done = [(t["number"], t["value"]) for t in trials if t["value"] is not None]
    stopped = [(t["number"], t["reported"][-1]) for t in trials
               if t["value"] is None and t["reported"]]  # fmt: skip
    figure, (axis,) = make_figure(7.5, 3.6, 1)
    if stopped:
        axis.plot(*zip(*stopped, strict=True), "x", color="#9aa5b1", label="stopped early")
    axis.plot(*zip(*done, strict=True), "o", color="#1f6feb", markersize=4, label="trial")
    best = [min(value for _, value in done[: i + 1]) for i in range(len(done))]
    axis.step([n for n, _ in done], best, where="post", color="#d1495b", label="best so far")
    axis.axhline(dense, color="#222", linewidth=0.8, linestyle=":", label="dense")
    worst = sorted(value for _, value in done)[int(0.9 * (len(done) - 1))]
    axis.set_ylim(top=worst + 0.5 * max(worst - dense, 1e-6))
    axis.set_xlabel("trial")
    axis.set_ylabel(objective if objective == "perplexity" else "KL to the dense model, nats")
    axis.legend(frameon=False, fontsize=8, ncols=4)
    directory.mkdir(exist_ok=True)
    figure.savefig(directory / "search.svg", metadata={"Date": None})
    figure.savefig(directory / "search.png", dpi=150)
