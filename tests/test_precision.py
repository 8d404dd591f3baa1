"""Devices without float64 (mps): nothing in float64 is made on them. The CPU plays such a device:
whatever is computed in float64 must come from `in_float64`, which leaves a real one for the CPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapt_pruner import CalibrationData, find_anatomy, precision
from adapt_pruner.compensate import refit
from adapt_pruner.score import collect, distance, gram, head, importance, observers
from picomodels import build, random_tokens

perplexity: Any = import_module("adapt_pruner.evaluation.perplexity")
RESULTS = torch.ops.aten.zeros.default
"""Makes the table of results, on the CPU wherever the model is."""


def is_float64(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


class NoFloat64(TorchDispatchMode):
    """Refuses what turns other numbers into float64, outside of `in_float64`."""

    def __init__(self):
        super().__init__()
        self.allowed = False

    def in_float64(self, tensor: torch.Tensor) -> torch.Tensor:
        self.allowed = True
        try:
            return tensor.double()
        finally:
            self.allowed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.allowed and any(map(is_float64, tree_leaves(result))):
            made = any(map(is_float64, tree_leaves((args, kwargs))))
            assert made or func is RESULTS, f"{func} makes float64"
        return result


@pytest.fixture
def no_float64(monkeypatch) -> NoFloat64:
    mode = NoFloat64()
    watched = (precision, collect, distance, gram, head, importance, observers, refit, perplexity)
    for module in watched:
        if hasattr(module, "in_float64"):
            monkeypatch.setattr(module, "in_float64", mode.in_float64)
    return mode


@pytest.mark.parametrize("name", list(importance.IMPORTANCES))
@pytest.mark.parametrize("ridge", [0.01, 1e-4])
def test_scores_and_refit(name, ridge, no_float64):
    model = build("llama", torch.float32)
    windows = CalibrationData(random_tokens(10, 20), window_length=12, num_windows=4).draw()
    chosen, anatomy = importance.IMPORTANCES[name], find_anatomy(model)
    kinds = [kind for kind in chosen.needs if kind is not observers.Gram]
    watching = [distance.LayerDistance(), observers.Gram(ridge), *(kind() for kind in kinds)]
    axes = anatomy.of_kinds({"kv-groups", "neurons"})
    with no_float64, collect.collect(model, anatomy, windows, watching) as statistics:
        scores = {axis.key: chosen.score(axis, statistics, 0) for axis in axes}
        keep = {key: score_U > score_U.median() for key, score_U in scores.items()}
        refit.refit_outputs(axes, keep, statistics[observers.Gram])
    assert {score_U.dtype for score_U in scores.values()} == {torch.float32}


def test_perplexity(no_float64):
    model = build("llama", torch.float32)
    windows = [(tokens.tolist(), len(tokens) - 1) for tokens in random_tokens(4, 20)]
    with no_float64:
        losses = perplexity.window_losses(model, windows, 2, lambda done, total: None)
    assert losses.dtype == torch.float64


def test_a_device_without_float64_leaves_it_to_the_cpu():
    class OnMps:
        device = torch.device("mps")

        def cpu(self) -> torch.Tensor:
            return torch.ones(2)

    there: Any = OnMps()
    assert torch.equal(precision.in_float64(there), torch.ones(2, dtype=torch.float64))
