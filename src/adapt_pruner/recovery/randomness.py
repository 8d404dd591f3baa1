"""Random states of the processes of a run: each has its own, so that dropout differs between them,
and a checkpoint holds all of them."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..processes import share_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_STRIDE = 982_451_653
"""Between the seeds of two processes. The generator reads the lower 32 bits of a seed."""


def seed_process(seed: int, group: ProcessGroup | None) -> None:
    """Seed all processes but the first, which keeps the seed that it had when the phase began."""
    rank, _ = share_of(group)
    if rank:
        torch.manual_seed(seed + rank * _STRIDE)


def gather_random_states(group: ProcessGroup | None) -> dict[str, Tensor]:
    """The states of all processes: "cpu/0", "cuda/0", "cpu/1" ... Every process calls this."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    rank, count = share_of(group)
    if group is None:
        return {f"{device}/{rank}": state for device, state in own.items()}
    found: list = [None] * count
    torch.distributed.all_gather_object(found, own, group=group)
    return {
        f"{device}/{other}": state
        for other, states in enumerate(found)
        for device, state in states.items()
    }


def restore_random_states(states: dict[str, Tensor], group: ProcessGroup | None) -> None:
    """Take up this process's own state. A process that has none, because the run had fewer
    processes, gets a seed of its own."""
    rank, _ = share_of(group)
    if f"cpu/{rank}" not in states:
        torch.manual_seed(zlib.crc32(states["cpu/0"].numpy().tobytes()) + rank * _STRIDE)
        return
    torch.set_rng_state(states[f"cpu/{rank}"])
    if f"cuda/{rank}" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"cuda/{rank}"])
