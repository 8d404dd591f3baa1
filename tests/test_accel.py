"""Adapt-Accel end to end: what it trains, how it resumes, what it refuses."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import tracking
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import adapt_pruner
from adapt_pruner import find_anatomy, load_calibration, load_model, prune
from adapt_pruner.errors import (
    AdaptPrunerError,
    Interrupted,
    InvalidSettings,
    NonFiniteError,
    WritingError,
)
from adapt_pruner.methods import make_settings
from adapt_pruner.recovery import finish as finishing
from adapt_pruner.recovery import lora, materials, run, state, training
from adapt_pruner.recovery.accel import accel, run_accel
from adapt_pruner.recovery.plan import plan_accel
from adapt_pruner.recovery.request import AccelRequest
from adapt_pruner.recovery.run import Run
from adapt_pruner.recovery.settings import make_recovery_settings
from adapt_pruner.report import pictures
from adapt_pruner.run import evaluation_texts, measure
from picomodels import VOCAB_SIZE, build

TRAINING = {
    "phases": 3, "sequence_length": 16, "batch_tokens": 64, "learning_rate": 3e-3, "repeat": True,
    "moments": "carry", "alpha": 0.0, "final_share": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """They take half of the time; the run through the command line draws them."""
    if "command_line" not in request.node.name:
        monkeypatch.setattr(pictures, "draw_all", lambda directory, result: {})
        monkeypatch.setattr(finishing, "draw_training", lambda run, pictures: {})


@pytest.fixture
def request_(llama, text_file) -> AccelRequest:
    """Three phases of 2, 4 and 6 steps of 4 windows on the tiny Llama."""
    settings = make_settings(calibration=str(text_file), windows=4, window_length=12, steps=3)
    recovery = make_recovery_settings(**TRAINING)
    return AccelRequest(
        str(llama), str(text_file), 12 * 64, settings, recovery, sparsity=0.4, save_steps=3
    )


def with_training(request: AccelRequest, **changes: Any) -> AccelRequest:
    options = {**TRAINING, **changes}
    if options.get("lora_rank"):
        options["moments"] = "reset"
    return replace(request, recovery=make_recovery_settings(**options))


def finish(request: AccelRequest, place: Path) -> Any:
    outcome = run_accel(request, place)
    assert outcome.result is not None, outcome.stopped
    return outcome.result


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def closed_phases(place: Path) -> list[dict[str, Any]]:
    phases = json.loads((place / "phases.json").read_text())
    return [{k: v for k, v in phase.items() if k != "seconds"} for phase in phases]


def logged(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "training.jsonl").read_text().splitlines()]


def test_run_prunes_in_phases_trains_and_explains_itself(request_, text_file, tmp_path):
    request = replace(request_, evaluate=str(text_file))
    result = finish(request, tmp_path / "run")
    phases = json.loads((tmp_path / "run" / "phases.json").read_text())
    before = result.before.total
    unit = find_anatomy(result.model).of_kinds({"kv-groups"})[0].unit_cost
    for j, phase in enumerate(phases, 1):
        wanted = before - round((before - result.target) * j / 3)
        assert wanted - unit < phase["parameters"] <= wanted
        assert phase["evaluation"]["perplexity"] > 1
    lines = logged(tmp_path / "run")
    assert [line["phase"] for line in lines] == [1] * 2 + [2] * 4 + [3] * 6
    assert [line["tokens"] for line in lines] == [64 * (i + 1) for i in range(12)]
    assert lines[-1]["loss"] < lines[0]["loss"]  # random weights learn letter frequencies at once
    measured = result.measurements["perplexity"]
    assert measured["after"] == phases[-1]["evaluation"]["perplexity"] < measured["before"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["training"]["tokens"] == 768
    names = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert {"README.md", "config.json", "recipe.yaml", "pruning.json", "run.json"} <= names
    assert not names & {"checkpoints", ".result"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, result.model.get_parameter(name))


def test_kept_units_refer_to_the_original_model(request_, tmp_path):
    """With a learning rate of almost nothing, the weights left are rows of the original ones."""
    settings = request_.settings.model_copy(update={"compensation": "none"})
    request = with_training(replace(request_, settings=settings), learning_rate=1e-30)
    result = finish(request, tmp_path / "run")
    source = load_model(request.model)
    for layer in range(3):
        kept = result.kept[layer, "neurons"]
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(result.model.get_parameter(name), source.get_parameter(name)[kept])


def test_one_phase_is_prune_then_train(request_, tmp_path):
    """The cut of the only phase is that of `prune`, and training starts from it."""
    request = with_training(request_, phases=1, learning_rate=1e-30)
    result = finish(request, tmp_path / "run")
    pruned = load_model(request.model)
    text = request.settings.calibration
    calibration = load_calibration(text, result.tokenizer, 12, 4).reseeded(7919)
    prune(pruned, sparsity=0.4, calibration=calibration, settings=request.settings)
    assert find_anatomy(pruned).widths == result.widths_after
    assert len(result.steps) == 3


def test_result_does_not_depend_on_the_micro_batch(request_, tmp_path):
    finish(with_training(request_, per_device_train_batch_size=1), tmp_path / "one")
    finish(with_training(request_, per_device_train_batch_size=4), tmp_path / "four")
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, four[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_gradient_checkpointing_changes_nothing(lora_rank, request_, tmp_path):
    request_ = with_training(request_, lora_rank=lora_rank, lora_dropout=0.0)
    settings = request_.settings.model_copy(update={"gradient_checkpointing": True})
    finish(request_, tmp_path / "plain")
    finish(replace(request_, settings=settings), tmp_path / "recomputed")
    plain, recomputed = weights(tmp_path / "plain"), weights(tmp_path / "recomputed")
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, recomputed[name], atol=1e-3, rtol=1e-3)


def test_micro_batches_halve_when_memory_runs_out(request_, tmp_path, monkeypatch):
    original, sizes = training.PhaseTraining._try, []

    def scarce(self, size, *args):
        sizes.append(size)
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, size, *args)

    monkeypatch.setattr(training.PhaseTraining, "_try", scarce)
    finish(with_training(request_, phases=1), tmp_path / "run")
    assert sizes[-1] == 1
    assert sizes[0] > 1


def test_moments_are_carried_or_reset(request_, tmp_path, monkeypatch):
    seen: list[int] = []
    original = training.PhaseTraining.__init__

    def watch(self, accelerator, model, moments, *rest):
        seen.append(len(moments))
        original(self, accelerator, model, moments, *rest)

    monkeypatch.setattr(training.PhaseTraining, "__init__", watch)
    finish(request_, tmp_path / "carried")
    finish(with_training(request_, moments="reset"), tmp_path / "reset")
    assert seen[0] == seen[3] == seen[4] == seen[5] == 0
    assert seen[1] == seen[2] > 0


def test_teacher_that_stored_all_its_logits_teaches_like_one_that_runs_along(request_, tmp_path):
    options = {"alpha": 0.7, "temperature": 1.5}
    finish(with_training(request_, phases=1, **options), tmp_path / "online")
    finish(with_training(request_, phases=1, **options, teacher_top_k=128), tmp_path / "stored")
    finish(with_training(request_, phases=1), tmp_path / "none")
    online, stored, none = (weights(tmp_path / n) for n in ("online", "stored", "none"))
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(online[name], stored[name], atol=2e-3, rtol=0)
    assert (online[name] - none[name]).abs().max() > 5e-3


def test_lora_is_merged_into_plain_weights(request_, tmp_path):
    result = finish(with_training(request_, lora_rank=2), tmp_path / "run")
    assert type(result.model).__name__ == "LlamaForCausalLM"
    assert logged(tmp_path / "run")[-1]["loss"] < logged(tmp_path / "run")[0]["loss"]
    with pytest.raises(InvalidSettings, match="lora_rank"):
        finish(with_training(request_, lora_rank=2, sharding="fsdp2"), tmp_path / "no")


def test_dynamic_mixture_moves_towards_the_harder_domain(request_, text_file, tmp_path):
    hard = tmp_path / "hard.txt"
    hard.write_text("\n<|endoftext|>\n".join(["qzxj kvw " * 40] * 30))
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        f"policy: dynamic\nreference_losses: {{easy: 20, hard: 0.1}}\nsources:\n"
        f"- {{name: easy, path: '{text_file}', weight: 1}}\n"
        f"- {{name: hard, path: '{hard}', weight: 1}}\n"
    )
    request = with_training(replace(request_, data=str(mixture)), reweight_every=2)
    drawn = finish(request, tmp_path / "run").training["windows_of_domain"]
    assert sum(drawn.values()) == 48
    assert drawn["hard"] > 2 * drawn["easy"]


def test_trackers_are_reported_to(request_, text_file, tmp_path, monkeypatch):
    """One in the place of TensorBoard's, which need not be installed."""
    heard: list[Any] = []

    class Tracker(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, run_name, logging_dir, **kwargs):
            super().__init__()
            heard.append(Path(logging_dir))

        def store_init_configuration(self, values):
            heard.append(values)

        def log(self, values, step=None, **kwargs):
            heard.append((step, values))

    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    request = replace(request_, report_to=("tensorboard",), evaluate=str(text_file))
    finish(with_training(request, phases=1), tmp_path / "run")
    place, configuration, *logs = heard
    assert place.resolve() == (tmp_path / "run").resolve()
    assert configuration["learning_rate"] == 3e-3
    assert [step for step, values in logs if "loss" in values] == list(range(1, 13))
    assert [step for step, values in logs if "perplexity" in values] == [12]


