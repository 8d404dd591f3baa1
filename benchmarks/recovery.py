"""What recovery training reaches at equal final size and equal tokens, by variant and seed.

    python benchmarks/recovery.py [--model demo] [--data pydocs] [--heldout pydocs] [--json FILE]

Without arguments: the embedded model. Every run ends at exactly the same size and has seen the same
number of tokens; perplexity is per token on at most 100 windows of 256. Cells that the JSON file
holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import transformers

from adapt_pruner import load_model, load_tokenizer, perplexity
from adapt_pruner.recovery.accel import run_accel
from adapt_pruner.recovery.request import AccelRequest
from adapt_pruner.recovery.settings import make_recovery_settings
from adapt_pruner.report.account import versions
from adapt_pruner.report.pictures import ACCENT, AFTER, make_figure
from adapt_pruner.run import evaluation_texts
from adapt_pruner.settings import make_settings

BASE = {
    "phases": 5,
    "alpha": 0.0,
    "moments": "reset",
    "sequence_length": 256,
    "batch_tokens": 2048,
    "weight_decay": 0.0,
}
VARIANTS = {
    **{f"{n} phases" if n > 1 else "prune, then train": {"phases": n} for n in (1, 2, 5, 10, 20)},
    "moments carried": {"moments": "carry"},
    "moments carried, beta2 0.95": {"moments": "carry", "adam_beta2": 0.95},
    "moments reset, beta2 0.95": {"adam_beta2": 0.95},
    "constant growth": {"growth": "constant"},
    "cosine growth": {"growth": "cosine"},
    "distillation, alpha 0.5": {"alpha": 0.5},
    "distillation, alpha 0.9": {"alpha": 0.9},
}
"""Each differs from 5 phases, moments reset, linear growth and no teacher in what it says."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="pydocs", help="training and calibration text")
    parser.add_argument("--heldout", default="pydocs", help="text to measure on")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--preset", default="best", help="of the pruning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(VARIANTS).replace(", ", "; "))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="SVG of perplexity over phases")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    tokenizer = load_tokenizer(arguments.model)
    texts = evaluation_texts(arguments.heldout)

    def measure(model) -> float:
        return perplexity(model, tokenizer, texts, max_windows=100).perplexity

    results = {"cells": {}}
    if arguments.json.exists():
        results = json.loads(arguments.json.read_text(encoding="utf-8"))
    results |= {"versions": versions(), "dense": measure(load_model(arguments.model))}
    print(f"dense {results['dense']:.3f}")
    chosen = [name.replace("; ", ", ") for name in arguments.only.split(",")]
    for seed in range(arguments.seeds):
        for name in chosen:
            key = f"{run_name(arguments)}|{name}|{seed}"
            if key in results["cells"]:
                continue
            results["cells"][key] = run(arguments, VARIANTS[name], seed, measure)
            print(key, results["cells"][key], flush=True)
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report(results, arguments, chosen)
    if arguments.picture:
        draw(results, arguments)


def run_name(arguments) -> str:
    model = Path(arguments.model).name
    return (
        f"{model}|{arguments.preset}|{arguments.sparsity}|{arguments.tokens}|"
        f"{arguments.learning_rate}"
    )


def run(arguments, changes: dict, seed: int, measure) -> dict:
    settings = make_settings(arguments.preset, calibration=arguments.data, seed=seed, windows=128)
    rate = {"learning_rate": arguments.learning_rate, "repeat": True, "max_loss_spike": None}
    recovery = make_recovery_settings(**{**BASE, **rate, **changes})
    request = AccelRequest(
        arguments.model, arguments.data, arguments.tokens, settings, recovery, arguments.sparsity
    )
    place = Path(tempfile.mkdtemp())
    began = time.perf_counter()
    try:
        outcome = run_accel(request, place / "run")
        log = [json.loads(line) for line in (place / "run" / "training.jsonl").open()]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    assert outcome.result is not None
    return {
        "perplexity": measure(outcome.result.model),
        "parameters": outcome.result.after.total,
        "seconds": round(time.perf_counter() - began, 1),
        "training_loss": statistics.mean(line["loss"] for line in log[-20:]),
    }


def report(results: dict, arguments, chosen: list[str]) -> None:
    print("| variant | perplexity | s per run |\n| --- | --- | --- |")
    for name in chosen:
        cells = [
            cell
            for key, cell in results["cells"].items()
            if key.startswith(f"{run_name(arguments)}|{name}|")
        ]
        found = [cell["perplexity"] for cell in cells]
        spread = f" ± {statistics.stdev(found):.2g}" if len(found) > 1 else ""
        seconds = statistics.mean(cell["seconds"] for cell in cells)
        print(f"| {name} | {statistics.mean(found):.4g}{spread} | {seconds:.0f} |")


def draw(results: dict, arguments) -> None:
    """Perplexity over the number of phases, one dot per seed, for every budget of tokens."""
    figure, (axis,) = make_figure(6.5, 3.4, 1)
    lines: dict[int, dict[int, list[float]]] = {}
    for key, cell in results["cells"].items():
        model, preset, sparsity, tokens, _, name, _ = key.split("|")
        phases = VARIANTS[name].get("phases")
        same = model == Path(arguments.model).name and preset == arguments.preset
        if same and phases and float(sparsity) == arguments.sparsity:
            lines.setdefault(int(tokens), {}).setdefault(phases, []).append(cell["perplexity"])
    for color, (tokens, found) in zip((AFTER, ACCENT), sorted(lines.items()), strict=False):
        found = dict(sorted(found.items()))
        means = [statistics.mean(values) for values in found.values()]
        axis.plot(list(found), means, "-", color=color, label=f"{tokens:,} tokens")
        for phases, values in found.items():
            axis.plot([phases] * len(values), values, "o", color=color, markersize=3.5)
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    axis.minorticks_off()
    axis.set_xlabel("phases (1: prune, then train)")
    axis.set_ylabel("perplexity")
    axis.set_title(f"{arguments.sparsity:.0%} sparsity, equal tokens", loc="left", fontsize=11)
    axis.legend(frameon=False)
    figure.savefig(arguments.picture, metadata={"Date": None})
    figure.savefig(arguments.picture.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
