"""Cutting units gives the model in which those units are masked, as a model like any other."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.edits import cut
from masking import mask
from picomodels import (
    INTERMEDIATE_SIZE,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    PICO,
    build,
    logits_of,
    random_tokens,
)

# RMS norms, rotary embeddings and eager softmax compute in float32 even in a float64 model.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


WIDTHS = {"kv-groups": [1, 3, 2], "neurons": [37, 64, 11]}


def width_axes(anatomy):
    return anatomy.of_kinds(WIDTHS)


def random_keep(anatomy, seed=0):
    """Masks that keep a different number of KV groups and neurons in every layer, at least one."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for axis in width_axes(anatomy):
        kept = torch.randperm(axis.num_units, generator=generator)[: WIDTHS[axis.kind][axis.layer]]
        keep[axis.key] = torch.zeros(axis.num_units, dtype=torch.bool)
        keep[axis.key][kept] = True
    return keep


def widths_of(anatomy, keep):
    """Widths per layer that `keep` leaves."""
    widths = [{} for _ in anatomy.layers]
    for axis in width_axes(anatomy):
        left = int(keep[axis.key].sum())
        if axis.kind == "kv-groups":
            heads = anatomy.widths[axis.layer]["num_attention_heads"] // axis.num_units
            widths[axis.layer]["num_key_value_heads"] = left
            widths[axis.layer]["num_attention_heads"] = left * heads
        else:
            widths[axis.layer]["intermediate_size"] = left
    return widths


@pytest.fixture(params=PICO)
def pruned(request):
    """A full model, the same model cut, and what was kept, for every architecture."""
    full = build(request.param)
    model = deepcopy(full)
    anatomy = find_anatomy(model)
    keep = random_keep(anatomy)
    cut(model, keep)
    return full, model, keep


def test_slicing_equals_masking(pruned):
    full, model, keep = pruned
    tokens = random_tokens()
    dense = logits_of(full, tokens)
    mask(full, keep)
    assert (logits_of(full, tokens) - dense).abs().mean() > 0.1  # the mask matters
    torch.testing.assert_close(logits_of(model, tokens), logits_of(full, tokens), **CLOSE)


def test_the_configuration_tells_the_widths(pruned):
    full, model, keep = pruned
    expected = widths_of(find_anatomy(full), keep)
    assert find_anatomy(model).widths == expected
    assert model.config.is_heterogeneous
    for layer, widths in zip(model.config.per_layer_config, expected, strict=True):
        assert {name: getattr(layer, name) for name in widths} == widths


def test_a_fresh_model_of_the_configuration_is_the_cut_model(pruned):
    _, model, _ = pruned
    fresh = AutoModelForCausalLM.from_config(model.config).double().eval()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in fresh.named_parameters()} == shapes
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(fresh, random_tokens()), logits_of(model, random_tokens()))


def test_a_copy_of_a_cut_model_is_independent_and_equal(pruned):
    _, model, _ = pruned
    copy = deepcopy(model)
    before = logits_of(model, random_tokens())
    assert torch.equal(logits_of(copy, random_tokens()), before)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(model, random_tokens()), before)


def test_generation_with_a_cache_equals_generation_without(pruned):
    _, model, _ = pruned
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = random_tokens(batch=2, length=7)
    prompt_mask = torch.ones_like(prompt)
    plain, cached = (
        model.generate(prompt, attention_mask=prompt_mask, use_cache=use_cache, **options)
        for use_cache in (False, True)
    )
    assert torch.equal(plain, cached)


def test_the_cut_counts_parameters_exactly(pruned):
    full, model, keep = pruned
    anatomy = find_anatomy(full)
    gone = sum(int((~keep[axis.key]).sum()) * axis.unit_cost for axis in width_axes(anatomy))
    assert model.num_parameters() == full.num_parameters() - gone


LLAMA = build("llama")
TOKENS = random_tokens()


@st.composite
def masks(draw):
    keep = {}
    for layer in range(NUM_LAYERS):
        for kind, width in (("kv-groups", NUM_KV_HEADS), ("neurons", INTERMEDIATE_SIZE)):
            if draw(st.booleans(), label=f"cut {kind} of layer {layer}"):
                units = st.lists(st.booleans(), min_size=width, max_size=width)
                keep[layer, kind] = torch.tensor(draw(units.filter(any)))
    return keep


@given(masks())
@settings(max_examples=30, deadline=None)
def test_slicing_equals_masking_for_any_masks(keep):
    sliced, masked = deepcopy(LLAMA), deepcopy(LLAMA)
    cut(sliced, keep)
    mask(masked, keep)
    torch.testing.assert_close(logits_of(sliced, TOKENS), logits_of(masked, TOKENS), **CLOSE)


