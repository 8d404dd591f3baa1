"""What methods have in common that cut to a uniform shape: one size for each kind of unit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ..allocate.shapes import SHAPE_NAMES, ShapeLimits, Shapes, parse_shape
from ..errors import InvalidSettings
from ..limits import ShareBelowOne
from ..model.anatomy import Anatomy
from ..model.axes import CUTS, NEURONS
from ..settings import CutName, PruneSettings

CAN_CUT = frozenset({"neurons", "kv-groups", "query-heads", "hidden", "layers"})


def _checked(text: str) -> str:
    parse_shape(text)
    return text


class ShapedSettings(PruneSettings):
    """How a shape is named, or searched."""

    cut: Annotated[
        tuple[CutName, ...],
        Field(min_length=1, description="What the search may cut; neurons have to be among it."),
    ] = ("neurons", "query-heads", "hidden", "layers")
    layout: Annotated[Literal["uniform"], Field(description="All layers stay alike.")] = "uniform"
    shape: Annotated[
        str,
        AfterValidator(_checked),
        Field(
            description="Sizes to cut to, some or all of " + ", ".join(SHAPE_NAMES) + ", such as "
            "hidden=512,layers=24; those not named are searched, and the MLP width meets the "
            "target.",
        ),
    ] = ""
    max_width_pruning: Annotated[
        ShareBelowOne, Field(description="Share of a width that the search may cut.")
    ] = 0.4
    max_depth_pruning: Annotated[
        ShareBelowOne, Field(description="Share of the layers that the search may drop.")
    ] = 0.2


def shapes_for(settings: Any, anatomy: Anatomy, target: int) -> Shapes:
    """The shapes of this model that the settings allow. Raises unless one of them is of exactly the
    target's size."""
    method = settings.method
    for name in settings.cut:
        if name not in CAN_CUT:
            raise InvalidSettings(f"cut: {method} cuts {', '.join(sorted(CAN_CUT))}; got {name}.")
    if "neurons" not in settings.cut:
        raise InvalidSettings(
            f"cut: {method} meets the target with the MLP width; got "
            f"{', '.join(settings.cut)}. Add neurons."
        )
    if settings.protect_layers:
        raise InvalidSettings(
            f"{method} cuts every layer alike, so protect_layers must be empty; got "
            f"{list(settings.protect_layers)}."
        )
    shapes = Shapes.of(anatomy, _limits(settings))
    largest = anatomy.parameters_of_layers
    shapes.fitting(target, sorted(range(len(largest)), key=lambda i: -largest[i]))
    return shapes


def size_of_shape(settings: Any, anatomy: Anatomy) -> int | None:
    """What a model of a shape with an MLP width has of what targets limit; kinds that it does not
    name stay whole."""
    if "intermediate" not in parse_shape(settings.shape):
        return None
    shapes = Shapes.of(anatomy, _limits(settings))
    shape = {**shapes.whole, **shapes.pinned()}
    if NEURONS not in shapes.whole:
        return None
    return anatomy.cost.total(shapes.sizes(shape, range(len(anatomy.layers))))


def _limits(settings: Any) -> ShapeLimits:
    return ShapeLimits(
        frozenset(kind for name in settings.cut for kind in CUTS[name]),
        settings.shape,
        settings.multiple,
        settings.max_width_pruning,
        settings.max_depth_pruning,
    )
