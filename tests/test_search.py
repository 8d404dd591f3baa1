"""A search tells models apart without cutting them, goes on where it stopped, and its recipe makes
the model that it found."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from adapt_pruner import search
from adapt_pruner.api import prune
from adapt_pruner.data import CalibrationData
from adapt_pruner.errors import (
    CalibrationError,
    EvaluationError,
    InvalidSettings,
    NonFiniteError,
    WritingError,
)
from adapt_pruner.methods import build_settings, make_settings
from adapt_pruner.methods.ada_pruner import TERMS, sample_pool
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.score.collect import collect
from adapt_pruner.score.observers import Fisher
from adapt_pruner.searching.measuring import Validation, masked
from adapt_pruner.searching.place import Place
from adapt_pruner.searching.pool import Pool, choose, grouped, score_pool
from adapt_pruner.searching.request import SearchSettings
from adapt_pruner.searching.space import OneOf, Range, make_space, parse_space
from adapt_pruner.searching.trials import Bench
from conftest import WORDS
from picomodels import build, random_tokens

pytest.importorskip("optuna")

SMALL = {
    "windows": 4, "window_length": 16, "pool": 20, "groups": 3, "draws": 4,
    "validation_window": 16, "validation_windows": 8,
}  # fmt: skip
SAMPLES = (1, 4, 5, 11)


@pytest.fixture(scope="module")
def validation_file(tmp_path_factory):
    rng = random.Random(1)
    file = tmp_path_factory.mktemp("validation") / "validation.txt"
    documents = (" ".join(rng.choices(WORDS, k=20)) for _ in range(8))
    file.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return file


@pytest.fixture
def bench(tokenizer):
    """Of a random model; made by hand, so that each part can be looked at."""
    return make_bench("llama", tokenizer)


def make_bench(model_type, tokenizer, **values):
    model = build(model_type, torch.float32)
    anatomy = find_anatomy(model)
    settings = make_settings(method="ada-pruner", windows=4, window_length=16, pool=12, **values)
    how = SearchSettings(groups=2, draws=2, validation_window=16, validation_windows=6)
    calibration = CalibrationData(random_tokens(20, 30), 16, 4)
    texts = [" ".join(random.Random(2).choices(WORDS, k=80))]
    bench = Bench(
        model, tokenizer, anatomy, int(0.8 * anatomy.total_parameters), settings, how,
        make_space(settings, how, {}), calibration, Validation(model, tokenizer, texts, how),
    )  # fmt: skip
    axes = anatomy.of_kinds({"neurons", "kv-groups"})
    bench.pool = score_pool(model, anatomy, axes, sample_pool(calibration, settings.pool))
    return bench


# --- what is told without a cut ----------------------------------------------------------------


def test_recombined_scores_equal_a_pass_over_the_chosen_windows(bench):
    axes = bench.anatomy.of_kinds({"neurons", "kv-groups"})
    found = bench.pool.terms(SAMPLES)
    windows_BT = bench.pool.windows_PT[list(SAMPLES)]
    with collect(bench.model, bench.anatomy, windows_BT, [Fisher()], axes=axes) as statistics:
        for name in ("coarse", "second"):
            for axis in axes:
                torch.testing.assert_close(found[name][axis.key], TERMS[name](axis, statistics))
    other = bench.pool.terms((0, 2, 3, 6))
    assert not torch.allclose(other["coarse"][0, "neurons"], found["coarse"][0, "neurons"])


def test_a_stored_pool_is_the_same(bench):
    again = Pool.of_tensors(bench.pool.tensors())
    assert again.sums.keys() == bench.pool.sums.keys()
    for name, of_axes in again.terms(SAMPLES).items():
        for key, score_U in of_axes.items():
            assert torch.equal(score_U, bench.pool.terms(SAMPLES)[name][key])


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", {}),
        ("llama", {"alpha_coarse": 0.0, "compensation": "refit"}),
        ("phi3", {"allocation": "global"}),  # fused projections
        ("olmo2", {}),  # a norm over all heads: it must be cut to be told
    ],
)
def test_a_trial_tells_the_perplexity_of_the_cut_model(model_type, values, tokenizer):
    bench = make_bench(model_type, tokenizer, **values)
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    settings = build_settings(bench.settings, samples=SAMPLES)
    told = list(bench.values_of(settings))
    for name, tensor in bench.model.state_dict().items():
        assert torch.equal(tensor, before[name]), "a trial must leave the model as it was"
    prune(bench.model, params=bench.target, calibration=bench.calibration, settings=settings)
    assert bench.model.num_parameters() <= bench.target
    assert told[-1] == pytest.approx(bench.validation.measure(bench.model), rel=1e-5)
    assert len(told) == 4
    assert len(set(told)) > 1, "the parts of the text grow"


def test_a_mask_is_taken_off_when_a_trial_fails(bench):
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    axes = bench.anatomy.of_kinds({"neurons", "kv-groups"})
    keep = bench.keep(build_settings(bench.settings, samples=SAMPLES))
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


def test_a_space_is_made_of_lists_and_ranges():
    settings = make_settings(method="ada-pruner")
    space = parse_space({"windows": {"low": 5, "high": 20}, "allocation": ["even", "global"],
                         "ridge": {"low": 1e-3, "high": 0.1, "log": True}}, settings)  # fmt: skip
    assert space["windows"] == Range(5, 20, whole=True)
    assert space["allocation"] == OneOf(("even", "global"))
    assert space["ridge"].grid() == pytest.approx([1e-3, 1e-2, 0.1])


def test_a_grid_that_is_too_large_is_refused():
    with pytest.raises(InvalidSettings, match="has 944,784 points"):
        make_space(make_settings(method="ada-pruner"), SearchSettings(sampler="grid"), {})


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"windows": 10}, "must be a list"),
        ({"windows": {"low": 9, "high": 3}}, "must be a list"),
        ({"ridge": {"low": 0.0, "high": 1.0, "log": True}}, "must be a list"),
        ({"windws": [1, 2]}, "Did you mean 'windows'"),
        ({"window_length": [128, 256]}, "all trials share it"),
        ({"alpha_fine": [0.5, 2.0]}, "alpha_fine"),
        ({}, "search space is empty"),
        ({"ridge": [0.01]}, "search space is empty"),
    ],
)
def test_a_space_that_is_none_is_refused(section, said):
    with pytest.raises(InvalidSettings, match=said):
        make_space(make_settings(method="ada-pruner"), SearchSettings(over="none"), section)


# --- whole searches ----------------------------------------------------------------------------


@pytest.fixture
def run(llama, text_file, validation_file, tmp_path):
    def run(output="out", **values):
        values = {"calibration": str(text_file), "validation": str(validation_file), **values}
        return search(str(llama), tmp_path / output, sparsity=0.3, **{**SMALL, **values})

    return run


def ended(outcome):
    return [(t["number"], t["value"], t["samples"]) for t in outcome.trials]


def test_a_search_goes_on_and_its_recipe_makes_the_model(run, cli, tmp_path):
    first = run(trials=3, early_stop=False)
    assert [t["state"] for t in first.trials] == ["complete"] * 3
    again = run(trials=5, early_stop=False)
    assert ended(again)[:3] == ended(first)
    assert ended(run("other", trials=5, early_stop=False)) == ended(again), "as if never stopped"
    assert again.best == min(again.trials, key=lambda trial: trial["value"])["number"]
    assert again.value == pytest.approx(again.trials[again.best]["value"], rel=1e-4)

    out = tmp_path / "out"
    assert (out / "pictures" / "search.svg").stat().st_size > 1000
    assert len((out / "study.csv").read_text().splitlines()) == 6
    assert json.loads((out / "study.json").read_text())["best_trial"] == again.best
    done = cli("prune", "--recipe", out / "recipe.yaml", "-o", tmp_path / "repeated", "-q")
    assert done.status == 0, done.err
    for name in ("model.safetensors", "config.json", "pruning.json"):
        assert (tmp_path / "repeated" / name).read_bytes() == (out / name).read_bytes()

    with pytest.raises(InvalidSettings, match="another search: space differ"):
        run(trials=6, over="importance")
    (out / "mine.txt").write_text("foreign")
    with pytest.raises(WritingError, match=r"mine\.txt"):
        run(trials=6, early_stop=False)


def test_the_command_line_searches_any_setting_of_any_method(
    cli, llama, text_file, validation_file, tmp_path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {llama}\nmethod: adapt-pruner\nsparsity: 0.3\nwindows: 4\nwindow_length: 16\n"
        f"calibration: {text_file}\nvalidation: {validation_file}\nsampler: grid\n"
        "validation_window: 16\nspace:\n  steps: [1, 2]\n"
    )
    done = cli("search", "--recipe", recipe, "-o", tmp_path / "out", "--trials", 2)
    assert done.status == 0, done.err
    assert "2 trials" in done.out
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    assert {trial["values"]["steps"] for trial in study["trials"]} == {1, 2}
    assert study["samples"] == []


def test_a_database_holds_a_study_of_another_objective(run, tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    values = {"storage": storage, "objective": "kl", "over": "importance", "sampler": "random"}
    found = run(trials=2, **values)
    assert found.dense == pytest.approx(0, abs=1e-6)
    assert 0 < found.value == pytest.approx(found.trials[found.best]["value"], rel=1e-3)
    assert found.settings.samples == ()
    assert not (tmp_path / "out" / "study" / "journal.log").exists()
    with pytest.raises(InvalidSettings, match="another search: objective differ"):
        run("other", trials=3, **{**values, "objective": "perplexity"})


def test_overlapping_validation_text_is_refused(run, text_file):
    document = text_file.read_text().split("\n")[0]
    with pytest.raises(CalibrationError, match="overlaps with the calibration text") as caught:
        run(validation=str(text_file))
    assert caught.value.args[0].count('"') == 2, "it shows what is in both"
    assert document


def test_too_few_samples_are_refused(run):
    with pytest.raises(CalibrationError, match="has 40 samples of at least 16 tokens, and 50"):
        run(windows=50, pool=100)


def test_a_search_in_which_every_trial_fails_says_why(run, monkeypatch):
    def fails(*_):
        raise NonFiniteError("The loss is NaN.")

    monkeypatch.setattr(Bench, "settings_of", fails)
    with pytest.raises(EvaluationError, match=r"Every trial failed, 5 of them .* The loss is NaN"):
        run(trials=50)


def test_a_killed_worker_loses_its_running_trial_alone(
    run, llama, text_file, validation_file, tmp_path
):
    place = tmp_path / "out"
    code = (
        "import torch; torch.set_num_threads(1); from adapt_pruner import search; "
        f"search({str(llama)!r}, {str(place)!r}, sparsity=0.3, calibration={str(text_file)!r}, "
        f"validation={str(validation_file)!r}, trials=10_000, **{SMALL!r})"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    journal = place / "study" / "journal.log"
    try:
        until = time.monotonic() + 120
        while not (journal.is_file() and journal.read_text().count('"samples"') > 3):
            assert worker.poll() is None, "the worker must not end by itself"
            assert time.monotonic() < until
            time.sleep(0.05)
        together = run(trials=2)  # beside a worker that is alive
        assert len(together.trials) >= 3
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    left = Place(place).open_study(None, None, overwrite=False).trials
    finished = [t.number for t in left if t.state.is_finished()]
    assert len(left) - len(finished) <= 1
    after = run(trials=len(finished) + 1)
    assert len([t for t in after.trials if t["state"] != "running"]) == len(finished) + 1
    assert ended(after)[:2] == ended(together)[:2]


def test_a_journal_that_ends_within_a_line_goes_on(tmp_path):
    """As a full disk leaves it: what was half-written is lost, and nothing else."""
    import optuna

    place = Place(tmp_path / "out")
    for number in range(3):
        study = place.open_study(optuna.samplers.RandomSampler(), None, overwrite=False)
        assert len(study.trials) == number
        study.tell(study.ask({}), 1.0)
        with place.journal.open("ab") as journal:
            journal.write(b'{"op_code":5,"worker_id":')
