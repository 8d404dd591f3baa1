"""A checkpoint appears whole or not at all, and what was there before survives every failure."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapt_pruner import PruningResult, checkpoint, durable, prune
from adapt_pruner.claims import claimed, write_record
from adapt_pruner.errors import WritingError
from adapt_pruner.files import atomic_directory, check_output
from adapt_pruner.methods import make_settings
from adapt_pruner.model import loading
from adapt_pruner.report import pictures
from adapt_pruner.run import Request, run_pruning
from picomodels import build, logits_of, random_tokens


@pytest.fixture
def result(calibration, monkeypatch) -> PruningResult:
    monkeypatch.setattr(pictures, "draw_all", lambda directory, result: {})
    model = build("llama", torch.float32)
    return prune(model, sparsity=0.3, calibration=calibration, steps=1)


@pytest.fixture
def existing(tmp_path) -> Path:
    """A directory that a run wrote, so that another may replace it when it has something better."""
    directory = tmp_path / "existing"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep" / "weights").write_text("hours of work")
    (directory / "config.json").write_text("{}")
    write_record(directory)
    return directory


def is_untouched(existing: Path) -> bool:
    """Whether all is as the fixture left it, with nothing beside it."""
    files = [file.relative_to(existing.parent) for file in sorted(existing.parent.rglob("*"))]
    inside = [".adapt-pruner.json", "config.json", "deep", "deep/weights"]
    names = ["existing", *(f"existing/{name}" for name in inside)]
    return [str(file) for file in files] == names and (
        existing / "deep" / "weights"
    ).read_text() == "hours of work"


def test_directory_appears_when_the_block_ends(tmp_path):
    with atomic_directory(tmp_path / "a" / "b") as partial:
        (partial / "file").write_text("whole")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "whole"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"]


def write_half(directory: Path, error: BaseException) -> None:
    with atomic_directory(directory, overwrite=True) as partial:
        (partial / "file").write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), WritingError("no")])
def test_failing_block_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        write_half(tmp_path / "new", error)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_failing_block_leaves_the_old_directory(existing):
    with pytest.raises(RuntimeError):
        write_half(existing, RuntimeError("no"))
    assert is_untouched(existing)


def test_overwriting_replaces_all_of_the_old_directory(existing):
    with atomic_directory(existing, overwrite=True) as partial:
        (partial / "file").write_text("new")
    assert [str(file) for file in existing.parent.rglob("*")] == [
        str(existing), str(existing / "file"),
    ]  # fmt: skip


def test_old_directory_comes_back_when_the_new_one_cannot_take_its_place(existing, monkeypatch):
    """Where names cannot be exchanged in one step."""
    replace = os.replace

    def failing(source, destination):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, destination)

    monkeypatch.setattr(durable, "exchange", lambda one, other: False)
    monkeypatch.setattr(os, "replace", failing)
    with (
        pytest.raises(WritingError, match=r"Input/output error.*unchanged"),
        atomic_directory(existing, overwrite=True) as partial,
    ):
        (partial / "file").write_text("new")
    assert is_untouched(existing)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")
def test_names_are_exchanged_in_one_step(existing, monkeypatch):
    """There is no moment without a directory of this name: it is never renamed away."""
    monkeypatch.setattr(os, "replace", lambda *names: 1 / 0)
    with atomic_directory(existing, overwrite=True) as partial:
        (partial / "file").write_text("new")
    assert [str(file) for file in existing.parent.rglob("*")] == [
        str(existing), str(existing / "file"),
    ]  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("exchanges", [False, True])
def test_disk_holds_everything_before_the_name(tmp_path, monkeypatch, exchanges, overwrite):
    """A file system may write a rename before the content; then a crash leaves empty files."""
    events: list[tuple[str, str]] = []
    fsync, replace, exchange = os.fsync, os.replace, durable.exchange

    def noted_fsync(handle):
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def noted_replace(source, destination):
        events.append(("rename", Path(destination).name))
        replace(source, destination)

    def noted_exchange(one, other):
        if exchanges:
            events.append(("rename", Path(other).name))
        return exchanges and exchange(one, other)

    place = tmp_path / "out"
    if overwrite:
        place.mkdir()
        (place / "old").touch()
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(durable, "exchange", noted_exchange)
    with atomic_directory(place, overwrite=overwrite) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("new")
    named = events.index(("rename", "out"))
    before = [name for what, name in events[:named] if what == "flush"]
    assert before[:2] == ["file", "deep"]
    assert ".partial-" in before[2]
    assert ("flush", tmp_path.name) in events[named:]


def test_old_directory_gets_its_name_back_after_a_kill_between_two_renames(existing, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(source, destination):
        replace(source, destination)
        raise Killed  # nothing is tidied up

    replace = os.replace
    monkeypatch.setattr(durable, "exchange", lambda one, other: False)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(os, "replace", killed)
        durable.take_place(existing.parent, existing)
    assert [file.name[:14] for file in existing.parent.iterdir()] == [".existing.old-"]
    (existing.parent / ".existing.partial-0123abcd").mkdir()
    with claimed(existing):
        pass
    assert is_untouched(existing)


def test_leftovers_of_killed_runs_go(existing):
    for what in ("old", "partial"):
        (existing.parent / f".existing.{what}-0123abcd" / "deep").mkdir(parents=True)
    with claimed(existing):
        pass
    assert is_untouched(existing)


def test_leftovers_of_others_stay(existing):
    beside = [".existing.old-backup", ".existing.partial", ".other.old-0123abcd", "existing.old"]
    for name in beside:
        (existing.parent / name).mkdir()
    with claimed(existing):
        pass
    assert sorted(file.name for file in existing.parent.iterdir()) == sorted([*beside, "existing"])


def test_directory_is_claimed_by_one(existing):
    with (
        claimed(existing),
        pytest.raises(WritingError, match=r"Another run is at work in '.*existing'"),
        claimed(existing),
    ):
        raise AssertionError("both may write")
    with claimed(existing):
        assert existing.is_dir()
    assert is_untouched(existing)


def test_claim_of_what_is_not_made_leaves_nothing(tmp_path):
    with claimed(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())


def test_link_is_not_followed(existing, tmp_path):
    home = tmp_path / "links"
    home.mkdir()
    (home / "link").symlink_to(existing)
    (home / "circle").symlink_to("circle")
    for name in ("link", "circle"):
        with (
            pytest.raises(WritingError, match=r"is a link to .*name the directory itself"),
            atomic_directory(home / name, overwrite=True),
        ):
            raise AssertionError("it is written")
    with pytest.raises(WritingError, match="cannot be written"):
        check_output(home / "circle" / "out", overwrite=True)
    (home / "circle").unlink()
    (home / "link").unlink()
    home.rmdir()
    assert is_untouched(existing)


def test_link_above_is_followed(existing, tmp_path):
    (tmp_path / "link").symlink_to(existing)
    with atomic_directory(tmp_path / "link" / "new") as partial:
        (partial / "file").write_text("new")
    assert (existing / "new" / "file").is_file()


@pytest.mark.parametrize("name", ["a" * 300, "a" * 201, "é" * 120, "a\0b", "x/" * 5000])
def test_name_that_no_disk_takes(tmp_path, name):
    with pytest.raises(WritingError, match="cannot be written") as caught:
        check_output(tmp_path / name, overwrite=True)
    assert len(str(caught.value)) < 400


def test_current_directory_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_directory(Path(".")) as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "here" / "file").is_file()


def test_directory_has_the_permissions_the_process_gives(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_directory(tmp_path / "new"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("at", ["save_pretrained", "write_json", "write_account"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk(result, existing, monkeypatch, error, at):
    def full(*args, **kwargs):
        raise error

    place = {
        "save_pretrained": (PreTrainedModel, at),
        "write_json": (checkpoint, at),
        "write_account": ("adapt_pruner.report", at),
    }[at]
    if at == "write_account":
        monkeypatch.setattr(".".join(place), full)
    else:
        monkeypatch.setattr(*place, full)
    with pytest.raises(WritingError, match=r"disk is full.*unchanged.*[Ff]ree some space"):
        result.save(existing, overwrite=True)
    assert is_untouched(existing)


def test_other_trouble_of_the_disk_is_told(result, existing, monkeypatch):
    def failing(*args, **kwargs):
        raise SafetensorError("I/O error: Read-only file system (os error 30)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", failing)
    with pytest.raises(WritingError, match=r"could not be written: .*Read-only file system"):
        result.save(existing, overwrite=True)
    assert is_untouched(existing)


def test_errors_of_the_program_stay_what_they_are(result, existing, monkeypatch):
    def failing(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", failing)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        result.save(existing, overwrite=True)
    assert is_untouched(existing)


def test_model_in_memory_survives_a_failed_save(result, tmp_path, monkeypatch):
    expected = logits_of(result.model, random_tokens())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            result.save(tmp_path / "out")
    result.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded, random_tokens()), expected)


RUN = """
import os, resource, signal, sys
from adapt_pruner import checkpoint
from adapt_pruner.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
mode, *arguments = sys.argv[1:]
write_json = checkpoint.write_json

