"""One process or many: what `accelerate launch` or `torchrun` started us as."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

from ..errors import InvalidSettings, near_match
from .request import AccelRequest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PATIENCE = timedelta(minutes=30)
"""How long processes wait for each other, such as for a checkpoint of the first one. A process that
hangs ends the run after it. When one dies, `accelerate launch` and `torchrun` end all at once."""
PATIENCE_WITH_DATA = timedelta(hours=24)
"""How long the others wait while the first process tokenises the data of a run."""


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


def processes_of(accelerator: Accelerator) -> ProcessGroup | None:
    """All processes of a run; None if there is one."""
    if accelerator.num_processes == 1:
        return None
    return torch.distributed.group.WORLD


@contextmanager
def first_alone(accelerator: Accelerator) -> Iterator[None]:
    """Let the first process go through the block alone, then the others, who find its work done.

    They wait as long as data may take, on a group of their own: the limit of a group holds for all
    that it does, and a hang anywhere else should end a run soon.
    """
    if accelerator.num_processes == 1:
        yield
        return
    waiting: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE_WITH_DATA)
    if not accelerator.is_main_process:
        torch.distributed.barrier(waiting)
    yield
    if accelerator.is_main_process:
        torch.distributed.barrier(waiting)
    torch.distributed.destroy_process_group(waiting)


def start_trackers(accelerator: Accelerator, request: AccelRequest, stack: ExitStack) -> None:
    """Begin to report; some trackers write into the run's directory at once."""
    if request.report_to:
        recipe = request.recipe()
        plain = {k: v for k, v in recipe.items() if isinstance(v, int | float | str | bool)}
        accelerator.init_trackers("adapt-pruner", config=plain)
        stack.callback(accelerator.end_training)
