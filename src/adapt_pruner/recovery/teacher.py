"""The dense model as teacher: run along with the student, or asked once before training.

Stored logits lie in shards of consecutive windows of the run's data order; each shard is written
whole, so an interrupted run goes on with those that are missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.sampling import WindowSampler
from ..errors import InvalidSettings, WritingError, shown
from ..files import refusal
from ..model.loading import empty_model, load_tokenizer
from .objective import Teaching, store_teaching
from .request import AccelRequest

SHARD_WINDOWS = 256


class OnlineTeacher:
    """Runs the teacher on the student's windows.

    Args:
        num_tokens: of the vocabularies' tokens, those that both models have logits for.
    """

    def __init__(self, model: Any, accelerator: Accelerator, num_tokens: int):
        self.model = model.eval()
        self.accelerator, self.num_tokens = accelerator, num_tokens

    @torch.no_grad()
    def __call__(self, positions_B: Tensor, tokens_BT: Tensor) -> Teaching:
        with self.accelerator.autocast():
            logits_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits
        return Teaching(logits_BTV[..., : self.num_tokens].flatten(0, 1))


@contextmanager
def set_aside(teacher: Any) -> Iterator[None]:
    """Move a teacher that runs along to main memory, because a cut needs the GPU's."""
    on_gpu = isinstance(teacher, OnlineTeacher) and teacher.accelerator.device.type == "cuda"
    if on_gpu:
        teacher.model.to("cpu")
        torch.cuda.empty_cache()
    yield
    if on_gpu:
        teacher.model.to(teacher.accelerator.device)


@dataclass(frozen=True)
class Store:
    """Where logits are stored, and how many."""

    directory: Path
    """Its name tells what they were made of; logits of anything else lie beside it."""
    num_windows: int
    sequence_length: int
    top_k: int

    def file(self, shard: int) -> Path:
        return self.directory / f"logits-{shard:06}.safetensors"

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        shards = range(-(-self.num_windows // SHARD_WINDOWS))
        return [shard for shard in shards if not self.file(shard).exists()]

    def windows_of(self, shard: int) -> int:
        return min(SHARD_WINDOWS, self.num_windows - shard * SHARD_WINDOWS)

    def prepare(self) -> None:
        """Remove what was made of something else, and see that the rest will fit.

        Raises:
            WritingError: if it will not, or the disk refuses.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for entry in self.directory.parent.iterdir():
                if entry.is_dir() and entry != self.directory:
                    shutil.rmtree(entry)
            for partial in self.directory.glob("*.partial"):
                partial.unlink()
        except OSError as error:
            raise WritingError(
                f"'{self.directory}' cannot be written to: {error.strerror}."
            ) from error
        windows = sum(self.windows_of(shard) for shard in self.missing())
        needed = stored_bytes(windows * self.sequence_length, self.top_k)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise WritingError(
                f"teacher_top_k: {self.top_k} logits per token take {needed / 1e9:.3g} GB, but "
                f"only {free / 1e9:.3g} GB are free at '{self.directory}'. Free some space, or "
                "lower --teacher-top-k."
            )

    def write(self, shard: int, tensors: dict[str, Tensor]) -> None:
        file = self.file(shard)
        partial = file.with_suffix(".partial")
        try:
            save_file(tensors, partial)
            os.replace(partial, file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise WritingError(
                f"'{file}' could not be written: {refusal(error)}. What was stored before is kept; "
                "free some space and run the same command again."
            ) from error


def stored_bytes(tokens: int, top_k: int) -> int:
    """What stored logits take: per token 6 bytes for each of the K (float16 and an index), and 4
    for the sum."""
    return tokens * (6 * top_k + 4)


class StoredTeacher:
    """Reads what `store_logits` wrote."""

    def __init__(self, store: Store):
        self.store = store
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
            self.loaded = shard, load_file(self.store.file(shard))
        tensors = self.loaded[1]
        return tensors["logits"][place], tensors["index"][place], tensors["log_total"][place]


def store_logits(
    teacher: OnlineTeacher,
    sampler: WindowSampler,
    store: Store,
    temperature: float,
    batch_size: int,
    on_progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Ask the teacher about windows of the run's order, for the K most probable tokens of each
    position. Each process asks about every n-th shard that is missing.

    Args:
        sampler: one at the beginning of the data; it is moved.
        batch_size: windows asked about at a time.

    Raises:
        WritingError: for whatever the disk refuses.
    """
    accelerator = teacher.accelerator
    missing = store.missing()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    asked, in_all = 0, sum(store.windows_of(shard) for shard in mine)
    accelerator.wait_for_everyone()  # all have seen what is missing before the first one writes
    for shard in range(max(mine, default=-1) + 1):
        indices = sampler.next_indices(store.windows_of(shard))
        if shard not in mine:
            continue
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(indices), batch_size):
            ids_BT = sampler.gather(indices[start : start + batch_size]).input_ids
            parts.append(_answers(teacher, ids_BT.to(accelerator.device), store.top_k, temperature))
            asked += len(ids_BT)
            on_progress(asked / in_all)
        store.write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    accelerator.wait_for_everyone()


def _answers(
    teacher: OnlineTeacher, ids_BT: Tensor, top_k: int, temperature: float
) -> dict[str, Tensor]:
    """Of each token: (B, T, K) logits and their indices, (B, T) sums over the vocabulary."""
    found = teacher(ids_BT, ids_BT)
    kept = store_teaching(found.logits_NK, top_k, temperature)
    assert kept.index_NK is not None
    assert kept.log_total_N is not None
    tensors = {
        "logits": kept.logits_NK.half(),
        "index": kept.index_NK,
        "log_total": kept.log_total_N,
    }
    return {name: tensor.unflatten(0, ids_BT.shape).cpu() for name, tensor in tensors.items()}


def shared_tokens(request: AccelRequest, model: Any, tokenizer: Any) -> int:
    """Leading logits that the model has in common with its teacher, see `common_tokens`. `model`
    may be on `meta`."""
    own = model.config.vocab_size
    if not request.teacher:
        return own
    trust = request.trust_remote_code
    teacher = empty_model(request.teacher, trust, prunable=False)
    theirs = load_tokenizer(request.teacher, trust)
    return common_tokens(tokenizer, own, theirs, teacher.config.vocab_size, request.teacher)


def common_tokens(
    own: Any, own_size: int, teachers: Any, teachers_size: int, teacher_name: str
) -> int:
    """Leading logits that two models share; sizes may differ by padding.

    Args:
        own, teachers: the tokenizers of model and teacher.
        own_size, teachers_size: logits that either model has.

    Raises:
        InvalidSettings: unless each token of the model is one of the teacher's, of the same number.
    """
    theirs, mine = teachers.get_vocab(), own.get_vocab()
    differing = [token for token, number in mine.items() if theirs.get(token) != number]
    if differing:
        token = min(differing, key=lambda token: mine[token])
        there = f"is number {theirs[token]}" if token in theirs else "does not exist"
        raise InvalidSettings(
            f"teacher: '{teacher_name}' has another vocabulary than the model: {len(differing):,} "
            f"of {len(mine):,} tokens differ; {shown(token)}, number {mine[token]} here, {there} "
            "there. "
            "Their predictions cannot be compared; take a teacher of the same family."
        )
    needed = min(max(mine.values()) + 1, own_size)
    if teachers_size < needed:
        raise InvalidSettings(
            f"teacher: '{teacher_name}' has {teachers_size:,} logits, and its tokenizer {needed:,} "
            "tokens: they do not belong together. Take a teacher of the same family."
        )
    return min(own_size, teachers_size)
