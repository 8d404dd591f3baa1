"""Run lm-eval's tasks on a model. Nothing is scored here: prompts, metrics, standard errors and
group means are lm-eval's.

Tasks run one by one, so that each result can be kept as soon as it is there.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval.api.task
import lm_eval.tasks
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager

from ..errors import EvaluationError, near_match
from ..settings import EvaluationSettings
from . import fingerprint, task_data
from .lm_eval_calls import explained, hushed
from .store import digest
from .suites import SUITES, Benchmark

SEEDS = (0, 1234, 1234, 1234)
"""lm-eval's defaults: python, numpy, torch, few-shot samples."""


_ABOUT_DATA = {
    "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
    "test_split", "fewshot_split", "fewshot_config", "process_docs", "tag", "metadata",
}  # fmt: skip
"""Parts of a task's definition that act on the data alone, whose rows have their fingerprint."""


@dataclass
class WantedRow:
    """A row to measure: a benchmark of a suite, or a task that the user named."""

    name: str
    tasks: tuple[str, ...]
    metric: str | None = None
    """None: all that lm-eval reports."""
    num_fewshot: int | None = None

    @classmethod
    def of_suite(cls, benchmark: Benchmark) -> WantedRow:
        return cls(benchmark.name, benchmark.tasks, benchmark.metric, benchmark.num_fewshot)


