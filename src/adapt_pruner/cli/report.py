"""`adapt-pruner report`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import WritingError
from ..limits import NumTokens
from .parameters import Number


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="HTML file to write; default: report.html in the run, or here for several.",
)  # fmt: skip
@click.option("--prompt", "prompts", multiple=True, help="Let the models go on from it; repeat.")
@click.option(
    "--max-new-tokens", type=Number(NumTokens), default=64, show_default=True,
    help="Tokens that each writes after a prompt.",
)  # fmt: skip
@click.option("--speed", is_flag=True, help="Measure prefill and decode of both models now.")
@click.option(
    "--evaluation", type=click.Path(path_type=Path), metavar="FILE",
    help="Show the results that `adapt-pruner evaluate DENSE RUN --json FILE` wrote.",
)  # fmt: skip
@click.option(
    "--dense", metavar="MODEL",
    help="The dense model, for --prompt and --speed; without it the pruned one writes alone.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="For --prompt and --speed.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT even if it is no report.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the dense model.")
def command(
    runs: tuple[Path, ...],
    output: Path | None,
    evaluation: Path | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Write one HTML page about the directory RUN of a pruning, or comparing several.

    \b
    adapt-pruner report smaller --prompt "Once upon a time" --speed --dense ./my-model
    adapt-pruner report smaller smallest -o both.html
    """
    from ..files import write_atomically
    from ..model.loading import resolve_device
    from ..report.account import REPORT_FILE
    from ..report.page import render
    from ..report.record import read_run
    from ..report.samples import Wanted, make_extras
    from ..report.scores import score_rows
    from . import console

    output = output or (runs[0] / REPORT_FILE if len(runs) == 1 else Path(REPORT_FILE))
    _check(output, overwrite)
    console.hush_libraries()
    read = [read_run(directory) for directory in runs]
    resolve_device(options["device"])
    wanted = Wanted(**options)
    scores = [score_rows(run, evaluation) if evaluation else [] for run in read]
    extras = [make_extras(run, wanted) for run in read]
    for extra, rows in zip(extras, scores, strict=True):
        extra.scores = rows
    write_atomically(output, render(read, extras))
    for run, extra in zip(read, extras, strict=True):
        if extra.missing_dense:
            console.err.print(f"{run.name}: {extra.missing_dense}", soft_wrap=True, markup=False)
    click.echo(f"written to {output}")
    if not wanted.prompts:
        click.echo('--prompt "Some text" --dense MODEL adds what both models write after it.')


def _check(output: Path, overwrite: bool) -> None:
    from ..files import beginning, place_of
    from ..report.page import MARK

    place = place_of(output)
    if place.is_dir():
        raise WritingError(f"'{output}' is a directory; name an HTML file in it.")
    if place.exists() and not place.is_file():
        raise WritingError(f"'{output}' is a pipe or a device; name an ordinary file.")
    if place.exists() and not overwrite and MARK not in beginning(place):
        raise WritingError(
            f"'{output}' exists and is no report. Name another file, or pass --overwrite."
        )
