"""What methods reach at equal size and equal training tokens: Adapt-Pruner's table 4 in small.

    python benchmarks/trained_methods.py --model DIR --data TEXT --heldout TEXT --json FILE

Two tables. `systems`: Adapt-Accel, Sheared-LLaMA with a tenth of the tokens for its masks, and
Minitron, each with its own way of training. `recovery`: every method, one cut, then the same
training without a teacher. Perplexity is per token on at most 100 windows of 256. All take the same
steps of 256 tokens: with fewer and larger ones a tenth of them would be too few for masks, which
want some 300. Cells that the JSON file holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import transformers
from recovery import read_cells, run

from adapt_pruner import load_model, load_tokenizer, perplexity
from adapt_pruner.errors import AdaptPrunerError
from adapt_pruner.methods import make_settings
from adapt_pruner.report.account import versions_used
from adapt_pruner.run import evaluation_texts

STEPS = {"sequence_length": 256, "batch_tokens": 256}
ONE_CUT = {**STEPS, "phases": 1, "alpha": 0.0}
SHEARED = {**STEPS, "phases": None, "alpha": 0.0}
SYSTEMS = {  # name: (settings, training)
    "accel, best, distilled (default)": ({}, {**STEPS, "phases": 10}),
    "accel, best": ({}, {**STEPS, "phases": 10, "alpha": 0.0}),
    "accel, paper": ({"preset": "paper"}, {**STEPS, "phases": 10, "alpha": 0.0, "final_share": 0}),
    "sheared-llama": ({"method": "sheared-llama"}, SHEARED),
    "sheared-llama, a fifth for masks": ({"method": "sheared-llama", "mask_share": 0.2}, SHEARED),
    "minitron": (
        {"method": "minitron"},
        {**STEPS, "phases": 1, "alpha": 1.0, "temperature": 1.0},
    ),
    "minitron, teacher corrected": (
        {"method": "minitron"},
        {**STEPS, "phases": 1, "alpha": 1.0, "temperature": 1.0, "teacher_tokens": 259_072},
    ),
}
RECOVERY = {
    "best": ({}, ONE_CUT),
    "paper": ({"preset": "paper"}, ONE_CUT),
    "uniform": ({"method": "uniform"}, ONE_CUT),
    "magnitude": ({"method": "magnitude"}, ONE_CUT),
    "random": ({"method": "random"}, ONE_CUT),
    "llm-pruner": ({"method": "llm-pruner"}, ONE_CUT),
    "ada-pruner": ({"method": "ada-pruner"}, ONE_CUT),
    "flap": ({"method": "flap"}, ONE_CUT),
    "minitron": ({"method": "minitron"}, ONE_CUT),
    "shortgpt": ({"method": "depth"}, ONE_CUT),
    "sublayers": ({"method": "depth", "cut": ("sublayers",)}, ONE_CUT),
    "slicegpt": ({"method": "slicegpt", "window_length": 64}, ONE_CUT),
    "sheared-llama": ({"method": "sheared-llama", "mask_share": 0.2}, SHEARED),
}
TABLES = {"systems": SYSTEMS, "recovery": RECOVERY}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="training and calibration text")
    parser.add_argument("--heldout", required=True, help="text to measure on")
    parser.add_argument("--table", choices=list(TABLES), default="systems")
    parser.add_argument("--only", nargs="+", help="rows")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer, texts = load_tokenizer(arguments.model), evaluation_texts(arguments.heldout)

    def measure(model) -> float:
        return perplexity(model, tokenizer, texts, max_windows=100).perplexity

    print(f"dense {measure(load_model(arguments.model)):.3f}")
    rows = {
        name: TABLES[arguments.table][name] for name in arguments.only or TABLES[arguments.table]
    }
    for seed in range(arguments.seeds):
        for name, (settings, training) in rows.items():
            key = key_of(arguments, name, seed)
            if key in read_cells(arguments.json):
                continue
            made = make_settings(
                calibration=arguments.data, seed=seed, **{**windows_of(settings), **settings}
            )
            try:
                cell = run(arguments, training, seed, measure, made)
            except AdaptPrunerError as error:
                cell = {"error": str(error)}
            print(key, cell, flush=True)
            cells = read_cells(arguments.json) | {key: cell}
            results = {"versions": versions_used(), "cells": cells}
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report(read_cells(arguments.json), arguments, list(rows))


def windows_of(settings: dict) -> dict:
    """128 calibration windows for all; Sheared-LLaMA calibrates on none."""
    return {} if settings.get("method") == "sheared-llama" else {"windows": 128}


def key_of(arguments, name: str, seed: int) -> str:
    what = [arguments.table, Path(arguments.model).name, arguments.sparsity, arguments.tokens]
    return "|".join(map(str, [*what, arguments.learning_rate, name, seed]))


def report(cells: dict, arguments, names: list[str]) -> None:
    print("| system | perplexity | parameters | s per run |\n| --- | --- | --- | --- |")
    for name in names:
        keys = [key_of(arguments, name, seed) for seed in range(arguments.seeds)]
        runs = [cells[key] for key in keys if "perplexity" in cells.get(key, {})]
        if not runs:
            print(f"| {name} | {cells.get(keys[0], {}).get('error', '')} | | |")
            continue
        found = [cell["perplexity"] for cell in runs]
        spread = f" ± {statistics.stdev(found):.2g}" if len(found) > 1 else ""
        seconds = f"{statistics.mean(cell['seconds'] for cell in runs):.0f}"
        mean, size = f"{statistics.mean(found):.4g}{spread}", f"{runs[0]['parameters']:,}"
        print(f"| {name} | {mean} | {size} | {seconds} |")


if __name__ == "__main__":
    main()