@dataclass
class Loaded:
    """What a row takes: single tasks to run, and groups to aggregate them."""

    wanted: WantedRow
    parts: list[Any]
    """lm-eval's Task or Group objects; the row is the mean over them."""
    tasks: dict[str, Any]
    """All single tasks in them."""

    def values_of(self, metrics: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Per part its metrics, given those of the single tasks."""
        return [
            part.aggregate(metrics) if hasattr(part, "aggregate") else metrics[part.task_name]
            for part in self.parts
        ]


@contextmanager
def load_tasks(
    rows: Sequence[WantedRow], directories: Sequence[Path], settings: EvaluationSettings
) -> Iterator[list[Loaded]]:
    """Load the tasks of all rows, with their data, from the hub or from `directories`.

    Raises:
        EvaluationError: for an unknown task, or data that is missing or malformed.
    """
    manager = _manager(rows)
    with tempfile.TemporaryDirectory(prefix="adapt-pruner-") as place:
        if directories:
            write_local_tasks(rows, directories, Path(place), settings, manager)
            manager = _manager(rows, [Path(place)])
        yield [_load(manager, row, bool(directories), settings) for row in rows]


def _manager(rows: Sequence[WantedRow], more: Sequence[Path] = ()) -> TaskManager:
    """Know the rows' tasks. Reading all of lm-eval's 14,000 definitions takes ten seconds, so those
    of the suites are read first, and the others only if these do not suffice."""
    root = Path(lm_eval.tasks.__file__).parent
    folders = sorted({root / b.folder for suite in SUITES.values() for b in suite.benchmarks})
    names = [name for row in rows for name in row.tasks]
    with hushed():
        manager = TaskManager(include_path=[*folders, *more], include_defaults=False)
        if not manager.task_index.keys() >= set(names):
            manager = TaskManager(include_path=list(more))
    for name in names:
        if name not in manager.task_index:
            raise EvaluationError(
                f"lm-eval has no task '{name}'.{near_match(name, manager.all_tasks)} "
                "`lm-eval ls tasks` lists them."
            )
    return manager


def _leaves(manager: TaskManager, name: str) -> Iterator[str]:
    entry = manager.task_index[name]
    if entry.kind.name == "GROUP":
        members = [m if isinstance(m, str) else m["task"] for m in (entry.cfg or {})["task"]]
    elif entry.kind.name == "TAG":
        members = sorted(entry.tags)
    else:
        yield name
        return
    for member in members:
        yield from _leaves(manager, member)


def write_local_tasks(
    rows: Sequence[WantedRow],
    directories: Sequence[Path],
    output: Path,
    settings: EvaluationSettings,
    manager: TaskManager | None = None,
) -> None:
    """Write definitions of all tasks of `rows` on local data, for `--include_path` of lm-eval."""
    manager = manager or _manager(rows)
    configs: dict[str, tuple[Path, dict[str, Any]]] = {}
    shots: dict[str, int] = {}
    for row in rows:
        for name in (leaf for task in row.tasks for leaf in _leaves(manager, task)):
            entry = manager.task_index[name]
            if entry.kind.name != "TASK" or not entry.yaml_path or not entry.cfg:
                raise EvaluationError(
                    f"Task '{name}' is defined by code that finds its own data; leave out "
                    "--task-data."
                )
            configs[name] = (entry.yaml_path, entry.cfg)
            wanted = _shots(row, settings, entry.cfg.get("num_fewshot"))
            shots[name] = max(wanted, shots.get(name, 0))
    task_data.write_definitions(configs, shots, directories, output)


def _shots(row: WantedRow, settings: EvaluationSettings, own: int | None) -> int:
    """Shots of a task. As in lm-eval, a task that says 0 itself is not overruled by the user."""
    if row.num_fewshot is not None:
        return row.num_fewshot
    return own or 0 if settings.num_fewshot is None or own == 0 else settings.num_fewshot


def _load(
    manager: TaskManager, row: WantedRow, is_local: bool, settings: EvaluationSettings
) -> Loaded:
    with explained(row.name, "The data of", _hint(manager, row, is_local)), hushed():
        found: list[Any] = [manager.load([name]) for name in row.tasks]
    parts: list[Any] = []
    for name, entry in zip(row.tasks, found, strict=True):
        # A tag stands for its tasks, a group for itself.
        parts += [entry["groups"][name]] if name in entry["groups"] else entry["tasks"].values()
    tasks = {name: task for entry in found for name, task in entry["tasks"].items()}
    for task in tasks.values():
        shots = _shots(row, settings, task.get_config("num_fewshot"))
        task.set_config(key="num_fewshot", value=shots)
        seed = SEEDS[3] if settings.seed is None else settings.seed
        task.set_fewshot_seed(seed=seed)
        if is_local:
            task_data.check_columns(task)
    return Loaded(row, parts, tasks)


def _hint(manager: TaskManager, row: WantedRow, is_local: bool) -> str:
    if is_local:
        return ""
    name = next(_leaves(manager, row.tasks[0]))
    config = manager.task_index[name].cfg or {}
    split = config.get("test_split") or config.get("validation_split") or "test"
    return (
        f" Its data is '{config.get('dataset_path')}' on the hub; without the hub name a directory "
        f"with {task_data.DATA_NAMES.get(name, name)}.{split}.jsonl by --task-data."
    )


def describe_data(task: Any, settings: EvaluationSettings) -> dict[str, Any]:
    """Where a task's data comes from, and the fingerprint of all that it uses of it."""
    rows = list(islice(task.eval_docs, limit_of(task, settings)))
    if task.get_config("num_fewshot") and (samples := task.fewshot_docs()) is not None:
        rows += list(samples)
    arguments = task.get_config("dataset_kwargs") or {}
    files = arguments.get("data_files")
    info = next(iter(task.dataset.values())).info if hasattr(task.dataset, "values") else None
    # On the hub: "hf://datasets/allenai/ai2_arc@210d026.../ARC-Easy/test-00000-of-00001.parquet"
    sources = (info.download_checksums or {}) if info else {}
    revisions = set(re.findall(r"hf://[^@]+@([^/]+)", "\n".join(sources)))
    return {
        "source": sorted(Path(f).name for f in files.values()) if files else task.DATASET_PATH,
        "revision": revisions.pop() if len(revisions) == 1 else None,
        "fingerprint": fingerprint.of_rows(rows),
    }


def definition_of(task: Any) -> str:
    """Fingerprint of what turns a task's data into prompts, and answers into metrics."""
    config = task.dump_config()
    parts = {name: value for name, value in config.items() if name not in _ABOUT_DATA}
    return digest(json.loads(json.dumps(parts, default=str)))


def limit_of(task: Any, settings: EvaluationSettings) -> int | None:
    share, count = settings.limit, len(task.eval_docs)
    if share and share * count < 1:
        raise EvaluationError(
            f"limit: a share of {share:g} of the {count} items of '{task.config.task}' is less "
            "than one. Raise it, or give a number of items."
        )
    size: Any = get_sample_size(task, settings.limit)  # type: ignore[arg-type]
    return int(size) if size else None
