"""What a search found: the best model in its directory, and the account of all trials."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import save_result
from ..files import write_json
from ..methods.ada_pruner import AdaPrunerSettings
from ..report.account import write_page
from ..result import PruningResult
from ..run import Request, make_result
from ..settings import PruneSettings
from .front import chosen_from, front_of, rule
from .measuring import Validation
from .picture import draw_front, draw_trials
from .place import Place
from .request import SearchRequest
from .trials import Bench


@dataclass
class Outcome:
    """The best model and how it was found."""

    result: PruningResult
    settings: PruneSettings
    """That made the model; `recipe.yaml` has them, too."""
    trials: list[dict[str, Any]]
    """Of every trial: number, state, value, values of the space, samples, seconds."""
    dense: float
    """Quality of the dense model on the validation text."""
    value: float
    """Quality of the best model, cut."""
    objectives: dict[str, float]
    """All objectives of the best model; costs as in its trial."""
    front: list[dict[str, Any]]
    """Number and objectives of the trials that no other beats, the best in quality first."""
    heldout: dict[str, float]
    """On the text that no trial was measured on: dense and value; empty without such a text."""
    best: int
    """Number of its trial."""
    importances: dict[str, float]
    """Share that each parameter has in the spread of the objective, as Optuna tells it."""
    samples: list[dict[str, Any]]
    """Of the chosen ones: number, group, loss of the dense model, beginning of the text."""
    output: Path


def write_outcome(
    request: SearchRequest, bench: Bench, study: Any, place: Place, heldout: list[str]
) -> Outcome:
    """Make the best trial's model as `prune --recipe` would, measure it, and write it all."""
    front = front_of(study)
    best = chosen_from(front, request.search)
    values = _values(best, bench)
    settings = bench.settings_of(values)
    asked = Request(
        model=request.model,
        settings=settings,
        sparsity=values.get("sparsity", request.sparsity),
        params=request.params,
        trust_remote_code=request.trust_remote_code,
    )
    result = make_result(asked)
    value = bench.validation.measure(result.model)
    outcome = Outcome(
        result=result,
        settings=settings,
        trials=[_record(trial, bench) for trial in study.get_trials(deepcopy=False)],
        dense=bench.validation.measure(bench.model),
        value=value,
        objectives={**_objectives(best, bench), request.search.quality: value},
        front=[{"number": t.number, **_objectives(t, bench)} for t in front],
        heldout=_heldout(request, bench, heldout, result.model),
        best=best.number,
        importances=_importances(study),
        samples=_samples(bench, settings),
        output=place.output,
    )
    place.write(_writer(outcome, request, asked.recipe()))
    return outcome


def _values(trial: Any, bench: Bench) -> dict[str, Any]:
    return {name: bench.space[name].value_of(stored) for name, stored in trial.params.items()}


def _objectives(trial: Any, bench: Bench) -> dict[str, float]:
    return dict(zip(bench.search.objective, trial.values, strict=True))


def _heldout(
    request: SearchRequest, bench: Bench, texts: list[str], model: Any
) -> dict[str, float]:
    if not texts:
        return {}
    text = Validation(bench.model, bench.tokenizer, texts, request.search)
    return {"dense": text.measure(bench.model), "value": text.measure(model)}


def _writer(
    outcome: Outcome, request: SearchRequest, recipe: dict[str, Any]
) -> Callable[[Path], None]:
    def fill(partial: Path) -> None:
        save_result(outcome.result, partial, recipe=recipe, name=outcome.output.name)
        write_json(partial / "study.json", _account(outcome, request))
        (partial / "study.csv").write_text(_csv(outcome.trials), encoding="utf-8", newline="")
        draw_trials(partial / "pictures", outcome.trials, outcome.dense, request.search.quality)
        if request.search.costs:
            draw_front(partial / "pictures", outcome.trials, outcome.front, outcome.best)
        write_page(partial, outcome.output.name)

    return fill


def _account(outcome: Outcome, request: SearchRequest) -> dict[str, Any]:
    return {
        "format": 1,
        "model": request.model,
        "validation": request.validation,
        "heldout": {"text": request.heldout, **outcome.heldout} if outcome.heldout else None,
        "search": request.search.model_dump(mode="json"),
        "dense": outcome.dense,
        "value": outcome.value,
        "objectives": outcome.objectives,
        "best_trial": outcome.best,
        "rule": rule(request.search),
        "front": outcome.front,
        "importances": outcome.importances,
        "samples": outcome.samples,
        "trials": outcome.trials,
    }


def _record(trial: Any, bench: Bench) -> dict[str, Any]:
    reported = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    is_done = trial.state.name == "COMPLETE"
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.values[0] if is_done else None,
        "objectives": _objectives(trial, bench) if is_done else {},
        "reported": reported,
        "values": _values(trial, bench),
        "samples": trial.user_attrs.get("samples", []),
        "seconds": trial.user_attrs.get("seconds"),
    }


def _csv(trials: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for trial in trials for name in trial["values"]))
    objectives = list(dict.fromkeys(name for trial in trials for name in trial["objectives"]))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["number", "state", *objectives, "seconds", *names, "samples"])
    for trial in trials:
        own = [trial["values"].get(name, "") for name in names]
        reached = [trial["objectives"].get(name, "") for name in objectives]
        first = [trial["number"], trial["state"], *reached, trial["seconds"]]
        writer.writerow([*first, *own, " ".join(map(str, trial["samples"]))])
    return text.getvalue()


def _importances(study: Any) -> dict[str, float]:
    """For quality. Empty where there are too few trials to tell."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a target is taken to be minimised, as it is
            found = get_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(), target=lambda t: t.values[0]
            )
    except (RuntimeError, ValueError):
        return {}
    return {name: round(float(share), 4) for name, share in found.items() if share == share}


def _samples(bench: Bench, settings: PruneSettings) -> list[dict[str, Any]]:
    if not isinstance(settings, AdaPrunerSettings):
        return []
    pool, sources = bench.samples.pool(settings), bench.samples.sources(settings)
    group_P = bench.samples.group_P(settings) if "draw" in bench.space else None
    return [
        {
            "sample": number,
            "group": None if group_P is None else int(group_P[number]),
            "source": sources[number],
            "loss": round(float(pool.loss_P[number]), 4),
            "text": bench.tokenizer.decode(pool.windows_PT[number])[:120],
        }
        for number in settings.samples
    ]
