"""A massive activation and an attention sink, as every large language model has, survive a cut."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from adapt_pruner import prune
from adapt_pruner.data import CalibrationData
from picomodels import (
    MASSIVE_LAYER,
    MASSIVE_NEURON,
    logits_of,
    random_tokens,
    share_of_sink,
    starting_with_one,
    with_massive_activation,
)

HELD_OUT = starting_with_one(random_tokens(batch=16, seed=1))


def divergence(model, dense_BTV) -> float:
    own_BTV = logits_of(model, HELD_OUT).log_softmax(-1)
    total = F.kl_div(own_BTV, dense_BTV.log_softmax(-1), reduction="sum", log_target=True)
    return float(total / HELD_OUT.numel())


@pytest.fixture(scope="module")
def model():
    return with_massive_activation()


def test_the_model_is_what_it_says(model):
    inputs = []
    down = model.model.layers[MASSIVE_LAYER].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits_of(model, HELD_OUT)
    handle.remove()
    energy_C = inputs[0].square().sum(dim=(0, 1))
    assert energy_C.argmax() == MASSIVE_NEURON
    assert energy_C.mean() > 1000 * energy_C.median()
    assert inputs[0][:, 1:, MASSIVE_NEURON].abs().max() < 1e-6
    assert share_of_sink(model, HELD_OUT) > 0.9


@pytest.mark.parametrize("sparsity", [0.2, 0.4])
def test_the_defaults_keep_them(model, sparsity):
    dense_BTV = logits_of(model, HELD_OUT)
    found = {}
    for variant in ("best", "uninformed"):
        pruned = copy.deepcopy(model)
        documents = list(starting_with_one(random_tokens(batch=256)))
        options = {"importance": "random", "compensation": "none", "tuning_steps": 0}
        prune(
            pruned,
            sparsity=sparsity,
            calibration=CalibrationData(documents, 12, 64),
            **(options if variant == "uninformed" else {}),
        )
        assert all(torch.isfinite(p).all() for p in pruned.parameters())
        found[variant] = divergence(pruned, dense_BTV)
        if variant == "best":
            assert share_of_sink(pruned, HELD_OUT) > 0.7
            widths = [layer.mlp.down_proj.in_features for layer in pruned.model.layers]
            assert widths[MASSIVE_LAYER] > sum(widths) / len(widths), widths
    assert found["best"] < 0.7 * found["uninformed"]