def write_and_suffer(*args):
    write_json(*args)
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "wait":
        print("writing", flush=True)
        signal.pause()

checkpoint.write_json = write_and_suffer
if mode == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
main(arguments)
"""


def start(mode: str, llama: Path, text_file: Path, output: Path) -> subprocess.Popen:
    """Prune in a process of its own, which suffers `mode` while it writes."""
    arguments = [
        "prune", llama, "-o", output, "--overwrite", "--sparsity", 0.1, "--steps", 1,
        "--windows", 4, "--window-length", 12, "--calibration", text_file,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", RUN, mode, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_in_the_middle_of_writing(llama, text_file, existing):
    """Nobody can tidy up after this; but nothing is lost, and nothing half-written is in place."""
    process = start("kill", llama, text_file, existing)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    left = [file.name for file in existing.parent.iterdir() if file != existing]
    assert sorted(name[:10] for name in left) == [".existing.", ".existing."]
    with claimed(existing):  # as the next run does
        pass
    assert is_untouched(existing)


@pytest.mark.parametrize(
    ("number", "says"),
    [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Stopped by SIGTERM")],
)
def test_interrupt_in_the_middle_of_writing(llama, text_file, existing, number, says):
    process = start("wait", llama, text_file, existing)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert messages.strip() == f"adapt-pruner: error: {says}; nothing was written."
    assert is_untouched(existing)


def test_two_runs_into_one_directory(llama, text_file, tmp_path, cli):
    first = start("wait", llama, text_file, tmp_path / "out")
    assert first.stdout is not None
    assert first.stdout.readline() == "writing\n"
    done = cli("prune", llama, "-o", tmp_path / "out", "--sparsity", 0.2)
    assert done.status == 1
    assert f"Another run is at work in '{tmp_path / 'out'}'" in done.err
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert not list(tmp_path.iterdir())


def test_file_that_grows_beyond_a_limit(llama, text_file, existing):
    process = start("limit", llama, text_file, existing)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 1
    assert messages.startswith(f"adapt-pruner: error: '{existing}' could not be written: ")
    assert "File too large" in messages
    assert "Traceback" not in messages
    assert is_untouched(existing)


class TestCheckBeforeWork:
    """What would fail at the end is refused at the beginning."""

    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch):
        def work(*args, **kwargs):
            raise AssertionError("the model was read")

        monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", work)
        monkeypatch.setattr("adapt_pruner.run.load_tokenizer", work)

    def refused(self, cli, llama, output, *more) -> str:
        done = cli("prune", llama, "-o", output, "--sparsity", 0.2, *more)
        assert done.status == 1
        assert done.out == ""
        assert done.err.startswith("adapt-pruner: error: ")
        return done.err

    def test_existing_directory(self, cli, existing):
        message = self.refused(cli, "./nowhere", existing)  # looked at before anything else
        assert f"'{existing}' exists and is not empty" in message
        assert "--overwrite" in message
        assert is_untouched(existing)

    @pytest.mark.parametrize("name", ["thesis.txt", "deep/thesis.txt", "config.json", "link"])
    def test_only_what_a_run_wrote_is_replaced(self, cli, llama, existing, name):
        file = existing / name
        if name == "link":
            file.symlink_to(existing.parent)
        else:
            file.write_text("years of work")
        message = self.refused(cli, llama, existing, "--overwrite")
        assert "holds files that no run wrote, or that were changed since: " + name in message
        assert file.is_symlink() or file.read_text() == "years of work"

    def test_model_of_others_is_not_replaced(self, cli, llama, tmp_path):
        shutil.copytree(llama, tmp_path / "copy")
        message = self.refused(cli, llama, tmp_path / "copy", "--overwrite")
        assert "holds files that no run wrote" in message
        assert len(list((tmp_path / "copy").iterdir())) == len(list(llama.iterdir()))

    @pytest.mark.parametrize("what", ["model", "calibration", "evaluate"])
    def test_source_is_not_replaced(self, cli, llama, existing, text_file, what):
        inside = {"model": existing, "calibration": existing / "t", "evaluate": existing / "t"}
        shutil.copy(text_file, existing / "t")
        write_record(existing)
        model = existing if what == "model" else llama
        more = () if what == "model" else (f"--{what}", inside[what])
        message = self.refused(cli, model, existing, "--overwrite", *more)
        assert f"'{inside[what]}' is read by this run and lies in '{existing}'" in message

    @pytest.mark.parametrize("arguments", [("-o", ""), ("--output=",), ("-o", " ")])
    def test_output_without_a_name(self, cli, llama, arguments):
        done = cli("prune", llama, "--sparsity", 0.2, *arguments)
        assert done.status == 2
        assert "is empty" in done.err

    def test_demo_replaces_nothing_but_results(self, cli, existing):
        done = cli("demo", "-o", existing)
        assert done.status == 1
        assert f"'{existing}' exists and is not empty" in done.err
        assert is_untouched(existing)

    def test_too_little_space(self, cli, llama, existing, monkeypatch):
        monkeypatch.setattr(
            # 91,558 parameters of four bytes are 366,232 bytes.
            shutil,
            "disk_usage",
            lambda path: SimpleNamespace(free=366_100),
        )
        message = self.refused(cli, llama, existing, "--overwrite")
        assert "needs about 366.2 kB, but only 366.1 kB are free" in message
        assert is_untouched(existing)

    def test_file_in_place_of_the_directory(self, cli, llama, tmp_path):
        (tmp_path / "file").write_text("text")
        assert "is a file; name a directory" in self.refused(cli, llama, tmp_path / "file")
        assert (tmp_path / "file").read_text() == "text"

    def test_directory_below_a_file(self, cli, llama, tmp_path):
        (tmp_path / "file").write_text("text")
        message = self.refused(cli, llama, tmp_path / "file" / "deep" / "out")
        assert f"lies below '{tmp_path / 'file'}', a file" in message

    def test_mount_point(self, cli, llama, tmp_path, monkeypatch):
        """A container's volume cannot be renamed away."""
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
        assert "mount point; name a directory inside" in self.refused(
            cli, llama, tmp_path / "volume"
        )

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_parent_that_cannot_be_written_to(self, cli, llama, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        message = self.refused(cli, llama, tmp_path / "locked" / "out")
        assert "cannot be written to" in message

    def test_parent_that_cannot_be_written_to_as_root(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        (tmp_path / "out").mkdir()  # may itself be writable: it is the parent that counts
        with pytest.raises(WritingError, match="cannot be written to"):
            check_output(tmp_path / "out", overwrite=True)


def test_space_is_reckoned_in_the_precision_that_is_written(monkeypatch, tmp_path):
    """Of bfloat16 on disk, although it is computed with in float32."""
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "bf16")
    monkeypatch.setattr("adapt_pruner.run.load_tokenizer", lambda *args: 1 / 0)  # stop there
    for free, error in ((183_116, ZeroDivisionError), (183_115, WritingError)):
        disk = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, disk=disk: disk)
        with pytest.raises(error):
            run_pruning(Request(str(tmp_path / "bf16"), make_settings(), 0.2), tmp_path / "out")
