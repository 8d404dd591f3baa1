"""Write a model as one GGUF file, whole or not at all, one tensor in memory at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from ..errors import LoadingError, WritingError
from ..files import atomic_file, check_place_of_file
from ..model.gguf_input import MAGIC
from ..model.loading import is_gguf, load_tokenizer, resolve_name
from ..result import PruningResult
from .commands import GgufCommands
from .layout import Layout, find_layout
from .metadata import add_general, add_hyperparameters, read_card
from .quantise import FileType, block_size, choose_type, encode, file_type, num_bytes, tensor_place
from .tensors import FileTensor, plan_tensors
from .vocabulary import add_tokenizer
from .weights import Weights, open_weights, weights_of

BLOCK = 32
"""MLP widths of quantised files are filled up to a multiple of this, the smaller block size."""


@dataclass(frozen=True)
class Fallback:
    """A tensor stored in another type than the quantisation means it to have."""

    tensor: str
    row_length: int
    wanted: str
    stored: str


@dataclass(frozen=True)
class Export:
    """What was written."""

    file: Path
    architecture: str
    """As llama.cpp calls it."""
    quantize: str
    num_bytes: int
    num_tensors: dict[str, int]
    """Tensors of each type."""
    fallbacks: tuple[Fallback, ...]
    notes: tuple[str, ...]
    """What the user should know, a sentence each."""
    has_chat_template: bool

    @property
    def commands(self) -> GgufCommands:
        """The commands that run the file."""
        return GgufCommands(self.file, self.has_chat_template)


@dataclass(frozen=True)
class _Stored:
    tensor: FileTensor
    wanted: GGMLQuantizationType
    kind: GGMLQuantizationType

    @property
    def num_bytes(self) -> int:
        return num_bytes(int(np.prod(self.tensor.shape)), self.kind)


def export_gguf(
    model: Any,
    output: str | Path,
    quantize: str = "F16",
    *,
    tokenizer: Any = None,
    name: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Export:
    """Write a model as a GGUF file, which llama.cpp, Ollama and LM Studio run.

    Args:
        model: a directory, a name on the hub, a GGUF file, a model in memory, or what `prune`
            returned.
        quantize: how values are stored: F32, F16, BF16, Q8_0, Q4_0, Q4_K_M, ...
        tokenizer: that of a model in memory.
        name: what the file calls the model; default: the name of its directory.
        overwrite: replace a GGUF file that exists.
        on_progress: called with the share of the bytes that is written.

    Raises:
        UnsupportedModel: if llama.cpp has no architecture, or no tokenizer, like it.
        InvalidSettings: if there is no such quantisation.
        MissingExtra: if it needs a package that is not installed.
        LoadingError, WritingError: if the model cannot be read, or the file not be written; what
            was there is unchanged.
    """
    output = Path(output).expanduser()
    file_type(quantize)
    check_gguf_output(output, overwrite)
    if isinstance(model, PruningResult):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    if isinstance(model, (str, Path)):
        source = str(model)
        check_is_not_source(output, source)
        weights = open_weights(source, trust_remote_code)
        tokenizer = tokenizer or load_tokenizer(source, trust_remote_code)
        place = Path(resolve_name(source))
        card = {"name": place.stem if is_gguf(source) else place.name, **read_card(place)}
    else:
        weights, card = weights_of(model), {"name": output.stem}
    if tokenizer is None:
        raise LoadingError("A GGUF file holds the tokenizer too; pass `tokenizer=`.")
    card = {**card, "name": name} if name else card
    return export_weights(
        weights, tokenizer, output, quantize, card, on_progress=on_progress, overwrite=overwrite
    )


def export_weights(
    weights: Weights,
    tokenizer: Any,
    output: Path,
    quantize: str,
    card: Mapping[str, Any] | None = None,
    *,
    on_progress: Callable[[float], None] = lambda share: None,
    overwrite: bool = False,
) -> Export:
    """Write weights and a tokenizer; `card` has the name, licence, languages and tags. The rest is
    as in `export_gguf`."""
    kind = file_type(quantize)
    layout = find_layout(weights, multiple_of(kind))
    stored = _choose_types(weights, layout, kind)
    check_gguf_output(output, overwrite, sum(one.num_bytes for one in stored))
    writer, notes = begin_file(weights, layout, kind, tokenizer, card or {"name": output.stem})
    with atomic_file(output) as partial:
        _write(writer, stored, partial, on_progress)
    added = [layer.added_neurons for layer in layout.layers if layer.added_neurons]
    if added:
        notes.append(
            f"{sum(added)} neurons of zeros in {len(added)} layers fill rows up to a multiple of "
            f"{BLOCK}; they change nothing."
        )
    return Export(
        file=output,
        architecture=layout.architecture.name,
        quantize=kind.name,
        num_bytes=output.stat().st_size,
        num_tensors=dict(Counter(one.kind.name for one in stored)),
        fallbacks=tuple(
            Fallback(one.tensor.name, one.tensor.row_length, one.wanted.name, one.kind.name)
            for one in stored
            if one.wanted is not one.kind
        ),
        notes=tuple(notes),
        has_chat_template=bool(tokenizer.chat_template),
    )


def multiple_of(kind: FileType) -> int:
    """MLP widths in a file are multiples of this."""
    return BLOCK if block_size(kind.base) > 1 else 1


def begin_file(
    weights: Weights, layout: Layout, kind: FileType, tokenizer: Any, card: Mapping[str, Any]
) -> tuple[gguf.GGUFWriter, list[str]]:
    """All of a file but its tensors, and what the user should know. Writes nothing yet."""
    writer = gguf.GGUFWriter(None, layout.architecture.name)
    add_general(writer, _num_parameters(weights), card)
    notes = [*layout.notes, *add_hyperparameters(writer, weights.config, layout)]
    writer.add_file_type(kind.number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, tokenizer, weights.config.vocab_size)
    return writer, notes


def check_gguf_output(file: Path, overwrite: bool, needed_bytes: int = 0) -> None:
    """Raise WritingError now if a GGUF file could not be written to `file` later. What is replaced
    must be a GGUF file, whatever `overwrite` says."""
    file = check_place_of_file(file, needed_bytes)
    if not file.exists():
        return
    if not overwrite:
        raise WritingError(f"'{file}' exists. Name another file, or pass --overwrite.")
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise WritingError(f"'{file}' is not a GGUF file, and is not replaced. Name another.")


def check_is_not_source(file: Path, model: str) -> None:
    """Raise WritingError if `file` is the model that is to be read."""
    if is_gguf(model) and Path(resolve_name(model)).resolve() == file.resolve():
        raise WritingError(f"'{file}' is the model itself; name another file to write.")


def _choose_types(weights: Weights, layout: Layout, kind: FileType) -> list[_Stored]:
    head = "token_embd.weight" if weights.is_tied else "output.weight"
    heads = [(layer.heads, layer.kv_heads) for layer in layout.layers]
    return [
        _Stored(
            tensor,
            *choose_type(
                kind,
                tensor.name,
                tensor.shape,
                tensor_place(tensor.name, heads),
                is_head=tensor.name == head,
            ),
        )
        for tensor in plan_tensors(weights, layout)
    ]


def _num_parameters(weights: Weights) -> int:
    return sum(int(np.prod(shape)) for shape in weights.shapes.values())


def _write(
    writer: gguf.GGUFWriter,
    stored: list[_Stored],
    partial: Path,
    on_progress: Callable[[float], None],
) -> None:
    for one in stored:
        writer.add_tensor_info(
            one.tensor.name, one.tensor.shape, np.dtype(np.float32), one.num_bytes, one.kind
        )
    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    total, done = sum(one.num_bytes for one in stored), 0
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in stored:
            with torch.no_grad():
                writer.write_tensor_data(encode(one.tensor.make(), one.kind))
            done += one.num_bytes
            on_progress(done / total)
    finally:
        writer.close()
