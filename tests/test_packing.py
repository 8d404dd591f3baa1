"""Tokenised once, counted exactly, and whole on disk whatever happens."""

from __future__ import annotations

import errno
import json
import os
import signal
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner import files, load_tokenizer
from adapt_pruner.data import domains
from adapt_pruner.data.npy import RowWriter
from adapt_pruner.data.packing import GROWTH, PackedData, prepare, windows_needed
from adapt_pruner.data.sampling import WindowSampler
from adapt_pruner.errors import CalibrationError, DataError, WritingError
from conftest import character_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
EOS = 2  # of the character tokenizer


@pytest.fixture
def pack(tokenizer, text_file, tmp_path) -> Callable[..., PackedData]:
    """Prepare the forty documents, or others, in a cache of the test's own."""

    def run(source: object = text_file, **options) -> PackedData:
        if isinstance(source, (dict, list)):
            file = tmp_path / "mixture.yaml"
            content = {"sources": source} if isinstance(source, list) else source
            file.write_text(yaml.safe_dump(content))
            source = file
        options = {"tokens": 800, "cache": tmp_path / "cache", "sequence_length": 16} | options
        return prepare(source, options.pop("tokenizer", tokenizer), **options)

    return run


@pytest.fixture
def jsonl(tmp_path) -> Callable[..., str]:
    """Write rows to a file, and return its name."""

    def write(*rows: dict, name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), "utf-8")
        return str(tmp_path / name)

    return write


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


