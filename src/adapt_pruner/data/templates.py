"""Chat templates are programs, which may raise anything, loop, or fill the memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError, shortened


class TemplateRefusal(Exception):
    """A chat template does not take these messages."""


class EndlessTemplate(DataError):
    """A chat template loops."""


TEMPLATE_SECONDS = 10.0
"""A template is a program, and may loop; a real one takes a millisecond."""


@contextmanager
def running_a_template() -> Iterator[None]:
    """Turn what a template raises, which may be anything, into a refusal of these messages. One
    that has no end, or fills the memory, would do so with each of them.

    Raises:
        TemplateRefusal: with the template's message.
        EndlessTemplate: if it takes too long, or too much memory.
    """
    try:
        with at_most(TEMPLATE_SECONDS):
            yield
    except (TimeoutError, MemoryError) as error:
        what = "fills the memory" if isinstance(error, MemoryError) else str(error)
        raise EndlessTemplate(
            f"The chat template {what} for one document. Take another template, or correct the "
            "data."
        ) from error
    except Exception as error:
        raise TemplateRefusal(shortened(str(error) or type(error).__name__, 300)) from error


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when it takes longer, where there are timers: in the main
    thread of a POSIX system, whose alarm nobody else uses."""
    is_possible = (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    )
    if not is_possible:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
