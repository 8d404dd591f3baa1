"""Calls of lm-eval: without its notices, and with one sentence for whatever goes wrong in it."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import lm_eval.api.task
import torch
from tqdm import tqdm

from ..errors import AdaptPrunerError, EvaluationError


@contextmanager
def hushed() -> Iterator[None]:
    """Keep lm-eval's notices and bars out of the output; what goes wrong is raised."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
        lm_eval.api.task.tqdm = tqdm


@contextmanager
def explained(name: str, what: str, hint: str = "") -> Iterator[None]:
    """Turn what lm-eval and datasets raise into one EvaluationError of a sentence."""
    try:
        yield
    except (AdaptPrunerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        cause = error.__cause__ or error  # datasets hides the reason behind a general message
        text = " ".join(str(cause).split()).rstrip(".") or "no reason given"
        of = f"{what} task '{name}'" if what != "Task" else f"Task '{name}'"
        raise EvaluationError(
            f"{of} cannot be used: {type(cause).__name__}: {text[:300]}.{hint}"
        ) from error
