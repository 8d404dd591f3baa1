"""Minitron: scores worked out by hand, shapes of exactly the target's size, models that load."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from adapt_pruner import prune
from adapt_pruner.allocate.shapes import ShapeLimits, Shapes, keep_of, parse_shape
from adapt_pruner.errors import InvalidSettings, InvalidTarget
from adapt_pruner.methods.minitron import ActivationNorms, calibration_loss, unit_scores
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.score.collect import Pass, collect
from adapt_pruner.score.distance import LayerDistance
from picomodels import PICO, build, logits_of, random_tokens

TOKENS = random_tokens(batch=6, length=12)
FEW = {"windows": 8, "search_windows": 4, "candidates": 3, "method": "minitron"}
KINDS = ("neurons", "kv-groups", "query-heads", "hidden", "layers")


def observe(model, micro_batch_size=None):
    anatomy = find_anatomy(model)
    axes = anatomy.of_kinds(KINDS)
    norms, distance = ActivationNorms(), LayerDistance()
    how = Pass(micro_batch_size)
    with collect(model, anatomy, TOKENS, [norms, distance], axes=axes, how=how):
        return axes, unit_scores(axes, norms, distance)


@torch.no_grad()
def scores_by_hand(model):
    """Straight from the paper, window by window, by running the layers' own modules in order."""
    layers, trunk = model.model.layers, model.model
    squares = {}

    def add(name, x_TC):
        mean_C = x_TC.abs().mean(dim=0)
        squares[name] = squares.get(name, 0) + mean_C**2

    influence = [0.0] * len(layers)
    for window in TOKENS:
        x = trunk.embed_tokens(window)[None]
        angles = trunk.rotary_emb(x, torch.arange(12)[None])
        for i, layer in enumerate(layers):
            entered = x
            normed = layer.input_layernorm(x)
            add(("norm", i, 0), normed[0])
            attention, seen = layer.self_attn, []
            handle = attention.o_proj.register_forward_pre_hook(
                lambda module, args, seen=seen: seen.append(args[0])
            )
            x = x + attention(normed, position_embeddings=angles, attention_mask=None)[0]
            handle.remove()
            add(("heads", i), seen[0][0])
            normed = layer.post_attention_layernorm(x)
            add(("norm", i, 1), normed[0])
            mlp = layer.mlp
            inner = F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
            add(("neurons", i), inner[0])
            x = x + mlp.down_proj(inner)
            influence[i] += float(1 - F.cosine_similarity(entered, x, dim=-1).mean()) / len(TOKENS)
    found = {(-1, "hidden"): sum(squares[key].sqrt() for key in squares if key[0] == "norm")}
    for i in range(len(layers)):
        channels = squares["heads", i].sqrt()
        found[i, "neurons"] = squares["neurons", i].sqrt()
        found[i, "query-heads"] = channels.view(8, 8).norm(dim=1)
        found[i, "kv-groups"] = channels.view(4, 16).norm(dim=1)
        found[i, "layers"] = torch.tensor([influence[i]])
    return found


def test_scores_equal_those_worked_out_by_hand():
    model = build("llama", attn_implementation="eager")
    model.set_attn_implementation("sdpa")  # causal without a mask
    expected = scores_by_hand(model)
    axes, scores = observe(model)
    assert {axis.key for axis in axes} == set(expected)
    for key, score in scores.items():
        torch.testing.assert_close(score.double(), expected[key].double(), rtol=1e-4, atol=1e-6)


def test_scores_of_a_worked_number():
    """Two windows, with |x| of mean 3 and 4 over the tokens: 5."""
    observer = ActivationNorms()
    table: dict = {}
    observer._see(table, 0)(torch.tensor([[[2.0], [-4.0]], [[-4.0], [4.0]]]))
    assert table[0].sqrt().tolist() == [5.0]


@pytest.mark.parametrize("model_type", PICO)
def test_scores_do_not_depend_on_the_micro_batch(model_type):
    model = build(model_type, torch.float32)
    _, all_at_once = observe(model)
    _, one_by_one = observe(model, micro_batch_size=1)
    for key, score in all_at_once.items():
        assert torch.isfinite(score).all()
        torch.testing.assert_close(score, one_by_one[key], rtol=1e-4, atol=1e-5)


def test_a_silent_neuron_and_an_idle_layer_go_first():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] = 0
        model.model.layers[1].mlp.up_proj.bias[7] = 0
        for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            linear.weight.zero_()
            linear.bias.zero_()
    _, scores = observe(model)
    assert scores[1, "neurons"].argmin() == 7
    assert float(scores[2, "layers"]) == pytest.approx(0, abs=1e-6)
    assert all(float(scores[i, "layers"]) > 0.01 for i in (0, 1))


def test_query_heads_leave_every_group_at_once():
    axes = find_anatomy(build("llama")).of_kinds({"query-heads"})[:1]
    score = torch.tensor([1.0, 2.0, 4.0, 3.0, 6.0, 5.0, 7.0, 8.0])
    keep = keep_of(axes, {axes[0].key: score}, {axes[0].key: 1})
    assert keep[axes[0].key].tolist() == [False, True, True, False, True, False, False, True]


