"""Tokenised once, counted exactly, and whole on disk whatever happens."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_pruner import load_tokenizer
from adapt_pruner.data.npy import RowWriter
from adapt_pruner.data.packing import PackedData, prepare, windows_needed
from adapt_pruner.data.sampling import WindowSampler
from adapt_pruner.errors import DataError
from conftest import character_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
EOS = 2  # of the character tokenizer


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
            model_max_length = 512

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