# Resume.


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a fork; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_at(place: Any, name: str, call: int, before_it: bool) -> None:
    """Make this process die at the given call of a function, before or after what it does."""
    original, count = getattr(place, name), [0]

    def deadly(*args, **kwargs):
        count[0] += 1
        if count[0] == call and before_it:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, deadly)


def half_a_file(tensors, file, *args) -> None:
    Path(file).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


KILLS: dict[str, Callable[[], None]] = {
    "while data are tokenised": lambda: kill_at(_domains().DomainCache, "_pack", 1, True),
    "when data are there": lambda: kill_at(_domains().DomainCache, "_pack", 1, False),
    "inside the first cut": lambda: kill_at(_edits(), "cut_group", 2, False),
    "inside the second cut": lambda: kill_at(_edits(), "cut_group", 9, False),
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


@pytest.fixture(scope="module")
def uninterrupted(llama, text_file, tmp_path_factory) -> Path:
    """The directory of a run that nobody disturbed."""
    place = tmp_path_factory.mktemp("uninterrupted") / "run"
    os.environ["ADAPT_PRUNER_CACHE"] = str(place.parent / "cache")
    settings = make_settings(calibration=str(text_file), windows=4, window_length=12, steps=3)
    recovery = make_recovery_settings(**TRAINING)
    run_accel(
        AccelRequest(
            str(llama), str(text_file), 768, settings, recovery, sparsity=0.4, save_steps=3
        ),
        place,
    )
    return place


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


def test_cuts_are_calibrated_on_the_training_data_unless_told_otherwise(
    cli, llama, tokenizer, text_file, tmp_path, monkeypatch
):
    """The hub, where the default of `prune` lies, is not asked."""
    seen = []
    original = run.prune

    def watch(*args, **kwargs):
        seen.append(kwargs["calibration"])
        return original(*args, **kwargs)

    monkeypatch.setattr(run, "prune", watch)
    options = {"windows": 4, "window_length": 20, "steps": 3, **TRAINING}
    accel(str(llama), tmp_path / "a", data=str(text_file), tokens=768, sparsity=0.4, **options)
    text = "".join(text_file.read_text().split("\n<|endoftext|>\n"))
    for window in seen[-1].draw().tolist():
        assert len(window) == 20
        pieces = tokenizer.decode(window, skip_special_tokens=False).split("</s>")
        assert max(pieces, key=len) in text  # longer than a training window of 16
    arguments = ("--data", text_file, "--tokens", 768, "--sparsity", 0.4, "--sequence-length", 16,
                 "--batch-tokens", 64, "--windows", 4, "--window-length", 12, "--alpha", 0,
                 "--repeat", "--phases", 1)  # fmt: skip
    done = cli("accel", llama, "-o", tmp_path / "b", *arguments)
    assert done.status == 0, done.err
    assert seen[-1].source == "The training data"
    again = cli("accel", "--recipe", tmp_path / "b" / "recipe.yaml", "-o", tmp_path / "c")
    assert again.status == 0, again.err
    assert_equal(tmp_path / "b", tmp_path / "c")
    done = cli("accel", llama, "-o", tmp_path / "d", *arguments, "--calibration", text_file)
    assert done.status == 0, done.err
    assert str(text_file) in seen[-1].source


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


def test_cut_that_is_coarser_than_a_phase(request_, tmp_path):
    """A phase whose target has been passed already cuts nothing."""
    settings = request_.settings.model_copy(update={"multiple": 16})
    request = with_training(replace(request_, settings=settings, sparsity=0.1), phases=12)
    result = finish(request, tmp_path / "run")
    sizes = [phase["parameters"] for phase in closed_phases(tmp_path / "run")]
    assert len(set(sizes)) < 12
    assert sizes[-1] == result.after.total <= result.target


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


# What goes wrong.


def test_refused_request_leaves_nothing_and_overwrite_loses_nothing(
    request_, tmp_path, monkeypatch
):
    for _ in range(2):
        with pytest.raises(AdaptPrunerError, match="larger than the data"):
            run_accel(
                with_training(replace(request_, tokens=10**6), repeat=False), tmp_path / "run"
            )
        assert not (tmp_path / "run").exists()
    run_accel(replace(request_, stop_after=1), tmp_path / "run")
    with pytest.raises(AdaptPrunerError, match=r"gone\.txt"):
        run_accel(replace(request_, data="gone.txt", overwrite=True), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(lora, "find_spec", lambda name: None)
        with pytest.raises(InvalidSettings, match="needs peft"):
            run_accel(
                with_training(replace(request_, overwrite=True), lora_rank=2), tmp_path / "run"
            )
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_loss_that_is_not_a_number_stops_the_run(request_, tmp_path, monkeypatch):
    original, count = training.loss_sums, [0]

    def spoilt(*args):
        count[0] += 1
        total, windows = original(*args)
        return (total * float("nan"), windows) if count[0] > 9 else (total, windows)

    monkeypatch.setattr(training, "loss_sums", spoilt)
    with pytest.raises(NonFiniteError, match=r"at step 10 \(phase 3\).*--learning-rate"):
        run_accel(with_training(request_, per_device_train_batch_size=4), tmp_path / "run")
    monkeypatch.setattr(training, "loss_sums", original)
    finish(with_training(request_, per_device_train_batch_size=4), tmp_path / "run")


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_full_disk_loses_nothing(what, request_, uninterrupted, tmp_path, monkeypatch):
    place, original, count = tmp_path / "run", state.save_file, [0]

    def full(tensors, file, *rest):
        count[0] += 1
        if count[0] > 4:  # three files per checkpoint: inside the second
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, file, *rest)

    def full_log(self, *args, **kwargs):
        count[0] += self.name == "training.jsonl"
        if self.name == "training.jsonl" and args[:1] == ("a",) and count[0] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, *args, **kwargs)

    opened = Path.open
    with monkeypatch.context() as patch:
        if what == "checkpoint":
            patch.setattr(state, "save_file", full)
        else:
            patch.setattr(Path, "open", full_log)
        with pytest.raises(WritingError, match=r"disk is full|No space left"):
            run_accel(request_, place)
    finish(request_, place)
    assert_equal(place, uninterrupted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": None, "params": 10**9}, "above the model's"),
        ({"sparsity": 0.999}, "below what is possible"),
        ({"tokens": 100}, "need at least one each"),
        ({"max_loss": 1.0}, "needs a text"),
        ({"teacher": "x"}, "would not be used with alpha 0"),
        ({"data": "no-such-file.txt"}, "no-such-file.txt"),
        ({"model": "./no-such-model"}, "no model directory"),
        ({"report_to": ("tensorbord",)}, "tensorbord"),
        ({"report_to": "tensorboard"}, "report_to: a list of names"),
        ({"tokens": "1K"}, "tokens: .*integer"),
        ({"save_steps": 0}, "save_steps: .*; got 0"),
        ({"settings": make_settings(dtype="float16")}, "float16 is too small"),
        (
            {"recovery": make_recovery_settings(lora_rank=2, moments="carry")},
            "moments: .* take reset",
        ),
    ],
)
def test_bad_requests(changes, message, request_, tmp_path):
    with pytest.raises(AdaptPrunerError, match=message):
        run_accel(replace(request_, **changes), tmp_path / "run")


