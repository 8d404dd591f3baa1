"""Quality, cost and speed of pruning one real model, cell by cell.

    python benchmarks/real_model.py MODEL --calibration c4.jsonl \\
        --text wikitext=pages.jsonl,column=page,first=400000 --text reviews=films.jsonl,last=40 \\
        [--methods best,paper,flap] [--sparsities 0.2,0.4,0.6] [--set windows=128] \\
        [--tasks arc_easy,piqa --limit 200 --task-data DIR] [--output FILE] [--picture FILE.svg]

A cell is a method (any that `adapt-pruner compare` knows) at a sparsity; `dense` is one, too. Each
runs in a process of its own, so that its peak of resident memory is its own, and is written as soon
as it is there: a run that was stopped goes on where it was. Cells are kept under the method's name,
the sparsity and all settings; a change of any makes another cell.

Perplexity is that of the first 40 windows of 512 tokens of a text: documents in the file's order,
joined by blank lines, of which `first` takes so many characters and `last` so many documents.
Seconds are those of the process on its threads (`threads` says how many), and of the clock; other
work on the machine lengthens the latter alone. Speed is measured beside the dense model in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEFAULT_METHODS = "best,paper,uniform,magnitude,llm-pruner,flap,depth,slicegpt,minitron"
OUTPUT = Path(__file__).parent / "results" / "real-model.json"
WINDOW, WINDOWS = 512, 40
MOST = 50


def text_of(description: str) -> tuple[str, str]:
    """Read "wikitext=pages.jsonl,column=page,first=400000": a name and a text."""
    name, _, rest = description.partition("=")
    file, *options = rest.split(",")
    said = dict(option.split("=", 1) for option in options)
    content = Path(file).read_text()
    column = said.get("column", "text")
    documents = (
        [json.loads(line)[column] for line in content.splitlines()]
        if file.endswith(".jsonl")
        else [content]
    )
    documents = documents[-int(said["last"]) :] if "last" in said else documents
    return name, "\n\n".join(documents)[: int(said["first"]) if "first" in said else None]


def settings_of(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All settings of a method, with those that hold for all methods where it has them."""
    from adapt_pruner.comparison.variants import all_variants, make_variants
    from adapt_pruner.parsing import parse_yaml

    overrides = {"calibration": arguments.calibration}
    for entry in arguments.set:
        name, _, value = entry.partition("=")
        overrides[name.replace("-", "_")] = parse_yaml(value)
    (variant,) = make_variants([method], all_variants({}), overrides=overrides)
    return variant.settings.model_dump(mode="json")


