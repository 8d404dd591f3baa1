"""Run a comparison: every method at every sparsity with every seed, measured alike."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..api import check_window_length, prune
from ..checkpoint import check_place, save_result
from ..claims import claimed
from ..data import CalibrationData
from ..data.calibration import load_documents
from ..errors import InvalidSettings, LoadingError, NonFiniteError, NotConverged, shown
from ..evaluation import Evaluation, ResultStore, Score, code, evaluate, fingerprint
from ..evaluation.store import Record
from ..evaluation.subject import Subject
from ..goal import Goal
from ..model.loading import empty_model, load_model, load_tokenizer, resolve_device
from ..plan import make_plan
from ..precision import stored_dtype
from ..result import PruningResult
from ..run import store_as
from ..settings import PruneSettings
from .cells import Cell, CellResult, Comparison, ComparisonListener, ComparisonRequest
from .variants import Variant

MEAN_OVER_TEXTS = "geometric mean"


def compare(
    request: ComparisonRequest,
    store: ResultStore | None = None,
    listener: ComparisonListener | None = None,
) -> Comparison:
    """Prune and measure what the store does not hold yet, and return all of it.

    The seeds run one after the other, so that the whole table is there early. A method that fails
    with NaN, or whose training does not converge, leaves its cell empty, and the others go on.

    Raises:
        AdaptPrunerError: before anything is pruned, if a target cannot be reached, a setting does
            not fit the model, or something cannot be read.
    """
    _check(request)
    listener = listener or ComparisonListener()
    runner = _Runner(request, store or ResultStore())
    cells = [
        Cell(variant, sparsity, seed)
        for seed in request.seeds
        for sparsity in request.sparsities
        for variant in request.variants
    ]
    comparison = Comparison(request, runner.measure(request.model))
    listener.on_dense(comparison)
    for number, cell in enumerate(cells, 1):
        listener.on_cell(cell, number, len(cells))
        result = runner.run(cell)
        comparison.results.append(result)
        listener.on_result(comparison, result)
    return comparison


def _check(request: ComparisonRequest) -> None:
    """Raise InvalidSettings for what makes no comparison."""
    if not (request.text or request.suite or request.tasks):
        raise InvalidSettings(
            "There is nothing to measure by; name a text with --evaluate, a --suite or --tasks."
        )
    for what, names in (
        ("methods", [variant.name for variant in request.variants]),
        ("saved methods", [directory_name(v.name) for v in request.variants if request.save_to]),
        ("texts", [Path(text).name for text in request.text]),
    ):
        for name in names:
            if names.count(name) > 1:
                raise InvalidSettings(
                    f"Two {what} are called {shown(name)} and could not be told apart."
                )


class _Runner:
    """Makes and measures single cells."""

    def __init__(self, request: ComparisonRequest, store: ResultStore):
        self.request, self.store = request, store
        empty = empty_model(request.model, request.trust_remote_code)
        self.targets: dict[tuple[Variant, float], int] = {}
        for variant in request.variants:
            check_window_length(empty.config, variant.settings)
            resolve_device(variant.settings.device)
            for sparsity in request.sparsities:
                plan = make_plan(empty, variant.settings, Goal(sparsity=sparsity))
                self.targets[variant, sparsity] = plan.target
        self.vocab_size = empty.get_input_embeddings().weight.shape[0]
        self.stored_dtype = stored_dtype(empty)
        self.tokenizer = load_tokenizer(request.model, request.trust_remote_code)
        self.dense = Subject(
            request.model, self.tokenizer, request.evaluation, request.trust_remote_code
        ).key["model"]
        self._documents: tuple[Any, list[Tensor], str] | None = None

    def measure(self, model: Any) -> Evaluation:
        """Measure a name, a model in memory, or a subject."""
        request = self.request
        found = evaluate(
            model,
            None if isinstance(model, (str, Subject)) else self.tokenizer,
            suite=request.suite,
            tasks=request.tasks,
            task_data=request.task_data,
            text=request.text,
            settings=request.evaluation,
            store=self.store,
            trust_remote_code=request.trust_remote_code,
        )
        return replace(found, scores=[*found.scores, *_mean_over_texts(found.scores)])

    def run(self, cell: Cell) -> CellResult:
        settings = cell.variant.settings.model_copy(update={"seed": cell.seed})
        key = self._key(cell, settings)
        place = self._place(cell)
        known = self.store.get(key)
        model = None
        try:
            if known is None or (place and not self._is_saved(place, known)):
                model, known = self._make(cell, settings, key, place)
            try:
                found = self.measure(model or _Remade(self, cell, settings, key, known))
            except _OtherWeights as other:
                known, model = other.record, other.model
                found = self.measure(model)
        except (NonFiniteError, NotConverged) as error:
            target = self.targets[cell.variant, cell.sparsity]
            return CellResult(cell, target, 0.0, [], error=str(error))
        cached = model is None and found.num_cached == len(found.records)
        return CellResult(
            cell, known["parameters"], known["seconds"], found.scores, cached,
            commits=commits_of(found.records, self.store.read(key)),
        )  # fmt: skip

    def _key(self, cell: Cell, settings: PruneSettings) -> dict[str, Any]:
        """Everything that the pruned weights depend on."""
        where = {"calibration", "text_column", "max_documents"}
        return {
            "kind": "pruned",
            "model": self.dense,
            "target_parameters": self.targets[cell.variant, cell.sparsity],
            "settings": settings.model_dump(mode="json", exclude=where),
            "calibration": self._read(settings)[1],
            "device": resolve_device(settings.device).split(":")[0],
            "versions": fingerprint.versions(),
            "code": code.of_modules(code.PRUNING),
        }

    def _read(self, settings: PruneSettings) -> tuple[list[Tensor], str]:
        """The calibration documents, tokenised, and their fingerprint; read once for all cells that
        have them in common."""
        source = settings.calibration, settings.text_column, settings.max_documents, settings.seed
        if self._documents is None or self._documents[0] != source:
            documents = load_documents(
                settings.calibration, self.tokenizer, settings.text_column,
                settings.max_documents, settings.seed, self.vocab_size,
            )  # fmt: skip
            print_ = fingerprint.of_rows(tokens.tolist() for tokens in documents)
            self._documents = source, documents, print_
        return self._documents[1:]

    def _make(
        self, cell: Cell, settings: PruneSettings, key: dict[str, Any], place: Path | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Prune, and keep what the weights are known by. Returns the model and that record."""
        began = time.perf_counter()
        if place:
            check_place(place, overwrite=True)  # before the work, not after it
        result = self._prune(settings, self.targets[cell.variant, cell.sparsity])
        record = {
            "fingerprint": fingerprint.of_model(result.model, self.tokenizer),
            "dtype": str(result.model.dtype).removeprefix("torch."),
            "parameters": result.after.total,
            "sparsity": result.sparsity,
            "seconds": time.perf_counter() - began,
        }
        if place:
            with claimed(place):
                save_result(result, place, overwrite=True, recipe=self._recipe(cell, settings))
        self.store.put(key, record)
        return result.model, record

    def _prune(self, settings: PruneSettings, target: int) -> PruningResult:
        documents, _ = self._read(settings)
        data = CalibrationData(
            documents, settings.window_length, settings.windows, settings.seed, settings.redraw,
            f"Calibration text '{settings.calibration}'",
        )  # fmt: skip
        model = load_model(
            self.request.model, settings.dtype, settings.device, settings.device_map,
            self.request.trust_remote_code,
        )  # fmt: skip
        result = prune(model, self.tokenizer, params=target, calibration=data, settings=settings)
        if settings.dtype == "auto" and self.stored_dtype is not None:
            store_as(model, self.stored_dtype)  # as `adapt-pruner prune` writes it
        return result

    def _recipe(self, cell: Cell, settings: PruneSettings) -> dict[str, Any]:
        return {
            "model": self.request.model,
            "sparsity": cell.sparsity,
            **settings.model_dump(mode="json"),
        }

    def _is_saved(self, place: Path, known: dict[str, Any]) -> bool:
        """Whether that very model is there, whole: not one of another run, nor a damaged one."""
        if not (place / "run.json").is_file():
            return False
        try:
            return fingerprint.of_name(str(place), self.tokenizer) == known["fingerprint"]
        except LoadingError:
            return False

    def _place(self, cell: Cell) -> Path | None:
        if self.request.save_to is None:
            return None
        name = directory_name(cell.variant.name)
        return self.request.save_to / f"{name}-{cell.sparsity:g}-seed{cell.seed}"