class TestTokens:
    def test_are_those_of_the_documents(self, pack, tokenizer, documents):
        total = sum(len(tokenizer(text)["input_ids"]) + 1 for text in documents)
        data = pack(tokens=total // 16 * 16)
        (domain,) = data.domains
        assert domain.tokens.shape == (total // 16, 16)
        assert domain.tokens.dtype == np.uint16
        assert isinstance(domain.tokens, np.memmap)
        assert domain.answers is None
        assert domain.account.documents == 40
        assert data.num_tokens == total // 16 * 16
        *texts, last = np.split(domain.tokens.ravel(), np.flatnonzero(domain.tokens == EOS) + 1)
        decoded = [tokenizer.decode(ids[:-1]) for ids in texts]
        assert set(decoded) <= set(documents)
        assert len(set(decoded)) == len(decoded) in (39, 40)
        assert any(text.startswith(tokenizer.decode(last)) for text in documents)

    def test_only_as_many_as_needed(self, pack):
        (domain,) = pack(tokens=100).domains
        assert domain.num_tokens == 112  # seven windows of 16
        assert domain.account.documents < 3
        assert not domain.account.exhausted

    def test_where_bos_is_eos_one_parts_two_documents(self, tmp_path, jsonl):
        tokenizer = load_tokenizer("demo")
        file = jsonl(*({"text": text} for text in ("One.", "Two.", "Three.")))
        ids = [tokenizer(text)["input_ids"] for text in ("One.", "Two.", "Three.")]
        assert all(document[0] == tokenizer.eos_token_id for document in ids)
        total = sum(map(len, ids)) + 1
        data = prepare(file, tokenizer, tokens=total, cache=tmp_path, sequence_length=total)
        tokens = data.domains[0].tokens[0].tolist()
        assert tokens[0] == tokens[-1] == tokenizer.eos_token_id
        assert sorted(tokens) == sorted(sum(ids, [tokenizer.eos_token_id]))
        assert not any(a == b == tokenizer.eos_token_id for a, b in pairwise(tokens))

    def test_real_text(self, tmp_path):
        file = SHARED / "text" / "abc.jsonl"
        if not file.exists():
            pytest.skip(f"{file} is not here")
        tokenizer = load_tokenizer("demo")
        data = prepare(file, tokenizer, tokens=100_000, cache=tmp_path, sequence_length=256)
        stream = data.domains[0].tokens.ravel()
        texts = {json.loads(line)["text"].strip() for line in file.read_bytes().splitlines()}
        starts = np.flatnonzero(stream == tokenizer.eos_token_id)
        for start, end in list(pairwise(starts))[:20]:
            text = tokenizer.decode(stream[start + 1 : end])
            assert text.strip() in texts
            assert (
                tokenizer(text, verbose=False)["input_ids"][1:] == stream[start + 1 : end].tolist()
            )

    @given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 9))
    @settings(max_examples=30, deadline=None)
    def test_rows_are_written_one_by_one(self, tmp_path_factory, lengths, length):
        file = tmp_path_factory.mktemp("npy") / "a.npy"
        values = np.arange(sum(lengths))
        with RowWriter(file, length, np.uint32) as writer:
            for part in np.split(values, np.cumsum(lengths)[:-1]) if lengths else []:
                writer.add(part)
        read = np.load(file)
        assert read.shape == (sum(lengths) // length, length)
        assert (read.ravel() == values[: read.size]).all()

    def test_wide_vocabulary(self, pack):
        (domain,) = pack(vocab_size=70_000).domains
        assert domain.tokens.dtype == np.uint32

    def test_mixture(self, pack, jsonl):
        other = jsonl({"text": "b" * 500}, name="b.jsonl")
        weights = [{"path": str(self_file(pack)), "weight": 3}, {"path": other, "weight": 1}]
        data = pack(weights, tokens=1600)
        assert [d.name for d in data.domains] == ["text", "b"]
        assert [d.num_windows for d in data.domains] == [
            windows_needed(100, w, 2) for w in (0.75, 0.25)
        ]
        batch = WindowSampler(data).next(100)
        assert batch.domains.bincount().tolist() == [75, 25]

    def test_description(self, pack):
        (line,) = pack(tokens=112).describe()
        assert line.startswith("text: text (text), 112 tokens in 7 windows of 16, from ")


def self_file(pack) -> Path:
    """The file of the forty documents."""
    return Path(pack(tokens=16).mixture.sources[0].path)


class TestAnswers:
    ROW = {"prompt": "Say a: ", "response": "aaa"}  # noqa: RUF012

    def labels(self, data: PackedData, tokenizer) -> str:
        (domain,) = data.domains
        marks = domain.answers if domain.answers is not None else np.ones_like(domain.tokens, bool)
        return "".join(np.where(marks, "1", "0").ravel())

    def test_loss_on_answers(self, pack, jsonl, tokenizer):
        data = pack(jsonl(self.ROW), loss_on="answers", sequence_length=11, tokens=11)
        assert self.labels(data, tokenizer) == "00000001111"  # the EOS too
        assert data.domains[0].account.answer_tokens == 4
        assert "loss on 36.4%" in data.describe()[0]

    def test_loss_on_everything(self, pack, jsonl):
        data = pack(jsonl(self.ROW), sequence_length=11, tokens=11)
        assert data.domains[0].answers is None

    def test_plain_text_has_loss_everywhere(self, pack):
        assert pack(loss_on="answers").domains[0].answers is None

    def test_tokenizer_without_offsets(self, pack, jsonl):
        class Slow:
            """What transformers calls a tokenizer that is written in Python."""

            is_fast, chat_template, bos_token, eos_token_id = False, None, "<s>", EOS
            special_tokens_map = {"eos_token": "</s>"}  # noqa: RUF012

            def __call__(self, texts, **options):
                assert not options.get("return_offsets_mapping")
                return character_tokenizer()(texts, **options)

            def get_vocab(self):
                return character_tokenizer().get_vocab()

            def __len__(self):
                return 99

        options = {"loss_on": "answers", "sequence_length": 11, "tokens": 11}
        data = pack(jsonl(self.ROW), tokenizer=Slow(), **options)
        assert self.labels(data, None) == "00000001111"

    def test_token_that_holds_the_end_of_the_prompt_too(self, tmp_path, jsonl):
        tokenizer = load_tokenizer("demo")
        file = jsonl({"prompt": "the fun", "response": "ction is called"})
        ids = tokenizer("the function is called")["input_ids"]
        data = prepare(
            file, tokenizer, tokens=len(ids), cache=tmp_path, sequence_length=len(ids),
            loss_on="answers",
        )  # fmt: skip
        offsets = tokenizer("the function is called", return_offsets_mapping=True)["offset_mapping"]
        expected = [end > len("the fun") for _, end in offsets]
        assert data.domains[0].answers[0].tolist() == expected

    def test_no_answer_token(self, pack, jsonl):
        tokenizer = character_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        file = jsonl({"messages": [{"role": "user", "content": "Hello to all of you."}]})
        with pytest.raises(DataError, match=r"'rows' has no answer token .*read as chat"):
            pack(file, tokenizer=tokenizer, loss_on="answers", tokens=16)

    def test_chat(self, pack, jsonl):
        tokenizer = character_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}a{% endif %}"
        )
        turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
        file = jsonl({"messages": turns})
        options = {"tokenizer": tokenizer, "loss_on": "answers"}
        data = pack(file, sequence_length=8, tokens=8, **options)
        assert tokenizer.decode(data.domains[0].tokens[0]) == "u1+1</s>a2</s>"  # no EOS added
        assert self.labels(data, tokenizer) == "00000011"

    def test_chat_without_template(self, pack, jsonl):
        turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
        file = jsonl({"messages": turns}, {"messages": turns})
        with pytest.raises(
            DataError, match=r"tokenizer has no chat template.*default_chat_template"
        ):
            pack(file, tokens=16)
        mixture = {"sources": [file], "default_chat_template": "alpaca"}
        assert pack(mixture, tokens=160, loss_on="answers").domains[0].account.answer_tokens > 1

    def test_refused_rows_are_counted(self, pack, jsonl):
        tokenizer = character_tokenizer()
        tokenizer.chat_template = (
            "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
            "{{ messages[0].content }}"
        )
        rows = [{"messages": [{"role": r, "content": "x" * 40}]} for r in ("assistant", "user")]
        data = pack(jsonl(*rows), tokenizer=tokenizer, tokens=32)
        assert data.domains[0].account.refused == 1
        assert "1 refused by the chat template (user first)" in data.describe()[0]
        with pytest.raises(DataError, match=r"template refuses all of '.*': user first"):
            pack(jsonl(rows[0], name="b.jsonl"), tokenizer=tokenizer)


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
