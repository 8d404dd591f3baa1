"""What a run works on: model, tokenizer, data, calibration windows, evaluation text, teacher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..api import calibration_for, check_window_length
from ..cache import default_cache
from ..data import CalibrationData
from ..data.mixture import Mixture, read_mixture
from ..data.packing import PackedData, prepare
from ..data.sampling import WindowSampler
from ..errors import InvalidSettings
from ..methods import method_named
from ..model.anatomy import find_anatomy
from ..model.loading import empty_model, load_config, load_model, load_tokenizer
from ..model.resources import PARAMETERS, Resource
from ..run import evaluation_texts, stored_dtype
from ..settings import PruneSettings
from .launch import first_alone
from .objective import IGNORED, Teacher, loss_sums, targets_of
from .request import TRAINING_DATA, AccelListener, AccelRequest
from .schedule import Phase, make_phases, tokens_per_step
from .teacher import shared_tokens

REFERENCE_WINDOWS = 64


@dataclass
class Materials:
    """All of it, on this process."""

    request: AccelRequest
    accelerator: Accelerator
    tokenizer: Any
    empty: Any
    """The source model on the meta device."""
    model: Any
    """The source model, on its device, in the precision of training; None where it is not read,
    because a checkpoint takes its place."""
    dtype: torch.dtype
    """Of the weights in training."""
    stored_dtype: torch.dtype | None
    """That in which the result is written."""
    target: int
    """The most that the model may have of what the target limits."""
    phases: tuple[Phase, ...]
    data: PackedData
    calibration: CalibrationData
    texts: list[str] | None
    teacher: Teacher | None
    seed: int
    """Of the order of the data."""
    num_tokens: int
    """That model and teacher both know; 0 without a teacher."""

    @cached_property
    def resource(self) -> Resource:
        """What the target limits."""
        return limited_by(self.request)

    def source(self) -> Any:
        """The source model, read if it has not been."""
        if self.model is None:
            self.model = read_model(self.request, self.accelerator)
        return self.model

    def sampler(self) -> WindowSampler:
        """One at the beginning of the data."""
        return WindowSampler(self.data, self.seed)


def read_model(request: AccelRequest, accelerator: Accelerator) -> Any:
    """Load the source model in the precision of training, onto the device of this process."""
    dtype = str(training_dtype(request)).removeprefix("torch.")
    model = load_model(request.model, dtype, "cpu", trust_remote_code=request.trust_remote_code)
    return model.to(accelerator.device)


def training_dtype(request: AccelRequest) -> torch.dtype:
    name = request.settings.dtype
    return torch.float32 if name == "auto" else getattr(torch, name)


def limited_by(request: AccelRequest) -> Resource:
    """What the target of a run limits."""
    tokenizer = None
    if request.bytes is not None:
        tokenizer = load_tokenizer(request.model, request.trust_remote_code)
    dense = empty_model(request.model, request.trust_remote_code) if request.is_of_time else None
    return request.resource(tokenizer, dense)


def plan_phases(request: AccelRequest, model: Any) -> tuple[int, tuple[Phase, ...]]:
    """What to reach, and the phases on the way. `model` may be on `meta`.

    Raises:
        InvalidTarget, InvalidSettings: if the target or the budget makes no sense.
    """
    anatomy = find_anatomy(model, limited_by(request))
    target = request.target(request.settings, anatomy)
    method_named(request.settings.method).outline(request.settings, anatomy, target)
    of_model = None if anatomy.resource is PARAMETERS else anatomy.total_parameters
    phases = make_phases(
        request.recovery, anatomy.amount, target, request.tokens, of_model,
        mask_share=getattr(request.settings, "mask_share", 0.0),
    )  # fmt: skip
    return target, phases


def gather(
    request: AccelRequest,
    accelerator: Accelerator,
    listener: AccelListener,
    with_model: bool = True,
) -> Materials:
    """Read everything that `request` names but the teacher; of the data, the first process before
    the others. Writes nothing but the cache of tokenised data.

    Args:
        with_model: read the source model now, so that what is wrong with it shows.

    Raises:
        AdaptPrunerError: one of its kinds, for whatever is missing or does not fit.
    """
    settings, seed = request.settings, seed_of(request)
    listener.on_prepare("reading the model")
    empty = empty_model(request.model, request.trust_remote_code)
    target, phases = plan_phases(request, empty)
    check_training(request, empty, accelerator.num_processes)
    mixture = read_mixture(request.data)
    tokenizer = load_tokenizer(request.model, request.trust_remote_code)
    num_tokens = shared_tokens(request, empty, tokenizer) if request.recovery.alpha else 0
    model = read_model(request, accelerator) if with_model else None
    texts = _texts(request)
    listener.on_prepare("reading the data")
    own = settings.calibration == TRAINING_DATA
    calibration = None if own else calibration_for(empty, tokenizer, settings)
    budget = phases[-1].end_step * tokens_per_step(request.recovery)
    num_windows = budget // request.recovery.sequence_length
    with first_alone(accelerator):
        data = _prepare(request, mixture, tokenizer, budget, empty, listener)
    listener.on_data(data.describe())
    return Materials(
        request=request,
        accelerator=accelerator,
        tokenizer=tokenizer,
        empty=empty,
        model=model,
        dtype=training_dtype(request),
        stored_dtype=stored_dtype(empty),
        target=target,
        phases=phases,
        data=data,
        calibration=calibration or calibration_on(data, settings, num_windows, seed),
        texts=texts,
        teacher=None,
        seed=seed,
        num_tokens=num_tokens,
    )


def _texts(request: AccelRequest) -> list[str] | None:
    """What to measure on after each phase, if anything."""
    if not request.evaluate:
        return None
    settings = request.settings
    return evaluation_texts(request.evaluate, settings.text_column, settings.max_documents)


def seed_of(request: AccelRequest) -> int:
    """Seed of the order of the data."""
    own = request.recovery.train_seed
    return request.settings.seed if own is None else own


def _check_answers(data: PackedData, loss_on: str) -> None:
    if loss_on == "answers" and all(domain.account.format == "text" for domain in data.domains):
        raise InvalidSettings(
            "loss_on: the data are plain text, without answers to take the loss on. Take data of "
            "instructions or chats, or loss_on all."
        )


def _prepare(
    request: AccelRequest,
    mixture: Mixture,
    tokenizer: Any,
    num_tokens: int,
    empty: Any,
    listener: AccelListener,
) -> PackedData:
    recovery = request.recovery
    data = prepare(
        mixture,
        tokenizer,
        sequence_length=recovery.sequence_length,
        tokens=num_tokens,
        cache=request.data_cache or default_cache() / "data",
        loss_on=recovery.loss_on,
        repeat=recovery.repeat,
        exclude=recovery.exclude,
        seed=seed_of(request),
        vocab_size=empty.get_input_embeddings().weight.shape[0],
        on_progress=lambda name, done, needed: listener.on_prepare(
            f"tokenising {name}: {done / max(needed, 1):.0%}"
        ),
    )
    _check_answers(data, recovery.loss_on)
    return data


def calibration_on(
    data: PackedData, settings: PruneSettings, num_windows: int, seed: int
) -> CalibrationData:
    """Calibration windows from the training data, in the mixture's proportions.

    A document is what a training window holds, with as much of the text after it as a calibration
    window needs.

    Args:
        num_windows: training windows of the run; the first `max_documents` of them are taken.
        seed: of the order of the data.
    """
    length, rows = settings.window_length, data.sequence_length
    sampler, documents = WindowSampler(data, seed), []
    for domain, window in sampler.next_indices(min(settings.max_documents, num_windows)).tolist():
        stream = data.domains[domain].tokens.reshape(-1)
        start = max(0, min(window * rows, len(stream) - length))
        documents.append(
            torch.from_numpy(stream[start : start + max(rows, length)].astype("int32"))
        )
    return CalibrationData(
        documents, length, settings.windows, settings.seed, settings.redraw, "The training data"
    )


def check_training(request: AccelRequest, model: Any, num_processes: int) -> None:
    """Raise InvalidSettings for a request that so many processes cannot train. `model` may be on
    `meta`."""
    recovery = request.recovery
    check_window_length(model.config, request.settings)
    names = [("model", model.config)]
    if request.teacher:
        teacher = load_config(request.teacher, request.trust_remote_code, prunable=False)
        names.append((f"teacher '{request.teacher}'", teacher))
    for name, config in names:
        longest = getattr(config, "max_position_embeddings", None)
        if longest and recovery.sequence_length > longest:
            raise InvalidSettings(
                f"sequence_length: the {name} reads at most {longest} tokens; got "
                f"{recovery.sequence_length}."
            )
    if recovery.lora_rank > model.config.hidden_size:
        raise InvalidSettings(
            f"lora_rank: at most the hidden size of {model.config.hidden_size:,}; got "
            f"{recovery.lora_rank:,}."
        )
    windows = tokens_per_step(recovery) // recovery.sequence_length
    if windows % num_processes:
        raise InvalidSettings(
            f"batch_tokens: {windows} windows per step cannot be shared by {num_processes} "
            f"processes; take a multiple of {num_processes * recovery.sequence_length:,} tokens."
        )
    in_advance = recovery.alpha and recovery.teacher_top_k is not None
    if in_advance and read_mixture(request.data).policy == "dynamic":
        raise InvalidSettings(
            "teacher_top_k: with a mixture of policy: dynamic it is not known in advance which "
            "windows come; leave it out, so that the teacher runs along."
        )


@torch.no_grad()
def reference_losses(materials: Materials) -> dict[str, float]:
    """Loss of the source model on some windows of each domain, in nats per token. Losses that the
    mixture states are taken as they are."""
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
