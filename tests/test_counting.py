"""Exact arithmetic of parameters, targets for any mix of axes, histories and moments of edits."""

from __future__ import annotations

import copy
import json
from collections import ChainMap
from itertools import product

import pytest
import torch
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from adapt_pruner import CalibrationData, prune
from adapt_pruner.allocate.chains import Removal, build_chains
from adapt_pruner.allocate.ranking import remove_ranked
from adapt_pruner.allocate.target import resolve_target, smallest_size
from adapt_pruner.methods import make_settings
from adapt_pruner.methods.adapt_pruner import CAN_CUT
from adapt_pruner.methods.base import limits_of
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.axes import CUTS, SUBLAYERS
from adapt_pruner.model.edits import Cut, cut, edit_of
from adapt_pruner.model.history import History
from masking import mask
from picomodels import build, logits_of, random_tokens

TYPES = ["llama", "phi3", "olmo2", "lfm2", "gemma2", "glm4", "phi", "gpt_neox"]
SCALED = (-1, "hidden")
CALIBRATION = CalibrationData(random_tokens(20, 30), window_length=12, num_windows=2)
ALL_KINDS = {kind for kinds in CUTS.values() for kind in kinds}


def random_keep(anatomy, seed, kinds=ALL_KINDS, probability=0.6):
    """A cut of some axes, chosen at random: at least one unit of each width, one layer, stays."""
    generator = torch.Generator().manual_seed(seed)

    def flip(share):
        return torch.rand((), generator=generator).item() < share

    stays = int(torch.randint(len(anatomy.layers), (), generator=generator))
    keep = {}
    for axis in anatomy.of_kinds(kinds):
        if axis.is_presence:
            if axis.layer != stays and flip(0.25):
                keep[axis.key] = torch.zeros(1, dtype=torch.bool)
        elif flip(probability):
            left = 1 + int(torch.randint(axis.size, (), generator=generator))
            order = torch.rand(axis.strata, axis.size, generator=generator).argsort(dim=1)
            keep[axis.key] = (order < left).flatten()
    return keep


