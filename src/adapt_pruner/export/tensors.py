"""The tensors of a GGUF file: their names and shapes, and how each is made from the model's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import gguf
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UnsupportedModel
from .architectures import GgufArchitecture
from .layout import FileLayer, Layout
from .rope import rope_factors
from .weights import Weights

BLOCK_NAME = re.compile(r"blk\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file. Its values are made when they are asked for."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def row_length(self) -> int:
        return self.shape[-1]

    def then(self, step: Callable[[Tensor], Tensor]) -> FileTensor:
        """The same tensor after one more step."""
        shape = tuple(step(torch.empty(self.shape, device="meta")).shape)
        return FileTensor(self.name, shape, lambda: step(self.make()))

    def named(self, name: str) -> FileTensor:
        return FileTensor(name, self.shape, self.make)


def plan_tensors(weights: Weights, layout: Layout) -> list[FileTensor]:
    """All tensors of the file: embeddings, layers, final norm, head.

    Raises:
        UnsupportedModel: if a tensor has no place in such a file.
    """
    blocks: dict[int, dict[str, FileTensor]] = {layer.index: {} for layer in layout.layers}
    others: list[FileTensor] = []
    for source, name in file_names(weights, layout.own).items():
        tensor = FileTensor(name, weights.shapes[source], partial(weights.read, source))
        if layout.own.norm_offset and name.endswith("norm.weight"):
            tensor = tensor.then(partial(torch.add, other=layout.own.norm_offset))
        if match := BLOCK_NAME.match(name):
            if int(match[1]) in blocks:
                blocks[int(match[1])][match[2]] = tensor
        else:
            others.append(tensor)
    factors = rope_factors(weights.config, layout.head_dim)
    if factors is not None:
        others.append(FileTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors))
    for place, layer in enumerate(layout.layers):
        parts = _finish(blocks[layer.index], layer, layout, weights.config.hidden_size)
        others += [tensor.named(f"blk.{place}.{key}") for key, tensor in parts.items()]
    return others


def file_names(weights: Weights, own: GgufArchitecture) -> dict[str, str]:
    """The file's name of every tensor of the model."""
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == own.name)
    known = gguf.get_tensor_name_map(architecture, weights.config.num_hidden_layers)
    names = {}
    for source in weights.shapes:
        name = known.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModel(
                f"GGUF has no place for '{source}' in architecture '{own.name}'; such a model "
                "cannot be exported."
            )
        names[source] = name
    return names


def _finish(
    parts: dict[str, FileTensor], layer: FileLayer, layout: Layout, hidden_size: int
) -> dict[str, FileTensor]:
    """The tensors of one layer as the file's architecture wants them."""
    if layer.heads == 0:
        parts = {key: tensor for key, tensor in parts.items() if not key.startswith("attn_")}
    elif not any(key.startswith("attn_q") for key in parts):
        parts = {**parts, **_zero_attention(layout.head_dim, hidden_size)}
    if layout.architecture.interleaved:
        for key, heads in (("attn_q", layer.heads), ("attn_k", layer.kv_heads)):
            for name in (f"{key}.weight", f"{key}.bias"):
                if name in parts:
                    parts[name] = parts[name].then(partial(interleave, heads=heads))
    if layout.architecture.fused_qkv:
        parts = {
            "attn_qkv.weight": _joined([parts.pop(f"attn_{k}.weight") for k in "qkv"]),
            **parts,
        }
    if "ffn_down.weight" not in parts:
        return {**_zero_mlp(layer.neurons, hidden_size), **parts}
    if layer.added_neurons:
        for key in ("ffn_gate", "ffn_up"):
            for name in (f"{key}.weight", f"{key}.bias"):
                if name in parts:
                    old = layer.neurons - layer.added_neurons
                    parts[name] = parts[name].then(
                        partial(_more_rows, block=old, added=layer.added_neurons)
                    )
        down = parts["ffn_down.weight"]
        parts["ffn_down.weight"] = down.then(partial(F.pad, pad=(0, layer.added_neurons)))
    return parts


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection, or its bias, from RoPE over the two halves of
    a head to RoPE over neighbours: rows 0, 1, 2, 3 of a head of 4 become 0, 2, 1, 3."""
    size = tensor.shape[0] // heads
    split = tensor.reshape(heads, 2, size // 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def _joined(tensors: list[FileTensor]) -> FileTensor:
    rows = sum(tensor.shape[0] for tensor in tensors)
    return FileTensor(
        "", (rows, *tensors[0].shape[1:]), lambda: torch.cat([t.make() for t in tensors])
    )


def _more_rows(tensor: Tensor, block: int, added: int) -> Tensor:
    """Add rows of zeros after every `block` rows (a fused gate and up projection has two)."""
    zeros = tensor.new_zeros(added, *tensor.shape[1:])
    return torch.cat([rows for part in tensor.split(block) for rows in (part, zeros)])


def _zero_mlp(width: int, hidden_size: int) -> dict[str, FileTensor]:
    """An MLP that adds nothing: llama.cpp drops the attention of a layer that has no MLP."""
    inner, outer = (width, hidden_size), (hidden_size, width)
    return {
        **_filled("ffn_norm.weight", (hidden_size,), 1.0),
        **_filled("ffn_gate.weight", inner),
        **_filled("ffn_up.weight", inner),
        **_filled("ffn_down.weight", outer),
    }


def _zero_attention(head_dim: int, hidden_size: int) -> dict[str, FileTensor]:
    """A head that adds nothing: llama.cpp reads the size of all heads only if the first layer has
    one."""
    inner, outer = (head_dim, hidden_size), (hidden_size, head_dim)
    return {
        **_filled("attn_norm.weight", (hidden_size,), 1.0),
        **_filled("attn_q.weight", inner),
        **_filled("attn_k.weight", inner),
        **_filled("attn_v.weight", inner),
        **_filled("attn_output.weight", outer),
    }


def _filled(name: str, shape: tuple[int, ...], value: float = 0.0) -> dict[str, FileTensor]:
    return {name: FileTensor(name, shape, partial(torch.full, shape, value))}
