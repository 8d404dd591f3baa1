"""What identifies a model, its tokenizer and data: hashes of their content.

A model in memory and the directory it is saved to have the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from .. import __version__
from ..data.fingerprints import of_tokenizer
from ..errors import UnsupportedModel
from ..model.checks import weight_files
from ..model.loading import commit_of, load_config, reading, resolve_name
from .store import digest

# Keys that change when a model is saved or moved, although it computes the same.
_PASSING = {
    "_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache",
}  # fmt: skip


def of_model(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Fingerprint of a model in memory, with its tokenizer."""
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise UnsupportedModel(
            "Some weights are not in memory (device_map has offloaded them, or the model is on the "
            "meta device); name the model's directory instead."
        )
    return {
        "weights": _of_tensors(_tensors_of(model)),
        **_of_config(model.config),
        "generation": _of_generation(model.generation_config),
        "tokenizer": of_tokenizer(tokenizer),
    }


def of_name(name: str, tokenizer: Any, trust_remote_code: bool = False) -> dict[str, Any] | None:
    """Fingerprint of a directory, or of a model on the hub by its commit, without loading it.

    Returns None where only loading can tell.
    """
    config = load_config(name, trust_remote_code, prunable=False)
    directory = Path(resolve_name(name))
    if not directory.is_dir():
        commit = commit_of(name)
        return {"name": name, "revision": commit} if commit else None
    files = _weight_files(directory)
    if not all(file.is_file() for file in files):
        return None  # loading says what is missing
    with reading(name, "weights"):
        weights = _of_tensors(tensor for file in files for tensor in _tensors_in(file))
    code = {file.name: _of_bytes(file.read_bytes()) for file in sorted(directory.glob("*.py"))}
    return {
        "weights": weights,
        **_of_config(config),
        "generation": _of_generation(_generation_config(directory, config)),
        "tokenizer": of_tokenizer(tokenizer),
        **({"code": code} if code and trust_remote_code else {}),
    }


def of_rows(rows: Iterable[Any]) -> str:
    """Fingerprint of JSON-like rows, in their order."""
    total = hashlib.blake2b(digest_size=16)
    for row in rows:
        total.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
        total.update(b"\n")
    return total.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package, torch, transformers and others."""
    found = {"adapt-pruner": __version__, "torch": torch.__version__}
    return {**found, **{name: version(name) for name in ("transformers", "tokenizers", *packages)}}


def _of_config(config: Any) -> dict[str, Any]:
    values = {k: v for k, v in config.to_dict().items() if k not in _PASSING}
    attention = getattr(config, "_attn_implementation", None)
    return {
        "config": digest(json.loads(json.dumps(values, default=str))),
        **({"attention": attention} if attention not in (None, "sdpa") else {}),
    }


def _generation_config(directory: Path, config: Any) -> GenerationConfig:
    if not (directory / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    with reading(str(directory), "generation configuration"):
        return GenerationConfig.from_pretrained(directory)


def _of_generation(config: GenerationConfig | None) -> str:
    values = config.to_diff_dict() if config else {}
    passing = ("transformers_version", "_from_model_config")
    return digest({k: v for k, v in values.items() if k not in passing})


def _tensors_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen:  # tied weights are stored once, under their first name
            yield name, tensor
        seen.add(place)


def _tensors_in(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers loads from a directory."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    return weight_files(directory)


def _of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    return digest(
        {
            name: [
                str(tensor.dtype),
                list(tensor.shape),
                _of_bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()),
            ]
            for name, tensor in tensors
        }
    )


def _of_bytes(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