def test_the_loss_is_that_of_a_forward_pass():
    model = build("llama")
    found = calibration_loss(model, TOKENS, Pass(4))
    predicted_NV = logits_of(model, TOKENS)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(predicted_NV, TOKENS[:, 1:].flatten())
    assert found == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("model_type", PICO)
def test_models_of_the_target_size_are_plain_and_load(model_type, calibration, tmp_path):
    model = build(model_type, torch.float32)
    neuron = sum(axis.unit_cost for axis in find_anatomy(model).of_kinds({"neurons"}))
    result = prune(model, calibration=calibration, sparsity=0.35, **FEW)
    assert 0 <= result.target - model.num_parameters() < neuron
    assert not model.config.is_heterogeneous  # every tool reads it
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(model, TOKENS))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompt = random_tokens(batch=1, length=5)
    cached = loaded.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, loaded.generate(prompt, use_cache=False, **options))


def test_the_best_of_the_shapes_tried_is_taken(calibration, monkeypatch):
    from adapt_pruner.methods import minitron

    losses = iter([3.0, 1.0, 2.0])
    tried = []

    def loss_after(work, keep, windows):
        tried.append(keep)
        return next(losses)

    monkeypatch.setattr(minitron, "_loss_after", loss_after)
    result = prune(build("llama", torch.float32), calibration=calibration, sparsity=0.35, **FEW)
    best = result.edits[0].keep  # a history names what it merged
    assert len(tried) == 3
    assert all(torch.equal(best[key], mask) for key, mask in tried[1].items() if key in best)


def test_a_given_shape_is_met(calibration):
    model = build("llama", torch.float32)
    shape = "hidden=48, layers=2, kv-heads=2, heads=4"
    result = prune(model, calibration=calibration, params=36_000, shape=shape,
                   max_width_pruning=0.99, **FEW)  # fmt: skip
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers) == (48, 2)
    assert (config.num_key_value_heads, config.num_attention_heads) == (2, 4)
    assert 0 <= result.target - model.num_parameters() < 2 * (3 * 48 + 2)


def test_a_whole_shape_has_to_be_the_target(calibration):
    shape = "hidden=48,layers=2,intermediate=64,kv-heads=2,heads=4"
    with pytest.raises(InvalidTarget, match="has 40,752 parameters, and the target is 20,000"):
        prune(build("llama"), calibration=calibration, params=20_000, shape=shape, **FEW)
    model = build("llama", torch.float32)
    prune(model, calibration=calibration, params=40_752, shape=shape, **FEW)
    assert (model.num_parameters(), model.config.intermediate_size) == (40_752, 64)


def test_widths_are_multiples_on_request():
    anatomy = find_anatomy(build("mistral"))
    limits = ShapeLimits(frozenset({"neurons", "hidden"}), multiple=16)
    for shape in Shapes.of(anatomy, limits).fitting(anatomy.total_parameters * 7 // 10, [0, 1, 2]):
        assert shape["hidden"] % 16 == 0
        assert shape["neurons"] % 16 == 0


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"shape": "hiden=3"}, InvalidSettings, "no 'hiden' in a shape. Did you mean 'hidden'"),
        ({"shape": "hidden=x"}, InvalidSettings, "reads hidden=512,layers=24; got 'hidden=x'"),
        (
            {"shape": "heads=5"},
            InvalidSettings,
            "a multiple of the 4 KV heads; got 5",
        ),
        ({"shape": "hidden=65"}, InvalidSettings, "this model has hidden=64; got 65"),
        ({"cut": ("hidden",)}, InvalidSettings, "got hidden. Add neurons"),
        ({"cut": ("neurons", "sublayers")}, InvalidSettings, "got sublayers"),
        ({"protect_layers": (0,)}, InvalidSettings, r"must be empty; got \[0\]"),
        ({"layout": "per-layer"}, InvalidSettings, "layout"),
        ({"max_width_pruning": 0.01, "max_depth_pruning": 0}, InvalidTarget, "No uniform shape"),
    ],
)
def test_bad_settings_change_nothing(values, error, match, calibration):
    model = build("llama", torch.float32)
    count = model.num_parameters()
    with pytest.raises(error, match=match):
        prune(model, calibration=calibration, sparsity=0.3, **{**FEW, **values})
    assert model.num_parameters() == count


def test_layers_that_differ_are_refused(calibration):
    model = build("llama", torch.float32)
    prune(model, calibration=calibration, sparsity=0.2, steps=2)
    with pytest.raises(InvalidTarget, match="needs layers of equal"):
        prune(model, calibration=calibration, sparsity=0.2, **FEW)


def test_a_shape_is_read():
    assert parse_shape("hidden=8, kv-heads=2") == {"hidden": 8, "kv-heads": 2}
    assert parse_shape("") == {}
