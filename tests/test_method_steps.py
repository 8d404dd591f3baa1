"""The steps of Adapt-Pruner: seeds, draws, equation 6, what a step tells."""

from __future__ import annotations

import weakref

import pytest
import torch

from adapt_pruner.allocate.target import resolve_target
from adapt_pruner.data import CalibrationData
from adapt_pruner.methods import make_settings
from adapt_pruner.methods.adapt_pruner import PRESETS, adapt_pruner
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.history import History
from adapt_pruner.score.importance import IMPORTANCES, Importance
from adapt_pruner.score.observers import Gram
from method_runs import NEURON, prune, widths, work_for
from picomodels import NUM_LAYERS, VOCAB_SIZE, build, logits_of, random_tokens

# --- steps ------------------------------------------------------------------------------------


def weights_after(seed, preset):
    model = build("llama", torch.float32)
    prune(model, 0.3, preset, seed=seed)
    return model.state_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_seeds_give_equal_weights_and_others_do_not(preset):
    one, again, other = (weights_after(seed, preset) for seed in (0, 0, 1))
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(
        one[name].shape != other[name].shape or not torch.equal(one[name], other[name])
        for name in one
    )


def test_every_step_draws_other_windows_and_other_random_numbers(monkeypatch):
    draws, seeds = [], []

    class Calibration(CalibrationData):
        def draw(self, step=0):
            draws.append(step)
            return super().draw(step)

    def random(axis, statistics, seed):
        seeds.append(seed)
        return torch.rand(axis.num_units)

    monkeypatch.setitem(IMPORTANCES.own, "random", Importance(random))
    model = build("llama", torch.float32)
    settings = make_settings(importance="random", steps=3, tuning_steps=1, seed=7)
    target = resolve_target(find_anatomy(model), 0.3, None)
    calibration = Calibration(random_tokens(batch=20, length=40), 8, 2)
    list(adapt_pruner(work_for(model, target, settings, calibration)))
    assert draws == [0, 1, 2]
    assert len(set(seeds)) == 3


def test_the_statistics_of_a_step_are_gone_before_the_next(monkeypatch):
    found = []  # weak references, one per axis and step

    def random(axis, statistics, seed):
        found.append(weakref.ref(statistics))
        return torch.rand(axis.num_units)

    monkeypatch.setitem(IMPORTANCES.own, "random", Importance(random, (Gram,)))
    model, settings = (
        build("llama", torch.float32),
        make_settings(importance="random", steps=2, tuning_steps=1),
    )
    target = resolve_target(find_anatomy(model), 0.3, None)
    calibration = CalibrationData(random_tokens(batch=20, length=40), 8, 2)
    for _ in adapt_pruner(work_for(model, target, settings, calibration)):
        assert all(reference() is None for reference in found)
    assert len(found) == 2 * 2 * NUM_LAYERS


def test_ranked_steps_leave_equal_shares_of_the_decoder_layers():
    model = build("llama", torch.float32)
    start = find_anatomy(model)
    _, steps = prune(model, 0.4, steps=4)
    assert [step.step for step in steps] == [1, 2, 3, 4]
    for step in steps:
        left = start.layer_parameters * 0.6 ** (step.step / 4)
        wanted = round(start.other_parameters + left)
        assert wanted - NEURON < step.anatomy.total_parameters <= wanted


def test_adaptive_steps_follow_equation_6():
    model = build("llama", torch.float32)
    _, steps = prune(model, 0.4, "paper", steps=10, amplitude=0.05)
    assert len(steps) > 3
    sparsity = [0.0] * NUM_LAYERS
    for step in steps[:-1]:
        for layer, importance in enumerate(step.layer_importance):
            sparsity[layer] = min(max(sparsity[layer] + 0.1 - 0.05 * importance, 0), 0.99)
        for s, width in zip(sparsity, step.anatomy.widths, strict=True):
            assert width["intermediate_size"] == int(96 * (1 - s))
            # Counted in entries, heads have 8: a head goes when a whole one fits.
            assert width["num_key_value_heads"] == -(-int(4 * 8 * (1 - s)) // 8)


def test_every_cut_tells_what_it_kept():
    model = build("llama", torch.float32)
    rows, edits = torch.arange(96.0), []
    up = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        up.bias.copy_(rows / 1000)
    history = History(find_anatomy(model))

    def on_edit(edit, before):
        edits.append(edit)
        history.add(edit, before)

    prune(model, 0.4, "paper", on_edit)
    kept = rows
    for edit in edits:
        if (0, "neurons") in edit.keep:
            kept = kept[edit.keep[0, "neurons"]]
    assert len(kept) < 96
    torch.testing.assert_close(up.bias.detach(), kept / 1000)
    assert torch.equal(history.units[0, "neurons"], kept.long())


def test_a_step_tells_the_state_before_its_cut():
    model = build("llama", torch.float32)
    documents = random_tokens(batch=20, length=40, seed=1)
    settings = make_settings(windows=6, window_length=8, steps=2, tuning_steps=1)
    calibration = CalibrationData(documents, 8, 6)
    with torch.no_grad():
        window = calibration.draw(0)
        expected = model(input_ids=window, labels=window).loss.item()
    target = resolve_target(find_anatomy(model), 0.3, None)
    first = next(adapt_pruner(work_for(model, target, settings, calibration)))
    assert first.loss == pytest.approx(expected, rel=1e-5)
    assert len(first.layer_importance) == len(first.layer_distance) == NUM_LAYERS
    assert max(map(abs, first.layer_importance)) == pytest.approx(1)
    assert sum(first.layer_importance) == pytest.approx(0, abs=1e-9)


def test_progress_is_reported_in_shares():
    shares = []
    model = build("llama", torch.float32)
    settings = make_settings(
        windows=6, window_length=8, steps=2, tuning_steps=1, micro_batch_size=2
    )
    target = resolve_target(find_anatomy(model), 0.3, None)
    list(adapt_pruner(work_for(model, target, settings, on_progress=shares.append)))
    assert shares == pytest.approx([1 / 3, 2 / 3, 1] * 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_training_goes_on_after_pruning(preset):
    model = build("llama", torch.float32).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    prune(model, 0.3, preset)
    assert model.training
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    tokens = random_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_better_units_stay():
    """Of a model with useless units, exactly those go."""
    model = build("mistral", torch.float32)
    generator = torch.Generator().manual_seed(0)
    useless = torch.zeros(NUM_LAYERS, 96, dtype=torch.bool)
    for i, layer in enumerate(model.model.layers):
        useless[i, torch.randperm(96, generator=generator)[: 20 + 10 * i]] = True
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, useless[i]] = 0
    expected = logits_of(model, random_tokens())
    target = model.num_parameters() - int(useless.sum()) * 3 * 64
    settings = make_settings(
        windows=6, window_length=8, steps=2, tuning_steps=1, compensation="none"
    )
    list(adapt_pruner(work_for(model, target, settings)))
    assert widths(model) == (~useless).sum(dim=1).tolist()
    torch.testing.assert_close(logits_of(model, random_tokens()), expected, rtol=1e-3, atol=1e-4)


def test_the_refit_brings_the_pruned_model_nearer_to_the_full_one():
    tokens = random_tokens(batch=8, length=16, seed=3) % VOCAB_SIZE
    full = logits_of(build("llama", torch.float32), tokens)
    errors = {}
    for compensation in ("none", "refit"):
        model = build("llama", torch.float32)
        prune(model, 0.3, windows=64, window_length=16, compensation=compensation)
        errors[compensation] = (logits_of(model, tokens) - full).square().mean().item()
    assert errors["refit"] < 0.9 * errors["none"]
