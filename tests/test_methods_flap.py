"""FLAP, beside a slow and direct transcription of its paper and published code.

The transcription shares nothing with the library: all activations at once, dense algebra.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapt_pruner import CalibrationData, prune
from adapt_pruner.errors import InvalidSettings, InvalidTarget
from adapt_pruner.methods.flap import Fluctuation
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.edits import AddBias, Cut
from adapt_pruner.score.collect import Pass, collect
from picomodels import build, logits_of, random_tokens

LAYERS, HEADS, KV, WIDTH, HEAD, HIDDEN = 3, 8, 4, 24, 8, 64
SIZES = {"intermediate_size": WIDTH, "attention_bias": False, "mlp_bias": False}
ATTENTION, MLP = "self_attn.o_proj", "mlp.down_proj"
TOKENS = random_tokens()


@pytest.fixture
def model():
    return build("llama", **SIZES)


@pytest.fixture(scope="module")
def windows():
    return CalibrationData(random_tokens(12, 20), window_length=10, num_windows=30, redraw=False)


def inputs_of(model, tokens_BT):
    """(layer, path) -> (N, C): all that the output projections read."""
    found = {}
    handles = [
        model.get_submodule(f"model.layers.{i}.{path}").register_forward_hook(
            lambda module, args, output, key=(i, path): found.update({key: args[0].flatten(0, 1)})
        )
        for i in range(LAYERS)
        for path in (ATTENTION, MLP)
    ]
    logits_of(model, tokens_BT)
    for handle in handles:
        handle.remove()
    return found


def metric_of(weight, x_NC, metric):
    """(C,): equation of the paper for each, channel by channel."""
    count = len(x_NC)
    variance = ((x_NC - x_NC.mean(0)) ** 2).sum(0) / (count - 1)
    if metric == "IFV":
        return variance
    if metric == "WIFV":
        return variance * torch.stack([weight[:, j].pow(2).sum() for j in range(weight.shape[1])])
    return torch.stack(
        [(weight[:, j].abs() * x_NC[:, j].pow(2).mean().sqrt()).mean() for j in range(len(x_NC.T))]
    )


def published_scores(model, inputs, metric, is_adaptive):
    """(layer, path) -> score of every KV group, or neuron."""
    scores = {}
    for (i, path), x_NC in inputs.items():
        weight = model.get_submodule(f"model.layers.{i}.{path}").weight.detach()
        channels = metric_of(weight, x_NC, metric)
        size = 1
        if path == ATTENTION:
            channels, size = channels**2, HEADS // KV * HEAD
        if is_adaptive:
            channels = (channels - channels.mean()) / channels.std()
            scores[i, path] = channels.view(-1, size).mean(1)
        else:
            scores[i, path] = channels.view(-1, size).sum(1)
    return scores


def lowest_of_all(scores, count):
    """Masks of what stays without the `count` lowest of all units."""
    threshold = torch.cat(list(scores.values())).sort().values[count - 1]
    return {key: of > threshold for key, of in scores.items()}


def lowest_of_each(scores, counts):
    """Masks of what stays without so many of the lowest in each layer, by kind."""
    return {(i, path): of.argsort().argsort() >= counts[path] for (i, path), of in scores.items()}


def expected(model, inputs, keep, bias=True):
    """Parameters of the decoder layers after the published cut."""
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for (i, path), kept in keep.items():
        base = f"model.layers.{i}."
        size = 1 if path == MLP else HEADS // KV * HEAD
        columns = kept.repeat_interleave(size)
        weight = state[f"{base}{path}.weight"]
        mean = inputs[i, path].mean(0)
        if bias and not kept.all():
            state[f"{base}{path}.bias"] = (mean * ~columns) @ weight.T
        state[f"{base}{path}.weight"] = weight[:, columns]
        if path == MLP:
            rows = {"mlp.gate_proj": columns, "mlp.up_proj": columns}
        else:
            kv = kept.repeat_interleave(HEAD)
            rows = {"self_attn.q_proj": columns, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        for name, those in rows.items():
            state[f"{base}{name}.weight"] = state[f"{base}{name}.weight"][those]
    return state


def check(model, state, windows, **settings):
    size = sum(tensor.numel() for tensor in state.values())
    result = prune(model, params=size, calibration=windows, method="flap", **settings)
    assert model.num_parameters() == size
    found = dict(model.named_parameters())
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(found[name].detach(), tensor, rtol=1e-9, atol=1e-12)
    return result


@pytest.mark.parametrize("metric", ["WIFV", "IFV", "WIFN"])
@pytest.mark.parametrize("count", [45, 5])  # of 5 units, some projections lose none
def test_one_ranking_of_all_is_the_published_one(model, windows, metric, count):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[:HEAD] *= 0.01
    inputs = inputs_of(model, windows.draw())
    keep = lowest_of_all(published_scores(model, inputs, metric, is_adaptive=True), count)
    untouched = sum(bool(kept.all()) for kept in keep.values())
    assert all(kept.any() for kept in keep.values())
    assert untouched if count == 5 else not keep[1, ATTENTION][0]
    result = check(model, expected(model, inputs, keep), windows, metric=metric)
    biases = [edit for edit in result.edits if isinstance(edit, AddBias)]
    added = sum(len(names) for edit in biases for names in edit.linears.values())
    assert added == len(keep) - untouched


@pytest.mark.parametrize("metric", ["WIFV", "IFV", "WIFN"])
def test_equal_shares_are_the_published_ones(model, windows, metric):
    inputs = inputs_of(model, windows.draw())
    scores = published_scores(model, inputs, metric, is_adaptive=False)
    keep = lowest_of_each(scores, {ATTENTION: KV // 2, MLP: WIDTH // 2})
    check(model, expected(model, inputs, keep), windows, metric=metric, structure="UL-UM")


def test_a_given_number_of_heads_over_all_layers(model, windows):
    inputs = inputs_of(model, windows.draw())
    scores = published_scores(model, inputs, "WIFV", is_adaptive=True)
    heads = lowest_of_all({key: of for key, of in scores.items() if key[1] == ATTENTION}, 5)
    neurons = lowest_of_all({key: of for key, of in scores.items() if key[1] == MLP}, 17)
    assert all(kept.any() for kept in heads.values())
    state = expected(model, inputs, {**heads, **neurons})
    check(model, state, windows, structure="AL-MM", remove_heads=5)


def test_a_given_number_of_heads_in_every_layer(model, windows):
    inputs = inputs_of(model, windows.draw())
    scores = published_scores(model, inputs, "WIFV", is_adaptive=False)
    keep = lowest_of_each(scores, {ATTENTION: 2, MLP: 7})
    state = expected(model, inputs, keep)
    check(model, state, windows, structure="UL-MM", remove_heads=2 * LAYERS + 1)


def test_without_compensation_nothing_is_added(model, windows):
    inputs = inputs_of(model, windows.draw())
    keep = lowest_of_all(published_scores(model, inputs, "WIFV", is_adaptive=True), 20)
    state = expected(model, inputs, keep, bias=False)
    result = check(model, state, windows, compensation="none")
    assert [type(edit) for edit in result.edits] == [Cut]


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("llama", "neurons"), ("llama", "kv-groups"), ("qwen2", "kv-groups")],
)
def test_constant_activations_are_made_up_for_exactly(windows, model_type, kind):
    """A quarter of the units of every layer give the same for all tokens: without them, and with
    what they gave in a bias, the model computes what it did. Qwen2's o_proj has no bias yet."""
    model = build(model_type, intermediate_size=WIDTH)
    with torch.no_grad():
        for layer in model.model.layers:
            if kind == "neurons":
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.weight[: WIDTH // 4] = 0
            else:
                layer.self_attn.v_proj.weight[:HEAD] = 0
    before = logits_of(model, TOKENS)
    inputs = inputs_of(model, windows.draw())
    path, size = (MLP, 1) if kind == "neurons" else (ATTENTION, HEADS // KV * HEAD)
    gone = {"neurons": WIDTH // 4, "kv-groups": 1}[kind]
    assert all(inputs[i, path][:, : gone * size].std(0).max() < 1e-6 for i in range(LAYERS))
    axis = find_anatomy(model).of_kinds({kind})[0]
    params = model.num_parameters() - LAYERS * gone * axis.unit_cost
    params += LAYERS * HIDDEN if model_type == "qwen2" else 0
    result = prune(model, params=params, calibration=windows, method="flap", cut=(kind,),
                   structure="UL-UM")  # fmt: skip
    assert all(result.kept[i, kind].min() == gone for i in range(LAYERS))
    torch.testing.assert_close(logits_of(model, TOKENS), before, rtol=1e-5, atol=1e-5)


def test_added_biases_are_saved_and_loaded(model, windows, tmp_path):
    result = prune(model, sparsity=0.3, calibration=windows, method="flap")
    assert model.num_parameters() <= result.target
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.model.layers[1].mlp.down_proj.bias.abs().max() > 0
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(model, TOKENS))
    again = prune(loaded, sparsity=0.2, calibration=windows, method="flap")
    assert [type(edit) for edit in again.edits] in ([Cut], [AddBias, Cut])


def test_statistics_add_over_processes_and_micro_batches(model, windows):
    anatomy, tokens_BT = find_anatomy(model), windows.draw()
    one, parts = Fluctuation(), [Fluctuation(), Fluctuation()]
    with collect(model, anatomy, tokens_BT, [one], how=Pass(7)):
        pass
    for part, some_BT in zip(parts, (tokens_BT[:11], tokens_BT[11:]), strict=True):
        with collect(model, anatomy, some_BT, [part], how=Pass(3)):
            pass
    for mine, other in zip(parts[0].sums(), parts[1].sums(), strict=True):
        mine.add_(other)
    parts[0].finish(len(tokens_BT))
    for key, variance in one.variance.items():
        torch.testing.assert_close(parts[0].variance[key], variance, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(parts[0].mean[key], one.mean[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("error", "settings", "message"),
    [
        (InvalidSettings, {"structure": "AL-MM", "remove_heads": 10}, "at most 9 KV groups can go"),
        (InvalidSettings, {"structure": "AL-MM", "remove_heads": 9}, "Remove fewer"),
        (InvalidSettings, {"layout": "uniform"}, "take --compensation none"),
        (InvalidSettings, {"metric": "WIFX"}, "metric: Input should be 'WIFV', 'IFV'"),
        (InvalidSettings, {"cut": ("hidden",)}, "flap cuts kv-groups, neurons; got hidden"),
        (InvalidTarget, {"sparsity": 0.97}, "below what is possible"),
    ],
)
def test_bad_settings(model, windows, error, settings, message):
    before = model.num_parameters()
    with pytest.raises(error, match=message):
        prune(model, calibration=windows, method="flap", **{"sparsity": 0.1, **settings})
    assert model.num_parameters() == before
