"""A reader of checkpoints, run in a process of its own by test_checkpoint.py.

    python reload_checkpoints.py with|without trust|plain RESULT DIRECTORY...

Loads each directory with plain transformers, with adapt_pruner imported or its import made
impossible, and writes what `outputs` returns, prefixed by the directory's name, to RESULT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor


@torch.no_grad()
def outputs(model) -> dict[str, Tensor]:
    """Logits of fixed tokens, and greedy continuations with both kinds of cache."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, model.config.vocab_size, (2, 12), generator=generator)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return {
        "logits": model(input_ids=tokens).logits,
        "dynamic": model.generate(tokens[:1], cache_implementation="dynamic", **how),
        "static": model.generate(tokens[:1], cache_implementation="static", **how),
    }


def main(imported: str, trust: str, result: str, *directories: str) -> None:
    if imported == "with":
        import adapt_pruner  # noqa: F401
    else:
        sys.modules["adapt_pruner"] = None  # type: ignore[assignment]
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()
    found = {}
    for directory in directories:
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust == "trust")
        name = Path(directory).name
        found |= {f"{name}.{key}": value for key, value in outputs(model.eval()).items()}
    save_file(found, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
