"""Bytes of the GGUF file of a model, over the sizes of its axes, before anything is cut.

    file = header, padded + for every tensor: rows * bytes of a row, padded

The bytes of a row depend on its length, because a type that has blocks of 256 values cannot hold
other lengths and another type takes its place (`quantise.choose_type`), and MLP widths of quantised
files are filled up to whole blocks. So bytes go up and down in steps; what of it is worth a cut,
`allocate.chains` sees.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUF_DEFAULT_ALIGNMENT

from ..errors import InvalidSettings
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
from .architectures import PER_LAYER
from .gguf_file import begin_file, multiple_of
from .layout import ZERO_NEURONS, find_layout
from .quantise import FileType, TensorPlace, choose_type, file_type, num_bytes, tensor_place
from .rope import rope_factors
from .tensors import BLOCK_NAME, file_names
from .weights import weights_of

RESERVE = 1024
"""Bytes for what is not known before the file is written: the model's name, licence and tags."""
Sizes = Mapping[AxisKey, Any]


class FileBytes:
    """Bytes of the whole file, tokenizer included: never more than is counted, and less by the part
    of RESERVE that stays unused."""

    def __init__(self, quantize: str, tokenizer: Any):
        """
        Args:
            quantize: how values are stored, as in `export_gguf`.

        Raises:
            InvalidSettings: if there is no such quantisation, or no tokenizer.
        """
        self.kind, self.tokenizer = file_type(quantize), tokenizer
        if tokenizer is None:
            raise InvalidSettings("bytes: a GGUF file holds the tokenizer too; pass `tokenizer`.")
        self.name = f"bytes of a {self.kind.name} file"

    def of(self, anatomy: Anatomy) -> _FileCost:
        return _FileCost(anatomy, self.kind, self.tokenizer)

    def written(self, amount: float) -> str:
        return f"{amount:,.0f} {self.name}"

    def goal(self, amount: int) -> dict[str, Any]:
        return {"bytes": amount, "quantize": self.kind.name}


