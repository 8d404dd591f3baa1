"""`adapt-pruner export`"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..export import Export

quantize_option = click.option(
    "--quantize",
    metavar="TYPE",
    show_default="F16",
    help="How a GGUF file stores values: F32, F16, BF16, Q8_0, Q4_0, Q4_K_M, ...",
)


@click.command("export")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="GGUF file to write."
)
@quantize_option
@click.option("--name", help="What the file calls the model; default: its directory's name.")
@click.option("--overwrite", is_flag=True, help="Replace the GGUF file that is there.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with MODEL.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    model: str,
    output: Path,
    quantize: str | None,
    name: str | None,
    overwrite: bool,
    trust_remote_code: bool,
    quiet: bool,
) -> None:
    """Write MODEL, dense or pruned, as a GGUF file for llama.cpp, Ollama and LM Studio.

    \b
    adapt-pruner export smaller -o smaller.gguf
    adapt-pruner export smaller -o smaller.gguf --quantize Q4_K_M
    """
    from . import console

    console.hush_libraries()
    if output.suffix.lower() != ".gguf":
        raise click.UsageError(f"Name a file that ends in .gguf; got '{output}'.")
    from ..export import export_gguf

    with console.TaskBar(quiet) as bar:
        bar.on_task("writing", 0, 1)
        exported = export_gguf(
            model,
            output,
            quantize or "F16",
            name=name,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            on_progress=lambda share: bar.on_progress(round(100 * share), 100),
        )
    if not quiet:
        show_export(exported)


def show_export(exported: Export) -> None:
    """What was written, what it does not say by itself, and how to run it."""
    from . import console

    types = ", ".join(f"{count} {kind}" for kind, count in exported.num_tensors.items())
    console.out.print(
        f"{exported.file}: {console.in_bytes(exported.num_bytes)}, {exported.quantize}, "
        f"architecture {exported.architecture}; tensors: {types}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    kinds = Counter((one.wanted, one.stored, one.row_length) for one in exported.fallbacks)
    for (wanted, stored, length), count in kinds.items():
        console.out.print(
            f"{count} tensors are {stored} instead of {wanted}: their rows of {length} values do "
            "not divide into its blocks",
            soft_wrap=True,
        )
    for note in exported.notes:
        console.out.print(note, soft_wrap=True, markup=False)
    for engine, commands in exported.commands.by_engine().items():
        for number, line in enumerate(commands):
            console.out.print(
                f"{engine if number == 0 else '':<13}{line}", soft_wrap=True, markup=False
            )
