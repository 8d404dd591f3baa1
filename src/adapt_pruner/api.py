"""Prune a model in memory: `result = prune(model, tokenizer, sparsity=0.2)`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .allocate.chains import check_reachable, resolve_target
from .data import CalibrationData, load_calibration
from .errors import InvalidSettings, LoadingError, UnsupportedModel
from .methods import METHODS, PruningStep
from .methods.adapt_pruner import limits_of
from .model.anatomy import find_anatomy
from .model.edits import cut
from .model.loading import read_json
from .result import PRUNING_FILE, PruningResult, Size, StepRecord
from .settings import PruneSettings, make_settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Listener:
    """What happens during a run, for progress displays. All methods do nothing by default."""

    def on_start(self, total_parameters: int, target: int) -> None: ...
    def on_progress(self, share: float) -> None: ...
    def on_step(self, step: PruningStep) -> None: ...


def prune(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    sparsity: float | None = None,
    params: int | None = None,
    calibration: str | Path | CalibrationData | None = None,
    settings: PruneSettings | None = None,
    preset: str = "best",
    listener: Listener | None = None,
    group: ProcessGroup | None = None,
    **overrides: Any,
) -> PruningResult:
    """Make `model` smaller, in place, to exactly the size named.

    Args:
        model: a supported causal language model of transformers, on any device.
        tokenizer: needed unless `calibration` is a `CalibrationData`.
        sparsity: share of the decoder layers' parameters to remove, in [0, 1); or
        params: parameters that the whole model may have. Either is met at or below, by less than
            one unit (one multiple or one uniform step, where those are asked for).
        calibration: text to score on, see `load_calibration`; default: the settings' own.
        settings: all settings at once; or a `preset` and single settings as keywords.
        listener: hears of progress.
        group: processes of torch.distributed that each hold the whole model and all make this call:
            they share the calibration windows, the first one decides, and all end with the same
            weights. None: this process alone, whatever else is initialised.

    Raises:
        AdaptPrunerError: one of its kinds, before anything is changed, except for non-finite
            gradients in a later step.

    Example:
        result = prune(model, tokenizer, sparsity=0.2, calibration="text.jsonl")
        result.save("smaller")
    """
    listener = listener or Listener()
    if settings is not None and overrides:
        raise InvalidSettings(f"Give `settings` or single ones, not both; got {sorted(overrides)}.")
    settings = settings or make_settings(preset, **overrides)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedModel(
            "Some weights are not in memory (device_map has offloaded them, or the model is on the "
            "meta device); pruning needs all of them. Use fewer layers per device or bfloat16."
        )
    anatomy = find_anatomy(model)
    target = resolve_target(anatomy, sparsity, params)
    check_reachable(anatomy, target, limits_of(settings, anatomy))
    if not isinstance(calibration, CalibrationData):
        if calibration is not None:
            settings = settings.model_copy(update={"calibration": str(calibration)})
        calibration = calibration_for(model, tokenizer, settings)
    before, widths_before = Size.of(anatomy), anatomy.widths
    original = {group.key: torch.arange(group.num_units) for group in anatomy.groups}
    steps, began = [], time.perf_counter()
    listener.on_start(before.total, target)
    method = METHODS[settings.method]
    for step in method(model, calibration, target, settings, listener.on_progress, group):
        for key, kept_U in step.kept.items():
            original[key] = original[key][kept_U]
        anatomy = step.anatomy
        steps.append(
            StepRecord(
                step.step,
                anatomy.total_parameters,
                step.loss,
                step.layer_importance,
                step.layer_distance,
                anatomy.widths,
                step.seconds,
            )
        )
        listener.on_step(step)
    return PruningResult(
        model=model,
        tokenizer=tokenizer,
        settings=settings,
        target=target,
        before=before,
        after=Size.of(anatomy),
        widths_before=widths_before,
        widths_after=anatomy.widths,
        kept=original,
        steps=steps,
        seconds=time.perf_counter() - began,
        previous=previous_record(model),
    )


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
    """Make the cut of a `pruning.json` again on the model it was made on. Mutates `model`.

    Without the refit: the weights that stay are those of `model`.

    Args:
        record: the file, the checkpoint directory that holds it, or its content.

    Raises:
        LoadingError: if the record cannot be read or is of another model.
    """
    if not isinstance(record, dict):
        path = Path(record)
        record = read_json(path / PRUNING_FILE if path.is_dir() else path)
    if not isinstance(record, dict):
        raise LoadingError(f"The record of a pruning must be a JSON object; got {record!r:.60}.")
    anatomy = find_anatomy(model)
    keep = {}
    for group in anatomy.groups:
        entry = record.get("layers", {}).get(str(group.layer), {}).get(group.kind)
        if entry is None or entry["units"] != group.num_units:
            raise LoadingError(
                f"The record is of another model: {group} has {group.num_units} units here, and "
                f"{entry['units'] if entry else 'none'} there."
            )
        mask = torch.zeros(group.num_units, dtype=torch.bool)
        mask[torch.tensor(entry["kept"], dtype=torch.int64)] = True
        keep[group.key] = mask
    cut(model, anatomy, keep)
