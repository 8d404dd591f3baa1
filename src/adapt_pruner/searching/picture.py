"""Pictures of a search: quality over trials, and quality over what a model costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..figures import short
from ..report.pictures import make_figure, save_figure, use_log_scale

NAMES = {
    "kl": "KL to the dense model, nats",
    "bytes": "bytes of weights",
    "latency": "latency, share of the dense model's",
}


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
    axis.set_ylabel(NAMES.get(objective, objective))
    axis.legend(frameon=False, fontsize=8, ncols=4)
    directory.mkdir(exist_ok=True)
    save_figure(figure, directory / "search.svg")


def draw_front(
    directory: Path, trials: list[dict[str, Any]], front: list[dict[str, Any]], best: int
) -> None:
    """Write front.svg and front.png: quality over each cost, of all trials and of the front."""
    quality, *costs = [name for name in front[0] if name != "number"]
    done = [trial["objectives"] for trial in trials if trial["objectives"]]
    chosen = next(trial for trial in front if trial["number"] == best)
    figure, axes = make_figure(7.5, 3.2 * len(costs), len(costs), sharex=False)
    for axis, cost in zip(axes, costs, strict=True):
        for points, style in (
            (done, {"marker": "o", "color": "#9aa5b1", "label": "trial"}),
            (front, {"marker": "o", "color": "#1f6feb", "label": "front"}),
            ([chosen], {"marker": "*", "color": "#d1495b", "markersize": 13, "label": "written"}),
        ):
            axis.plot(
                [point[cost] for point in points], [point[quality] for point in points],
                linestyle="none", **style,
            )  # fmt: skip
        if quality == "perplexity":
            use_log_scale(axis)
        axis.xaxis.set_major_formatter(lambda value, _: short(value))
        axis.set_xlabel(NAMES.get(cost, cost))
        axis.set_ylabel(NAMES.get(quality, quality))
    axes[0].legend(frameon=False, fontsize=8, ncols=3)
    directory.mkdir(exist_ok=True)
    save_figure(figure, directory / "front.svg")
