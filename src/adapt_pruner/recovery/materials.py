"""What a run works on: model, tokenizer, data, calibration windows, evaluation text, teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..allocation import check_reachable, resolve_target
from ..anatomy import find_anatomy
from ..api import calibration_for, check_window_length
from ..cache import default_cache
from ..data import CalibrationData
from ..data.mixture import read_mixture
from ..data.packing import PackedData, prepare
from ..data.sampling import WindowSampler
from ..errors import InvalidSettings
from ..loading import empty_model, load_model, load_tokenizer
from ..methods.adapt_pruner import limits_of
from ..run import evaluation_texts, stored_dtype
from .objective import IGNORED, loss_sums, targets_of
from .request import AccelListener, AccelRequest
from .schedule import Phase, make_phases, tokens_per_step
from .teacher import OnlineTeacher, StoredTeacher, check_vocabularies, store_logits
from .training import Teacher

REFERENCE_WINDOWS = 64


@dataclass
class Materials:
    """All of it, on this process."""

    accelerator: Accelerator
    tokenizer: Any
    model: Any
    """The source model, on its device, in the precision of training."""
    stored_dtype: torch.dtype | None
    """That in which the result is written."""
    target: int
    phases: tuple[Phase, ...]
    data: PackedData
    calibration: CalibrationData
    texts: list[str] | None
    teacher: Teacher | None
    seed: int
    """Of the order of the data."""

    def sampler(self) -> WindowSampler:
        """One at the beginning of the data."""
        return WindowSampler(self.data, self.seed)


def read_model(
    request: AccelRequest, name: str, accelerator: Accelerator, prunable: bool = True
) -> Any:
    """Load a model in the precision of training, onto the device of this process."""
    dtype = "float32" if request.settings.dtype == "auto" else request.settings.dtype
    trust = request.trust_remote_code
    model = load_model(name, dtype, "cpu", trust_remote_code=trust, prunable=prunable)
    return model.to(accelerator.device)


def plan_phases(request: AccelRequest, model: Any) -> tuple[int, tuple[Phase, ...]]:
    """Parameters to reach, and the phases on the way. `model` may be on `meta`.

    Raises:
        InvalidTarget, InvalidSettings: if the target or the budget makes no sense.
    """
    anatomy = find_anatomy(model)
    target = resolve_target(anatomy, request.sparsity, request.params)
    check_reachable(anatomy, target, limits_of(request.settings, anatomy))
    phases = make_phases(request.recovery, anatomy.total_parameters, target, request.tokens)
    return target, phases


def gather(request: AccelRequest, accelerator: Accelerator, listener: AccelListener) -> Materials:
    """Read everything that `request` names but the teacher; the first process does first what all
    need. Writes nothing but the cache of tokenised data.

    Raises:
        AdaptPrunerError: one of its kinds, for whatever is missing or does not fit.
    """
    recovery, settings = request.recovery, request.settings
    listener.on_prepare("reading the model")
    empty = empty_model(request.model, request.trust_remote_code)
    target, phases = plan_phases(request, empty)
    _check_processes(request, accelerator)
    _check_lengths(request, empty)
    mixture = read_mixture(request.data)
    if mixture.policy == "dynamic" and recovery.alpha and recovery.teacher_top_k:
        raise InvalidSettings(
            "teacher_top_k: with a mixture of policy: dynamic it is not known in advance which "
            "windows come; leave it out, so that the teacher runs along."
        )
    tokenizer = load_tokenizer(request.model, request.trust_remote_code)
    model = read_model(request, request.model, accelerator)
    texts = None
    if request.evaluate:
        texts = evaluation_texts(request.evaluate, settings.text_column, settings.max_documents)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    seed = settings.seed if recovery.train_seed is None else recovery.train_seed

    if request.teacher:
        teacher = empty_model(request.teacher, request.trust_remote_code, prunable=False)
        check_vocabularies(model, teacher)

    listener.on_prepare("reading the data")
    calibration = calibration_for(model, tokenizer, settings)
    with accelerator.main_process_first():
        data = prepare(
            mixture,
            tokenizer,
            sequence_length=recovery.sequence_length,
            tokens=phases[-1].end_step * tokens_per_step(recovery),
            cache=request.data_cache or default_cache() / "data",
            loss_on=recovery.loss_on,
            repeat=recovery.repeat,
            exclude=recovery.exclude,
            seed=seed,
            vocab_size=vocab_size,
            on_progress=lambda name, done, needed: listener.on_prepare(
                f"tokenising {name}: {done / max(needed, 1):.0%}"
            ),
        )
    listener.on_data(data.describe())
    return Materials(
        accelerator, tokenizer, model, stored_dtype(empty), target, phases, data, calibration,
        texts, None, seed,
    )  # fmt: skip


def _check_lengths(request: AccelRequest, model: Any) -> None:
    check_window_length(model.config, request.settings)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and request.recovery.sequence_length > longest:
        raise InvalidSettings(
            f"sequence_length: the model reads at most {longest} tokens; got "
            f"{request.recovery.sequence_length}."
        )


def _check_processes(request: AccelRequest, accelerator: Accelerator) -> None:
    count, length = accelerator.num_processes, request.recovery.sequence_length
    windows = tokens_per_step(request.recovery) // length
    if windows % count:
        raise InvalidSettings(
            f"batch_tokens: {windows} windows per step cannot be shared by {count} processes; take "
            f"a multiple of {count * length:,} tokens."
        )


def make_teacher(
    request: AccelRequest, materials: Materials, directory: Path, listener: AccelListener
) -> Teacher:
    """Load the teacher; with `teacher_top_k`, ask it first and write the answers to `directory`.

    Raises:
        InvalidSettings: if it has another vocabulary, or cannot be asked in advance.
    """
    recovery, accelerator = request.recovery, materials.accelerator
    model = read_model(request, request.teacher or request.model, accelerator, prunable=False)
    if recovery.teacher_top_k is None:
        return OnlineTeacher(model)
    listener.on_prepare("asking the teacher")
    steps = materials.phases[-1].end_step
    with accelerator.main_process_first():
        store_logits(
            model, materials.sampler(),
            steps * tokens_per_step(recovery) // recovery.sequence_length,
            directory / "teacher", recovery.teacher_top_k, recovery.temperature,
        )  # fmt: skip
    return StoredTeacher(directory / "teacher")


@torch.no_grad()
def reference_losses(materials: Materials) -> dict[str, float]:
    """Loss of the source model on some windows of each domain, in nats per token; those that the
    mixture states stand."""
    device, sampler = materials.accelerator.device, materials.sampler()
    stated, losses = materials.data.mixture.reference_losses, {}
    for i, domain in enumerate(materials.data.domains):
        if domain.name in stated:
            losses[domain.name] = stated[domain.name]
            continue
        total, labels = 0.0, 0
        for window in range(min(REFERENCE_WINDOWS, domain.num_windows)):
            batch = sampler.gather(np.array([[i, window]]))
            ids_BT, labels_BT = batch.input_ids.to(device), batch.labels.to(device)
            logits_BTV = materials.model(input_ids=ids_BT, use_cache=False).logits
            total += float(loss_sums(logits_BTV, labels_BT)[0])
            labels += int((targets_of(labels_BT) != IGNORED).sum())
        losses[domain.name] = total / max(labels, 1)
    return losses
