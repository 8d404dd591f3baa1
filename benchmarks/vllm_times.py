"""Times of a model in vLLM, for `engines.py`, which starts this in vLLM's own environment.

Loads one model, says "ready", and then, for every line that it reads, reads a prompt and writes
once, and prints the processor seconds of each as JSON. vLLM cannot be stopped after the prompt:
what writing takes is the difference between answers of all tokens and of one.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main() -> None:
    directory, prompt, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    answers = os.dup(1)
    os.dup2(2, 1)  # vLLM writes its notes to stdout
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(1)
    llm = LLM(
        model=directory, model_impl="transformers", dtype="float32", enforce_eager=True,
        max_model_len=prompt + new + 1, max_num_seqs=1, enable_prefix_caching=False,
    )  # fmt: skip
    size = llm.get_tokenizer().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(size, (prompt,), generator=generator).tolist()

    def seconds(count: int) -> float:
        how = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        began = time.process_time()
        llm.generate({"prompt_token_ids": tokens}, how, use_tqdm=False)
        return time.process_time() - began

    def say(what: object) -> None:
        os.write(answers, (json.dumps(what) + "\n").encode())

    say("ready")
    for _ in sys.stdin:
        first = seconds(1)
        say([first, seconds(new + 1) - first])


if __name__ == "__main__":
    main()