def measure_cell(cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune and measure, in this process."""
    import torch

    from adapt_pruner import prune
    from adapt_pruner.methods import make_settings
    from adapt_pruner.model.loading import load_model, load_tokenizer

    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    torch.set_num_threads(threads)
    model, tokenizer = load_model(arguments.model, device="cpu"), load_tokenizer(arguments.model)
    found: dict[str, Any] = {"threads": threads}
    if cell["method"] != "dense":
        clock, own = time.perf_counter(), time.process_time()
        result = prune(
            model,
            tokenizer,
            sparsity=cell["sparsity"],
            settings=make_settings(**cell["settings"]),
            calibration=arguments.calibration,
        )
        found["clock_seconds"] = time.perf_counter() - clock
        found["process_seconds"] = time.process_time() - own
        found["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found["sparsity"] = result.sparsity
        found["widths"] = result.widths_after
    model.eval()
    found["parameters"] = sum(p.numel() for p in model.parameters())
    return {**found, **quality(model, tokenizer, arguments), **speed(model, cell, arguments)}


def quality(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on every text, and lm-eval's tasks if there are any."""
    from adapt_pruner.evaluation import evaluate, perplexity

    found: dict[str, Any] = {"perplexity": {}}
    for name, text in map(text_of, arguments.text):
        measured = perplexity(
            model, tokenizer, [text], WINDOW, max_windows=arguments.windows, batch_size=1
        )
        found["perplexity"][name] = measured.perplexity
    if arguments.tasks:
        result = evaluate(
            model,
            tokenizer,
            tasks=arguments.tasks,
            task_data=arguments.task_data,
            limit=arguments.limit,
        )
        found["tasks"] = {
            f"{score.name} {score.metric}": [score.value, score.stderr, score.num_samples]
            for score in result.scores
        }
    return found


def speed(model: Any, cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, and how many times those of the dense model."""
    from dataclasses import asdict

    from adapt_pruner.evaluation import compare_speed
    from adapt_pruner.model.loading import load_model

    if cell["method"] == "dense" or not arguments.repetitions:
        return {}
    dense = load_model(arguments.model, device="cpu")
    return {"speed": asdict(compare_speed([dense, model], repetitions=arguments.repetitions)[1])}


def run_cell(cell: dict[str, Any], argv: list[str]) -> dict[str, Any] | None:
    """Measure in a process of its own. Returns None, after a word about it, if that failed."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "cell.json"
        file.write_text(json.dumps(cell))
        done = subprocess.run([sys.executable, __file__, *argv, "--cell", str(file)], check=False)
        if done.returncode:
            print(f"{cell['method']} at {cell['sparsity']:.0%} failed; it is tried again next time")
            return None
        return json.loads(file.read_text())


def cells_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = [{"method": "dense", "sparsity": 0.0, "settings": {}}]
    for sparsity in map(float, arguments.sparsities.split(",")):
        for method in arguments.methods.split(","):
            settings = settings_of(method, arguments)
            settings["calibration"] = Path(settings["calibration"]).name
            cells.append({"method": method, "sparsity": sparsity, "settings": settings})
    return cells


def is_same(cell: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(cell[key] == other[key] for key in ("method", "sparsity", "settings"))


def show(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        texts = "  ".join(f"{name} {value:7.2f}" for name, value in cell["perplexity"].items())
        cost = ""
        if "process_seconds" in cell:
            peak = cell["peak_resident_bytes"] / 1e9
            cost = f"  {cell['process_seconds']:6.0f} s  {peak:.2f} GB"
        print(f"{cell['method']:14} {cell['sparsity']:4.0%}  {texts}{cost}", flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE[,...]")
    parser.add_argument("--methods", default=DEFAULT_METHODS)
    parser.add_argument("--sparsities", default="0.2,0.4,0.6")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of each text, at most")
    parser.add_argument("--tasks", default="", help="of lm-eval, with commas")
    parser.add_argument("--task-data", action="append", default=[])
    parser.add_argument("--limit", type=float, default=200)
    parser.add_argument("--repetitions", type=int, default=5, help="of the speed; 0: none")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--picture", type=Path, help="SVG of the perplexity over the sparsity")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.cell:
        cell = json.loads(arguments.cell.read_text())
        arguments.cell.write_text(json.dumps({**cell, **measure_cell(cell, arguments)}))
        return
    from adapt_pruner.durable import replace_file
    from adapt_pruner.report.account import versions_used

    done = json.loads(arguments.output.read_text())["cells"] if arguments.output.is_file() else []
    for cell in cells_of(arguments):
        protocol = {
            "texts": [text.partition("=")[0] for text in arguments.text],
            "windows": arguments.windows,
            "window": WINDOW,
            "tasks": arguments.tasks,
        }
        if any(is_same(cell, other) and other["protocol"] == protocol for other in done):
            continue
        if (measured := run_cell(cell, argv)) is None:
            continue
        done.append({**measured, "protocol": protocol, "versions": versions_used()})
        new = arguments.output.with_suffix(".new")
        new.write_text(json.dumps({"model": Path(arguments.model).name, "cells": done}, indent=1))
        replace_file(new, arguments.output)
        show(done[-1:])
    print()
    show(done)
    if arguments.picture:
        draw(arguments.picture, done)


def draw(file: Path, cells: list[dict[str, Any]]) -> None:
    """Perplexity on the first text over the sparsity, a line per method. Cells of more than
    `MOST` times the dense model's are left out: they would press all others into one line."""
    from adapt_pruner.comparison.picture import style_of
    from adapt_pruner.report.pictures import make_figure, save_figure, use_log_scale

    figure, (axis,) = make_figure(7.5, 4.2, 1)
    (dense,) = (cell for cell in cells if cell["method"] == "dense")
    name = next(iter(dense["perplexity"]))
    limit = MOST * dense["perplexity"][name]
    cells = [c for c in cells if c is not dense and c["perplexity"][name] <= limit]
    methods = dict.fromkeys(cell["method"] for cell in cells)
    for number, method in enumerate(methods):
        own = sorted((c for c in cells if c["method"] == method), key=lambda c: c["sparsity"])
        axis.plot(
            [100 * cell["sparsity"] for cell in [dense, *own]],
            [cell["perplexity"][name] for cell in [dense, *own]],
            markersize=5, linewidth=2.2 if method == "best" else 1.2, label=method,
            **style_of(number),
        )  # fmt: skip
    axis.axhline(dense["perplexity"][name], color="#222", linewidth=1, linestyle=":", label="dense")
    use_log_scale(axis)
    axis.set_xlabel("sparsity of the decoder layers, %")
    axis.set_ylabel(f"perplexity, {name}\n(lower is better)")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    save_figure(figure, file)


if __name__ == "__main__":
    main(sys.argv[1:])
