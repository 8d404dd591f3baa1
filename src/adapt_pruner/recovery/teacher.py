"""The dense model as teacher: run along with the student, or asked once before training.

Stored logits lie in shards of consecutive windows of the run's data order; each shard is written
whole, so an interrupted run goes on with the first one that is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.sampling import WindowSampler
from ..errors import InvalidSettings
from .objective import Teaching, store_teaching

SHARD_WINDOWS = 256


class OnlineTeacher:
    """Runs the teacher on the student's windows."""

    def __init__(self, model: Any):
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, positions_B: Tensor, tokens_BT: Tensor) -> Teaching:
        logits_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits
        return Teaching(logits_BTV.flatten(0, 1))


class StoredTeacher:
    """Reads what `store_logits` wrote."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.loaded: tuple[int, dict[str, Tensor]] = (-1, {})

    def __call__(self, positions_B: Tensor, tokens_BT: Tensor) -> Teaching:
        rows = [self._row(position) for position in positions_B.tolist()]
        logits, index, log_total = (torch.stack(column) for column in zip(*rows, strict=True))
        device = tokens_BT.device
        return Teaching(
            logits.flatten(0, 1).to(device),
            index.flatten(0, 1).to(device),
            log_total.flatten().to(device),
        )

    def _row(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        shard, place = divmod(position, SHARD_WINDOWS)
        if self.loaded[0] != shard:
            self.loaded = shard, load_file(_shard_file(self.directory, shard))
        tensors = self.loaded[1]
        return tensors["logits"][place], tensors["index"][place], tensors["log_total"][place]


@torch.no_grad()
def store_logits(
    model: Any,
    sampler: WindowSampler,
    num_windows: int,
    directory: Path,
    top_k: int,
    temperature: float,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Ask the teacher about the first `num_windows` windows of the run's order, top-k per token.

    Per token 6 bytes for each of the K logits (float16 and an index) and 4 more.

    Args:
        sampler: one at the beginning of the data; it is moved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    device = model.get_input_embeddings().weight.device
    for shard in range(-(-num_windows // SHARD_WINDOWS)):
        count = min(SHARD_WINDOWS, num_windows - shard * SHARD_WINDOWS)
        indices = sampler.next_indices(count)
        file = _shard_file(directory, shard)
        if not file.exists():
            parts: dict[str, list[Tensor]] = {"logits": [], "index": [], "log_total": []}
            for start in range(0, count, batch_size):
                ids_BT = sampler.gather(indices[start : start + batch_size]).input_ids.to(device)
                logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
                found = store_teaching(logits_BTV.flatten(0, 1), top_k, temperature)
                assert found.index_NK is not None
                assert found.log_total_N is not None
                shape = ids_BT.shape
                parts["logits"].append(found.logits_NK.half().unflatten(0, shape).cpu())
                parts["index"].append(found.index_NK.unflatten(0, shape).cpu())
                parts["log_total"].append(found.log_total_N.unflatten(0, shape).cpu())
            partial = file.with_suffix(".partial")
            save_file({name: torch.cat(pieces) for name, pieces in parts.items()}, partial)
            os.replace(partial, file)
        on_progress(shard * SHARD_WINDOWS + count)


def _shard_file(directory: Path, shard: int) -> Path:
    return directory / f"logits-{shard:06}.safetensors"


def check_vocabularies(student: Any, teacher: Any) -> None:
    """Raise InvalidSettings unless both models speak of the same tokens."""
    own, other = student.config.vocab_size, teacher.config.vocab_size
    if own != other:
        raise InvalidSettings(
            f"The teacher has a vocabulary of {other:,} tokens, the model one of {own:,}; their "
            "predictions cannot be compared. Take a teacher of the same family."
        )
