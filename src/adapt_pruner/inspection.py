"""What a model consists of, and what could be cut out of it, from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .allocate.chains import Limits, resolve_target, smallest_size
from .model.anatomy import ATTENTION, MLP, Anatomy, find_anatomy

SPARSITIES = tuple(tenth / 10 for tenth in range(1, 9))


@dataclass(frozen=True)
class Units:
    """Units of one kind: KV groups with their query heads, or neurons."""

    kind: str
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
        budget=_budget(model, anatomy),
        units=[units for kind in (ATTENTION, MLP) for units in _units(anatomy, kind)],
        widths=anatomy.widths,
        kv_entries_per_token=_kv_entries(anatomy),
        smallest=smallest,
        targets=[Target(s, size, size >= smallest) for s, size in sizes.items()],
    )


def _budget(model: Any, anatomy: Anatomy) -> dict[str, int]:
    architecture = anatomy.architecture
    mlp = architecture.mlp_output.split(".")[0]
    prefixes = {f"{architecture.attention}.": "attention", f"{mlp}.": "MLP"}
    head = model.get_output_embeddings()
    owners = {id(p): "head" for p in (head.parameters() if head is not None else ())}
    owners[id(model.get_input_embeddings().weight)] = "embeddings"
    parts = ("embeddings", "attention", "MLP", "norms", "others", "head")
    budget: dict[str, int] = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        inside = name.removeprefix(architecture.layers).lstrip(".0123456789")
        part = owners.get(id(parameter)) or next(
            (part for prefix, part in prefixes.items() if inside.startswith(prefix)),
            # What else there is in a layer is never cut: convolutions, GPT-NeoX's attention.
            "norms" if "norm" in name else "others",
        )
        budget[part] += parameter.numel()
    return {part: count for part, count in budget.items() if count}


def _units(anatomy: Anatomy, kind: str) -> list[Units]:
    groups = [group for group in anatomy.groups if group.kind == kind]
    costs = [group.unit_cost for group in groups]
    total = sum(group.num_units for group in groups)
    return [Units(kind, total, min(costs), max(costs))] if groups else []


def _kv_entries(anatomy: Anatomy) -> int | None:
    """Keys and values of one token, over all layers that attend."""
    groups = [group for group in anatomy.groups if group.kind == ATTENTION]
    entries = (2 * group.output.tensor.shape[1] // group.heads_per_unit for group in groups)
    return sum(entries) if groups else None
