"""A search from the model to the directory of the best one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data.fingerprints import of_texts
from ..errors import (
    AdaptPrunerError,
    EvaluationError,
    Interrupted,
    InvalidSettings,
    MissingExtra,
)
from ..evaluation.speed import fitting_prompt
from ..goal import Goal
from ..methods import build_settings, make_settings
from ..model.anatomy import find_anatomy
from ..model.loading import empty_model, load_model, load_tokenizer, resolve_device
from ..plan import make_plan
from ..precision import written_dtype
from ..settings import build
from .measuring import Validation
from .outcome import Outcome, write_outcome
from .place import Place
from .request import ADA_PRUNER, SearchListener, SearchRequest, SearchSettings
from .samples import Samples
from .space import Space, greatest, lengths_of, make_space
from .texts import read_texts
from .trials import Bench

FAILURES = 5
"""Trials that fail, while none has succeeded, before the search gives up."""


def search(
    model: str,
    output: str | Path,
    *,
    sparsity: float | None = None,
    params: int | None = None,
    calibration: str,
    validation: str,
    heldout: str | None = None,
    space: dict[str, Any] | None = None,
    listener: SearchListener | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Outcome:
    """Search for the settings that leave the best model, and write that model to `output`.

    Args:
        model: a directory or a name on the hub.
        sparsity, params: the target, as in `prune`.
        calibration: text that samples are chosen from.
        validation: text that trials are measured on; it must not overlap with `calibration`.
        heldout: text that the model found is measured on, and no trial; it must not overlap with
            either.
        space: further settings with their ranges, such as `{"ridge": {"low": 1e-3, "high": 0.1}}`.
        settings: those of `SearchSettings`, and of the method (`method`, by default ada-pruner).

    Raises:
        AdaptPrunerError: one of its kinds; trials that have ended are kept.
    """
    of_search = {k: settings.pop(k) for k in SearchSettings.model_fields if k in settings}
    request = SearchRequest(
        model=model,
        settings=make_settings(
            settings.pop("preset", None),
            **{"method": ADA_PRUNER, "calibration": calibration, **settings},
        ),
        validation=validation,
        heldout=heldout,
        search=build(SearchSettings, of_search),
        sparsity=sparsity,
        params=params,
        space=space or {},
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    return run_search(request, Path(output), listener)


def run_search(
    request: SearchRequest, output: Path, listener: SearchListener | None = None
) -> Outcome:
    """Bring the study in `output` to the number of trials asked for, and write the best model.

    Any number of processes may do so at once on one study. Raises as `search`.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra(
            "A search needs optuna. Install it: pip install 'adapt-pruner[search]'."
        ) from error
    from .samplers import make_pruner, make_sampler

    listener = listener or SearchListener()
    empty = empty_model(request.model, request.trust_remote_code)
    layers = len(find_anatomy(empty).layers)
    space = make_space(request.settings, request.search, request.space, layers)
    resolve_device(request.settings.device)
    target = make_plan(empty, request.settings, _smallest(request, space)).target
    if "bytes" in request.search.costs and request.search.quantize:
        Goal(bytes=1, quantize=request.search.quantize).resource(object())  # is there such a type?
    if "latency" in request.search.costs:
        fitting_prompt([empty], request.search.prompt_tokens, request.search.new_tokens)
    texts = read_texts(request)
    place = Place(output, request.search.storage)
    place.check(
        (request.model, request.settings.calibration, request.validation, request.heldout),
        request.overwrite,
    )
    with _quiet(optuna):
        sampler = make_sampler(request.search, space, request.settings.seed)
        pruner = make_pruner(request.search)
        study = place.open_study(sampler, pruner, request.overwrite, len(request.search.objective))
        _claim(study, _identity(request, space, target, texts["validation"]), output)
        bench = _bench(request, space, texts["validation"], place, listener)
        bench.target, bench.written = target, written_dtype(request.settings, empty)
        _optimise(optuna, study, bench, request.search.trials, listener)
        return write_outcome(request, bench, study, place, texts["held-out"])


def _smallest(request: SearchRequest, space: Space) -> Goal:
    """The smallest size that is asked for."""
    if "sparsity" not in space:
        return Goal(sparsity=request.sparsity, params=request.params)
    if request.sparsity is not None or request.params is not None:
        raise InvalidSettings(
            "The space has sparsity, so that no other size can be asked for; got --sparsity or "
            "--params. Leave one of them out."
        )
    return Goal(sparsity=greatest(space["sparsity"]))


