"""Passes in bfloat16 over models in float32, and memory that is handed back."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapt_pruner import CalibrationData, find_anatomy, precision, prune
from adapt_pruner.methods import make_settings
from adapt_pruner.model.memory import give_back, own_weights
from adapt_pruner.score.collect import Pass, collect
from adapt_pruner.score.importance import IMPORTANCES
from adapt_pruner.score.observers import Gram, UnitGradients
from picomodels import PICO, build, random_tokens

WINDOWS = random_tokens(8, 16)


def watch_dtypes(model, seen: list) -> None:
    """Write down what an output projection reads in every pass over windows."""

    def see(module, args) -> None:
        if args[0].shape[1] == WINDOWS.shape[1]:  # not the two tokens that the head is tried with
            seen.append(args[0].dtype)

    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(see)


def scores_in(dtype: torch.dtype | None) -> dict:
    model = build("llama", torch.float32)
    anatomy, seen = find_anatomy(model), []
    watch_dtypes(model, seen)
    with collect(
        model, anatomy, WINDOWS, [Gram(), UnitGradients()], how=Pass(compute_dtype=dtype)
    ) as found:
        axes = anatomy.of_kinds({"neurons"})
        scores = {a.key: IMPORTANCES["residual-fisher"].score(a, found, 0) for a in axes}
    assert set(seen) == {dtype or torch.float32}
    assert all(score_U.dtype == torch.float32 for score_U in scores.values())
    return scores


def test_scores_are_close_to_those_of_float32():
    exact, rounded = scores_in(None), scores_in(torch.bfloat16)
    for key, score_U in exact.items():
        error_U = (rounded[key] - score_U).abs() / score_U.abs().max()
        assert 0 < error_U.max() < 0.05


@pytest.mark.parametrize("model_type", list(PICO))
def test_every_architecture(model_type):
    model = build(model_type, torch.float32)
    result = prune(
        model,
        calibration=CalibrationData(random_tokens(20, 40), 16, 8),
        sparsity=0.3,
        steps=2,
        tuning_steps=1,
        compute_dtype="bfloat16",
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.sparsity >= 0.3
    assert torch.isfinite(model(input_ids=WINDOWS).logits).all()


def test_auto_looks_at_hardware_size_and_weights(monkeypatch):
    model = build("llama", torch.float32)
    assert precision.compute_dtype_of("auto", model) is None  # a small one
    monkeypatch.setattr(precision, "WORTH_BFLOAT16", 1000)
    for fast, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device, fast=fast: fast)
        assert precision.compute_dtype_of("auto", model) is expected
        assert precision.compute_dtype_of("float32", model) is None
        assert precision.compute_dtype_of("bfloat16", model) is torch.bfloat16
        assert precision.compute_dtype_of("bfloat16", model.double()) is None
        model.float()


def test_a_run_keeps_to_what_it_began_with(monkeypatch):
    """A model that shrinks below the size from which on bfloat16 pays."""
    model = build("llama", torch.float32)
    size = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(precision, "WORTH_BFLOAT16", size)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)
    seen = []
    watch_dtypes(model, seen)
    prune(
        model,
        calibration=CalibrationData(random_tokens(20, 40), 16, 8),
        sparsity=0.3,
        settings=make_settings(steps=3, tuning_steps=0),
    )
    assert seen.count(torch.bfloat16) >= 3
    assert set(seen) == {torch.bfloat16}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_leave_the_file_they_were_mapped_from(tmp_path):
    build("llama", torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}

    own_weights(model)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert model.lm_head.weight is model.get_output_embeddings().weight


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_given_back():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    parts = [torch.ones(1000) for _ in range(20_000)]  # too small to be mapped one by one
    kept = parts[::500]
    before = resident()
    del parts
    give_back()
    assert before - resident() > 40e6
    assert len(kept) == 40
