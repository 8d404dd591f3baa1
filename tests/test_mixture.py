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
from adapt_pruner.data.formats import ChatTemplate, TemplateRefusal, detect
from adapt_pruner.data.mixture import read_mixture, shipped_mixtures
from adapt_pruner.data.overlap import Overlap
from adapt_pruner.data.reading import Row, pieces_of, read_rows, shuffled
from adapt_pruner.errors import AdaptPrunerError, CalibrationError, DataError
from conftest import character_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKING = (  # shows the thoughts of the last answer alone, as those of reasoning models do
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% elif m.role == 'assistant' and loop.last %}"
    "{{ '</think>' not in m.content and '<think></think>' or '' }}{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
DIALOGUE = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "See you."},
]


def written(file: Path, content: object) -> Path:
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), "utf-8")
    return file


def with_template(template: str | None, **options) -> ChatTemplate:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, **options)


def answers_in(document) -> list[str]:
    return [document.text[start:end] for start, end in document.answers]


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
        assert shipped_mixtures() == ["adapt-llm"]
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
            stream = (Row({"text": "x" * (i % 7), "n": i}, "") for i in range(count))
            order = [row.values["n"] for row in shuffled(stream, seed=0)]
        finally:
            reading.SHUFFLE_ROWS, reading.SHUFFLE_CHARACTERS = before
        assert sorted(order) == list(range(count))

    def test_buffer_is_all_that_is_read_ahead(self, monkeypatch):
        monkeypatch.setattr(reading, "SHUFFLE_ROWS", 5)
        stream = iter(Row({"text": "x"}, str(i)) for i in range(100))
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


class TestFormats:
    @pytest.mark.parametrize(
        ("row", "format", "columns"),
        [
            ({"text": "a"}, "text", ["text"]),
            ({"page": "a", "id": 1}, "text", ["page"]),
            ({"prompt": "a", "response": "b"}, "prompt-response", ["prompt", "response"]),
            ({"prompt": "a", "completion": "b"}, "prompt-response", ["prompt", "completion"]),
            ({"instruction": "a", "input": "", "output": "b", "text": "ab"}, "instruction",
             ["instruction", "output", "input"]),
            ({"instruction": "a", "context": "", "response": "b"}, "instruction",
             ["instruction", "response", "context"]),
            ({"system_prompt": "", "question": "a", "response": "b"}, "instruction",
             ["question", "response", "system_prompt"]),
            ({"instruction": "a", "instances": []}, "instances", ["instruction", "instances"]),
            ({"prompt": "a", "messages": []}, "chat", ["messages"]),
            ({"conversations": []}, "chat", ["conversations"]),
            ({"conversation": []}, "chat", ["conversation"]),
        ],
    )  # fmt: skip
    def test_detected(self, row, format, columns):
        layout = detect(Row(row, ""), "a")
        assert layout.format == format
        assert list(layout.columns.values()) == columns

    @pytest.mark.parametrize(
        ("name", "format"),
        [
            ("dolly_prompt_response", "prompt-response"),
            ("self_instruct_seed_tasks", "instances"),
            ("user_oriented_instructions", "instances"),
        ],
    )
    def test_real_files(self, name, format):
        file = SHARED / "instruct" / f"{name}.jsonl"
        if not file.exists():
            pytest.skip(f"{file} is not here")
        rows = list(read_rows(str(file)))
        layout = detect(rows[0], name)
        assert layout.format == format
        template = with_template(None, default="alpaca")
        for row in rows:
            for document in layout.documents(row, name, template):
                (answer,) = answers_in(document)
                assert answer.removesuffix("</s>").strip()
                assert document.text.endswith(answer)

    def test_instruction(self):
        row = Row({"instruction": "Add.", "input": " 1 2 ", "output": "3", "system": "Be."}, "")
        (document,) = detect(row, "a").documents(row, "a", with_template(CHATML))
        assert document.text == "<system>Be.</s><user>Add.\n\n1 2</s><assistant>3</s>"
        assert answers_in(document) == ["3</s>"]

    def test_optional_column_that_the_first_row_lacks(self):
        layout = detect(Row({"instruction": "a", "output": "b"}, ""), "a")
        row = Row({"instruction": "Add.", "context": "1 2", "output": "3"}, "")
        (document,) = layout.documents(row, "a", with_template(CHATML))
        assert "Add.\n\n1 2" in document.text

    def test_prompt_and_response_stand_as_they_are(self):
        row = Row({"prompt": "a: ", "response": "b "}, "")
        (document,) = detect(row, "a").documents(row, "a", with_template(None))
        assert (document.text, document.answers) == ("a: b ", ((3, 5),))

    @pytest.mark.parametrize(
        "row",
        [
            {"text": ""}, {"text": " \n"}, {"text": None}, {"prompt": "a", "response": ""},
            {"instruction": "a", "output": None}, {"instruction": None, "output": "b"},
            {"instruction": "a", "instances": []}, {"messages": []}, {"messages": None},
        ],
    )  # fmt: skip
    def test_blank_rows_are_passed_over(self, row):
        assert detect(Row(row, ""), "a").documents(Row(row, ""), "a", with_template(CHATML)) == []

    def test_named_columns(self):
        row = Row({"body": "a", "text": "b"}, "")
        layout = detect(row, "a", columns={"text": "body"})
        assert (layout.format, layout.columns) == ("text", {"text": "body"})
        layout = detect(
            Row({"q": "a", "a": "b"}, ""), "a", columns={"prompt": "q", "response": "a"}
        )
        assert layout.format == "prompt-response"

    @pytest.mark.parametrize(
        ("row", "format", "columns", "says"),
        [
            ({"body": "a", "id": 1}, "auto", {}, "'a' has none of the columns .* has body, id"),
            ({"body": "a"}, "chat", {}, "needs .chat: messages.; it has body"),
            ({"body": "a"}, "auto", {"text": "bodi"}, "no column 'bodi' .*Did you mean 'body'"),
        ],
    )
    def test_columns_that_do_not_exist(self, row, format, columns, says):
        with pytest.raises(DataError, match=says):
            detect(Row(row, "line 1"), "a", format, columns)

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"content": "a"}, "'a' has no column 'text' .'b' line 7.; it has content"),
            ({"text": 7}, "'b' line 7: text must be text; got 7"),
        ],
    )
    def test_row_unlike_the_first(self, row, says):
        layout = detect(Row({"text": "a"}, ""), "a")
        with pytest.raises(DataError, match=says):
            layout.documents(Row(row, "'b' line 7"), "a", with_template(None))

    @pytest.mark.parametrize(
        "messages",
        ["Hello.", ["Hello."], [{"role": "user", "content": 1}], [{"content": "Hello."}]],
    )
    def test_messages_that_are_none(self, messages):
        layout = detect(Row({"messages": []}, ""), "a")
        with pytest.raises(DataError, match=r"'b' line 7: .*message.* must"):
            layout.documents(Row({"messages": messages}, "'b' line 7"), "a", with_template(CHATML))