class _FileCost:
    """What a file takes; see the module's first lines."""

    def __init__(self, anatomy: Anatomy, kind: FileType, tokenizer: Any):
        self.count, self.kind, self.multiple = anatomy.count, kind, multiple_of(kind)
        self.sizes, self.num_layers = anatomy.sizes, len(anatomy.layers)
        model: Any = anatomy.model
        weights = weights_of(model)
        layout = find_layout(weights, self.multiple)
        self.head = "token_embd.weight" if weights.is_tied else "output.weight"
        self.hidden, self.head_dim = model.config.hidden_size, layout.head_dim
        per_layer = PER_LAYER[layout.own.per_layer] if layout.own.per_layer else layout.own
        self.fused = per_layer.fused_qkv
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.outer: dict[str, Any] = {}
        self.blocks: list[dict[str, Any]] = [{} for _ in anatomy.layers]
        for source, name in file_names(weights, layout.own).items():
            match = BLOCK_NAME.match(name)
            where, name = (self.blocks[int(match[1])], match[2]) if match else (self.outer, name)
            where[name] = parameters[source]
        if (factors := rope_factors(model.config, layout.head_dim)) is not None:
            self.outer["rope_freqs.weight"] = factors
        # With an array of three widths of 4 bytes for every layer.
        header = replace(layout, architecture=per_layer)
        begun, _ = begin_file(weights, header, kind, tokenizer, {"name": ""})
        self.header = _written(begun) + RESERVE + 12 * (self.num_layers + 4)
        self.known: dict[Any, int] = {}
        self.outside = self.header + sum(self._outer(self.sizes))

    def total(self, sizes: Sizes) -> int:
        return self._total({**self.sizes, **sizes})

    def touching(self, keys: Sequence[AxisKey], sizes: Sizes) -> Any:
        layers = sorted({layer for layer, _ in keys})
        if any(kind in (LAYERS, *SUBLAYERS) for _, kind in keys):  # the places of others change
            tried = [sizes[key] for key in keys if torch.is_tensor(sizes[key])]
            if not tried:
                return self._total(sizes)
            each = [{**sizes, **dict.fromkeys(keys, size)} for size in tried[0].tolist()]
            return torch.tensor([self._total(one) for one in each])
        if WHOLE_MODEL in layers:
            return self._total(sizes)
        there, heads = self._in_file(sizes)
        is_fused = self._is_fused(sizes, there)
        return sum(
            self._layer(layer, there.index(layer), heads, sizes, is_fused)
            for layer in layers
            if layer in there
        )

    def _total(self, sizes: Sizes) -> Any:
        there, heads = self._in_file(sizes)
        is_fused = self._is_fused(sizes, there)
        layers = (
            self._layer(layer, place, heads, sizes, is_fused) for place, layer in enumerate(there)
        )
        return self.header + sum(self._outer(sizes)) + sum(layers)

    def _in_file(self, sizes: Sizes) -> tuple[list[int], list[tuple[int, int]]]:
        """The layers that the file holds, those that do something; query and KV heads of each."""
        there = [
            layer
            for layer in range(self.num_layers)
            if self._is_there(layer, ATTENTION, sizes) or self._is_there(layer, MLP, sizes)
        ]
        return there, [self._heads(layer, sizes) for layer in there]

    def _is_there(self, layer: int, kind: str, sizes: Sizes) -> bool:
        width = (layer, KV_GROUPS if kind == ATTENTION else NEURONS)
        there = sizes.get((layer, kind), width in sizes)
        return bool(there) and bool(sizes.get((layer, LAYERS), 1))

    def _heads(self, layer: int, sizes: Sizes) -> tuple[int, int]:
        """With as many query heads a group as there are now where several are being tried."""
        per_group = sizes.get((layer, QUERY_HEADS), 1)
        return (self.sizes[layer, QUERY_HEADS] if torch.is_tensor(per_group) else per_group), 1

    def _is_fused(self, sizes: Sizes, there: Sequence[int]) -> bool:
        """Whether the layers differ in the file, so that an architecture for such layers holds it,
        and that has one tensor for queries, keys and values."""
        kinds = (ATTENTION, KV_GROUPS, QUERY_HEADS, MLP)
        widths = {
            (*(sizes.get((layer, kind)) for kind in kinds), self._neurons(layer, sizes))
            for layer in there
        }
        return self.fused and len(widths) > 1

    def _neurons(self, layer: int, sizes: Sizes) -> Any:
        """Width of an MLP in the file; sizes that are being tried stand for one that differs."""
        width = sizes.get((layer, NEURONS), 0)
        return width if torch.is_tensor(width) else -(-width // self.multiple) * self.multiple

    def _outer(self, sizes: Sizes) -> Iterator[Any]:
        for name, parameter in self.outer.items():
            yield self._bytes(name, self.count.shape(parameter, sizes), tensor_place(name, []))

    def _layer(
        self, layer: int, place: int, heads: list[tuple[int, int]], sizes: Sizes, is_fused: bool
    ) -> Any:
        """Bytes of one layer, that of its tensors' descriptions among them."""
        own = {key: size for key, size in sizes.items() if key[0] in (layer, WHOLE_MODEL)}
        most = max(query for query, _ in heads)
        known = (layer, place, len(heads), most, is_fused, tuple(own.values()))
        tried = any(torch.is_tensor(size) for size in own.values())
        if not tried and known in self.known:
            return self.known[known]
        shapes = self._shapes(layer, place, own, is_fused)
        where = [(most, 1)] * len(heads)
        found = sum(
            self._bytes(f"blk.{place}.{name}", shape, tensor_place(f"blk.{place}.{name}", where))
            for name, shape in shapes.items()
        )
        if not tried:
            self.known[known] = found
        return found

    def _shapes(
        self, layer: int, place: int, own: dict[AxisKey, Any], is_fused: bool
    ) -> dict[str, list[Any]]:
        """Of the tensors of a layer in the file, as `tensors.plan_tensors` makes them."""
        hidden = own.get((WHOLE_MODEL, HIDDEN), self.hidden)
        attends = self._is_there(layer, ATTENTION, own)
        widens = self._is_there(layer, MLP, own)
        if (layer, NEURONS) in own:
            multiple = self.multiple
            own = {**own, (layer, NEURONS): -(-own[layer, NEURONS] // multiple) * multiple}
        shapes = {
            name: self.count.shape(parameter, own)
            for name, parameter in self.blocks[layer].items()
            if name.startswith("attn_") <= attends and name.startswith("ffn_") <= widens
        }
        if not widens:
            inner = [ZERO_NEURONS, hidden]
            shapes |= {"ffn_norm.weight": [hidden], "ffn_gate.weight": inner}
            shapes |= {"ffn_up.weight": inner, "ffn_down.weight": inner[::-1]}
        if not attends and place == 0:
            inner = [self.head_dim, hidden]
            shapes |= {f"attn_{part}.weight": inner for part in "qkv"}
            shapes |= {"attn_norm.weight": [hidden], "attn_output.weight": inner[::-1]}
        if is_fused and attends:
            parts = [shapes.pop(f"attn_{part}.weight") for part in "qkv"]
            shapes["attn_qkv.weight"] = [sum(rows for rows, _ in parts), hidden]
        return shapes

    def _bytes(self, name: str, shape: list[Any], place: TensorPlace) -> Any:
        described = 24 + len(name.encode()) + 8 * len(shape)
        if len(shape) < 2:
            return described + _padded(4 * shape[0])
        is_head = name == self.head

        def of_row(length: int) -> int:
            _, kind = choose_type(self.kind, name, (1, length), place, is_head)
            return num_bytes(length, kind)

        rows, columns = shape
        if torch.is_tensor(columns):
            columns = torch.tensor([of_row(length) for length in columns.tolist()])
        else:
            columns = of_row(columns)
        return described + _padded(rows * columns)


def _padded(count: Any) -> Any:
    return -(-count // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _written(writer: Any) -> int:
    """Bytes of a file that has no tensors yet."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "header"
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.close()
        return file.stat().st_size
