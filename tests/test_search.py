"""Whole searches: they go on where they stopped, refuse what makes no sense, and their recipe makes
the model that they found."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from adapt_pruner import search
from adapt_pruner.errors import (
    CalibrationError,
    EvaluationError,
    InvalidSettings,
    NonFiniteError,
    WritingError,
)
from adapt_pruner.searching.place import Place
from adapt_pruner.searching.trials import Bench
from conftest import WORDS

pytest.importorskip("optuna")

SMALL = {
    "windows": 4, "window_length": 16, "pool": 20, "groups": 3, "draws": 4,
    "validation_window": 16, "validation_windows": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def validation_file(tmp_path_factory):
    rng = random.Random(1)
    file = tmp_path_factory.mktemp("validation") / "validation.txt"
    documents = (" ".join(rng.choices(WORDS, k=20)) for _ in range(8))
    file.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return file


@pytest.fixture
def run(llama, text_file, validation_file, tmp_path):
    def run(output="out", **values):
        values = {"calibration": str(text_file), "validation": str(validation_file), **values}
        return search(str(llama), tmp_path / output, **{"sparsity": 0.3, **SMALL, **values})

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


def test_several_objectives_leave_a_front_of_sizes(run, cli, tmp_path):
    space = {"sparsity": {"low": 0.1, "high": 0.5}, "window_length": [8, 16]}
    values = {"objective": "perplexity,parameters,bytes,latency", "prompt_tokens": 8}
    found = run(
        trials=6, sparsity=None, space=space, new_tokens=2, layer_spread=0.4, **values
    )  # fmt: skip
    assert all(trial["state"] == "complete" for trial in found.trials)
    done = [trial["objectives"] for trial in found.trials]
    for one in found.front:
        assert not any(all(other[k] < one[k] for k in other) for other in done)
    assert found.objectives["parameters"] == found.result.after.total
    assert found.objectives["bytes"] == 4 * found.objectives["parameters"]
    assert found.objectives["latency"] > 0
    assert len({one["parameters"] for one in done}) > 2
    assert found.value == pytest.approx(found.trials[found.best]["value"], rel=1e-4)
    assert len(found.settings.layer_weights) == 3

    out = tmp_path / "out"
    assert (out / "pictures" / "front.svg").stat().st_size > 1000
    assert "nearest" in json.loads((out / "study.json").read_text())["rule"]
    page = (out / "report.html").read_text()
    assert "Pareto front" in page
    done = cli("prune", "--recipe", out / "recipe.yaml", "-o", tmp_path / "again", "-q")
    assert done.status == 0, done.err
    weights = [place / "model.safetensors" for place in (out, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(InvalidSettings, match="no other size"):
        run("other", sparsity=0.3, space=space, **values)


def test_a_text_that_no_trial_saw_and_samples_by_source(
    run, cli, documents, validation_file, tmp_path
):
    pool = tmp_path / "pool"
    pool.mkdir()
    for name, part in (("a", documents[::3]), ("b", documents[1::3])):
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        (pool / f"{name}.jsonl").write_text("".join(lines))
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("a document that neither of the other texts has")
    found = run(trials=2, calibration=str(pool), heldout=str(heldout), describe="source", groups=2)
    assert found.heldout.keys() == {"dense", "value"}
    for sample in found.samples:
        assert sample["source"].endswith(f"{'ab'[sample['group']]}.jsonl")
    assert "neither" not in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(CalibrationError, match=r"held-out text .* overlaps with the validation"):
        run("other", calibration=str(pool), heldout=str(validation_file))


def test_a_study_without_trials_belongs_to_any_search(run):
    with pytest.raises(CalibrationError, match="to be chosen"):
        run(windows=50, pool=100)
    assert len(run(trials=1, objective="perplexity,bytes").trials) == 1


def test_a_grid_ends_when_all_of_it_is_tried(run):
    values = {"over": "none", "sampler": "grid", "space": {"alpha_coarse": [0.1, 0.9]}}
    assert len(run(trials=5, **values).trials) == 2
    assert len(run(trials=5, **values).trials) == 2


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


def test_latency_of_more_tokens_than_the_model_reads(run, tmp_path):
    with pytest.raises(InvalidSettings, match="new_tokens: the model reads at most 64 tokens"):
        run(trials=1, objective="perplexity,latency", new_tokens=100_000)
    assert not (tmp_path / "out").exists()
