"""What one pass over the calibration windows gathers, against plain autograd and plain loops."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.score.collect import Pass, collect
from adapt_pruner.score.distance import Distance, LayerDistance, normalise
from adapt_pruner.score.observers import Fisher, Gram, UnitGradients
from gathering import CUT, WINDOWS, close, observers, prunable_matrices, snapshot
from picomodels import NUM_LAYERS, PICO, build


def window_loss(model, window_T):
    """Mean cross-entropy of the next token in one window, in the model's own precision."""
    logits_TV = model(input_ids=window_T[None], use_cache=False).logits[0]
    return F.cross_entropy(logits_TV[:-1], window_T[1:])


class Gates:
    """A multiplicative gate on every unit, put where transformers computes the unit's activation:
    on the value head that a KV group's query heads read, and on the input of the MLP's output."""

    def __init__(self, model):
        anatomy = find_anatomy(model)
        names = anatomy.architecture
        self.of = {
            axis.key: torch.ones(axis.num_units, dtype=torch.float64)
            for axis in anatomy.of_kinds(CUT)
        }
        for (i, kind), gate_U in self.of.items():
            layer = anatomy.layers[i]
            if kind == "neurons":
                layer.get_submodule(names.mlp_output).register_forward_pre_hook(
                    lambda _, args, gate_U=gate_U: (args[0] * gate_U,)
                )
                continue
            attention = layer.get_submodule(names.attention)
            values = attention.get_submodule(names.qkv[-1])
            values.register_forward_hook(self._on_values(gate_U, attention.head_dim))

    @staticmethod
    def _on_values(gate_U, head_dim):
        def hook(module, args, output):
            gate = gate_U.repeat_interleave(head_dim)  # values come last in a fused projection
            rest = torch.ones(output.shape[-1] - len(gate), dtype=gate.dtype)
            return output * torch.cat([rest, gate])

        return hook


def gate_gradients(model, windows_BT):
    """Per axis (B, U): gradient of each window's loss to each unit's gate, by plain autograd."""
    gates = list(Gates(model).of.items())
    for _, gate_U in gates:
        gate_U.requires_grad_()
    rows = [
        torch.autograd.grad(window_loss(model, window_T), [gate_U for _, gate_U in gates])
        for window_T in windows_BT
    ]
    columns = zip(*rows, strict=True)
    return {key: torch.stack(column) for (key, _), column in zip(gates, columns, strict=True)}


# --- unit gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", PICO)
def test_unit_gradients_are_gradients_of_gates(model_type):
    # Behind OLMo's clamp a gate on the value head would not be a gate on what heads read of it.
    model = build(model_type, **({"clip_qkv": None} if model_type == "olmo" else {}))
    anatomy = find_anatomy(model)
    with collect(model, anatomy, WINDOWS, [UnitGradients()]) as found:
        pass
    for key, gradient_BU in gate_gradients(model, WINDOWS).items():
        assert gradient_BU.abs().max() > 1e-4
        close(found[UnitGradients].absolute[key], gradient_BU.abs().mean(dim=0))
        close(found[UnitGradients].squared[key], gradient_BU.square().mean(dim=0))


@pytest.mark.parametrize("model_type", ["phi", "starcoder2", "gpt_neox"])  # float64 throughout
def test_unit_gradients_are_finite_differences_of_gates(model_type):
    model, window = build(model_type), WINDOWS[:1]
    with collect(model, find_anatomy(model), window, [UnitGradients()]) as found:
        pass
    step = 1e-4
    for key, gate_U in Gates(model).of.items():
        differences = []
        for u in range(4):
            losses = []
            for gate in (1 + step, 1 - step):
                gate_U[u] = gate
                with torch.no_grad():
                    losses.append(window_loss(model, window[0]).item())
            gate_U[u] = 1
            differences.append(abs(losses[0] - losses[1]) / (2 * step))
        close(found[UnitGradients].absolute[key][:4], differences)


# --- weights, Gram matrices, layers -----------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "phi3", "olmo2", "lfm2"])
def test_weight_gradients_and_fisher_are_means_over_windows(model_type):
    model = build(model_type)
    found = snapshot(model, (Fisher,))
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices = list(prunable_matrices(find_anatomy(model)))
    rows = [torch.autograd.grad(window_loss(model, w), matrices) for w in WINDOWS]
    for matrix, gradients in zip(matrices, zip(*rows, strict=True), strict=True):
        gradient_B = torch.stack(gradients)
        close(found["gradient", names[matrix]], gradient_B.mean(dim=0))
        close(found["Fisher", "squared", names[matrix]], gradient_B.square().mean(dim=0))


