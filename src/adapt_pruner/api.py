"""Prune a model in memory: `result = prune(model, tokenizer, sparsity=0.2)`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .data import CalibrationData, load_calibration
from .errors import InvalidSettings, LoadingError, UnsupportedModel, shown
from .files import read_json
from .goal import GOAL_OPTIONS, Goal
from .methods import PruningStep, Work, build_settings, make_settings, method_named
from .model.anatomy import Anatomy, find_anatomy
from .model.edits import Edit, edit_of
from .model.history import History
from .model.memory import own_weights
from .result import PRUNING_FILE, PruningResult, Size, StepRecord
from .settings import AUTO, PruneSettings

if TYPE_CHECKING:
    from .latency import LatencyTable


class Listener:
    """What happens during a run, for progress displays. All methods do nothing by default."""

    def on_start(self, anatomy: Anatomy, target: int) -> None:
        """Called once with the model as it is, and the most that it may have of its resource."""

    def on_progress(self, share: float) -> None: ...
    def on_step(self, step: PruningStep) -> None: ...
    def on_edit(self, edit: Edit, before: Anatomy) -> None:
        """Called before an edit changes the model, whose anatomy is `before`."""


def prune(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    sparsity: float | None = None,
    params: int | None = None,
    calibration: str | Path | CalibrationData | None = None,
    settings: PruneSettings | None = None,
    preset: str | None = None,
    listener: Listener | None = None,
    group: Any = None,
    **options: Any,
) -> PruningResult:
    """Make `model` smaller, in place, to exactly the size named.

    Args:
        model: a supported causal language model of transformers, on any device.
        tokenizer: needed unless `calibration` is a `CalibrationData`, and for `bytes`.
        sparsity: share of the decoder layers' parameters to remove, in [0, 1); or
        params: parameters that the whole model may have; or another target of `Goal` in `options`:
            `bytes` with `quantize`, `kv_bytes`, `speedup`, or `latency` in seconds. All are met at
            or below, by less than one unit (multiple, uniform step, block of a quantised file).
        calibration: text to score on, see `load_calibration`; default: the settings' own.
        settings: all settings at once; or a `preset` and single settings in `options`, `method`
            among them; multiple="auto" chooses by the same times.
        listener: hears of progress.
        group: processes of torch.distributed that each hold the whole model and all make this call:
            they share the calibration windows, the first one decides, all end with the same
            weights, and times come from a file. Default: this process alone.

    Raises:
        AdaptPrunerError: one of its kinds, before anything is changed, except for non-finite
            gradients in a later step.

    Example:
        result = prune(model, tokenizer, sparsity=0.2, calibration="text.jsonl")
        result.save("smaller")
    """
    goal = Goal(sparsity=sparsity, params=params, **_pop_aims(options))
    if settings is not None and options:
        raise InvalidSettings(f"Give `settings` or single ones, not both; got {sorted(options)}.")
    settings = settings or make_settings(preset, **_with_a_number(options))
    _check_in_memory(model)
    here = settings if group is None else None  # several processes would measure several times
    if options.get("multiple") == AUTO:
        times = goal.times(model, here, tokenizer, with_odd=True)
        goal, settings = goal.without_circumstances(), with_multiple(settings, times)
    anatomy = find_anatomy(model, goal.resource(tokenizer, model, here))
    work = _work(anatomy, goal, tokenizer, calibration, settings, group)
    return next(prune_to_sizes(work, tokenizer, listener))


def _with_a_number(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with a multiple that settings can have until it is chosen."""
    return {**options, "multiple": 1} if options.get("multiple") == AUTO else options


def _pop_aims(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options.pop(name) for name in GOAL_OPTIONS & options.keys()}


def with_multiple(settings: PruneSettings, table: LatencyTable) -> PruneSettings:
    """The settings with the multiple that `auto` stands for. Raises InvalidSettings as
    `latency.choose_multiple`."""
    from .latency import choose_multiple

    return build_settings(settings, multiple=choose_multiple(table))


def _work(
    anatomy: Anatomy,
    goal: Goal,
    tokenizer: Any,
    calibration: str | Path | CalibrationData | None,
    settings: PruneSettings,
    group: Any,
) -> Work:
    """What the method is given, if the goal can be met."""
    model: Any = anatomy.model
    goal.check_quantize()
    target = goal.target(settings, anatomy)
    method_named(settings.method).outline(settings, anatomy, target)  # refuses what cannot be met
    if not isinstance(calibration, CalibrationData):
        if calibration is not None:
            settings = settings.model_copy(update={"calibration": str(calibration)})
        calibration = calibration_for(model, tokenizer, settings)
    return Work(model, calibration, (target,), settings, resource=anatomy.resource, group=group)


def _check_in_memory(model: Any) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModel(
            "Some weights are not in memory (device_map has offloaded them, or the model is on the "
            "meta device); pruning needs all of them. Use fewer layers per device or bfloat16."
        )


