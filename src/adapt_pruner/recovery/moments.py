"""What AdamW remembers of each weight, carried over a cut.

Moments are tensors by parameter name, shaped like the parameter, plus the number of steps taken:
`{"model.layers.0.mlp.up_proj.weight": {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}}`.
A cut removes the entries of the units that go, as it does from the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..model.anatomy import Anatomy
from ..model.edits import kept_entries

Moments = dict[str, dict[str, Tensor]]
GroupKey = tuple[int, str]


def read_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
    """The optimizer's own tensors, not copies."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def write_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Give a new optimizer of `model` these moments; parameters without any start afresh."""
    for name, parameter in model.named_parameters():
        if name in moments:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in moments[name].items()
            }


def moment_cutter(
    model: nn.Module, anatomy: Anatomy
) -> Callable[[Moments, dict[GroupKey, Tensor]], None]:
    """Prepare to cut moments as the model is going to be cut; call this before the cut.

    The function returned takes the moments, which it mutates, and per group the units that stayed,
    as indices into the units that `anatomy` has.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    parts = [
        (group.key, names[part.tensor], part.dim, part.index_UK)
        for group in anatomy.groups
        for part in group.parts
    ]

    def cut(moments: Moments, kept: dict[GroupKey, Tensor]) -> None:
        for key, name, dim, index_UK in parts:
            if name not in moments or len(kept[key]) == len(index_UK):
                continue
            keep_U = torch.zeros(len(index_UK), dtype=torch.bool)
            keep_U[kept[key]] = True
            entries = kept_entries(index_UK, keep_U)
            moments[name] = {
                what: value if what == "step" else _select(value, dim, entries)
                for what, value in moments[name].items()
            }

    return cut


def _select(value: Tensor, dim: int, entries: Tensor) -> Tensor:
    return value.index_select(dim, entries.to(value.device)).contiguous()


def flatten(moments: Moments) -> dict[str, Tensor]:
    """As one table, for a safetensors file."""
    return {f"{name}|{what}": t for name, of in moments.items() for what, t in of.items()}


def unflatten(tensors: Iterable[tuple[str, Tensor]]) -> Moments:
    """Undo `flatten`."""
    moments: Moments = {}
    for key, tensor in tensors:
        name, what = key.rsplit("|", 1)
        moments.setdefault(name, {})[what] = tensor
    return moments
