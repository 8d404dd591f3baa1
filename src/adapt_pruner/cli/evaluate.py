"""`adapt-pruner evaluate`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Interrupted
from ..settings import EvaluationSettings, make_evaluation_settings
from .options import check_before, options_of

if TYPE_CHECKING:
    from ..evaluation import Evaluation, Score


@click.command("evaluate")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--suite", multiple=True, metavar="NAME",
    help="Benchmarks of the papers: commonsense, knowledge, perplexity.",
)  # fmt: skip
@click.option("--tasks", multiple=True, metavar="A,B", help="Tasks or groups of lm-eval.")
@click.option(
    "--task-data", multiple=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Directory with the tasks' data, such as arc_easy.test.jsonl; default: the hub.",
)  # fmt: skip
@click.option(
    "--text", multiple=True, metavar="TEXT",
    help="Measure token perplexity and bits per byte: file, directory, hub data set or 'pydocs'.",
)  # fmt: skip
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all results to FILE.")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path), metavar="DIR",
    help="Where results are kept; default: the user's cache, or $ADAPT_PRUNER_CACHE.",
)  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
@options_of(EvaluationSettings)
def command(
    models: tuple[str, ...],
    file: Path | None,
    cache_dir: Path | None,
    trust_remote_code: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure MODELs, dense or pruned, with lm-eval's benchmarks and perplexity on texts.

    \b
    adapt-pruner evaluate meta-llama/Llama-3.2-1B smaller --suite commonsense
    adapt-pruner evaluate smaller --tasks arc_easy,piqa --task-data ./data
    adapt-pruner evaluate smaller --text heldout.txt --window 1024 --stride 512

    Metric and shots of the suites are those of arXiv:2502.03460, table 6. Every result is kept, and
    not measured again while model, data, settings and versions stay the same.
    """
    asked = {name: options.pop(name) for name in ("suite", "tasks", "task_data", "text")}
    if not (asked["suite"] or asked["tasks"] or asked["text"]):
        raise click.UsageError("Name what to measure: --suite, --tasks or --text.")
    from ..evaluation import ResultStore, evaluate
    from ..files import write_json_atomically
    from . import console

    console.hush_libraries()
    chosen = make_evaluation_settings(**{k: v for k, v in options.items() if v is not None})
    check_before(models, file, trust_remote_code)
    found: list[Evaluation] = []
    try:
        with console.TaskBar(quiet) as bar:
            for model in models:
                bar.prefix = f"{Path(model).name} · " if len(models) > 1 else ""
                one = evaluate(
                    model,
                    settings=chosen,
                    store=ResultStore(cache_dir),
                    listener=bar,
                    trust_remote_code=trust_remote_code,
                    **asked,
                )
                found.append(one)
    except KeyboardInterrupt:
        message = "Interrupted. What was measured is kept; the same command goes on from there."
        raise Interrupted(message) from None
    if file is not None:
        write_json_atomically(file, {"format": 1, "models": [one.as_dict() for one in found]})
    show(found)


def show(found: list[Evaluation]) -> None:
    """One row per figure, one column per model."""
    from rich.table import Table

    from . import console

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("metric")
    table.add_column("shots", justify="right")
    for one in found:
        table.add_column(Path(one.model).name, justify="right", overflow="fold")
    table.add_row("parameters", "", "", *(f"{one.parameters:,}" for one in found))
    for scores in zip(*(one.scores for one in found), strict=True):
        first = scores[0]
        shots = "" if first.num_fewshot is None else str(first.num_fewshot)
        table.add_row(first.name, first.metric, shots, *map(_figure, scores))
    console.out.print(table)
    console.out.print(_conditions(found), style="dim", soft_wrap=True)


def _figure(score: Score) -> str:
    if "perplexity" in score.metric or "bits_per" in score.metric:
        factor, form = 1, ",.4g" if score.value >= 1000 else ".3f"
    else:
        factor, form = 100, ".2f"
    error = "" if score.stderr is None else f" ±{format(factor * score.stderr, form)}"
    return f"{format(factor * score.value, form)}{error}"


def _conditions(found: list[Evaluation]) -> str:
    """What the figures hold for, in a few words."""
    first = found[0]
    key = first.records[0].key
    facts = ["accuracies in %, ± standard error"]
    if any(record.key["kind"] == "lm-eval" for record in first.records):
        facts.append(f"lm-eval {key['versions'].get('lm-eval', '')}".strip())
    facts += [", ".join(sorted({one.records[0].key["dtype"] for one in found})), key["device"]]
    facts += [
        f"{record.result['source']}: windows of {record.key['window']} tokens, stride "
        f"{record.key['stride']}"
        for record in first.records
        if record.key["kind"] == "text"
    ]
    if first.settings.limit:
        facts.append(f"only --limit {first.settings.limit:g}: for trying out, not for reporting")
    tokenizers = {one.records[0].key["model"].get("tokenizer", one.model) for one in found}
    if len(tokenizers) > 1:
        facts.append("tokenizers differ: compare bits per byte or words, not token perplexity")
    cached, count = sum(o.num_cached for o in found), sum(len(o.records) for o in found)
    if cached:
        facts.append(f"{cached} of {count} results were measured before")
    return "; ".join(facts)
