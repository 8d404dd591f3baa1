"""Adapt-Accel end to end: what it trains, how it resumes, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking
from transformers import AutoModelForCausalLM

from accel_runs import TRAINING, assert_equal, closed_phases, finish, logged, weights, with_training
from adapt_pruner import find_anatomy, load_calibration, load_model, prune
from adapt_pruner.errors import (
    InvalidSettings,
)
from adapt_pruner.recovery import cutting, training
from adapt_pruner.recovery.accel import accel


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


def test_cuts_are_calibrated_on_the_training_data_unless_told_otherwise(
    cli, llama, tokenizer, text_file, tmp_path, monkeypatch
):
    """The hub, where the default of `prune` lies, is not asked."""
    seen = []
    original = cutting.prune_to_sizes

    def watch(work, *args):
        seen.append(work.calibration)
        return original(work, *args)

    monkeypatch.setattr(cutting, "prune_to_sizes", watch)
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


def test_cut_that_is_coarser_than_a_phase(request_, tmp_path):
    """A phase whose target has been passed already cuts nothing."""
    settings = request_.settings.model_copy(update={"multiple": 16})
    request = with_training(replace(request_, settings=settings, sparsity=0.1), phases=12)
    result = finish(request, tmp_path / "run")
    sizes = [phase["parameters"] for phase in closed_phases(tmp_path / "run")]
    assert len(set(sizes)) < 12
    assert sizes[-1] == result.after.total <= result.target
