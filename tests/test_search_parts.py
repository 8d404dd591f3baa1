"""The parts of a search: models told apart without a cut, samples, spaces, fronts."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
import torch.nn.functional as F

from adapt_pruner.api import prune
from adapt_pruner.errors import (
    InvalidSettings,
    NonFiniteError,
)
from adapt_pruner.methods import build_settings, make_settings
from adapt_pruner.methods.ada_pruner import TERMS
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.score.collect import collect
from adapt_pruner.score.observers import Fisher
from adapt_pruner.searching.front import chosen_from, front_of
from adapt_pruner.searching.measuring import Validation, masked
from adapt_pruner.searching.pool import Pool, by_source, choose, grouped
from adapt_pruner.searching.request import SearchSettings
from adapt_pruner.searching.samples import Samples
from adapt_pruner.searching.space import Choices, Range, make_space, parse_space
from adapt_pruner.searching.trials import Bench
from adapt_pruner.settings import build as settings_of
from conftest import WORDS
from picomodels import build

pytest.importorskip("optuna")

SAMPLES = (1, 4, 5, 11)


@pytest.fixture
def make_bench(tokenizer, text_file):
    """Of a random model; made by hand, so that each part can be looked at."""
    return lambda model_type="llama", **values: _bench(model_type, tokenizer, text_file, values)


@pytest.fixture
def bench(make_bench):
    return make_bench()


def _bench(model_type, tokenizer, text, values):
    model = build(model_type, torch.float32)
    anatomy = find_anatomy(model)
    settings = make_settings(
        method="ada-pruner", windows=4, window_length=16, pool=12, calibration=str(text), **values
    )
    how = SearchSettings(groups=2, draws=2, validation_window=16, validation_windows=6)
    texts = [" ".join(random.Random(2).choices(WORDS, k=80))]
    return Bench(
        model=model,
        tokenizer=tokenizer,
        anatomy=anatomy,
        target=int(0.8 * anatomy.total_parameters),
        settings=settings,
        search=how,
        space=make_space(settings, how, {}),
        samples=Samples(model, anatomy, tokenizer, settings, how),
        validation=Validation(model, tokenizer, texts, how),
    )


# --- what is told without a cut ----------------------------------------------------------------


def test_recombined_scores_equal_a_pass_over_the_chosen_windows(bench):
    axes = bench.anatomy.of_kinds({"neurons", "kv-groups"})
    pool = bench.samples.pool(bench.settings)
    found = pool.terms(SAMPLES)
    windows_BT = pool.windows_PT[list(SAMPLES)]
    with collect(bench.model, bench.anatomy, windows_BT, [Fisher()], axes=axes) as statistics:
        for name in ("coarse", "second"):
            for axis in axes:
                torch.testing.assert_close(found[name][axis.key], TERMS[name](axis, statistics))
    other = pool.terms((0, 2, 3, 6))
    assert not torch.allclose(other["coarse"][0, "neurons"], found["coarse"][0, "neurons"])


def test_a_stored_pool_is_the_same(bench):
    pool = bench.samples.pool(bench.settings)
    again = Pool.of_tensors(pool.tensors())
    assert again.sums.keys() == pool.sums.keys()
    for name, of_axes in again.terms(SAMPLES).items():
        for key, score_U in of_axes.items():
            assert torch.equal(score_U, pool.terms(SAMPLES)[name][key])


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", {}),
        ("llama", {"alpha_coarse": 0.0, "compensation": "refit"}),
        ("phi3", {"allocation": "global"}),  # fused projections
        ("llama", {"layer_weights": (2.0, 0.5, 1.0)}),
        ("llama", {"importance": "activation-fisher"}),
        ("olmo2", {}),  # a norm over all heads: it must be cut to be told
    ],
)
def test_a_trial_tells_the_perplexity_of_the_cut_model(model_type, values, make_bench):
    bench = make_bench(model_type, **values)
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    settings = build_settings(bench.settings, samples=SAMPLES)
    told = list(bench.values_of(settings, bench.target))
    for name, tensor in bench.model.state_dict().items():
        assert torch.equal(tensor, before[name]), "a trial must leave the model as it was"
    calibration = bench.samples.calibration(settings)
    prune(bench.model, params=bench.target, calibration=calibration, settings=settings)
    assert bench.model.num_parameters() <= bench.target
    assert told[-1] == pytest.approx(bench.validation.measure(bench.model), rel=1e-5)
    assert len(told) == 4
    assert len(set(told)) > 1, "the parts of the text grow"


def test_a_mask_is_taken_off_when_a_trial_fails(bench):
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    axes = bench.anatomy.of_kinds({"neurons", "kv-groups"})
    keep = bench.keep(build_settings(bench.settings, samples=SAMPLES), bench.target)
    with contextlib.suppress(NonFiniteError), masked(axes, keep):
        down = bench.model.model.layers[0].mlp.down_proj.weight
        assert (down[:, ~keep[0, "neurons"]] == 0).all()
        raise NonFiniteError
    assert all(torch.equal(v, before[k]) for k, v in bench.model.state_dict().items())


@torch.no_grad()
def test_the_divergence_is_that_of_the_definition(bench):
    how = SearchSettings(objective="kl", validation_window=16, validation_windows=6)
    texts = [" ".join(random.Random(3).choices(WORDS, k=60))]
    kl = Validation(bench.model, bench.tokenizer, texts, how)
    assert kl.measure(bench.model) == pytest.approx(0, abs=1e-6)
    tokens = torch.tensor([ids for ids, _ in kl.windows])
    dense = bench.model(tokens).logits.log_softmax(-1)
    bench.model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    other = bench.model(tokens).logits.log_softmax(-1)
    expected = F.kl_div(other, dense, reduction="sum", log_target=True) / tokens.numel()
    assert kl.measure(bench.model) == pytest.approx(float(expected), rel=1e-3)


# --- samples and space -------------------------------------------------------------------------


def test_groups_give_samples_by_their_weights():
    group_P = torch.tensor([0] * 10 + [1] * 10 + [2] * 10)
    by_group = [sum(i // 10 == g for i in choose(group_P, [1, 1, 0], 0, 5)) for g in range(3)]
    assert by_group == [3, 2, 0]
    assert len(choose(group_P, [0, 0, 0], 1, 7)) == 7
    assert len(set(choose(group_P, [1, 0, 0], 1, 14))) == 14, "a group runs out"
    assert choose(group_P, [1, 1, 1], 0, 6) != choose(group_P, [1, 1, 1], 1, 6)


@pytest.mark.parametrize("describe", ["hidden", "loss"])
def test_groups_are_alike_inside(describe):
    torch.manual_seed(0)
    kind_P = torch.arange(30) % 3
    hidden_PD = torch.randn(30, 4) * 0.1 + 10 * F.one_hot(kind_P, 4)
    pool = Pool(torch.zeros(30, 2), {}, {}, loss_P=kind_P + torch.rand(30), hidden_PD=hidden_PD)
    assert torch.equal(grouped(pool, describe, 3, seed=0), kind_P)


def test_the_largest_sources_have_groups_of_their_own():
    assert by_source(["b", "a", "a", "c", "a", "b"], 2).tolist() == [1, 0, 0, 1, 0, 1]
    with pytest.raises(InvalidSettings, match="all samples come from"):
        by_source(["a", "a"], 2)


def test_a_space_is_made_of_lists_and_ranges():
    settings = make_settings(method="ada-pruner")
    space = parse_space({"windows": {"low": 5, "high": 20}, "allocation": ["even", "global"],
                         "ridge": {"low": 1e-3, "high": 0.1, "log": True}}, settings)  # fmt: skip
    assert space["windows"] == Range(5, 20, whole=True)
    assert space["allocation"] == Choices(("even", "global"))
    assert space["ridge"].grid() == pytest.approx([1e-3, 1e-2, 0.1])


def test_a_grid_that_is_too_large_is_refused():
    with pytest.raises(InvalidSettings, match="has 944,784 points"):
        make_space(make_settings(method="ada-pruner"), SearchSettings(sampler="grid"), {})


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("bytes", "must be perplexity or kl"),
        ("perplexity,kl", "must be perplexity or kl"),
        ("perplexity,bytes,bytes", "each once"),
        ("", "must be perplexity or kl"),
        ("perplexity,size", "objective"),
    ],
)
def test_objectives_that_do_not_go_together_are_refused(objective, said):
    with pytest.raises(InvalidSettings, match=said):
        settings_of(SearchSettings, {"objective": objective})


def test_shares_of_layers_need_a_method_that_has_them():
    how = SearchSettings(layer_spread=0.5)
    space = make_space(make_settings(method="ada-pruner"), how, {}, layers=3)
    assert space["layer 2"] == Range(0.5, 1.5)
    for values in ({"method": "flap"}, {"method": "ada-pruner", "allocation": "global"}):
        with pytest.raises(InvalidSettings, match="layer_spread"):
            make_space(make_settings(**values), how, {}, layers=3)


@pytest.mark.parametrize(("choose", "chosen"), [("quality", (2.0, 9.0)), ("nearest", (3.0, 2.0))])
def test_the_front_is_what_no_trial_beats(choose, chosen):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(directions=["minimize"] * 2)
    for values in ((9.0, 1.0), (3.0, 2.0), (2.0, 9.0), (3.5, 2.0), (9.0, 9.0)):
        study.add_trial(optuna.trial.create_trial(values=values))
    front = front_of(study)
    assert [tuple(trial.values) for trial in front] == [(2.0, 9.0), (3.0, 2.0), (9.0, 1.0)]
    how = SearchSettings(objective="perplexity,bytes", choose=choose)
    assert tuple(chosen_from(front, how).values) == chosen


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"windows": 10}, "must be a list"),
        ({"windows": {"low": 9, "high": 3}}, "must be a list"),
        ({"ridge": {"low": 0.0, "high": 1.0, "log": True}}, "must be a list"),
        ({"windws": [1, 2]}, "Did you mean 'windows'"),
        ({"pool": [128, 256]}, "all trials share it"),
        ({"window_length": {"low": 16, "high": 32}}, "window_length must be a list"),
        ({"sparsity": [0.2, 0.3]}, "with several objectives alone"),
        ({"alpha_fine": [0.5, 2.0]}, "alpha_fine"),
        ({}, "search space is empty"),
        ({"ridge": [0.01]}, "search space is empty"),
    ],
)
def test_a_space_that_is_none_is_refused(section, said):
    with pytest.raises(InvalidSettings, match=said):
        make_space(make_settings(method="ada-pruner"), SearchSettings(over="none"), section)


def test_more_groups_than_samples():
    settings = make_settings(method="ada-pruner", pool=8)
    with pytest.raises(InvalidSettings, match="groups: a pool of 8 samples"):
        make_space(settings, SearchSettings(groups=9), {})
