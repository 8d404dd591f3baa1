"""How fast a model reads and writes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Speed:
    """Medians over the repetitions, at batch size 1."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    new_tokens: int


@torch.no_grad()
def compare_speed(
    models: list[Any], prompt_tokens: int = 256, new_tokens: int = 32, repetitions: int = 7
) -> list[Speed]:
    """Time all models in turns, so that a machine whose speed drifts treats them alike.

    The prompt is random; decoding continues from its cache, greedily, and never stops early.
    """
    longest = min(
        getattr(model.config, "max_position_embeddings", None) or 10**9 for model in models
    )
    prompt_tokens = max(1, min(prompt_tokens, longest - new_tokens))
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for repetition in range(repetitions + 1):
        for model, record in zip(models, times, strict=True):
            measured = _time_once(model, prompt_tokens, new_tokens)
            if repetition:  # the first is a warm-up
                record.append(measured)
    return [
        Speed(
            prompt_tokens / statistics.median(prefill for prefill, _ in record),
            new_tokens / statistics.median(decode for _, decode in record),
            prompt_tokens,
            new_tokens,
        )
        for record in times
    ]


def _time_once(model: Any, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(device)
    began = _now(device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    middle = _now(device)
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return middle - began, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