def prune_to_sizes(
    work: Work, tokenizer: Any = None, listener: Listener | None = None
) -> Iterator[PruningResult]:
    """Run the method and yield a result at every target. The model goes on changing: use or save
    each result before the next is asked for. Raises as `prune`."""
    listener = listener or Listener()
    model: Any = work.model
    _check_in_memory(model)
    own_weights(model)
    anatomy, previous = work.anatomy(), previous_record(model)
    before, widths_before = Size.of(anatomy), anatomy.widths
    history, steps, began = History(anatomy), [], time.perf_counter()

    def on_edit(edit: Edit, now: Anatomy) -> None:
        history.add(edit, now)
        listener.on_edit(edit, now)

    work.on_progress, work.on_edit = listener.on_progress, on_edit
    listener.on_start(anatomy, work.targets[-1])
    layers = list(history.layers)
    for step in method_named(work.settings.method).run(work):
        anatomy = step.anatomy
        if step.step > len(steps):
            steps.append(StepRecord.of(step, layers, len(widths_before)))
            listener.on_step(step)
            layers = list(history.layers)
        if step.target is not None:
            result = PruningResult(
                model=model,
                tokenizer=tokenizer,
                settings=work.settings,
                target=step.target,
                reached=anatomy.amount,
                resource=work.resource,
                before=before,
                after=Size.of(anatomy),
                widths_before=widths_before,
                widths_after=history.aligned(anatomy.widths),
                layers=list(history.layers),
                edits=history.edits,
                steps=list(steps),
                seconds=time.perf_counter() - began,
                previous=previous,
            )
            paused = time.perf_counter()
            yield result
            began += time.perf_counter() - paused  # what is done with a result is not pruning


def calibration_for(model: Any, tokenizer: Any, settings: PruneSettings) -> CalibrationData:
    """Load the calibration text that the settings name, and check that it fits the model."""
    if tokenizer is None:
        raise InvalidSettings("Calibration text needs the model's tokenizer; got None.")
    check_window_length(model.config, settings)
    return load_calibration(
        settings.calibration,
        tokenizer,
        settings.window_length,
        settings.windows,
        text_column=settings.text_column,
        max_documents=settings.max_documents,
        seed=settings.seed,
        redraw=settings.redraw,
        vocab_size=model.get_input_embeddings().weight.shape[0],
    )


def check_window_length(config: Any, settings: PruneSettings) -> None:
    """Raise InvalidSettings if calibration windows are longer than the model reads."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest and settings.window_length > longest:
        raise InvalidSettings(
            f"window_length: the model reads at most {longest} tokens; "
            f"got {settings.window_length}."
        )


def previous_record(model: Any) -> dict[str, Any] | None:
    """The record of the pruning that the model's own directory tells of, if it does."""
    file = Path(getattr(model.config, "_name_or_path", "") or ".") / PRUNING_FILE
    if model.config._name_or_path and file.is_file():
        return read_json(file)
    return None


def replay(model: nn.Module, record: str | Path | dict[str, Any]) -> None:
    """Make the edits of a `pruning.json` again on the model they were made on. Mutates `model`.

    Without refits: the weights that stay are those of `model`.

    Args:
        record: the file, the checkpoint directory that holds it, or its content; of format 2, or of
            format 1, in which earlier versions wrote.

    Raises:
        LoadingError: if the record cannot be read or is of another model.
    """
    if not isinstance(record, dict):
        path = Path(record)
        record = read_json(path / PRUNING_FILE if path.is_dir() else path)
    if not isinstance(record, dict):
        raise LoadingError(f"The record of a pruning must be a JSON object; got {shown(record)}.")
    for edit in [edit_of(entry) for entry in edits_of_record(record)]:
        check_fits(edit, find_anatomy(model))
        edit.apply(model)


def edits_of_record(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the edits in a `pruning.json` of either format."""
    if record.get("format") == 2:
        return record.get("edits", [])
    kinds = {"attention": "kv-groups", "mlp": "neurons"}
    try:
        axes = {
            f"{layer}/{kinds[kind]}": entry
            for layer, entries in record["layers"].items()
            for kind, entry in entries.items()
        }
    except (KeyError, AttributeError, TypeError):
        raise LoadingError(
            f"The record of a pruning is damaged, or of an unknown format: {shown(record)}."
        ) from None
    return [{"edit": "cut", "axes": axes}]


def check_fits(edit: Edit, anatomy: Anatomy) -> None:
    """Raise LoadingError if a cut is of a model with other axes."""
    units = {axis.key: axis.num_units for axis in anatomy.axes}
    for key, keep_U in getattr(edit, "keep", {}).items():
        if units.get(key) != len(keep_U):
            layer, kind = key
            where = f"layer {layer} {kind}" if layer >= 0 else kind
            raise LoadingError(
                f"The record is of another model: {where} has {units.get(key, 'no')} units here, "
                f"and {len(keep_U)} there."
            )
