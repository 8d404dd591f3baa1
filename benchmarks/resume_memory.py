"""Peak memory of a run of accel, and of one that goes on from a checkpoint, each in a process.

    python benchmarks/resume_memory.py runs/memory --hidden 512 --layers 4 --repeats 3

Makes a random Llama, starts a run, stops it after the first phase and resumes it; and makes the
same run at one go. Prints the greatest resident memory of each process in MB, as the system counts
it (ru_maxrss), for every repetition: their spread is what the figures can tell apart.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapt_pruner import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    model = given.output / "model"
    parameters = make_model(model, given.hidden, given.layers)
    print(f"{parameters / 1e6:.1f}M parameters")
    peaks = {"whole": [], "started": [], "resumed": []}
    for _ in range(given.repeats):
        for name in ("whole", "parts"):
            shutil.rmtree(given.output / name, ignore_errors=True)
        peaks["whole"].append(peak_of(model, given.output / "whole"))
        peaks["started"].append(peak_of(model, given.output / "parts", "--stop-after", "1"))
        peaks["resumed"].append(peak_of(model, given.output / "parts"))
    for name, values in peaks.items():
        each = ", ".join(f"{value:,.0f}" for value in values)
        print(f"{name:8} {mean(values):9,.1f} MB  ({each})")


def make_model(directory: Path, hidden: int, layers: int) -> int:
    """Write a random Llama with the tokenizer of the embedded model. Returns its parameters."""
    tokenizer = load_tokenizer("demo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.num_parameters()


def peak_of(model: Path, output: Path, *more: str) -> float:
    """Run accel in a process of its own. Returns its greatest resident memory in MB."""
    command = [
        sys.executable, "-m", "adapt_pruner", "accel", str(model), "-o", str(output), "-q",
        "--sparsity", "0.3", "--phases", "2", "--data", "pydocs", "--tokens", "8192",
        "--sequence-length", "128", "--batch-tokens", "1024", "--repeat", "--alpha", "0",
        "--windows", "8", "--window-length", "64", "--steps", "2", "--tuning-steps", "0",
        "--moments", "carry", "--max-documents", "200", *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, f"{' '.join(command)} ended with {status}"
    return used.ru_maxrss / 1024


if __name__ == "__main__":
    main()
