"""What a run would do, take and need, from the configuration alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .goal import Goal
from .methods import method_named
from .model.anatomy import Anatomy, find_anatomy
from .model.axes import CUTS, Axis
from .model.resources import PARAMETERS, Resource
from .precision import compute_dtype_of
from .result import Size
from .score.collect import micro_batch_size
from .score.observers import Fisher, Gram, Observer, matrices
from .settings import PruneSettings

PROGRAM = 400_000_000
"""Bytes that Python takes with torch and transformers loaded."""
EARLIER_SUMS = "Gram matrices of earlier steps"
TRAINING = "gradients and moments of weights in training"


@dataclass(frozen=True)
class Plan:
    """Sizes are exact; memory and time are estimates."""

    before: Size
    resource: Resource
    """What the target limits."""
    amount_before: int
    """What the whole model has of it."""
    target: int
    """What it may have."""
    amount_after_step: list[int]
    """Whole model after each step; with the adaptive rule all but the last are approximate."""
    memory_bytes: dict[str, int]
    """Per part, at the largest point; the sum is the estimated peak."""
    seconds: float
    """On this machine, from its measured matrix throughput."""

    @property
    def sparsity(self) -> float | None:
        """Share of the decoder layers' parameters that goes; None if the target limits something
        else, so that it is known when the units are chosen."""
        if self.resource is not PARAMETERS:
            return None
        return (self.before.total - self.target) / self.before.decoder_layers

    @property
    def most_parameters(self) -> int:
        """That the result has at most."""
        return self.target if self.resource is PARAMETERS else self.before.total


def make_plan(
    model: Any,
    settings: PruneSettings,
    goal: Goal,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tokenizer: Any = None,
) -> Plan:
    """Plan the run that `prune` would make of the same arguments. `model` may be on `meta`.

    Raises:
        InvalidTarget, InvalidSettings, UnsupportedModel: as `prune` would.
    """
    anatomy = find_anatomy(model, goal.resource(tokenizer, model, settings))
    target = goal.target(settings, anatomy)
    outline = method_named(settings.method).outline(settings, anatomy, target)
    before = Size.of(anatomy)
    memory = _memory(anatomy, settings, outline.observers, dtype, device)
    if outline.trains_weights:
        memory[TRAINING] = 3 * memory["weights"]
    starts = [anatomy.amount, *outline.sizes[:-1]][: len(outline.sizes)]
    shares = [size / anatomy.amount for size in starts]
    passes = sum(_pass_flops(anatomy, settings, outline.observers, share) for share in shares)
    # The dense model's forward pass, the head once more for its predictions, and both directions.
    head = _config(anatomy).vocab_size * anatomy.hidden_size
    passes += 2.0 * outline.tuned_tokens * (3 * anatomy.layer_parameters + 3 * head)
    grams = sum(_gram_flops(anatomy, settings, outline.observers, share) for share in shares)
    compute = compute_dtype_of(settings.compute_dtype, model, dtype, device) or dtype
    return Plan(
        before=before,
        resource=anatomy.resource,
        amount_before=anatomy.amount,
        target=target,
        amount_after_step=outline.sizes,
        memory_bytes=memory,
        seconds=passes / _throughput(compute, device) + grams / _throughput(dtype, device),
    )


def _memory(
    anatomy: Anatomy,
    settings: PruneSettings,
    observers: Sequence[Observer],
    dtype: torch.dtype,
    device: str,
) -> dict[str, int]:
    size, config = dtype.itemsize, _config(anatomy)
    axes = _axes(anatomy, settings)
    prunable = sum(matrix.numel() for matrix in matrices(axes))
    memory = {"weights": anatomy.total_parameters * size}
    if torch.device(device).type == "cpu":
        memory["the program itself"] = PROGRAM
    if any(observer.needs_weight_gradients for observer in observers):
        memory["weight gradients"] = prunable * size
    if any(isinstance(observer, Fisher) for observer in observers):
        memory["squared gradients"] = prunable * (4 + size)
    if any(isinstance(observer, Gram) for observer in observers):
        memory["Gram matrices"] = sum(4 * width**2 for width in _columns(axes))
    carries = any(isinstance(observer, Gram) and observer.carries for observer in observers)
    if carries and torch.device(device).type == "cpu":  # they lie in the machine's own memory
        memory[EARLIER_SUMS] = memory["Gram matrices"]
    length = settings.window_length
    batch = micro_batch_size(
        settings.micro_batch_size, length, torch.device(device).type, observers
    )
    tokens = length * min(batch, settings.windows)
    hidden = anatomy.hidden_size
    per_layer = [
        sum(3 * width for width in _columns(anatomy.of_layer(i))) + 8 * hidden
        for i in range(len(anatomy.layers))
    ]
    if not any(observer.needs_backward for observer in observers):
        kept = max(per_layer)
    elif settings.gradient_checkpointing:
        kept = hidden * len(per_layer) + max(per_layer)
    else:
        kept = sum(per_layer)
    logits = config.vocab_size * size * 2  # and their gradient
    memory["activations of a micro-batch"] = tokens * (kept * size + logits)
    return memory


def _pass_flops(
    anatomy: Anatomy, settings: PruneSettings, observers: Sequence[Observer], share: float
) -> float:
    tokens = settings.windows * settings.window_length
    head = _config(anatomy).vocab_size * anatomy.hidden_size
    through = anatomy.layer_parameters * share + head
    passes = 2 if any(observer.needs_backward for observer in observers) else 1
    flops = 2.0 * tokens * through * passes
    if any(observer.needs_weight_gradients for observer in observers):
        flops += 2.0 * tokens * anatomy.layer_parameters * share
    return flops


def _gram_flops(
    anatomy: Anatomy, settings: PruneSettings, observers: Sequence[Observer], share: float
) -> float:
    if not any(isinstance(observer, Gram) for observer in observers):
        return 0.0
    tokens = settings.windows * settings.window_length
    widths = [width * share for width in _columns(_axes(anatomy, settings))]
    return sum(1.25 * tokens * width**2 + width**3 for width in widths)


def _config(anatomy: Anatomy) -> Any:
    model: Any = anatomy.model
    return model.config


def _axes(anatomy: Anatomy, settings: PruneSettings) -> list[Axis]:
    return anatomy.of_kinds({kind for name in settings.cut for kind in CUTS[name]})


def _columns(axes: Iterable[Axis]) -> list[int]:
    """Inputs of each output projection that the axes have units in."""
    found = {axis.projection: axis.output.tensor.shape[1] for axis in axes if axis.output}
    return list(found.values())


def _throughput(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second that a large matrix product reaches here."""
    size = 4096 if device.startswith("cuda") else 768
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()
        best = min(best, time.perf_counter() - began)
    # Attention, norms and small matrices run at a fraction of it: on a CPU 0.75, and of the faster
    # bfloat16 0.55, by cuts of a model of 135M parameters; on a GPU a guess.
    of_cpu = 0.55 if dtype is torch.bfloat16 else 0.75
    return (0.5 if device.startswith("cuda") else of_cpu) * 2 * size**3 / best
