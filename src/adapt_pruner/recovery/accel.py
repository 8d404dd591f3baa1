"""Adapt-Accel (arXiv:2502.03460, section 3.2): prune a little, train, and again, to the target."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..claims import claimed
from ..errors import Interrupted, InvalidSettings
from ..goal import CIRCUMSTANCES, TARGETS
from ..methods import make_settings
from ..settings import PruneSettings
from .account import account_of, reason_to_stop
from .finish import write_result
from .launch import make_accelerator, start_trackers
from .materials import gather
from .request import (
    DEFAULTS,
    TRAINING_DATA,
    AccelListener,
    AccelOutcome,
    AccelRequest,
    check_together,
)
from .run import Run
from .settings import RecoverySettings, make_recovery_settings
from .state import CORRECTED, RunDirectory
from .teaching import make_teacher


def accel(
    model: str,
    output: str | Path,
    *,
    data: str,
    tokens: int,
    sparsity: float | None = None,
    params: int | None = None,
    preset: str | None = None,
    settings: PruneSettings | None = None,
    recovery: RecoverySettings | None = None,
    listener: AccelListener | None = None,
    **options: Any,
) -> AccelOutcome:
    """Prune and train a model in turns: `accel("demo", "out", data="pydocs", tokens=10**6, ...)`.

    Args:
        model: a name on the hub, a directory, or "demo".
        output: directory of the run; the result is loaded from it.
        data: training text or a mixture, see `read_mixture`; also the default of `calibration`.
        tokens: to train on in all.
        sparsity, params, preset: as in `prune`; other targets in `options`.
        settings: all settings of pruning at once; or single ones in `options`.
        recovery: all settings of training at once; or single ones in `options`.
        options: fields of `AccelRequest`, `RecoverySettings` or `PruneSettings` by name.

    Raises:
        AdaptPrunerError: one of its kinds, see `run_accel`.
    """
    of_request = {f.name for f in fields(AccelRequest)} & options.keys()
    of_training = RecoverySettings.model_fields.keys() & options.keys()
    of_pruning = options.keys() - of_request - of_training
    parts = ("settings", settings, of_pruning), ("recovery", recovery, of_training)
    for name, whole, single in parts:
        if whole is not None and single:
            raise InvalidSettings(f"Give `{name}` or single ones, not both; got {sorted(single)}.")
    settings = settings or make_settings(preset, **{name: options[name] for name in of_pruning})
    unsaid = DEFAULTS.keys() & type(settings).model_fields.keys() - settings.model_fields_set
    settings = settings.model_copy(update={name: DEFAULTS[name] for name in unsaid})
    request = AccelRequest(
        model=model,
        data=data,
        tokens=tokens,
        sparsity=sparsity,
        params=params,
        settings=settings,
        recovery=recovery or make_recovery_settings(**{n: options[n] for n in of_training}),
        **{name: options[name] for name in of_request},
    )
    return run_accel(request, output, listener)


def run_accel(
    request: AccelRequest, output: str | Path, listener: AccelListener | None = None
) -> AccelOutcome:
    """Prune and train `request.model` in turns and write the result to `output`.

    A run that was killed goes on from its last checkpoint when the same request is made again, and
    ends with the same weights.

    Raises:
        AdaptPrunerError: one of its kinds; what is on disk stays, and can be resumed.
    """
    check_together(request)
    place = RunDirectory(Path(output), request.recipe(), request.overwrite)
    listener, began = listener or AccelListener(), time.perf_counter()
    with ExitStack() as stack:
        accelerator = make_accelerator(request, place.directory, stack)
        place.check(request.sources())
        is_finished, resumes = place.is_finished, bool(place.checkpoints())
        accelerator.wait_for_everyone()  # all have looked before the first one changes something
        if is_finished:
            if accelerator.is_main_process:
                with claimed(place.final):
                    place.settle()
            return AccelOutcome(None, f"'{output}' holds this run already, finished.")
        taught = request
        if request.recovery.teacher_tokens:
            _begin(place, accelerator, stack)
            corrected = run_accel(correction_of(request), place.directory / CORRECTED, listener)
            if not (place.directory / CORRECTED / "run.json").is_file():
                return AccelOutcome(None, f"The teacher is not corrected yet. {corrected.stopped}")
            taught = replace(request, teacher=str(place.directory / CORRECTED))
            accelerator = make_accelerator(request, place.directory, stack)
        materials = gather(taught, accelerator, listener, with_model=not resumes)
        if taught is request:
            _begin(place, accelerator, stack)
        start_trackers(accelerator, request, stack)
        if request.recovery.alpha:
            materials.teacher = make_teacher(taught, materials, place.directory, listener)
        run = Run(request, place, materials, listener, began)
        try:
            return _go_on(run)
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted at step {run.progress.step}. {place.kept()}.") from None


def _begin(place: RunDirectory, accelerator: Accelerator, stack: ExitStack) -> None:
    if accelerator.is_main_process:
        place.begin(stack)
    accelerator.wait_for_everyone()


def correction_of(request: AccelRequest) -> AccelRequest:
    """The training that Minitron gives a teacher before it teaches (arXiv:2408.11796): on the data
    of the run, of nothing but the text, and without a cut."""
    recovery, tokens = request.recovery, request.recovery.teacher_tokens
    assert tokens is not None
    alone = {"phases": 1, "prune_per_phase": None, "alpha": 0.0, "teacher_tokens": None}
    return replace(
        request,
        model=request.teacher or request.model,
        teacher=None,
        tokens=tokens,
        **{**dict.fromkeys((*TARGETS, *CIRCUMSTANCES)), "sparsity": 0.0, "quantize": None},
        settings=make_settings(**_shared_settings(request.settings)),
        recovery=recovery.model_copy(update={**alone, "teacher_top_k": None, "lora_rank": 0}),
        evaluate=None,
        portable=False,
        overwrite=False,
        stop_after=None,
        max_loss=None,
    )


def _shared_settings(settings: PruneSettings) -> dict[str, Any]:
    """Of a method's settings those that say how any model is trained."""
    names = ("seed", "dtype", "device", "gradient_checkpointing")
    return {"calibration": TRAINING_DATA, **{name: getattr(settings, name) for name in names}}


def _go_on(run: Run) -> AccelOutcome:
    """The phases that are left, and the result."""
    while phase := run.next_phase():
        if reason := reason_to_stop(run):
            return AccelOutcome(None, reason)
        run.cut(phase)
        run.train(phase)
        run.close(phase)
    measured = run.convert_to_stored()
    result = account_of(run, measured)
    if run.accelerator.is_main_process:
        write_result(result, run.request, run.place)
    run.accelerator.wait_for_everyone()
    return AccelOutcome(result)
