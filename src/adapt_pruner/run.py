"""A whole run as the command line makes it: load, measure, prune, measure, write."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .api import Listener, calibration_for, prune_to_sizes
from .checkpoint import check_place, save_result
from .claims import claimed
from .data.calibration import EMBEDDED
from .evaluation import evaluation_texts, perplexity
from .goal import Goal
from .methods import Work, method_named
from .model.loading import EMBEDDED_MODEL, empty_model, load_model, load_tokenizer, resolve_device
from .plan import Plan, make_plan
from .precision import stored_dtype, written_dtype
from .result import PruningResult
from .settings import PruneSettings

if TYPE_CHECKING:
    from .export import Export
    from .latency import LatencyTable

EVALUATION_WINDOW, EVALUATION_WINDOWS = 256, 400
"""Tokens of a window, and windows at most."""


@dataclass(frozen=True)
class Request(Goal):
    """What the user asks for besides the settings."""

    model: str
    settings: PruneSettings
    evaluate: str | None = None
    """Text to measure perplexity on before and after, as `settings.calibration`; or None."""
    portable: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False

    def recipe(self, all_sizes: Sequence[Request] = ()) -> dict[str, Any]:
        """All of it, so that the run can be repeated; `all_sizes` are those of a run to several."""
        targets = self.said()
        if len(all_sizes) > 1:
            targets = {kind: [one.said()[kind] for one in all_sizes] for kind in targets}
        return {
            "model": self.model,
            **targets,
            **({"quantize": self.quantize} if self.quantize else {}),
            **self.circumstances,
            **({"evaluate": self.evaluate} if self.evaluate else {}),
            **({"portable": True} if self.portable else {}),
            **self.settings.model_dump(mode="json"),
        }


def default_calibration(model: str) -> dict[str, str]:
    """The embedded model is calibrated on the text it was trained on."""
    return {"calibration": EMBEDDED} if model == EMBEDDED_MODEL else {}


def plan_run(request: Request) -> Plan:
    """Plan a run without loading weights."""
    model = empty_model(request.model, request.trust_remote_code)
    device = resolve_device(request.settings.device)
    dtype = _dtype(request, model)
    return make_plan(model, request.settings, request, dtype, device, _tokenizer_to_plan(request))


def times_of(
    request: Request,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    with_odd: bool = False,
) -> LatencyTable:
    """The table of times that a target in time, or `--multiple auto`, is meant by; measured now if
    it has not been. See `latency.table_for` for what it raises."""
    model = empty_model(request.model, request.trust_remote_code)
    tokenizer = _tokenizer_to_plan(request)
    return request.times(model, request.settings, tokenizer, on_progress, with_odd)


def _tokenizer_to_plan(request: Request) -> Any:
    """The tokenizer, if a plan needs it: a GGUF file holds it."""
    if not request.is_of_file:
        return None
    return load_tokenizer(request.model, request.trust_remote_code)


def run_pruning(request: Request, output: Path, listener: Listener | None = None) -> PruningResult:
    """Prune `request.model` and write the result to `output`. See `prune` for what it raises."""
    ((_, result),) = run_pruning_to_sizes([request], [output], listener)
    return result


def run_pruning_to_sizes(
    requests: Sequence[Request], outputs: Sequence[Path], listener: Listener | None = None
) -> Iterator[tuple[Path, PruningResult]]:
    """Prune one model to several sizes in one run, and write each to its directory.

    Methods that can stop on their way go from one size to the next; the others begin anew with the
    dense model for each. Yields each result when it is written, with its directory: use it before
    the next.

    Args:
        requests: that differ in nothing but the size.
        outputs: a directory for each.
    """
    first = requests[0]
    sources = (first.model, first.settings.calibration, first.evaluate)
    with ExitStack() as stack:
        for output in outputs:
            check_place(output, first.overwrite, sources=sources)
        checks = []
        for output in outputs:
            stack.enter_context(claimed(output))
            checks.append(functools.partial(check_place, output, first.overwrite))
        for i, result in _prune(requests, checks, listener):
            save_result(result, outputs[i], first.portable, first.overwrite, first.recipe(requests))
            yield outputs[i], result


def run_pruning_to_gguf(
    request: Request, output: Path, listener: Listener | None = None
) -> tuple[PruningResult, Export]:
    """The same, and write a GGUF file instead. See also `export_gguf`."""
    from .export import export_gguf
    from .export.gguf_file import check_gguf_output, check_is_not_source
    from .export.quantise import file_type

    quantize = request.quantize or "F16"
    file_type(quantize)  # raises now if there is no such type
    check_is_not_source(output, request.model)

    def check(needed_bytes: int = 0) -> None:
        check_gguf_output(output, request.overwrite)  # its size is known when it is pruned

    ((_, result),) = _prune([request], [check], listener)
    return result, export_gguf(result, output, quantize, overwrite=request.overwrite)


def make_result(request: Request, listener: Listener | None = None) -> PruningResult:
    """The same without writing anything."""
    ((_, result),) = _prune([request], [lambda *needed: None], listener)
    return result


def _prune(
    requests: Sequence[Request], checks: Sequence[Callable[..., None]], listener: Listener | None
) -> Iterator[tuple[int, PruningResult]]:
    """Load, measure, prune and measure; `checks` say early whether a result can be written. Yields
    which of the requests is met, and how, the largest first."""
    request, settings = requests[0], requests[0].settings
    for check in checks:
        check()  # again: a run that was killed may have left its result
    resolve_device(settings.device)
    empty = empty_model(request.model, request.trust_remote_code)
    tokenizer = _tokenizer_to_plan(request)
    plans = [make_plan(empty, settings, one, tokenizer=tokenizer) for one in requests]
    targets = [plan.target for plan in plans]
    stored, written = stored_dtype(empty), written_dtype(settings, empty)
    for check, plan in zip(checks, plans, strict=True):
        check(plan.most_parameters * written.itemsize)
    texts = None
    if request.evaluate:
        texts = evaluation_texts(request.evaluate, settings.text_column, settings.max_documents)
    tokenizer = tokenizer or load_tokenizer(request.model, request.trust_remote_code)
    calibration = calibration_for(empty, tokenizer, settings)
    before: dict[str, float] | None = None
    largest_first = sorted(range(len(targets)), key=lambda i: -targets[i])
    at_once = method_named(settings.method).meets_several_targets
    for order in [largest_first] if at_once else [[i] for i in largest_first]:
        model = load_model(
            request.model,
            settings.dtype,
            settings.device,
            settings.device_map,
            request.trust_remote_code,
        )
        before = measure(model, tokenizer, texts) if before is None else before
        aims = [targets[i] for i in order]
        work = Work(model, calibration, aims, settings, resource=plans[0].resource)
        results = prune_to_sizes(work, tokenizer, listener)
        for i, result in zip(order, results, strict=False):
            if settings.dtype == "auto" and stored is not None:
                if i != order[-1] and result.model.dtype != stored:
                    result.model = copy.deepcopy(model)  # the run goes on in full precision
                store_as(result.model, stored)  # loaded in float32 only to compute on the CPU
            after = measure(result.model, tokenizer, texts)
            result.measurements = {
                name: {"before": before[name], "after": after[name]} for name in before
            }
            if request.evaluate:
                result.protocol = protocol(request.evaluate)
            request.time_result(empty, result, tokenizer)
            yield i, result


def measure(model: Any, tokenizer: Any, texts: list[str] | None) -> dict[str, float]:
    """Perplexity on the texts, if there are any."""
    if texts is None:
        return {}
    measured = perplexity(
        model, tokenizer, texts, EVALUATION_WINDOW, max_windows=EVALUATION_WINDOWS
    )
    return {"perplexity": measured.perplexity, "bits per byte": measured.bits_per_byte}


def protocol(text: str) -> dict[str, Any]:
    """How `measure` measures on a text, for the account of a run."""
    return {
        "text": text,
        "window": EVALUATION_WINDOW,
        "stride": EVALUATION_WINDOW,
        "max_windows": EVALUATION_WINDOWS,
    }


def store_as(model: Any, dtype: torch.dtype) -> None:
    """Convert the parameters alone: rotary frequencies stay float32, as in a model just loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _dtype(request: Request, model) -> torch.dtype:
    if request.settings.dtype != "auto":
        return getattr(torch, request.settings.dtype)
    on_cpu = (
        resolve_device(request.settings.device) == "cpu" and request.settings.device_map is None
    )
    return torch.float32 if on_cpu else stored_dtype(model) or torch.float32
