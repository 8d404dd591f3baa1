"""Load models and tokenizers the way users name them. No pickles, no remote code unless asked."""

from __future__ import annotations

import copy
import functools
import re
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import (
    AdaptPrunerError,
    InvalidSettings,
    LoadingError,
    UnsupportedModel,
    near_match,
    shortened,
    shown,
)
from .anatomy import architecture_of
from .checks import check_class, check_sizes, check_weights, read_config
from .gguf_input import dtype_of_file, mend_tokenizer, read_header

EMBEDDED_MODEL = "demo"
"""Name of the small model that ships with the package."""


def resolve_name(name: str) -> str:
    """Turn the name of the embedded model into its directory, and ~ into the home directory.

    Raises:
        LoadingError: for what cannot be a name.
    """
    try:
        Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise LoadingError(f"There is no model directory {shown(name)}.") from error
    if name == EMBEDDED_MODEL and not Path(name).exists():
        return str(resources.files("adapt_pruner") / "demo_model")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def load_config(name: str, trust_remote_code: bool = False, prunable: bool = True) -> Any:
    """Read the configuration of a model on the hub or in a directory.

    MobileLLM checkpoints become what they are, Llama models with shared embeddings, so that no
    remote code is needed.

    Args:
        prunable: say of a type that is not known that it cannot be pruned.

    Raises:
        LoadingError: if there is no such model, or its configuration is none.
        UnsupportedModel: if it is of a kind that is not known.
    """
    name = resolve_name(name)
    if is_gguf(name):
        return _gguf_config(name)
    if _looks_local(name) and not Path(name).is_dir():
        raise LoadingError(f"There is no model directory '{name}'. Name one that exists.")
    with reading(name, "configuration"):
        if Path(name).is_dir():
            read_config(Path(name))
        raw, _ = PreTrainedConfig.get_config_dict(name)
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or not 0 < len(model_type) < 100:
            raise LoadingError(f"'{name}' has no config.json with a model_type; is it a model?")
        check_sizes(name, raw)
        if model_type == "mobilellm":
            return _mobilellm(raw)
        if model_type not in CONFIG_MAPPING and not (raw.get("auto_map") and trust_remote_code):
            if not prunable:
                raise UnsupportedModel(
                    f"A model of type {shown(model_type)} is not known to transformers."
                    f"{near_match(model_type[:100], CONFIG_MAPPING)} If its code comes with it, "
                    "pass --trust-remote-code."
                )
            architecture_of(PreTrainedConfig.from_dict(raw))  # says why it is not supported
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def is_gguf(name: str) -> bool:
    """Whether a model is named by a GGUF file."""
    return name.lower().endswith(".gguf")


