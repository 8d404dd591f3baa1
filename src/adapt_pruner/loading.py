"""Load models and tokenizers the way users name them. No pickles, no remote code unless asked."""

from __future__ import annotations

import json
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
)

from .anatomy import architecture_of
from .errors import LoadingError, UnsupportedModel

EMBEDDED_MODEL = "demo"
"""Name of the small model that ships with the package."""


def resolve_name(name: str) -> str:
    """Turn the name of the embedded model into its directory; leave every other as it is."""
    if name == EMBEDDED_MODEL and not Path(name).exists():
        return str(resources.files("adapt_pruner") / "demo_model")
    return name


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """Read the configuration of a model on the hub or in a directory.

    MobileLLM checkpoints become what they are, Llama models with shared embeddings, so that no
    remote code is needed.

    Raises:
        LoadingError: if there is no such model.
        UnsupportedModel: if it cannot be pruned.
    """
    name = resolve_name(name)
    if _looks_local(name) and not Path(name).expanduser().is_dir():
        raise LoadingError(f"There is no model directory '{name}'.")
    with _loading(name, "configuration"):
        raw, _ = transformers.PreTrainedConfig.get_config_dict(name)
        if raw.get("model_type") == "mobilellm":
            return _mobilellm(raw)
        if not raw.get("model_type"):
            raise LoadingError(f"'{name}' has no config.json with a model_type; is it a model?")
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def _mobilellm(raw: dict[str, Any]) -> LlamaConfig:
    if raw.get("layer_sharing"):
        raise UnsupportedModel(
            "MobileLLM-LS checkpoints run each layer twice (layer_sharing=True) and cannot be "
            "pruned; take the variant without layer sharing."
        )
    own = {"model_type", "architectures", "auto_map", "share_embedding", "layer_sharing"}
    values = {key: value for key, value in raw.items() if key not in own}
    tied = raw.get("share_embedding", raw.get("tie_word_embeddings", False))
    config = LlamaConfig(**{**values, "tie_word_embeddings": tied})
    config.architectures = ["LlamaForCausalLM"]
    return config


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model for pruning, in evaluation mode.

    Args:
        dtype: "auto" is float32 on the CPU, where half precision is slow, else as stored.
        device: "auto" is the first GPU, or the CPU.
        device_map: as in transformers; replaces `device`.

    Raises:
        LoadingError: if the model cannot be read.
        UnsupportedModel: if it cannot be pruned. Raised before weights are read.
    """
    config = load_config(name, trust_remote_code)
    architecture_of(config)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and device == "cpu" and device_map is None:
        dtype = "float32"
    name = resolve_name(name)
    with _loading(name, "weights"):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
        if device_map is None:
            model.to(device)
    return model.eval()


def empty_model(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model on the meta device from its configuration; no weights are read."""
    config = load_config(name, trust_remote_code)
    architecture_of(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model.

    Raises:
        LoadingError: if there is none.
    """
    name = resolve_name(name)
    raw = load_config(name, trust_remote_code)
    with _loading(name, "tokenizer"):
        slow = {"use_fast": False} if _is_mobilellm(name) else {}
        tokenizer = AutoTokenizer.from_pretrained(
            name, config=raw, trust_remote_code=trust_remote_code, **slow
        )
    if not len(tokenizer):
        raise LoadingError(f"The tokenizer of '{name}' is empty: its files are missing.")
    return tokenizer


def _is_mobilellm(name: str) -> bool:
    raw, _ = transformers.PreTrainedConfig.get_config_dict(name)
    return raw.get("model_type") == "mobilellm"


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@contextmanager
def _loading(name: str, what: str):
    try:
        yield
    except (LoadingError, UnsupportedModel):
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        text = str(error).strip() or repr(error)
        if "pickle" in text or "use_safetensors" in text or "safetensors" in text.split("\n")[0]:
            text = f"{text.splitlines()[0]} Only safetensors weights are read; convert the model."
        elif "trust_remote_code" in text:
            text = "it needs remote code; pass --trust-remote-code if you trust its authors."
        else:
            text = " ".join(text.split())
        raise LoadingError(f"The {what} of '{name}' cannot be read: {text}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file, with an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadingError(f"'{path}' cannot be read: {error}") from error
