"""llama.cpp itself, for tests: logits and tokens of a GGUF file.

    with LlamaCpp(file) as engine:
        engine.tokens("some text")        # list of ids
        engine.logits([1, 5, 7])          # (3, V) float32

Unless `exact` is false, the type of keys and values, which is float16 else, and whether attention
is fused are set in the parameters of the context.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int32, c_void_p
from pathlib import Path

import numpy as np
import xllamacpp  # noqa: F401  (tests skip themselves where it is missing)

from adapt_pruner.evaluation import llama_cpp
from adapt_pruner.evaluation.llama_cpp import ParameterBlock, library

_LIBRARY = library()


def _declare(name: str, result, *arguments):
    function = getattr(_LIBRARY, name)
    function.restype, function.argtypes = result, arguments
    return function


_tokenize = _declare(
    "llama_tokenize", c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32,
    ctypes.c_bool, ctypes.c_bool,
)  # fmt: skip
_quantise = _declare(
    "ggml_quantize_chunk", ctypes.c_size_t, c_int32, c_void_p, c_void_p,
    *[ctypes.c_int64] * 3, c_void_p,
)  # fmt: skip


def quantise_chunk(kind: int, rows: np.ndarray, num_bytes: int) -> bytes:
    """Rows of float32 as values of a type, by llama.cpp."""
    out = np.zeros(num_bytes, np.uint8)
    count, length = rows.shape
    written = _quantise(kind, rows.ctypes.data, out.ctypes.data, 0, count, length, None)
    assert written == num_bytes
    return out.tobytes()


def _in_one_step(parameters: ParameterBlock) -> None:
    parameters.n_ubatch = parameters.n_batch


def _in_float32(parameters: ParameterBlock) -> None:
    """Set three fields, found by what stands around them: "automatic" for fused attention is the
    last of four -1; the two types follow two empty pointers."""
    _in_one_step(parameters)
    values = list(parameters.rest)
    fused = next(i for i in range(len(values)) if values[i : i + 4] == [-1] * 4) + 3
    types = next(i for i in range(len(values)) if values[i : i + 6] == [0, 0, 0, 0, 1, 1]) + 4
    parameters.rest[fused] = parameters.rest[types] = parameters.rest[types + 1] = 0


class LlamaCpp(llama_cpp.LlamaCpp):
    """A GGUF file loaded by llama.cpp, on one thread. Use as a context manager."""

    def __init__(self, file: Path, context: int = 512, exact: bool = True):
        super().__init__(file, context, prepare=_in_float32 if exact else _in_one_step)

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text, with the tokens that begin and end one if `special`."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 16))()
        count = _tokenize(self.vocabulary, data, len(data), ids, len(ids), special, False)
        assert count >= 0
        return list(ids[:count])

    def logits(self, tokens: list[int]) -> np.ndarray:
        """(T, V) float32 logits of every position of one text."""
        self.forget()
        self.read([tokens], 0, judge_all=True)
        return self.last_logits(len(tokens)).copy()

    def next_token(self, tokens: list[int], start: int) -> int:
        """The most probable token after some that are read at places from `start` on."""
        self.read([tokens], start)
        return int(self.last_logits(1)[0].argmax())
