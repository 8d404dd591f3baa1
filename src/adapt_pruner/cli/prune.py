"""`adapt-pruner prune`"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..goal import GOAL_OPTIONS
from ..settings import AUTO
from .export import quantize_option, show_export
from .options import (
    MethodCommand,
    named_model,
    own_values,
    read_recipe,
    resolve_settings,
    run_options,
    several_sizes,
)
from .times import show_timing, with_times

if TYPE_CHECKING:
    from ..run import Request

RECIPE_KEYS = {
    "model": (str,),
    "sparsity": (float, int, list),
    "params": (int, str, list),
    "bytes": (int, str, list),
    "kv_bytes": (int, str, list),
    "speedup": (float, int, list),
    "latency": (str, list),
    "latency_table": (str,),
    "stage": (str,),
    "batch_size": (int,),
    "context": (int,),
    "engine": (str,),
    "quantize": (str,),
    "preset": (str,),
    "evaluate": (str,),
    "portable": (bool,),
}


@click.command("prune", cls=MethodCommand)
@run_options
@quantize_option
def command(
    model: str | None,
    output: Path | None,
    recipe: Path | None,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make MODEL, a name on the hub, a directory or a GGUF file, smaller without training.

    \b
    adapt-pruner prune ./my-model -o DIR --sparsity 0.2,0.4   # DIR/sparsity-0.2, DIR/sparsity-0.4
    adapt-pruner prune meta-llama/Llama-3.2-1B -o smaller --sparsity 0.2
    adapt-pruner prune ./my-model -o smaller --params 350M --calibration text.jsonl
    adapt-pruner prune model.gguf -o smaller.gguf --sparsity 0.2 --quantize Q4_K_M
    adapt-pruner prune ./my-model -o smaller.gguf --bytes 80MB --quantize Q4_K_M
    adapt-pruner prune ./my-model -o smaller --speedup 1.5 --multiple auto

    Several sizes in one run take less time than runs of their own; docs/commands/prune.md has more.
    """
    from ..model.loading import is_gguf
    from ..run import plan_run, run_pruning_to_sizes
    from . import console

    said = read_recipe(recipe, RECIPE_KEYS) if recipe else {}
    model = named_model(model or said.get("model"), output, dry_run)
    to_gguf = output is not None and is_gguf(str(output))
    is_auto, said = _is_auto(said, options)
    requests = _requests(model, said, options)
    if options["quantize"] and not (to_gguf or any(of.is_of_file for of in requests.values())):
        raise click.UsageError(
            "--quantize is for GGUF files: name one, -o smaller.gguf, or give --bytes."
        )
    console.hush_libraries()
    outputs = _outputs(output, requests)
    requests = with_times(requests, [] if dry_run else outputs, is_auto, quiet)
    if dry_run:
        for request in requests.values():
            console.show_plan(plan_run(request))
        return
    assert output is not None
    if to_gguf:
        _prune_to_gguf(list(requests.values()), output, quiet)
        return
    with console.ProgressBar(quiet) as bar:
        for place, result in run_pruning_to_sizes(list(requests.values()), outputs, bar):
            if not quiet:
                console.show_result(result)
                show_timing(result)
                click.echo(f"written to {place}")


def _outputs(output: Path | None, requests: Mapping[str, Request]) -> list[Path]:
    """A place for what is made of each request."""
    if output is None:
        return []
    return [output / name for name in requests] if len(requests) > 1 else [output]


def _is_auto(said: dict[str, Any], options: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether the multiple is to be chosen; then it is taken out of the options. Returns the recipe
    without it, too."""
    if (options["multiple"] or said.get("multiple")) != AUTO:
        return False, said
    options["multiple"] = None
    return True, {name: value for name, value in said.items() if name != "multiple"}


def _requests(model: str, said: dict[str, Any], options: dict[str, Any]) -> dict[str, Request]:
    """What recipe and flags ask for together, for each size by its name. A flag overrides the
    recipe."""
    from ..run import Request, default_calibration

    own = {key: options[key] for key in (*GOAL_OPTIONS, "evaluate", "portable")}
    overwrite, trust = options.pop("overwrite"), options.pop("trust_remote_code")
    options = {key: value for key, value in options.items() if key not in own}
    preset = options.pop("preset", None)
    values = own_values(own, said)
    sizes = several_sizes(values)
    request = Request(
        model=model,
        settings=resolve_settings(preset, default_calibration(model), said, options),
        overwrite=overwrite,
        trust_remote_code=bool(trust),
        **{**values, **next(iter(sizes.values())), "portable": bool(values["portable"])},
    )
    return {name: replace(request, **size) for name, size in sizes.items()}


def _prune_to_gguf(requests: list[Request], output: Path, quiet: bool) -> None:
    from ..run import run_pruning_to_gguf
    from . import console

    if len(requests) > 1:
        raise click.UsageError("A GGUF file holds one size; name a directory for several.")
    with console.ProgressBar(quiet) as bar:
        result, exported = run_pruning_to_gguf(requests[0], output, bar)
    if not quiet:
        console.show_result(result)
        show_timing(result)
        show_export(exported)
        click.echo("for a model card and a report, prune to a directory and export from it")
