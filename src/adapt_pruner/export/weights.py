"""Where the weights of a model come from: its directory, one tensor at a time, or memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..errors import LoadingError
from ..model.loading import empty_model, is_gguf, load_model, reading, resolve_name


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by name, in the order of its modules; tied ones once."""

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding matrix."""
        return "lm_head.weight" not in self.shapes


def weights_of(model: Any) -> Weights:
    """The weights of a model in memory."""
    found = _own_tensors(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    return Weights(model.config, shapes, found.__getitem__)


def open_weights(name: str, trust_remote_code: bool = False) -> Weights:
    """The weights of a model by name. Those of a directory are read when they are asked for; a GGUF
    file and a model on the hub are loaded as a whole.

    Raises:
        LoadingError: if there is no such model, or its files do not belong together.
    """
    directory = Path(resolve_name(name))
    if is_gguf(name) or not directory.is_dir():
        return weights_of(load_model(name, dtype="stored", device="cpu", prunable=False,
                                     trust_remote_code=trust_remote_code))  # fmt: skip
    empty = empty_model(name, trust_remote_code, prunable=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in _own_tensors(empty).items()}
    files = _files_of_tensors(directory)
    if not set(shapes) <= set(files):  # stored under other names: transformers knows them
        return weights_of(load_model(name, dtype="stored", device="cpu", prunable=False,
                                     trust_remote_code=trust_remote_code))  # fmt: skip

    def read(key: str) -> Tensor:
        with reading(name, "weights"), safe_open(str(files[key]), framework="pt") as opened:
            tensor = opened.get_tensor(key)
        if tuple(tensor.shape) != shapes[key]:
            raise LoadingError(
                f"The weights of '{name}' do not fit its config.json: {key} has shape "
                f"{list(tensor.shape)}, expected {list(shapes[key])}."
            )
        return tensor

    return Weights(empty.config, shapes, read)


def _own_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and saved buffers, tied ones under their first name."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            found[name] = tensor.detach()
        seen.add(id(tensor))
    return found


def _files_of_tensors(directory: Path) -> dict[str, Path]:
    index = directory / "model.safetensors.index.json"
    with reading(str(directory), "weights"):
        if index.is_file():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {key: directory / file for key, file in named.items()}
        file = directory / "model.safetensors"
        if not file.is_file():
            return {}
        with safe_open(str(file), framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file)
