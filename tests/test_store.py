"""Results on disk: found again by their key, never mixed up, never lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from adapt_pruner.errors import WritingError
from adapt_pruner.evaluation.store import VARIABLE, ResultStore, default_directory, digest

KEY = {"task": "arc_easy", "seed": 0, "model": {"weights": "abc"}}
RESULT = {"acc": 0.25}


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(tmp_path / "results")


def test_what_was_stored_is_found_in_any_order_of_the_key(store):
    store.put(KEY, RESULT)
    assert store.get(dict(reversed(KEY.items()))) == RESULT


@pytest.mark.parametrize(
    "other", [{**KEY, "seed": 1}, {**KEY, "limit": None}, {**KEY, "model": {"weights": "abd"}}, {}]
)
def test_another_key_has_another_result(store, other):
    store.put(KEY, RESULT)
    assert store.get(other) is None
    store.put(other, {"acc": 1.0})
    assert (store.get(KEY), store.get(other)) == (RESULT, {"acc": 1.0})


def test_tuples_and_integer_keys_compare_as_json_stores_them(store):
    store.put({"a": (1, 2), "b": {1: 2}}, RESULT)
    assert store.get({"a": [1, 2], "b": {"1": 2}}) == RESULT


def test_compute_runs_once(store):
    calls = []

    def function():
        calls.append(1)
        return RESULT

    assert store.compute(KEY, function) == store.compute(KEY, function) == RESULT
    assert calls == [1]


def test_failed_computation_stores_nothing(store):
    with pytest.raises(ZeroDivisionError):
        store.compute(KEY, lambda: {"x": 1 / 0})
    assert not store.directory.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": {}, "result": 1}', "\x00"])
def test_damaged_file_counts_as_absent_and_is_replaced(store, content):
    store.put(KEY, RESULT)
    (file,) = store.directory.iterdir()
    file.write_text(content)
    assert store.get(KEY) is None
    assert store.compute(KEY, lambda: {"acc": 0.5}) == {"acc": 0.5}
    assert store.get(KEY) == {"acc": 0.5}


def test_file_of_another_key_is_not_believed(store):
    store.put(KEY, RESULT)
    other = {**KEY, "seed": 1}
    (store.directory / f"{digest(KEY)}.json").rename(store.directory / f"{digest(other)}.json")
    assert store.get(other) is None


def test_nan_is_refused(store):
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.put(KEY, {"acc": float("nan")})
    assert store.get(KEY) is None


def test_record_says_where_the_result_comes_from(store, monkeypatch):
    record = store.put(KEY, RESULT)
    assert store.read(KEY) == record
    assert record.date.endswith("+00:00")
    assert record.git_hash is None or len(record.git_hash.removesuffix("-dirty")) == 40
    (file,) = store.directory.iterdir()
    assert json.loads(file.read_text())["key"] == KEY


def test_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WritingError, match="could not be written"):
        ResultStore(tmp_path / "file").put(KEY, RESULT)


def test_failed_write_leaves_the_old_result(store, monkeypatch):
    store.put(KEY, RESULT)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WritingError, match="the disk is full"):
        store.put(KEY, {"acc": 1.0})
    monkeypatch.undo()
    assert store.get(KEY) == RESULT
    assert len(list(store.directory.iterdir())) == 1


def test_many_writers_of_one_key(store):
    threads = [
        threading.Thread(target=store.put, args=(KEY, {"acc": number / 8, "pad": "x" * 10_000}))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    seen = [store.get(KEY) for _ in range(50)]
    for thread in threads:
        thread.join()
    assert all(result is None or len(result["pad"]) == 10_000 for result in seen)
    assert store.get(KEY) is not None
    assert len(list(store.directory.iterdir())) == 1


def test_place_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "adapt-pruner" / "results"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert ResultStore().directory == tmp_path / "mine" / "results"
    assert ResultStore(tmp_path / "other").directory == tmp_path / "other"


def test_importing_the_store_imports_no_lm_eval():
    code = "import sys, adapt_pruner; adapt_pruner.ResultStore; print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_other_files_in_the_directory_do_no_harm(store):
    store.put(KEY, RESULT)
    Path(store.directory, "notes.txt").write_text("mine")
    assert store.get(KEY) == RESULT
