"""Rows become documents: formats, chats, overlap with a text to exclude."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapt_pruner.data.formats import ChatTemplate, detect
from adapt_pruner.data.overlap import Overlap
from adapt_pruner.data.reading import DataRow, read_rows
from adapt_pruner.data.templates import TemplateRefusal
from adapt_pruner.errors import DataError
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


def with_template(template: str | None, **options) -> ChatTemplate:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, **options)


def answers_in(document) -> list[str]:
    return [document.text[start:end] for start, end in document.answers]


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
        layout = detect(DataRow(row, ""), "a")
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
        row = DataRow({"instruction": "Add.", "input": " 1 2 ", "output": "3", "system": "Be."}, "")
        (document,) = detect(row, "a").documents(row, "a", with_template(CHATML))
        assert document.text == "<system>Be.</s><user>Add.\n\n1 2</s><assistant>3</s>"
        assert answers_in(document) == ["3</s>"]

    def test_optional_column_that_the_first_row_lacks(self):
        layout = detect(DataRow({"instruction": "a", "output": "b"}, ""), "a")
        row = DataRow({"instruction": "Add.", "context": "1 2", "output": "3"}, "")
        (document,) = layout.documents(row, "a", with_template(CHATML))
        assert "Add.\n\n1 2" in document.text

    def test_prompt_and_response_stand_as_they_are(self):
        row = DataRow({"prompt": "a: ", "response": "b "}, "")
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
        blank = DataRow(row, "")
        assert detect(blank, "a").documents(blank, "a", with_template(CHATML)) == []

    def test_named_columns(self):
        row = DataRow({"body": "a", "text": "b"}, "")
        layout = detect(row, "a", columns={"text": "body"})
        assert (layout.format, layout.columns) == ("text", {"text": "body"})
        layout = detect(
            DataRow({"q": "a", "a": "b"}, ""), "a", columns={"prompt": "q", "response": "a"}
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
            detect(DataRow(row, "line 1"), "a", format, columns)

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"content": "a"}, "'a' has no column 'text' .'b' line 7.; it has content"),
            ({"text": 7}, "'b' line 7: text must be text; got 7"),
        ],
    )
    def test_row_unlike_the_first(self, row, says):
        layout = detect(DataRow({"text": "a"}, ""), "a")
        with pytest.raises(DataError, match=says):
            layout.documents(DataRow(row, "'b' line 7"), "a", with_template(None))

    @pytest.mark.parametrize(
        "messages",
        ["Hello.", ["Hello."], [{"role": "user", "content": 1}], [{"content": "Hello."}]],
    )
    def test_messages_that_are_none(self, messages):
        layout = detect(DataRow({"messages": []}, ""), "a")
        with pytest.raises(DataError, match=r"'b' line 7: .*message.* must"):
            layout.documents(
                DataRow({"messages": messages}, "'b' line 7"), "a", with_template(CHATML)
            )


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
        row = DataRow({"conversations": turns}, "")
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
