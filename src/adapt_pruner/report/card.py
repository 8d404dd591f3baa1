"""The model card: README.md in the hub's form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..export.engines import Serving
from ..markup import fenced, markdown
from .account import REPORT_FILE
from .facts import Facts, facts_of
from .record import StoredRun

PAPER = "https://arxiv.org/abs/2502.03460"
METRICS = {"perplexity": "perplexity", "bits per byte": "bits_per_byte"}
"""What a run measures -> its name as a metric on the hub."""


def model_card(run: StoredRun, drawn: Mapping[str, str]) -> str:
    """Return a model card in the hub's form. `drawn` maps picture files to their descriptions."""
    facts = facts_of(run)
    body = [
        f"# {markdown(run.name)}",
        "",
        f"Made smaller by structured pruning with [adapt-pruner]({PAPER}). "
        + markdown(" ".join(facts.sentences)),
        "",
        *_sizes(facts),
        *_loading(facts),
        *_serving(facts),
        "## What was cut",
        "",
        *_parts(facts),
        *([facts.extremes, ""] if facts.extremes else []),
        *(line for file, text in drawn.items() for line in (f"![{text}](pictures/{file})", "")),
        *_files(run),
    ]
    return "\n".join([f"---\n{_front_matter(run)}\n---\n", *body])


def _sizes(facts: Facts) -> Iterator[str]:
    yield "| | before | after | change |"
    yield "| --- | --- | --- | --- |"
    for row in facts.rows:
        name = f"{row.name} ({row.note})" if row.note else row.name
        yield f"| {markdown(name)} | {row.before} | {row.after} | {row.change} |"
    yield ""
    if facts.protocol:
        yield from (markdown(facts.protocol), "")


def _loading(facts: Facts) -> Iterator[str]:
    yield from ("## Load", "", fenced(facts.loading, "python"), "")
    for sentence in facts.loading_notes:
        yield from (sentence, "")


def _serving(facts: Facts) -> Iterator[str]:
    yield from ("## Serve", "")
    for one in facts.servings:
        yield f"**{one.engine}**{_said(one)}"
        yield ""
        if one.command:
            yield from (fenced(one.command, "bash"), "")
    for sentence in facts.limits:
        yield f"- {sentence}"
    if facts.limits:
        yield ""


def _said(one: Serving) -> str:
    return f": {one.note}" if one.note else ""


def _parts(facts: Facts) -> Iterator[str]:
    if not facts.parts:
        return
    yield "| parameters | before | after | of the cut |"
    yield "| --- | --- | --- | --- |"
    for part in facts.parts:
        before, after = part["parameters"]
        yield f"| {part['label']} | {before:,} | {after:,} | {part['share_of_cut']} |"
    yield ""


def _files(run: StoredRun) -> Iterator[str]:
    yield from ("## What is here", "", "| file | content |", "| --- | --- |")
    yield "| `config.json`, `*.safetensors`, tokenizer | the model, for transformers |"
    if run.is_portable:
        yield "| `modeling_pruned.py` | what readers need who do not have adapt-pruner |"
    yield f"| `{REPORT_FILE}` | all of this with charts, in one page for a browser |"
    yield "| `pruning.json` | which units stayed, as indices into the original model |"
    again = f"{run.record.command} -o DIR --recipe recipe.yaml"
    yield f"| `recipe.yaml` | repeats this run: `{again}` |"
    yield "| `run.json` | settings, every step in figures, versions |"
    yield ""


def _front_matter(run: StoredRun) -> str:
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