def sizes_of(anatomy, keep):
    """Units left of one stratum, of every axis that `keep` names."""
    axes = {axis.key: axis for axis in anatomy.axes}
    return {key: int(keep_U.sum()) // axes[key].strata for key, keep_U in keep.items()}


@given(st.sampled_from(TYPES), st.integers(0, 2**31))
@example("phi", 83)  # a layer loses both of its parts, and the norm that they share
@settings(max_examples=25, deadline=None)
def test_parameters_of_any_mix_are_those_of_the_cut_model(model_type, seed):
    model = build(model_type, torch.float32, tie_word_embeddings=bool(seed % 2))
    anatomy = find_anatomy(model)
    keep = random_keep(anatomy, seed)
    counted = anatomy.parameters(sizes_of(anatomy, keep))
    assert anatomy.parameters({}) == anatomy.total_parameters == model.num_parameters()
    after = cut(model, keep)
    assert counted == after.total_parameters == model.num_parameters()
    assert torch.isfinite(logits_of(model, random_tokens())).all()


@pytest.mark.parametrize("first", SUBLAYERS)
@pytest.mark.parametrize("model_type", ["phi", "cohere2", "gpt_neox", "llama", "lfm2"])
def test_a_layer_whose_sublayers_leave_one_after_the_other_is_counted(model_type, first):
    """The second one takes with it what served both, and the layer."""
    (second,) = set(SUBLAYERS) - {first}
    model = build(model_type, torch.float32)
    layers = {axis.layer for axis in find_anatomy(model).of_kinds({first})}
    anatomy = cut(model, {(min(layers), first): torch.zeros(1, dtype=torch.bool)})
    gone = (min(layers), second)
    counted = anatomy.parameters({gone: 0})
    before = anatomy.total_parameters - anatomy.parameters_of_layers[min(layers)]
    after = cut(model, {gone: torch.zeros(1, dtype=torch.bool)})
    assert counted == after.total_parameters == model.num_parameters()
    assert (counted == before) == (len(after.layers) < len(anatomy.layers))


# --- exact targets for combinations of what may be cut ------------------------------------------

COMBINATIONS = [
    ("neurons", "query-heads"),
    ("neurons", "hidden"),
    ("kv-groups", "layers"),
    ("layers",),
    ("sublayers", "neurons"),
    ("neurons", "kv-groups", "query-heads", "hidden", "layers", "sublayers"),
]


@pytest.mark.parametrize("what", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("model_type", ["llama", "phi3", "olmo2", "lfm2"])
def test_targets_are_met_below_by_less_than_a_unit_of_the_finest_axis(
    model_type, what, calibration
):
    model = build(model_type, torch.float32)
    anatomy = find_anatomy(model)
    limits = limits_of(make_settings(cut=what), anatomy, CAN_CUT)
    finest = min(axis.unit_cost * axis.strata for axis in limits.axes(anatomy))
    steps = 1 if what == ("layers",) else 2  # lfm2's layers differ; one that is gone stays gone
    result = prune(
        model, sparsity=0.35, calibration=calibration, cut=what, steps=steps, tuning_steps=1,
        importance="activation-fisher", compensation="none",
    )  # fmt: skip
    assert 0 <= result.target - model.num_parameters() < finest
    assert result.after.total == model.num_parameters()
    assert torch.isfinite(logits_of(model, random_tokens())).all()


COARSE = [("kv-groups", "layers"), ("query-heads", "layers")]


def nearest_possible(anatomy, kinds, target):
    """The largest size of at most `target` parameters that any cut of some kinds leaves, of a model
    that keeps a layer: all of them are tried."""
    choices = [list(anatomy.of_layer(layer)) for layer in range(len(anatomy.layers))]
    choices = [[axis for axis in axes if axis.kind in kinds] for axes in choices]
    options = [
        [
            dict(zip([axis.key for axis in axes], sizes, strict=True))
            for sizes in product(*[range(0 if a.is_presence else 1, a.size + 1) for a in axes])
        ]
        for axes in choices
    ]
    sizes = [anatomy.parameters(dict(ChainMap(*of_layers))) for of_layers in product(*options)]
    return max(size for size in sizes if size <= target)


@given(
    st.sampled_from(COARSE), st.integers(1, 4), st.floats(0.05, 0.6), st.integers(0, 1000),
    st.sampled_from([8, 96]),
)  # fmt: skip
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@example(("kv-groups", "layers"), 4, 0.368832, 21, 96)  # groups cut early, then a layer too many
def test_coarse_targets_are_met_in_any_number_of_steps(what, steps, sparsity, seed, neurons):
    model = build("llama", torch.float32, intermediate_size=neurons)
    anatomy = find_anatomy(model)
    limits = limits_of(make_settings(cut=what), anatomy, CAN_CUT)
    finest = min(axis.unit_cost * axis.strata for axis in limits.axes(anatomy))
    target = resolve_target(anatomy, sparsity, None)
    assume(target >= smallest_size(anatomy, limits))
    prune(
        model, params=target, calibration=CALIBRATION, cut=what, steps=steps, seed=seed,
        importance="random", compensation="none", tuning_steps=0,
    )  # fmt: skip
    missed = target - model.num_parameters()
    assert missed >= 0
    if missed >= finest:  # then nothing nearer is possible
        assert model.num_parameters() == nearest_possible(anatomy, limits.kinds, target)


@pytest.mark.parametrize("seed", [22, 30, 141, 179, 320])
def test_a_sublayer_that_is_too_much_is_given_back_for_groups_and_smaller_ones(seed):
    """An MLP of 8 neurons costs less than a KV group, so what is finest cannot make up for it."""
    generator = torch.Generator().manual_seed(seed)
    anatomy = find_anatomy(build("llama", torch.float32, intermediate_size=8))
    limits = limits_of(make_settings(cut=("kv-groups", "sublayers")), anatomy, CAN_CUT)
    target = resolve_target(anatomy, 0.05 + 0.55 * float(torch.rand((), generator=generator)), None)
    scores = {
        axis.key: torch.rand(axis.num_units, generator=generator) for axis in limits.axes(anatomy)
    }
    removal = Removal(anatomy, build_chains(anatomy, scores, limits))
    remove_ranked(removal, target)
    assert 0 <= target - removal.amount < min(axis.unit_cost for axis in limits.axes(anatomy))


# --- histories ----------------------------------------------------------------------------------


@given(st.sampled_from(TYPES), st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_a_history_leads_from_the_dense_model_to_the_present_one(model_type, seed, count):
    model = build(model_type, torch.float32)
    dense = copy.deepcopy(model)
    history = History(find_anatomy(model))
    for number in range(count):
        before = find_anatomy(model)
        edit = Cut(random_keep(before, seed + number, probability=0.4))
        history.add(edit, before)
        edit.apply(model)
        history = History.from_state(json.loads(json.dumps(history.state_dict())))
    for edit in history.edits:
        edit_of(json.loads(json.dumps(edit.record()))).apply(dense)
    expected = dict(model.named_parameters())
    found = dict(dense.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        if model_type == "gemma2":  # embeddings and last norm are rescaled with the hidden size
            torch.testing.assert_close(found[name], parameter, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[name], parameter), name
    assert len(history.layers) == len(find_anatomy(model).layers)
    close = 1e-4 if model_type == "gemma2" else 0
    torch.testing.assert_close(
        logits_of(dense, random_tokens()), logits_of(model, random_tokens()), rtol=close, atol=close
    )


# --- moments ------------------------------------------------------------------------------------


def moments_like(model):
    return {
        name: {"exp_avg": p.detach().clone(), "exp_avg_sq": -p.detach(), "step": torch.tensor(3.0)}
        for name, p in model.named_parameters()
    }


def assert_followed(model, edit):
    """Moments that equal the weights equal the cut weights afterwards."""
    moments = moments_like(model)
    assert edit.follow(model, moments)
    edit.apply(model)
    assert moments.keys() == dict(model.named_parameters()).keys()
    scaled = {"model.embed_tokens.weight", "model.norm.weight"} if SCALED in edit.keep else set()
    for name, parameter in model.named_parameters():
        assert moments[name]["step"] == 3
        if name in scaled and model.config.model_type == "gemma2":
            assert moments[name]["exp_avg"].shape == parameter.shape  # rescaled by the cut
            continue
        assert torch.equal(moments[name]["exp_avg"], parameter.detach()), name
        assert torch.equal(moments[name]["exp_avg_sq"], -parameter.detach()), name


@pytest.mark.parametrize("kind", sorted(ALL_KINDS))
@pytest.mark.parametrize("model_type", ["llama", "phi3", "olmo2", "lfm2", "gemma2", "glm4"])
def test_moments_follow_a_cut_of_every_kind(model_type, kind):
    model = build(model_type)
    anatomy = find_anatomy(model)
    keep = {}
    for axis in anatomy.of_kinds({kind}):
        if axis.is_presence:
            keep[axis.key] = torch.tensor([axis.layer != 1])
        else:
            keep[axis.key] = (torch.arange(axis.num_units) % axis.size) % 2 == 0
    if not any((~keep_U).any() for keep_U in keep.values()):
        assert (model_type, kind) == ("lfm2", "attention")  # its layer 1 is a convolution
        return
    before = anatomy.total_parameters
    assert_followed(model, Cut(keep))
    assert model.num_parameters() < before


@given(st.sampled_from(TYPES), st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_moments_follow_a_cut_of_any_mix(model_type, seed):
    model = build(model_type)
    assert_followed(model, Cut(random_keep(find_anatomy(model), seed)))


def gradients_of(model):
    logits = model(random_tokens()).logits.double()
    logits.logsumexp(-1).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_moments_follow_embeddings_that_are_rescaled(tied):
    """Moments that are the gradients of the masked model are those of the cut model afterwards."""
    model = build("gemma2", tie_word_embeddings=tied)
    keep_D = torch.arange(model.config.hidden_size) % 4 != 0
    masked = copy.deepcopy(model)
    mask(masked, {SCALED: keep_D})
    gradients = gradients_of(masked)
    gradients["model.norm.weight"] = torch.zeros(len(keep_D), dtype=torch.float64)
    gradients["model.norm.weight"][keep_D] = gradients.pop("model.norm.norm.weight")
    names = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
    moments = {
        name: {"exp_avg": gradients[name].clone(), "exp_avg_sq": gradients[name] ** 2}
        for name in names
    }
    assert Cut({SCALED: keep_D}).follow(model, moments)
    cut(model, {SCALED: keep_D})
    for name, expected in gradients_of(model).items():
        if name in names:
            # Gemma's norms and the factor of its embeddings are float32.
            torch.testing.assert_close(moments[name]["exp_avg"], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                moments[name]["exp_avg_sq"], expected**2, rtol=1e-4, atol=1e-5
            )
