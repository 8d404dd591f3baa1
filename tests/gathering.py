"""Observers and models of the tests of statistics."""

from __future__ import annotations

import torch

from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.score.collect import Pass, collect
from adapt_pruner.score.distance import LayerDistance
from adapt_pruner.score.observers import Fisher, Gram, UnitGradients, matrices
from picomodels import random_tokens

EVERYTHING = (Fisher, UnitGradients, Gram)
CUT = {"kv-groups", "neurons"}
WINDOWS = random_tokens(batch=5, length=12)
TABLES = (
    (UnitGradients, "absolute"),
    (UnitGradients, "squared"),
    (Gram, "matrix"),
    (Fisher, "squared"),
)


def close(actual, expected, tolerance=1e-4):
    """Equal up to float32 rounding, relative to the largest entry."""
    expected = torch.as_tensor(expected).double()
    limit = tolerance * float(expected.abs().max())
    torch.testing.assert_close(torch.as_tensor(actual).double(), expected, rtol=0, atol=limit)


def observers(kinds):
    """The distances of layers are always wanted."""
    return [LayerDistance(), *(kind() for kind in kinds)]


def prunable_matrices(anatomy):
    return matrices(anatomy.of_kinds(CUT))


def of_weights(kinds):
    return any(kind.needs_weight_gradients for kind in kinds)


def snapshot(model, kinds=EVERYTHING, windows_BT=WINDOWS, **how):
    """Everything that a pass finds, as float64 tensors by name."""
    anatomy = find_anatomy(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    with collect(model, anatomy, windows_BT, observers(kinds), how=Pass(**how)) as found:
        result = {"loss": found.loss, "layer_distance": found[LayerDistance].distance}
        for kind, table in TABLES:
            if kind in kinds:
                for key, value in getattr(found[kind], table).items():
                    result[kind.__name__, table, names.get(key, key)] = value
        if of_weights(kinds):
            for matrix in prunable_matrices(anatomy):
                result["gradient", names[matrix]] = matrix.grad.clone()
    return {name: torch.as_tensor(value).double() for name, value in result.items()}
