"""What only the models themselves can show: text that they write, and their speed."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AdaptPrunerError, InvalidSettings, shown
from ..evaluation import compare_speed
from ..evaluation.speed import longest_of
from ..model.loading import load_model, load_tokenizer
from .facts import Extras, WrittenSample, dense_model
from .record import StoredRun


@dataclass(frozen=True)
class Wanted:
    """What to make beside the facts that a run has stored."""

    prompts: Sequence[str] = ()
    max_new_tokens: int = 64
    speed: bool = False
    dense: str | None = None
    """The dense model. Nothing is loaded that the user does not name."""
    device: str = "auto"
    trust_remote_code: bool = False


def make_extras(run: StoredRun, wanted: Wanted) -> Extras:
    """Let the pruned model write, and the dense one where it is named; time them.

    What recipe.yaml and run.json call the dense model is text that came with the directory: it is
    shown, and loaded only if the user names it. If the dense model cannot be loaded, the result
    says so; it is no error.

    Raises:
        LoadingError: if the pruned model cannot be loaded.
        InvalidSettings: for a prompt that is empty or too long.
    """
    if not wanted.prompts and not wanted.speed:
        return Extras()
    pruned = load_model(str(run.directory), device=wanted.device)
    tokenizer = load_tokenizer(str(run.directory))
    prompts = [_encode(prompt, tokenizer, pruned, wanted) for prompt in wanted.prompts]
    extras, dense = Extras(), None
    try:
        if not wanted.dense:
            raise AdaptPrunerError(_not_named(run))
        dense = load_model(
            wanted.dense, device=wanted.device, trust_remote_code=wanted.trust_remote_code
        )
    except AdaptPrunerError as error:
        extras.missing_dense = f"The dense model was not asked: {error}"
    for prompt, ids_1T in zip(wanted.prompts, prompts, strict=True):
        written = [
            _continue(model, tokenizer, prompt, ids_1T, wanted.max_new_tokens) if model else None
            for model in (dense, pruned)
        ]
        extras.samples.append(WrittenSample(prompt, written[0], written[1] or ""))
    if wanted.speed and dense:
        _measure_speed(extras, dense, pruned)
    return extras


def _not_named(run: StoredRun) -> str:
    named = dense_model(run)
    if not named:
        return "name it by --dense MODEL."
    return f"only what the run's directory holds is loaded; add --dense {shlex.quote(named)}."


def _encode(prompt: str, tokenizer: Any, model: Any, wanted: Wanted) -> torch.Tensor:
    ids_1T = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    longest = longest_of(model.config)
    if not prompt.strip() or not ids_1T.numel():
        raise InvalidSettings(f"A prompt needs text to go on from; got {shown(prompt)}.")
    if ids_1T.shape[1] + wanted.max_new_tokens > longest:
        raise InvalidSettings(
            f"The model reads at most {longest} tokens, but the prompt '{prompt[:30]}' has "
            f"{ids_1T.shape[1]} and {wanted.max_new_tokens} are to follow. Take fewer."
        )
    return ids_1T


@torch.no_grad()
def _continue(model, tokenizer, prompt: str, ids_1T: torch.Tensor, num_tokens: int) -> str:
    """What the model writes after the prompt, greedily."""
    ids_1T = ids_1T.to(model.get_input_embeddings().weight.device)
    written = model.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=num_tokens, do_sample=False
    )
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    # Decoded alone, a continuation loses the space before its first word in some tokenizers.
    if text.startswith(prompt):
        return text[len(prompt) :]
    return tokenizer.decode(written[0, ids_1T.shape[1] :], skip_special_tokens=True)


def _measure_speed(extras: Extras, dense: Any, pruned: Any) -> None:
    before, after = compare_speed([dense, pruned])
    extras.speed = {
        "prefill": (before.prefill_tokens_per_s, after.prefill_tokens_per_s),
        "decode": (before.decode_tokens_per_s, after.decode_tokens_per_s),
    }
    device = next(pruned.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    dtype = str(next(pruned.parameters()).dtype).removeprefix("torch.")
    extras.speed_note = (
        f"Speed at batch size 1 in {dtype} on {where}, {torch.get_num_threads()} threads: "
        f"prefill of {before.prompt_tokens} tokens, then {before.new_tokens} decoded one by one; "
        "medians. Ideal is the ratio of parameters."
    )
