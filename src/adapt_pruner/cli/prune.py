"""`adapt-pruner prune`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import (
    Count,
    own_values,
    preset_option,
    read_recipe,
    resolve_settings,
    settings_options,
)

RECIPE_KEYS = {
    "model": (str,),
    "sparsity": (float, int),
    "params": (int, str),
    "preset": (str,),
    "evaluate": (str,),
    "portable": (bool,),
}


@click.command("prune")
@click.argument("model", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--sparsity", type=float, help="Share of the decoder layers' parameters to remove.")
@click.option("--params", type=Count(), help="Parameters of the whole model, such as 350M.")
@preset_option
@click.option("--recipe", type=click.Path(path_type=Path), help="YAML file; flags override it.")
@click.option("--evaluate", metavar="TEXT", help="Text to measure perplexity on, before and after.")
@click.option("--portable", is_flag=True, default=None, help="Add a modelling file (auto_map).")
@click.option("--overwrite", is_flag=True, help="Replace the output directory if it exists.")
@click.option("--dry-run", is_flag=True, help="Print sizes, memory and time; load no weights.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@settings_options
def command(
    model: str | None,
    output: Path | None,
    recipe: Path | None,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make MODEL, a name on the hub or a directory, smaller without training.

    \b
    adapt-pruner prune meta-llama/Llama-3.2-1B -o smaller --sparsity 0.2
    adapt-pruner prune ./my-model -o smaller --params 350M --calibration text.jsonl
    """
    from ..run import Request, default_calibration, plan_run, run_pruning
    from . import console

    said = read_recipe(recipe, RECIPE_KEYS) if recipe else {}
    own = {key: options.pop(key) for key in ("sparsity", "params", "evaluate", "portable")}
    overwrite, trust = options.pop("overwrite"), options.pop("trust_remote_code")
    preset = options.pop("preset")
    model = model or said.get("model")
    if not model:
        raise click.UsageError("Name a MODEL: a directory, or a model on the hub.")
    if output is None and not dry_run:
        raise click.UsageError("Name the directory to write: -o DIR.")
    values = own_values(own, said)
    request = Request(
        model=model,
        settings=resolve_settings(preset, default_calibration(model), said, options),
        overwrite=overwrite,
        trust_remote_code=trust,
        **{**values, "portable": bool(values["portable"])},
    )
    console.hush_libraries()
    if dry_run:
        console.show_plan(plan_run(request))
        return
    assert output is not None
    with console.ProgressBar(quiet) as bar:
        result = run_pruning(request, output, bar)
    if not quiet:
        console.show_result(result)
        click.echo(f"written to {output}")
