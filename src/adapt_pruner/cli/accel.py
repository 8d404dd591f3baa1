"""`adapt-pruner accel`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..limits import Batch, Factor, Hours, Loss, Rounds, Steps
from ..recovery.settings import RecoverySettings, make_recovery_settings
from .export import quantize_option
from .options import (
    MethodCommand,
    named_model,
    options_of,
    own_values,
    read_recipe,
    resolve_settings,
    run_options,
    several_sizes,
)
from .parameters import Count, Number

if TYPE_CHECKING:
    from ..recovery.request import AccelRequest

RECIPE_KEYS = {
    "model": (str,),
    "data": (str,),
    "tokens": (int, str),
    "sparsity": (float, int),
    "params": (int, str),
    "bytes": (int, str),
    "kv_bytes": (int, str),
    "speedup": (float, int),
    "latency": (str,),
    "latency_table": (str,),
    "stage": (str,),
    "batch_size": (int,),
    "context": (int,),
    "engine": (str,),
    "quantize": (str,),
    "preset": (str,),
    "teacher": (str,),
    "evaluate": (str,),
    "portable": (bool,),
    "trust_remote_code": (bool,),
}


@click.command("accel", cls=MethodCommand)
@run_options
@quantize_option
@click.option("--tokens", type=Count(), help="Tokens to train on in all, such as 1.2B.")
@click.option(
    "--data",
    help="Training text: as --calibration, or a mixture (YAML, or adapt-llm). It is also what cuts "
    "are calibrated on, unless --calibration names other text.",
)
@click.option("--teacher", help="Model to distil from, with --alpha; default: the source model.")
@click.option("--stop-after", type=Number(Rounds), help="Stop after this phase, to go on later.")
@click.option("--max-hours", type=Number(Hours), help="Stop this call after so long.")
@click.option(
    "--max-loss", type=Number(Loss), help="Stop at a phase whose evaluation loss is above it."
)
@click.option(
    "--save-steps", type=Number(Steps), default=500, show_default=True,
    help="Optimizer steps between checkpoints; one is also written after each phase.",
)  # fmt: skip
@click.option("--report-to", default="", help="Trackers: tensorboard, trackio, wandb, with commas.")
@click.option("--data-cache", type=click.Path(path_type=Path), help="Where tokenised data go.")
@click.option("--gpus", type=Number(Batch), default=1, show_default=True, help="For --dry-run.")
@click.option(
    "--gpu-tflops", type=Number(Factor), default=400.0, show_default=True,
    help="For --dry-run: what a GPU really does in training.",
)  # fmt: skip
@options_of(RecoverySettings)
def command(
    model: str | None,
    output: Path | None,
    recipe: Path | None,
    dry_run: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make MODEL smaller and train it in between, a few percent of the weights at a time.

    The same command goes on with a run that was interrupted. `accelerate launch -m adapt_pruner
    accel ...` spreads it over GPUs.

    \b
    adapt-pruner accel Qwen/Qwen2.5-0.5B -o qwen-350m --params 350M --tokens 1B --data adapt-llm
    adapt-pruner accel --recipe recipes/accel-demo.yaml -o small
    """
    from . import console

    gpus, gpu_tflops = options.pop("gpus"), options.pop("gpu_tflops")
    request = _request(model, output, recipe, dry_run, options)
    console.hush_libraries()
    if dry_run:
        from ..recovery.estimate import plan_accel

        console.show_accel_plan(plan_accel(request, gpus, gpu_tflops))
        return
    from ..recovery.accel import run_accel

    assert output is not None
    with console.TrainingProgress(quiet) as progress:
        outcome = run_accel(request, output, progress)
    if not progress.is_shown:
        return
    if outcome.result is None:
        console.out.print(outcome.stopped, soft_wrap=True)
    else:
        console.show_result(outcome.result)
        console.out.print(f"written to {output}")


def _request(
    model: str | None,
    output: Path | None,
    recipe: Path | None,
    dry_run: bool,
    options: dict[str, Any],
) -> AccelRequest:
    """What recipe and flags ask for together. A flag overrides the recipe."""
    from ..recovery.request import DEFAULTS, AccelRequest

    said = read_recipe(recipe, RECIPE_KEYS, RecoverySettings) if recipe else {}
    said_of_run = {key: said.get(key) for key in RECIPE_KEYS}
    own = {key: options.pop(key) for key in RECIPE_KEYS if key not in ("model", "preset")}
    preset = options.pop("preset", None)
    how = {
        name: options.pop(name)
        for name in (
            "overwrite", "stop_after", "max_hours", "max_loss", "save_steps", "data_cache",
        )
    }  # fmt: skip
    trackers = tuple(name.strip() for name in options.pop("report_to").split(",") if name.strip())
    training = {name: options.pop(name) for name in RecoverySettings.model_fields}
    values = own_values(own, said_of_run)
    if len(several_sizes(values)) > 1:
        raise click.UsageError("accel trains one size; name one target.")
    model = named_model(model or said.get("model"), output, dry_run)
    for name, example in (("tokens", "100M"), ("data", "text.jsonl")):
        if values[name] is None:
            raise click.UsageError(f"Say --{name}, such as --{name} {example}.")
    from_recipe = {k: v for k, v in said.items() if k in RecoverySettings.model_fields}
    given = {k: v for k, v in training.items() if v is not None}
    if given.keys() & {"phases", "prune_per_phase"}:
        from_recipe |= {"phases": None, "prune_per_phase": None}
    flags = {k: bool(values.pop(k)) for k in ("portable", "trust_remote_code")}
    return AccelRequest(
        model=model,
        settings=resolve_settings(preset, DEFAULTS, said, options),
        recovery=make_recovery_settings(**{**from_recipe, **given}),
        report_to=trackers,
        **values,
        **flags,
        **how,
    )
