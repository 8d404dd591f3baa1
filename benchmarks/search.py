"""What a search finds, on the text that it measures trials on and on text that it never saw.

    python benchmarks/search.py MODEL --texts PLACE --json FILE [--sparsity 0.2 0.5] [--only NAME]

PLACE holds `pool` (a file or a directory), `validation` and `heldout`, as `split_texts` below
writes them. Cells that the JSON file holds are not run again. `--report` prints the tables alone;
`--cost` measures what a trial takes, beside one evaluation of its objective.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from adapt_pruner import load_model, load_tokenizer, make_settings, perplexity, search
from adapt_pruner.allocate.target import resolve_target
from adapt_pruner.data.overlap import Overlap
from adapt_pruner.evaluation import evaluation_texts
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.report.account import versions_used
from adapt_pruner.report.pictures import ACCENT, AFTER, make_figure, save_figure
from adapt_pruner.run import Request, make_result
from adapt_pruner.searching.measuring import Validation
from adapt_pruner.searching.request import SearchSettings
from adapt_pruner.searching.samples import Samples
from adapt_pruner.searching.space import make_space
from adapt_pruner.searching.trials import Bench

WINDOW = 256
BEST = {"importance": "residual-fisher", "allocation": "global", "compensation": "refit"}
MANY = {"windows": [64, 128]}
SEARCHES: dict[str, dict[str, Any]] = {
    "joint": {},
    "random search": {"sampler": "random"},
    "samples alone": {"over": "samples"},
    "importance alone": {"over": "importance"},
    "joint, global": {"allocation": "global"},
    "joint, global, refit": {"allocation": "global", "compensation": "refit", "space": MANY},
    "samples, best scores": {**BEST, "over": "samples", "space": MANY},
    "joint, layers": {"layer_spread": 0.5},
    "best, settings": {
        "method": "adapt-pruner",
        "trials": 20,
        "space": {
            "steps": {"low": 1, "high": 8},
            "ridge": {"low": 0.01, "high": 1.0, "log": True},
            "carry": {"low": 0.0, "high": 1.0},
            "windows": [256, 512],
            "window_length": [64, 128],
            "importance": ["residual-fisher", "activation-fisher"],
        },
    },
}
"""Each is `adapt-pruner search` as it is by default, but for what it says."""
RUNS: dict[str, dict[str, Any]] = {
    "ten random samples": {"method": "ada-pruner"},
    "llm-pruner": {"method": "llm-pruner"},
    "128 random samples, best scores": {"method": "ada-pruner", **BEST, "windows": 128},
    "best": {"method": "adapt-pruner"},
}
"""Single runs of `adapt-pruner prune`."""
CHOICES = 30
"""Seeds of "ten random samples"."""
LONGEST = 3000
"""Characters of a document."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--validation-windows", type=int, default=64)
    parser.add_argument("--heldout-windows", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choices", type=int, default=CHOICES)
    parser.add_argument("--only", nargs="+", default=[*RUNS, *SEARCHES])
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--picture", type=Path, help="SVG of the best value over trials")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.cost:
        trial_cost(arguments, Texts(arguments))
    elif not arguments.report:
        measure_all(arguments)
    for sparsity in arguments.sparsity:
        print_table(read(arguments.json)["cells"], Path(arguments.model).name, sparsity)
    if arguments.picture:
        draw(read(arguments.json)["cells"], arguments)


def measure_all(arguments: argparse.Namespace) -> None:
    text = Texts(arguments)
    for key, make in cells(arguments, text):
        if key in read(arguments.json)["cells"]:
            continue
        began = time.process_time()
        cell = make()
        cell["cpu_seconds"] = round(time.process_time() - began, 1)
        print(key, {k: v for k, v in cell.items() if k != "trials"}, flush=True)
        stored = read(arguments.json) | {"versions": versions_used()}
        stored["cells"][key] = cell
        arguments.json.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def cells(arguments: argparse.Namespace, text: Texts) -> Iterator[tuple[str, Any]]:
    """Names of all cells, and what measures each, the cheap ones and the first seeds first."""
    model = Path(arguments.model).name
    yield f"{model}|0|dense|0", lambda: text.measure(load_model(arguments.model))
    for seed in range(max(arguments.seeds, arguments.choices)):
        for sparsity in arguments.sparsity:
            for name in arguments.only:
                is_choice = name == "ten random samples"
                if seed >= (arguments.choices if is_choice else arguments.seeds):
                    continue
                key = f"{model}|{sparsity}|{name}|{seed}"
                if name in RUNS:
                    yield key, lambda n=name, p=sparsity, s=seed: pruned(arguments, text, n, p, s)
                else:
                    yield key, lambda n=name, p=sparsity, s=seed: searched(arguments, text, n, p, s)


class Texts:
    """The two texts that models are measured on."""

    def __init__(self, arguments: argparse.Namespace):
        self.place = arguments.texts
        self.tokenizer = load_tokenizer(arguments.model)
        self.how = SearchSettings(
            validation_window=WINDOW, validation_windows=arguments.validation_windows
        )
        self.validation = Validation(
            load_model(arguments.model), self.tokenizer, evaluation_texts(self.of("validation")),
            self.how,
        )  # fmt: skip
        self.heldout = evaluation_texts(self.of("heldout"))
        self.heldout_windows = arguments.heldout_windows

    def of(self, name: str) -> str:
        return str(next(self.place.glob(f"{name}*")))

    def measure(self, model: Any) -> dict[str, Any]:
        heldout = perplexity(
            model, self.tokenizer, self.heldout, window=WINDOW, max_windows=self.heldout_windows
        )
        return {"validation": self.validation.measure(model), "heldout": heldout.perplexity}


def pruned(arguments, text: Texts, name: str, sparsity: float, seed: int) -> dict[str, Any]:
    settings = make_settings(calibration=text.of("pool"), seed=seed, **RUNS[name])
    return text.measure(make_result(Request(arguments.model, settings, sparsity)).model)


def searched(arguments, text: Texts, name: str, sparsity: float, seed: int) -> dict[str, Any]:
    place = Path(tempfile.mkdtemp())
    try:
        outcome = search(
            arguments.model, place / "found", sparsity=sparsity, calibration=text.of("pool"),
            validation=text.of("validation"), seed=seed, validation_window=WINDOW,
            validation_windows=arguments.validation_windows,
            **{"trials": arguments.trials, **SEARCHES[name]},
        )  # fmt: skip
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {
        **text.measure(outcome.result.model),
        "parameters": outcome.result.after.total,
        "importances": outcome.importances,
        "found": outcome.trials[outcome.best]["values"],
        "stopped": sum(trial["state"] == "pruned" for trial in outcome.trials),
        "trials": [trial["value"] for trial in outcome.trials],
        "trial_seconds": statistics.median(
            trial["seconds"] for trial in outcome.trials if trial["state"] == "complete"
        ),
    }


def trial_cost(arguments: argparse.Namespace, text: Texts) -> None:
    """CPU seconds of a whole trial and of one evaluation, the least of three of each."""
    model, settings = (
        load_model(arguments.model),
        make_settings(method="ada-pruner", calibration=text.of("pool")),
    )
    anatomy, space = find_anatomy(model), make_space(settings, text.how, {})
    samples = Samples(model, anatomy, text.tokenizer, settings, text.how)
    target = resolve_target(anatomy, arguments.sparsity[0], None)
    bench = Bench(
        model, text.tokenizer, anatomy, target, settings, text.how,
        space=space, samples=samples, validation=text.validation,
    )  # fmt: skip
    values = {f"group {i}": 0.5 for i in range(text.how.groups)}
    pool = _cpu_seconds(lambda draw: bench.settings_of({**values, "draw": draw}), times=1)

    def trial(draw: int) -> None:
        list(bench.values_of(bench.settings_of({**values, "draw": draw}), target))

    found = {
        "pool": pool,
        "evaluation": _cpu_seconds(lambda draw: text.validation.measure(model)),
        "trial": _cpu_seconds(trial),
    }
    found["ratio"] = round(found["trial"] / found["evaluation"], 2)
    print(found, flush=True)
    stored = read(arguments.json)
    stored["cost"] = {"validation_windows": arguments.validation_windows, **found}
    arguments.json.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _cpu_seconds(run: Any, times: int = 3) -> float:
    taken = []
    for i in range(times):
        began = time.process_time()
        run(i)
        taken.append(time.process_time() - began)
    return round(min(taken), 3)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cells": {}}


def print_table(cells: dict[str, Any], model: str, sparsity: float) -> None:
    """Mean and standard deviation over seeds of every row, on both texts."""
    print(f"\n{model} at {sparsity:.0%}\n")
    print("| | validation | held out | seeds | CPU seconds |\n| --- | --- | --- | --- | --- |")
    rows = [("0", "dense"), *((str(sparsity), name) for name in [*RUNS, *SEARCHES])]
    for size, name in rows:
        found = [cell for key, cell in cells.items() if key.startswith(f"{model}|{size}|{name}|")]
        if found:
            validation, heldout = (_spread(found, text) for text in ("validation", "heldout"))
            cost = statistics.mean(cell["cpu_seconds"] for cell in found)
            print(f"| {name} | {validation} | {heldout} | {len(found)} | {cost:.0f} |")


def draw(cells: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The best value so far over trials, of the search and of chance, a thin line per seed."""
    model, sizes = Path(arguments.model).name, arguments.sparsity
    figure, axes = make_figure(7, 2.7 * len(sizes), len(sizes))
    for axis, sparsity in zip(axes, sizes, strict=True):
        for name, color in (("joint", AFTER), ("random search", ACCENT)):
            start = f"{model}|{sparsity}|{name}|"
            runs = [_best_so_far(v["trials"]) for k, v in cells.items() if k.startswith(start)]
            for run in runs:
                axis.plot(run, color=color, linewidth=0.7, alpha=0.6)
            mean = [statistics.mean(values) for values in zip(*runs, strict=False)]
            axis.plot(mean, color=color, label="TPE" if name == "joint" else name)
        axis.set_title(f"{sparsity:.0%}", loc="left", fontsize=11)
        axis.set_ylabel("perplexity, validation")
        axis.legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("trial")
    save_figure(figure, arguments.picture)


def _best_so_far(values: list[float | None]) -> list[float]:
    """Of trials that were stopped early, None, only the number counts."""
    return [
        min((v for v in values[: i + 1] if v is not None), default=math.nan)
        for i in range(len(values))
    ]


def _spread(cells: list[dict[str, Any]], text: str) -> str:
    values = [cell[text] for cell in cells]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def split_texts(sources: list[Path], place: Path, number: int = 1000) -> None:
    """Write pool, validation and held-out text of each source's documents, none in two of them.

    Every third document is for validation, every third held out, so that the two are alike. What
    the pool would share with them is left out.
    """
    (place / "pool").mkdir(parents=True)
    parts: dict[str, list[str]] = {"validation": [], "heldout": []}
    for source in sources:
        documents = [text for text in evaluation_texts(str(source)) if len(text) > 400]
        documents = [text[:LONGEST] for text in documents[:number]]  # no source outweighs others
        for i, name in enumerate(parts):
            parts[name] += documents[i::3]
        overlap = Overlap(parts["validation"] + parts["heldout"])
        pool = [text for text in documents[2::3] if not overlap.contains(text)]
        _write(place / "pool" / f"{source.stem}.jsonl", pool)
    for name, texts in parts.items():
        _write(place / f"{name}.jsonl", texts)


def _write(file: Path, texts: list[str]) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
