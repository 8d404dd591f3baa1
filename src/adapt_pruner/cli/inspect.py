"""`adapt-pruner inspect`"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UnsupportedModel
from ..figures import in_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from ..inspection import Inspection

KIND_NAMES = {
    "kv-groups": "KV groups",
    "query-heads": "query heads",
    "neurons": "neurons",
    "attention": "attention of layers",
    "mlp": "MLPs of layers",
    "layers": "decoder layers",
    "hidden": "hidden dimensions",
}


@click.command("inspect")
@click.argument("model")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all of it to FILE.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def command(model: str, file: Path | None, trust_remote_code: bool) -> None:
    """Show what MODEL consists of and what each target would mean. Loads no weights.

    \b
    adapt-pruner inspect meta-llama/Llama-3.2-1B
    """
    from ..files import check_file, write_json_atomically
    from ..inspection import inspect_model
    from ..model.loading import empty_model
    from . import console

    console.hush_libraries()
    if file is not None:
        check_file(file)
    try:
        found = inspect_model(empty_model(model, trust_remote_code))
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"inspect shows what can be cut, and here nothing can: {error}"
        ) from error
    if file is not None:
        write_json_atomically(file, {"format": 1, "model": model, **found.as_dict()})
    show(model, found)


def show(name: str, found: Inspection) -> None:
    """Four small tables: parameters by part, layers, units, targets."""
    from . import console

    size = _element_size(found.dtype)
    console.out.print(
        f"[bold]{Path(name).name}[/]: {found.model_type}, {len(found.widths)} decoder layers, "
        f"hidden size {found.hidden_size:,}, vocabulary {found.vocabulary:,}, "
        f"context {found.context or 'not stated'}; stored as {found.dtype}\n",
        soft_wrap=True,
    )
    console.out.print(_parts(found, size))
    if found.kv_entries_per_token is not None:
        cache = in_bytes(found.kv_entries_per_token * size)
        console.out.print(f"KV cache: {cache} per token")
    console.out.print()
    for table in (_layers(found), _units(found), _targets(found, size)):
        console.out.print(table)
    console.out.print(
        f"smallest possible: {found.smallest:,} parameters (sparsity {found.largest_sparsity:.4f} "
        f"of the {found.decoder_layers:,} in the decoder layers)",
        soft_wrap=True,
    )


def _table(*columns: str) -> Table:
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def _parts(found: Inspection, size: int) -> Table:
    table = _table("part", "parameters", "share", "bytes")
    for part, count in [*found.budget.items(), ("all", found.total)]:
        of = " and head (shared)" if part == "embeddings" and found.is_tied else ""
        share = f"{count / found.total:.2%}"
        table.add_row(part + of, f"{count:,}", share, in_bytes(count * size))
    return table


def _layers(found: Inspection) -> Table:
    names = {"num_attention_heads": "heads", "num_key_value_heads": "KV heads",
             "intermediate_size": "MLP width"}  # fmt: skip
    shown = [name for name in names if any(name in widths for widths in found.widths)]
    table = _table("decoder layers", *(names[name] for name in shown))
    for widths, run in groupby(enumerate(found.widths), key=lambda pair: pair[1]):
        numbers = [number for number, _ in run]
        which = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        table.add_row(which, *(f"{widths[n]:,}" if n in widths else "–" for n in shown))
    return table


def _units(found: Inspection) -> Table:
    table = _table("\nunits that can go", "\nnumber", "parameters\nof one")
    for kind in found.units:
        costs = sorted({kind.smallest_cost, kind.largest_cost})
        cost = " to ".join(f"{cost:,}" for cost in costs)
        table.add_row(KIND_NAMES[kind.kind], f"{kind.total:,}", cost)
    return table


def _targets(found: Inspection, size: int) -> Table:
    table = _table("\ntarget", "\nparameters", "\nof all", "\nbytes")
    for target in found.targets:
        cells = [f"{target.parameters:,}", f"{target.parameters / found.total:.1%}",
                 in_bytes(target.parameters * size)]  # fmt: skip
        impossible = ["not possible", "", ""]
        table.add_row(
            f"--sparsity {target.sparsity:g}", *(cells if target.is_possible else impossible)
        )
    return table


def _element_size(dtype: str) -> int:
    import torch

    return getattr(torch, dtype).itemsize
