"""Write what happened beside the result: for machines (run.json) and people (README.md)."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pictures

if TYPE_CHECKING:
    from ..result import PruningResult
    from .record import Run

PAPER = "https://arxiv.org/abs/2502.03460"
REPORT_FILE = "report.html"
PACKAGES = ("adapt-pruner", "torch", "transformers", "datasets", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "unknown"
    return found


def run_record(result: PruningResult) -> dict[str, Any]:
    """Everything about a run in one JSON-compatible object."""
    source = getattr(result.model.config, "_name_or_path", "")
    return {
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source_model": source or None,
        "base_model": _hub_name(source),
        "target_parameters": result.target,
        "before": asdict(result.before),
        "after": asdict(result.after),
        "sparsity": result.sparsity,
        "settings": result.settings.model_dump(mode="json"),
        "widths_before": result.widths_before,
        "widths_after": result.widths_after,
        "layers_left": result.layers,
        "steps": [asdict(step) for step in result.steps],
        "seconds": result.seconds,
        "measurements": result.measurements,
        "protocol": result.protocol or None,
        **({"training": result.training} if result.training else {}),
        "versions": versions(),
    }


def _hub_name(source: str) -> str | None:
    return source if source.count("/") == 1 and not Path(source).exists() else None


def write_account(directory: Path, name: str, result: PruningResult) -> None:
    """Write run.json, README.md, report.html and pictures/ beside the other files of a run."""
    from ..files import write_json
    from .record import RUN_FILE, read_run

    write_json(directory / RUN_FILE, run_record(result))
    drawn = pictures.draw_all(directory / "pictures", result)
    run = read_run(directory, name)
    (directory / "README.md").write_text(model_card(run, drawn), encoding="utf-8")
    write_page(directory, name)


def write_page(directory: Path, name: str | None = None) -> None:
    """Write report.html from what the directory of a run holds."""
    from .page import render
    from .record import read_run

    page = render([read_run(directory, name)])
    (directory / REPORT_FILE).write_text(page, encoding="utf-8")


def model_card(run: Run, drawn: Mapping[str, str]) -> str:
    """Return a model card in the hub's form. `drawn` maps picture files to their descriptions."""
    from .facts import facts_of

    facts = facts_of(run)
    rows = [
        f"| {row.name}{f' ({row.note})' * bool(row.note)} | {row.before} | {row.after} "
        f"| {row.change} |"
        for row in facts.rows
    ]
    parts = [
        f"| {part['label']} | {part['parameters'][0]:,} | {part['parameters'][1]:,} "
        f"| {part['share_of_cut']} |"
        for part in facts.parts
    ]
    body = [
        f"# {run.name}",
        "",
        f"Made smaller by structured pruning with [adapt-pruner]({PAPER}). "
        + " ".join(facts.sentences),
        "",
        "| | before | after | change |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        *([facts.protocol, ""] if facts.protocol else []),
        "## Load and serve",
        "",
        "```python",
        facts.loading,
        "```",
        "",
        "```bash",
        facts.serving,
        "```",
        "",
        "## What was cut",
        "",
        *(
            ["| parameters | before | after | of the cut |", "| --- | --- | --- | --- |"]
            if parts
            else []
        ),
        *parts,
        "",
        *([facts.extremes, ""] if facts.extremes else []),
        *(line for file, text in drawn.items() for line in (f"![{text}](pictures/{file})", "")),
        "## What is here",
        "",
        "| file | content |",
        "| --- | --- |",
        "| `config.json`, `*.safetensors`, tokenizer | the model, for transformers |",
        f"| `{REPORT_FILE}` | all of this with charts, in one page for a browser |",
        "| `pruning.json` | which units stayed, as indices into the original model |",
        f"| `recipe.yaml` | repeats this run: `{run.record.command} -o DIR --recipe recipe.yaml` |",
        "| `run.json` | settings, every step in figures, versions |",
        "",
    ]
    return "\n".join([f"---\n{_front_matter(run)}\n---\n", *body])


METRICS = {"perplexity": "perplexity", "bits per byte": "bits_per_byte"}
"""What a run measures -> its name as a metric on the hub."""


def _front_matter(run: Run) -> str:
    """Metadata as the hub reads it, with the measurements as `model-index`."""
    from huggingface_hub import EvalResult, ModelCardData

    record, told = run.record, run.record.protocol
    text = Path(told.text).name if told else "held-out text"
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=text,
            dataset_name=text,
            metric_type=METRICS.get(name, name),
            metric_value=pair["after"],
            metric_name=f"{name} (window {told.window}, stride {told.stride})" if told else name,
        )
        for name, pair in record.measurements.items()
    ]
    based = record.base_model and {
        "base_model": record.base_model,
        "base_model_relation": "finetune",
    }
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "adapt-pruner"],
        **(based or {}),
        **({"model_name": run.name, "eval_results": results} if results else {}),
    ).to_yaml()
