"""A pass leaves the model as it was, holds little memory, and notices what is not finite."""

from __future__ import annotations

import gc
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.score.collect import Pass, collect
from adapt_pruner.score.distance import LayerDistance
from adapt_pruner.score.observers import Fisher, Gram, UnitGradients, WeightGradients
from gathering import (
    CUT,
    EVERYTHING,
    WINDOWS,
    close,
    observers,
    of_weights,
    prunable_matrices,
    snapshot,
)
from model_states import checkpoints, state_of
from picomodels import INTERMEDIATE_SIZE, PICO, build, random_tokens

NO_FISHER = (WeightGradients, UnitGradients, Gram)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        try:
            close(actual[name], value)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# --- results do not depend on how the pass runs -----------------------------------------------


@pytest.mark.parametrize("kinds", [NO_FISHER, (Gram,), ()])
def test_the_micro_batch_size_does_not_matter(kinds):
    model = build("llama")
    one_by_one = snapshot(model, kinds, micro_batch_size=1)
    for size in (2, 5, 8, None):
        assert_same(snapshot(model, kinds, micro_batch_size=size), one_by_one)


def test_results_do_not_depend_on_what_else_is_wanted():
    model = build("qwen3")
    everything = snapshot(model, EVERYTHING)
    for kinds in ((WeightGradients,), (Fisher,), (UnitGradients,)):
        alone = snapshot(model, kinds)
        assert_same(alone, {name: everything[name] for name in alone})


@pytest.mark.parametrize("model_type", PICO)
def test_gradient_checkpointing_changes_nothing(model_type):
    model = build(model_type)
    expected = snapshot(model)
    assert_same(snapshot(model, gradient_checkpointing=True), expected)
    assert not checkpoints(model)


@pytest.mark.parametrize("kinds", [(WeightGradients,), (Fisher,), (UnitGradients,)])
def test_gradient_checkpointing_changes_nothing_whatever_is_wanted(kinds):
    model = build("llama")
    expected = snapshot(model, kinds)
    assert_same(snapshot(model, kinds, gradient_checkpointing=True), expected)


@pytest.mark.parametrize("kinds", [(UnitGradients,), (UnitGradients, Gram)])
def test_gradient_checkpointing_keeps_no_activations_of_neurons(kinds):
    model, alive = build("llama"), []

    def count(module, args):
        found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dim() == 3]
        alive.append(sum(t.shape[-1] == INTERMEDIATE_SIZE for t in found))

    model.lm_head.register_forward_pre_hook(count)  # between the layers and the backward pass
    how = Pass(gradient_checkpointing=True)
    with collect(model, find_anatomy(model), WINDOWS, observers(kinds), how=how):
        assert set(alive) == {0}


