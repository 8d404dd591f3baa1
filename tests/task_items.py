"""A few items of every commonsense task, of WikiText and others, with the hub's field names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCIENCE = [
    ("Which statement is a loop?", ["for x in range", "import", "class", "return"], "A"),
    ("What ends a function?", ["a comment", "a return statement", "a name"], "B"),
    ("Which value is false?", ["None", "one", "a module", "an object"], "A"),
]
ITEMS: dict[str, list[dict[str, Any]]] = {
    "arc_easy.test": [
        {"question": q, "choices": {"text": c, "label": list("ABCD")[: len(c)]}, "answerKey": a}
        for q, c, a in SCIENCE
    ],
    "boolq.validation": [
        {"passage": "A tuple is immutable.", "question": "can a tuple be changed", "label": 0},
        {"passage": "A list is mutable.", "question": "can a list be changed", "label": 1},
    ],
    "hellaswag.validation": [
        {"query": "The module is", "choices": ["imported.", "eaten.", "sung."], "label": "0"},
        {"query": "The file is", "choices": ["flown.", "opened and read."], "label": "1"},
    ],
    "openbookqa.test": [
        {"question_stem": f"{q[:-1]} is", "choices": {"text": c, "label": list("ABCD")[: len(c)]},
         "answerKey": a}
        for q, c, a in SCIENCE[:2]
    ],
    "piqa.validation": [
        {"goal": "Read a file.", "sol1": "Use open().", "sol2": "Use close().", "label": 0},
        {"goal": "Stop a loop.", "sol1": "Use import.", "sol2": "Use break.", "label": 1},
    ],
    "social_iqa.validation": [
        {"context": "Kim wrote a test.", "question": "Why?", "answerA": "to check the code",
         "answerB": "to sleep", "answerC": "to eat", "label": "1"},
        {"context": "Kim closed the file.", "question": "Why?", "answerA": "to read it",
         "answerB": "it was read", "answerC": "to open it", "label": "2"},
    ],
    "winogrande.validation": [
        {"sentence": "The list was shorter than the tuple because the _ was empty.",
         "option1": "list", "option2": "tuple", "answer": "1"},
        {"sentence": "The loop used the range until the _ ended.", "option1": "loop",
         "option2": "range", "answer": "2"},
    ],
    "wikitext-2-raw.test": [
        {"page": " = Loops = \n \n A loop repeats a statement , and ends with a break . \n"},
        {"page": " = Names = \n \n A name is bound by an import , a class or a for loop . \n"},
    ],
}  # fmt: skip
ITEMS["arc_challenge.test"] = ITEMS["arc_easy.test"][1:]
MMLU = {
    "question": "What is 1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1,
}  # fmt: skip


def write_items(directory: Path, **changed: list[dict[str, Any]]) -> Path:
    """Write one file per task; `changed` replaces or adds some, dots in names as underscores."""
    directory.mkdir(exist_ok=True)
    for name, rows in ITEMS.items():
        write_rows(directory / f"{name}.jsonl", rows)
    for name, rows in changed.items():
        write_rows(directory / f"{'.'.join(name.rsplit('_', 1))}.jsonl", rows)
    return directory


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
