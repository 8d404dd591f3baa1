"""The teacher of recovery training: whom it may teach, and what is stored of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from transformers import AutoTokenizer

from adapt_pruner.errors import InvalidSettings, WritingError
from adapt_pruner.methods import make_settings
from adapt_pruner.recovery import materials, teacher, teaching
from adapt_pruner.recovery.estimate import plan_accel
from adapt_pruner.recovery.materials import gather
from adapt_pruner.recovery.objective import Teaching
from adapt_pruner.recovery.request import AccelListener, AccelRequest
from adapt_pruner.recovery.settings import make_recovery_settings
from adapt_pruner.recovery.teaching import make_teacher
from conftest import character_tokenizer
from picomodels import build

TRAINING = {
    "phases": 2, "sequence_length": 16, "batch_tokens": 64, "repeat": True, "alpha": 0.5,
    "teacher_top_k": 8,
}  # fmt: skip
WINDOWS = 12 * 4


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ADAPT_PRUNER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def request_(llama, text_file) -> AccelRequest:
    settings = make_settings(calibration=str(text_file), windows=4, window_length=12, steps=3)
    recovery = make_recovery_settings(**TRAINING)
    return AccelRequest(str(llama), str(text_file), 12 * 64, settings, recovery, sparsity=0.4)


def with_training(request: AccelRequest, **changes: Any) -> AccelRequest:
    return replace(request, recovery=make_recovery_settings(**{**TRAINING, **changes}))


class Heard(AccelListener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_prepare(self, what: str) -> None:
        self.said.append(what)

    @property
    def asked(self) -> bool:
        return "asking the teacher: 100%" in self.said


def ask(request: AccelRequest, directory: Path) -> tuple[Any, Heard]:
    """The teacher of a run, and what was heard of it."""
    heard, found = Heard(), gather(request, Accelerator(cpu=True), AccelListener())
    return make_teacher(request, found, directory, heard), heard


def logits(directory: Path) -> list[str]:
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*.safetensors"))


def save(place: Path, tokenizer: Any, **config: Any) -> str:
    build("llama", torch.float32, **config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


# What is stored.


def test_stored_logits_are_used_again_for_the_same_alone(request_, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(request_.data).read_text())
    own = save(tmp_path / "own", tokenizer, seed=5)
    request = replace(request_, data=str(text), teacher=own)
    first, heard = ask(request, tmp_path / "run")
    assert heard.asked
    (stored,) = logits(tmp_path / "run")
    _, heard = ask(request, tmp_path / "run")
    assert not heard.asked
    assert logits(tmp_path / "run") == [stored]

    tokens = torch.zeros(1, 16, dtype=torch.long)
    before = first(torch.tensor([0]), tokens).logits_NK
    text.write_text(Path(request_.data).read_text()[::-1])
    other, heard = ask(request, tmp_path / "run")
    assert heard.asked
    assert not torch.equal(other(torch.tensor([0]), tokens).logits_NK, before)
    text.write_text(Path(request_.data).read_text())
    save(Path(own), tokenizer, seed=6)
    assert ask(request, tmp_path / "run")[1].asked
    for changes in ({"teacher_top_k": 4}, {"temperature": 1.0}, {"train_seed": 3}):
        assert ask(with_training(request, **changes), tmp_path / "run")[1].asked
    assert len(logits(tmp_path / "run")) == 1  # of the last; others would fill the disk
    assert stored not in logits(tmp_path / "run")


def test_processes_share_the_shards_and_go_on_with_missing_ones(request_, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "SHARD_WINDOWS", 10)
    found = gather(request_, Accelerator(cpu=True), AccelListener())
    whole = make_teacher(request_, found, tmp_path / "one", AccelListener())
    store = replace(whole.store, directory=tmp_path / "two" / "key")
    store.prepare()
    for rank in (1, 0):  # the second has seen what is missing before the first one writes
        process: Any = SimpleNamespace(
            process_index=rank, num_processes=2, device="cpu", wait_for_everyone=lambda: None,
            autocast=Accelerator(cpu=True).autocast,
        )  # fmt: skip
        missing = [0, 1, 2, 3, 4]
        with monkeypatch.context() as patch:
            patch.setattr(teacher.Store, "missing", lambda self, m=missing: m)
            running = teacher.OnlineTeacher(found.model, process, 128)
            teacher.store_logits(running, found.sampler(), store, 2.0, 3)
        assert len(logits(tmp_path / "two")) == (2 if rank else 5)
    store.file(3).unlink()
    assert store.missing() == [3]
    running = teacher.OnlineTeacher(found.model, Accelerator(cpu=True), 128)
    teacher.store_logits(running, found.sampler(), store, 2.0, 3)
    tokens, places = torch.zeros(WINDOWS, 16, dtype=torch.long), torch.arange(WINDOWS)
    one, two = whole(places, tokens), teacher.StoredTeacher(store)(places, tokens)
    torch.testing.assert_close(two.logits_NK, one.logits_NK)
    torch.testing.assert_close(two.log_total_N, one.log_total_N)


def test_source_model_teaches_without_being_read_again(request_, tmp_path, monkeypatch):
    names = []
    original = materials.load_model
    for place in (materials, teaching):
        monkeypatch.setattr(
            place, "load_model", lambda name, *a, **k: names.append(name) or original(name, *a, **k)
        )
    found = gather(request_, Accelerator(cpu=True), AccelListener())
    make_teacher(request_, found, tmp_path, AccelListener())
    assert names == [request_.model]
    assert all(parameter.requires_grad for parameter in found.model.parameters())


def test_teacher_computes_in_the_precision_of_training(request_, tmp_path):
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        found = gather(request_, accelerator, AccelListener())
        running: Any = make_teacher(
            with_training(request_, teacher_top_k=None), found, tmp_path, AccelListener()
        )
        tokens = torch.zeros(1, 16, dtype=torch.long)
        assert running(torch.tensor([0]), tokens).logits_NK.dtype == dtype
    AcceleratorState._reset_state()


def test_disk_too_small_is_said_before_the_teacher_is_asked(request_, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(WritingError, match=r"teacher_top_k: 8 logits .* take \S+ GB"):
        ask(request_, tmp_path / "run")
    needed = plan_accel(request_).disk_bytes
    assert needed == WINDOWS * 16 * (8 * 6 + 4)
    monkeypatch.undo()
    ask(request_, tmp_path / "run")
    (file,) = logits(tmp_path / "run")
    assert needed < (tmp_path / "run" / file).stat().st_size < needed + 500


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (SafetensorError("I/O error: File too large (os error 27)"), "File too large"),
    ],
)
def test_refused_write_leaves_nothing_half(error, message, request_, tmp_path, monkeypatch):
    def refuse(tensors, file):
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(teacher, "save_file", refuse)
    with pytest.raises(WritingError, match=message):
        ask(request_, tmp_path / "run")
    assert not [entry for entry in (tmp_path / "run").rglob("*") if entry.is_file()]


# Whom it may teach.


def test_vocabularies_padded_differently_are_shared_as_far_as_both_go(
    request_, tokenizer, tmp_path
):
    for size in (140, 110):
        place = save(tmp_path / str(size), tokenizer, vocab_size=size)
        online = with_training(replace(request_, teacher=place), teacher_top_k=None)
        found, _ = ask(online, tmp_path)
        tokens = torch.zeros(1, 16, dtype=torch.long)
        taught: Teaching = found(torch.tensor([0]), tokens)
        assert taught.logits_NK.shape == (16, min(size, 128))


def test_teacher_of_another_vocabulary_is_refused(request_, tokenizer, tmp_path):
    save(tmp_path / "other", tokenizer)
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "other")) == len(tokenizer)
    for changes in ({}, {"teacher_top_k": None}):
        request = with_training(replace(request_, teacher=str(tmp_path / "other")), **changes)
        with pytest.raises(InvalidSettings, match=r"2 of 99 tokens differ; 'a'"):
            ask(request, tmp_path / "run")
    save(tmp_path / "small", tokenizer, vocab_size=90)
    with pytest.raises(InvalidSettings, match="90 logits"):
        ask(replace(request_, teacher=str(tmp_path / "small")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_teacher_may_know_more_tokens(request_, tmp_path):
    place = save(tmp_path / "chat", character_tokenizer(extra="äöü"), vocab_size=128)
    ask(replace(request_, teacher=place), tmp_path / "run")


# What a plan refuses, as the run does.


def test_plan_refuses_what_the_run_refuses(request_, llama, tmp_path):
    long = with_training(request_, sequence_length=100, batch_tokens=100)
    with pytest.raises(InvalidSettings, match=r"sequence_length: the model reads at most 64"):
        plan_accel(long)
    with pytest.raises(InvalidSettings, match="4 windows per step cannot be shared by 3"):
        plan_accel(request_, gpus=3)
    shutil.copytree(llama, tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config["max_position_embeddings"] = 8
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidSettings, match=r"teacher '.*' reads at most 8 tokens; got 16"):
        plan_accel(replace(request_, teacher=str(tmp_path / "teacher")))
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"policy: dynamic\nsources: ['{request_.data}']\n")
    for ask_ in (plan_accel, lambda request: ask(request, tmp_path / "run")):
        with pytest.raises(InvalidSettings, match="teacher_top_k: with a mixture of policy"):
            ask_(replace(request_, data=str(mixture)))


def test_plan_counts_a_teacher_that_runs_along(request_):
    online = plan_accel(with_training(request_, teacher_top_k=None))
    stored = plan_accel(request_)
    assert online.memory_bytes["teacher"] == 4 * online.before.total  # stored in float32
    assert "teacher" not in stored.memory_bytes
    assert "teacher" not in online.pruning_bytes  # it waits in main memory
    assert "moments" not in online.pruning_bytes
    carried = plan_accel(with_training(request_, moments="carry"))
    assert carried.pruning_bytes["moments"] == carried.memory_bytes["moments"]
    assert online.disk_bytes == 0 < stored.disk_bytes
    sizes = [planned.memory_bytes for planned in online.phases]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == sum(online.memory_bytes.values())