def test_windows_longer_than_the_model_reads(request_, tmp_path):
    long = with_training(request_, sequence_length=100, batch_tokens=100, phases=1)
    with pytest.raises(InvalidSettings, match=r"sequence_length: .* at most 64 tokens; got 100"):
        run_accel(long, tmp_path / "run")
    settings = request_.settings.model_copy(update={"window_length": 100})
    with pytest.raises(InvalidSettings, match=r"window_length: .* at most 64 tokens; got 100"):
        run_accel(replace(request_, settings=settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_teacher_may_be_of_a_kind_that_cannot_be_pruned(request_, tokenizer, tmp_path):
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    request = replace(request_, teacher=str(tmp_path / "teacher"))
    request = with_training(request, alpha=0.5, phases=1)
    assert plan_accel(request).flops > plan_accel(with_training(request_, phases=1)).flops
    finish(request, tmp_path / "run")


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "dtype": "bfloat16",
}  # fmt: skip


def test_plan_of_8b_on_eight_gpus_needs_a_configuration_alone(tmp_path):
    """docs/scale.md has the arithmetic; 80 GB per GPU are enough, in training and at a cut."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    recovery = make_recovery_settings(sharding="fsdp2", alpha=0.0)
    settings = make_settings(gradient_checkpointing=True)
    request = AccelRequest(
        str(tmp_path), "adapt-llm", 10**9, settings, recovery, params=6_700_000_000
    )
    plan = plan_accel(request, gpus=8, gpu_tflops=400.0)
    assert plan.before.total == 8_030_261_248
    assert [planned.phase.parameters for planned in plan.phases][-1] == 6_700_000_000
    first = plan.phases[0].phase.parameters
    assert plan.memory_bytes["weights"] == 4 * first // 8
    assert plan.memory_bytes["moments"] == 8 * first // 8
    assert plan.pruning_bytes["weights"] == 4 * 8_030_261_248
    assert plan.pruning_bytes["Gram matrices"] == 4 * 32 * (14336**2 + 4096**2)
    assert sum(plan.memory_bytes.values()) < 30e9
    assert sum(plan.pruning_bytes.values()) < 70e9
    tokens = plan.tokens
    assert plan.flops == pytest.approx(8 * 7e9 * tokens, rel=0.1)  # layers computed twice
    assert plan.gpu_hours == pytest.approx(plan.flops / 400e12 / 3600)
    taught = replace(request, recovery=make_recovery_settings(sharding="fsdp2"))
    assert plan_accel(taught, gpus=8).memory_bytes["teacher"] == 2 * 8_030_261_248  # as stored
    halved = replace(request, settings=settings.model_copy(update={"dtype": "bfloat16"}))
    assert plan_accel(halved, gpus=8).memory_bytes["weights"] == 2 * first // 8


def test_python_takes_all_settings_by_name(request_, text_file, uninterrupted, tmp_path):
    outcome = adapt_pruner.accel(
        request_.model, tmp_path / "run", data=str(text_file), tokens=768, sparsity=0.4,
        calibration=str(text_file), windows=4, window_length=12, steps=3, save_steps=3, **TRAINING,
    )  # fmt: skip
    assert outcome.result is not None
    assert_equal(tmp_path / "run", uninterrupted)
    with pytest.raises(InvalidSettings, match="Did you mean 'windows'"):
        adapt_pruner.accel("demo", tmp_path / "no", data="x", tokens=1, sparsity=0.4, windws=4)


def test_python_takes_settings_as_objects(request_, text_file, uninterrupted, tmp_path):
    outcome = adapt_pruner.accel(
        request_.model, tmp_path / "run", data=str(text_file), tokens=768, sparsity=0.4,
        settings=request_.settings, recovery=request_.recovery, save_steps=3,
    )  # fmt: skip
    assert outcome.result is not None
    assert_equal(tmp_path / "run", uninterrupted)
    for whole, single in (("settings", {"windows": 3}), ("recovery", {"alpha": 0.0})):
        with pytest.raises(InvalidSettings, match=f"`{whole}` or single ones, not both"):
            adapt_pruner.accel(
                "demo", tmp_path / "no", data="x", tokens=1, sparsity=0.4,
                **{whole: getattr(request_, whole)}, **single,
            )  # fmt: skip


# Through the command line.


def test_command_line(cli, llama, text_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {llama}\ndata: {text_file}\ncalibration: {text_file}\ntokens: 1K\nsparsity: 0.3\n"
        "sequence_length: 16\nbatch_tokens: 64\nwindows: 4\nwindow_length: 12\nrepeat: true\n"
    )
    arguments = ("accel", "--recipe", recipe, "--phases", 2, "--learning-rate", 0.003)
    planned = cli(*arguments, "--dry-run")
    assert planned.status == 0, planned.err
    assert "in 2 phases; 960 tokens in steps of 64" in planned.out
    done = cli(*arguments, "-o", tmp_path / "run")
    assert done.status == 0, done.err
    assert "phase 2/2" in done.err
    assert "decoder layers" in done.out
    for page in ("README.md", "report.html"):
        text = (tmp_path / "run" / page).read_text()
        assert "adapt-pruner accel" in text
        assert "adapt-pruner prune" not in text
    again = cli("accel", "--recipe", tmp_path / "run" / "recipe.yaml", "-o", tmp_path / "again")
    assert again.status == 0, again.err
    assert_equal(tmp_path / "again", tmp_path / "run")
    finished = cli(*arguments, "-o", tmp_path / "run")
    assert finished.status == 0
    assert "finished" in finished.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "1K"), "Say --data"),
        (("--data", "x"), "Say --tokens"),
        (("--tokens", "lots", "--data", "x"), "expected a count"),
        (("--phase", 3), "Did you mean '--phases'"),
        (("--growth", "quadratic"), "no 'quadratic'"),
    ],
)
def test_command_line_says_what_is_wrong(cli, llama, tmp_path, arguments, message):
    outcome = cli("accel", llama, "-o", tmp_path / "run", "--sparsity", 0.3, *arguments)
    assert outcome.status != 0
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists()
