"""What a target limits: parameters, or another thing that a model takes less of when axes shrink.

A *resource* counts itself in any model; what it counts there is an exact *cost* over the sizes of
the axes. Bytes of a file and time are resources, too: `export.size` and `latency.cost`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InvalidTarget
from .axes import ATTENTION, KV_GROUPS, LAYERS, AxisKey
from .counting import ParameterCount

if TYPE_CHECKING:
    from .anatomy import Anatomy


class Cost(Protocol):
    """What a model takes of a resource, in whole numbers, if its axes have given sizes."""

    outside: int
    """Of it outside the decoder layers, as the model is."""

    def total(self, sizes: Mapping[AxisKey, int]) -> int:
        """Of the whole model; axes that `sizes` does not name stay as they are."""
        ...

    def touching(self, keys: Sequence[AxisKey], sizes: Mapping[AxisKey, Any]) -> Any:
        """Of all that depends on any of the axes. `sizes` names all axes; where it holds a tensor
        of sizes to try, as the result is one of costs."""
        ...


class Resource(Protocol):
    """What a target can limit."""

    name: str
    """In the plural, as in "350M parameters"."""

    def of(self, anatomy: Anatomy) -> Cost:
        """Count it in a model. Raises UnsupportedModel where that cannot be done."""
        ...

    def written(self, amount: float) -> str:
        """An amount as people write it, with its unit."""
        ...

    def goal(self, amount: int) -> dict[str, Any]:
        """What `prune` is told to reach an amount, by name."""
        ...


class Parameters:
    """Parameters of the whole model, tied ones counted once."""

    name = "parameters"

    def of(self, anatomy: Anatomy) -> ParameterCount:
        return anatomy.count

    def written(self, amount: float) -> str:
        return f"{amount:,.0f} parameters"

    def goal(self, amount: int) -> dict[str, Any]:
        return {"params": amount}


PARAMETERS = Parameters()
CACHED = 2
"""Bytes of a cached value: float16 in llama.cpp, float16 or bfloat16 elsewhere."""


class CacheBytes:
    """Bytes that the KV cache grows by with every token of a sequence, in 16-bit precision."""

    name = "bytes of KV cache per token"

    def of(self, anatomy: Anatomy) -> _CacheCost:
        return _CacheCost(anatomy)

    def written(self, amount: float) -> str:
        return f"{amount:,.0f} {self.name}"

    def goal(self, amount: int) -> dict[str, Any]:
        return {"kv_bytes": amount}


class _CacheCost:
    """A key and a value of the head's size for every KV group of the layers that attend."""

    outside = 0

    def __init__(self, anatomy: Anatomy):
        self.sizes = anatomy.sizes
        groups = anatomy.of_kinds({KV_GROUPS})
        if not groups:
            raise InvalidTarget(
                "The KV heads of this model cannot be cut, so its cache stays as it is. Name a "
                "target of another kind."
            )
        self.per_group = {axis.layer: 2 * CACHED * axis.grain for axis in groups}

    def total(self, sizes: Mapping[AxisKey, int]) -> int:
        return self.touching((), {**self.sizes, **sizes})

    def touching(self, keys: Sequence[AxisKey], sizes: Mapping[AxisKey, Any]) -> Any:
        there = {
            layer: sizes.get((layer, LAYERS), 1) * sizes.get((layer, ATTENTION), 1)
            for layer in self.per_group
        }
        return sum(
            count * sizes[layer, KV_GROUPS] * there[layer]
            for layer, count in self.per_group.items()
        )
