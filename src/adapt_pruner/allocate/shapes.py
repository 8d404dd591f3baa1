"""Uniform shapes: one size for each kind of axis, the same in every layer.

Where axes share tensors (hidden dimensions times widths) no ranking of single units meets a size; a
shape is chosen, and the finest of its sizes, the MLP width, then meets the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product

import torch

from ..errors import InvalidSettings, InvalidTarget, near_match, shown
from ..model.anatomy import Anatomy
from ..model.axes import (
    HIDDEN,
    KV_GROUPS,
    LAYERS,
    NEURONS,
    QUERY_HEADS,
    Axis,
    AxisKey,
    heads_fit,
)
from ..model.edits import Keep
from .chains import Scores

Shape = dict[str, int]
"""Kind of axis -> size: layers in all, hidden dimensions, and of each layer neurons, KV groups, and
query heads per group."""
SHAPE_NAMES = {
    "hidden": HIDDEN,
    "layers": LAYERS,
    "intermediate": NEURONS,
    "kv-heads": KV_GROUPS,
    "heads": QUERY_HEADS,
}
"""What users call the parts of a shape -> kind of axis."""


def parse_shape(text: str) -> dict[str, int]:
    """Read `hidden=512,layers=24` into sizes by name. Raises ValueError."""
    sizes = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = part.partition("=")
        if name not in SHAPE_NAMES:
            hint, known = near_match(name[:100], SHAPE_NAMES), ", ".join(SHAPE_NAMES)
            raise ValueError(f"there is no {shown(name)} in a shape.{hint} Known: {known}")
        if not size.isdecimal() or len(size) > 9 or int(size) < 1:
            raise ValueError(f"{shown(part)} is no size; a shape reads hidden=512,layers=24")
        sizes[name] = int(size)
    return sizes


@dataclass(frozen=True)
class ShapeLimits:
    """Which shapes may be chosen."""

    kinds: frozenset[str]
    """Kinds of axes whose size may be searched; others stay whole, unless they are named."""
    named: str = ""
    """Sizes that are given, as `parse_shape` reads them."""
    multiple: int = 1
    """The hidden size and the MLP width become multiples of this."""
    max_width_pruning: float = 0.4
    """Share of a width that a search may cut."""
    max_depth_pruning: float = 0.2
    """Share of the layers that a search may drop."""


@dataclass(frozen=True)
class Shapes:
    """The uniform shapes that a model of equal layers can be cut to."""

    anatomy: Anatomy
    limits: ShapeLimits
    whole: Mapping[str, int]
    """The shape that the model has now."""

    @classmethod
    def of(cls, anatomy: Anatomy, limits: ShapeLimits) -> Shapes:
        """Raises InvalidTarget if layers differ in width."""
        whole = {LAYERS: len(anatomy.layers)}
        for kind in (HIDDEN, NEURONS, KV_GROUPS, QUERY_HEADS):
            sizes = {axis.size for axis in anatomy.of_kinds({kind})}
            if len(sizes) > 1:
                raise InvalidTarget(
                    f"A uniform shape needs layers of equal {kind} to start from; got "
                    f"{sorted(sizes)}. Take another method."
                )
            if sizes:
                whole[kind] = sizes.pop()
        return cls(anatomy, limits, whole)

    def sizes(self, shape: Mapping[str, int], order: Sequence[int]) -> dict[AxisKey, int]:
        """Sizes of all axes; `order` names the layers, the first to go first."""
        gone = set(order[: self.whole[LAYERS] - shape[LAYERS]])
        sizes = {}
        for axis in self.anatomy.of_kinds(shape):
            sizes[axis.key] = shape[axis.kind] if axis.kind != LAYERS else axis.layer not in gone
        return {key: int(size) for key, size in sizes.items()}

    def fitting(self, target: int, order: Sequence[int]) -> list[Shape]:
        """The shapes that meet the target, within less than one neuron of every layer.

        Raises:
            InvalidSettings: if the settings name a shape that this model does not have.
            InvalidTarget: if there is none.
        """
        choices = self._choices()
        found = []
        for sizes in product(*choices.values()):
            shape = dict(zip(choices, sizes, strict=True))
            heads = shape.get(KV_GROUPS, 0) * shape.get(QUERY_HEADS, 1)
            is_cut = any(shape[kind] < self.whole[kind] for kind in shape if kind != LAYERS)
            if heads and is_cut and not heads_fit(shape.get(HIDDEN, heads), heads):
                continue  # the configuration of a uniform model could not say so
            found += self._with_neurons(shape, target, order)
        if not found:
            self._refuse(target, order)
        return found

    def _choices(self) -> dict[str, list[int]]:
        """Per kind but neurons, the sizes to try, descending."""
        pinned, limits = self.pinned(), self.limits
        choices = {}
        for kind, whole in self.whole.items():
            if kind == NEURONS:
                continue
            bound = limits.max_depth_pruning if kind == LAYERS else limits.max_width_pruning
            smallest = max(1, round(whole * (1 - bound)))
            if kind in pinned:
                choices[kind] = [pinned[kind]]
            elif kind not in limits.kinds:
                choices[kind] = [whole]
            elif kind == HIDDEN:
                step = limits.multiple * -(-whole // (32 * limits.multiple))
                grid = range(whole // step * step, smallest - 1, -step)
                choices[kind] = list(dict.fromkeys([whole, *grid]))
            else:
                choices[kind] = list(range(whole, smallest - 1, -1))
        return choices

    def pinned(self) -> dict[str, int]:
        """The sizes that the settings name, by kind of axis."""
        named = parse_shape(self.limits.named)
        heads = named.pop("heads", None)
        pinned = {SHAPE_NAMES[name]: size for name, size in named.items()}
        if heads is not None:
            groups = pinned.setdefault(KV_GROUPS, self.whole.get(KV_GROUPS, 1))
            if QUERY_HEADS not in self.whole and "kv-heads" not in named:
                groups = pinned[KV_GROUPS] = heads  # every head has keys of its own
            if heads % groups:
                raise InvalidSettings(
                    f"shape: heads must be a multiple of the {groups} KV heads; got {heads}."
                )
            pinned[QUERY_HEADS] = heads // groups
        for kind, size in pinned.items():
            whole = self.whole.get(kind, 1 if kind == QUERY_HEADS else 0)
            if size > whole:
                factor = pinned.get(KV_GROUPS, 1) if kind == QUERY_HEADS else 1
                name = next(name for name, of in SHAPE_NAMES.items() if of == kind)
                raise InvalidSettings(
                    f"shape: this model has {name}={whole * factor}"
                    f"{' that can be cut' if not whole else ''}; got {size * factor}."
                )
        return {kind: size for kind, size in pinned.items() if kind in self.whole}

    def _with_neurons(self, shape: Shape, target: int, order: Sequence[int]) -> Iterator[Shape]:
        """Add the widest MLP that stays at or below the target, if that meets it."""
        whole, multiple = self.whole[NEURONS], self.limits.multiple
        smallest = max(1, round(whole * (1 - self.limits.max_width_pruning)))

        def cost(width: int) -> int:
            return self.anatomy.cost.total(self.sizes({**shape, NEURONS: width}, order))

        width = self.pinned().get(NEURONS)
        if width is None:
            each = (cost(2 * whole) - cost(whole)) / whole  # bytes come in blocks
            width = min(whole, whole + int((target - cost(whole)) // each))
            width -= width % multiple if width < whole else 0
            while width > 0 and cost(width) > target:
                width -= multiple
            while width + multiple <= whole and cost(width + multiple) <= target:
                width += multiple
            if width < smallest:
                return
        more = next(found for n in count(1) if (found := cost(width + n * multiple)) > cost(width))
        if cost(width) <= target < more:
            yield {**shape, NEURONS: width}

    def _refuse(self, target: int, order: Sequence[int]) -> None:
        pinned = self.pinned()
        if pinned.keys() >= self.whole.keys() - {QUERY_HEADS}:
            shape = {**self.whole, **pinned}
            has = self.anatomy.resource.written(self.anatomy.cost.total(self.sizes(shape, order)))
            raise InvalidTarget(
                f"The shape {self.limits.named} has {has}, and the target is {target:,}. Name that "
                "many as the target, or leave intermediate out of the shape."
            )
        raise InvalidTarget(
            f"No uniform shape within the limits has {self.anatomy.resource.written(target)}. Name "
            "another target, allow more with --max-width-pruning and --max-depth-pruning, or name "
            "a --shape."
        )


def keep_of(axes: Sequence[Axis], scores: Scores, sizes: Mapping[AxisKey, int]) -> Keep:
    """Masks of the axes that lose units: of every stratum the highest scores stay."""
    keep = {}
    for axis in axes:
        size = sizes[axis.key]
        if size < axis.size:
            score = scores[axis.key].cpu().view(axis.strata, axis.size)
            order = score.argsort(dim=1, descending=True, stable=True)[:, :size]
            mask = torch.zeros(axis.strata, axis.size, dtype=torch.bool)
            keep[axis.key] = mask.scatter_(1, order, True).flatten()
    return keep
