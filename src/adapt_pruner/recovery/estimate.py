"""What a run of Adapt-Accel would do, take and need, from configurations alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..goal import Goal
from ..methods import method_named
from ..model.anatomy import count_parameters, find_anatomy
from ..model.loading import empty_model
from ..model.resources import Resource
from ..plan import EARLIER_SUMS, TRAINING, make_plan
from ..precision import stored_dtype
from ..result import Size
from .materials import check_training, limited_by, plan_phases
from .request import AccelRequest, check_together
from .schedule import Phase, learning_rates, tokens_per_step
from .teacher import stored_bytes
from .training import micro_batch


@dataclass(frozen=True)
class PhasePlan:
    """One phase. FLOPs count training, with the teacher's forward passes."""

    phase: Phase
    tokens: int
    learning_rates: tuple[float, float]
    """Of its first and last step."""
    flops: float
    memory_bytes: int
    """Per GPU while it trains, in all."""


@dataclass(frozen=True)
class AccelPlan:
    """Sizes, tokens, steps and learning rates are exact; memory and time are estimates."""

    before: Size
    target: int
    """The most that the model may have of what the target limits."""
    resource: Resource
    phases: tuple[PhasePlan, ...]
    tokens: int
    """Trained on: the budget, rounded down to whole steps."""
    tokens_per_step: int
    gpus: int
    memory_bytes: dict[str, int]
    """Per GPU while training, per part, in the first and largest phase."""
    pruning_bytes: dict[str, int]
    """Per GPU at a cut, when each process has the whole model; of each part the most."""
    disk_bytes: int
    """What the teacher's stored logits take; 0 if none are stored."""
    gpu_hours: float

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)


def plan_accel(request: AccelRequest, gpus: int = 1, gpu_tflops: float = 400.0) -> AccelPlan:
    """Plan a run without loading weights.

    Args:
        gpu_tflops: floating-point operations that a GPU really does per second in training, 1e12.

    Raises:
        AdaptPrunerError: one of its kinds, as the run would.
    """
    check_together(request)
    model = empty_model(request.model, request.trust_remote_code)
    anatomy = find_anatomy(model)
    target, phases = plan_phases(request, model)
    check_training(request, model, gpus)
    recovery, per_step = request.recovery, tokens_per_step(request.recovery)
    rate_at = learning_rates(recovery, phases[-1].end_step)
    teacher = _empty_teacher(request, model)
    taught = count_parameters(teacher) if teacher else 0
    memory = [_training_memory(request, model, p.trained, gpus, teacher) for p in phases]
    plans = tuple(
        PhasePlan(
            phase,
            phase.steps * per_step,
            (rate_at(phase.first_step), rate_at(phase.end_step - 1)),
            phase.steps * per_step * _flops_per_token(request, phase, taught),
            sum(parts.values()),
        )
        for phase, parts in zip(phases, memory, strict=True)
    )
    hours = sum(plan.flops for plan in plans) / (gpu_tflops * 1e12) / 3600
    pruning = _pruning_memory(request, model, phases)
    if recovery.moments == "carry" and len(plans) > 1 and not _is_sharded(request, gpus):
        pruning["moments"] = memory[0]["moments"]
    tokens = phases[-1].end_step * per_step
    return AccelPlan(
        before=Size.of(anatomy),
        target=target,
        resource=limited_by(request),
        phases=plans,
        tokens=tokens,
        tokens_per_step=per_step,
        gpus=gpus,
        memory_bytes=memory[0],
        pruning_bytes=pruning,
        disk_bytes=_teacher_bytes(teacher, recovery.teacher_top_k, tokens),
        gpu_hours=hours,
    )


def _teacher_bytes(teacher: Any, top_k: int | None, tokens: int) -> int:
    """What the teacher's stored logits take on disk."""
    if not teacher or top_k is None:
        return 0
    return stored_bytes(tokens, min(top_k, teacher.config.vocab_size))


def _empty_teacher(request: AccelRequest, model: Any) -> Any:
    if not request.recovery.alpha or not request.teacher:
        return model if request.recovery.alpha else None
    return empty_model(request.teacher, request.trust_remote_code, prunable=False)


