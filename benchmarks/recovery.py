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
from adapt_pruner.methods import make_settings
from adapt_pruner.recovery.accel import run_accel
from adapt_pruner.recovery.request import AccelRequest
from adapt_pruner.recovery.settings import make_recovery_settings
from adapt_pruner.report.account import versions_used
from adapt_pruner.report.pictures import ACCENT, AFTER, make_figure
from adapt_pruner.run import evaluation_texts

BASE = {"phases": 10, "sequence_length": 256, "batch_tokens": 2048}
COUNTS = (1, 2, 3, 5, 10, 20, 40, 80)
VARIANTS = {
    **{f"{n} phases": {"phases": n} for n in COUNTS},
    **{f"{n} phases by eq. 11": {"phases": n, "final_share": 0.0} for n in (2, 5, 10)},
    "constant growth": {"growth": "constant", "final_share": 0.0},
    "moments carried": {"moments": "carry"},
    "no distillation": {"alpha": 0.0},
    "1 phase, no distillation": {"phases": 1, "alpha": 0.0},
    "distillation at alpha 0.9": {"alpha": 0.9},
}
"""Each is as `adapt-pruner accel` does it by default, in 10 phases, but for what it says."""


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
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="SVG of perplexity over phases, all presets")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    tokenizer = load_tokenizer(arguments.model)
    texts = evaluation_texts(arguments.heldout)

    def measure(model) -> float:
        return perplexity(model, tokenizer, texts, max_windows=100).perplexity

    print(f"dense {measure(load_model(arguments.model)):.3f}")
    for seed in range(arguments.seeds):
        for name in arguments.only:
            key = f"{run_name(arguments)}|{name}|{seed}"
            if key in read_cells(arguments.json):
                continue
            cell = run(arguments, VARIANTS[name], seed, measure)
            print(key, cell, flush=True)
            cells = read_cells(arguments.json) | {key: cell}
            results = {"versions": versions_used(), "cells": cells}
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report(read_cells(arguments.json), arguments)
    if arguments.picture:
        draw(read_cells(arguments.json), arguments)


def read_cells(file: Path) -> dict[str, dict]:
    return json.loads(file.read_text(encoding="utf-8"))["cells"] if file.exists() else {}


def run_name(arguments) -> str:
    model = Path(arguments.model).name
    return (
        f"{model}|{arguments.preset}|{arguments.sparsity}|{arguments.tokens}|"
        f"{arguments.learning_rate}"
    )


def run(arguments, changes: dict, seed: int, measure, settings=None) -> dict:
    settings = settings or make_settings(
        arguments.preset, calibration=arguments.data, seed=seed, windows=128
    )
    common = {"learning_rate": arguments.learning_rate, "repeat": True, "max_loss_spike": None}
    recovery = make_recovery_settings(**{**BASE, **common, **changes})
    request = AccelRequest(
        arguments.model,
        arguments.data,
        arguments.tokens,
        settings,
        recovery,
        sparsity=arguments.sparsity,
    )
    place = Path(tempfile.mkdtemp())
    began = time.perf_counter()
    try:
        outcome = run_accel(request, place / "run")
        log = [json.loads(line) for line in (place / "run" / "training.jsonl").open()]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    assert outcome.result is not None
    phases = [phase["seconds"] for phase in outcome.result.training["phases"]]
    return {
        "perplexity": measure(outcome.result.model),
        "parameters": outcome.result.after.total,
        "seconds": round(time.perf_counter() - began, 1),
        "cutting": round(sum(phase["prune"] for phase in phases), 1),
        "training": round(sum(phase["train"] for phase in phases), 1),
        "training_loss": statistics.mean(line["loss"] for line in log[-20:]),
    }


def report(cells: dict, arguments) -> None:
    print("| variant | perplexity | s per run |\n| --- | --- | --- |")
    for name in arguments.only:
        start = f"{run_name(arguments)}|{name}|"
        runs = [cell for key, cell in cells.items() if key.startswith(start)]
        found = [cell["perplexity"] for cell in runs]
        spread = f" ± {statistics.stdev(found):.2g}" if len(found) > 1 else ""
        seconds = statistics.mean(cell["seconds"] for cell in runs)
        print(f"| {name} | {statistics.mean(found):.4g}{spread} | {seconds:.0f} |")


def draw(cells: dict, arguments) -> None:
    """Perplexity over the number of phases, one dot per seed, for every preset."""
    lines: dict[tuple[str, bool], dict[int, list[float]]] = {}
    for key, cell in cells.items():
        model, preset, sparsity, tokens, _, name, _ = key.split("|")
        same = (model, float(sparsity), int(tokens)) == (
            Path(arguments.model).name, arguments.sparsity, arguments.tokens,
        )  # fmt: skip
        count, _, rule = name.partition(" phases")
        if same and count.isdigit() and rule in ("", " by eq. 11"):
            line = lines.setdefault((preset, bool(rule)), {})
            line.setdefault(int(count), []).append(cell["perplexity"])
    presets = sorted({preset for preset, _ in lines})
    figure, axes = make_figure(6.5, 2.7 * len(presets), len(presets))
    for axis, preset in zip(axes, presets, strict=True):
        for paper, color, label in (
            (False, AFTER, "default: 75 % of the tokens in the last phase"),
            (True, ACCENT, "eq. 11"),
        ):
            found = dict(sorted(lines.get((preset, paper), {}).items()))
            if paper and found:
                found = {1: lines[preset, False].get(1, []), **found}  # one phase is the same
            means = [statistics.mean(values) for values in found.values()]
            axis.plot(list(found), means, "-", color=color, label=label)
            for phases, values in found.items():
                axis.plot([phases] * len(values), values, "o", color=color, markersize=3.5)
        axis.set_xscale("log")
        axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axis.minorticks_off()
        axis.set_xlabel("phases (1: prune, then train)")
        axis.set_ylabel("perplexity")
        axis.set_title(f"preset {preset}, {arguments.sparsity:.0%}", loc="left", fontsize=11)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(arguments.picture, metadata={"Date": None})
    figure.savefig(arguments.picture.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
