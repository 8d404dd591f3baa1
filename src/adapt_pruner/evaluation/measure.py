"""Measure a model: `evaluate("demo", suite="commonsense")`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.calibration import EMBEDDED
from ..errors import EvaluationError, InvalidSettings, MissingExtra, WritingError
from ..model.loading import describe_device
from ..settings import EvaluationSettings, make_evaluation_settings
from . import code, fingerprint
from .perplexity import evaluation_texts, perplexity
from .scores import Evaluation, Score, average, scores_of
from .store import Record, ResultStore
from .subject import Subject
from .suites import Suite, find_suites

if TYPE_CHECKING:
    from .harness import Loaded

HUB_DOCUMENTS = 10_000
"""Documents of a data set on the hub that are measured unless a limit says otherwise."""

Paths = str | Path | Sequence[str | Path]


class EvaluationListener:
    """What happens during an evaluation, for progress displays. Does nothing by default."""

    def on_task(self, name: str, number: int, count: int) -> None: ...
    def on_progress(self, done: int, total: int | None) -> None: ...
    def on_notice(self, message: str) -> None: ...


def evaluate(
    model: Any,
    tokenizer: Any = None,
    *,
    suite: str | Sequence[str] = (),
    tasks: str | Sequence[str] = (),
    task_data: Paths = (),
    text: Paths = (),
    settings: EvaluationSettings | None = None,
    store: ResultStore | None = None,
    listener: EvaluationListener | None = None,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> Evaluation:
    """Measure a model by lm-eval's tasks and by perplexity on texts, without changing it, such as
    `evaluate("my-model", suite="commonsense").score("PIQA").value`. Every result is stored, and
    measured again only when something that determines it has changed.

    Args:
        model: a causal language model with its `tokenizer`, measured as it is; or a name on the
            hub, a directory, or "demo", loaded as `settings` say.
        suite: one or more of `suites.SUITES`.
        tasks: names of lm-eval's tasks, groups or tags; a string may hold several, with commas.
        task_data: directories with the tasks' data, see `task_data`; default: from the hub.
        text: files, directories, data sets on the hub, or "pydocs", for perplexity on texts.
        settings: all settings at once, or single ones as keywords.
        store: where results are kept; default: `ResultStore()`.

    Raises:
        EvaluationError: for an unknown suite or task, or data that is missing or does not fit.
        MissingExtra: if lm-eval is needed and not installed.
        AdaptPrunerError: one of its other kinds, if the model cannot be read or puts out NaN.
    """
    if settings is not None and overrides:
        raise InvalidSettings(f"Give `settings` or single ones, not both; got {sorted(overrides)}.")
    settings = settings or make_evaluation_settings(**overrides)
    suites = find_suites(_listed(suite))
    names = [part for name in _listed(tasks) for part in name.split(",") if part]
    texts = [str(source) for source in _listed(text)]
    _check(suites, names, texts, settings)
    subject = Subject.of(model, tokenizer, settings, trust_remote_code)
    run = _Run(subject, settings, store or ResultStore(), listener or EvaluationListener())
    training = getattr(model, "training", False)
    try:
        scores = run.tasks(suites, names, _listed(task_data))
        scores += [score for source in texts for score in run.text(source)]
    finally:
        if training:  # lm-eval leaves it in evaluation mode
            model.train()
    return run.evaluation(scores)


def _check(suites: Any, names: list[str], texts: list[str], settings: EvaluationSettings) -> None:
    if not (suites or names or texts):
        raise EvaluationError("Nothing to measure: name a suite, tasks or a text.")
    if settings.num_fewshot is not None and not names:
        raise InvalidSettings(
            f"num_fewshot applies to tasks, and suites have their own; got {settings.num_fewshot}."
        )


class _Run:
    """One evaluation: looks results up, measures what is missing, keeps it."""

    def __init__(
        self,
        subject: Subject,
        settings: EvaluationSettings,
        store: ResultStore,
        listener: EvaluationListener,
    ):
        self.subject, self.settings = subject, settings
        self.store, self.listener = store, listener
        self.records: list[Record] = []
        self.num_cached = 0
        self._lm: Any = None

    def evaluation(self, scores: list[Score]) -> Evaluation:
        size = self.records[0].result["parameters"]
        return Evaluation(
            self.subject.name, size, scores, self.settings, self.records, self.num_cached
        )

    def tasks(
        self, suites: Sequence[Suite], names: Sequence[str], directories: Sequence[str | Path]
    ) -> list[Score]:
        """Scores of all rows, each suite followed by its averages."""
        if not suites and not names:
            return []
        harness = _import_harness()
        of_suites = [[harness.WantedRow.of_suite(b) for b in suite.benchmarks] for suite in suites]
        wanted = [row for rows in of_suites for row in rows]
        wanted += [harness.WantedRow(name, (name,)) for name in names]
        places = [Path(place).expanduser() for place in directories]
        scores: list[Score] = []
        with harness.load_tasks(wanted, places, self.settings) as rows:
            count = sum(len(row.tasks) for row in rows)
            left = iter(rows)
            for suite in suites:
                measured = [
                    s for _ in suite.benchmarks for s in self._row(harness, next(left), count)
                ]
                scores += measured
                scores += (
                    average(label, [s for s in measured if s.name in members])
                    for label, members in suite.averages.items()
                )
            scores += (score for row in left for score in self._row(harness, row, count))
        return scores

    def _row(self, harness: Any, row: Loaded, count: int) -> Iterator[Score]:
        metrics = {}
        for name, task in row.tasks.items():
            self.listener.on_task(name, len(self.records), count)
            metrics[name] = self._task(harness, name, task).result["metrics"]
        yield from scores_of(row, metrics, self.records[-len(row.tasks) :])

    def _task(self, harness: Any, name: str, task: Any) -> Record:
        data = harness.describe_data(task, self.settings)
        key = {
            "kind": "lm-eval",
            **self.subject.key,
            "task": name,
            "task_version": task.VERSION,
            "definition": harness.definition_of(task),
            "num_fewshot": task.get_config("num_fewshot"),
            "data": data["fingerprint"],
            "limit": self.settings.limit,
            "max_length": self.settings.max_length,
            "batch_size": self.settings.batch_size,
            "seed": self.settings.seed,
            "versions": fingerprint.versions("datasets", "lm-eval"),
            "code": code.of_modules(code.TASKS),
        }

        def measure() -> dict[str, Any]:
            from . import lm_eval_model

            if self._lm is None:
                self._lm = lm_eval_model.Harnessed(
                    self.subject.model, self.subject.tokenizer, self.settings
                )
                self._lm.on_progress = self.listener.on_progress
            return {**lm_eval_model.run_task(self._lm, task, self.settings), "data": data}

        return self._keep(key, measure)

    def text(self, source: str) -> list[Score]:
        """Token perplexity and bits per byte of one text."""
        longest = getattr(self.subject.config, "max_position_embeddings", None)
        window = self.settings.window or min(longest or 2048, 2048)
        stride = self.settings.stride or window
        if longest and window > longest:
            raise InvalidSettings(
                f"window: the model reads at most {longest} tokens; got {window}."
            )
        if stride > window:
            raise InvalidSettings(f"stride: the window has {window} tokens; got {stride}.")
        documents = self._documents(source)
        name = source if source == EMBEDDED else Path(source).name
        self.listener.on_task(name, 0, 1)
        key = {
            "kind": "text",
            **self.subject.key,
            "data": fingerprint.of_rows(documents),
            "window": window,
            "stride": stride,
            "batch_size": self.settings.batch_size,
            "versions": fingerprint.versions(),
            "code": code.of_modules(code.TEXT),
        }

        def measure() -> dict[str, Any]:
            automatic = self.settings.batch_size == "auto"
            measured = perplexity(
                self.subject.model,
                self.subject.tokenizer,
                documents,
                window,
                batch_size=max(1, 2048 // window) if automatic else int(self.settings.batch_size),
                stride=stride,
                on_progress=self.listener.on_progress,
            )
            return {**measured.as_dict(), "num_documents": len(documents), "source": name}

        result = self._keep(key, measure).result
        value, bits = result["perplexity"], result["bits_per_byte"]
        nats = math.log(value)
        error, tokens = result["standard_error"], result["num_tokens"]
        return [
            Score.of_text(name, "token_perplexity", value, value * error, tokens),
            Score.of_text(
                name, "bits_per_byte", bits, bits * error / nats if nats else None, tokens
            ),
        ]

    def _documents(self, source: str) -> list[str]:
        limit = self.settings.limit
        whole = source == EMBEDDED or Path(source).expanduser().exists()
        most = None if whole else HUB_DOCUMENTS
        if limit and limit >= 1:
            most = int(limit)
        documents = evaluation_texts(source, self.settings.text_column, most)
        if not limit or limit >= 1:
            return documents
        if documents and limit * len(documents) < 1:
            raise InvalidSettings(
                f"limit: a share of {limit:g} of {len(documents)} documents is less than one. "
                "Raise it, or give a number of documents."
            )
        return documents[: math.ceil(limit * len(documents))]

    def _keep(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> Record:
        record = self.store.read(key)
        self.num_cached += record is not None
        if record is None:
            began = time.perf_counter()
            result = measure()
            model = self.subject.model
            result |= {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "device": describe_device(model.device),
                "seconds": time.perf_counter() - began,
            }
            try:
                record = self.store.put(key, result)
            except WritingError as error:  # the figure is there: it is shown all the same
                self.listener.on_notice(str(error))
                record = Record.now(key, result)
        self.records.append(record)
        return record


def _import_harness() -> Any:
    try:
        from . import harness
    except ImportError as error:
        if error.name and error.name.split(".")[0] not in ("lm_eval",):
            raise
        raise MissingExtra(
            "Suites and tasks need lm-eval, which is not installed: "
            "pip install 'adapt-pruner[eval]'. Texts can be measured without it."
        ) from error
    return harness


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, Path)) else list(value)
