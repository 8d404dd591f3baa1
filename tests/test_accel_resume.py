"""Runs of Adapt-Accel that are killed, stopped, resumed and replaced."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from accel_runs import (
    assert_equal,
    closed_phases,
    finish,
    in_child,
    kill_at,
    logged,
    weights,
    with_training,
)
from adapt_pruner import load_model
from adapt_pruner.errors import (
    Interrupted,
    InvalidSettings,
    WritingError,
)
from adapt_pruner.recovery import finish as finishing
from adapt_pruner.recovery import materials, run, state, training
from adapt_pruner.recovery.accel import run_accel
from adapt_pruner.recovery.run import Run
from adapt_pruner.run import evaluation_texts, measure
from picomodels import build

# Resume.


def half_a_file(tensors, file, *args) -> None:
    Path(file).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


KILLS: dict[str, Callable[[], None]] = {
    "while data are tokenised": lambda: kill_at(_domains().DomainCache, "_pack", 1, True),
    "when data are there": lambda: kill_at(_domains().DomainCache, "_pack", 1, False),
    "inside the first cut": lambda: kill_at(_edits(), "describe_model", 1, False),
    "inside the second cut": lambda: kill_at(_edits(), "describe_model", 2, False),
    "between cut and training": lambda: kill_at(Run, "cut", 2, False),
    "in a step of the first phase": lambda: kill_at(training.PhaseTraining, "step", 2, True),
    "after a step of the second": lambda: kill_at(training.PhaseTraining, "step", 4, False),
    "between log and checkpoint": lambda: kill_at(Run, "_log", 8, False),
    "inside a checkpoint": lambda: setattr(state, "save_file", half_a_file),
    "before a checkpoint has its name": lambda: kill_at(state, "write_json", 3, False),
    "before a phase is closed": lambda: kill_at(Run, "close", 2, True),
    "before the last phase is closed": lambda: kill_at(Run, "close", 3, True),
    "while a phase is measured": lambda: kill_at(Run, "_measure", 3, True),
    "after the last checkpoint": lambda: kill_at(state.RunDirectory, "save", 5, False),
    "while the result is written": lambda: kill_at(finishing, "save_result", 1, False),
    "while the result is moved": lambda: kill_at(finishing, "_rename", 3, False),
}


def _domains():
    from adapt_pruner.data import domains

    return domains


def _edits():
    from adapt_pruner.model import edits

    return edits


@pytest.mark.parametrize("where", list(KILLS))
def test_killed_run_goes_on_to_the_same_weights(
    where, request_, uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "run"

    def dies() -> None:
        KILLS[where]()
        run_accel(request_, place)

    assert in_child(dies) == signal.SIGKILL
    assert not (place / "run.json").exists()
    finish(request_, place)
    assert_equal(place, uninterrupted)
    losses = [(line["step"], line["loss"]) for line in logged(place)]
    assert losses == [(line["step"], line["loss"]) for line in logged(uninterrupted)]
    assert closed_phases(place) == closed_phases(uninterrupted)
    assert not [entry for entry in place.rglob("*") if "partial" in entry.name]


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"alpha": 0.5, "teacher_top_k": 8}])
def test_killed_run_of_other_kinds_goes_on_to_the_same_weights(changes, request_, tmp_path):
    request = with_training(request_, **changes)
    finish(request, tmp_path / "whole")

    def dies() -> None:
        kill_at(training.PhaseTraining, "step", 5, True)
        run_accel(request, tmp_path / "killed")

    assert in_child(dies) == signal.SIGKILL
    finish(request, tmp_path / "killed")
    assert_equal(tmp_path / "killed", tmp_path / "whole")


def test_stop_after_and_go_on(request_, uninterrupted, tmp_path):
    place = tmp_path / "run"
    for _ in range(2):
        outcome = run_accel(replace(request_, stop_after=1), place)
        assert outcome.result is None
        assert "after phase 1 of 3" in outcome.stopped
        assert [phase["phase"] for phase in closed_phases(place)] == [1]
    (checkpoint,) = (place / "checkpoints").iterdir()
    AutoModelForCausalLM.from_pretrained(checkpoint)
    finish(request_, place)
    assert_equal(place, uninterrupted)
    assert "finished" in run_accel(request_, place).stopped


def test_budgets_of_time_and_loss(request_, text_file, uninterrupted, tmp_path, monkeypatch):
    """Hours are those of one call: each goes on from where the one before stopped."""
    assert "at step 0 of 12" in run_accel(replace(request_, max_hours=1e-9), tmp_path / "t").stopped
    original = training.PhaseTraining.step

    def slow(self, *args):
        hour = time.perf_counter() + 3600
        monkeypatch.setattr(run.time, "perf_counter", lambda: hour)
        return original(self, *args)

    for step in range(1, 4):
        with monkeypatch.context() as patch:
            patch.setattr(training.PhaseTraining, "step", slow)
            stopped = run_accel(replace(request_, max_hours=0.9), tmp_path / "t").stopped
        assert f"0.9 hours are over, at step {step} of 12" in stopped
    finish(request_, tmp_path / "t")
    assert_equal(tmp_path / "t", uninterrupted)


def test_budget_of_loss(request_, text_file, tmp_path):
    limited = replace(request_, evaluate=str(text_file), max_loss=0.01)
    for _ in range(2):
        assert "After phase 1" in run_accel(limited, tmp_path / "loss").stopped
    finish(replace(request_, evaluate=str(text_file)), tmp_path / "loss")


def test_resume_with_other_settings_says_which(request_, uninterrupted, tmp_path):
    run_accel(replace(request_, stop_after=1), tmp_path / "run")
    with pytest.raises(InvalidSettings, match=r"learning_rate: 0\.003 became 0\.001"):
        run_accel(with_training(request_, learning_rate=1e-3), tmp_path / "run")
    finish(with_training(request_, max_loss_spike=9.0), tmp_path / "run")  # changes no result
    assert_equal(tmp_path / "run", uninterrupted)
    finish(replace(with_training(request_, learning_rate=1e-3), overwrite=True), tmp_path / "run")


def test_resume_in_bfloat16_is_the_same_model(request_, tmp_path):
    settings = request_.settings.model_copy(update={"dtype": "bfloat16"})
    request = replace(request_, settings=settings)
    finish(request, tmp_path / "whole")
    run_accel(replace(request, stop_after=1), tmp_path / "stopped")
    finish(request, tmp_path / "stopped")
    assert_equal(tmp_path / "stopped", tmp_path / "whole")


def test_result_is_stored_as_the_source_is_and_measured_as_stored(
    request_, tokenizer, text_file, tmp_path
):
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    request = replace(request_, model=str(tmp_path / "source"), evaluate=str(text_file))
    result = finish(with_training(request, phases=1), tmp_path / "r")
    assert {tensor.dtype for tensor in weights(tmp_path / "r").values()} == {torch.bfloat16}
    stored = load_model(str(tmp_path / "r"), "stored", "cpu")
    assert stored.dtype == torch.bfloat16
    texts = evaluation_texts(str(text_file))
    again = measure(stored, tokenizer, texts)
    assert result.measurements["perplexity"]["after"] == again["perplexity"]
    (phase,) = closed_phases(tmp_path / "r")  # in the precision of training
    assert phase["evaluation"]["perplexity"] != again["perplexity"]


def test_training_alone_can_be_repeated_from_its_recipe(request_, tmp_path):
    """Sparsity 0 cuts nothing, and is a target like any other."""
    result = finish(with_training(replace(request_, sparsity=0), phases=1), tmp_path / "run")
    assert result.after.total == result.before.total
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["sparsity"] == 0
    assert "portable" not in recipe


def parameters_in_memory() -> int:
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter and not x.is_meta]
    return sum(parameter.numel() for parameter in found)


def test_resume_needs_no_more_memory_than_the_run(request_, tmp_path, monkeypatch):
    """The checkpoint takes the place of the source, which is not read again."""
    run_accel(replace(request_, stop_after=1), tmp_path / "run")

    def refuse(*args, **kwargs):
        raise AssertionError("the source is read")

    held, original = [], state.RunDirectory.read_weights

    def count(self, checkpoint, model):
        original(self, checkpoint, model)
        held.append(parameters_in_memory())

    with monkeypatch.context() as patch:
        patch.setattr(materials, "load_model", refuse)
        patch.setattr(state.RunDirectory, "read_weights", count)
        before = parameters_in_memory()
        result = finish(request_, tmp_path / "run")
    assert held[0] - before <= closed_phases(tmp_path / "run")[0]["parameters"]
    assert result.after.total < result.before.total


def test_one_run_at_a_time(request_, tmp_path, monkeypatch):
    def meanwhile(self, phase):
        with pytest.raises(WritingError, match="Another run is at work"):
            run_accel(request_, tmp_path / "run")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "cut", meanwhile)
        with pytest.raises(Interrupted, match="Interrupted at step 0"):
            run_accel(request_, tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()
    finish(request_, tmp_path / "run")


def test_record_that_is_damaged(request_, tmp_path):
    run_accel(replace(request_, stop_after=1), tmp_path / "run")
    for content in ("[]", "a: [", ""):
        (tmp_path / "run" / "run.yaml").write_text(content)
        with pytest.raises(InvalidSettings, match=r"run\.yaml"):
            run_accel(request_, tmp_path / "run")


def test_whatever_a_kill_left_is_cleared_away(request_, tmp_path):
    place = tmp_path / "run"
    run_accel(replace(request_, stop_after=1), place)
    (place / "..result.partial-0123").mkdir()
    finish(request_, place)
    assert not list(place.glob("..result*"))
    (place / "checkpoints" / "step-00000012").mkdir(parents=True)
    assert "finished" in run_accel(request_, place).stopped
    assert not (place / "checkpoints").exists()


def test_what_is_replaced_stays_until_the_new_run_is_whole(request_, uninterrupted, tmp_path):
    """A dead run, a run of other settings, and a finished one beside which another begins."""
    place = tmp_path / "run"
    shutil.copytree(uninterrupted, place)
    new = with_training(replace(request_, overwrite=True), learning_rate=1e-3)
    run_accel(replace(new, stop_after=1), place)
    assert_equal(place, uninterrupted)
    run_accel(replace(with_training(new, learning_rate=2e-3), stop_after=1), place)
    assert_equal(place, uninterrupted)
    run_accel(replace(new, stop_after=1), place)
    beside = place.with_name(".run.replacing")
    first = [phase["evaluation"] for phase in closed_phases(beside)]
    assert len(first) == 1
    finish(new, place)  # goes on with the one that was stopped
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert "0.001" in (place / "recipe.yaml").read_text()
    with pytest.raises(AssertionError):
        assert_equal(place, uninterrupted)
    finish(with_training(request_, learning_rate=1e-3), tmp_path / "fresh")
    assert_equal(place, tmp_path / "fresh")


def test_replacement_goes_on_without_the_flag_too(request_, uninterrupted, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(uninterrupted, place)
    new = with_training(request_, learning_rate=1e-3)
    run_accel(replace(new, stop_after=1, overwrite=True), place)
    finish(new, place)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert "finished" in run_accel(new, place).stopped


@pytest.mark.parametrize("name", ["thesis.txt", "README.md", "model.safetensors"])
def test_work_of_others_in_a_run_is_not_replaced(request_, uninterrupted, tmp_path, name):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / name).write_text("years of work")
    with pytest.raises(WritingError, match=f"or that were changed since: {name}"):
        run_accel(replace(request_, overwrite=True), tmp_path / "run")
    assert (tmp_path / "run" / name).read_text() == "years of work"


@pytest.mark.parametrize("what", ["model", "data", "evaluate"])
def test_source_in_the_output_is_not_replaced(request_, uninterrupted, tmp_path, text_file, what):
    place = tmp_path / "run"
    shutil.copytree(uninterrupted, place)
    source = place / "checkpoints" / "text.txt" if what in ("data", "evaluate") else place
    source.parent.mkdir(exist_ok=True)
    if source != place:
        shutil.copy(text_file, source)
    with pytest.raises(WritingError, match="is read by this run and lies in"):
        run_accel(replace(request_, overwrite=True, **{what: str(source)}), place)
    assert source.exists()


def test_other_directories_are_not_touched(request_, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(WritingError, match=r"holds no run|no run wrote.*: thesis\.txt"):
            run_accel(replace(request_, overwrite=overwrite), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
