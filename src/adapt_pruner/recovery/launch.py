"""One process or many: what `accelerate launch` or `torchrun` started us as."""

from __future__ import annotations

import os
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

from ..errors import InvalidSettings, near_match

if TYPE_CHECKING:
    from .accel import AccelRequest

PATIENCE = timedelta(hours=24)
"""How long processes wait for each other. The first one tokenises all data of a run and writes all
checkpoints while the others wait; torch's own limit of 10 minutes (30 with gloo) would end the run.
When a process dies, `accelerate launch` and `torchrun` end the others at once all the same."""


def make_accelerator(request: AccelRequest, directory: Path, stack: ExitStack) -> Accelerator:
    """The processes of this run; their state is closed when `stack` is.

    Raises:
        InvalidSettings: for a device or tracker that is not there.
    """
    device = request.settings.device
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidSettings(
            f"device: training takes auto, cpu or cuda, and the GPUs that CUDA_VISIBLE_DEVICES "
            f"shows; got '{device}'."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidSettings("device: 'cuda' is not available here. Take auto, or cpu.")
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # sharding is --sharding, on any device
    known = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in request.report_to:
        if name not in known:
            raise InvalidSettings(
                f"report_to: the tracker '{name}' is not installed or unknown."
                f"{near_match(name, known)} Installed: {', '.join(known) or 'none'}."
            )
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    precision = request.recovery.mixed_precision
    if precision == "auto":
        precision = "no" if on_cpu else "bf16"
    AcceleratorState._reset_state()  # an earlier run of this process may have had other settings
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        log_with=list(request.report_to) or None,  # pyright: ignore[reportArgumentType]
        project_dir=directory,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    stack.callback(AcceleratorState._reset_state)
    return accelerator


def start_trackers(accelerator: Accelerator, request: AccelRequest, stack: ExitStack) -> None:
    """Begin to report; some trackers write into the run's directory at once."""
    if request.report_to:
        recipe = request.recipe()
        plain = {k: v for k, v in recipe.items() if isinstance(v, int | float | str | bool)}
        accelerator.init_trackers("adapt-pruner", config=plain)
        stack.callback(accelerator.end_training)
