"""lm-eval's own tasks on local data: same prompts, same metrics, other files.

For every task a definition is written that includes lm-eval's own and names local files instead of
the hub. The directory of definitions works with lm-eval's command line too (`--include_path`).

A file is found by its name, `{name}.{split}.jsonl` (or .json, .parquet): `arc_easy.test.jsonl`. The
name is that of the task, of its data set or configuration on the hub, or one of
`suites.DATA_NAMES`; letter case and the difference of - and _ do not matter. One file may hold all
configurations of a data set, told apart by a column (`suites.SUBJECT_COLUMNS`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from ..errors import EvaluationError
from .suites import DATA_NAMES, PREPARED_COLUMNS, SUBJECT_COLUMNS

FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def write_definitions(
    configs: dict[str, tuple[Path, dict[str, Any]]],
    num_fewshot: dict[str, int],
    directories: Sequence[Path],
    output: Path,
) -> None:
    """Write a definition on local data for every task.

    Args:
        configs: per task the file that defines it and what that says, `include` resolved.
        num_fewshot: shots of each task; where it has any, their split is needed too.
        directories: where data is looked for, in this order.
        output: directory to write to.

    Raises:
        EvaluationError: naming the files that are missing.
    """
    for directory in directories:
        if not directory.is_dir():
            raise EvaluationError(f"There is no directory '{directory}' with task data.")
    missing: dict[str, str] = {}
    for task, (definition, config) in configs.items():
        splits = _splits(config, num_fewshot[task])
        files = {split: _find(directories, task, config, split) for split in set(splits.values())}
        absent = [split for split, file in files.items() if file is None]
        if absent:
            missing[task] = f"{_names(task, config)[0]}.{sorted(absent)[0]}.jsonl"
            continue
        found = {split: file for split, file in files.items() if file is not None}
        text = yaml.safe_dump(_definition(task, definition, config, splits, found, output))
        (output / f"{task}.yaml").write_text(text, encoding="utf-8")
    if missing:
        raise EvaluationError(_explain(missing, list(configs), directories))


def _splits(config: dict[str, Any], num_fewshot: int) -> dict[str, str]:
    """The splits that lm-eval reads, by the setting that names them."""
    measured = "test_split" if config.get("test_split") else "validation_split"
    splits = {measured: config[measured]}
    if num_fewshot and not (config.get("fewshot_config") or {}).get("samples"):
        order = ("fewshot_split", "training_split", "validation_split", "test_split")
        shots = next(name for name in order if config.get(name))
        splits[shots] = config[shots]
    return splits


def _definition(
    task: str,
    original: Path,
    config: dict[str, Any],
    splits: dict[str, str],
    files: dict[str, Path],
    output: Path,
) -> dict[str, Any]:
    unused = ("training_split", "validation_split", "test_split", "fewshot_split")
    column = SUBJECT_COLUMNS.get(config["dataset_path"])
    for split, file in files.items():
        if column and not _is_of_task(file, task, config):
            files[split] = _write_subject(file, column, config["dataset_name"], output / task)
    prepared = PREPARED_COLUMNS.get(task)
    kept = {"process_docs": None} if prepared and prepared == _columns(files) & prepared else {}
    return {
        "include": str(original),
        "task": task,
        "tag": None,
        "dataset_path": FILE_KINDS[next(iter(files.values())).suffix],
        "dataset_name": None,
        **dict.fromkeys(unused),
        **splits,
        **kept,
        "dataset_kwargs": {
            "data_files": {split: str(file) for split, file in files.items()},
            "cache_dir": str(output / "cache"),
        },
    }


def _names(task: str, config: dict[str, Any]) -> list[str]:
    """What a file with the data of a task may be called, in the order of preference."""
    data_set, part = config["dataset_path"].split("/")[-1], config.get("dataset_name")
    names = [DATA_NAMES.get(task, task), task]
    names += [f"{data_set}_{part}", part] if part else [data_set]
    if config["dataset_path"] in SUBJECT_COLUMNS:
        names.append(data_set)
    return names


def _find(
    directories: Sequence[Path], task: str, config: dict[str, Any], split: str
) -> Path | None:
    for directory in directories:
        files = {_plain(file.name): file for file in sorted(directory.iterdir())}
        for name in _names(task, config):
            for suffix in FILE_KINDS:
                if file := files.get(_plain(f"{name}.{split}{suffix}")):
                    return file.absolute()
    return None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _is_of_task(file: Path, task: str, config: dict[str, Any]) -> bool:
    whole = config["dataset_path"].split("/")[-1]
    return _plain(file.name.split(".")[0]) != _plain(whole)


def _write_subject(file: Path, column: str, subject: str, directory: Path) -> Path:
    rows = _rows_by(file, column, file.stat().st_mtime_ns).get(subject)
    if not rows:
        raise EvaluationError(f"'{file}' has no row with '{subject}' in column '{column}'.")
    directory.mkdir(exist_ok=True)
    output = directory / f"{file.stem}.jsonl"
    output.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return output


@lru_cache(maxsize=8)
def _rows_by(file: Path, column: str, changed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by the value in a column; `changed` is when the file was, so that it is read anew."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(file):
        found.setdefault(str(row.get(column)), []).append(row)
    return found


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if FILE_KINDS[file.suffix] != "json":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(file).to_pylist()
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise EvaluationError(f"'{file}' is not JSON in line {number}: {error}.") from error
            if not isinstance(row, dict):
                raise EvaluationError(f"'{file}' has no JSON object in line {number}.")
            yield row


def _columns(files: dict[str, Path]) -> set[str]:
    return set(next(_rows(next(iter(files.values()))), {}))


def _explain(missing: dict[str, str], tasks: list[str], directories: Sequence[Path]) -> str:
    where = ", ".join(f"'{directory}'" for directory in directories)
    task, file = next(iter(missing.items()))
    text = f"{where} has no data for task '{task}': there is no '{file}' (or .json, .parquet)."
    if len(missing) > 1:
        text += f" {len(missing) - 1} more tasks have none either."
    there = [task for task in tasks if task not in missing]
    if there:
        shown = ",".join(there[:12])
        text += f" There is data for --tasks {shown}{' ...' if len(there) > 12 else ''}."
    return text


def check_columns(task: Any) -> None:
    """Raise EvaluationError if a task's data lacks a column that its prompt names.

    lm-eval would take the name of a missing column for the prompt's text.
    """
    columns = set(task.features)
    for setting in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        name = getattr(task.config, setting)
        if isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name) and name not in columns:
            raise EvaluationError(
                f"The data of task '{task.config.task}' has no column '{name}'; it has "
                f"{', '.join(sorted(columns))}."
            )


def check_labels(task: Any, limit: int | None = None) -> None:
    """Raise EvaluationError if the answer of one of the first items is none of its choices.

    lm-eval would count every answer to it as wrong.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, row in enumerate(islice(task.eval_docs, limit)):
        choices = task.doc_to_choice(row)
        gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        for label in gold if isinstance(gold, list) else [gold]:
            known = label in choices if isinstance(label, str) else 0 <= label < len(choices)
            if not known:
                raise EvaluationError(
                    f"Item {number} of the data of task '{task.config.task}' has the answer "
                    f"{label!r}, which is none of its {len(choices)} choices."
                )
