"""Make the teacher of a run: load it, or ask it once and keep its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.fingerprints import short_hash
from ..evaluation import fingerprint
from ..model.loading import load_model, load_tokenizer
from ..processes import decided_by_first
from .launch import processes_of
from .materials import Materials
from .objective import Teacher
from .request import AccelListener, AccelRequest
from .schedule import tokens_per_step
from .teacher import OnlineTeacher, Store, StoredTeacher, store_logits
from .training import micro_batch


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
    """On a GPU as it is stored: nothing is trained in it, and training needs the memory."""
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
    source = materials.model
    if (
        request.teacher and source is not None
    ):  # one of the two fits on the device, perhaps not both
        source.to("cpu")
    model = _read_teacher(request, accelerator) if request.teacher else materials.source()
    store_logits(
        OnlineTeacher(model, accelerator, materials.num_tokens),
        materials.sampler(),
        store,
        recovery.temperature,
        micro_batch(materials.empty.config.vocab_size, recovery),
        lambda share: listener.on_prepare(f"asking the teacher: {share:.0%}"),
    )
    del model
    materials.model = source  # on a resume there is none
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    if source is not None:
        source.to(accelerator.device)
    return teacher


def _store(request: AccelRequest, materials: Materials, directory: Path) -> Store:
    """Named after all that its logits depend on; the first process finds out for all."""
    recovery, trust = request.recovery, request.trust_remote_code
    assert recovery.teacher_top_k is not None
    tokens = materials.phases[-1].end_step * tokens_per_step(recovery)
    num_windows = tokens // recovery.sequence_length
    name = ""
    if materials.accelerator.is_main_process:
        teacher = request.teacher or request.model
        tokenizer = load_tokenizer(teacher, trust)
        name = short_hash(
            [
                fingerprint.of_name(teacher, tokenizer, trust) or teacher,
                materials.data.fingerprint, materials.seed, num_windows, materials.num_tokens,
                recovery.teacher_top_k, recovery.temperature,
            ]
        )  # fmt: skip
    place = directory / "teacher" / decided_by_first(name, processes_of(materials.accelerator))
    return Store(place, num_windows, recovery.sequence_length, recovery.teacher_top_k)
