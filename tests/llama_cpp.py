"""llama.cpp itself, for tests: logits and tokens of a GGUF file.

    with LlamaCpp(file) as engine:
        engine.tokens("some text")        # list of ids
        engine.logits([1, 5, 7])          # (3, V) float32

The wheel xllamacpp carries llama.cpp as one shared library and exports its C functions; its own
Python interface gives the logits of the last position alone. The large structures of parameters
are passed as the library makes them; only sizes at their beginning are set, and unless `exact` is
false the type of keys and values, which is float16 else, and whether attention is fused.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Collection
from ctypes import POINTER, Structure, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path

import numpy as np
import xllamacpp

_LIBRARY = ctypes.CDLL(str(Path(xllamacpp.__file__).with_name("xllamacpp.abi3.so")))


class _Parameters(Structure):
    """At least as long as the structures of llama.cpp, which are read from its start."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("rest", c_int32 * 253),
    ]


class _Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


def _declare(name: str, result, *arguments):
    function = getattr(_LIBRARY, name)
    function.restype, function.argtypes = result, arguments
    return function


_ERROR = 4
_said: deque[str] = deque(maxlen=6)


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def _listen(level: int, text: bytes, data) -> None:
    if level == _ERROR:
        _said.append(text.decode(errors="replace"))


_declare("llama_log_set", None, c_void_p, c_void_p)(ctypes.cast(_listen, c_void_p), None)
_declare("llama_backend_init", None)()
_model_defaults = _declare("llama_model_default_params", _Parameters)
_context_defaults = _declare("llama_context_default_params", _Parameters)
_load = _declare("llama_model_load_from_file", c_void_p, c_char_p, _Parameters)
_context = _declare("llama_init_from_model", c_void_p, c_void_p, _Parameters)
_set_threads = _declare("llama_set_n_threads", None, c_void_p, c_int32, c_int32)
_free_model = _declare("llama_model_free", None, c_void_p)
_free_context = _declare("llama_free", None, c_void_p)
_vocabulary = _declare("llama_model_get_vocab", c_void_p, c_void_p)
_vocabulary_size = _declare("llama_vocab_n_tokens", c_int32, c_void_p)
_tokenize = _declare(
    "llama_tokenize", c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32,
    ctypes.c_bool, ctypes.c_bool,
)  # fmt: skip
_batch = _declare("llama_batch_init", _Batch, c_int32, c_int32, c_int32)
_free_batch = _declare("llama_batch_free", None, _Batch)
_decode = _declare("llama_decode", c_int32, c_void_p, _Batch)
_logits = _declare("llama_get_logits", POINTER(c_float), c_void_p)
_memory = _declare("llama_get_memory", c_void_p, c_void_p)
_clear = _declare("llama_memory_clear", None, c_void_p, ctypes.c_bool)


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


def _compute_in_float32(parameters: _Parameters) -> None:
    """Set three fields, found by what stands around them: "automatic" for fused attention is the
    last of four -1; the two types follow two empty pointers."""
    values = list(parameters.rest)
    fused = next(i for i in range(len(values)) if values[i : i + 4] == [-1] * 4) + 3
    types = next(i for i in range(len(values)) if values[i : i + 6] == [0, 0, 0, 0, 1, 1]) + 4
    parameters.rest[fused] = parameters.rest[types] = parameters.rest[types + 1] = 0


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, on one thread. Use as a context manager."""

    def __init__(self, file: Path, context: int = 512, exact: bool = True):
        self.model = _load(str(file).encode(), _model_defaults())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file}: {''.join(_said)}")
        parameters = _context_defaults()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
        if exact:
            _compute_in_float32(parameters)
        self.context = _context(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {file}")
        _set_threads(self.context, 1, 1)
        self.vocabulary = _vocabulary(self.model)
        self.size = _vocabulary_size(self.vocabulary)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exc) -> None:
        _free_context(self.context)
        _free_model(self.model)

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
        self._read(tokens, 0, range(len(tokens)))
        values = np.ctypeslib.as_array(_logits(self.context), shape=(len(tokens), self.size))
        return values.copy()

    def forget(self) -> None:
        """Empty the cache."""
        _clear(_memory(self.context), True)

    def next_token(self, tokens: list[int], start: int) -> int:
        """The most probable token after some that are read at places from `start` on."""
        self._read(tokens, start, [len(tokens) - 1])
        return int(np.ctypeslib.as_array(_logits(self.context), shape=(self.size,)).argmax())

    def _read(self, tokens: list[int], start: int, judged: Collection[int]) -> None:
        """Put tokens into the cache; logits are computed of those that are `judged`."""
        batch = _batch(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = place in judged
        status = _decode(self.context, batch)
        _free_batch(batch)
        assert status == 0, f"llama_decode: {status}"
