"""`adapt-pruner compare`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Interrupted, InvalidSettings, WritingError
from ..limits import MAX_SEED, Runs
from ..methods import DEFAULT_METHOD, method_named
from ..settings import EvaluationSettings, make_evaluation_settings
from .options import options_of
from .parameters import Names, Number, Numbers

if TYPE_CHECKING:
    from ..comparison import Comparison, ComparisonRequest

MEASURE = ("limit", "num_fewshot", "batch_size", "max_length", "window", "stride")
"""Settings of evaluation that pruning has none of its own for."""
FOR_ALL_METHODS = ("dtype", "device", "device_map", "text_column")


@click.command("compare")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True,
    help="Directory for tables and pictures.",
)  # fmt: skip
@click.option(
    "--methods", type=Names(), metavar="A,B",
    help="Methods, with commas; default: best,paper,uniform,magnitude,random, or all of "
    "--variants.",
)  # fmt: skip
@click.option(
    "--variants", type=click.Path(path_type=Path), metavar="FILE",
    help="YAML file of further methods: names with their settings.",
)  # fmt: skip
@click.option(
    "--vary", multiple=True, metavar="NAME=A,B",
    help="Sweep a setting, such as amplitude=0,0.01,0.02; repeat for a grid.",
)  # fmt: skip
@click.option(
    "--sparsities", type=Numbers(), default="0.2,0.4,0.6", show_default=True, metavar="S,T",
    help="Shares of the decoder layers' parameters to remove.",
)  # fmt: skip
@click.option(
    "--seeds", type=Number(Runs), default=3, show_default=True,
    help="Runs of each method, from --seed on.",
)  # fmt: skip
@click.option(
    "--evaluate", "text", multiple=True, metavar="TEXT",
    help="Measure token perplexity on it: as --calibration.",
)  # fmt: skip
@click.option("--suite", multiple=True, metavar="NAME", help="Measure, as `evaluate` does.")
@click.option("--tasks", multiple=True, metavar="A,B", help="Measure, as `evaluate` does.")
@click.option(
    "--task-data", multiple=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Directory with the tasks' data; default: the hub.",
)  # fmt: skip
@click.option("--save-models", is_flag=True, help="Keep every model, in OUTPUT/models.")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path), metavar="DIR",
    help="Where results are kept; default: the user's cache, or $ADAPT_PRUNER_CACHE.",
)  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the table.")
@options_of(EvaluationSettings, only=MEASURE)
@options_of(method_named(DEFAULT_METHOD).settings, leave_out=("method",))
def command(output: Path, cache_dir: Path | None, quiet: bool, **options: Any) -> None:
    """Prune MODEL by several methods, at several sparsities, with several seeds, and measure all.

    \b
    adapt-pruner compare demo -o runs/demo --evaluate pydocs
    adapt-pruner compare demo -o runs/a --methods paper --vary amplitude=0,0.02 --evaluate pydocs

    Settings given as options hold for all methods. What was measured is kept: the same command
    continues an interrupted comparison, and a larger comparison uses the results of a smaller one.
    """
    from ..claims import claimed
    from ..comparison import compare
    from ..evaluation import ResultStore
    from . import console

    request = _request(output, options)
    _check_output(output, request)
    console.hush_libraries()
    with claimed(output), console.ComparisonView(quiet) as view:
        view.on_change = lambda comparison: write(output, comparison)
        try:
            comparison = compare(request, ResultStore(cache_dir), view)
        except KeyboardInterrupt:
            raise Interrupted(
                f"Interrupted after {view.done} of {view.count} models. Their results are kept; "
                "the same command goes on from there."
            ) from None
        write(output, comparison, pictures=True)
    show(comparison)
    click.echo(f"written to {output}")


def _request(output: Path, options: dict[str, Any]) -> ComparisonRequest:
    """What the options ask for together; those that are left over are settings of pruning."""
    from ..comparison import ComparisonRequest
    from ..comparison.variants import (
        DEFAULT_VARIANTS,
        all_variants,
        make_variants,
        parse_sweep,
        read_methods,
    )
    from ..run import default_calibration

    model, methods, variants = (options.pop(name) for name in ("model", "methods", "variants"))
    vary, seeds, save_models = (options.pop(name) for name in ("vary", "seeds", "save_models"))
    own = read_methods(variants) if variants else {}
    names = methods or tuple(own) or DEFAULT_VARIANTS
    measure = {name: options.pop(name) for name in MEASURE}
    names_asked = ("text", "suite", "tasks", "task_data", "sparsities")
    asked = {name: options.pop(name) for name in names_asked}
    trust = options.pop("trust_remote_code")
    given = {name: value for name, value in options.items() if value is not None}
    first = given.pop("seed", 0)
    if first + seeds - 1 > MAX_SEED:
        raise InvalidSettings(f"seed: {seeds} of them must be at most {MAX_SEED}; got {first}.")
    evaluation = make_evaluation_settings(
        **{name: value for name, value in measure.items() if value is not None},
        **{name: given[name] for name in FOR_ALL_METHODS if name in given},
    )
    return ComparisonRequest(
        model=model,
        variants=make_variants(
            names,
            all_variants(own),
            map(parse_sweep, vary),
            {**default_calibration(model), **given},
        ),
        seeds=range(first, first + seeds),
        evaluation=evaluation,
        save_to=output / "models" if save_models else None,
        trust_remote_code=trust,
        **asked,
    )


def write(output: Path, comparison: Comparison, pictures: bool = False) -> None:
    """Write the results so far."""
    from ..comparison.picture import draw
    from ..comparison.table import Tables
    from ..files import write_atomically, write_json_atomically

    tables = Tables(comparison)
    write_json_atomically(output / "comparison.json", tables.as_dict())
    for suffix, text in (("md", tables.markdown()), ("tex", tables.latex()), ("csv", tables.csv())):
        write_atomically(output / f"comparison.{suffix}", text)
    if pictures:
        draw(output, tables)


def show(comparison: Comparison) -> None:
    """Print the table."""
    from ..comparison.table import Tables
    from . import console

    tables = Tables(comparison)
    console.out.print(console.comparison_table(tables))
    for note in tables.notes():
        console.out.print(note, style="dim", soft_wrap=True, markup=False)


def _check_output(output: Path, request: ComparisonRequest) -> None:
    from ..claims import is_inside
    from ..files import check_file, check_output

    check_output(output, overwrite=True)
    read = [request.model, *request.text, *(v.settings.calibration for v in request.variants)]
    for source in read:
        if request.save_to is not None and is_inside(source, request.save_to):
            raise WritingError(
                f"'{source}' is read by this run and lies in '{request.save_to}', where models are "
                "written. Name another directory to write."
            )
    entries = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    entries = {name for name in entries if not name.startswith(".comparison.")}  # of a killed run
    if entries and "comparison.json" not in entries:
        raise InvalidSettings(
            f"'{output}' is not empty and holds no comparison. Name another directory."
        )
    check_file(output / "comparison.json")
