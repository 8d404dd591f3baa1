"""A checkpoint appears whole or not at all, and what was there before survives every failure."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from adapt_pruner import checkpoint, claims, durable
from adapt_pruner.claims import claimed
from adapt_pruner.errors import WritingError
from adapt_pruner.files import atomic_directory, check_output
from atomic_runs import is_untouched


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
        "save_pretrained": (type(result.model), at),
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

    monkeypatch.setattr(type(result.model), "save_pretrained", failing)
    with pytest.raises(WritingError, match=r"could not be written: .*Read-only file system"):
        result.save(existing, overwrite=True)
    assert is_untouched(existing)


def test_errors_of_the_program_stay_what_they_are(result, existing, monkeypatch):
    def failing(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(type(result.model), "save_pretrained", failing)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        result.save(existing, overwrite=True)
    assert is_untouched(existing)


def test_what_a_search_left_half_written_inside_another_goes(tmp_path):
    place = tmp_path / "out"
    left = [".out.partial-0123abcd", "..out.partial-0123abcd.partial-4567cdef"]
    kept = ["..out.partial-0123abcd", ".outer.partial-0123abcd", "out"]
    for name in (*left, *kept):
        (tmp_path / name).mkdir()
    durable.recover(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_half_written_files_are_nobodys_and_go(tmp_path):
    out = tmp_path / "out"
    with atomic_directory(out) as partial:
        (partial / "study").mkdir()
        (partial / "model").write_text("whole")
        claims.write_record(partial)
    left = [out / ".report.html.partial-0123abcd", out / "pictures" / ".a.svg.partial-0123abcd"]
    kept = [out / ".notes.partial", out / "study" / ".pool.partial-0123abcd"]  # may be at work
    (out / "pictures").mkdir()
    for file in (*left, *kept):
        file.write_text("half")
    assert claims.foreign_files(out) == [".notes.partial"]
    with claims.claimed(out):
        assert [file.exists() for file in (*left, *kept)] == [False, False, True, True]
