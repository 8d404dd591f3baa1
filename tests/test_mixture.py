"""What a mixture may say, what rows may look like, and what is said when they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapt_pruner.data import reading
from adapt_pruner.data.mixture import read_mixture, shipped_mixtures
from adapt_pruner.data.reading import DataRow, pieces_of, read_rows, shuffled
from adapt_pruner.errors import AdaptPrunerError, CalibrationError, DataError


def written(file: Path, content: object) -> Path:
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), "utf-8")
    return file


class TestMixture:
    def test_file_as_mixture(self, text_file):
        (source,) = read_mixture(text_file).sources
        assert (source.name, source.path, source.weight) == ("text", str(text_file), 1.0)

    def test_data_set_on_the_hub(self):
        mixture = read_mixture("some-lab/words-2.5")
        assert mixture.sources[0].name == "words-2.5"
        assert mixture.policy == "fixed"

    def test_file_with_everything(self, tmp_path, text_file):
        (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n')
        (tmp_path / "chat.jinja").write_text("x")
        mixture = read_mixture(written(tmp_path / "mix.yaml", {
            "policy": "dynamic",
            "default_chat_template": "chat.jinja",
            "reference_losses": {"rows": 2.5},
            "sources": [
                {"path": "rows.jsonl", "weight": 3, "columns": {"text": "body"}},
                {"path": str(text_file), "weight": 1, "name": "plain"},
                {"path": "lab/words", "weight": 4, "subset": "en", "split": "test"},
                "pydocs",
            ],
        }))  # fmt: skip
        assert mixture.weights == {"rows": 1 / 3, "plain": 1 / 9, "words": 4 / 9, "pydocs": 1 / 9}
        assert mixture.sources[0].path == str(tmp_path / "rows.jsonl")
        assert mixture.default_chat_template == str(tmp_path / "chat.jinja")
        assert mixture.policy == "dynamic"

    def test_shipped_mixture_is_table_2(self):
        assert shipped_mixtures() == ["adapt-llm", "alpaca"]
        mixture = read_mixture("adapt-llm")
        assert len(mixture.sources) == 9
        assert mixture.sources[0].path == "Open-Orca/OpenOrca"
        assert mixture.weights["openorca"] == pytest.approx(1.80 / 3.9096)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ({"sources": [{"path": "a.txt", "weight": -1}]}, "source 1: weight: .*got -1"),
            ({"sources": [{"path": "a.txt", "weight": "much"}]}, "weight: .*number; got 'much'"),
            (
                {"sources": [{"path": "a.txt", "weight": True}]},
                "weight: must be a number, not .*; got True",
            ),
            ({"sources": [{"path": "a.txt", "weight": float("inf")}]}, "weight: .*got inf"),
            ({"sources": [{"path": "a.txt", "weight": 0}]}, "all weights are 0"),
            ({"sources": [{"path": "a.txt", "wieght": 1}]}, "'wieght'. Did you mean 'weight'"),
            ({"source": ["a.txt"]}, "there is no key 'source'. Did you mean 'sources'"),
            ({"policy": "fixed"}, "`sources` is missing"),
            ({"sources": []}, "sources: .*at least 1 item"),
            ({"sources": "a.txt"}, "sources: .*got 'a.txt'"),
            ({"sources": [{"weight": 1}]}, "source 1: `path` is missing"),
            ({"sources": ["a.txt", 7]}, "source 2: .*got 7"),
            ({"sources": ["a.txt"], "policy": "dinamic"}, "Did you mean 'dynamic'"),
            ({"sources": [{"path": "a.txt", "format": "cha"}]}, "Did you mean 'chat'. Known: auto"),
            ({"sources": ["a.txt", "a.txt"]}, "two sources are called 'a'; give one another"),
            ({"sources": ["b.txt"]}, "There is no text file or directory 'b.txt'"),
            ({"sources": [{"path": "a.txt", "split": "test"}]}, "'a.txt' is local, but `split`"),
            ({"sources": ["a.txt"], "reference_losses": {"b": 1.0}}, "'b', which is no source"),
            (
                {"sources": [{"path": "a.txt", "format": "text", "columns": {"txt": "body"}}]},
                "format text has no column role 'txt'. Did you mean 'text'",
            ),
            ({1: 2}, "keys must be text"),
            ("- a\n- b\n", r"must be a mapping such as .*got \['a', 'b'\]"),
            ("", "must be a mapping"),
            ("sources: [", "is not YAML: .* in line 1"),
            ("sources: [\n}", "is not YAML: .* in line 2"),
        ],
    )
    def test_bad(self, tmp_path, content, says):
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(DataError, match=says) as caught:
            read_mixture(written(tmp_path / "mix.yaml", content))
        assert "mix.yaml" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_missing(self):
        with pytest.raises(DataError, match=r"no mixture file 'no.yaml'"):
            read_mixture("no.yaml")
        with pytest.raises(DataError, match=r"no text file or directory './nowhere'"):
            read_mixture("./nowhere")
        with pytest.raises(DataError, match=r"no mixture 'adapt-lm'\. Did you mean 'adapt-llm'"):
            read_mixture("adapt-lm")

    def test_errors_are_of_one_family(self):
        assert issubclass(DataError, AdaptPrunerError)
        assert issubclass(CalibrationError, DataError)


class TestRows:
    ROWS = ({"text": "one", "n": 1}, {"text": "two", "n": 2}, {"text": "drei", "n": 3})

    def files(self, directory: Path) -> dict[str, Path]:
        lines = "\n".join(map(json.dumps, self.ROWS))
        pa.parquet.write_table(pa.Table.from_pylist(list(self.ROWS)), directory / "a.parquet")
        return {
            "jsonl": written(directory / "a.jsonl", f"\ufeff{lines}\n\n"),
            "json": written(directory / "a.json", json.dumps(self.ROWS)),
            "lines": written(directory / "b.json", lines),
            "parquet": directory / "a.parquet",
        }

    def test_all_kinds_of_files(self, tmp_path):
        for file in self.files(tmp_path).values():
            rows = sorted((row.values for row in read_rows(str(file))), key=lambda row: row["n"])
            assert rows == list(self.ROWS)
        assert len(list(read_rows(str(tmp_path)))) == 12

    def test_every_row_knows_its_place(self, tmp_path):
        files = self.files(tmp_path)
        places = {row.values["n"]: row.place for row in read_rows(str(files["jsonl"]))}
        assert places == {i: f"'{files['jsonl']}' line {i}" for i in (1, 2, 3)}
        places = {row.values["n"]: row.place for row in read_rows(str(files["parquet"]))}
        assert places[3] == f"'{files['parquet']}' row 3"

    def test_order_follows_the_seed(self, text_file):
        order = [row.place for row in read_rows(str(text_file), seed=1)]
        assert order == [row.place for row in read_rows(str(text_file), seed=1)]
        assert order != [row.place for row in read_rows(str(text_file), seed=2)]
        assert len(set(order)) == 40

    def test_plain_text_in_small_chunks(self, text_file, documents, monkeypatch):
        monkeypatch.setattr(reading, "LONGEST_DOCUMENT", 400)
        texts = [row.values["text"] for row in read_rows(str(text_file))]
        assert sorted(texts) == sorted(documents)

    def test_long_text_is_cut_at_white_space(self, tmp_path, documents, monkeypatch):
        monkeypatch.setattr(reading, "LONGEST_DOCUMENT", 100)
        file = written(tmp_path / "long.txt", " ".join(documents))
        texts = sorted(
            (int(row.place.split()[-1]), row.values["text"]) for row in read_rows(str(file))
        )
        assert " ".join(text for _, text in texts) == " ".join(documents)
        assert max(len(text) for _, text in texts) <= 200

    @given(st.text(alphabet="ab \n", max_size=200), st.integers(20, 50))
    def test_pieces_make_up_the_text(self, text, longest):
        before, reading.LONGEST_DOCUMENT = reading.LONGEST_DOCUMENT, longest
        try:
            pieces = pieces_of(text)
        finally:
            reading.LONGEST_DOCUMENT = before
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= longest

    @given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 300))
    def test_shuffling_loses_nothing(self, count, rows, characters):
        before = reading.SHUFFLE_ROWS, reading.SHUFFLE_CHARACTERS
        reading.SHUFFLE_ROWS, reading.SHUFFLE_CHARACTERS = rows, characters
        try:
            stream = (DataRow({"text": "x" * (i % 7), "n": i}, "") for i in range(count))
            order = [row.values["n"] for row in shuffled(stream, seed=0)]
        finally:
            reading.SHUFFLE_ROWS, reading.SHUFFLE_CHARACTERS = before
        assert sorted(order) == list(range(count))

    def test_buffer_is_all_that_is_read_ahead(self, monkeypatch):
        monkeypatch.setattr(reading, "SHUFFLE_ROWS", 5)
        stream = iter(DataRow({"text": "x"}, str(i)) for i in range(100))
        next(shuffled(stream, seed=0))
        assert next(stream).place == "6"

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "'{}' line 3 is not valid JSON"),
            ("a.jsonl", b'{"text": "a"}\n"a"\n', "'{}' line 2 must be an object such as .*got 'a"),
            ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "'{}' line 2 is not UTF-8"),
            ("a.json", b'[{"text": "a"}, {"text"]', "'{}' is not valid JSON: .*line 1 column 24"),
            ("a.json", b'[{"text": "a"}, 3]', "'{}' record 2 must be an object .*got 3"),
            ("a.parquet", b"no parquet", "'{}' is no parquet file that can be read: "),
            ("a.txt", b"one\ntwo\ncaf\xe9\n", "'{}' line 3 is not UTF-8"),
            ("a.csv", b"text\n", "'{}' holds no text that can be read; expected .json, .jsonl"),
        ],
    )
    def test_malformed(self, tmp_path, name, content, says):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=says.format(tmp_path / name)):
            list(read_rows(str(tmp_path / name)))

    def test_file_that_may_not_be_read(self, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        file = written(tmp_path / "a.txt", "text")
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(DataError, match=f"'{file}' cannot be read: Permission denied"):
            list(read_rows(str(file)))

    def test_hub_by_the_same_arguments(self, tmp_path):
        """`datasets` reads a directory as it reads a repository of the hub."""
        for split, rows in (("train", self.ROWS[:2]), ("test", self.ROWS[2:])):
            written(tmp_path / f"{split}.jsonl", "\n".join(map(json.dumps, rows)))
        rows = list(reading._hub_rows(str(tmp_path), None, "test", None, seed=0))
        assert [row.values for row in rows] == [self.ROWS[2]]
        assert rows[0].place == f"'{tmp_path}' row 1"
        rows = reading._hub_rows(str(tmp_path), "default", "train", None, seed=0)
        assert sorted(row.values["n"] for row in rows) == [1, 2]
        with pytest.raises(DataError, match=r"Bad split: valid. Available splits: .*train"):
            list(reading._hub_rows(str(tmp_path), None, "valid", None, seed=0))

    def test_hub_while_offline(self):
        with pytest.raises(DataError, match=r"Data set 'lab/words' cannot be read.*local txt"):
            next(read_rows("lab/words"))
