"""What a model consists of, and what could be cut out of it, from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .allocate.chains import Limits
from .allocate.target import resolve_target, smallest_size
from .model.anatomy import Anatomy, find_anatomy
from .model.axes import KV_GROUPS
from .model.budget import parameters_by_part

SPARSITIES = tuple(tenth / 10 for tenth in range(1, 9))


@dataclass(frozen=True)
class Units:
    """Units of one kind of axis."""

    kind: str
    """As in `--cut`; attention and mlp are the sublayers."""
    total: int
    """In all layers."""
    smallest_cost: int
    """Parameters of one, in the layer where it has fewest."""
    largest_cost: int


@dataclass(frozen=True)
class Target:
    """What a sparsity of the decoder layers means for the whole model."""

    sparsity: float
    parameters: int
    """At most so many are left; a run meets it to within one unit."""
    is_possible: bool


@dataclass(frozen=True)
class Inspection:
    """All counts are of parameters, tied ones counted once."""

    model_type: str
    dtype: str
    """As stored."""
    hidden_size: int
    vocabulary: int
    context: int | None
    """Tokens that the model reads at most."""
    is_tied: bool
    """Whether the head shares the weights of the input embeddings."""
    total: int
    decoder_layers: int
    budget: dict[str, int]
    """Parameters per part; they add up to `total`."""
    units: list[Units]
    widths: list[dict[str, int]]
    """Per decoder layer; empty for one without attention or MLP that can be cut."""
    kv_entries_per_token: int | None
    """Numbers that the cache holds per token; None where attention is not known."""
    smallest: int
    """Parameters with every layer at its smallest width."""
    targets: list[Target]

    @property
    def largest_sparsity(self) -> float:
        return (self.total - self.smallest) / self.decoder_layers

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_model(model: Any) -> Inspection:
    """Inspect a causal language model on any device, `meta` included. Changes nothing.

    Raises:
        UnsupportedModel: if it cannot be pruned.
    """
    anatomy = find_anatomy(model)
    config = model.config
    smallest = smallest_size(anatomy, Limits())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    sizes = {s: resolve_target(anatomy, s, None) for s in SPARSITIES}
    return Inspection(
        model_type=config.model_type,
        dtype=str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch."),
        hidden_size=config.hidden_size,
        vocabulary=embedding.shape[0],
        context=getattr(config, "max_position_embeddings", None),
        is_tied=head is not None and head.weight is embedding,
        total=anatomy.total_parameters,
        decoder_layers=anatomy.layer_parameters,
        budget=parameters_by_part(anatomy),
        units=[units for kind in _kinds(anatomy) for units in _units(anatomy, kind)],
        widths=anatomy.widths,
        kv_entries_per_token=_kv_entries(anatomy),
        smallest=smallest,
        targets=[Target(s, size, size >= smallest) for s, size in sizes.items()],
    )


def _kinds(anatomy: Anatomy) -> list[str]:
    return list(dict.fromkeys(axis.kind for axis in anatomy.axes))


def _units(anatomy: Anatomy, kind: str) -> list[Units]:
    axes = anatomy.of_kinds({kind})
    costs = [axis.unit_cost for axis in axes]
    total = sum(axis.num_units for axis in axes)
    return [Units(kind, total, min(costs), max(costs))] if axes else []


def _kv_entries(anatomy: Anatomy) -> int | None:
    """Keys and values of one token, over all layers that attend."""
    groups = anatomy.of_kinds({KV_GROUPS})
    if not groups:
        return None
    entries = 0
    for axis in groups:
        assert axis.output is not None
        widths = anatomy.widths[axis.layer]
        head_dim = axis.output.tensor.shape[1] // widths["num_attention_heads"]
        entries += 2 * axis.num_units * head_dim
    return entries
