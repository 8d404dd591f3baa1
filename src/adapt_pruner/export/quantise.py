"""How the values of a file are stored: types by name, and which tensor gets which.

The mixes of the K types follow llama.cpp's own quantiser: tensors that matter more get more bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as T
from torch import Tensor, bfloat16, float16, float32

from ..errors import InvalidSettings, MissingExtra, near_match


@dataclass(frozen=True)
class TensorPlace:
    """Where a matrix stands in the model."""

    part: str
    """Such as "attn_v", "ffn_down", "output", "token_embd"."""
    layer: int
    num_layers: int
    num_groups: int
    """Query heads on one KV head."""

    @property
    def gets_more_bits(self) -> bool:
        """Whether the layer is of the first or last eighth, or every third between: those get more
        bits in the M mixes."""
        first = self.num_layers // 8
        return (
            self.layer < first
            or self.layer >= 7 * self.num_layers // 8
            or (self.layer - first) % 3 == 2
        )


Rule = Callable[[TensorPlace], T | None]


@dataclass(frozen=True)
class FileType:
    """A way to store a whole file: a type for most matrices, another for some."""

    name: str
    base: T
    number: LlamaFileType
    rule: Rule = lambda place: None
    head: T | None = T.Q6_K
    """Type of the head, or of the embeddings where they are the head; None: as the others."""


def _q2_k(place: TensorPlace) -> T | None:
    if place.part == "attn_v":
        return T.Q4_K if place.num_groups >= 4 else T.Q3_K
    return T.Q3_K if place.part in ("ffn_down", "attn_output") else None


def _q3_k_m(place: TensorPlace) -> T | None:
    if place.part == "attn_v":
        return T.Q5_K if place.layer < 2 else T.Q4_K
    if place.part == "ffn_down":
        return T.Q5_K if place.layer < place.num_layers // 16 else T.Q4_K
    return T.Q4_K if place.part in ("attn_output", "attn_qkv") else None


def _q3_k_l(place: TensorPlace) -> T | None:
    if place.part == "attn_qkv":
        return T.Q4_K
    return T.Q5_K if place.part in ("attn_v", "ffn_down", "attn_output") else None


def _q4_k_s(place: TensorPlace) -> T | None:
    if place.part == "attn_v" and place.layer < 4:
        return T.Q5_K
    return T.Q5_K if place.part == "ffn_down" and place.layer < place.num_layers // 8 else None


def _q4_k_m(place: TensorPlace) -> T | None:
    if place.part == "attn_qkv":
        return T.Q5_K
    return T.Q6_K if place.part in ("attn_v", "ffn_down") and place.gets_more_bits else None


def _q5_k_m(place: TensorPlace) -> T | None:
    if place.part == "attn_qkv":
        return T.Q6_K
    return T.Q6_K if place.part in ("attn_v", "ffn_down") and place.gets_more_bits else None


F = LlamaFileType
FILE_TYPES = {
    kind.name: kind
    for kind in (
        FileType("F32", T.F32, F.ALL_F32, head=None),
        FileType("F16", T.F16, F.MOSTLY_F16, head=None),
        FileType("BF16", T.BF16, F.MOSTLY_BF16, head=None),
        FileType("Q8_0", T.Q8_0, F.MOSTLY_Q8_0, head=None),
        FileType("Q5_1", T.Q5_1, F.MOSTLY_Q5_1),
        FileType("Q5_0", T.Q5_0, F.MOSTLY_Q5_0),
        FileType("Q4_1", T.Q4_1, F.MOSTLY_Q4_1),
        FileType("Q4_0", T.Q4_0, F.MOSTLY_Q4_0),
        FileType("Q6_K", T.Q6_K, F.MOSTLY_Q6_K),
        FileType("Q5_K_M", T.Q5_K, F.MOSTLY_Q5_K_M, _q5_k_m),
        FileType("Q5_K_S", T.Q5_K, F.MOSTLY_Q5_K_S),
        FileType("Q4_K_M", T.Q4_K, F.MOSTLY_Q4_K_M, _q4_k_m),
        FileType("Q4_K_S", T.Q4_K, F.MOSTLY_Q4_K_S, _q4_k_s),
        FileType("Q3_K_L", T.Q3_K, F.MOSTLY_Q3_K_L, _q3_k_l),
        FileType("Q3_K_M", T.Q3_K, F.MOSTLY_Q3_K_M, _q3_k_m),
        FileType("Q3_K_S", T.Q3_K, F.MOSTLY_Q3_K_S),
        FileType("Q2_K", T.Q2_K, F.MOSTLY_Q2_K, _q2_k),
    )
}
FALLBACK = {
    T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0,
}  # fmt: skip
"""For rows that do not divide into blocks of 256: types with blocks of 32."""


def file_type(name: str) -> FileType:
    """Look up a way to store a file by its name, in any case.

    Raises:
        InvalidSettings: with the nearest known name.
        MissingExtra: if it needs the quantiser, and that is not installed.
    """
    known = name.upper().replace("-", "_")
    if known not in FILE_TYPES:
        hint = near_match(known, FILE_TYPES)
        raise InvalidSettings(
            f"quantize: there is no '{name}'.{hint} Known: {', '.join(FILE_TYPES)}."
        )
    if FILE_TYPES[known].base not in _FLOATS:
        _quantiser()
    return FILE_TYPES[known]


def block_size(kind: T) -> int:
    return GGML_QUANT_SIZES[kind][0]


def choose_type(
    kind: FileType, name: str, shape: Sequence[int], place: TensorPlace, is_head: bool
) -> tuple[T, T]:
    """The type that a tensor should have, and the one that its row length allows."""
    if len(shape) < 2 or name.endswith("norm.weight"):
        return T.F32, T.F32
    row_length = shape[-1]
    wanted = kind.rule(place) or kind.base
    if is_head and kind.head is not None:
        wanted = kind.head if row_length % block_size(kind.base) == 0 else T.Q8_0
    found = wanted
    if row_length % block_size(found):
        found = FALLBACK.get(found, T.F16)
    if row_length % block_size(found):
        found = T.F16
    return wanted, found


def tensor_place(name: str, heads: Sequence[tuple[int, int]]) -> TensorPlace:
    """Where a tensor of the file stands; `heads` are the query and KV heads of every layer."""
    match = re.match(r"blk\.(\d+)\.([a-z_0-9]+)\.", name)
    part, layer = (match[2], int(match[1])) if match else (name.split(".")[0], 0)
    most = max((query // kv for query, kv in heads if kv), default=1)
    return TensorPlace(part, layer, len(heads), most)


_FLOATS = {T.F32: (float32, np.float32), T.F16: (float16, np.float16), T.BF16: (bfloat16, np.int16)}


def encode(tensor: Tensor, kind: T) -> np.ndarray:
    """The bytes of a tensor, one row of the array per row of the tensor."""
    if kind in _FLOATS:
        dtype, numpy_type = _FLOATS[kind]
        values = tensor.to(dtype)
        if kind is T.F16:  # llama.cpp stores what float16 cannot hold as infinity; say the largest
            values = tensor.float().clamp(-65504, 65504).to(dtype)
        return values.contiguous().view(_viewable(dtype)).numpy().view(numpy_type)
    rows = tensor.float().contiguous().reshape(-1, tensor.shape[-1]).numpy()
    return np.asarray(_quantiser().quantize_rows(rows, int(kind))).reshape(len(rows), -1)


def _viewable(dtype):
    from torch import int16

    return int16 if dtype is bfloat16 else dtype


def num_bytes(num_values: int, kind: T) -> int:
    """What whole rows of values take in a file."""
    block, size = GGML_QUANT_SIZES[kind]
    return num_values // block * size


def _quantiser():
    try:
        import libgguf
    except ImportError:
        raise MissingExtra(
            "Quantising needs the package libgguf: pip install 'adapt-pruner[gguf]'. Without it, "
            "files can be written with --quantize F16, BF16 or F32."
        ) from None
    return libgguf
