"""Settings of recovery training. As in `adapt_pruner.settings`, each default, limit and description
stands here and nowhere else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import InvalidSettings
from ..limits import (
    BatchSize,
    BatchTokens,
    Budget,
    Decay,
    Factor,
    LearningRate,
    LearningRateOrZero,
    Length,
    Name,
    Nats,
    Norm,
    PartBelowOne,
    Rank,
    Rounds,
    Seed,
    Share,
    ShareBelowOne,
    Steps,
    Temperature,
    Width,
)
from ..settings import build


class RecoverySettings(BaseModel):
    """How a model is trained between cuts. Defaults are those of the Adapt-LLM runs (appendix A)
    where the paper states them, but for `alpha` and `final_share`: distillation and earlier cuts
    measured better."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    phases: Annotated[
        Rounds | None,
        Field(description="Rounds of pruning and training; default: from prune-per-phase."),
    ] = None
    prune_per_phase: Annotated[
        PartBelowOne | None,
        Field(
            description="Share of the present weights that each phase removes, instead of phases; "
            "default: 0.05.",
        ),
    ] = None
    growth: Annotated[
        Literal["linear", "constant", "cosine"],
        Field(description="How the tokens of a phase grow with its number (eq. 11: linear)."),
    ] = "linear"
    final_share: Annotated[
        ShareBelowOne,
        Field(
            description="At least this share of the tokens trains the last phase; 0: what growth "
            "gives it (paper).",
        ),
    ] = 0.75
    moments: Annotated[
        Literal["carry", "reset"],
        Field(description="What becomes of the optimizer's moments of the weights that stay."),
    ] = "reset"

    sequence_length: Annotated[Length, Field(description="Tokens per training window.")] = 1024
    batch_tokens: Annotated[
        BatchTokens, Field(description="Tokens of one optimizer step, over all processes.")
    ] = 131_072
    per_device_train_batch_size: Annotated[
        BatchSize | None,
        Field(
            description="Windows per forward pass; default: as many as 1 GB of logits allow, "
            "halved when memory runs out if there is one process.",
        ),
    ] = None
    learning_rate: Annotated[LearningRate, Field(description="Highest learning rate.")] = 2e-5
    min_learning_rate: Annotated[
        LearningRateOrZero, Field(description="Learning rate at the end.")
    ] = 0.0
    lr_scheduler: Annotated[
        Literal["wsd", "cosine", "constant"],
        Field(description="One schedule over all phases: warm-up, constant, linear decay (wsd)."),
    ] = "wsd"
    warmup_ratio: Annotated[
        ShareBelowOne, Field(description="Share of the steps that warm up linearly.")
    ] = 0.05
    decay_ratio: Annotated[
        ShareBelowOne, Field(description="Share of the steps that decay linearly (wsd).")
    ] = 0.10
    weight_decay: Annotated[Decay, Field(description="AdamW weight decay.")] = 0.0
    adam_beta1: Annotated[ShareBelowOne, Field(description="AdamW beta 1.")] = 0.9
    adam_beta2: Annotated[ShareBelowOne, Field(description="AdamW beta 2.")] = 0.999
    max_grad_norm: Annotated[Norm, Field(description="Gradients are clipped to it.")] = 1.0
    mixed_precision: Annotated[
        Literal["auto", "no", "bf16"],
        Field(description="Compute in bfloat16, weights in float32; auto: bf16 on a GPU."),
    ] = "auto"
    sharding: Annotated[
        Literal["ddp", "fsdp2"],
        Field(description="With several processes: each the whole model, or a share (FSDP2)."),
    ] = "ddp"
    train_seed: Annotated[
        Seed | None, Field(description="Seed of the data order; default: that of the run.")
    ] = None

    loss_on: Annotated[
        Literal["all", "answers"],
        Field(description="Train on all tokens, or on answers only (instruction and chat data)."),
    ] = "all"
    repeat: Annotated[
        bool, Field(description="Go through the data again where the budget is larger than it.")
    ] = False
    exclude: Annotated[
        Name | None,
        Field(
            description="Text, such as that of an evaluation, whose documents are left out; "
            "default: none.",
        ),
    ] = None
    reweight_every: Annotated[
        Steps,
        Field(description="Steps between new weights of a mixture with policy: dynamic."),
    ] = 50

    alpha: Annotated[
        Share,
        Field(description="Weight of the distillation loss; 0: no teacher (paper)."),
    ] = 0.5
    temperature: Annotated[Temperature, Field(description="Temperature of distillation.")] = 2.0
    teacher_top_k: Annotated[
        Width | None,
        Field(
            description="Store so many of the teacher's logits per token before training, so that "
            "it need not fit beside the student; default: run the teacher along.",
        ),
    ] = None

    teacher_tokens: Annotated[
        Budget | None,
        Field(
            description="Train the teacher on so many tokens of the data first (Minitron's teacher "
            "correction); default: it stays as it is.",
        ),
    ] = None

    lora_rank: Annotated[
        Rank, Field(description="Train LoRA of this rank, merged before each cut; 0: all.")
    ] = 0
    lora_alpha: Annotated[Factor, Field(description="LoRA alpha.")] = 16.0
    lora_dropout: Annotated[ShareBelowOne, Field(description="LoRA dropout.")] = 0.05

    max_loss_spike: Annotated[
        Nats | None,
        Field(description="Stop when the loss exceeds its running mean by so many nats."),
    ] = 3.0


def make_recovery_settings(**values: Any) -> RecoverySettings:
    """Check the values.

    Raises:
        InvalidSettings: for a setting that has a value it cannot have, or that excludes another.
    """
    settings = build(RecoverySettings, values)
    if settings.phases is not None and settings.prune_per_phase is not None:
        raise InvalidSettings(
            f"phases and prune_per_phase: say one of them; got {settings.phases} and "
            f"{settings.prune_per_phase:g}."
        )
    if settings.batch_tokens < settings.sequence_length:
        raise InvalidSettings(
            f"batch_tokens: one step takes at least one window of {settings.sequence_length} "
            f"tokens; got {settings.batch_tokens}. Raise it, or lower sequence_length."
        )
    if settings.min_learning_rate > settings.learning_rate:
        raise InvalidSettings(
            f"min_learning_rate: must not be above learning_rate {settings.learning_rate:g}; got "
            f"{settings.min_learning_rate:g}."
        )
    if settings.warmup_ratio + settings.decay_ratio > 1:
        raise InvalidSettings(
            "warmup_ratio and decay_ratio: together at most 1; got "
            f"{settings.warmup_ratio + settings.decay_ratio:g}."
        )
    return settings
