"""Models cut by SliceGPT, and text to cut them by."""

from __future__ import annotations

from picomodels import random_tokens

TOKENS = random_tokens()
ROTATABLE = ["llama", "mistral", "ministral3", "qwen2", "qwen3", "phi3", "smollm3", "granite",
             "seed_oss", "apertus"]  # fmt: skip
FORMS = [False, True]
