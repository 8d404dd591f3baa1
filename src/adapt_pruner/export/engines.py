"""How each engine serves a model, or why it does not: data, and one function over it.

What is stated as working was tried with the versions that `docs/serving.md` names; the rest says
"Not tried". Model cards and reports print the same lines.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

VLLM_TRIED = frozenset(
    {
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
    }
)
"""Model types that vLLM's transformers backend served with layers of different width."""

NATIVE_HEAD_SIZE = {"qwen2": "Qwen2", "granite": "Granite", "cohere2": "Cohere"}
"""Model types whose own class in vLLM takes the head size from hidden size / heads."""

SMALLEST_VLLM_HEAD = 32
"""Entries per head, below which vLLM's kernels for the CPU refuse."""


@dataclass(frozen=True)
class Model:
    """A checkpoint as an engine sees it."""

    directory: str
    config: Config
    """The content of its config.json."""

    @property
    def place(self) -> str:
        """The directory, quoted for a shell, and never taken for an option."""
        name = self.directory
        return shlex.quote(f"./{name}" if name.startswith("-") else name)

    @property
    def layers_differ(self) -> bool:
        return bool(self.config.get("per_layer_config") or self.config.get("sliced_hidden_size"))

    @property
    def is_portable(self) -> bool:
        return bool(self.config.get("auto_map"))

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    @property
    def head_size(self) -> int | None:
        """Entries per head, as the configuration has them."""
        size = self.config.get("head_dim")
        return size if isinstance(size, int) else self.implied_head_size

    @property
    def implied_head_size(self) -> int | None:
        """Hidden size / heads: what a reader computes that does not look for `head_dim`."""
        hidden, heads = (self.config.get(k) for k in ("hidden_size", "num_attention_heads"))
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
            return None
        return hidden // heads

    @property
    def misread_by(self) -> str | None:
        """Name of vLLM's own class that takes another head size than the model has, if it does."""
        implied = self.implied_head_size
        return None if self.head_size == implied else NATIVE_HEAD_SIZE.get(self.model_type)

    @property
    def skips_attention(self) -> bool:
        """Whether a layer has an MLP alone."""
        layers = (self.config.get("per_layer_config") or {}).values()
        return any("att" in name for layer in layers for name in layer.get("skip") or ())

    @property
    def mlp_widths(self) -> list[int]:
        """Neurons per MLP, of all layers or, where they are equal, once."""
        common = self.config.get("intermediate_size")
        layers = (self.config.get("per_layer_config") or {}).values()
        found = [layer.get("intermediate_size", common) for layer in layers] or [common]
        return [width for width in found if isinstance(width, int)]


@dataclass(frozen=True)
class Serving:
    """What to say of one engine: a command, or why there is none."""

    engine: str
    command: str = ""
    """Shell lines that serve this model; empty where there are none."""
    note: str = ""
    """What the command needs, or why there is none, in a sentence or two."""


def servings(directory: str, config: Config) -> list[Serving]:
    """Return how each engine serves the checkpoint.

    Args:
        directory: where the checkpoint lies, as a user would type it.
        config: the content of its config.json.
    """
    model = Model(directory, config)
    return [describe(model) for describe in _ENGINES]


def limits(config: Config) -> list[str]:
    """What other tools may stumble over in this checkpoint, one sentence or two each."""
    model, said = Model("", config), []
    odd = sorted({width for width in model.mlp_widths if width % 32})
    if odd:
        shown = ", ".join(map(str, odd[:4])) + (", ..." if len(odd) > 4 else "")
        said.append(
            "Quantisation to 4 bits in groups (torchao, GPTQ, K-quants) needs MLP widths that its "
            f"groups divide; these are no multiples of 32: {shown}. `prune --multiple 32` gives "
            "such widths."
        )
    if not model.layers_differ and model.misread_by:
        said.append(
            f"Heads have {model.head_size} entries where hidden size / heads is "
            f"{model.implied_head_size}: what ignores `head_dim`, as vLLM's own "
            f"{model.misread_by} class does, cannot load this model."
        )
    return said


def _transformers(model: Model) -> Serving:
    serve = f"transformers serve {model.place}"
    if not model.layers_differ:
        return Serving("transformers", serve)
    return Serving(
        "transformers",
        f"adapt-pruner with {serve}",
        "`adapt-pruner with` imports this package in programs that build a model by the name of "
        "its class.",
    )


def _vllm(model: Model) -> Serving:
    size = model.head_size
    if size is not None and size < SMALLEST_VLLM_HEAD:
        return Serving("vLLM", note=f"Its kernels refuse heads of {size} entries.")
    if model.skips_attention:
        return Serving("vLLM", note="It needs an attention in every layer; some have none.")
    said = []
    flags = ""
    if model.layers_differ:
        flags = " --model-impl transformers"
        said.append("adapt-pruner must be installed beside vLLM; nothing has to import it.")
        if model.is_portable:
            said.append("Where it is not installed, add `--trust-remote-code`.")
        if model.model_type not in VLLM_TRIED:
            said.append(f"Not tried with models of type {model.model_type}.")
    elif model.misread_by:
        flags = " --model-impl transformers"
        said.append(
            f"vLLM's own {model.misread_by} class cannot load it: it takes heads of "
            f"{model.implied_head_size} entries."
        )
    return Serving("vLLM", f"vllm serve {model.place}{flags}", " ".join(said))


def _llama_cpp(model: Model) -> Serving:
    return Serving(
        "llama.cpp",
        f"adapt-pruner export {model.place} -o model.gguf\nllama-server -m model.gguf",
        "`export` says so where llama.cpp has no place for what a model has.",
    )


def _ollama(model: Model) -> Serving:
    return Serving(
        "Ollama",
        "echo 'FROM ./model.gguf' > Modelfile\n"
        "ollama create pruned -f Modelfile\n"
        "ollama run pruned",
        "From the same model.gguf. Not tried.",
    )


def _one_width(
    engine: str, command: str, tried: frozenset[str] = frozenset()
) -> Callable[[Model], Serving]:
    """An engine that reads one width for all layers; `tried` are model types that it served."""

    def describe(model: Model) -> Serving:
        if model.layers_differ:
            return Serving(
                engine,
                note="Reads one width for all layers: prune with `--layout uniform` for it.",
            )
        note = "" if model.model_type in tried else "Not tried."
        return Serving(engine, command.format(place=model.place), note)

    return describe


_ENGINES: tuple[Callable[[Model], Serving], ...] = (
    _transformers,
    _vllm,
    _llama_cpp,
    _ollama,
    _one_width("SGLang", "python -m sglang.launch_server --model-path {place}"),
    _one_width("TensorRT-LLM", "trtllm-serve {place}"),
    _one_width("MLX", "mlx_lm.server --model {place}", frozenset({"llama"})),
    _one_width(
        "ONNX Runtime GenAI",
        "python -m onnxruntime_genai.models.builder -m {place} -o onnx -p int4 -e cpu",
    ),
)
