"""What a run of Adapt-Accel would do, take and need, from configurations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..anatomy import Anatomy, count_parameters, find_anatomy
from ..api import Size
from ..loading import empty_model
from ..plan import make_plan
from .materials import plan_phases
from .request import AccelRequest, check_together
from .schedule import Phase, learning_rates, tokens_per_step


@dataclass(frozen=True)
class PhasePlan:
    """One phase. FLOPs count training, with the teacher's forward passes."""

    phase: Phase
    tokens: int
    learning_rates: tuple[float, float]
    """Of its first and last step."""
    flops: float


@dataclass(frozen=True)
class AccelPlan:
    """Sizes, tokens, steps and learning rates are exact; memory and time are estimates."""

    before: Size
    target: int
    phases: tuple[PhasePlan, ...]
    tokens: int
    """Trained on: the budget, rounded down to whole steps."""
    tokens_per_step: int
    gpus: int
    memory_bytes: dict[str, int]
    """Per GPU while training, per part, in the first and largest phase."""
    pruning_bytes: dict[str, int]
    """Per GPU at a cut, when each process has the whole model."""
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
    recovery, per_step = request.recovery, tokens_per_step(request.recovery)
    rate_at = learning_rates(recovery, phases[-1].end_step)
    teacher = _teacher_parameters(request, anatomy)
    plans = tuple(
        PhasePlan(
            phase,
            phase.steps * per_step,
            (rate_at(phase.first_step), rate_at(phase.end_step - 1)),
            phase.steps * per_step * _flops_per_token(request, anatomy, phase, teacher),
        )
        for phase in phases
    )
    hours = sum(plan.flops for plan in plans) / (gpu_tflops * 1e12) / 3600
    pruning = make_plan(
        model, request.settings, params=phases[0].parameters, dtype=_dtype(request)
    ).memory_bytes
    return AccelPlan(
        before=Size.of(anatomy),
        target=target,
        phases=plans,
        tokens=phases[-1].end_step * per_step,
        tokens_per_step=per_step,
        gpus=gpus,
        memory_bytes=_training_memory(request, model, phases[0].parameters, gpus, teacher),
        pruning_bytes=pruning,
        gpu_hours=hours,
    )


def _teacher_parameters(request: AccelRequest, anatomy: Anatomy) -> int:
    if not request.recovery.alpha:
        return 0
    if not request.teacher:
        return anatomy.total_parameters
    teacher = empty_model(request.teacher, request.trust_remote_code, prunable=False)
    return count_parameters(teacher)


def _flops_per_token(request: AccelRequest, anatomy: Anatomy, phase: Phase, teacher: int) -> float:
    """6 per weight: 2 forward, 4 backward; 8 if layers are recomputed; 2 more per teacher's."""
    factor = 8 if request.settings.gradient_checkpointing else 6
    return factor * phase.parameters + 2 * teacher


def _training_memory(
    request: AccelRequest, model: Any, parameters: int, gpus: int, teacher: int
) -> dict[str, int]:
    """Weights, gradients and two moments in float32, or what `dtype` says; FSDP2 divides them.

    Activations per layer and token: about 16 values of the hidden size and 3 of the MLP's, of 2
    bytes; with gradient checkpointing one value of the hidden size, and one layer's whole.
    """
    recovery, config = request.recovery, model.config
    share = gpus if recovery.sharding == "fsdp2" else 1
    trained = parameters
    if recovery.lora_rank:
        trained = _lora_parameters(model, recovery.lora_rank)
    size = _dtype(request).itemsize
    memory = {
        "weights": size * parameters // share,
        "gradients": size * trained // share,
        "moments": 2 * size * trained // share,
    }
    if teacher and recovery.teacher_top_k is None:
        memory["teacher"] = size * teacher
    windows = recovery.per_device_train_batch_size or max(
        1, min(2**28 // config.vocab_size, 16_384) // recovery.sequence_length
    )
    tokens = min(windows * recovery.sequence_length, tokens_per_step(recovery) // gpus)
    width = max(getattr(config, "intermediate_size", 0) or 0, config.hidden_size)
    layer = 2 * (16 * config.hidden_size + 3 * width)
    layers = config.num_hidden_layers
    kept = layer * layers
    if request.settings.gradient_checkpointing:
        kept = 2 * config.hidden_size * layers + layer
    memory["activations"] = tokens * kept
    memory["logits"] = tokens * config.vocab_size * 4 * 3
    return memory


def _dtype(request: AccelRequest) -> torch.dtype:
    name = request.settings.dtype
    return torch.float32 if name == "auto" else getattr(torch, name)


def _lora_parameters(model: Any, rank: int) -> int:
    linears = [m for m in model.modules() if type(m).__name__ == "Linear"]
    return sum(rank * sum(linear.weight.shape) for linear in linears)
