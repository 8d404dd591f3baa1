"""What one pass over the calibration windows gathers, against plain autograd and plain loops."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from adapt_pruner.errors import NonFiniteError
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.score.collect import Pass, collect
from adapt_pruner.score.distance import Distance, LayerDistance, normalise
from adapt_pruner.score.observers import Fisher, Gram, UnitGradients, WeightGradients, matrices
from picomodels import INTERMEDIATE_SIZE, NUM_LAYERS, PICO, build, random_tokens

EVERYTHING = (Fisher, UnitGradients, Gram)
NO_FISHER = (WeightGradients, UnitGradients, Gram)
CUT = {"kv-groups", "neurons"}
WINDOWS = random_tokens(batch=5, length=12)
TABLES = (
    (UnitGradients, "absolute"),
    (UnitGradients, "squared"),
    (Gram, "matrix"),
    (Fisher, "squared"),
)


def close(actual, expected, tolerance=1e-4):
    """Equal up to float32 rounding, relative to the largest entry."""
    expected = torch.as_tensor(expected).double()
    limit = tolerance * float(expected.abs().max())
    torch.testing.assert_close(torch.as_tensor(actual).double(), expected, rtol=0, atol=limit)


def observers(kinds):
    """The distances of layers are always wanted."""
    return [LayerDistance(), *(kind() for kind in kinds)]


def prunable_matrices(anatomy):
    return matrices(anatomy.of_kinds(CUT))


def of_weights(kinds):
    return any(kind.needs_weight_gradients for kind in kinds)


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


def snapshot(model, kinds=EVERYTHING, windows_BT=WINDOWS, **how):
    """Everything that a pass finds, as float64 tensors by name."""
    anatomy = find_anatomy(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    with collect(model, anatomy, windows_BT, observers(kinds), how=Pass(**how)) as found:
        result = {"loss": found.loss, "layer_distance": found[LayerDistance].distance}
        for kind, table in TABLES:
            if kind in kinds:
                for key, value in getattr(found[kind], table).items():
                    result[kind.__name__, table, names.get(key, key)] = value
        if of_weights(kinds):
            for matrix in prunable_matrices(anatomy):
                result["gradient", names[matrix]] = matrix.grad.clone()
    return {name: torch.as_tensor(value).double() for name, value in result.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        try:
            close(actual[name], value)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


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
        assert alive == [0]


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


# --- the model is left as it was --------------------------------------------------------------


def checkpoints(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def state_of(model):
    """Whatever scoring could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "parameters": [
            (p, p.grad, p.requires_grad, bool(p._backward_hooks), p._post_accumulate_grad_hooks)
            for p in model.parameters()
        ],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "values": [p.detach().clone() for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(getattr(m, name)) for m in model.modules() for name in hooks],
        "checkpointing": checkpoints(model),
        "grad mode": torch.is_grad_enabled(),
    }


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


# --- unsound models ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kinds", [(WeightGradients,), (UnitGradients,), (Gram,)])
@pytest.mark.parametrize("where", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
def test_weights_that_are_not_finite_are_an_error(value, kinds, where):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].get_submodule(where).weight[0, 0] = value
    before = state_of(model)
    with (
        pytest.raises(NonFiniteError, match=r"NaN|nan"),
        collect(model, find_anatomy(model), WINDOWS, observers(kinds)),
    ):
        pytest.fail("scores of a broken model")
    after = state_of(model)
    assert after["training"] == before["training"]
    assert after["hooks"] == before["hooks"]


def test_the_error_names_the_layer_that_breaks():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with (
        pytest.raises(NonFiniteError, match="layer 1"),
        collect(model, find_anatomy(model), WINDOWS, [LayerDistance()]),
    ):
        pass


def test_a_loss_that_is_not_finite_is_an_error():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with (
        pytest.raises(NonFiniteError, match=r"loss on the calibration text is nan"),
        collect(model, find_anatomy(model), WINDOWS, [UnitGradients()]),
    ):
        pytest.fail("scores of a broken model")


class SquareRoot(nn.Module):
    """Finite, with a gradient that is not: below zero it is 0 times that of a root, NaN."""

    def forward(self, x):
        return torch.where(x > 0, x.sqrt(), 0)


@pytest.mark.parametrize("kinds", [(WeightGradients,), (Fisher,), (UnitGradients,)])
def test_gradients_that_are_not_finite_are_an_error(kinds):
    model = build("llama")
    model.model.layers[1].mlp.act_fn = SquareRoot()
    with collect(model, find_anatomy(model), WINDOWS, [Gram()]):
        pass  # without gradients the model is sound
    with (
        pytest.raises(NonFiniteError, match=r"gradient in layer \d"),
        collect(model, find_anatomy(model), WINDOWS, observers(kinds)),
    ):
        pytest.fail("scores from broken gradients")


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
