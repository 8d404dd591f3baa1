"""Time as what targets limit: exact whole nanoseconds over the sizes of the axes.

Times are made monotone first, so that a smaller width never costs more than a larger one. Widths
that save no time then drop out in `allocate.chains`, as rows that save no bytes do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidTarget
from ..figures import in_ms
from ..model.anatomy import Anatomy
from ..model.axes import (
    ATTENTION,
    HIDDEN,
    KV_GROUPS,
    LAYERS,
    MLP,
    NEURONS,
    QUERY_HEADS,
    SUBLAYERS,
    WHOLE_MODEL,
    AxisKey,
)
from .table import LatencyTable

SizesOfAxes = Mapping[AxisKey, Any]


class Latency:
    """Time per token of a decoding step, or per prompt of a prefill, as a table has it."""

    def __init__(
        self, table: LatencyTable, dense: Anatomy | None = None, file: Path | str | None = None
    ):
        """
        Args:
            dense: of the model that speed-ups are over.
            file: where the table comes from, if it was named; recipes name it again.

        Raises:
            InvalidSettings: if the table is of another model.
            InvalidTarget: if times of such models cannot be told apart.
        """
        self.table, self.file = table, file
        self.name = f"ns per {table.unit}"
        self.whole = self.of(dense).total({}) if dense else None

    def of(self, anatomy: Anatomy) -> _TimeCost:
        return _TimeCost(anatomy, self.table)

    def written(self, amount: float) -> str:
        faster = f" ({self.whole / amount:.2f} times as fast)" if self.whole and amount else ""
        return f"{amount:,.0f} {self.name}{faster}"

    def goal(self, amount: int) -> dict[str, Any]:
        table = self.table
        of_file = {"quantize": table.dtype} if table.engine == "llama.cpp" else {}
        asked = {name: getattr(table, name) for name in ASKED_OF_TABLES}
        table_of = {} if self.file is None else {"latency_table": str(self.file)}
        return {"latency": in_ms(amount / 1e6), **asked, **of_file, **table_of}


ASKED_OF_TABLES = ("stage", "batch_size", "context", "engine")


class _TimeCost:
    """See `table`."""

    def __init__(self, anatomy: Anatomy, table: LatencyTable):
        check_kind(anatomy)
        table.check_fits(anatomy)
        self.sizes, self.hidden = anatomy.sizes, anatomy.hidden_size
        self.layers = range(len(anatomy.layers))
        self.outside, self.layer_ns = round(table.outside_ns), round(table.layer_ns)
        self.has_absence = table.has_absence
        self.mlp_ns = _every_width(table.mlp_ns, table.width_block)
        self.slope = max(1, int(self.mlp_ns[-1] - self.mlp_ns[0]) // max(len(self.mlp_ns) - 1, 1))
        self.attention_ns = _every_number_of_heads(table.attention_ns)

    def total(self, sizes: Mapping[AxisKey, int]) -> int:
        sizes = {**self.sizes, **sizes}
        self._check_hidden(sizes)
        return self.outside + sum(self._layer(layer, sizes) for layer in self.layers)

    def touching(self, keys: Sequence[AxisKey], sizes: SizesOfAxes) -> Any:
        self._check_hidden(sizes)
        if any(kind in SUBLAYERS for _, kind in keys) and not self.has_absence:
            raise InvalidTarget(
                "The table has no times of layers without attention or MLP, so that sublayers "
                "cannot be cut to a target in time. Leave sublayers out of --cut."
            )
        return sum(self._layer(layer, sizes) for layer in {layer for layer, _ in keys})

    def _check_hidden(self, sizes: SizesOfAxes) -> None:
        hidden = sizes.get((WHOLE_MODEL, HIDDEN), self.hidden)
        if torch.is_tensor(hidden) or hidden != self.hidden:
            raise hidden_is_cut()

    def _layer(self, layer: int, sizes: SizesOfAxes) -> Any:
        attends = sizes.get((layer, ATTENTION), 0)
        widens = sizes.get((layer, MLP), 0)
        groups = sizes.get((layer, KV_GROUPS), len(self.attention_ns) - 1)
        heads = sizes.get((layer, QUERY_HEADS), 1 if (layer, KV_GROUPS) in sizes else -1)
        there = attends + widens - attends * widens  # a layer that has neither goes
        ns = there * self.layer_ns + attends * _at(self.attention_ns, groups, heads)
        if (layer, NEURONS) in sizes:
            ns = ns + widens * self._mlp(sizes[layer, NEURONS])
        return sizes.get((layer, LAYERS), 1) * ns

    def _mlp(self, width: Any) -> Any:
        last = len(self.mlp_ns) - 1
        if torch.is_tensor(width):
            return self.mlp_ns[width.clamp(max=last)] + (width - last).clamp(min=0) * self.slope
        return int(self.mlp_ns[min(width, last)]) + max(width - last, 0) * self.slope


def hidden_is_cut() -> InvalidTarget:
    """What to say where hidden dimensions are to go."""
    return InvalidTarget(
        "A table of times holds for one hidden size, so that hidden cannot be cut to a target in "
        "time. Leave hidden out of --cut, take another method, or give --sparsity or --params."
    )


def check_kind(anatomy: Anatomy) -> None:
    """Raise InvalidTarget for models whose times a table cannot hold."""
    model: Any = anatomy.model
    name = "num_attention_heads"
    mixed = anatomy.architecture.has_free_heads and any(name not in w for w in anatomy.widths)
    if mixed or getattr(model.config, "sliced_hidden_size", None):
        raise InvalidTarget(
            "Layers of this model are not made of attention and MLP alone, so that their times "
            "cannot be told apart. Name a target of another kind."
        )


def _at(ns_GH: Tensor, groups: Any, heads: Any) -> Any:
    found = ns_GH[groups, heads]
    return found if torch.is_tensor(groups) or torch.is_tensor(heads) else int(found)


def monotone(values: Sequence[float]) -> list[float]:
    """The ascending values nearest to those given, by least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # sum, count
    for value in values:
        total, count = float(value), 1
        while pools and pools[-1][0] * count > total * pools[-1][1]:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def _every_width(points: Sequence[tuple[int, float]], block: int) -> Tensor:
    """(W + 1,) int64 nanoseconds of every width up to the largest, filled up to whole blocks."""
    there = [(width, ns) for width, ns in points if width]
    widths, times = zip(*there, strict=True)
    every = np.arange(widths[-1] + 1)
    padded = np.minimum(-(-every // block) * block, widths[-1])
    ns = np.interp(padded, widths, monotone(times))
    return torch.from_numpy(np.rint(ns).astype(np.int64))


def _every_number_of_heads(points: Sequence[tuple[int, int, float]]) -> Tensor:
    """(G + 1, H + 1) int64 nanoseconds of every number of KV groups and of heads in each."""
    times = {(groups, heads): ns for groups, heads, ns in points if groups}
    groups, heads = (sorted({pair[i] for pair in times}) for i in (0, 1))
    of_heads = []
    for number in heads:
        column = np.array(monotone([times[group, number] for group in groups]))
        of_heads.append(np.maximum(column, of_heads[-1]) if of_heads else column)
    every_group, every_head = np.arange(groups[-1] + 1), np.arange(heads[-1] + 1)
    dense_HG = np.stack([np.interp(every_group, groups, column) for column in of_heads])
    ns_GH = np.stack([np.interp(every_head, heads, row) for row in dense_HG.T])
    return torch.from_numpy(np.rint(ns_GH).astype(np.int64))
