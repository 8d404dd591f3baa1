"""The refit of output projections against least squares solved in other ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapt_pruner.compensate.refit import refit_output, refit_outputs
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.axes import NEURONS, Axis, Slot
from adapt_pruner.model.edits import cut, entries_of
from adapt_pruner.score.collect import collect
from adapt_pruner.score.gram import invert_gram
from adapt_pruner.score.observers import Gram
from picomodels import build, logits_of, random_tokens

WINDOWS = random_tokens(batch=12, length=14)


def toy_axis(weight_DC, units):
    """An axis that consists of its output projection, `units` of equal width."""
    rows, columns = weight_DC.shape
    linear = nn.Linear(columns, rows, bias=False, dtype=weight_DC.dtype)
    linear.weight.data = weight_DC.clone()
    output = Slot(linear, "weight", "down_proj", 1, torch.arange(columns).view(units, -1))
    return Axis(0, NEURONS, units, [output], [], output=output)


def random_problem(tokens=50, columns=12, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_NC = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x_NC = x_NC @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return x_NC, torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def refitted(weight_DC, units, keep_U, gram_CC, ridge):
    output = toy_axis(weight_DC, units).output
    kept_C = torch.zeros(weight_DC.shape[1], dtype=torch.bool)
    kept_C[entries_of(output.index_UK, keep_U)] = True
    refit_output(output.tensor, kept_C, invert_gram(gram_CC.clone(), ridge))
    return output.tensor.detach()


KEEP = torch.tensor([True, False, True, True, False, True])  # 6 units of 2 columns
KEPT = [0, 1, 4, 5, 6, 7, 10, 11]
GONE = [2, 3, 8, 9]


def test_a_refit_by_hand():
    # One output reads a and b; over the tokens a.a = 3, a.b = 2, b.b = 1. Without b, and with
    # lambda = ridge * (3 + 1) / 2 = 1: w' = (w_a a.a + w_b a.b + w_a) / (a.a + 1).
    gram = torch.tensor([[3.0, 2.0], [2.0, 1.0]])
    weight = torch.tensor([[5.0, 4.0]])  # (15 + 8 + 5) / 4 = 7
    result = refitted(weight, 2, torch.tensor([True, False]), gram, ridge=0.5)
    torch.testing.assert_close(result, torch.tensor([[7.0, 4.0]]))


def test_a_small_ridge_gives_least_squares():
    x_NC, weight_DC = random_problem()
    result = refitted(weight_DC, 6, KEEP, x_NC.T @ x_NC, ridge=1e-13)
    expected = torch.linalg.lstsq(x_NC[:, KEPT], x_NC @ weight_DC.T).solution.T
    torch.testing.assert_close(result[:, KEPT], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(result[:, GONE], weight_DC[:, GONE])


@pytest.mark.parametrize("ridge", [1e-4, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("tokens", [50, 3])  # 3: fewer tokens than columns
def test_the_ridge_is_further_tokens_that_ask_for_the_present_weights(ridge, tokens):
    x_NC, weight_DC = random_problem(tokens)
    gram_CC = x_NC.T @ x_NC
    result = refitted(weight_DC, 6, KEEP, gram_CC, ridge)
    # ||X_keep W'^T - X W^T||^2 + lambda ||W' - W_keep||^2, the second term as 8 further rows.
    root = (ridge * gram_CC.diagonal().mean()).sqrt() * torch.eye(len(KEPT), dtype=torch.float64)
    inputs = torch.cat([x_NC[:, KEPT], root])
    outputs = torch.cat([x_NC @ weight_DC.T, root @ weight_DC[:, KEPT].T])
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    torch.testing.assert_close(result[:, KEPT], expected, rtol=1e-6, atol=1e-6)


def test_the_refit_is_nearer_to_the_full_output_than_no_refit():
    x_NC, weight_DC = random_problem()
    result = refitted(weight_DC, 6, KEEP, x_NC.T @ x_NC, ridge=0.01)
    output_ND = x_NC @ weight_DC.T
    without = (x_NC[:, KEPT] @ weight_DC[:, KEPT].T - output_ND).square().sum()
    assert (x_NC[:, KEPT] @ result[:, KEPT].T - output_ND).square().sum() < 0.9 * without


def test_a_strong_ridge_leaves_the_weights_that_stay():
    x_NC, weight_DC = random_problem()
    result = refitted(weight_DC, 6, KEEP, x_NC.T @ x_NC, ridge=1e9)
    torch.testing.assert_close(result, weight_DC, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0])
def test_a_refit_with_nothing_removed_changes_nothing(ridge):
    x_NC, weight_DC = random_problem()
    result = refitted(weight_DC, 6, torch.ones(6, dtype=torch.bool), x_NC.T @ x_NC, ridge)
    torch.testing.assert_close(result, weight_DC, rtol=1e-9, atol=1e-9)


def test_a_projection_that_never_saw_an_input_stays_as_it_is():
    _, weight_DC = random_problem()
    result = refitted(weight_DC, 6, KEEP, torch.zeros(12, 12), ridge=0.01)
    assert torch.equal(result, weight_DC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_precision_of_the_weights_stays(dtype):
    x_NC, weight_DC = random_problem()
    gram_CC = (x_NC.T @ x_NC).float()
    result = refitted(weight_DC.to(dtype), 6, KEEP, gram_CC, ridge=0.01)
    assert result.dtype == dtype
    expected = refitted(weight_DC.to(dtype).double(), 6, KEEP, gram_CC, ridge=0.01)
    torch.testing.assert_close(result, expected.to(dtype))


# --- in a model -------------------------------------------------------------------------------


def cut_without(model, layer, kind, gone, ridge=None):
    """Cut one unit, after a refit if there is a ridge."""
    anatomy = find_anatomy(model)
    with collect(model, anatomy, WINDOWS, [Gram(ridge or 1)]) as statistics:
        (axis,) = (axis for axis in anatomy.axes if axis.key == (layer, kind))
        keep = {axis.key: torch.arange(axis.num_units) != gone}
        if ridge is not None:
            refit_outputs([axis], keep, statistics[Gram])
    cut(model, keep)


@torch.no_grad()
def redundant_neuron(layer):
    """Neuron 7 becomes 0.5 times neuron 3 minus 2 times neuron 5: equal gates, and up is linear."""
    gate, up = layer.mlp.gate_proj, layer.mlp.up_proj
    for tensor in (gate.weight, gate.bias):
        tensor[5] = tensor[7] = tensor[3]
    for tensor in (up.weight, up.bias):
        tensor[7] = 0.5 * tensor[3] - 2 * tensor[5]


@torch.no_grad()
def redundant_kv_group(layer):
    """KV group 2 looks where group 0 looks, and reads -1.5 times what that reads."""
    attention = layer.self_attn
    for projection, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        linear = getattr(attention, projection)
        for tensor in (linear.weight, linear.bias):
            factor = -1.5 if projection == "v_proj" else 1
            tensor[2 * rows : 3 * rows] = factor * tensor[:rows]


@pytest.mark.parametrize(
    ("plant", "kind", "gone"),
    [(redundant_neuron, "neurons", 7), (redundant_kv_group, "kv-groups", 2)],
)
def test_a_unit_that_others_can_replace_is_replaced_exactly(plant, kind, gone):
    full, refit, plain = build("llama"), build("llama"), build("llama")
    for model in (full, refit, plain):
        plant(model.model.layers[1])
    cut_without(refit, 1, kind, gone, ridge=1e-6)
    cut_without(plain, 1, kind, gone)
    unseen = random_tokens(seed=9)
    expected = logits_of(full, unseen)
    assert (logits_of(plain, unseen) - expected).abs().max() > 0.1
    torch.testing.assert_close(logits_of(refit, unseen), expected, rtol=0, atol=1e-3)


def test_rounding_of_nearly_singular_inputs_is_no_error():
    # 64 inputs that are sums of the same three: float32 leaves H with eigenvalues below zero.
    generator = torch.Generator().manual_seed(0)
    x_NC = torch.randn(500, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    x_NC[:, 0] *= 100
    gram_CC, weight_DC = x_NC.T @ x_NC, torch.randn(4, 64, generator=generator)
    assert torch.linalg.eigvalsh(gram_CC.double() / gram_CC.diagonal().mean())[0] < -1e-8
    keep_U = torch.arange(64) % 4 > 0
    result = refitted(weight_DC, 64, keep_U, gram_CC, ridge=1e-9)
    expected = x_NC @ weight_DC.T
    torch.testing.assert_close(
        x_NC[:, keep_U] @ result[:, keep_U].T, expected, rtol=0, atol=1e-2 * float(expected.std())
    )


@pytest.mark.parametrize("number_gone", [1, 6, 11])
@pytest.mark.parametrize("tokens", [50, 3])
def test_a_refit_from_the_inverse_is_the_direct_solution(number_gone, tokens):
    # W' = (W H[:, keep] + lambda W[:, keep]) (H[keep, keep] + lambda I)^-1, with float32 sums.
    x_NC, weight_DC = random_problem(tokens)
    gram_CC = (x_NC.T @ x_NC).float()
    keep_U = torch.arange(12) >= number_gone
    system_CC = gram_CC.double() + 0.01 * gram_CC.diagonal().mean() * torch.eye(12)
    right_DK = (weight_DC @ system_CC)[:, keep_U]
    expected = torch.linalg.solve(system_CC[keep_U][:, keep_U], right_DK, left=False)
    result = refitted(weight_DC, 12, keep_U, gram_CC, ridge=0.01)
    torch.testing.assert_close(result[:, keep_U], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1, 1e3])
def test_a_float32_inverse_is_that_of_float64(scale):
    # Few tokens, columns that nearly repeat each other, and one far larger than the rest.
    generator = torch.Generator().manual_seed(0)
    x_NC = torch.randn(100, 20, generator=generator) @ torch.randn(20, 300, generator=generator)
    x_NC += 0.1 * torch.randn(100, 300, generator=generator)
    x_NC[:, 7] *= scale
    gram_CC = x_NC.T @ x_NC
    exact = invert_gram(gram_CC.double(), ridge=0.01)
    found = invert_gram(gram_CC.clone(), ridge=0.01)
    assert found.matrix_CC.dtype == torch.float32
    limit = 1e-3 * exact.matrix_CC.diagonal()
    assert ((found.matrix_CC - exact.matrix_CC).diagonal().abs() <= limit).all()
    error = (found.matrix_CC - exact.matrix_CC).norm() / exact.matrix_CC.norm()
    assert error < 1e-3
