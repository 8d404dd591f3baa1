"""How fast a model reads and writes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidSettings


@dataclass(frozen=True)
class Speed:
    """Medians over the repetitions."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    new_tokens: int
    batch_size: int = 1
    time_to_first_token_s: float = 0.0
    prefill_speedup: float = 1.0
    """Over the first model: median over the rounds, in each of which every model takes its turn."""
    decode_speedup: float = 1.0


@torch.no_grad()
def compare_speed(
    models: list[Any],
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repetitions: int = 7,
    batch_size: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Speed]:
    """Time all models in turns, so that a machine whose speed drifts treats them alike.

    The prompt is random; decoding continues from its cache, greedily, and never stops early.

    Args:
        prompt_tokens: tokens read; fewer if a model's context is too short.
        on_progress: called with the rounds done and their number.
    """
    prompt_tokens = fitting_prompt(models, prompt_tokens, new_tokens)
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for repetition in range(repetitions + 1):
        for model, record in zip(models, times, strict=True):
            measured = _time_once(
                model, random_prompt(model, prompt_tokens, batch_size), new_tokens
            )
            if repetition:  # the first is a warm-up
                record.append(measured)
        on_progress(repetition, repetitions)
    return [_speed(record, times[0], prompt_tokens, new_tokens, batch_size) for record in times]


def _speed(
    record: list[tuple[float, float]],
    first: list[tuple[float, float]],
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
) -> Speed:
    prefill, decode = (statistics.median(times) for times in zip(*record, strict=True))
    rounds = list(zip(first, record, strict=True))
    return Speed(
        prefill_tokens_per_s=batch_size * prompt_tokens / prefill,
        decode_tokens_per_s=batch_size * new_tokens / decode,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        time_to_first_token_s=prefill,
        prefill_speedup=statistics.median(old[0] / new[0] for old, new in rounds),
        decode_speedup=statistics.median(old[1] / new[1] for old, new in rounds),
    )


def fitting_prompt(models: list[Any], prompt_tokens: int, new_tokens: int) -> int:
    """The longest prompt up to `prompt_tokens` from which every model can still write.

    Raises:
        InvalidSettings: if none is left.
    """
    longest = min(longest_of(model.config) for model in models)
    if new_tokens >= longest:
        raise InvalidSettings(
            f"new_tokens: the model reads at most {longest:,} tokens, of which a prompt has one; "
            f"got {new_tokens:,}."
        )
    return min(prompt_tokens, longest - new_tokens)


def longest_of(config: Any) -> int:
    """Tokens that a model reads at most."""
    return getattr(config, "max_position_embeddings", None) or 10**9


def random_prompt(model: Any, num_tokens: int, batch_size: int = 1) -> Tensor:
    """(B, T) token ids on the model's device."""
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.shape[0], (batch_size, num_tokens), generator=generator)
    return ids.to(embeddings.device)


def generate(
    model: Any, ids: Tensor, new_tokens: int, on_first: Callable[[], None] = lambda: None
) -> Any:
    """Read a prompt, then write greedily. Returns the cache."""
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(dim=-1)
    on_first()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    return output.past_key_values


def _time_once(model: Any, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    times = [_now(ids.device)]
    generate(model, ids, new_tokens, lambda: times.append(_now(ids.device)))
    return times[1] - times[0], _now(ids.device) - times[1]


def _now(device: torch.device) -> float:
    wait_for(device.type)
    return time.perf_counter()


def wait_for(device: str) -> None:
    """Until what a device was given to do is done; a processor has done it."""
    if not device.startswith("cpu"):
        torch.accelerator.synchronize()
