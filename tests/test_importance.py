"""Scores of units against computations that name the weights of each unit one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.edits import cut
from adapt_pruner.score.collect import collect
from adapt_pruner.score.importance import IMPORTANCES
from adapt_pruner.score.observers import Gram, UnitGradients
from picomodels import INTERMEDIATE_SIZE, NUM_KV_HEADS, NUM_LAYERS, build, logits_of, random_tokens

WINDOWS = random_tokens(batch=9, length=14)
WITHOUT_DATA = ("magnitude-l1", "magnitude-l2", "random")
DATA_DRIVEN = [name for name in IMPORTANCES if name not in WITHOUT_DATA]


def score(model, name, seed=0, windows_BT=WINDOWS, ridge=0.01):
    """Per axis, the scores that the package computes."""
    anatomy, chosen = find_anatomy(model), IMPORTANCES[name]
    observers = [Gram(ridge) if kind is Gram else kind() for kind in chosen.needs]
    with collect(model, anatomy, windows_BT, observers) as statistics:
        return {axis.key: chosen.score(axis, statistics, seed) for axis in axes_of(anatomy)}


def axes_of(anatomy):
    return anatomy.of_kinds({"kv-groups", "neurons"})


def close(actual, expected, tolerance=1e-4):
    expected = torch.as_tensor(expected).double()
    limit = tolerance * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=limit)


# --- scores of weights ------------------------------------------------------------------------

# Rows (dim 0) or columns (dim 1) of each matrix that belong to unit u: 8 query heads of size 8 in
# pairs on 4 KV heads, 96 neurons. In phi3 the 64 query rows, 32 key rows and 32 value rows are one
# matrix, and so are the 96 gate rows and the 96 up rows.
UNITS = {
    ("llama", "kv-groups"): [
        ("self_attn.q_proj", 0, lambda u: range(16 * u, 16 * u + 16)),
        ("self_attn.k_proj", 0, lambda u: range(8 * u, 8 * u + 8)),
        ("self_attn.v_proj", 0, lambda u: range(8 * u, 8 * u + 8)),
        ("self_attn.o_proj", 1, lambda u: range(16 * u, 16 * u + 16)),
    ],
    ("llama", "neurons"): [
        ("mlp.gate_proj", 0, lambda u: [u]),
        ("mlp.up_proj", 0, lambda u: [u]),
        ("mlp.down_proj", 1, lambda u: [u]),
    ],
    ("phi3", "kv-groups"): [
        ("self_attn.qkv_proj", 0, lambda u: range(16 * u, 16 * u + 16)),
        ("self_attn.qkv_proj", 0, lambda u: range(64 + 8 * u, 64 + 8 * u + 8)),
        ("self_attn.qkv_proj", 0, lambda u: range(96 + 8 * u, 96 + 8 * u + 8)),
        ("self_attn.o_proj", 1, lambda u: range(16 * u, 16 * u + 16)),
    ],
    ("phi3", "neurons"): [
        ("mlp.gate_up_proj", 0, lambda u: [u]),
        ("mlp.gate_up_proj", 0, lambda u: [96 + u]),
        ("mlp.down_proj", 1, lambda u: [u]),
    ],
}


def matrices_of(model):
    return {
        name: p for name, p in model.model.layers.named_parameters() if p.dim() == 2
    }  # such as "0.mlp.up_proj.weight"


def gradients_per_window(model):
    """Per matrix (B, rows, columns): gradient of each window's loss, by plain autograd."""
    matrices = matrices_of(model)
    rows = []
    for window_T in WINDOWS:
        logits_TV = model(input_ids=window_T[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits_TV[:-1], window_T[1:])
        rows.append(torch.autograd.grad(loss, list(matrices.values())))
    return {name: torch.stack(g) for name, g in zip(matrices, zip(*rows, strict=True), strict=True)}


def vectors_of_unit(model_type, layer, kind, u, tables):
    """Every row or column of unit u, as one tuple of vectors, one vector from each table."""
    for path, dim, positions in UNITS[model_type, kind]:
        for position in positions(u):
            name = f"{layer}.{path}.weight"
            yield tuple(table[name].select(dim, position) for table in tables)


BY_HAND = {  # of a vector of weights, of their mean gradients and of their mean squared gradients
    "taylor": lambda w, g, f: (w * g).abs().sum(),
    "taylor-vector": lambda w, g, f: (w * g).sum().abs(),
    "taylor-second": lambda w, g, f: (w**2 * f).sum(),
    "taylor-mixed": lambda w, g, f: (w * g - w**2 * f / 2).abs().sum(),
    "magnitude-l1": lambda w, g, f: w.abs().sum(),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_scores_of_weights_are_sums_over_the_units_rows_and_columns(model_type, name):
    model = build(model_type)
    gradients = gradients_per_window(model)
    tables = (
        {name: matrix.detach() for name, matrix in matrices_of(model).items()},
        {name: gradient_B.mean(dim=0) for name, gradient_B in gradients.items()},
        {name: gradient_B.square().mean(dim=0) for name, gradient_B in gradients.items()},
    )
    scores = score(model, name)
    assert len(scores) == 2 * NUM_LAYERS
    for (layer, kind), score_U in scores.items():
        count = NUM_KV_HEADS if kind == "kv-groups" else INTERMEDIATE_SIZE
        expected = [
            sum(BY_HAND[name](*v) for v in vectors_of_unit(model_type, layer, kind, u, tables))
            for u in range(count)
        ]
        close(score_U, torch.stack(expected))


def test_magnitudes_of_constant_weights():
    model = build("llama")
    layer = model.model.layers[0]
    with torch.no_grad():
        for path, value in [
            ("mlp.gate_proj", 1.0),
            ("mlp.up_proj", -2.0),
            ("mlp.down_proj", 3.0),
            ("self_attn.q_proj", 1.0),
            ("self_attn.k_proj", 2.0),
            ("self_attn.v_proj", -3.0),
            ("self_attn.o_proj", 0.5),
        ]:
            layer.get_submodule(path).weight.fill_(value)
        layer.mlp.up_proj.weight[5] = 0
        layer.self_attn.k_proj.weight[8:16] = 0  # KV head 1
    l1, l2 = score(model, "magnitude-l1"), score(model, "magnitude-l2")
    # A neuron: 64 * (1 + 2 + 3); neuron 5 without its up row: 64 * (1 + 3).
    neurons = torch.full((96,), 384.0)
    neurons[5] = 256
    assert torch.equal(l1[0, "neurons"], neurons)
    neurons = torch.full((96,), (64 * (1 + 4 + 9)) ** 0.5)
    neurons[5] = (64 * (1 + 9)) ** 0.5
    torch.testing.assert_close(l2[0, "neurons"], neurons)
    # A KV group: 16 query rows, 8 key rows, 8 value rows, 16 output columns, 64 weights each.
    whole, cropped = 64 * (16 * 1 + 8 * 2 + 8 * 3 + 16 * 0.5), 64 * (16 * 1 + 8 * 3 + 16 * 0.5)
    assert l1[0, "kv-groups"].tolist() == [whole, cropped, whole, whole]
    whole, cropped = 64 * (16 + 8 * 4 + 8 * 9 + 16 * 0.25), 64 * (16 + 8 * 9 + 16 * 0.25)
    expected = torch.tensor([whole, cropped, whole, whole]).sqrt()
    torch.testing.assert_close(l2[0, "kv-groups"], expected)


# --- scores of activations --------------------------------------------------------------------


def test_activation_scores_are_the_unit_gradients():
    model = build("llama")
    anatomy = find_anatomy(model)
    with collect(model, anatomy, WINDOWS, [UnitGradients()]) as found:
        for axis in axes_of(anatomy):
            first = IMPORTANCES["activation-gradient"].score(axis, found)
            second = IMPORTANCES["activation-fisher"].score(axis, found)
            assert torch.equal(first, found[UnitGradients].absolute[axis.key])
            assert torch.equal(second, found[UnitGradients].squared[axis.key])
            assert (second >= first.square() * (1 - 1e-5)).all()  # mean of squares, square of mean


def test_activation_gradient_of_one_window_is_taylor_of_the_output_columns():
    # sum_t a_t dL/da_t = sum over W of W dL/dW for the columns that read the unit.
    model, window = build("llama"), WINDOWS[:1]
    found = score(model, "activation-gradient", windows_BT=window)
    model(input_ids=window, labels=window).loss.backward()
    for (i, kind), score_U in found.items():
        layer = model.model.layers[i]
        output = layer.self_attn.o_proj if kind == "kv-groups" else layer.mlp.down_proj
        products_C = (output.weight * output.weight.grad).sum(dim=0)
        close(score_U, products_C.unflatten(0, (len(score_U), -1)).sum(dim=1).abs().detach())


def inputs_of(model, axis):
    """(N, C) inputs of an axis's output projection, one row per token."""
    seen = []
    handle = axis.output.module.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1))
    )
    logits_of(model, WINDOWS)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("ridge", [0.01, 1e-5])
