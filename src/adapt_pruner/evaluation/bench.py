"""What a smaller model buys: bytes, time and memory, measured and at best."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..errors import NonFiniteError
from ..settings import BenchSettings
from .speed import Speed, compare_speed, fitting_prompt, generate, random_prompt


@dataclass(frozen=True)
class RunningCost:
    """What one model takes. Ideal speed-ups are over the first model measured with it."""

    parameters: int
    weight_bytes: int
    decode_bytes: int
    """Weight bytes that one decoding step reads: all but rows of an untied embedding."""
    kv_bytes_per_token: int
    """Bytes by which the cache grows per token of one sequence."""
    prefill_flops: int
    """Of reading the whole prompt."""
    peak_bytes: int
    """Most memory at once while the prompt is read and continued, weights included: as the CUDA
    allocator counts it; on the CPU the sum of the tensors alive, without the kernels' scratch."""
    speed: Speed
    ideal_prefill_speedup: float
    """Ratio of floating-point operations: what a model bound by arithmetic would reach."""
    ideal_decode_speedup: float
    """Ratio of weight bytes read: what a model bound by memory would reach at batch size 1."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def compare_costs(
    models: Sequence[Any],
    settings: BenchSettings | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[RunningCost]:
    """Measure all models in one run; time is taken in turns (`compare_speed`).

    A prompt that some model could not read is shortened for all.

    Raises:
        NonFiniteError: for weights that are NaN or infinite; their speed means nothing.
    """
    models, settings = list(models), settings or BenchSettings()
    for model in models:
        check_finite(model)
    new_tokens, batch_size = settings.new_tokens, settings.batch_size
    prompt_tokens = fitting_prompt(models, settings.prompt_tokens, new_tokens)
    speeds = compare_speed(
        models, prompt_tokens, new_tokens, settings.repetitions, batch_size, on_progress
    )
    costs: list[RunningCost] = []
    for model, speed in zip(models, speeds, strict=True):
        flops = _prefill_flops(model, prompt_tokens, batch_size)
        read = _decode_bytes(model)
        first = costs[0] if costs else None
        costs.append(
            RunningCost(
                parameters=sum(p.numel() for p in model.parameters()),
                weight_bytes=_bytes_of(model.parameters()),
                decode_bytes=read,
                kv_bytes_per_token=_kv_bytes_per_token(model),
                prefill_flops=flops,
                peak_bytes=_peak_bytes(model, prompt_tokens, new_tokens, batch_size),
                speed=speed,
                ideal_prefill_speedup=first.prefill_flops / flops if first else 1.0,
                ideal_decode_speedup=first.decode_bytes / read if first else 1.0,
            )
        )
    return costs


def check_finite(model: Any) -> None:
    """Raise NonFiniteError if a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter.sum()):
            if torch.isfinite(parameter).all():  # only the sum is too large
                continue
            raise NonFiniteError(
                f"{name} of '{model.config._name_or_path}' holds NaN or infinity: the weights are "
                "damaged. Copy or download them again."
            )


def _bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _decode_bytes(model: Any) -> int:
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return _bytes_of(model.parameters()) - (0 if tied else _bytes_of([embedding]))


def _prefill_flops(model: Any, prompt_tokens: int, batch_size: int) -> int:
    ids = random_prompt(model, prompt_tokens, batch_size)
    # Eager attention is made of products that are counted on every device, in full and not halved
    # by the causal mask.
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
    finally:
        model.set_attn_implementation(attention)
    return counter.get_total_flops()


def _kv_bytes_per_token(model: Any) -> int:
    """From the cache itself, so that head counts per layer and other kinds of layers are right."""
    sizes = []
    for num_tokens in (1, 2):
        cache = generate(model, random_prompt(model, num_tokens), 1)
        tensors = {
            id(tensor): tensor
            for layer in cache.layers
            for tensor in vars(layer).values()
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 2
        }
        sizes.append(_bytes_of(tensors.values()))
    return sizes[1] - sizes[0]


def _peak_bytes(model: Any, prompt_tokens: int, new_tokens: int, batch_size: int) -> int:
    ids = random_prompt(model, prompt_tokens, batch_size)
    weights = _bytes_of(model.parameters())
    gc.collect()
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ids.device)
        before = torch.cuda.memory_allocated(ids.device)
        generate(model, ids, new_tokens)
        return weights + torch.cuda.max_memory_allocated(ids.device) - before
    with _LiveTensors() as live:
        generate(model, ids, new_tokens)
    return weights + live.peak


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while these are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata in old or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
