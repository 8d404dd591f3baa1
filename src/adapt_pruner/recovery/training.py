"""One phase of recovery training: a loop over optimizer steps, on accelerate.

The model between phases is a whole, plain one on every process; inside a phase it is wrapped (DDP,
FSDP2) as `accelerate launch` says. Gradients are those of the mean loss per predicted token of the
global batch, whatever the micro-batch size and the number of processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from ..allocate.masks import Masks
from ..data.sampling import Batch
from ..errors import NonFiniteError
from ..figures import RunningMean
from ..model.anatomy import architecture_of
from ..score.collect import checkpointed
from . import sharding
from .moments import Moments, read_moments, write_moments
from .objective import IGNORED, Teacher, loss_sums, targets_of
from .settings import RecoverySettings


@dataclass
class StepResult:
    """What one optimizer step saw, over all processes."""

    loss: float
    """Mean cross-entropy in nats per predicted token."""
    grad_norm: float
    domain_losses: dict[int, tuple[float, int]]
    """Per domain: sum of the cross-entropies, and the number of predicted tokens."""


@contextmanager
def training(
    accelerator: Accelerator,
    model: nn.Module,
    moments: Moments,
    settings: RecoverySettings,
    num_domains: int = 1,
    checkpointing: bool = False,
    *,
    masks: Masks | None = None,
) -> Iterator[PhaseTraining]:
    """Wrap `model` and an AdamW with these moments for one phase; unwrap on leaving.

    `masks` are attached to the model; they train along, at their own rate, towards their shape.

    On leaving, `phase.model` is the whole trained model and `phase.moments` are its moments.
    """
    layers = _decoder_layers(model) if checkpointing else []
    phase = PhaseTraining(accelerator, model, moments, settings, num_domains, masks)
    try:
        with checkpointed(layers, reentrant=False):
            yield phase
        phase.close()
    finally:
        accelerator.free_memory()


class PhaseTraining:
    """A wrapped model and its optimizer. See `training`."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        moments: Moments,
        settings: RecoverySettings,
        num_domains: int,
        masks: Masks | None = None,
    ):
        self.accelerator, self.settings, self.model = accelerator, settings, model
        self.num_domains, self.masks = num_domains, masks
        self.sharded = settings.sharding == "fsdp2" and accelerator.num_processes > 1
        self.micro_batch = micro_batch(model.config.vocab_size, settings)
        model.train()
        if self.sharded:
            self.plain = sharding.without_weights(model)
            self.wrapped = sharding.shard(model, accelerator.mixed_precision)
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, settings.weight_decay, masks),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
        )
        if self.sharded:
            self.optimizer = optimizer
            sharding.scatter_moments(model, optimizer, moments)
        else:
            write_moments(model, optimizer, moments)
            self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.moments = moments

    def step(
        self,
        batch: Batch,
        learning_rate: float,
        teacher: Teacher | None = None,
        positions_B: Tensor | None = None,
    ) -> StepResult:
        """Take one optimizer step on this process's share of the global batch.

        Args:
            positions_B: (B,) places of the windows in the run's order, for the teacher.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite; no weight has changed.
        """
        for group in self.optimizer.param_groups:
            masks = self.masks if group.get("of_masks") else None
            group["lr"] = masks.rate if masks else learning_rate
        targets_BT = targets_of(batch.labels)
        counts_B = (targets_BT != IGNORED).sum(dim=1)
        num_labels = int(self._summed(counts_B.sum()))
        losses_B = self._accumulate(batch, num_labels, teacher, positions_B)
        norm = self.accelerator.clip_grad_norm_(
            self.wrapped.parameters(), self.settings.max_grad_norm
        )
        by_domain = self._by_domain(losses_B, counts_B, batch.domains)
        loss = math.fsum(total for total, _ in by_domain.values()) / max(num_labels, 1)
        grad_norm = float(sharding.whole(norm))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            raise NonFiniteError(f"The {what} is NaN or infinite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm, by_domain)

    def _accumulate(self, batch: Batch, num_labels, teacher, positions_B) -> Tensor:
        """Gradients of the whole share, micro-batch after micro-batch; (B,) cross-entropies."""
        while True:
            size = self.micro_batch
            try:
                return self._try(size, batch, num_labels, teacher, positions_B)
            except RuntimeError as error:
                alone = self.accelerator.num_processes == 1
                if self.settings.per_device_train_batch_size or size == 1 or not alone:
                    raise
                if not should_reduce_batch_size(error):
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            self.micro_batch = -(-size // 2)

    def _try(self, size, batch: Batch, num_labels, teacher, positions_B) -> Tensor:
        accelerator, settings = self.accelerator, self.settings
        scale = accelerator.num_processes / max(num_labels, 1)  # the wrappers average gradients
        losses = []
        for start in range(0, len(batch.input_ids), size):
            rows = slice(start, start + size)
            ids_BT = batch.input_ids[rows].to(accelerator.device)
            labels_BT = batch.labels[rows].to(accelerator.device)
            teaching = teacher(positions_B[rows], ids_BT) if teacher else None
            last = start + size >= len(batch.input_ids)
            with nullcontext() if last else self._unsynchronised():
                logits_BTV = self.wrapped(input_ids=ids_BT, use_cache=False).logits
                total, losses_B = loss_sums(
                    logits_BTV, labels_BT, teaching, settings.alpha, settings.temperature
                )
                del logits_BTV
                total = total * scale
                if last and self.masks is not None:
                    total = total + self.masks.penalty()  # the same on every process
                accelerator.backward(total)
            losses.append(losses_B)
        return torch.cat(losses)

    def _by_domain(self, losses_B, counts_B, domains_B) -> dict[int, tuple[float, int]]:
        sums = torch.zeros(self.num_domains, 2, dtype=torch.float64)
        rows = torch.stack([losses_B.cpu().double(), counts_B.cpu().double()], dim=1)
        sums.index_add_(0, domains_B, rows)
        table = self._summed(sums.to(self.accelerator.device)).cpu().tolist()
        return {i: (loss, int(count)) for i, (loss, count) in enumerate(table) if count}

    def _summed(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        summed: Any = self.accelerator.reduce(value.to(self.accelerator.device), reduction="sum")
        return summed

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        """Under DDP, gradients add up on each process until the last micro-batch. Under FSDP2 they
        are exchanged every time: until then, each process would hold those of the whole model."""
        return nullcontext() if self.sharded else self.accelerator.no_sync(self.wrapped)

    def state(self) -> tuple[dict[str, Tensor], Moments]:
        """Weights and moments, whole, by the names that the plain model has; with FSDP2 on the
        first process alone. All processes call it."""
        if self.sharded:
            weights = sharding.read_weights(self.wrapped, everywhere=False)
            return weights, sharding.gather_moments(self.wrapped, self.optimizer)
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        return weights, read_moments(self.model, _plain(self.optimizer))

    def close(self) -> None:
        """Take the wrapping off. Moments are kept where the next phase wants them."""
        if self.settings.moments == "reset":
            self.moments = {}
        elif self.sharded:
            self.moments = sharding.gather_moments(self.wrapped, self.optimizer)
        else:
            self.moments = read_moments(self.model, _plain(self.optimizer))
        if self.sharded:
            weights = sharding.read_weights(self.wrapped, everywhere=True)
            self.model = sharding.with_weights(self.plain, weights)
        else:
            self.model = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.model.eval()


def _decoder_layers(model: Any) -> list[nn.Module]:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # LoRA
    return list(plain.get_submodule(architecture_of(plain.config).layers).children())


def micro_batch(vocab_size: int, settings: RecoverySettings) -> int:
    """Windows per forward pass: those set, or whose float32 logits take about 1 GB, at most 16,384
    tokens. Where none is set, they halve when memory runs out on the only process there is: of
    several, the others would wait for gradients that never come."""
    tokens = min(2**28 // vocab_size, 16_384)
    return settings.per_device_train_batch_size or max(1, tokens // settings.sequence_length)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _parameter_groups(
    model: nn.Module, weight_decay: float, masks: Masks | None
) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not, as in transformers' Trainer. Masks have groups of
    their own."""
    own = set(masks.parameters()) if masks is not None else set()
    trained = [p for p in model.parameters() if p.requires_grad and p not in own]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups += masks.parameter_groups() if masks is not None else []
    return [group for group in groups if group["params"]]


class SpikeGuard:
    """Notices a loss that leaves its running mean by more than `limit` nats."""

    def __init__(self, limit: float | None, memory: int = 20, warmup: int = 10):
        self.limit, self.warmup, self.mean = limit, warmup, RunningMean(memory)

    def check(self, loss: float) -> None:
        """Raises NonFiniteError on a spike."""
        mean = self.mean.value
        if self.limit is not None and self.mean.seen >= self.warmup and loss > mean + self.limit:
            raise NonFiniteError(f"The loss rose to {loss:.3f} from a running mean of {mean:.3f}")
        self.mean.add(loss)


class Throughput:
    """Tokens per second since the last reading."""

    def __init__(self) -> None:
        self.since = time.perf_counter()

    def read(self, tokens: int) -> float:
        now = time.perf_counter()
        elapsed, self.since = now - self.since, now
        return tokens / max(elapsed, 1e-9)
