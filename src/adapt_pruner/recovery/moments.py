"""What AdamW remembers of each weight, carried over a cut.

Moments are tensors by parameter name, shaped like the parameter, plus the number of steps taken:
`{"model.layers.0.mlp.up_proj.weight": {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}}`.
An edit of the model takes them along (`Edit.follow`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..model.edits import Moments


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