def directory_name(variant: str) -> str:
    """The name of a variant as part of that of a directory."""
    return re.sub(r"[^\w.]+", "-", variant)[:40]


def _mean_over_texts(scores: Sequence[Score]) -> list[Score]:
    """The geometric mean of the perplexities, where there are several texts."""
    found = [score for score in scores if score.metric == "token_perplexity"]
    if len(found) < 2:
        return []
    mean = statistics.geometric_mean(score.value for score in found)
    tokens = sum(score.num_samples for score in found)
    return [Score.of_text(MEAN_OVER_TEXTS, "token_perplexity", mean, None, tokens)]


def commits_of(records: Sequence[Record], *more: Record | None) -> frozenset[str]:
    """The commits at which results were computed, where git tells them."""
    found = (record.git_hash for record in (*records, *more) if record is not None)
    return frozenset(commit for commit in found if commit)


class _OtherWeights(Exception):
    """A model made again has other weights than the first time (another machine, threads)."""

    def __init__(self, model: Any, record: dict[str, Any]):
        super().__init__()
        self.model, self.record = model, record


class _Remade(Subject):
    """A pruned model that was made before: made again only if a result of it is missing."""

    def __init__(
        self,
        runner: _Runner,
        cell: Cell,
        settings: PruneSettings,
        key: dict[str, Any],
        known: dict[str, Any],
    ):
        request = runner.request
        super().__init__(
            request.model, runner.tokenizer, request.evaluation, request.trust_remote_code
        )
        self._known = known
        self._make = lambda: runner._make(cell, settings, key)

    @property
    def model(self) -> Any:
        if self._model is None:
            model, record = self._make()
            if record["fingerprint"] != self._known["fingerprint"]:
                raise _OtherWeights(model, record)
            self._model = model
        return self._model

    @property
    def key(self) -> dict[str, Any]:
        device = self.device.split(":")[0]
        return {
            "model": self._known["fingerprint"],
            "dtype": self._known["dtype"],
            "device": device,
        }
