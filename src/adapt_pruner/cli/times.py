"""What commands show of targets in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..result import PruningResult
    from ..run import Request


def with_times(requests: Mapping[str, Request], is_auto: bool, quiet: bool) -> dict[str, Request]:
    """Measure now, with a bar, what the requests need of times.

    Args:
        is_auto: whether the multiple is to be chosen by them, and stand in the requests.
    """
    first = next(iter(requests.values()))
    if not first.is_of_time and not is_auto:
        return dict(requests)
    from ..latency import choose_multiple
    from ..methods import build_settings
    from ..run import times_of
    from .console import TaskBar

    with TaskBar(quiet) as bar:
        bar.on_task("timing widths", 0, 1)
        table = times_of(first, bar.on_progress, with_odd=is_auto)
    if not is_auto:
        return dict(requests)
    multiple = choose_multiple(table)
    if not quiet:
        click.echo(f"multiple {multiple}, by times of {table.circumstances}")
    return {
        name: replace(request, settings=build_settings(request.settings, multiple=multiple))
        for name, request in requests.items()
    }


def show_timing(result: PruningResult) -> None:
    """What came of a target in time, if it was one of this machine."""
    from ..figures import promise

    if result.timing:
        click.echo(promise(result.timing))
