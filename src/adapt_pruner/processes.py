"""Several processes that work on one model together. Whoever has no group works alone: nothing is
sent, whether or not the process has torch.distributed initialised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Decision = TypeVar("Decision")


def share_of(group: ProcessGroup | None) -> tuple[int, int]:
    """Index of this process, and how many share the work."""
    if group is None:
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def decided_by_first(decision: Decision, group: ProcessGroup | None) -> Decision:
    """What the first process of the group decided, on each of them.

    Processes that compute the same may differ by a rounding error. A choice that hangs on it, such
    as which units stay, must be made once. Every process of the group calls this.
    """
    if group is None:
        return decision
    box = [decision]
    torch.distributed.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor], group: ProcessGroup | None) -> None:
    """Overwrite the tensors by those of the first process. Every process of the group calls this,
    with tensors of the same shapes in the same order."""
    if group is None:
        return
    for tensor in tensors:
        sent = tensor.detach().contiguous()
        torch.distributed.broadcast(sent, group_src=0, group=group)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.copy_(sent)


def add_up(tensors: Iterable[Tensor], group: ProcessGroup | None) -> None:
    """Replace the tensors by their sums over the group. Every process of the group calls this."""
    if group is None:
        return
    for tensor in tensors:
        torch.distributed.all_reduce(tensor, group=group)
