"""Rows of data sets become documents: text, and which of its characters are answers.

A format is one row of `FORMATS`: the roles its columns play, the names they go by, and the function
that makes documents of their values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import DataError, near_match, shown
from ..files import MAX_TEXT_BYTES, read_bytes
from .reading import DataRow, pieces_of
from .templates import EndlessTemplate, running_a_template

Spans = tuple[tuple[int, int], ...]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Document:
    """A text to train on."""

    text: str
    answers: Spans | None = None
    """Half-open ranges of characters that have loss; None: all of it."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own, such as BOS, or the text already holds them."""


class ChatTemplate:
    """Renders messages with the tokenizer's own template or, where it has none, another.

    Args:
        default: name of a template that ships with the package, or a Jinja file.
        mark_answers: find the answers of the assistant in the text.
    """

    def __init__(self, tokenizer: Any, default: str | None = None, mark_answers: bool = True):
        self.tokenizer, self.mark_answers = tokenizer, mark_answers
        self.is_own = bool(tokenizer.chat_template)
        self.text = tokenizer.get_chat_template() if self.is_own else None
        if self.text is None and default is not None:
            self.text = read_template(default)

    def document(self, messages: list[dict[str, Any]]) -> Document:
        """Render messages, and find the answers of the assistant in the text.

        Raises:
            TemplateRefusal: with the template's message.
        """
        text, spans = self._render(messages), None
        if self.mark_answers:
            marked = _GENERATION.search(self.text or "")
            spans = self._marked(messages) if marked else self._compared(messages, text)
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and text.startswith(bos)
        return Document(text, spans, add_special_tokens=not self.is_own and not has_bos)

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        with running_a_template():
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.text, tokenize=False, **options
            )

    def _marked(self, messages: list[dict[str, Any]]) -> Spans:
        """Take the places that the template itself marks with `{% generation %}`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with running_a_template():
            result: Any = render_jinja_template(
                [messages],
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return tuple((start, end) for start, end in result[1][0])

    def _compared(self, messages: list[dict[str, Any]], text: str) -> Spans:
        """Compare with renderings of the messages before and up to each answer."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # A generation prompt may hold more than the template writes later ("<think>").
            start = _common(text, self._render(messages[:i], add_generation_prompt=True))
            shown = self._render(messages[: i + 1])
            end = _common(text, shown)
            if end < len(shown):  # the template writes earlier answers in another way
                end = _end_of(message["content"], shown, text, start)
            if end > start:
                spans.append((start, end))
        return tuple(spans)


def _common(a: str, b: str) -> int:
    """Characters that two texts have in common at their beginning."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def _end_of(content: str | None, shown: str, text: str, start: int) -> int:
    """Where an answer that begins at `start` ends, with what closes its turn."""
    content = (content or "").strip()
    place, last = text.find(content, start), shown.rfind(content)
    if not content or place < 0 or last < 0:
        return start
    end, closing = place + len(content), shown[last + len(content) :]
    return end + len(closing) if text.startswith(closing, end) else end


@cache
def read_template(name: str) -> str:
    """The text of a chat template that ships with the package, or of a file."""
    shipped = resources.files("adapt_pruner") / "data" / "chat_templates" / f"{name}.jinja"
    if "/" not in name and shipped.is_file():
        return shipped.read_text(encoding="utf-8")
    try:
        file = Path(name).expanduser()
        return read_bytes(file, "chat template", DataError, MAX_TEXT_BYTES).decode("utf-8")
    except (DataError, UnicodeDecodeError) as error:
        reason = str(error) if isinstance(error, DataError) else f"'{name}' is not UTF-8 text."
        raise DataError(f"{reason} Name a Jinja file, or 'alpaca'.") from error


# From values to documents


def _text(values: dict[str, Any], template: ChatTemplate) -> Iterator[Document]:
    for piece in pieces_of(_string(values, "text")):
        if piece.strip():
            yield Document(piece)


def _prompt_response(values: dict[str, Any], template: ChatTemplate) -> Iterator[Document]:
    prompt, response = _string(values, "prompt"), _string(values, "response")
    if response.strip():
        answer = (len(prompt), len(prompt) + len(response))
        yield Document(prompt + response, (answer,) if template.mark_answers else None)


def _instruction(values: dict[str, Any], template: ChatTemplate) -> Iterator[Document]:
    """A dialogue of one turn for each instance, a pair of input and output."""
    instances = [values]
    if "instances" in values:
        instances = values["instances"]
        if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
            raise ValueError(
                f"column 'instances' must be a list of objects; got {shown(instances)}"
            )
    for instance in instances:
        given = (_string(values, "instruction"), _string(instance, "input"))
        prompt = "\n\n".join(part.strip() for part in given if part.strip())
        output = _string(instance, "output")
        if not prompt or not output.strip():
            continue
        system = _string(values, "system").strip()
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        yield template.document([*messages, {"role": "assistant", "content": output}])


def _chat(values: dict[str, Any], template: ChatTemplate) -> Iterator[Document]:
    messages = values["messages"]
    if isinstance(messages, list) and messages:
        yield template.document([_message(message) for message in messages])
    elif messages:
        raise ValueError(f"messages must be a list of role and content; got {shown(messages)}")


ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


def _message(message: Any) -> dict[str, Any]:
    """A message with role and content, of which ShareGPT's from and value are another form."""
    if not isinstance(message, dict):
        raise ValueError(f"a message must have role and content; got {shown(message)}")
    role, content = message.get("role", message.get("from")), message.get("content")
    content = message.get("value") if content is None else content
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise ValueError(f"a message must have role and content as text; got {shown(message)}")
    known = {"role": ROLES.get(role, role), "content": content or ""}
    calls = {key: message[key] for key in ("tool_calls", "name") if message.get(key)}
    return {**known, **calls}


