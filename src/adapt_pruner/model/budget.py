"""How the parameters of a model are spread over its parts."""

from __future__ import annotations

from typing import Any

from .anatomy import Anatomy


def parameters_by_part(anatomy: Anatomy) -> dict[str, int]:
    """Parameters of the embeddings, attention, MLPs, norms, others and head; tied ones count as
    embeddings. Parts that a model does not have are left out."""
    model: Any = anatomy.model
    architecture = anatomy.architecture
    prefixes = {f"{architecture.mlp}.": "MLP", f"{architecture.attention}.": "attention"}
    head = model.get_output_embeddings()
    owners = {id(p): "head" for p in (head.parameters() if head is not None else ())}
    owners[id(model.get_input_embeddings().weight)] = "embeddings"
    parts = ("embeddings", "attention", "MLP", "norms", "others", "head")
    budget: dict[str, int] = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        inside = name.removeprefix(architecture.layers).lstrip(".0123456789")
        part = owners.get(id(parameter)) or next(
            (part for prefix, part in prefixes.items() if inside.startswith(prefix)),
            "norms" if "norm" in name else "others",
        )
        budget[part] += parameter.numel()
    return {part: count for part, count in budget.items() if count}
