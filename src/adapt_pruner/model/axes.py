"""Find what can be cut out of a model.

An *axis* is something of which a model can have fewer, and its *units* are what it can have fewer
of: the neurons of an MLP, the KV groups of an attention, the query heads inside them, the hidden
dimensions of the whole model; a decoder layer, its attention and its MLP are axes of one unit.
Where units of an axis lie along a side of a tensor is a *slot*. Toy example, a layer with hidden
size 4, two query heads on each of two KV heads of size 2, and an MLP of 3 neurons:

    kv-groups, 2 units                 query-heads, 4 units       neurons, 3 units
      q_proj rows    [0 1 2 3] [4 5 6 7]  [0 1] [2 3] [4 5] [6 7]   gate_proj rows    [0] [1] [2]
      k_proj rows    [0 1] [2 3]                                    up_proj rows      [0] [1] [2]
      v_proj rows    [0 1] [2 3]                                    down_proj columns [0] [1] [2]
      o_proj columns [0 1 2 3] [4 5 6 7]  [0 1] [2 3] [4 5] [6 7]

A KV group is a key/value head with *its own* query heads, the n_rep consecutive ones that attention
reads with it. Query heads leave every group at once, so that a layer stays an ordinary one: their
axis has as many *strata* as there are groups, and its size is the number of heads in each.

Shape suffixes used throughout the package: B windows, T tokens, D hidden size, U units of an axis,
K entries that one unit has along one side of a tensor, C columns of an output projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

AxisKey = tuple[int, str]
"""Decoder layer and kind of an axis."""
WHOLE_MODEL = -1
"""Stands for the layer of an axis that all layers share."""

KV_GROUPS, QUERY_HEADS, NEURONS = "kv-groups", "query-heads", "neurons"
ATTENTION, MLP, LAYERS, HIDDEN = "attention", "mlp", "layers", "hidden"
SUBLAYERS = (ATTENTION, MLP)
CUTS: dict[str, frozenset[str]] = {
    "neurons": frozenset({NEURONS}),
    "kv-groups": frozenset({KV_GROUPS}),
    "query-heads": frozenset({QUERY_HEADS}),
    "hidden": frozenset({HIDDEN}),
    "layers": frozenset({LAYERS}),
    "sublayers": frozenset(SUBLAYERS),
}
"""What users say can be cut -> the kinds of axes that it means."""
WIDTH_NAMES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
WIDTH_OF = {KV_GROUPS: "num_key_value_heads", NEURONS: "intermediate_size"}
"""Kind of axis -> the configuration's name for the number of its units."""


@dataclass
class Slot:
    """The entries along one side of one tensor that belong to the units of an axis."""

    module: nn.Module
    name: str
    """Name of the tensor inside `module`: "weight" or "bias"."""
    path: str
    """Name of the module inside the decoder layer, such as "mlp.up_proj", or in the model."""
    dim: int
    """Side that is cut: 0 rows (outputs), 1 columns (inputs)."""
    index_UK: Tensor
    """(U, K) int64, positions along `dim` that belong to each unit."""

    @property
    def tensor(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    @property
    def cost(self) -> int:
        """Parameters that one unit has here."""
        tensor = self.tensor
        return self.index_UK.shape[1] * (tensor.numel() // max(side(tensor, self.dim), 1))

    def per_unit(self, values: Tensor) -> Tensor:
        """Sum `values`, shaped like the tensor, over the entries of each unit. Returns (U,)."""
        other = [d for d in range(values.dim()) if d != self.dim]
        along = values.sum(dim=other) if other else values
        return along[self.index_UK.to(along.device)].sum(dim=1)


@dataclass(frozen=True)
class Site:
    """A place where the activations of an axis's units pass, and can be watched or silenced.

    A unit adds to the residual stream at all its sites together.
    """

    module: nn.Module
    at: str
    """ "input" or "output" of the module."""
    index_UK: Tensor | None
    """(U, K) positions along the last dimension; None: all of them are one unit's."""


@dataclass
class Axis:
    """Something of which a model can have fewer, with the tensors that it runs through."""

    layer: int
    """Decoder layer, or WHOLE_MODEL."""
    kind: str
    num_units: int
    slots: list[Slot]
    sites: list[Site]
    strata: int = 1
    """Equal parts of the units, in order, each of which gives up as many as the others."""
    grain: int = 1
    """Entries of one unit that a sparsity is counted in: the head size, for heads."""
    output: Slot | None = None
    """Where units are columns of an output projection (o_proj, down_proj); also in `slots`."""

    @property
    def size(self) -> int:
        """Units of one stratum: what `Anatomy.parameters` counts with."""
        return self.num_units // self.strata

    @property
    def unit_cost(self) -> int:
        """Parameters that one unit costs now, biases included, while other axes stay whole."""
        return sum(slot.cost for slot in self.slots)

    @property
    def device(self) -> torch.device:
        return self.slots[0].tensor.device

    @property
    def key(self) -> AxisKey:
        return self.layer, self.kind

    @property
    def projection(self) -> AxisKey:
        """Layer and path of the output projection, which axes share; or the axis itself."""
        return (self.layer, self.output.path) if self.output else self.key

    @property
    def is_presence(self) -> bool:
        """Whether this is a part of the model that is there or not, instead of a width of it."""
        return self.kind in (ATTENTION, MLP, LAYERS)

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}" if self.layer >= 0 else self.kind


def parts_of_layers(axes: Sequence[Axis]) -> dict[int, list[Axis]]:
    """Decoder layer -> its sublayers that are still there, all of which are axes: a layer that
    loses the last of them is dropped. One that does something else besides is left out."""
    parts: dict[int, list[Axis]] = {}
    for axis in axes:
        if axis.kind in SUBLAYERS:
            parts.setdefault(axis.layer, []).append(axis)
    writers = {axis.layer: len(axis.sites) for axis in axes if axis.kind == LAYERS}
    return {layer: of for layer, of in parts.items() if len(of) == writers.get(layer)}


def side(tensor: Tensor, dim: int) -> int:
    """Length of a side; a tensor of no dimensions has one of length 1."""
    return tensor.shape[dim] if tensor.dim() else 1


def heads_fit(hidden_size: int, num_heads: int) -> bool:
    """Whether every configuration class accepts this head count for the whole model: several want
    it to divide the hidden size, although the head size is said explicitly."""
    return num_heads > 0 and hidden_size % num_heads == 0
