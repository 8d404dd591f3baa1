"""Perplexity at exactly 20, 40 and 60 % sparsity, by variant and seed, in one run.

    python benchmarks/quality.py [--model demo] [--text TRAIN --heldout TEXT] [--seeds 3]

Without arguments: the embedded model, calibrated on its training text and measured on the held-out
part. Perplexity is per token, on at most 100 windows of 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import transformers

from adapt_pruner import load_calibration, load_model, load_tokenizer, perplexity, prune
from adapt_pruner.evaluation import evaluation_texts
from adapt_pruner.report.account import versions
from adapt_pruner.settings import make_settings

PLAIN = {"compensation": "none", "allocation": "adaptive", "amplitude": 0.0}
"""One pass of uniform cutting without compensation: what simple scores get."""
VARIANTS = {
    "random": {"importance": "random", **PLAIN},
    "magnitude-l2": {"importance": "magnitude-l2", **PLAIN},
    "paper with A = 0 (uniform)": {"preset": "paper", "amplitude": 0.0},
    "paper": {"preset": "paper"},
    "activation-fisher + refit": {"importance": "activation-fisher"},
    "best": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="pydocs", help="calibration text")
    parser.add_argument("--heldout", default="pydocs", help="text to measure on")
    parser.add_argument("--sparsities", default="0.2,0.4,0.6")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, with commas")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    tokenizer = load_tokenizer(arguments.model)
    texts = evaluation_texts(arguments.heldout)

    def measure(model) -> float:
        found = perplexity(model, tokenizer, texts, max_windows=arguments.windows)
        return found.perplexity

    dense = measure(load_model(arguments.model))
    results: dict = {
        "versions": versions(),
        "arguments": str(arguments),
        "dense": dense,
        "rows": [],
    }
    sparsities = [float(s) for s in arguments.sparsities.split(",")]
    print(f"dense {dense:.2f}")
    print("| variant | " + " | ".join(f"{s:.0%}" for s in sparsities) + " | s per run |")
    print("| --- |" + " --- |" * (len(sparsities) + 1))
    data = {}
    for name, changes in VARIANTS.items():
        if name not in arguments.only.split(","):
            continue
        row: dict = {"variant": name, "perplexity": {}, "parameters": {}}
        began = time.perf_counter()
        for sparsity in sparsities:
            found = []
            for seed in range(arguments.seeds):
                settings = make_settings(**changes, seed=seed)
                key = settings.windows, settings.window_length, seed
                if key not in data:
                    data[key] = load_calibration(
                        arguments.text, tokenizer, settings.window_length, settings.windows,
                        seed=seed,
                    )  # fmt: skip
                model = load_model(arguments.model)
                result = prune(
                    model, tokenizer, sparsity=sparsity, calibration=data[key], settings=settings
                )
                found.append(measure(model))
                row["parameters"][str(sparsity)] = result.after.total
            row["perplexity"][str(sparsity)] = found
        row["seconds_per_run"] = (time.perf_counter() - began) / len(sparsities) / arguments.seeds
        results["rows"].append(row)
        cells = [_cell(found) for found in row["perplexity"].values()]
        print(f"| {name} | {' | '.join(cells)} | {row['seconds_per_run']:.0f} |")
    if arguments.json:
        arguments.json.write_text(
            json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8"
        )


def _cell(found: list[float]) -> str:
    spread = f" ± {statistics.stdev(found):.2g}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.4g}{spread}"


if __name__ == "__main__":
    main()