def test_residual_fisher_leaves_what_a_regression_on_the_other_units_cannot_explain(ridge):
    model = build("llama")
    plain = score(model, "activation-fisher")
    residual = score(model, "residual-fisher", ridge=ridge)
    for axis in axes_of(find_anatomy(model)):
        x_NC = inputs_of(model, axis)
        assert len(x_NC) > x_NC.shape[1]
        # The ridge lambda is sqrt(lambda) times a further "token" per column.
        strength = ridge * x_NC.square().sum(dim=0).mean()
        x_NC = torch.cat([x_NC, strength.sqrt() * torch.eye(x_NC.shape[1])])
        share = []
        for columns in torch.arange(x_NC.shape[1]).chunk(axis.num_units):
            others = torch.ones(x_NC.shape[1], dtype=torch.bool)
            others[columns] = False
            solution = torch.linalg.lstsq(x_NC[:, others], x_NC[:, columns]).solution
            unexplained = x_NC[:, columns] - x_NC[:, others] @ solution
            share.append(unexplained.square().sum() / x_NC[:, columns].square().sum())
        share = torch.stack(share)
        assert share.max() < 1
        # Its Gram matrix is float32: a ridge of 1e-5 leaves about four digits.
        close(residual[axis.key], plain[axis.key].double() * share, tolerance=1e-3)