def _identity(request: SearchRequest, space, target: int, texts: list[str]) -> dict[str, Any]:
    """What all trials of a study have in common, apart from what proposes them."""
    settings = request.settings.model_dump(mode="json")
    for name in ("device", "device_map", "micro_batch_size", "gradient_checkpointing"):
        settings.pop(name)
    how: dict[str, Any] = request.search.model_dump(
        include={"validation_window", "validation_windows", "describe"}
    )
    how["objective"] = ",".join(request.search.objective)
    if "bytes" in request.search.costs:
        how["quantize"] = request.search.quantize
    if "latency" in request.search.costs:
        how |= request.search.model_dump(include={"prompt_tokens", "new_tokens"})
    return {
        "space": {name: of.record() for name, of in space.items()},
        "target": target,
        "model": request.model,
        "validation text": of_texts(texts)[:16],
        **{f"setting {name}": value for name, value in settings.items() if name not in space},
        **how,
    }


def _claim(study: Any, identity: dict[str, Any], output: Path) -> None:
    """Raise InvalidSettings if the study is one of another search."""
    identity = json.loads(json.dumps(identity))
    known = study.user_attrs.get("search")
    if known is None or not study.get_trials(deepcopy=False):
        study.set_user_attr("search", identity)
        return
    differ = [k for k in {**known, **identity} if known.get(k) != identity.get(k)]
    if differ:
        raise InvalidSettings(
            f"The study of '{output}' is one of another search: {', '.join(differ[:4])} differ. "
            "Name another directory (or database), or pass --overwrite to forget that study."
        )


def _bench(request: SearchRequest, space, texts, place: Place, listener: SearchListener) -> Bench:
    settings = request.settings
    tokenizer = load_tokenizer(request.model, request.trust_remote_code)
    model = load_model(
        request.model, settings.dtype, settings.device, settings.device_map,
        request.trust_remote_code,
    )  # fmt: skip
    anatomy = find_anatomy(model)
    samples = Samples(
        model, anatomy, tokenizer, settings, request.search, name=request.model, place=place,
        on_pool=listener.on_pool,
    )  # fmt: skip
    for length in lengths_of(settings, space):
        samples.calibration(build_settings(settings, window_length=length))
    return Bench(
        model=model,
        tokenizer=tokenizer,
        anatomy=anatomy,
        target=0,
        settings=settings,
        search=request.search,
        space=space,
        samples=samples,
        validation=Validation(model, tokenizer, texts, request.search),
    )


def _optimise(optuna: Any, study: Any, bench: Bench, trials: int, listener: SearchListener) -> None:
    state = optuna.trial.TrialState
    ended = (state.COMPLETE, state.PRUNED)
    done = len(study.get_trials(deepcopy=False, states=ended))
    listener.on_start(done, trials)
    reasons: list[str] = []

    def after(study: Any, trial: Any) -> None:
        is_done = trial.state == state.COMPLETE
        best = _best(study, state)
        listener.on_trial(trial.number, trial.values[0] if is_done else None, best)
        if trial.state == state.FAIL and best is None and len(reasons) >= FAILURES:
            study.stop()

    objective = _objective(optuna, bench, reasons)
    stop = optuna.study.MaxTrialsCallback(trials, states=ended)
    try:
        if done < trials and not _is_exhausted(study):
            study.optimize(objective, callbacks=[after, stop], catch=(AdaptPrunerError,))
    except KeyboardInterrupt:
        raise Interrupted(
            f"Interrupted; {len(study.get_trials(deepcopy=False, states=ended))} trials are kept. "
            "The same command goes on from there."
        ) from None
    if _best(study, state) is None:
        raise EvaluationError(
            f"Every trial failed, {len(reasons)} of them now; the last one because: "
            f"{reasons[-1] if reasons else 'it was interrupted.'}"
        )


def _is_exhausted(study: Any) -> bool:
    """Whether a grid has no point left that was not tried."""
    is_exhausted = getattr(study.sampler, "is_exhausted", None)
    return is_exhausted is not None and is_exhausted(study)


def _best(study: Any, state: Any) -> float | None:
    """In quality."""
    values = [t.values[0] for t in study.get_trials(deepcopy=False, states=(state.COMPLETE,))]
    return min(values, default=None)


def _objective(optuna: Any, bench: Bench, reasons: list[str]) -> Callable[[Any], Any]:
    def objective(trial: Any) -> float | tuple[float, ...]:
        began, value = time.perf_counter(), float("inf")
        values = {name: of.suggest(trial, name) for name, of in bench.space.items()}
        try:
            settings = bench.settings_of(values)
            if samples := getattr(settings, "samples", ()):
                trial.set_user_attr("samples", list(samples))
            target = bench.target_of(values)
            if bench.search.costs:  # Optuna stops none of several objectives early
                return tuple(bench.objectives_of(settings, target).values())
            for step, value in enumerate(bench.values_of(settings, target)):
                trial.report(value, step)
                if step < 3 and trial.should_prune():
                    raise optuna.TrialPruned
        except AdaptPrunerError as error:
            reasons.append(str(error))
            raise
        finally:
            trial.set_user_attr("seconds", round(time.perf_counter() - began, 3))
        return value

    return objective


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Failed trials are told by this package."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
