"""`adapt-pruner bench`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..settings import (
    BenchSettings,
    LatencySettings,
    make_bench_settings,
    make_latency_settings,
)
from .export import quantize_option
from .options import check_before, options_of

if TYPE_CHECKING:
    from ..evaluation.bench import RunningCost
    from ..evaluation.speed import Speed

_OF_ROUNDS = ("prompt_tokens", "new_tokens", "repetitions")
_OF_TABLE = [name for name in LatencySettings.model_fields if name != "batch_size"]


@click.command("bench")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all figures to FILE.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
@click.option(
    "--latency-table",
    "table",
    type=click.Path(path_type=Path),
    help="Instead of all that, time MODEL's parts at several widths and write them to FILE, for "
    "`prune --speedup`.",
)
@options_of(LatencySettings, leave_out=("batch_size",))
@quantize_option
@options_of(BenchSettings)
def command(
    models: tuple[str, ...],
    file: Path | None,
    table: Path | None,
    trust_remote_code: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure what MODELs take: bytes, time and memory. Name the dense model first.

    \b
    adapt-pruner bench meta-llama/Llama-3.2-1B smaller
    adapt-pruner bench demo demo-run --prompt-tokens 128 --new-tokens 64
    adapt-pruner bench ./my-model --latency-table phone.json --engine llama.cpp --quantize Q8_0

    All models are timed in turns in one run. Beside each measured speed-up over the first model
    stands the ideal one: the ratio of operations for reading a prompt, of weight bytes for writing.
    """
    from ..evaluation.bench import compare_costs
    from ..model.loading import describe_device, load_model, resolve_device
    from . import console

    console.hush_libraries()
    given = _about_table(options, table)
    if table and (models[1:] or file):
        raise click.UsageError("--latency-table is about one MODEL, and takes no --json.")
    settings = make_bench_settings(**{k: v for k, v in options.items() if v is not None})
    check_before(models, file or table, trust_remote_code)
    if table is not None:
        _write_table(models[0], table, given, settings, trust_remote_code, quiet)
        return
    dtype = "stored" if settings.dtype == "auto" else settings.dtype
    device = resolve_device(settings.device)
    loaded = [
        load_model(name, dtype, device, None, trust_remote_code, prunable=False) for name in models
    ]
    with console.TaskBar(quiet) as bar:
        bar.on_task("rounds", 0, 1)
        costs = compare_costs(loaded, settings, bar.on_progress)
    where = describe_device(loaded[0].device)
    dtypes = [str(model.dtype).removeprefix("torch.") for model in loaded]
    if file is not None:
        named = zip(models, dtypes, costs, strict=True)
        rows = [{"model": name, "dtype": kind, **cost.as_dict()} for name, kind, cost in named]
        _write(file, settings, where, rows)
    show(models, costs)
    kinds = ", ".join(sorted(set(dtypes)))
    console.out.print(_how(settings, costs[0].speed, kinds, where), style="dim", soft_wrap=True)


def _how(settings: BenchSettings, speed: Speed, dtypes: str, where: str) -> str:
    return (
        f"{dtypes}; {where}; batch {speed.batch_size}, prompt of {speed.prompt_tokens} tokens, "
        f"{speed.new_tokens} new ones; medians of {settings.repetitions} rounds in turns"
    )


def _about_table(options: dict[str, Any], table: Path | None) -> dict[str, Any]:
    """Take out of the options those that say what a table is of, and return those given."""
    named = {name: options.pop(name) for name in (*_OF_TABLE, "quantize")}
    given = {name: value for name, value in named.items() if value is not None}
    if given and table is None:
        raise click.UsageError(
            f"--{next(iter(given)).replace('_', '-')} is about a table of times: name its file, "
            "--latency-table FILE."
        )
    if table and (of_rounds := [name for name in _OF_ROUNDS if options.get(name) is not None]):
        raise click.UsageError(
            f"--{of_rounds[0].replace('_', '-')} is not about a table of times; leave it out. How "
            "much is timed: --context."
        )
    return given


def _write_table(
    name: str,
    file: Path,
    given: dict[str, Any],
    settings: BenchSettings,
    trust_remote_code: bool,
    quiet: bool,
) -> None:
    """Measure anew, whatever the cache holds."""
    from ..latency import write_table
    from ..latency.engines import make_engine
    from ..latency.measuring import measure_times
    from ..model.anatomy import find_anatomy
    from ..model.loading import empty_model, load_tokenizer, resolve_device
    from ..precision import written_dtype
    from . import console

    quantize = given.pop("quantize", None)
    how = make_latency_settings(**given, batch_size=settings.batch_size)
    if quantize and how.engine != "llama.cpp":
        raise click.UsageError("--quantize is about GGUF files: add --engine llama.cpp.")
    model = empty_model(name, trust_remote_code)
    engine = make_engine(
        how,
        model,
        dtype=written_dtype(settings, model),
        device=resolve_device(settings.device),
        quantize=quantize or "F16",
        tokenizer=load_tokenizer(name, trust_remote_code) if how.engine == "llama.cpp" else None,
    )
    with console.TaskBar(quiet) as bar:
        bar.on_task("timing widths", 0, 1)
        table = measure_times(find_anatomy(model), engine, bar.on_progress)
    write_table(table, file)
    if not quiet:
        console.out.print(f"{table.circumstances}\nwritten to {file}", soft_wrap=True)


def _write(file: Path, settings: BenchSettings, device: str, models: list[dict[str, Any]]) -> None:
    from ..evaluation.fingerprint import versions
    from ..files import write_json_atomically

    content = {
        "format": 1,
        "device": device,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "models": models,
    }
    write_json_atomically(file, content)


def show(models: tuple[str, ...], costs: list[RunningCost]) -> None:
    """A column per model, and after each but the first what it gains over that."""
    from rich.table import Table

    from . import console

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for number, name in enumerate(models):
        table.add_column(Path(name).name, justify="right", overflow="fold")
        if number:
            table.add_column("gain", justify="right")
            table.add_column("ideal", justify="right")
    first = costs[0]

    def row(label: str, show: Any, value: Any, gain: Any, ideal: Any = lambda cost: None) -> None:
        cells = [show(value(first))]
        for cost in costs[1:]:
            cells += [show(value(cost)), _times(gain(cost)), _times(ideal(cost))]
        table.add_row(label, *cells)

    def size(label: str, value: Any) -> None:
        row(label, console.in_bytes, value, lambda cost: value(first) / value(cost))

    row("parameters", "{:,}".format, lambda c: c.parameters,
        lambda c: first.parameters / c.parameters)  # fmt: skip
    size("weights", lambda c: c.weight_bytes)
    size("KV cache per token", lambda c: c.kv_bytes_per_token)
    size("peak memory", lambda c: c.peak_bytes)
    row("time to first token", _milliseconds, lambda c: c.speed.time_to_first_token_s,
        lambda c: c.speed.prefill_speedup, lambda c: c.ideal_prefill_speedup)  # fmt: skip
    row("prefill, tokens/s", "{:,.0f}".format, lambda c: c.speed.prefill_tokens_per_s,
        lambda c: c.speed.prefill_speedup, lambda c: c.ideal_prefill_speedup)  # fmt: skip
    row("decode, tokens/s", "{:,.0f}".format, lambda c: c.speed.decode_tokens_per_s,
        lambda c: c.speed.decode_speedup, lambda c: c.ideal_decode_speedup)  # fmt: skip
    console.out.print(table)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"
