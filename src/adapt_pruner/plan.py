"""What a run would do, take and need, from the configuration alone."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from .allocate.chains import check_reachable, resolve_target, sizes_after_steps
from .methods.adapt_pruner import limits_of
from .model.anatomy import Anatomy, find_anatomy
from .result import Size
from .score.collect import Wants
from .score.importance import IMPORTANCES
from .settings import PruneSettings


@dataclass(frozen=True)
class Plan:
    """Sizes are exact; memory and time are estimates."""

    before: Size
    target: int
    parameters_after_step: list[int]
    """Whole model after each step; with the adaptive rule all but the last are approximate."""
    memory_bytes: dict[str, int]
    """Per part, at the largest point; the sum is the estimated peak."""
    seconds: float
    """On this machine, from its measured matrix throughput."""

    @property
    def sparsity(self) -> float:
        return (self.before.total - self.target) / self.before.decoder_layers


def make_plan(
    model: Any,
    settings: PruneSettings,
    sparsity: float | None = None,
    params: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Plan:
    """Plan the run that `prune` would make of the same arguments. `model` may be on `meta`.

    Raises:
        InvalidTarget, InvalidSettings, UnsupportedModel: as `prune` would.
    """
    anatomy = find_anatomy(model)
    target = resolve_target(anatomy, sparsity, params)
    check_reachable(anatomy, target, limits_of(settings, anatomy))
    before = Size.of(anatomy)
    removed = before.total - target
    steps = settings.steps
    if settings.allocation == "adaptive":
        steps = max(1, math.ceil(steps * removed / before.decoder_layers)) if removed else 0
        share = before.decoder_layers / settings.steps
        sizes = [max(target, round(before.total - share * (i + 1))) for i in range(steps)]
    else:
        sizes = sizes_after_steps(anatomy, target, steps) if removed else []
    wants = IMPORTANCES[settings.importance].wants
    if settings.compensation == "refit":
        wants |= Wants.GRAM
    memory = _memory(model, anatomy, settings, wants, dtype)
    flops = sum(
        _step_flops(anatomy, model, settings, wants, size / before.total)
        for size in [before.total, *sizes[:-1]][: len(sizes)]
    )
    return Plan(before, target, sizes, memory, flops / _throughput(dtype, device))


def _memory(model, anatomy: Anatomy, settings, wants: Wants, dtype) -> dict[str, int]:
    size = torch.empty(0, dtype=dtype).element_size()
    prunable = sum(group.num_units * group.unit_cost for group in anatomy.groups)
    memory = {"weights": anatomy.total_parameters * size}
    if wants.of_weights:
        memory["weight gradients"] = prunable * size
    if Wants.FISHER in wants:
        memory["squared gradients"] = prunable * (4 + size)
    if Wants.GRAM in wants:
        memory["Gram matrices"] = sum(4 * _columns(group) ** 2 for group in anatomy.groups)
    batch = 1 if Wants.FISHER in wants else settings.micro_batch_size
    tokens = settings.window_length * (batch or max(1, 2048 // settings.window_length))
    hidden = model.config.hidden_size
    per_layer = [
        sum(3 * _columns(group) for group in anatomy.of_layer(i)) + 8 * hidden
        for i in range(len(anatomy.layers))
    ]
    if not wants.backward:
        kept = max(per_layer)
    elif settings.gradient_checkpointing:
        kept = hidden * len(per_layer) + max(per_layer)
    else:
        kept = sum(per_layer)
    logits = model.config.vocab_size * size * 2  # and their gradient
    memory["activations of a micro-batch"] = tokens * (kept * size + logits)
    return memory


def _step_flops(anatomy: Anatomy, model, settings, wants: Wants, share: float) -> float:
    tokens = settings.windows * settings.window_length
    head = model.config.vocab_size * model.config.hidden_size
    through = anatomy.layer_parameters * share + head
    passes = 2 if wants.backward else 1
    flops = 2.0 * tokens * through * passes
    if wants.of_weights:
        flops += 2.0 * tokens * anatomy.layer_parameters * share
    if Wants.GRAM in wants:
        widths = [_columns(group) * share for group in anatomy.groups]
        flops += sum(1.25 * tokens * width**2 + width**3 for width in widths)
    return flops


def _columns(group) -> int:
    return group.output.index_UK.numel()


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
    # Attention, norms and small matrices run at a fraction of it.
    return 0.5 * 2 * size**3 / best
