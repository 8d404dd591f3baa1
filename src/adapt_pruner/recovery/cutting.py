"""The cut of a phase: what a run takes along when its model changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..api import Listener, prune_to_sizes
from ..methods import Work, method_named
from ..model.anatomy import Anatomy, find_anatomy
from ..model.edits import Edit
from .schedule import Phase
from .teacher import set_aside

if TYPE_CHECKING:
    from .run import Run


def prune_to(phase: Phase, run: Run) -> None:
    """Prune the run's model to the size of the phase, by masks where it has trained some. Moments
    and history follow, and the steps are recorded."""
    request, progress, calibration = run.request, run.progress, run.materials.calibration

    def follow(edit: Edit, before: Anatomy) -> None:
        edit.follow(run.model, run.moments)
        run.history.add(edit, before)

    resource = run.materials.resource
    work = Work(
        run.model,
        calibration.reseeded(request.settings.seed + 7919 * phase.number),
        (min(phase.amount, find_anatomy(run.model, resource).amount),),
        method_named(request.settings.method).in_phase(request.settings, len(run.phases)),
        resource=resource,
        masks=run.masks,
        group=run.processes,
    )
    layers, listener = list(run.history.layers), Following(run.listener.pruning, follow)
    with set_aside(run.materials.teacher):
        result = next(prune_to_sizes(work, run.materials.tokenizer, listener))
    progress.history = run.history.state_dict()
    done = len(progress.pruning_steps)
    for record in result.steps:
        of_source = {
            name: _spread(getattr(record, name), layers, len(progress.first["widths"]))
            for name in ("layer_importance", "layer_distance")
        }
        step = {**asdict(record), **of_source, "step": done + record.step}
        progress.pruning_steps.append(step)


class Following(Listener):
    """Passes a cut on to the display, and changes everything that depends on the model's structure
    with it."""

    def __init__(self, display: Listener, follow: Callable[[Edit, Anatomy], None]):
        self.on_start, self.on_progress = display.on_start, display.on_progress
        self.on_step, self.follow = display.on_step, follow

    def on_edit(self, edit: Edit, before: Anatomy) -> None:
        self.follow(edit, before)


def _spread(values: list[float], layers: list[int], count: int) -> list[float]:
    """Figures of the layers that were left, under their numbers in the source model; 0 for those
    that are gone, and none where none were measured."""
    there = dict(zip(layers, values, strict=False))
    return [there.get(i, 0.0) for i in range(count)] if values else []