@pytest.mark.parametrize(
    ("model_type", "dropouts"),
    [
        ("llama", ["attention_dropout"]),
        ("phi", ["attention_dropout", "resid_pdrop", "embd_pdrop"]),
        ("phi3", ["attention_dropout", "resid_pdrop", "embd_pdrop"]),
        ("starcoder2", ["attention_dropout", "residual_dropout", "embedding_dropout"]),
        ("seed_oss", ["attention_dropout", "residual_dropout"]),
        ("gpt_neox", ["attention_dropout", "hidden_dropout"]),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_there_is_no_dropout_while_scoring(model_type, dropouts, checkpointing):
    expected = snapshot(build(model_type), (UnitGradients,))
    model = build(model_type, **dict.fromkeys(dropouts, 0.5)).train()
    found = snapshot(model, (UnitGradients,), gradient_checkpointing=checkpointing)
    assert_same(found, expected)


@pytest.mark.parametrize(("failing_calls", "found_size"), [((1, 2), 10), ((2,), 21)])
def test_the_micro_batch_is_halved_when_memory_runs_out(failing_calls, found_size):
    model, kinds = build("llama"), NO_FISHER
    expected = snapshot(model, kinds)
    calls = []

    def run_out(module, args):
        calls.append(args)
        if len(calls) in failing_calls:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.lm_head.register_forward_pre_hook(run_out)
    how, anatomy = Pass(), find_anatomy(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    windows_BT = WINDOWS.repeat(36, 1)  # starts with 42
    with collect(model, anatomy, windows_BT, observers(kinds), how=how) as found:
        for key, value in found[UnitGradients].absolute.items():
            close(value, expected["UnitGradients", "absolute", key])
        for key, value in found[Gram].matrix.items():
            close(value / 36, expected["Gram", "matrix", key])
        for matrix in prunable_matrices(anatomy):
            close(matrix.grad, expected["gradient", names[matrix]])
        assert found[LayerDistance].distance == pytest.approx(expected["layer_distance"].tolist())
    assert how.micro_batch_size == found_size


def test_other_errors_are_not_taken_for_lack_of_memory():
    model = build("llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: torch.zeros(2) @ torch.zeros(3))
    with (
        pytest.raises(RuntimeError, match="size"),
        collect(model, find_anatomy(model), WINDOWS, [Gram()]),
    ):
        pass


def test_progress_is_reported_up_to_the_last_window():
    model, done = build("llama"), []
    with collect(
        model, find_anatomy(model), WINDOWS, [Gram()], how=Pass(2), on_progress=done.append
    ):
        assert done == [2, 4, 5]


def assert_unchanged(model, before):
    after = state_of(model)
    for (p, grad, *rest), (q, old_grad, *old_rest) in zip(
        after.pop("parameters"), before["parameters"], strict=True
    ):
        assert p is q
        assert grad is old_grad
        assert [rest[0], rest[1], bool(rest[2])] == [old_rest[0], old_rest[1], bool(old_rest[2])]
    for name in ("gradients", "values"):
        for new, old in zip(after.pop(name), before[name], strict=True):
            assert (new is None and old is None) or torch.equal(new, old)
    assert after == {name: before[name] for name in after}


def used_model():
    """A model in the middle of somebody's training: gradients, frozen weights, mixed modes."""
    model = build("llama").train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(False)
    model(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    model.model.layers[0].mlp.up_proj.weight.grad = None
    return model


RUNS = [
    (kinds, checkpointing)
    for kinds in (EVERYTHING, (UnitGradients,), (Gram,), ())
    for checkpointing in (False, True)
]


@pytest.mark.parametrize(("kinds", "checkpointing"), RUNS)
def test_the_model_is_as_before_afterwards(kinds, checkpointing):
    model = used_model()
    before = state_of(model)
    how = Pass(gradient_checkpointing=checkpointing)
    with collect(model, find_anatomy(model), WINDOWS, observers(kinds), how=how):
        assert not model.training
    assert_unchanged(model, before)


def test_gradient_checkpointing_that_was_on_stays_on():
    model = build("llama").train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = checkpoint
    for checkpointing in (False, True):
        how = Pass(gradient_checkpointing=checkpointing)
        with collect(model, find_anatomy(model), WINDOWS, [UnitGradients()], how=how):
            pass
        for layer in model.model.layers:
            assert layer.gradient_checkpointing
            assert layer._gradient_checkpointing_func is checkpoint


@pytest.mark.parametrize(("kinds", "checkpointing"), RUNS)
@pytest.mark.parametrize("where", ["in the pass", "in the block"])
def test_the_model_is_as_before_after_an_exception(kinds, checkpointing, where):
    model = used_model()
    before = state_of(model)

    def on_progress(done):
        if where == "in the pass":
            raise KeyboardInterrupt

    how = Pass(micro_batch_size=2, gradient_checkpointing=checkpointing)
    with (
        pytest.raises(KeyboardInterrupt),
        collect(
            model, find_anatomy(model), WINDOWS, observers(kinds), how=how, on_progress=on_progress
        ),
    ):
        raise KeyboardInterrupt
    assert_unchanged(model, before)


# --- memory -----------------------------------------------------------------------------------


def peak_bytes(work):
    """Most bytes that tensors made by `work` hold at one time, temporaries of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def require_gradient(module, args):
    args[0].requires_grad_()


def plain_pass(model, windows_BT, weights):
    """Forward and backward as transformers computes them, two windows at a time."""
    matrices = set(prunable_matrices(find_anatomy(model))) if weights else set()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in matrices)
    layer = model.model.layers[0]
    handle = layer.register_forward_pre_hook(require_gradient)
    for batch_BT in windows_BT.split(2):
        model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss.backward()
    handle.remove()


@pytest.mark.filterwarnings("ignore::UserWarning:torch.profiler")
@pytest.mark.parametrize("kinds", [(WeightGradients,), (UnitGradients,)])
def test_a_pass_holds_little_more_than_one_micro_batch(kinds):
    windows_BT = random_tokens(batch=6, length=256)
    model = build("llama", torch.float32)
    anatomy = find_anatomy(model)

    def scored(number):
        with collect(
            model, anatomy, windows_BT[:number], observers(kinds), how=Pass(micro_batch_size=2)
        ):
            pass

    weights = 4 * anatomy.total_parameters
    plain = peak_bytes(lambda: plain_pass(model, windows_BT, of_weights(kinds)))
    one, three = peak_bytes(lambda: scored(2)), peak_bytes(lambda: scored(6))
    gradients = sum(4 * p.numel() for p in prunable_matrices(anatomy) if of_weights(kinds))
    assert three <= 1.01 * one + gradients
    # Autograd keeps what output projections read for the gradient of their weights. Without that
    # gradient it is kept here, for that of the units.
    columns = sum(axis.output.index_UK.numel() for axis in anatomy.of_kinds(CUT))
    inputs = 0 if of_weights(kinds) else 4 * 2 * 256 * columns
    assert weights + three <= 1.10 * (weights + plain + inputs)
