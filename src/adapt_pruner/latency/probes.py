"""The models that are timed: one with random weights, and others cut from it that share its memory.

Times do not depend on what the weights are, so nothing is read but the configuration. A narrower
matrix is the beginning of the wider one's memory, contiguous as in a model of its own, so that any
number of models takes the memory of one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, initialization

from ..model.anatomy import Anatomy, find_anatomy
from ..model.axes import (
    ATTENTION,
    KV_GROUPS,
    LAYERS,
    MLP,
    NEURONS,
    QUERY_HEADS,
    Axis,
    AxisKey,
)
from ..model.configuring import drop_layers_of_config
from ..model.edits import Cut
from .multiples import odd_widths
from .table import heads_per_group

LARGEST = 1_000_000_000
"""Bytes of decoder layers that are timed: of a larger model fewer layers, which are alike."""
FEWEST = 4
SIXTEENTHS = (1, 4, 8, 10, 12, 14)
"""Of an MLP's width that are timed, besides all of it."""
MOST_GROUPS = 4
"""Numbers of KV groups that are timed."""

Probe = tuple[Any, ...]
"""What is cut: ("mlp", width), ("odd", width), ("attention", groups, heads of each), ("without",
"mlp" or "attention"), ("layers", how many stay)."""


def random_model(config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model of a configuration, in evaluation mode, with weights that nobody has trained."""
    with initialization.no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    values = 0.02 * torch.randn(2**20 - 1, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            flat = parameter.data.view(-1)
            for start in range(0, flat.numel(), len(values)):
                part = flat[start : start + len(values)]
                part.copy_(values[: len(part)])
    return model.requires_grad_(False).to(device).eval()


def equal_layers(anatomy: Anatomy, dtype: torch.dtype) -> Any:
    """The configuration of a model whose layers all have the largest widths of the one given, and
    of no more layers than are to be timed."""
    model: Any = anatomy.model
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    most = max(anatomy.parameters_of_layers) * dtype.itemsize
    count = len(anatomy.layers)
    kept = min(count, max(FEWEST, LARGEST // max(most, 1)))
    is_uneven = getattr(config, "is_heterogeneous", False)
    if is_uneven or kept < count:
        drop_layers_of_config(config, set(range(kept, count)))
    if is_uneven:
        widths = anatomy.widths
        largest = {"intermediate_size": max(of.get("intermediate_size", 0) for of in widths)}
        if anatomy.architecture.has_free_heads:
            groups = max(of["num_key_value_heads"] for of in widths)
            largest["num_key_value_heads"] = groups
            largest["num_attention_heads"] = groups * max(map(heads_per_group, widths))
        config.allow_global_per_layer_attribute_access = True
        config.per_layer_config = {i: dict(largest) for i in range(kept)}
    return config


def probes_of(anatomy: Anatomy, with_odd: bool) -> list[Probe]:
    """What to time of a model of equal layers, besides itself; odd widths if they are asked for."""
    sizes = {axis.kind: axis.size for axis in anatomy.axes}
    width, layers = sizes[NEURONS], len(anatomy.layers)
    step = next((s for s in (256, 64, 32, 8) if width >= 8 * s), 1)
    some = {max(1, round(width * part / 16 / step) * step) for part in SIXTEENTHS}
    found: list[Probe] = [("mlp", each) for each in sorted(some) if each < width]
    if with_odd:
        found += [("odd", each) for each in odd_widths(width)]
    groups, heads = sizes.get(KV_GROUPS, 1), sizes.get(QUERY_HEADS, 1)
    if KV_GROUPS in sizes:
        numbers = {max(1, round(groups * i / MOST_GROUPS)) for i in range(1, MOST_GROUPS + 1)}
        each = [(g, h) for g in sorted(numbers | {1}) for h in sorted({1, heads})]
        found += [("attention", *pair) for pair in each if pair != (groups, heads)]
    if layers > 1:
        found.append(("layers", 1))
    return [*found, ("without", ATTENTION), ("without", MLP)]


@contextmanager
def cut_to(model: Any, probe: Probe) -> Iterator[Any]:
    """A model that is cut from `model`, which stays as it is; both share their memory."""
    memo = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    whole = {id(copied): original for copied, original in zip(
        memo.values(), model.parameters(), strict=True)}  # fmt: skip
    smaller = copy.deepcopy(model, memo)
    anatomy = find_anatomy(smaller)
    Cut(
        {axis.key: mask for axis in anatomy.axes if (mask := _mask(axis, probe)) is not None}
    ).apply(smaller)
    for parameter in smaller.parameters():
        memory = whole[id(parameter)].data.view(-1)
        parameter.data = memory[: parameter.numel()].view(parameter.shape)
    yield smaller


def _mask(axis: Axis, probe: Probe) -> torch.Tensor | None:
    kept = _kept(axis.key, probe)
    if kept is None:
        return None
    mask = torch.arange(axis.size) < kept
    return mask.repeat(axis.strata)


def _kept(key: AxisKey, probe: Probe) -> int | None:
    """How many units of an axis stay, of each stratum; None: all."""
    layer, kind = key
    what, *sizes = probe
    if what in ("mlp", "odd"):
        return sizes[0] if kind == NEURONS else None
    if what == "attention":
        of_kind: Mapping[str, int] = {KV_GROUPS: sizes[0], QUERY_HEADS: sizes[1]}
        return of_kind.get(kind)
    if what == "layers":
        return int(layer < sizes[0]) if kind == LAYERS else None
    return 0 if kind == sizes[0] else None
