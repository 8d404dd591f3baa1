"""llama.cpp in this process, token by token.

The wheel xllamacpp carries llama.cpp as one shared library and exports its C functions; its own
Python interface has a server alone, which times nothing but whole answers on the wall clock. The
large structures of parameters are passed as the library makes them; only sizes at their beginning
are set.
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EvaluationError, MissingExtra

LONGEST_STEP = 512
"""Tokens that llama.cpp computes at once, as in its own programs."""


class ParameterBlock(Structure):
    """At least as long as the structures of llama.cpp, which are read from its start."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("rest", c_int32 * 252),
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


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (c_void_p, c_void_p)),
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (ParameterBlock, ()),
    "llama_context_default_params": (ParameterBlock, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ParameterBlock)),
    "llama_init_from_model": (c_void_p, (c_void_p, ParameterBlock)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_batch_init": (_Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (c_int32, (c_void_p, _Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, ctypes.c_bool)),
    "llama_memory_seq_rm": (ctypes.c_bool, (c_void_p, c_int32, c_int32, c_int32)),
}
_ERROR = 4
_said: deque[str] = deque(maxlen=6)


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def _listen(level: int, text: bytes, data) -> None:
    if level == _ERROR:
        _said.append(text.decode(errors="replace"))


@functools.cache
def library() -> Any:
    """llama.cpp's C functions. Raises MissingExtra if they are not here, or others than known."""
    try:
        import xllamacpp

        functions = ctypes.CDLL(str(Path(xllamacpp.__file__).with_name("xllamacpp.abi3.so")))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except (ImportError, OSError, AttributeError) as error:
        raise MissingExtra(
            f"llama.cpp is not here, or of a version that is not known ({error}): pip install "
            "'adapt-pruner[llama-cpp]', or name another engine."
        ) from None
    functions.llama_log_set(ctypes.cast(_listen, c_void_p), None)
    functions.llama_backend_init()
    return functions


class LlamaCpp:
    """A GGUF file loaded by llama.cpp. Use as a context manager.

    Args:
        context: most tokens of a sequence.
        sequences: how many there are.
        threads: that compute.
        prepare: changes the parameters of a context before it is made.

    Raises:
        MissingExtra: where llama.cpp is not installed.
        EvaluationError: if it cannot load the file.
    """

    def __init__(
        self,
        file: Path,
        context: int = 512,
        sequences: int = 1,
        threads: int = 1,
        prepare: Callable[[ParameterBlock], None] = lambda parameters: None,
    ):
        self.library = library()
        self.model = self.library.llama_model_load_from_file(
            str(file).encode(), self.library.llama_model_default_params()
        )
        if not self.model:
            raise EvaluationError(f"llama.cpp cannot load '{file}': {''.join(_said).strip()}")
        parameters = self.library.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context * sequences
        parameters.n_ubatch, parameters.n_seq_max = min(context, LONGEST_STEP), sequences
        prepare(parameters)
        self.context = self.library.llama_init_from_model(self.model, parameters)
        if not self.context:
            self.library.llama_model_free(self.model)
            raise EvaluationError(f"llama.cpp makes no context for '{file}'.")
        self.library.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = self.library.llama_model_get_vocab(self.model)
        self.size: int = self.library.llama_vocab_n_tokens(self.vocabulary)

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def forget(self) -> None:
        """Empty the cache."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def forget_from(self, place: int) -> bool:
        """Take out of the cache what stands at a place or after it. Returns whether that could be
        done."""
        memory = self.library.llama_get_memory(self.context)
        return self.library.llama_memory_seq_rm(memory, -1, place, -1)

    def read(self, sequences: Sequence[Sequence[int]], start: int, judge_all: bool = False) -> None:
        """Put tokens of every sequence into the cache, at places from `start` on. Logits are
        computed of the last of each, or of all."""
        total = sum(map(len, sequences))
        batch = self.library.llama_batch_init(total, 0, 1)
        batch.n_tokens, entry = total, 0
        for number, tokens in enumerate(sequences):
            for place, token in enumerate(tokens):
                batch.token[entry], batch.pos[entry] = token, start + place
                batch.n_seq_id[entry], batch.seq_id[entry][0] = 1, number
                batch.logits[entry] = judge_all or place == len(tokens) - 1
                entry += 1
        status = self.library.llama_decode(self.context, batch)
        self.library.llama_batch_free(batch)
        if status:
            raise EvaluationError(f"llama.cpp cannot compute: llama_decode says {status}.")

    def last_logits(self, count: int) -> np.ndarray:
        """(count, V) float32, of the tokens judged last; overwritten by the next call of `read`."""
        values = self.library.llama_get_logits(self.context)
        return np.ctypeslib.as_array(values, shape=(count, self.size))