def test_the_loss_is_the_mean_over_windows():
    model = build("llama")
    losses = [window_loss(model, window_T).item() for window_T in WINDOWS]
    with collect(model, find_anatomy(model), WINDOWS, [UnitGradients()]) as found:
        assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert (found.num_windows, found.num_tokens) == (5, 60)


@pytest.mark.parametrize(
    ("model_type", "differences"),
    [
        ("llama", {}),
        ("phi3", {}),
        ("lfm2", {}),
        ("gpt_neox", {}),
        ("llama", {"intermediate_size": 700}),  # more than one block of columns
    ],
)
@pytest.mark.parametrize("kinds", [(Gram,), (Gram, UnitGradients)])
def test_gram_matrices_are_of_the_inputs_of_output_projections(model_type, differences, kinds):
    model = build(model_type, **differences)
    anatomy = find_anatomy(model)
    inputs = {axis.projection: [] for axis in anatomy.of_kinds(CUT)}
    with ExitStack() as hooks, torch.no_grad():
        for axis in anatomy.of_kinds(CUT):
            handle = axis.output.module.register_forward_pre_hook(
                lambda _, args, key=axis.projection: inputs[key].append(args[0])
            )
            hooks.callback(handle.remove)
        for window_T in WINDOWS:
            model(input_ids=window_T[None], use_cache=False)
    how = Pass(micro_batch_size=2)
    with collect(model, anatomy, WINDOWS, observers(kinds), how=how) as found:
        assert found[Gram].matrix.keys() == inputs.keys()
        for key, seen in inputs.items():
            x_NC = torch.cat(seen).flatten(0, 1)
            close(found[Gram].matrix[key], x_NC.T @ x_NC)


def distance_by_hand(distance, x_BTD, y_BTD):
    if distance is Distance.COSINE:
        norms = x_BTD.square().sum(-1).sqrt() * y_BTD.square().sum(-1).sqrt()
        return -((x_BTD * y_BTD).sum(-1) / norms).mean()
    moved = y_BTD - x_BTD
    if distance is Distance.EUCLIDEAN:
        return moved.square().sum(-1).sqrt().mean()
    return moved.abs().sum(-1).mean()


@pytest.mark.parametrize("distance", Distance)
def test_layer_distances_come_from_the_residual_stream(distance):
    model = build("llama")
    model.model.norm = nn.Identity()  # else the last hidden state is a normalised one
    with torch.no_grad():
        states = model(input_ids=WINDOWS, output_hidden_states=True).hidden_states
    expected = [distance_by_hand(distance, x, y) for x, y in pairwise(states)]
    assert len(expected) == NUM_LAYERS
    anatomy = find_anatomy(model)
    with collect(model, anatomy, WINDOWS, [LayerDistance(distance)], how=Pass(2)) as found:
        assert found[LayerDistance].distance == pytest.approx(
            [x.item() for x in expected], rel=1e-5
        )


@pytest.mark.parametrize("model_type", PICO)
def test_every_architecture_shows_its_residual_stream(model_type):
    model = build(model_type)
    with torch.no_grad():
        states = model(input_ids=WINDOWS, output_hidden_states=True).hidden_states
    expected = [distance_by_hand(Distance.COSINE, x, y).item() for x, y in pairwise(states[:-1])]
    with collect(model, find_anatomy(model), WINDOWS, [LayerDistance()]) as found:
        assert found[LayerDistance].distance[:-1] == pytest.approx(expected, rel=1e-5)


def test_a_cosine_of_one_is_a_distance_of_minus_one():
    x_BTD = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    assert Distance.COSINE.between(x_BTD, 2 * x_BTD).item() == pytest.approx(-1)
    turned = torch.tensor([[[-4.0, 3.0], [1.0, 0.0]]])  # cosines 0 and 1, moved by (-7, -1) and 0
    assert Distance.COSINE.between(x_BTD, turned).item() == pytest.approx(-0.5)
    assert Distance.EUCLIDEAN.between(x_BTD, turned).item() == pytest.approx(50**0.5 / 2)
    assert Distance.MANHATTAN.between(x_BTD, turned).item() == pytest.approx(4)


@pytest.mark.parametrize(
    ("distances", "importance"),
    [
        ([-0.9, -0.6, -0.3], [-1, 0, 1]),  # mean -0.6, largest 0.3
        ([1.0, 2.0, 6.0], [-2 / 3, -1 / 3, 1]),  # mean 3, largest 3
        ([-5.0, 1.0, 1.0], [-1, 0.5, 0.5]),  # mean -1, largest 4
        ([0.25, 0.25], [0, 0]),
        ([-0.8], [0]),
    ],
)
def test_layer_importance_has_mean_0_and_largest_size_1(distances, importance):
    assert normalise(distances) == pytest.approx(importance)
