"""A text from a model: GGUF files through llama.cpp, all else through transformers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import EvaluationError, LoadingError, MissingExtra
from ..model.gguf_input import read_header
from ..model.loading import is_gguf, load_model, load_tokenizer, resolve_name
from .speed import longest_of

MARGIN = 64
"""Tokens of context beside the prompt's bytes and the new tokens: what templates add."""


def first_look(
    model: str,
    prompt: str,
    num_tokens: int = 64,
    chat: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Continue a prompt greedily.

    Args:
        chat: put the prompt into the model's chat template; the answer alone is returned, else
            the prompt and its continuation.

    Raises:
        LoadingError: if there is no such model.
        MissingExtra: for a GGUF file where llama.cpp is not installed.
        EvaluationError: if it has no chat template, or reads no text so long, or llama.cpp cannot
            run it.
    """
    if is_gguf(model):
        return _in_llama_cpp(Path(resolve_name(model)), prompt, num_tokens, chat)
    return _in_transformers(model, prompt, num_tokens, chat, trust_remote_code)


def _in_transformers(
    name: str, prompt: str, num_tokens: int, chat: bool, trust_remote_code: bool
) -> str:
    import torch

    tokenizer = load_tokenizer(name, trust_remote_code)
    if chat and not tokenizer.chat_template:
        raise _no_template(name)
    model = load_model(name, trust_remote_code=trust_remote_code, prunable=False)
    if chat:
        said = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    else:
        ids = tokenizer(prompt).input_ids
    _check_length(len(ids), num_tokens, longest_of(model.config))
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        answer = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_tokens,
            do_sample=False, repetition_penalty=1.0, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return tokenizer.decode(answer[0, len(ids) if chat else 0 :], skip_special_tokens=True)


def _in_llama_cpp(file: Path, prompt: str, num_tokens: int, chat: bool) -> str:
    if not file.is_file():
        raise LoadingError(f"There is no model file '{file}'. Name one that exists.")
    header = read_header(file)
    try:
        import xllamacpp
    except ImportError:
        raise MissingExtra(
            "Running a GGUF file needs llama.cpp: pip install 'adapt-pruner[llama-cpp]', or take "
            f"your own: llama-cli -m {file}"
        ) from None
    if chat and "tokenizer.chat_template" not in header.metadata:
        raise _no_template(str(file))
    longest = header.metadata.get(f"{header.architecture}.context_length")
    if longest and num_tokens >= longest:
        raise EvaluationError(
            f"The model reads at most {longest:,} tokens; got {num_tokens:,} new ones. Take fewer: "
            "--tokens."
        )
    engine: Any = xllamacpp
    parameters = engine.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = len(prompt.encode()) + num_tokens + MARGIN
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = -1
    threads = os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    parameters.cpuparams.n_threads = int(limit) if limit.isdigit() else threads
    common: dict[str, Any] = {"max_tokens": num_tokens, "temperature": 0.0}
    with _silent():
        try:
            server = engine.Server(parameters)
            if chat:
                said = [{"role": "user", "content": prompt}]
                answer = server.handle_chat_completions({"messages": said, **common})
            else:
                answer = server.handle_completions({"prompt": prompt, **common})
        except Exception as error:  # errors of many kinds; all that is known is their message
            raise EvaluationError(f"llama.cpp cannot run '{file}': {error}") from error
    choice = answer["choices"][0]
    return choice["message"]["content"] if chat else prompt + choice["text"]


def _check_length(prompt: int, new: int, longest: int) -> None:
    if prompt + new > longest:
        raise EvaluationError(
            f"The model reads at most {longest:,} tokens, but the prompt has {prompt:,} and "
            f"{new:,} are to follow. Take fewer: --tokens."
        )


def _no_template(name: str) -> EvaluationError:
    return EvaluationError(f"'{name}' has no chat template; leave out --chat.")


@contextmanager
def _silent() -> Iterator[None]:
    """llama.cpp writes to the process's own streams, whatever Python's are."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for stream in (*kept, nowhere):
            os.close(stream)
