"""What Adapt-Accel refuses, plans and takes from the command line."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

import adapt_pruner
from accel_runs import TRAINING, assert_equal, finish, with_training
from adapt_pruner import files
from adapt_pruner.errors import (
    AdaptPrunerError,
    InvalidSettings,
    NonFiniteError,
    WritingError,
)
from adapt_pruner.methods import METHODS, make_settings
from adapt_pruner.recovery import lora, state, training
from adapt_pruner.recovery.accel import run_accel
from adapt_pruner.recovery.estimate import plan_accel
from adapt_pruner.recovery.request import AccelRequest
from adapt_pruner.recovery.settings import make_recovery_settings
from adapt_pruner.report import pictures
from picomodels import VOCAB_SIZE

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


def draw_on_a_full_disk(directory: Path, result: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "replace_file", full_disk)
        pictures.save_figure(pictures.make_figure(1, 1, 1)[0], directory / "widths.svg")


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["checkpoint", "log", "picture"])
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
        elif what == "log":
            patch.setattr(Path, "open", full_log)
        else:
            patch.setattr(pictures, "draw_all", draw_on_a_full_disk)
        says = rf"'{place}.*disk is full.*Run the same command again to go on from the last"
        with pytest.raises(WritingError, match=says):
            run_accel(request_, place)
    finish(request_, place)
    assert_equal(place, uninterrupted)


def test_full_disk_before_the_first_checkpoint(request_, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "save_file", full_disk)
    with pytest.raises(WritingError, match=r"disk is full.*There is no checkpoint yet"):
        run_accel(request_, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": None, "params": 10**9}, "above the model's"),
        ({"sparsity": 0.999}, "below what is possible"),
        ({"tokens": 100}, "need at least one each"),
        ({"recovery": make_recovery_settings(alpha=1, teacher_tokens=1)}, "teacher_tokens: a step"),
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


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(method, request_):
    settings = make_settings(method=method, window_length=12, calibration="the training data")
    recovery = make_recovery_settings(sequence_length=16, batch_tokens=64, repeat=True)
    plan = plan_accel(replace(request_, settings=settings, recovery=recovery))
    assert plan.phases[-1].phase.parameters <= plan.target < plan.before.total


def test_a_method_that_counts_no_steps_cuts_in_phases(request_, tmp_path):
    settings = make_settings(
        method="ada-pruner", window_length=12, calibration=request_.settings.calibration
    )
    result = finish(replace(request_, settings=settings), tmp_path / "run")
    assert result.after.total <= result.target < result.before.total


def test_layers_that_are_named_go_in_one_phase(request_, tmp_path):
    settings = make_settings(method="depth", layers=(1,), window_length=12)
    with pytest.raises(InvalidSettings, match=r"layers: .* go at once.* --phases 1"):
        run_accel(replace(request_, settings=settings, sparsity=None), tmp_path / "run")


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


@pytest.mark.pictures
def test_command_line(shared_cache, cli, llama, text_file, tmp_path):
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