def test_parameters_keep_their_identity_and_cut_ones_lose_their_gradient():
    model = build("llama")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    before = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in before.items()}
    anatomy = find_anatomy(model)
    cut(model, random_keep(anatomy))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    was_cut = [name for name in after if after[name].shape != shapes[name]]
    assert len(was_cut) == NUM_LAYERS * (3 * 2 + 1 + 2 * 2 + 1)  # weights and biases
    assert all(after[name].grad is None for name in was_cut)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()  # and it can be trained
    assert all(parameter.grad.shape == parameter.shape for parameter in after.values())


def test_cutting_twice_equals_cutting_once():
    once, twice = build("llama"), build("llama")
    both = random_keep(find_anatomy(once))
    # First keep every unit of `both` and the even ones, then only those of `both`.
    first = {key: keep_U | (torch.arange(len(keep_U)) % 2 == 0) for key, keep_U in both.items()}
    second = {key: both[key][first[key]] for key in both}
    cut(twice, first)
    cut(twice, second)
    cut(once, both)
    assert once.config.to_dict() == twice.config.to_dict()
    for (name, one), (_, two) in zip(
        once.named_parameters(), twice.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    assert torch.equal(logits_of(once, TOKENS), logits_of(twice, TOKENS))


def keep_first(anatomy, kv_groups, neurons):
    count = {"kv-groups": kv_groups, "neurons": neurons}
    return {
        axis.key: torch.arange(axis.num_units) < count[axis.kind] for axis in width_axes(anatomy)
    }


@pytest.mark.parametrize("model_type", PICO)
def test_equal_layers_give_a_plain_configuration(model_type):
    model = build(model_type)
    cut(model, keep_first(find_anatomy(model), 2, 40))
    assert not model.config.is_heterogeneous
    assert "per_layer_config" not in model.config.to_dict()
    assert model.config.intermediate_size == 40
    if model_type != "gpt_neox":
        assert model.config.num_key_value_heads == 2
        assert model.config.num_attention_heads == 2 * NUM_HEADS // NUM_KV_HEADS


def test_head_counts_that_a_plain_configuration_refuses_are_said_per_layer():
    model = build("llama")  # 6 heads do not divide the hidden size of 64
    cut(model, keep_first(find_anatomy(model), 3, 40))
    assert model.config.intermediate_size == 40
    assert [c.num_attention_heads for c in model.config.per_layer_config] == [6] * NUM_LAYERS
    assert [c.num_key_value_heads for c in model.config.per_layer_config] == [3] * NUM_LAYERS


def test_layers_made_equal_again_give_a_plain_configuration():
    model = build("qwen3")
    anatomy = cut(model, random_keep(find_anatomy(model)))
    assert model.config.is_heterogeneous
    cut(model, keep_first(anatomy, 1, 8))
    assert not model.config.is_heterogeneous
    fresh = AutoModelForCausalLM.from_config(model.config).double().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(fresh, TOKENS), logits_of(model, TOKENS))


def test_a_later_choice_of_attention_reaches_the_cut_layers():
    model = build("llama")
    anatomy = cut(model, random_keep(find_anatomy(model)))
    expected = logits_of(model, TOKENS)
    model.set_attn_implementation("eager")
    output = model(input_ids=TOKENS, output_attentions=True)
    heads = [widths["num_attention_heads"] for widths in anatomy.widths]
    assert [layer.shape[1] for layer in output.attentions] == heads
    torch.testing.assert_close(output.logits, expected, **CLOSE)


def test_importing_the_package_leaves_plain_models_as_they_are():
    config = AutoConfig.for_model("llama", **PICO["llama"])
    model = LlamaForCausalLM(config).eval()
    assert all(layer.self_attn.config is config for layer in model.model.layers)
    with torch.no_grad():
        output = model(input_ids=TOKENS, output_hidden_states=True)
    assert len(output.hidden_states) == NUM_LAYERS + 1
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"
    assert type(model.model.layers[0]).__name__ in model._no_split_modules


def test_a_model_built_from_its_class_reads_widths_per_layer():
    config = AutoConfig.for_model("llama", **PICO["llama"])
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {
        1: {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    }
    model = LlamaForCausalLM(config)
    layers = model.model.layers
    assert [layer.mlp.up_proj.out_features for layer in layers] == [96, 24, 96]
    assert [layer.self_attn.q_proj.out_features for layer in layers] == [64, 32, 64]
    assert [layer.self_attn.k_proj.out_features for layer in layers] == [32, 16, 32]
    assert len(model(input_ids=TOKENS, output_hidden_states=True).hidden_states) == NUM_LAYERS + 1
