"""Every kind of axis, in every architecture that has it: cutting equals masking, and what is cut
saves, loads, generates, and is made again from its record."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from adapt_pruner import replay
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.edits import AddBias, Cut, edit_of
from masking import mask
from picomodels import PICO, build, logits_of, random_tokens

# RMS norms, rotary embeddings and eager softmax compute in float32 even in a float64 model.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TOKENS = random_tokens()
ATTENDS_IN_ALL = [name for name in PICO if name != "lfm2"]
HAS_HEADS = [name for name in PICO if name != "gpt_neox"]


def some(anatomy, kind, layers=(0, 1, 2), share=0.5, seed=0):
    """Masks of every axis of a kind in some layers; of every stratum, the same number stays."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for axis in anatomy.of_kinds({kind}):
        if axis.layer in layers:
            order = torch.rand(axis.strata, axis.size, generator=generator).argsort(dim=1)
            keep[axis.key] = (order < max(1, round(axis.size * share))).flatten()
    return keep


def gone(*keys):
    return {key: torch.zeros(1, dtype=torch.bool) for key in keys}


def keep_of(name, model):
    """What the cases below keep."""
    anatomy = find_anatomy(model)
    kinds = {axis.kind for axis in anatomy.axes}
    widths = {}
    for kind in ("kv-groups", "query-heads", "neurons", "hidden"):
        if kind in kinds:
            widths |= some(anatomy, kind, (-1, 0, 2), share=0.7 if kind == "hidden" else 0.5)
    cases = {
        "query-heads": lambda: some(anatomy, "query-heads", (0, 2)),
        "heads and groups": lambda: some(anatomy, "query-heads") | some(anatomy, "kv-groups"),
        "hidden": lambda: some(anatomy, "hidden", (-1,), share=0.7),
        "layers": lambda: gone((1, "layers")),
        "first layer": lambda: gone((0, "layers")),
        "attention": lambda: gone((0, "attention")),
        "mlp": lambda: gone((1, "mlp"), (2, "mlp")),
        "both sublayers": lambda: gone((2, "attention"), (2, "mlp")),
        "all at once": lambda: {
            **{key: keep_U for key, keep_U in widths.items() if key[0] != 1},
            **gone((1, "layers"), (2, "mlp")),
        },
    }
    return cases[name]()


CASES = [
    *((name, case) for case in ("query-heads", "heads and groups", "hidden") for name in HAS_HEADS),
    *((name, case) for case in ("layers", "first layer", "attention", "mlp") for name in PICO),
    *((name, case) for case in ("both sublayers", "all at once") for name in PICO),
]


@pytest.mark.parametrize(("model_type", "case"), CASES)
def test_cutting_equals_masking_and_loads(model_type, case):
    full = build(model_type)
    model = deepcopy(full)
    keep = keep_of(case, model)
    expected = find_anatomy(model)
    sizes = {axis.key: int(keep[axis.key].sum()) // axis.strata for axis in expected.axes
             if axis.key in keep}  # fmt: skip
    count = expected.parameters(sizes)
    Cut(keep).apply(model)
    dense = logits_of(full, TOKENS)
    mask(full, keep)
    masked = logits_of(full, TOKENS)
    assert (masked - dense).abs().mean() > 0.01  # the mask matters
    torch.testing.assert_close(logits_of(model, TOKENS), masked, **CLOSE)
    if case not in ("both sublayers",):  # there the layer goes, with what neither sublayer owns
        assert model.num_parameters() == count
    fresh = AutoModelForCausalLM.from_config(type(model.config).from_dict(model.config.to_dict()))
    fresh.double().eval().load_state_dict(model.state_dict())
    assert torch.equal(logits_of(fresh, TOKENS), logits_of(model, TOKENS))


@pytest.mark.parametrize("model_type", PICO)
def test_generation_with_caches_equals_generation_without(model_type):
    model = build(model_type)
    Cut(gone((0, "attention"), (1, "mlp"))).apply(model)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = random_tokens(batch=2, length=7)
    options["attention_mask"] = torch.ones_like(prompt)
    plain = model.generate(prompt, use_cache=False, **options)
    caches = [DynamicCache(config=model.config), DynamicCache()]
    if model_type != "lfm2":  # transformers has no static cache for its convolutions alone
        caches.append(StaticCache(config=model.config, max_cache_len=16))
    for cache in caches:
        if model_type == "lfm2" and cache is caches[1]:
            continue  # nor one without a configuration
        assert torch.equal(model.generate(prompt, past_key_values=cache, **options), plain)
        assert cache.layers[0].keys is None or cache.layers[0].keys.numel() == 0
        assert cache.get_seq_length() == 12


def test_a_beam_search_works_with_skipped_attention():
    model = build("llama")
    Cut(gone((0, "attention"))).apply(model)
    prompt = random_tokens(batch=2, length=7)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0,
               "attention_mask": torch.ones_like(prompt)}  # fmt: skip
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize("model_type", PICO)
def test_a_record_makes_the_edits_again(model_type):
    model, again = build(model_type), build(model_type)
    edit = Cut(keep_of("all at once", model))
    edit.apply(model)
    replay(again, {"format": 2, "edits": [edit.record()]})
    assert again.config.to_dict() == model.config.to_dict()
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "phi3"])
def test_added_biases_are_saved_loaded_and_recorded(model_type, tmp_path):
    model = build(model_type, torch.float32)
    name = "mlp.down_proj"
    edit = edit_of(AddBias({0: (name,), 2: (name,)}).record())
    edit.apply(model)
    layers = find_anatomy(model).layers
    with torch.no_grad():
        layers[0].get_submodule(name).bias.fill_(0.3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(model, TOKENS))
    Cut(gone((1, "layers"))).apply(loaded)
    assert loaded.get_submodule("model.layers.1.mlp.down_proj").bias is not None
    again = type(loaded)(type(loaded.config).from_dict(loaded.config.to_dict()))
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in loaded.named_parameters()]
