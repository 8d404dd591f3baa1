"""`adapt-pruner prune`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .export import quantize_option, show_export
from .options import (
    MethodCommand,
    named_model,
    own_values,
    read_recipe,
    resolve_settings,
    run_options,
)

RECIPE_KEYS = {
    "model": (str,),
    "sparsity": (float, int),
    "params": (int, str),
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
    quantize: str | None,
    recipe: Path | None,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make MODEL, a name on the hub, a directory or a GGUF file, smaller without training.

    \b
    adapt-pruner prune meta-llama/Llama-3.2-1B -o smaller --sparsity 0.2
    adapt-pruner prune ./my-model -o smaller --params 350M --calibration text.jsonl
    adapt-pruner prune model.gguf -o smaller.gguf --sparsity 0.2 --quantize Q4_K_M
    """
    from ..model.loading import is_gguf
    from ..run import Request, default_calibration, plan_run, run_pruning, run_pruning_to_gguf
    from . import console

    said = read_recipe(recipe, RECIPE_KEYS) if recipe else {}
    own = {key: options.pop(key) for key in ("sparsity", "params", "evaluate", "portable")}
    overwrite, trust = options.pop("overwrite"), options.pop("trust_remote_code")
    preset = options.pop("preset", None)
    model = named_model(model or said.get("model"), output, dry_run)
    to_gguf = output is not None and is_gguf(str(output))
    if quantize and not to_gguf:
        raise click.UsageError("--quantize is for GGUF files: name one, -o smaller.gguf.")
    values = own_values(own, said)
    request = Request(
        model=model,
        settings=resolve_settings(preset, default_calibration(model), said, options),
        overwrite=overwrite,
        trust_remote_code=bool(trust),
        **{**values, "portable": bool(values["portable"])},
    )
    console.hush_libraries()
    if dry_run:
        console.show_plan(plan_run(request))
        return
    assert output is not None
    exported = None
    with console.ProgressBar(quiet) as bar:
        if to_gguf:
            result, exported = run_pruning_to_gguf(request, output, quantize or "F16", bar)
        else:
            result = run_pruning(request, output, bar)
    if quiet:
        return
    console.show_result(result)
    if exported is None:
        click.echo(f"written to {output}")
    else:
        show_export(exported)
