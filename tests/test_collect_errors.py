"""What is not finite is an error that names its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapt_pruner.errors import NonFiniteError
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.score.collect import collect
from adapt_pruner.score.distance import LayerDistance
from adapt_pruner.score.observers import Fisher, Gram, UnitGradients, WeightGradients
from gathering import (
    WINDOWS,
    observers,
)
from model_states import state_of
from picomodels import build

# --- unsound models ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kinds", [(WeightGradients,), (UnitGradients,), (Gram,)])
@pytest.mark.parametrize("where", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
def test_weights_that_are_not_finite_are_an_error(value, kinds, where):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].get_submodule(where).weight[0, 0] = value
    before = state_of(model)
    with (
        pytest.raises(NonFiniteError, match=r"NaN|nan"),
        collect(model, find_anatomy(model), WINDOWS, observers(kinds)),
    ):
        pytest.fail("scores of a broken model")
    after = state_of(model)
    assert after["training"] == before["training"]
    assert after["hooks"] == before["hooks"]


def test_the_error_names_the_layer_that_breaks():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with (
        pytest.raises(NonFiniteError, match="layer 1"),
        collect(model, find_anatomy(model), WINDOWS, [LayerDistance()]),
    ):
        pass


def test_a_loss_that_is_not_finite_is_an_error():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with (
        pytest.raises(NonFiniteError, match=r"loss on the calibration text is nan"),
        collect(model, find_anatomy(model), WINDOWS, [UnitGradients()]),
    ):
        pytest.fail("scores of a broken model")


class SquareRoot(nn.Module):
    """Finite, with a gradient that is not: below zero it is 0 times that of a root, NaN."""

    def forward(self, x):
        return torch.where(x > 0, x.sqrt(), 0)


@pytest.mark.parametrize("kinds", [(WeightGradients,), (Fisher,), (UnitGradients,)])
def test_gradients_that_are_not_finite_are_an_error(kinds):
    model = build("llama")
    model.model.layers[1].mlp.act_fn = SquareRoot()
    with collect(model, find_anatomy(model), WINDOWS, [Gram()]):
        pass  # without gradients the model is sound
    with (
        pytest.raises(NonFiniteError, match=r"gradient in layer \d"),
        collect(model, find_anatomy(model), WINDOWS, observers(kinds)),
    ):
        pytest.fail("scores from broken gradients")