def test_a_unit_that_repeats_another_has_no_residual():
    model = build("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[7], linear.bias[7] = linear.weight[3], linear.bias[3]
    plain = score(model, "activation-fisher")
    residual = score(model, "residual-fisher", ridge=1e-4)
    share_U = residual[1, "neurons"] / plain[1, "neurons"]
    repeated = torch.zeros(INTERMEDIATE_SIZE, dtype=torch.bool)
    repeated[[3, 7]] = True
    assert share_U[repeated].max() < 0.1 * share_U[~repeated].min()


def test_units_that_are_never_active_have_score_0():
    model = build("mistral")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    for name in ("activation-gradient", "activation-fisher", "residual-fisher"):
        scores = score(model, name)
        assert not scores[1, "neurons"].any()
        assert not scores[1, "kv-groups"].any()
        assert scores[0, "neurons"].all()


# --- all scores -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMPORTANCES)
def test_a_score_is_one_float_per_unit_and_changes_nothing(name):
    model = build("qwen3")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for axis, score_U in zip(
        axes_of(find_anatomy(model)), score(model, name).values(), strict=True
    ):
        assert score_U.shape == (axis.num_units,)
        assert score_U.dtype == torch.float32
        assert not score_U.requires_grad
        assert (score_U >= 0).all()
        assert len(score_U.unique()) == axis.num_units
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_random_scores_depend_on_seed_layer_and_kind_alone():
    one, same = score(build("llama"), "random"), score(build("llama", seed=5), "random")
    other = score(build("llama"), "random", seed=1)
    for key in one:
        assert torch.equal(one[key], same[key])
        assert not torch.equal(one[key], other[key])
    firsts = {round(score_U[0].item(), 6) for score_U in [*one.values(), *other.values()]}
    assert len(firsts) == 4 * NUM_LAYERS


USELESS = {0: [1], 1: [0, 3], 2: [2]}  # KV groups per layer


@pytest.fixture
def model_with_useless_groups():
    """8 query heads on 4 KV heads. Query heads 2k and 2k+1 read KV head k; what o_proj would do
    with those of useless groups is zero."""
    model = build("llama")
    with torch.no_grad():
        for i, useless in USELESS.items():
            for k in useless:
                for head in (2 * k, 2 * k + 1):
                    columns = slice(8 * head, 8 * head + 8)
                    model.model.layers[i].self_attn.o_proj.weight[:, columns] = 0
    return model


@pytest.mark.parametrize("name", DATA_DRIVEN)
def test_useless_kv_groups_rank_lowest(model_with_useless_groups, name):
    scores = score(model_with_useless_groups, name)
    for i, useless in USELESS.items():
        score_U = scores[i, "kv-groups"]
        assert sorted(score_U.argsort()[: len(useless)].tolist()) == useless
        assert score_U[useless].tolist() == [0] * len(useless)
        assert score_U.sum() > 0


def test_a_kv_group_goes_with_its_own_query_heads(model_with_useless_groups):
    model = model_with_useless_groups
    before, tokens = build("llama"), random_tokens()
    expected = logits_of(model, tokens)
    scores, keep = score(model, "taylor"), {}
    for key, score_U in scores.items():
        if key[1] == "kv-groups":
            keep[key] = score_U > 0
    cut(model, keep)
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=1e-5, atol=1e-5)
    # Layer 1 lost KV heads 0 and 3, so query heads 0, 1 and 6, 7: rows 16 to 47 stay.
    ours, full = model.model.layers[1].self_attn, before.model.layers[1].self_attn
    assert torch.equal(ours.q_proj.weight, full.q_proj.weight[16:48])
    assert torch.equal(ours.q_proj.bias, full.q_proj.bias[16:48])
    assert torch.equal(ours.k_proj.weight, full.k_proj.weight[8:24])
    assert torch.equal(ours.v_proj.bias, full.v_proj.bias[8:24])
    assert torch.equal(ours.o_proj.weight, full.o_proj.weight[:, 16:48])