def _gguf_config(name: str) -> Any:
    """The configuration that the header of a GGUF file amounts to."""
    file = Path(name)
    if not file.is_file():
        raise LoadingError(f"There is no model file '{name}'. Name one that exists.")
    state = file.stat()
    return copy.deepcopy(_read_gguf_config(file.resolve(), state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _read_gguf_config(file: Path, size: int, time: int) -> Any:
    """Kept while the file's size and time stay the same: transformers needs seconds for it."""
    header = read_header(file)
    if header.architecture in ("deci", "openelm"):
        raise LoadingError(
            f"'{file}' holds layers of different width (architecture {header.architecture}), which "
            "are not read back from GGUF. Name the directory that it was exported from, or run it: "
            "adapt-pruner run FILE PROMPT."
        )
    with reading(str(file), "configuration"):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.dtype = getattr(torch, dtype_of_file(header))
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    config.architectures = [known]
    return config


def commit_of(name: str) -> str | None:
    """The commit of a model on the hub whose configuration was just read; None for files here."""
    if Path(name).exists():
        return None
    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent.name if isinstance(file, str) else None


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
    prunable: bool = True,
) -> Any:
    """Load a causal language model for pruning, in evaluation mode.

    Args:
        dtype: "auto" is float32 on the CPU, where half precision is slow, else as stored; "stored"
            is as stored everywhere.
        device: "auto" is the first GPU, or the CPU.
        device_map: as in transformers; replaces `device`.
        prunable: refuse models that cannot be pruned; else only what is no causal language model.

    Raises:
        LoadingError: if the model cannot be read.
        UnsupportedModel: if it cannot be pruned. Raised before weights are read.
    """
    config = load_config(name, trust_remote_code, prunable)
    _check_kind(config, prunable)
    device = resolve_device(device)
    if dtype == "auto" and device == "cpu" and device_map is None:
        dtype = "float32"
    dtype = "auto" if dtype == "stored" else dtype
    if dtype == "auto" and is_gguf(name):
        dtype = str(config.dtype).removeprefix("torch.")
    name = resolve_name(name)
    with reading(name, "weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            Path(name).parent if is_gguf(name) else name,
            config=config,
            # For pickles on "main", transformers asks a service to convert them on the hub.
            revision=commit_of(name) or "main",
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **_gguf_file(name),
        )
        model, report = loaded
        check_weights(name, report, config)
        if device_map is None:
            model.to(device)
    if is_gguf(name):
        _forget_quantisation(model)
    return model.eval()


def _gguf_file(name: str) -> dict[str, str]:
    """How transformers is told that a directory's model is in a GGUF file."""
    return {"gguf_file": Path(name).name} if is_gguf(name) else {}


def _forget_quantisation(model: Any) -> None:
    """A model that was read from a GGUF file is an ordinary one: its values are floats now."""
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _check_kind(config: Any, prunable: bool) -> None:
    if prunable:
        architecture_of(config)
    else:
        check_causal(config)
    check_class(config)


def resolve_device(name: str) -> str:
    """Turn "auto" into the first GPU, or the CPU. Raises InvalidSettings for what is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InvalidSettings(
            f"device: '{name}' is not available here. Name another, such as cpu, or take auto."
        ) from error
    return name


def describe_device(device: torch.device) -> str:
    """What to call a device when stating what was measured on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def check_causal(config: Any) -> None:
    """Raise UnsupportedModel unless the configuration is of a causal language model."""
    classes = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    stored = getattr(config, "architectures", None)
    by_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.is_encoder_decoder
    if not by_code and (not known or (stored and not classes.intersection(stored))):
        what = stored[0] if stored else f"a model of type '{config.model_type}'"
        raise UnsupportedModel(
            f"Expected a causal language model, such as LlamaForCausalLM; got {what}."
        )


def empty_model(name: str, trust_remote_code: bool = False, prunable: bool = True) -> Any:
    """Build a model on the meta device from its configuration; no weights are read.

    Args, Raises: as `load_model`.
    """
    config = load_config(name, trust_remote_code, prunable)
    _check_kind(config, prunable)
    with reading(name, "configuration"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model.

    Raises:
        LoadingError: if there is none.
    """
    name = resolve_name(name)
    raw = load_config(name, trust_remote_code, prunable=False)
    with reading(name, "tokenizer"):
        slow = {"use_fast": False} if _is_mobilellm(name) else {}
        tokenizer = AutoTokenizer.from_pretrained(
            Path(name).parent if is_gguf(name) else name,
            config=raw,
            trust_remote_code=trust_remote_code,
            **slow,
            **_gguf_file(name),
        )
        if is_gguf(name):
            mend_tokenizer(tokenizer, read_header(Path(name)))
    if not len(tokenizer):
        raise LoadingError(f"The tokenizer of '{name}' is empty: its files are missing.")
    return tokenizer


def _is_mobilellm(name: str) -> bool:
    if is_gguf(name):
        return False
    raw, _ = PreTrainedConfig.get_config_dict(name)
    return raw.get("model_type") == "mobilellm"


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/")) or name.count("/") > 1 or Path(name).is_file()


@contextmanager
def reading(name: str, what: str):
    """Turn whatever the libraries raise while they read into one LoadingError of a sentence."""
    try:
        yield
    except (AdaptPrunerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LoadingError(f"The {what} of '{name}' cannot be read: {_brief(error)}") from error


_EXPLANATIONS = {
    "We couldn't connect to": "there is no such directory here, and the hub cannot be reached. "
    "Check the name, or the connection.",
    "not a valid model identifier": "there is no such directory here, and no such model on the "
    "hub. Check the name; a private model needs `hf auth login`.",
    "gated repo": "access to it must be requested on its page on the hub, and needs "
    "`hf auth login`.",
    "no file named model.safetensors": "there is no model.safetensors, and weights in pickles are "
    "not read. Convert them to safetensors.",
    "use_safetensors=True": "there is no model.safetensors, and weights in pickles are not read. "
    "Convert them to safetensors.",
    "ignore_mismatched_sizes": "their shapes do not fit the config.json beside them.",
    "trust_remote_code": "it needs remote code; pass --trust-remote-code if you trust its authors.",
    "instantiate the backend tokenizer": "its files are missing. Expected tokenizer.json, or "
    "tokenizer.model with sentencepiece installed.",
}
"""What to say for a text that occurs in an error of transformers, which are often long."""


_ABOUT_CODE = (
    AttributeError, TypeError, LookupError, ArithmeticError, AssertionError, RecursionError,
    UnboundLocalError, StopIteration,
)  # fmt: skip


def _brief(error: Exception) -> str:
    text = str(error).strip() or repr(error)
    for sign, explanation in _EXPLANATIONS.items():
        if sign in text:
            return explanation
    if isinstance(error, KeyError) and len(error.args) == 1 and isinstance(error.args[0], str):
        return f"'{shortened(error.args[0])}' is missing in it, or not known. Restore its files."
    if isinstance(error, _ABOUT_CODE):  # what Python says then is about code, not about files
        return "a value in its files is missing or of a wrong kind. Restore them."
    if isinstance(error, SafetensorError):
        return f"a file is damaged or incomplete ({text}). Copy or download it again."
    first_sentence = re.split(r"(?<=[.!?])\s(?=[A-Z])", " ".join(text.split()))[0]
    return f"{first_sentence.rstrip('.')[:300]}. Check its files and the options."
