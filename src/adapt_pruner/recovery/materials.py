"""What a run works on: model, tokenizer, data, calibration windows, evaluation text, teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..api import calibration_for, check_window_length
from ..cache import default_cache
from ..data import CalibrationData
from ..data.fingerprints import short_hash
from ..data.mixture import read_mixture
from ..data.packing import PackedData, prepare
from ..data.sampling import WindowSampler
from ..errors import InvalidSettings
from ..evaluation import fingerprint
from ..methods import method_named, target_of
from ..model.anatomy import find_anatomy
from ..model.loading import empty_model, load_config, load_model, load_tokenizer
from ..run import evaluation_texts, stored_dtype
from .objective import IGNORED, loss_sums, targets_of
from .request import AccelListener, AccelRequest
from .schedule import Phase, make_phases, tokens_per_step
from .teacher import OnlineTeacher, Store, StoredTeacher, common_tokens, store_logits
from .training import Teacher, micro_batch

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
    num_tokens: int
    """That model and teacher both know; 0 without a teacher."""

    def sampler(self) -> WindowSampler:
        """One at the beginning of the data."""
        return WindowSampler(self.data, self.seed)


def read_model(request: AccelRequest, accelerator: Accelerator) -> Any:
    """Load the source model in the precision of training, onto the device of this process."""
    dtype = "float32" if request.settings.dtype == "auto" else request.settings.dtype
    model = load_model(request.model, dtype, "cpu", trust_remote_code=request.trust_remote_code)
    return model.to(accelerator.device)


def plan_phases(request: AccelRequest, model: Any) -> tuple[int, tuple[Phase, ...]]:
    """Parameters to reach, and the phases on the way. `model` may be on `meta`.

    Raises:
        InvalidTarget, InvalidSettings: if the target or the budget makes no sense.
    """
    anatomy = find_anatomy(model)
    target = target_of(request.settings, anatomy, request.sparsity, request.params)
    method_named(request.settings.method).outline(request.settings, anatomy, target)
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
    check_training(request, empty, accelerator.num_processes)
    mixture = read_mixture(request.data)
    tokenizer = load_tokenizer(request.model, request.trust_remote_code)
    num_tokens = _shared_tokens(request, empty, tokenizer) if recovery.alpha else 0
    model = read_model(request, accelerator)
    texts = None
    if request.evaluate:
        texts = evaluation_texts(request.evaluate, settings.text_column, settings.max_documents)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    seed = settings.seed if recovery.train_seed is None else recovery.train_seed

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
        texts, None, seed, num_tokens,
    )  # fmt: skip


def check_training(request: AccelRequest, model: Any, num_processes: int) -> None:
    """Raise InvalidSettings for a request that so many processes cannot train. `model` may be on
    `meta`."""
    recovery = request.recovery
    check_window_length(model.config, request.settings)
    names = [("model", model.config)]
    if request.teacher:
        teacher = load_config(request.teacher, request.trust_remote_code)
        names.append((f"teacher '{request.teacher}'", teacher))
    for name, config in names:
        longest = getattr(config, "max_position_embeddings", None)
        if longest and recovery.sequence_length > longest:
            raise InvalidSettings(
                f"sequence_length: the {name} reads at most {longest} tokens; got "
                f"{recovery.sequence_length}."
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


def _shared_tokens(request: AccelRequest, model: Any, tokenizer: Any) -> int:
    own = model.config.vocab_size
    if not request.teacher:
        return own
    trust = request.trust_remote_code
    teacher = empty_model(request.teacher, trust, prunable=False)
    theirs = load_tokenizer(request.teacher, trust)
    return common_tokens(tokenizer, own, theirs, teacher.config.vocab_size, request.teacher)


def make_teacher(
    request: AccelRequest, materials: Materials, directory: Path, listener: AccelListener
) -> Teacher:
    """Load the teacher; with `teacher_top_k`, ask it first and write the answers to `directory`.

    Raises:
        WritingError: if they do not fit on the disk.
    """
    accelerator = materials.accelerator
    if request.recovery.teacher_top_k is not None:
        return _stored_teacher(request, materials, directory, listener)
    listener.on_prepare("reading the teacher")
    return OnlineTeacher(_read_teacher(request, accelerator), accelerator, materials.num_tokens)


def _read_teacher(request: AccelRequest, accelerator: Accelerator) -> Any:
    """On a GPU as it is stored: nothing is trained in it, and training has need of the memory."""
    name, trust = request.teacher or request.model, request.trust_remote_code
    dtype = "float32" if accelerator.device.type == "cpu" else "stored"
    model = load_model(name, dtype, "cpu", trust_remote_code=trust, prunable=False)
    return model.to(accelerator.device)


def _stored_teacher(
    request: AccelRequest, materials: Materials, directory: Path, listener: AccelListener
) -> StoredTeacher:
    accelerator, recovery = materials.accelerator, request.recovery
    store = _store(request, materials, directory)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            store.prepare()
    teacher = StoredTeacher(store)
    if not store.missing():
        return teacher
    listener.on_prepare("asking the teacher")
    source, model = materials.model, materials.model
    if request.teacher:  # one of the two fits on the device, perhaps not both
        source.to("cpu")
        model = _read_teacher(request, accelerator)
    store_logits(
        OnlineTeacher(model, accelerator, materials.num_tokens),
        materials.sampler(),
        store,
        recovery.temperature,
        micro_batch(source.config.vocab_size, recovery),
        lambda share: listener.on_prepare(f"asking the teacher: {share:.0%}"),
    )
    del model
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    source.to(accelerator.device)
    return teacher


def _store(request: AccelRequest, materials: Materials, directory: Path) -> Store:
    """Named after all that its logits depend on; the first process finds out for all."""
    recovery, trust = request.recovery, request.trust_remote_code
    assert recovery.teacher_top_k is not None
    tokens = materials.phases[-1].end_step * tokens_per_step(recovery)
    num_windows = tokens // recovery.sequence_length
    name = [""]
    if materials.accelerator.is_main_process:
        teacher = request.teacher or request.model
        tokenizer = load_tokenizer(teacher, trust)
        name[0] = short_hash(
            [
                fingerprint.of_name(teacher, tokenizer, trust) or teacher,
                materials.data.fingerprint, materials.seed, num_windows, materials.num_tokens,
                recovery.teacher_top_k, recovery.temperature,
            ]
        )  # fmt: skip
    broadcast_object_list(name)
    place = directory / "teacher" / name[0]
    return Store(place, num_windows, recovery.sequence_length, recovery.teacher_top_k)


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
