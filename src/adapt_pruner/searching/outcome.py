"""What a search found: the best model in its directory, and the account of all trials."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import save_result
from ..files import write_json
from ..methods.ada_pruner import AdaPrunerSettings
from ..result import PruningResult
from ..run import Request, make_result
from ..settings import PruneSettings
from .picture import draw_trials
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
    """Objective of the dense model on the validation text."""
    value: float
    """Objective of the best model, cut."""
    best: int
    """Number of its trial."""
    importances: dict[str, float]
    """Share that each parameter has in the spread of the objective, as Optuna tells it."""
    samples: list[dict[str, Any]]
    """Of the chosen ones: number, group, loss of the dense model, beginning of the text."""
    output: Path


def write_outcome(request: SearchRequest, bench: Bench, study: Any, place: Place) -> Outcome:
    """Make the best trial's model as `prune --recipe` would, measure it, and write it all."""
    best = study.best_trial
    values = {name: bench.space[name].value_of(stored) for name, stored in best.params.items()}
    settings = bench.settings_of(values)
    asked = Request(
        model=request.model,
        settings=settings,
        sparsity=request.sparsity,
        params=request.params,
        trust_remote_code=request.trust_remote_code,
    )
    result = make_result(asked)
    outcome = Outcome(
        result=result,
        settings=settings,
        trials=[_record(trial, bench) for trial in study.get_trials(deepcopy=False)],
        dense=bench.validation.measure(bench.model),
        value=bench.validation.measure(result.model),
        best=best.number,
        importances=_importances(study),
        samples=_samples(bench, settings),
        output=place.output,
    )
    place.write(_writer(outcome, request, asked.recipe()))
    return outcome


def _writer(
    outcome: Outcome, request: SearchRequest, recipe: dict[str, Any]
) -> Callable[[Path], None]:
    def fill(partial: Path) -> None:
        save_result(outcome.result, partial, recipe=recipe, name=outcome.output.name)
        write_json(partial / "study.json", _account(outcome, request))
        (partial / "study.csv").write_text(_csv(outcome.trials), encoding="utf-8", newline="")
        objective = request.search.objective
        draw_trials(partial / "pictures", outcome.trials, outcome.dense, objective)

    return fill


def _account(outcome: Outcome, request: SearchRequest) -> dict[str, Any]:
    return {
        "format": 1,
        "model": request.model,
        "validation": request.validation,
        "search": request.search.model_dump(mode="json"),
        "dense": outcome.dense,
        "value": outcome.value,
        "best_trial": outcome.best,
        "importances": outcome.importances,
        "samples": outcome.samples,
        "trials": outcome.trials,
    }


def _record(trial: Any, bench: Bench) -> dict[str, Any]:
    reported = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.value if trial.state.name == "COMPLETE" else None,
        "reported": reported,
        "values": {n: bench.space[n].value_of(v) for n, v in trial.params.items()},
        "samples": trial.user_attrs.get("samples", []),
        "seconds": trial.user_attrs.get("seconds"),
    }


def _csv(trials: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for trial in trials for name in trial["values"]))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["number", "state", "value", "seconds", *names, "samples"])
    for trial in trials:
        own = [trial["values"].get(name, "") for name in names]
        first = [trial["number"], trial["state"], trial["value"], trial["seconds"]]
        writer.writerow([*first, *own, " ".join(map(str, trial["samples"]))])
    return text.getvalue()


def _importances(study: Any) -> dict[str, float]:
    """Empty where there are too few trials to tell."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    try:
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except (RuntimeError, ValueError):
        return {}
    return {name: round(float(share), 4) for name, share in found.items() if share == share}


def _samples(bench: Bench, settings: PruneSettings) -> list[dict[str, Any]]:
    if not isinstance(settings, AdaPrunerSettings) or bench.pool is None:
        return []
    return [
        {
            "sample": number,
            "group": int(bench.group_P[number]) if "draw" in bench.space else None,
            "loss": round(float(bench.pool.loss_P[number]), 4),
            "text": bench.tokenizer.decode(bench.pool.windows_PT[number])[:120],
        }
        for number in settings.samples
    ]
