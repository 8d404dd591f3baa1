"""Whole runs that are killed, interrupted or out of space leave all or nothing."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapt_pruner import checkpoint
from adapt_pruner.claims import claimed, write_record
from adapt_pruner.errors import WritingError
from adapt_pruner.files import check_output
from adapt_pruner.methods import make_settings
from adapt_pruner.model import loading
from adapt_pruner.run import Request, run_pruning
from atomic_runs import is_untouched
from command_line import Fork
from picomodels import build, logits_of, random_tokens


def test_model_in_memory_survives_a_failed_save(result, tmp_path, monkeypatch):
    expected = logits_of(result.model, random_tokens())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            result.save(tmp_path / "out")
    result.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded, random_tokens()), expected)


def suffer(mode: str) -> None:
    """Let this process suffer `mode` while it writes."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where tests run in background
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


def start(mode: str, llama: Path, text_file: Path, output: Path) -> Fork:
    """Prune in a process of its own, which suffers `mode` while it writes."""
    arguments = [
        "prune", llama, "-o", output, "--overwrite", "--sparsity", 0.1, "--steps", 1,
        "--tuning-steps", 1, "--windows", 4, "--window-length", 12, "--calibration", text_file,
    ]  # fmt: skip
    return Fork(lambda: suffer(mode), *arguments)


def test_kill_in_the_middle_of_writing(llama, text_file, existing):
    """Nobody can tidy up after this; but nothing is lost, and nothing half-written is in place."""
    process = start("kill", llama, text_file, existing)
    assert process.end()[0] == -signal.SIGKILL
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
    assert process.out.readline() == "writing\n"
    time.sleep(0.1)
    os.kill(process.id, number)
    status, messages = process.end()
    assert status == 128 + number
    assert messages.strip() == f"adapt-pruner: error: {says}; nothing was written."
    assert is_untouched(existing)


def test_two_runs_into_one_directory(llama, text_file, tmp_path, cli):
    first = start("wait", llama, text_file, tmp_path / "out")
    assert first.out.readline() == "writing\n"
    done = cli("prune", llama, "-o", tmp_path / "out", "--sparsity", 0.2)
    assert done.status == 1
    assert f"Another run is at work in '{tmp_path / 'out'}'" in done.err
    os.kill(first.id, signal.SIGTERM)
    first.end()
    assert not list(tmp_path.iterdir())


def test_file_that_grows_beyond_a_limit(llama, text_file, existing):
    process = start("limit", llama, text_file, existing)
    status, messages = process.end()
    assert status == 1
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
            run_pruning(
                Request(str(tmp_path / "bf16"), make_settings(), sparsity=0.2), tmp_path / "out"
            )
