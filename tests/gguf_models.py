"""Models and a tokenizer small enough to be written as GGUF files in no time."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 320
LAYERS = {
    0: {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96},
    1: {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40},
    2: {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 17},
}
UNEQUAL = {"per_layer_config": LAYERS, "allow_global_per_layer_attribute_access": True}
BARE = {"attention_bias": False, "mlp_bias": False}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a token per byte and a single merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *alphabet, "th"]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
