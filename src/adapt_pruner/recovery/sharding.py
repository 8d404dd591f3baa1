"""FSDP2: weights, gradients and moments spread over processes while a phase trains.

Before and after a phase every process has the whole model, because a cut needs all of it; moments
are whole only on the first process, in the memory of its CPU.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..model.anatomy import find_anatomy
from .moments import Moments


def shard(model: Any, mixed_precision: str) -> nn.Module:
    """Shard layer by layer, in place, over all processes."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    compute = torch.bfloat16 if mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for layer in find_anatomy(model).layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def read_weights(model: nn.Module, everywhere: bool) -> dict[str, Tensor]:
    """Whole weights: on every process, on its device, or on the first alone, in the memory of its
    CPU. All processes call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
    found: Any = get_model_state_dict(model, options=options)
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def gather_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
    """Whole moments, on the first process. All processes call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    on_cpu = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: Any = get_optimizer_state_dict(model, optimizer, options=on_cpu)
    return dict(found.get("state", {}))


def scatter_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Spread the moments that the first process has. All processes call it."""
    from torch.distributed import broadcast_object_list
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    any_there = [bool(moments)]
    broadcast_object_list(any_there, src=0)
    if not any_there[0]:
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups
    ]
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state: Any = {"state": moments, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, state, options=options)


def without_weights(model: nn.Module) -> Any:
    """A copy of the model whose weights are on `meta`. Make it before sharding, which cannot be
    undone on a model."""
    empty = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo=dict(empty))


def with_weights(plain: Any, weights: dict[str, Tensor]) -> Any:
    """Fill what `without_weights` gave; the tensors become its own."""
    for name, parameter in dict(plain.named_parameters()).items():
        own = nn.Parameter(weights[name], parameter.requires_grad)
        torch.utils.swap_tensors(parameter, own)  # where weights are tied, all of them
    return plain


def whole(value: Any) -> Any:
    """A scalar that may be spread over processes, as a plain tensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
