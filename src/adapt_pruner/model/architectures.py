"""What the supported architectures look like: data, not code paths.

A row says what the parts of a decoder layer are called and how fused projections are laid out.
Everything else (widths, head counts, biases) is read from the modules themselves, so a further
architecture of this family is one more row, here or in another package: an entry point of the group
`adapt_pruner.architectures` whose name is the model type and whose value is an `Architecture`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..registry import Registry


@dataclass(frozen=True)
class Architecture:
    """Names of the parts of one decoder layer, relative to that layer."""

    module: str
    """Folder of the modelling file, as in `transformers.models.{module}.modeling_{module}`; or the
    dotted name of a modelling file elsewhere."""
    layer_class: str
    """Class of the decoder layer, called with `(config, layer_idx)`."""
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Linears whose output rows are neurons. One name standing for both is fused: gate, then up."""
    mlp_output: str = "mlp.down_proj"
    """Linear whose input columns are neurons."""
    mlp_blocks: int = 1
    """How many times each neuron occurs in every `mlp_inputs` linear (2: gate and up fused)."""
    attention: str = "self_attn"
    """Attention module; layers without it have another mixer, which is never cut."""
    has_free_heads: bool = True
    """Whether the configuration can say the number of heads apart from the hidden size. Without,
    neither heads nor hidden dimensions can be cut."""
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Query, key and value projections inside `attention`; a single name is fused: q, then k, v."""
    attention_output: str = "o_proj"
    """Output projection inside `attention`."""
    wide_norms: bool = False
    """Whether `q_norm` and `k_norm` run over all heads at once (their weights are then cut too)."""
    attention_norms: tuple[str | None, str | None] = ("input_layernorm", None)
    """Norms that serve attention alone: of its input, and of its output."""
    mlp_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)
    """Norms that serve the MLP alone."""
    other_hidden: tuple[tuple[str, int, int], ...] = ()
    """Further tensors of a layer with sides of the hidden size: name, side, and how many times each
    dimension occurs there (LFM2's convolutions)."""
    other_writer: str | None = None
    """What writes to the residual stream in a layer that has no `attention`."""
    scales_embedding: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size (Gemma)."""
    layers: str = "model.layers"
    """Path of the list of decoder layers inside the causal language model."""

    @property
    def reading_norms(self) -> tuple[str, ...]:
        """Norms through which the attention alone, then the MLP alone, reads the stream."""
        return tuple(norms[0] for norms in (self.attention_norms, self.mlp_norms) if norms[0])

    @property
    def reads_through_norms(self) -> bool:
        """Whether attention and MLP read the residual stream through a norm each, and write to it
        without one: then the stream can be rotated, where the norms are RMS norms."""
        norms = (self.attention_norms, self.mlp_norms)
        plain = all(before and not after for before, after in norms)
        return plain and not self.scales_embedding and not self.other_hidden

    @property
    def modeling_module(self) -> str:
        if "." in self.module:
            return self.module
        return f"transformers.models.{self.module}.modeling_{self.module}"

    @property
    def mlp(self) -> str:
        """Name of the MLP module."""
        return self.mlp_output.split(".")[0]

    @property
    def sublayers(self) -> dict[str, tuple[str, ...]]:
        """Module that a layer can do without -> the norms that go with it."""
        norms = {self.attention: self.attention_norms, self.mlp: self.mlp_norms}
        return {name: tuple(norm for norm in of if norm) for name, of in norms.items()}


def _llama_like(module: str, prefix: str, **differences) -> Architecture:
    return Architecture(module, f"{prefix}DecoderLayer", **differences)


_FUSED_MLP = {"mlp_inputs": ("mlp.gate_up_proj",), "mlp_blocks": 2}
_UNGATED_MLP = {"mlp_inputs": ("mlp.up_proj",)}
_NORMS_AFTER = {
    "attention_norms": (None, "post_attention_layernorm"),
    "mlp_norms": (None, "post_feedforward_layernorm"),
}
_NORMS_AROUND = {
    "attention_norms": ("input_layernorm", "post_attention_layernorm"),
    "mlp_norms": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_PARALLEL = {"attention_norms": (None, None), "mlp_norms": (None, None)}

ARCHITECTURES: Registry[Architecture] = Registry(
    "architectures",
    {
        "llama": _llama_like("llama", "Llama"),
        "mistral": _llama_like("mistral", "Mistral"),
        "ministral3": _llama_like("ministral3", "Ministral3"),
        "qwen2": _llama_like("qwen2", "Qwen2"),
        "qwen3": _llama_like("qwen3", "Qwen3"),
        "gemma": _llama_like("gemma", "Gemma", scales_embedding=True),
        "gemma2": _llama_like("gemma2", "Gemma2", scales_embedding=True, **_NORMS_AROUND),
        "gemma3_text": _llama_like("gemma3", "Gemma3", scales_embedding=True, **_NORMS_AROUND),
        "phi": _llama_like(
            "phi",
            "Phi",
            mlp_inputs=("mlp.fc1",),
            mlp_output="mlp.fc2",
            attention_output="dense",
            **_PARALLEL,
        ),
        "phi3": _llama_like("phi3", "Phi3", qkv=("qkv_proj",), **_FUSED_MLP),
        "olmo": _llama_like("olmo", "Olmo"),
        "olmo2": _llama_like("olmo2", "Olmo2", wide_norms=True, **_NORMS_AFTER),
        "olmo3": _llama_like("olmo3", "Olmo3", wide_norms=True, **_NORMS_AFTER),
        "smollm3": _llama_like("smollm3", "SmolLM3"),
        "granite": _llama_like("granite", "Granite"),
        "starcoder2": _llama_like(
            "starcoder2", "Starcoder2", mlp_inputs=("mlp.c_fc",), mlp_output="mlp.c_proj"
        ),
        "cohere2": _llama_like("cohere2", "Cohere2", **_PARALLEL),
        "glm4": _llama_like(
            "glm4",
            "Glm4",
            attention_norms=("input_layernorm", "post_self_attn_layernorm"),
            mlp_norms=("post_attention_layernorm", "post_mlp_layernorm"),
            **_FUSED_MLP,
        ),
        "exaone4": _llama_like("exaone4", "Exaone4", **_NORMS_AFTER),
        "seed_oss": _llama_like("seed_oss", "SeedOss"),
        "apertus": _llama_like(
            "apertus",
            "Apertus",
            attention_norms=("attention_layernorm", None),
            mlp_norms=("feedforward_layernorm", None),
            **_UNGATED_MLP,
        ),
        "nemotron": _llama_like("nemotron", "Nemotron", **_UNGATED_MLP),
        "lfm2": _llama_like(
            "lfm2",
            "Lfm2",
            mlp_inputs=("feed_forward.w1", "feed_forward.w3"),
            mlp_output="feed_forward.w2",
            attention_output="out_proj",
            attention_norms=("operator_norm", None),
            mlp_norms=("ffn_norm", None),
            # The channels of a convolution are as many as hidden dimensions, and go with them.
            other_hidden=(
                ("conv.in_proj.weight", 0, 3),
                ("conv.in_proj.bias", 0, 3),
                ("conv.in_proj.weight", 1, 1),
                ("conv.conv.weight", 0, 1),
                ("conv.conv.bias", 0, 1),
                ("conv.out_proj.weight", 0, 1),
                ("conv.out_proj.bias", 0, 1),
                ("conv.out_proj.weight", 1, 1),
            ),
            other_writer="conv.out_proj",
        ),
        # Head size is hidden_size / num_attention_heads in the modelling code.
        "gpt_neox": Architecture(
            "gpt_neox",
            "GPTNeoXLayer",
            mlp_inputs=("mlp.dense_h_to_4h",),
            mlp_output="mlp.dense_4h_to_h",
            attention="attention",
            has_free_heads=False,
            qkv=("query_key_value",),
            attention_output="dense",
            layers="gpt_neox.layers",
        ),
    },
)
