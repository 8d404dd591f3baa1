"""Times that commands measure before a run, and what they show of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..result import PruningResult
    from ..run import Request


def with_times(
    requests: Mapping[str, Request], outputs: Sequence[Path], is_auto: bool, quiet: bool
) -> dict[str, Request]:
    """Measure now, with a bar, what the requests need of times.

    Args:
        outputs: what the run is going to write, which must be possible.
        is_auto: whether the multiple is to be chosen by them, and stand in the requests.
    """
    first = next(iter(requests.values()))
    if not first.is_of_time and not is_auto:
        return dict(requests)
    from ..api import with_multiple
    from ..run import times_of
    from .console import TaskBar

    for output in outputs:
        _check(output, first.overwrite)
    with TaskBar(quiet) as bar:
        bar.on_task("timing widths", 0, 1)
        table = times_of(first, bar.on_progress, with_odd=is_auto)
    if not is_auto:
        return dict(requests)
    settings = with_multiple(first.settings, table)
    if not quiet:
        click.echo(f"multiple {settings.multiple}, by times of {table.circumstances}")
    bare = {name: request.without_circumstances() for name, request in requests.items()}
    return {name: replace(request, settings=settings) for name, request in bare.items()}


def _check(output: Path, overwrite: bool) -> None:
    """Raise WritingError now instead of when all is measured."""
    from ..checkpoint import check_place
    from ..model.loading import is_gguf

    if is_gguf(str(output)):
        from ..export.gguf_file import check_gguf_output

        check_gguf_output(output, overwrite)
    else:
        check_place(output, overwrite)


def show_timing(result: PruningResult) -> None:
    """What came of a target in time, or why that was not measured."""
    from ..figures import promise

    if result.timing:
        click.echo(promise(result.timing))
    elif result.untimed:
        click.echo(f"The result was not timed: {result.untimed.rstrip('.')}.")
