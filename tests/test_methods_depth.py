"""Depth pruning, beside a slow and direct transcription of ShortGPT and SLEB.

The transcription shares nothing with the library: layers are taken out of a copy, one by one.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adapt_pruner import CalibrationData, accel, prune
from adapt_pruner.errors import InvalidSettings, InvalidTarget
from adapt_pruner.methods.depth import silence
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.architectures import ARCHITECTURES
from adapt_pruner.model.edits import Cut
from picomodels import PICO, build, logits_of, random_tokens

LAYERS = 6
SIZES = {"num_hidden_layers": LAYERS, "intermediate_size": 24}
TOKENS = random_tokens()


@pytest.fixture
def model():
    """Layers of unlike weight, so that they influence the stream unequally."""
    model = build("llama", **SIZES)
    with torch.no_grad():
        for factor, layer in zip((1.0, 0.2, 0.7, 0.4, 0.3, 1.1), model.model.layers, strict=True):
            layer.self_attn.o_proj.weight *= factor
            layer.mlp.down_proj.weight *= factor**0.5
    return model


@pytest.fixture(scope="module")
def windows():
    return CalibrationData(random_tokens(12, 20), window_length=10, num_windows=6, redraw=False)


def streams_of(model, tokens_BT):
    """Per layer: the residual stream before it, after its attention, and after it."""
    found = []

    def hook(layer, args, output):
        x = args[0]
        positions = torch.arange(x.shape[1])[None]
        attended, _ = layer.self_attn(
            layer.input_layernorm(x),
            position_embeddings=model.model.rotary_emb(x, positions),
            attention_mask=None,
        )
        found.append((x, x + attended, output[0] if isinstance(output, tuple) else output))

    handles = [layer.register_forward_hook(hook) for layer in model.model.layers]
    logits_of(model, tokens_BT)
    for handle in handles:
        handle.remove()
    return found


def influence(before, after):
    """1 - mean of x . y / (|x| |y|), token by token."""
    cosines = [
        (x @ y / (x.norm() * y.norm())).item()
        for x, y in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)
    ]
    return 1 - sum(cosines) / len(cosines)


def without(model, gone):
    """A copy without some layers."""
    smaller = deepcopy(model)
    smaller.model.layers = nn.ModuleList(
        layer for i, layer in enumerate(smaller.model.layers) if i not in gone
    )
    return smaller


def removed_by(result):
    return {key for key, units in result.kept.items() if len(units) == 0}


def loss_of(model, tokens_BT):
    logits = logits_of(model, tokens_BT)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).item()


@pytest.mark.parametrize("count", [1, 3])
def test_the_layers_of_least_block_influence_go(model, windows, count):
    streams = streams_of(model, windows.draw())
    scores = [influence(before, after) for before, _, after in streams]
    gone = sorted(range(LAYERS), key=lambda i: scores[i])[:count]
    left = without(model, gone)
    result = prune(model, params=left.num_parameters(), calibration=windows, method="depth")
    assert result.layers == [i for i in range(LAYERS) if i not in gone]
    assert torch.equal(logits_of(model, TOKENS), logits_of(left, TOKENS))


def test_the_sublayers_of_least_influence_go(model, windows):
    streams = streams_of(model, windows.draw())
    scores = {}
    for i, (before, between, after) in enumerate(streams):
        scores[i, "attention"] = influence(before, between)
        scores[i, "mlp"] = influence(between, after)
    gone = sorted(scores, key=scores.__getitem__)[:5]
    assert {kind for _, kind in gone} == {"attention", "mlp"}
    left = deepcopy(model)
    with torch.no_grad():
        for i, kind in gone:
            layer = left.model.layers[i]
            output = layer.self_attn.o_proj if kind == "attention" else layer.mlp.down_proj
            for tensor in output.parameters():
                tensor.zero_()
    costs = {axis.key: axis.unit_cost for axis in find_anatomy(model).axes}
    params = model.num_parameters() - sum(costs[key] for key in gone)
    result = prune(model, params=params, calibration=windows, method="depth", cut=("sublayers",))
    assert result.after.total == params
    whole = {i for i, kind in gone if {(i, "attention"), (i, "mlp")} <= set(gone)}
    expected = {(i, "layers") if i in whole else (i, kind) for i, kind in gone}
    assert removed_by(result) == expected
    torch.testing.assert_close(logits_of(model, TOKENS), logits_of(left, TOKENS))


def test_the_greedy_search_is_the_published_one(model, windows):
    tokens_BT, gone = windows.draw(), []
    for _ in range(3):
        losses = {
            i: loss_of(without(model, [*gone, i]), tokens_BT)
            for i in range(1, LAYERS - 1)
            if i not in gone
        }
        gone.append(min(losses, key=losses.__getitem__))
    left = without(model, gone)
    dense = loss_of(model, tokens_BT)
    result = prune(
        model, params=left.num_parameters(), calibration=windows, method="depth", preset="sleb",
        windows=6, window_length=10,
    )  # fmt: skip
    assert result.layers == [i for i in range(LAYERS) if i not in gone]
    assert result.steps[0].loss == pytest.approx(dense)
    assert torch.equal(logits_of(model, TOKENS), logits_of(left, TOKENS))


@pytest.mark.parametrize("cut", [("layers",), ("sublayers",), ("layers", "sublayers")])
@pytest.mark.parametrize("criterion", ["block-influence", "perplexity"])
@pytest.mark.parametrize("sparsity", [0.05, 0.45, 0.8])
def test_none_that_went_fits_into_what_is_below_the_target(
    model, windows, cut, criterion, sparsity
):
    costs = {axis.key: axis.unit_cost for axis in find_anatomy(model).axes}
    result = prune(
        model, sparsity=sparsity, calibration=windows, method="depth", cut=cut, criterion=criterion
    )
    parts = {
        (i, part)
        for i, kind in removed_by(result)
        for part in (["attention", "mlp"] if kind == "layers" and cut != ("layers",) else [kind])
    }
    assert 0 <= result.target - result.after.total < min(costs[key] for key in parts)
    assert model.num_parameters() == result.after.total


@pytest.mark.parametrize("model_type", PICO)
def test_a_layer_that_does_nothing_goes_first_and_changes_nothing(model_type, windows):
    model, names = build(model_type), ARCHITECTURES[model_type]
    idle = 2 if model_type == "lfm2" else 1
    layer = model.get_submodule(names.layers)[idle]
    with torch.no_grad():
        for path in (f"{names.attention}.{names.attention_output}", names.mlp_output):
            for tensor in layer.get_submodule(path).parameters():
                tensor.zero_()
    before = logits_of(model, TOKENS)
    result = prune(model, sparsity=0.1, calibration=windows, method="depth")
    assert result.layers == [i for i in range(3) if i != idle]
    torch.testing.assert_close(logits_of(model, TOKENS), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", PICO)
def test_what_the_search_silences_is_as_good_as_gone(model_type):
    model = build(model_type)
    keys = {(0, "mlp"), (1, "layers")}
    axes = [axis for axis in find_anatomy(model).axes if axis.key in keys]
    handles = [silence(site) for axis in axes for site in axis.sites]
    silent = logits_of(model, TOKENS)
    for handle in handles:
        handle.remove()
    Cut({key: torch.zeros(1, dtype=torch.bool) for key in keys}).apply(model)
    torch.testing.assert_close(logits_of(model, TOKENS), silent, rtol=1e-6, atol=1e-6)


def test_layers_that_are_named_go_without_a_target(model, windows):
    left = without(model, [1, 5])
    result = prune(model, calibration=windows, method="depth", layers=(1, -1))
    assert result.layers == [0, 2, 3, 4]
    assert result.target == result.after.total == left.num_parameters()
    assert torch.equal(logits_of(model, TOKENS), logits_of(left, TOKENS))


def test_phases_of_recovery_that_lose_layers(llama, text_file, tmp_path):
    result = accel(
        str(llama), tmp_path / "run", method="depth", sparsity=0.6, phases=2, tokens=1000,
        alpha=0.0, data=str(text_file), calibration=str(text_file), windows=4, window_length=12,
        sequence_length=16, batch_tokens=64, moments="carry",
    ).result  # fmt: skip
    assert result is not None
    assert len(result.layers) == 1
    assert [len(step.layer_importance) for step in result.steps] == [3, 3]


@pytest.mark.parametrize(
    ("error", "settings", "message"),
    [
        (InvalidSettings, {"layers": (6,)}, "layers: the model has layers 0 to 5; got 6"),
        (InvalidSettings, {"layers": tuple(range(6))}, "one has to stay"),
        (InvalidSettings, {"layers": (1,), "protect_layers": (1,)}, "cannot both go and stay"),
        (InvalidSettings, {"layers": (1,), "cut": ("sublayers",)}, "cut must be layers; got sub"),
        (InvalidSettings, {"cut": ("neurons",), "sparsity": 0.1}, "depth cuts layers, sublayers"),
        (InvalidSettings, {"metric": "IFV", "sparsity": 0.1}, "a setting of flap, not of depth"),
        (InvalidTarget, {"layers": (1,), "sparsity": 0.5}, "Without layers 1 the model has"),
        (InvalidTarget, {"sparsity": 0.9}, "below what is possible"),
        (InvalidTarget, {}, "Give the target once"),
    ],
)
def test_bad_settings(model, windows, error, settings, message):
    with pytest.raises(error, match=message):
        prune(model, calibration=windows, method="depth", **settings)
    assert len(model.model.layers) == LAYERS
