"""Perplexity of exported files in llama.cpp, beside the same model in transformers.

    python benchmarks/gguf_quality.py MODEL... --text FILE --json FILE [--types F16,Q8_0,Q4_K_M]
        [--window 256] [--windows 20] [--picture FILE]

A MODEL is NAME=DIRECTORY, or a directory. The documents are joined and cut into windows; every
token of a window but the first is predicted. llama.cpp runs as its users run it (keys and values
in float16, fused attention), on one thread. Cells that the JSON file holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import transformers

from adapt_pruner import export_gguf, load_model, load_tokenizer
from adapt_pruner.evaluation import evaluation_texts
from adapt_pruner.evaluation.fingerprint import versions
from adapt_pruner.files import write_json_atomically

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from llama_cpp import LlamaCpp

REFERENCE = "transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--text", required=True)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--types", default="F16,Q8_0,Q4_K_M")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="SVG of perplexity over bytes")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    settings = {
        "text": Path(arguments.text).name,
        "window": arguments.window,
        "windows": arguments.windows,
    }
    cells = _stored(arguments.json)
    for named in arguments.models:
        name, _, directory = named.rpartition("=")
        name = name or Path(directory).name
        windows: list[list[int]] = []
        for kind in (REFERENCE, *arguments.types.split(",")):
            if any(c["model"] == name and c["type"] == kind and _same(c, settings) for c in cells):
                continue
            windows = windows or _windows(directory, arguments)
            start = time.perf_counter()
            cell = {"model": name, "type": kind, **settings, **_measure(directory, kind, windows)}
            cells.append({**cell, "seconds": round(time.perf_counter() - start, 1)})
            write_json_atomically(
                arguments.json, {"format": 1, "versions": versions("gguf", "xllamacpp", "libgguf"),
                                 "cells": cells},
            )  # fmt: skip
    shown = [cell for cell in cells if _same(cell, settings)]
    show(shown)
    if arguments.picture:
        draw(arguments.picture, shown)


def _stored(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8"))["cells"] if file.is_file() else []


def _same(cell: dict, settings: dict) -> bool:
    return all(cell[key] == value for key, value in settings.items())


def _windows(directory: str, arguments: argparse.Namespace) -> list[list[int]]:
    tokenizer = load_tokenizer(directory)
    length, most = arguments.window, arguments.windows
    ids: list[int] = []
    for text in evaluation_texts(arguments.text, arguments.text_column):
        ids += tokenizer(text).input_ids
        if len(ids) >= length * most:
            break
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][:most]


def _measure(directory: str, kind: str, windows: list[list[int]]) -> dict:
    if kind == REFERENCE:
        model = load_model(directory, "float32", prunable=False)

        def logits(tokens: list[int]) -> torch.Tensor:
            with torch.no_grad():
                return model(torch.tensor([tokens])).logits[0]

        return {"perplexity": _perplexity(logits, windows), "bytes": None}
    with tempfile.TemporaryDirectory() as place:
        exported = export_gguf(directory, Path(place) / "model.gguf", kind)
        with LlamaCpp(exported.file, context=len(windows[0]), exact=False) as engine:
            found = _perplexity(lambda tokens: torch.from_numpy(engine.logits(tokens)), windows)
    return {
        "perplexity": found,
        "bytes": exported.num_bytes,
        "architecture": exported.architecture,
        "tensors": exported.num_tensors,
    }


def _perplexity(logits, windows: list[list[int]]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(
            logits(tokens)[:-1].double(), torch.tensor(tokens[1:]), reduction="none"
        )
        for tokens in windows
    ]
    return float(np.exp(np.mean(list(chain.from_iterable(loss.tolist() for loss in losses)))))


def show(cells: list[dict]) -> None:
    """A row per model and type: bytes, perplexity, and its distance from transformers."""
    reference = {c["model"]: c["perplexity"] for c in cells if c["type"] == REFERENCE}
    for cell in cells:
        change = cell["perplexity"] / reference[cell["model"]] - 1
        size = f"{cell['bytes'] / 1e6:9.2f} MB" if cell["bytes"] else " " * 12
        print(
            f"{cell['model']:<16}{cell['type']:<13}{size}{cell['perplexity']:10.4f}  {change:+.3%}"
        )


def draw(file: Path, cells: list[dict]) -> None:
    """A line per model: perplexity over the size of its files."""
    from adapt_pruner.comparison.picture import style_of
    from adapt_pruner.report.pictures import make_figure

    figure, axes = make_figure(7.5, 4.2, 1)
    axis = np.ravel(axes)[0]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    for number, name in enumerate(models):
        points = sorted(
            (cell["bytes"] / 1e6, cell["perplexity"], cell["type"])
            for cell in cells
            if cell["model"] == name and cell["bytes"]
        )
        sizes, values = [size for size, _, _ in points], [value for _, value, _ in points]
        axis.plot(sizes, values, label=name, **style_of(number))
        for size, value, kind in points:
            axis.annotate(
                kind, (size, value), textcoords="offset points", xytext=(4, 5), fontsize=7
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter("{x:g}")
    axis.set_xlabel("size of the file, MB")
    axis.set_ylabel("perplexity")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