class TestChat:
    def test_answers_by_comparison(self):
        document = with_template(CHATML).document(DIALOGUE)
        assert document.text.startswith("<user>Hello.</s><assistant>Hi.</s>")
        assert answers_in(document) == ["Hi.</s>", "See you.</s>"]
        assert not document.add_special_tokens

    def test_answers_that_the_template_marks(self):
        template = with_template(
            "{% for m in messages %}{% if m.role == 'assistant' %}[{% generation %}{{ m.content }}"
            "{% endgeneration %}]{% else %}({{ m.content }}){% endif %}{% endfor %}"
        )
        document = template.document(DIALOGUE)
        assert document.text == "(Hello.)[Hi.](Bye.)[See you.]"
        assert answers_in(document) == ["Hi.", "See you."]

    def test_template_that_writes_earlier_answers_in_another_way(self):
        messages = [dict(message) for message in DIALOGUE]
        document = with_template(THINKING).document(messages)
        assert answers_in(document) == ["Hi.</s>", "</think>See you.</s>"]
        messages[1]["content"] = "<think>a greeting</think>Hi."
        document = with_template(THINKING).document(messages)
        assert "a greeting" not in document.text
        assert answers_in(document)[-1] == "</think>See you.</s>"

    def test_alpaca(self):
        document = with_template(None, default="alpaca").document(DIALOGUE)
        assert document.text.endswith("### Instruction:\nBye.\n\n### Response:\nSee you.</s>")
        assert document.text.startswith("Below is an instruction")
        assert answers_in(document) == ["Hi.</s>", "See you.</s>"]
        assert document.add_special_tokens

    def test_sharegpt(self):
        turns = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hi."}]
        row = Row({"conversations": turns}, "")
        (document,) = detect(row, "a").documents(row, "a", with_template(CHATML))
        assert document.text == "<user>Hello.</s><assistant>Hi.</s>"

    def test_loss_on_everything_needs_no_answers(self):
        assert with_template(CHATML, mark_answers=False).document(DIALOGUE).answers is None

    def test_refusal(self):
        template = with_template("{{ raise_exception('roles must alternate') }}")
        with pytest.raises(TemplateRefusal, match="roles must alternate"):
            template.document(DIALOGUE)

    def test_template_that_does_not_exist(self):
        with pytest.raises(DataError, match=r"no chat template file 'no\.jinja'"):
            with_template(None, default="no.jinja")


class TestOverlap:
    WORDS = " ".join(f"word{i}" for i in range(60))

    def test_passage_of_the_text(self):
        overlap = Overlap([self.WORDS])
        words = self.WORDS.split()
        assert overlap.contains("before " + " ".join(words[5:27]).upper() + "! After.")
        assert not overlap.contains("before " + " ".join(words[5:26]) + " after.")
        assert not overlap.contains("Something else " * 30)

    def test_short_documents(self):
        overlap = Overlap([self.WORDS, "Yes, of course."])
        assert overlap.contains(" ".join(self.WORDS.split()[:15]))
        assert overlap.contains("yes of course")
        assert not overlap.contains("yes of course not")
        assert not overlap.contains("")