def _string(values: dict[str, Any], role: str) -> str:
    value = values.get(role)
    if not isinstance(value, str | None):
        raise ValueError(f"{role} must be text; got {shown(value)}")
    return value or ""


@dataclass(frozen=True)
class Format:
    """Roles of columns, each with the names it goes by, the usual one first."""

    required: dict[str, tuple[str, ...]]
    documents: Callable[[dict[str, Any], ChatTemplate], Iterator[Document]]
    optional: dict[str, tuple[str, ...]]

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        return self.required | self.optional


_QUESTION = ("instruction", "question")
_MORE = {"input": ("input", "context"), "system": ("system_prompt", "system")}

FORMATS: dict[str, Format] = {
    "chat": Format({"messages": ("messages", "conversations", "conversation")}, _chat, {}),
    "prompt-response": Format(
        {"prompt": ("prompt",), "response": ("response", "completion")}, _prompt_response, {}
    ),
    "instruction": Format(
        {"instruction": _QUESTION, "output": ("output", "response", "answer")}, _instruction, _MORE
    ),
    "instances": Format({"instruction": _QUESTION, "instances": ("instances",)}, _instruction, {}),
    "text": Format({"text": ("text", "content", "page", "document", "story")}, _text, {}),
}
"""In the order in which `auto` tries them."""


@dataclass(frozen=True)
class RowLayout:
    """How the rows of one source are to be read."""

    format: str
    columns: dict[str, str]
    """Column by role, of those in the first row."""

    def documents(self, row: DataRow, source: str, template: ChatTemplate) -> list[Document]:
        """The documents of a row, none where it is blank.

        Raises:
            DataError: naming the place of a row that lacks a column or holds something else in it.
            TemplateRefusal: if the chat template does not take it.
        """
        form = FORMATS[self.format]
        for role in form.required:
            if self.columns[role] not in row.values:
                raise DataError(_no_column(source, self.columns[role], row))
        values = {role: row.values.get(column) for role, column in self.columns.items()}
        for role in form.optional.keys() - values.keys():  # the first row may not have had it
            values[role] = next(
                (row.values[n] for n in form.optional[role] if n in row.values), None
            )
        try:
            return list(form.documents(values, template))
        except EndlessTemplate:
            raise
        except ValueError as error:
            raise DataError(f"{row.place}: {error}. Correct it, or name other columns.") from error


def _no_column(source: str, column: str, row: DataRow) -> str:
    has = ", ".join(sorted(row.values)) or "none"
    hint = near_match(column, row.values)
    return f"'{source}' has no column '{column}' ({row.place}); it has {has}.{hint}"


def detect(
    row: DataRow, source: str, format: str = "auto", columns: dict[str, str] | None = None
) -> RowLayout:
    """The layout of a source, from its first row and what is said about it.

    Args:
        columns: column by role, for those that go by other names than usual.

    Raises:
        DataError: naming the columns there are, if none fits.
    """
    said = columns or {}
    for column in said.values():
        if column not in row.values:
            raise DataError(_no_column(source, column, row))
    candidates = list(FORMATS) if format == "auto" else [format]
    for name in candidates:
        form = FORMATS[name]
        found = {
            role: next((n for n in names if n in row.values), None)
            for role, names in form.roles.items()
        } | said
        if all(found.get(role) for role in form.required) and set(said) <= set(form.roles):
            return RowLayout(name, {role: column for role, column in found.items() if column})
    has = ", ".join(sorted(row.values)) or "none"
    wanted = "; ".join(
        f"{name}: {' and '.join(names[0] for names in FORMATS[name].required.values())}"
        for name in candidates
    )
    raise DataError(
        f"'{source}' has none of the columns that a format needs ({wanted}); it has {has}. "
        "Say in a mixture file which is which, such as `columns: {text: body}`."
    )
