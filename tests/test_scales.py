"""Scales trained on the dense model's predictions and folded into the weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adapt_pruner import prune
from adapt_pruner.compensate.scales import Tuning, dense_states, tune_scales
from adapt_pruner.data import CalibrationData
from adapt_pruner.model.anatomy import find_anatomy
from picomodels import build, random_tokens

WINDOWS = random_tokens(batch=960, length=12)
HELD_OUT = random_tokens(batch=8, length=12, seed=1)


def divergence(model, dense_BTV):
    with torch.no_grad():
        logits_BTV = model(input_ids=HELD_OUT).logits
    own, dense = logits_BTV.float().log_softmax(-1), dense_BTV.float().log_softmax(-1)
    return float(F.kl_div(own, dense, reduction="sum", log_target=True) / HELD_OUT.numel())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_damage_by_scales_is_undone(model_type):
    """Rows and columns of some maps are scaled by random factors: scales can make that good."""
    model = build(model_type).eval()
    with torch.no_grad():
        dense_BTV = model(input_ids=HELD_OUT).logits
    states_BTD = dense_states(model, WINDOWS)
    anatomy = find_anatomy(model)
    generator = torch.Generator().manual_seed(0)
    names = list(model.state_dict())
    with torch.no_grad():
        for axis in anatomy.of_kinds({"neurons"}):
            weight = axis.output.tensor
            weight.mul_(0.6 + 0.8 * torch.rand(weight.shape[1], generator=generator))
    before = divergence(model, dense_BTV)

    tuned = tune_scales(model, anatomy, WINDOWS, states_BTD, Tuning(32, 32, 0.02))

    assert len(tuned.steps) == 29
    assert tuned.is_kept
    assert divergence(model, dense_BTV) < 0.7 * before
    assert list(model.state_dict()) == names
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("why", "how"), [("it is whole", Tuning()), ("the rate is absurd", Tuning(learning_rate=3.0))]
)
def test_scales_that_do_not_help_are_not_kept(why, how):
    model = build("llama").eval()
    states_BTD = dense_states(model, WINDOWS[:16])
    if why == "the rate is absurd":
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = tune_scales(model, find_anatomy(model), WINDOWS[:16], states_BTD, how)
    assert not tuned.is_kept
    assert len(tuned.steps) == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_pruning_with_tuning_predicts_more_like_the_dense_model():
    found = {}
    for steps in (0, 30):
        model = build("llama").eval()
        with torch.no_grad():
            dense_BTV = model(input_ids=HELD_OUT).logits
        calibration = CalibrationData(list(random_tokens(64, 40)), 12, 16)
        prune(model, sparsity=0.4, calibration=calibration, steps=2, tuning_steps=steps)
        found[steps] = divergence(model, dense_BTV)
    assert found[30] < found[0]


@pytest.mark.parametrize(
    ("model_type", "overrides", "cut"),
    [("gemma2", {"final_logit_softcapping": 2.0}, "neurons"), ("llama", {}, "hidden")],
)
def test_tuning_is_left_out_where_the_dense_head_cannot_serve(
    model_type, overrides, cut, monkeypatch
):
    def unexpected(*args, **kwargs):
        raise AssertionError("scales were trained")

    monkeypatch.setattr("adapt_pruner.methods.adapt_pruner.tune_scales", unexpected)
    model = build(model_type, **overrides)
    calibration = CalibrationData(list(random_tokens(8, 40)), 12, 4)
    result = prune(model, sparsity=0.3, calibration=calibration, tuning_steps=3, cut=(cut,))
    assert result.after.total <= result.target
