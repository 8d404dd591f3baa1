"""Budgets, bad data, text to exclude, and the cache of tokenised data."""

from __future__ import annotations

import errno
import json
import os
import signal
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner import files
from adapt_pruner.data import domains
from adapt_pruner.data.npy import RowWriter
from adapt_pruner.data.packing import GROWTH, PackedData, windows_needed
from adapt_pruner.data.sampling import WindowSampler
from adapt_pruner.errors import CalibrationError, DataError, WritingError
from conftest import character_tokenizer


def in_a_child(work: Callable[[], object]) -> Callable[[], int]:
    """Run `work` in a child process. Returns what waits for it and gives its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def contents(data: PackedData) -> list[bytes]:
    return [
        array.tobytes()
        for d in data.domains
        for array in (d.tokens, d.answers)
        if array is not None
    ]


class TestBudget:
    def test_larger_than_the_data(self, pack, jsonl):
        file = jsonl({"text": "a" * 320})
        says = (
            r"'rows' has 320 tokens, but its share 1 of 336 needs 336: the budget is larger than "
            r"the data. Pass --repeat .* at most --tokens 320"
        )
        with pytest.raises(DataError, match=says):
            pack(file, tokens=336)
        assert pack(file, tokens=320).num_tokens == 320
        data = pack(file, tokens=336, repeat=True)
        assert len(WindowSampler(data).next(21).input_ids) == 21

    @given(st.integers(1, 30), st.floats(0.05, 0.95), st.integers(31, 200))
    @settings(max_examples=40, deadline=None)
    def test_possible_budget_is_the_largest(self, windows, weight, total):
        from adapt_pruner.data import packing

        domain = domains.PackedDomain("a", weight, np.zeros((windows, 2)), None, domains.Account())
        needed = windows_needed(total, weight, 2)
        if needed > windows:
            with pytest.raises(DataError) as caught:
                packing._check_size(domain, needed, total, 2, 2, repeat=False)
            possible = int(str(caught.value).rstrip(".").split()[-1]) // 2
            assert windows_needed(possible, weight, 2) <= windows
            assert windows_needed(possible + 1, weight, 2) > windows

    def test_dynamic_policy_prepares_more(self, pack, text_file, jsonl):
        other = jsonl({"text": "b" * 2000})
        sources = [{"path": str(text_file), "weight": 1}, {"path": other, "weight": 9}]
        data = pack({"sources": sources, "policy": "dynamic"}, tokens=1600)
        needed = windows_needed(100, 0.1, 2)
        assert [d.num_windows for d in data.domains] == [GROWTH * needed, 100]

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"tokens": 15}, "at least one window of 16 tokens; got 15"),
            ({"sequence_length": 1}, "at least 2 tokens; got 1"),
            ({"loss_on": "answer"}, "on 'all' or 'answers'; got 'answer'"),
        ],
    )
    def test_bad_values(self, pack, options, says):
        with pytest.raises(DataError, match=says):
            pack(**options)

    def test_less_than_a_window(self, pack, jsonl):
        with pytest.raises(DataError, match="'rows' has 4 tokens, not one window of 16"):
            pack(jsonl({"text": "abc"}), repeat=True)


class TestBadData:
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
    def test_empty(self, pack, tmp_path, name):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"'.*{name}' is empty"):
            pack(tmp_path / name)

    def test_blank(self, pack, jsonl):
        with pytest.raises(DataError, match=r"rows.jsonl' is empty"):
            pack(jsonl({"text": " "}, {"text": None}))

    def test_malformed_line_leaves_nothing(self, pack, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{"text": "abc\n')
        with pytest.raises(DataError, match=r"a\.jsonl' line 2 is not valid JSON"):
            pack(tmp_path / "a.jsonl")
        assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]

    def test_missing_column(self, pack, jsonl):
        with pytest.raises(DataError, match=r"it has body, id\. Say in a mixture file which"):
            pack(jsonl({"body": "a", "id": 1}))

    def test_tokenizer_of_another_model(self, pack):
        with pytest.raises(CalibrationError, match="vocabulary has 20 entries"):
            pack(vocab_size=20)

    def test_tokenizer_without_eos(self, pack):
        tokenizer = character_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(DataError, match="no EOS token"):
            pack(tokenizer=tokenizer)


class TestExclude:
    def test_overlapping_documents_are_dropped(self, pack, documents, tmp_path):
        data = pack(exclude=documents[:5], tokens=160)
        assert data.domains[0].account.dropped <= 5
        everything = pack(exclude=documents[:5], tokens=10**6, repeat=True)
        assert everything.domains[0].account.documents == 35
        assert everything.domains[0].account.dropped == 5
        assert "5 dropped (overlap with" in everything.describe()[0]
        (tmp_path / "held.jsonl").write_text(json.dumps({"page": documents[0]}))
        from_file = pack(exclude=tmp_path / "held.jsonl", tokens=10**6, repeat=True)
        assert from_file.domains[0].account.dropped == 1

    def test_nothing_left(self, pack, documents):
        with pytest.raises(DataError, match=r"All 40 documents .* nothing is left"):
            pack(exclude=documents)


class TestCache:
    def test_is_used_again(self, pack, monkeypatch):
        first = pack()
        monkeypatch.setattr(domains, "tokenised", lambda *_: pytest.fail("tokenised again"))
        second = pack()
        assert contents(first) == contents(second)
        assert first.fingerprint == second.fingerprint
        assert first.describe() == second.describe()

    def test_key_has_all_that_matters(self, pack, text_file, tmp_path):
        other = character_tokenizer("é")
        first = pack()
        others = [
            pack(tokens=816), pack(sequence_length=8), pack(seed=1), pack(tokenizer=other),
            pack(exclude=["nothing"]), pack([{"path": str(text_file), "format": "text"}]),
            pack(vocab_size=120), pack(loss_on="answers"),
        ]  # fmt: skip
        assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1 + len(others)
        fingerprints = [data.fingerprint for data in others]
        assert first.fingerprint not in fingerprints[:3]  # other windows
        assert {first.fingerprint} == set(fingerprints[3:])  # the same, as it happens

    def test_changed_file_is_read_again(self, pack, text_file, tmp_path):
        copy = tmp_path / "text.txt"
        copy.write_bytes(text_file.read_bytes())
        first, copied = pack(), pack(copy)
        os.utime(copy, ns=(1, 1))
        touched = pack(copy)
        assert len(list((tmp_path / "cache").glob("[!.]*"))) == 3
        assert first.fingerprint == copied.fingerprint == touched.fingerprint
        copy.write_text(text_file.read_text().replace("the", "The"))
        assert pack(copy).fingerprint != first.fingerprint

    def test_weights_alone_do_not_tokenise_again(self, pack, text_file, monkeypatch):
        first = pack([{"path": str(text_file), "weight": 1}])
        monkeypatch.setattr(domains, "tokenised", lambda *_: pytest.fail("tokenised again"))
        second = pack([{"path": str(text_file), "weight": 2}])
        assert first.fingerprint == second.fingerprint
        assert pack(repeat=True).fingerprint == pack().fingerprint

    @pytest.mark.parametrize("damage", ["account.json", "tokens.npy"])
    def test_damaged_is_made_again(self, pack, tmp_path, damage):
        before = contents(pack())
        (file,) = (tmp_path / "cache").glob(f"*/{damage}")
        file.write_bytes(file.read_bytes()[:40])
        assert contents(pack()) == before

    @pytest.mark.parametrize("point", ["start", "middle", "account", "rename", "after"])
    def test_killed_at_any_moment(self, pack, tmp_path, monkeypatch, point):
        expected = contents(pack(cache=tmp_path / "other"))
        with monkeypatch.context() as patch:
            options: dict = {}
            if point == "start":
                patch.setattr(domains, "read_rows", die)
            elif point == "middle":
                options["on_progress"] = lambda name, done, needed: done > 400 and die()
            elif point == "account":
                patch.setattr(domains, "write_json", die)
            elif point == "rename":
                patch.setattr(files, "take_place", die)
            else:
                replace = os.replace
                patch.setattr(os, "replace", lambda *paths: (replace(*paths), die()))
            assert in_a_child(lambda: pack(**options))() == -signal.SIGKILL
        assert (len(list((tmp_path / "cache").glob("[!.]*"))) == 1) == (point == "after")
        assert contents(pack()) == expected
        left = [file.name for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]
        assert len(left) == 1

    def test_processes_at_the_same_time_tokenise_once(self, pack, tmp_path):
        def work():
            def note(name, done, needed):
                with (tmp_path / "log").open("a") as log:
                    log.write(f"{os.getpid()}\n")

            pack(tokens=4000, on_progress=note)

        waiting = [in_a_child(work) for _ in range(3)]
        assert [wait() for wait in waiting] == [0, 0, 0]
        assert len(set((tmp_path / "log").read_text().split())) == 1

    def test_full_disk(self, pack, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(RowWriter, "add", full)
            with pytest.raises(WritingError, match=r"the disk is full.*free some space"):
                pack()
        assert not list((tmp_path / "cache").glob("[!.]*"))
        assert pack().num_tokens == 800

    def test_disk_that_is_too_small_is_noticed_before(self, pack, tmp_path, monkeypatch):
        usage = SimpleNamespace(free=2000)
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
        monkeypatch.setattr(domains, "read_rows", lambda *_: pytest.fail("read"))
        with pytest.raises(WritingError, match=r"only 2 kB are free"):
            pack()
        assert not (tmp_path / "cache").exists()

    def test_place_that_cannot_be_written(self, pack, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(WritingError, match=r"lies below .*file"):
            pack(cache=tmp_path / "file" / "cache")