def _flops_per_token(request: AccelRequest, phase: Phase, teacher: int) -> float:
    """6 per weight: 2 forward, 4 backward; 8 if layers are recomputed; 2 more per teacher's."""
    factor = 8 if request.settings.gradient_checkpointing else 6
    return factor * phase.trained + 2 * teacher


def _pruning_memory(request: AccelRequest, model: Any, phases: Sequence[Phase]) -> dict[str, int]:
    """Of the GPU that cuts; sums of earlier steps lie in the machine's own memory, and
    masks train in a phase."""
    method = method_named(request.settings.method)
    settings = method.in_phase(request.settings, len(phases))
    goal = Goal(params=phases[0].parameters)
    plan = make_plan(model, settings, goal, _dtype(request)).memory_bytes
    return {part: size for part, size in plan.items() if part not in (EARLIER_SUMS, TRAINING)}


def _training_memory(
    request: AccelRequest, model: Any, parameters: int, gpus: int, teacher: Any
) -> dict[str, int]:
    """Weights, gradients and two moments in float32, or what `dtype` says; FSDP2 divides them.

    FSDP2 gathers weights to compute with, and their gradients before these are summed: of two
    layers, because the next one arrives while one computes, and always of embeddings and head.
    DDP has buckets as large as the gradients, and autocast casts all weights.
    Activations per layer and token: about 16 values of the hidden size and 3 of the MLP's, of 2
    bytes; with gradient checkpointing one value of the hidden size, and one layer's whole. Logits
    are held in float32 with their softmax and gradient; with a teacher, whose loss comes in chunks,
    with their gradient alone.
    """
    recovery, config = request.recovery, model.config
    share = gpus if _is_sharded(request, gpus) else 1
    trained = parameters
    if recovery.lora_rank:
        trained = _lora_parameters(model, recovery.lora_rank)
    size = _dtype(request).itemsize
    memory = {
        "weights": size * parameters // share,
        "gradients": size * trained // share,
        "moments": 2 * size * trained // share,
    }
    compute = size if recovery.mixed_precision == "no" else 2
    if _is_sharded(request, gpus):
        before = Size.of(find_anatomy(model))
        outside = before.total - before.decoder_layers
        gathered = outside + 2 * (parameters - outside) // config.num_hidden_layers
        memory["gathered layers"] = 2 * compute * gathered
    else:
        if compute < size:
            memory["bfloat16 weights"] = compute * parameters
        if gpus > 1:
            memory["buckets"] = size * trained
    windows = micro_batch(config.vocab_size, recovery)
    tokens = min(windows * recovery.sequence_length, tokens_per_step(recovery) // gpus)
    width = max(getattr(config, "intermediate_size", 0) or 0, config.hidden_size)
    layer = 2 * (16 * config.hidden_size + 3 * width)
    kept = layer * config.num_hidden_layers
    if request.settings.gradient_checkpointing:
        kept = 2 * config.hidden_size * config.num_hidden_layers + layer
    memory["activations"] = tokens * kept
    memory["logits"] = tokens * config.vocab_size * 4 * (2 if teacher else 3)
    if teacher and recovery.teacher_top_k is None:
        stored = (stored_dtype(teacher) or torch.float32).itemsize
        memory["teacher"] = stored * count_parameters(teacher)
        memory["teacher's logits"] = stored * tokens * teacher.config.vocab_size
    return memory


def _is_sharded(request: AccelRequest, gpus: int) -> bool:
    return request.recovery.sharding == "fsdp2" and gpus > 1


def _dtype(request: AccelRequest) -> torch.dtype:
    name = request.settings.dtype
    return torch.float32 if name == "auto" else getattr(torch, name)


def _lora_parameters(model: Any, rank: int) -> int:
    """Of all linear layers but the one that gives logits, as peft counts them."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if type(m).__name__ == "Linear" and m is not head]
    return sum(rank * sum(linear.weight.shape) for linear in linears)
