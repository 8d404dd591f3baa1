"""What computes: torch, or llama.cpp. Each opens a model, and times it as often as it is told."""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import InvalidSettings
from ..evaluation.fingerprint import versions
from ..evaluation.speed import longest_of, random_prompt, wait_for
from ..model.anatomy import find_anatomy
from ..model.axes import KV_GROUPS
from ..model.skipped import Skipped
from ..settings import LatencySettings
from .table import shapes_of

SHORTEST = 0.02
"""Seconds that are timed at once: of fast models several tokens."""
MOST_TOKENS = 16

Stopwatch = Callable[[], float]
"""Seconds of one token of a decoding step, or of one prompt."""


class Engine(Protocol):
    """What computes."""

    settings: LatencySettings
    device: str
    threads: int
    dtype: str
    """Of the weights, as the engine calls it."""
    source_dtype: torch.dtype
    """Of the torch model that it is given."""
    width_block: int
    version: str

    def open(self, model: Any) -> AbstractContextManager[Stopwatch]:
        """Make a model ready to be timed; a cache of `context` tokens is filled. Each call of what
        is returned times it once."""
        ...


@dataclass(frozen=True)
class Clock:
    """On one thread of the processor its own time counts, so that what others compute on the
    machine counts little; else that of the clock on the wall."""

    device: str
    threads: int

    def __call__(self) -> float:
        wait_for(self.device)
        alone = self.threads == 1 and self.device == "cpu"
        return time.process_time() if alone else time.perf_counter()


def _timed(clock: Clock, begin: Callable[[], Callable[[], None]]) -> Stopwatch:
    """Times several tokens at once where one takes too short. `begin` makes a cache of the context
    alone, and returns what decodes a token after it."""
    decode = begin()
    decode()  # to warm up
    began = clock()
    decode()
    took = max(clock() - began, 1e-6)
    count = min(MOST_TOKENS, max(2, math.ceil(SHORTEST / took)))

    def run() -> float:
        decode = begin()
        began = clock()
        for _ in range(count):
            decode()
        return (clock() - began) / count

    return run


class TorchEngine:
    """The model as transformers runs it."""

    width_block = 1

    def __init__(self, settings: LatencySettings, dtype: torch.dtype, device: str):
        self.settings, self.device, self.source_dtype = settings, device, dtype
        self.threads = torch.get_num_threads() if device == "cpu" else 1
        self.dtype = str(dtype).removeprefix("torch.")
        self.version = versions()["torch"]

    @contextmanager
    def open(self, model: Any) -> Iterator[Stopwatch]:
        batch, context = self.settings.batch_size, self.settings.context
        clock = Clock(self.device, self.threads)
        if self.settings.stage == "prefill":
            ids = random_prompt(model, context, batch)

            def read() -> float:
                began = clock()
                with torch.no_grad():
                    model(input_ids=ids, use_cache=True, logits_to_keep=1)
                return clock() - began

            yield read
            return
        filled, first = _filled_cache(model, batch, context), random_prompt(model, 1, batch)

        def begin() -> Callable[[], None]:
            cache, token = copy.copy(filled), first
            cache.layers = [copy.copy(layer) for layer in filled.layers]  # grow by new tensors

            @torch.no_grad()
            def decode() -> None:
                nonlocal token
                output = model(input_ids=token, past_key_values=cache, use_cache=True)
                token = output.logits[:, -1:].argmax(dim=-1)

            return decode

        yield _timed(clock, begin)


@torch.no_grad()
def _filled_cache(model: Any, batch: int, context: int) -> Any:
    """A cache of random keys and values, which is the same to a clock as one of a text."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    anatomy = find_anatomy(model)
    groups = {axis.layer: axis.num_units for axis in anatomy.of_kinds({KV_GROUPS})}
    config, weight = model.config, model.get_input_embeddings().weight
    head_dim = shapes_of(anatomy).head_dim
    for i, layer in enumerate(anatomy.layers):
        attention = getattr(layer, anatomy.architecture.attention)
        if isinstance(attention, Skipped):
            attention(weight.new_zeros(batch, context, 1), past_key_values=cache)
            continue
        shape: Any = (batch, groups.get(i, config.num_attention_heads), context, head_dim)
        cache.update(
            torch.randn(shape, dtype=weight.dtype, device=weight.device),
            torch.randn(shape, dtype=weight.dtype, device=weight.device),
            i,
        )
    return cache


class LlamaCppEngine:
    """The GGUF file of the model, in llama.cpp on the processor."""

    device, source_dtype = "cpu", torch.float32

    def __init__(self, settings: LatencySettings, quantize: str, tokenizer: Any):
        """Raises InvalidSettings if there is no such quantisation, or no tokenizer; MissingExtra
        where a package is missing."""
        from ..evaluation.llama_cpp import library
        from ..export.gguf_file import multiple_of
        from ..export.quantise import file_type

        library()
        if tokenizer is None:
            raise InvalidSettings("engine: a GGUF file holds the tokenizer; pass `tokenizer`.")
        kind = file_type(quantize)
        self.settings, self.tokenizer, self.dtype = settings, tokenizer, kind.name
        self.threads, self.width_block = torch.get_num_threads(), multiple_of(kind)
        self.version = versions("xllamacpp")["xllamacpp"]

    @contextmanager
    def open(self, model: Any) -> Iterator[Stopwatch]:
        from ..evaluation.llama_cpp import LlamaCpp
        from ..export.gguf_file import export_weights
        from ..export.weights import weights_of

        settings, clock = self.settings, Clock("cpu", self.threads)
        context, sequences = settings.context, settings.batch_size
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.gguf"
            export_weights(weights_of(model), self.tokenizer, file, self.dtype)
            generator = torch.Generator().manual_seed(0)
            with LlamaCpp(file, context + MOST_TOKENS + 1, sequences, self.threads) as loaded:
                prompts = torch.randint(loaded.size, (sequences, context), generator=generator)
                prompts = prompts.tolist()
                if settings.stage == "prefill":

                    def read() -> float:
                        loaded.forget()
                        began = clock()
                        loaded.read(prompts, 0)
                        return clock() - began

                    yield read
                    return
                loaded.read(prompts, 0)

                def begin() -> Callable[[], None]:
                    if not loaded.forget_from(context):
                        loaded.forget()
                        loaded.read(prompts, 0)
                    places = itertools.count(context)

                    def decode() -> None:
                        loaded.read([prompt[:1] for prompt in prompts], next(places))

                    return decode

                yield _timed(clock, begin)


def make_engine(
    settings: LatencySettings,
    model: Any,
    *,
    dtype: torch.dtype,
    device: str,
    quantize: str,
    tokenizer: Any,
) -> Engine:
    """The engine that the settings name.

    Args:
        model: to be timed; only its configuration counts.
        dtype, device: of weights in torch.
        quantize, tokenizer: of the GGUF file, for llama.cpp.

    Raises:
        InvalidSettings: if the model cannot read as much as is to be timed, there is no such
            quantisation, or no tokenizer.
        MissingExtra: where a package is missing.
    """
    longest = longest_of(model.config)
    more = MOST_TOKENS if settings.stage == "decode" else 0
    if settings.context + more > longest:
        after = f", and {more} are decoded after the context" if more else ""
        raise InvalidSettings(
            f"context: the model reads at most {longest:,} tokens{after}; got "
            f"{settings.context:,}. Name a smaller --context."
        )
    if settings.engine == "llama.cpp":
        return LlamaCppEngine(settings, quantize, tokenizer)
    return TorchEngine(settings, dtype, device)
