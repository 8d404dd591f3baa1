"""`adapt-pruner search`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidSettings
from ..searching.request import ADA_PRUNER, SearchListener, SearchRequest, SearchSettings
from ..settings import build
from .options import (
    MethodCommand,
    named_model,
    options_of,
    own_values,
    read_recipe,
    resolve_settings,
)
from .parameters import Count

if TYPE_CHECKING:
    from ..searching.outcome import Outcome

RECIPE_KEYS = {
    "model": (str,),
    "sparsity": (float, int),
    "params": (int, str),
    "preset": (str,),
    "validation": (str,),
    "heldout": (str,),
    "space": (dict,),
}


class SearchCommand(MethodCommand):
    """Takes the settings of ada-pruner unless another method is named."""

    default_method = ADA_PRUNER


@click.command("search", cls=SearchCommand)
@click.argument("model", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--sparsity", type=float, help="Share of the decoder layers' parameters to cut.")
@click.option("--params", type=Count(), help="Parameters of the whole model, such as 350M.")
@click.option("--validation", metavar="TEXT", help="Text to measure trials on.")
@click.option("--heldout", metavar="TEXT", help="Text to measure the model found on, and no trial.")
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML file; flags override it.")
@click.option("--overwrite", is_flag=True, help="Forget the study that is there.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with MODEL.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@options_of(SearchSettings)
def command(
    model: str | None,
    output: Path | None,
    recipe: Path | None,
    overwrite: bool,
    trust_remote_code: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Search for the settings that leave the best MODEL of a size, and write that model.

    \b
    adapt-pruner search MODEL -o DIR --sparsity 0.2 --calibration POOL --validation TEXT
    adapt-pruner search MODEL -o DIR --recipe recipes/ada-pruner.yaml --trials 100

    The same command goes on where it stopped; several at once work on one study.
    """
    from ..searching import run_search
    from . import console

    said = read_recipe(recipe, RECIPE_KEYS, SearchSettings) if recipe else {}
    named = named_model(model or said.get("model"), output, dry_run=False)
    request = _request(named, said, options, overwrite, trust_remote_code)
    console.hush_libraries()
    assert output is not None
    outcome = run_search(request, output, SearchListener() if quiet else Lines())
    if not quiet:
        show(outcome, request)


def _request(
    model: str, said: dict[str, Any], options: dict[str, Any], overwrite: bool, trusted: bool
) -> SearchRequest:
    """From the recipe and the flags."""
    from ..run import default_calibration

    names = ("sparsity", "params", "validation", "heldout")
    own = own_values({name: options.pop(name) for name in names}, said)
    how = {name: options.pop(name) for name in SearchSettings.model_fields}
    how = {k: said.get(k) if v is None else v for k, v in how.items()}
    if not own["validation"]:
        raise InvalidSettings(
            "Name the text that trials are measured on, with --validation TEXT; it must not "
            "overlap with --calibration."
        )
    options["method"] = options.get("method") or said.get("method") or ADA_PRUNER
    preset = options.pop("preset", None)
    return SearchRequest(
        model=model,
        settings=resolve_settings(preset, default_calibration(model), said, options),
        search=build(SearchSettings, {k: v for k, v in how.items() if v is not None}),
        space=said.get("space") or {},
        overwrite=overwrite,
        trust_remote_code=trusted,
        **own,
    )


class Lines(SearchListener):
    """A line for the start, and one for each trial that is the best so far."""

    def __init__(self):
        self.best: float | None = None

    def on_start(self, done: int, trials: int) -> None:
        click.echo(f"{done} of {trials} trials are done", err=True)

    def on_trial(self, number: int, value: float | None, best: float | None) -> None:
        if best is not None and (self.best is None or best < self.best):
            self.best = best
            click.echo(f"trial {number}: best so far {best:.4f}", err=True)


def show(outcome: Outcome, request: SearchRequest) -> None:
    """What was found, in a few lines."""
    from ..searching.front import rule
    from . import console

    console.show_result(outcome.result)
    name = request.search.quality
    states = [trial["state"] for trial in outcome.trials]
    click.echo(
        f"{len(states)} trials ({states.count('pruned')} stopped early, {states.count('fail')} "
        f"failed); {name} on the validation text {outcome.value:.4f} (dense {outcome.dense:.4f}), "
        f"found in trial {outcome.best}"
    )
    if outcome.heldout:
        value, dense = outcome.heldout["value"], outcome.heldout["dense"]
        click.echo(f"{name} on the held-out text {value:.4f} (dense {dense:.4f})")
    if request.search.costs:
        count = len(outcome.front)
        click.echo(f"{count} trials on the Pareto front; written is {rule(request.search)}")
        for trial in outcome.front:
            click.echo(_line(trial, is_written=trial["number"] == outcome.best))
    if outcome.importances:
        top = list(outcome.importances.items())[:4]
        click.echo("what mattered: " + ", ".join(f"{k} {share:.0%}" for k, share in top))
    click.echo(f"written to {outcome.output}")


def _line(trial: dict[str, Any], is_written: bool) -> str:
    objectives = ", ".join(f"{k} {v:,.6g}" for k, v in trial.items() if k != "number")
    return f"  trial {trial['number']}: {objectives}{'  <- written' if is_written else ''}"
