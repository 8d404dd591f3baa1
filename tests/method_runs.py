"""Runs of Adapt-Pruner on picomodels."""

from __future__ import annotations

from adapt_pruner.allocate.target import resolve_target
from adapt_pruner.data import CalibrationData
from adapt_pruner.methods import Work, make_settings
from adapt_pruner.methods.adapt_pruner import adapt_pruner
from adapt_pruner.model.anatomy import find_anatomy
from picomodels import random_tokens

NEURON = 3 * 64 + 2  # parameters of one neuron of the tiny llama
FEW_STEPS = {"best": {"steps": 3, "tuning_steps": 1}, "paper": {"steps": 10}}


def calibration_for(settings):
    documents = random_tokens(batch=20, length=40, seed=1)
    return CalibrationData(documents, settings.window_length, settings.windows, settings.seed)


def work_for(model, target, settings, calibration=None, **more):
    return Work(model, calibration or calibration_for(settings), (target,), settings, **more)


def prune(model, sparsity, preset="best", on_edit=lambda edit, before: None, **values):
    """Prune to a sparsity with few, short windows. Returns (target, steps)."""
    values = {"windows": 6, "window_length": 8, **FEW_STEPS[preset], **values}
    settings = make_settings(preset, **values)
    target = resolve_target(find_anatomy(model), sparsity, None)
    return target, list(adapt_pruner(work_for(model, target, settings, on_edit=on_edit)))


def widths(model, name="intermediate_size"):
    return [layer.get(name) for layer in find_anatomy(model).widths]
