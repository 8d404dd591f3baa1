"""Sliced models in use: saved, trained, exported, refused."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from adapt_pruner import prune, replay
from adapt_pruner.errors import (
    InvalidSettings,
    InvalidTarget,
    LoadingError,
    UnsupportedModel,
)
from adapt_pruner.methods.slicegpt import SliceGPTSettings, width_for
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.edits import edit_of
from adapt_pruner.model.rotation import Rotate, parameters_after
from adapt_pruner.report import pictures
from picomodels import PICO, build, logits_of, random_tokens
from reload_checkpoints import outputs
from sliced import FORMS, ROTATABLE, TOKENS

OF_TEXT = {"method": "slicegpt", "window_length": 12, "windows": 8, "multiple": 1}
READER = Path(__file__).with_name("reload_checkpoints.py")


def sliced(model, calibration, sparsity=0.4, **values):
    return prune(model, calibration=calibration, sparsity=sparsity, **{**OF_TEXT, **values})


# --- sizes and checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize("shared", FORMS)
@pytest.mark.parametrize("model_type", ROTATABLE)
def test_a_sliced_model_has_the_size_loads_and_generates(
    model_type, shared, calibration, tmp_path
):  # fmt: skip
    model = build(model_type, torch.float32)
    anatomy = find_anatomy(model)
    result = sliced(model, calibration, shared_rotation=shared)
    width = model.config.hidden_size if shared else model.config.sliced_hidden_size
    larger = parameters_after(anatomy, width + (8 if shared else 1), shared)
    assert model.num_parameters() <= result.target < larger
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(model, TOKENS))
    prompt = random_tokens(batch=2, length=7)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
               "attention_mask": torch.ones_like(prompt)}  # fmt: skip
    plain = loaded.generate(prompt, use_cache=False, **options)
    config = loaded.config
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=16)):
        assert torch.equal(loaded.generate(prompt, past_key_values=cache, **options), plain)


@pytest.mark.parametrize("shared", FORMS)
def test_shared_embeddings_get_a_head_of_their_own(shared, calibration, tmp_path):
    model = build("llama", torch.float32, tie_word_embeddings=True)
    result = sliced(model, calibration, shared_rotation=shared)
    assert model.num_parameters() <= result.target
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(model, TOKENS))


def test_a_shared_rotation_leaves_a_plain_model(calibration):
    model = build("llama", torch.float32)
    sliced(model, calibration, shared_rotation=True)
    assert not model.config.is_heterogeneous
    assert not hasattr(model.config, "sliced_hidden_size")
    plain = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(plain, TOKENS), logits_of(model, TOKENS))


def test_a_sliced_model_trains_is_cut_again_and_copied(calibration):
    model = build("llama", torch.float32)
    sliced(model, calibration)
    twin = deepcopy(model)
    assert torch.equal(logits_of(twin, TOKENS), logits_of(model, TOKENS))
    model.train()
    model.activation_checkpointing_enable()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    count = model.num_parameters()
    prune(model, calibration=calibration, sparsity=0.1, steps=2, tuning_steps=1)
    assert model.num_parameters() < count
    assert torch.isfinite(logits_of(model, TOKENS)).all()


def test_a_sliced_model_compiles_whole(calibration):
    model = build("llama", torch.float32)
    sliced(model, calibration)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, TOKENS), logits_of(model, TOKENS))


def test_sizes_are_multiples(calibration):
    model = build("llama", torch.float32)
    sliced(model, calibration, multiple=8)
    assert model.config.sliced_hidden_size % 8 == 0


def test_hidden_states_can_be_asked_for(calibration):
    model = build("llama", torch.float32)
    sliced(model, calibration)
    states = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    width = model.config.sliced_hidden_size
    assert [state.shape[-1] for state in states] == [width, width, width, 64]


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(set(PICO) - set(ROTATABLE)))
def test_other_architectures_are_refused_with_the_reason(model_type, calibration):
    with pytest.raises(UnsupportedModel, match=f"type '{model_type}' cannot be rotated: .+ Take"):
        sliced(build(model_type, torch.float32), calibration)


def test_a_record_does_not_hold_the_matrices(calibration):
    result = sliced(build("llama", torch.float32), calibration)
    record = result.record()
    assert record["edits"] == [{"edit": "rotate", "hidden_size": 33, "shared": False}]
    assert edit_of(record["edits"][0]).record() == record["edits"][0]
    with pytest.raises(LoadingError, match="does not hold the matrices; load the checkpoint"):
        replay(build("llama", torch.float32), record)


def test_an_export_is_refused_with_a_way_out(calibration, tmp_path):
    from adapt_pruner.export.layout import find_layout

    model = build("llama", torch.float32)
    sliced(model, calibration)
    with pytest.raises(UnsupportedModel, match="Slice it with --shared-rotation"):
        find_layout(SimpleNamespace(config=model.config))


def test_moments_of_an_optimizer_are_cleared():
    moments = {"a": {"exp_avg": torch.ones(1)}}
    assert not Rotate(8, False).follow(nn.Module(), moments)
    assert moments == {}


def test_bad_requests_change_nothing(calibration):
    model = build("llama", torch.float32)
    count = model.num_parameters()
    with pytest.raises(InvalidSettings, match="cut: slicegpt cuts hidden; got neurons"):
        sliced(model, calibration, cut=("neurons",))
    with pytest.raises(InvalidSettings, match=r"must be empty; got \[0\]"):
        sliced(model, calibration, protect_layers=(0,))
    with pytest.raises(InvalidTarget, match="below what is possible: with a hidden size of 16"):
        prune(model, calibration=calibration, params=9000, **{**OF_TEXT, "multiple": 16})
    assert model.num_parameters() == count
    sliced(model, calibration)
    with pytest.raises(UnsupportedModel, match="it is sliced already"):
        sliced(model, calibration, sparsity=0.1)


def test_the_width_is_the_largest_that_meets_the_target():
    anatomy = find_anatomy(build("llama"))
    settings = SliceGPTSettings(multiple=1)
    for width in (20, 33, 47):
        size = parameters_after(anatomy, width, False)
        assert width_for(settings, anatomy, size) == width
        assert width_for(settings, anatomy, size - 1) == width - 1


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_a_portable_checkpoint_needs_only_transformers(
    model_type, calibration, tmp_path, monkeypatch
):  # fmt: skip
    monkeypatch.setattr(pictures, "draw_all", lambda directory, result: {})
    result = sliced(build(model_type, torch.float32), calibration)
    directory = result.save(tmp_path / "portable", portable=True)
    found, cache = tmp_path / "found.safetensors", tmp_path / "home"
    command = [sys.executable, str(READER), "without", "trust", str(found), str(directory)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(cache)},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for key, value in load_file(found).items():
        assert torch.equal(outputs(result.model)[key.rsplit(".", 1)[1]], value)
