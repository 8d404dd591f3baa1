"""What the user sees during a run, and at its end."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..api import Listener
from ..comparison import ComparisonListener
from ..evaluation import EvaluationListener
from ..figures import in_bytes as in_bytes
from ..figures import short as short
from ..figures import steps_of
from ..recovery.request import AccelListener

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..comparison.cells import Cell, CellResult, Comparison
    from ..comparison.table import Tables
    from ..methods import PruningStep
    from ..model.anatomy import Anatomy
    from ..plan import Plan
    from ..recovery.estimate import AccelPlan
    from ..recovery.schedule import Phase
    from ..result import PruningResult

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def hush_libraries() -> None:
    """Keep the libraries' own bars and notices out of the program's output."""
    import datasets
    import huggingface_hub
    import transformers
    from transformers import modeling_gguf_pytorch_utils as gguf_reader

    # Set explicitly, so that tokenizers do not warn of forks: no fork of this program tokenises.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    logging.getLogger("fsspec").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    reader: Any = gguf_reader
    reader.tqdm = functools.partial(reader.tqdm, disable=True)  # it has its own bar


def _progress(quiet: bool, *columns: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=quiet or not err.is_interactive,  # into a file it would write a blank line
        transient=True,
    )


class ProgressBar(Listener):
    """A live bar: how much of the way to the target is done. Use as a context manager."""

    def __init__(self, quiet: bool):
        self.bar = _progress(quiet, TextColumn("{task.percentage:>3.0f}%"))
        self.task = self.bar.add_task("loading", total=None)
        self.start = self.now = self.target = self.steps = 0
        self.limits = "parameters"
        self.share_of_step = 0.1

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *exc) -> None:
        self.bar.stop()

    def on_start(self, anatomy: Anatomy, target: int) -> None:
        self.start = self.now = anatomy.amount
        self.target, self.limits = target, anatomy.resource.name
        self.bar.update(self.task, total=1.0, completed=0.0, description=self._description())

    def on_progress(self, share: float) -> None:
        self.bar.update(self.task, completed=self._done() + share * self.share_of_step)

    def on_step(self, step: PruningStep) -> None:
        before, self.now = self._done(), step.anatomy.amount
        self.steps = step.step
        self.share_of_step = min(self._done() - before, 1 - self._done())
        self.bar.update(self.task, completed=self._done(), description=self._description())

    def _done(self) -> float:
        return (self.start - self.now) / max(self.start - self.target, 1)

    def _description(self) -> str:
        return f"step {self.steps + 1} · {short(self.now)} → {short(self.target)} {self.limits}"


class TaskBar(EvaluationListener):
    """A live bar: which task is measured, and how much of it is done."""

    def __init__(self, quiet: bool):
        self.bar = _progress(quiet, MofNCompleteColumn())
        self.task = self.bar.add_task("loading", total=None)
        self.prefix = ""

    def __enter__(self) -> TaskBar:
        self.bar.start()
        return self

    def __exit__(self, *exc) -> None:
        self.bar.stop()

    def on_task(self, name: str, number: int, count: int) -> None:
        of = f" ({number + 1} of {count})" if count > 1 else ""
        self.bar.reset(self.task, description=f"{self.prefix}{name}{of}")
        self.bar.tasks[self.task].total = None  # not known yet; `reset` would keep the last one

    def on_progress(self, done: int, total: int | None) -> None:
        self.bar.update(self.task, completed=done, total=total)

    def on_notice(self, message: str) -> None:
        err.print(message, soft_wrap=True)


class ComparisonView(ComparisonListener):
    """The table of a comparison as it fills; a line per model where there is no terminal."""

    def __init__(self, quiet: bool):
        self.quiet, self.interactive = quiet, err.is_interactive and not quiet
        self.live = Live(console=err, transient=True, auto_refresh=self.interactive)
        self.done = self.count = 0
        self.table: Any = ""
        self.on_change: Callable[[Comparison], None] = lambda comparison: None

    def __enter__(self) -> ComparisonView:
        if self.interactive:
            self.live.start()
            self.live.update("measuring the dense model")
        return self

    def __exit__(self, *exc) -> None:
        self.live.stop()

    def on_dense(self, comparison: Comparison) -> None:
        self.on_change(comparison)  # by its file the same command knows that it may go on here

    def on_cell(self, cell: Cell, number: int, count: int) -> None:
        self.count = count
        if self.interactive:
            self.live.update(Group(self.table, f"{number} of {count}: {cell}"))

    def on_result(self, comparison: Comparison, result: CellResult) -> None:
        from ..comparison.table import Tables

        self.done += 1
        self.on_change(comparison)
        tables = Tables(comparison)
        self.table = comparison_table(tables)
        if not self.quiet and not self.interactive:
            found = [(metric, metric.find(result.scores)) for metric in tables.shown]
            said = ", ".join(f"{tables.label(m)} {m.written(s.value)}" for m, s in found if s)
            how = "from the cache" if result.was_cached else f"{result.seconds:.1f} s"
            err.print(
                f"{self.done} of {self.count}: {result.cell}: {said or result.error} ({how})",
                soft_wrap=True, markup=False,
            )  # fmt: skip


def comparison_table(tables: Tables) -> Table:
    """The summary of a comparison."""
    heads, rows = tables.grid()
    table = Table(box=None, pad_edge=False)
    table.add_column(heads[0])
    for head in heads[1:]:
        table.add_column(head, justify="right", overflow="fold")
    for name, figures in rows:
        texts = [figure.text.replace(" ± ", "±") for figure in figures]
        styles = ["bold" if figure.is_best else "" for figure in figures]
        cells = [Text(*cell) for cell in zip(texts, styles, strict=True)]
        table.add_row(Text(name), *cells)
    return table


def show_result(result: PruningResult) -> None:
    """The final table: both sizes, before and after, and what was measured."""
    before, after = result.before, result.after
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("change", justify="right")

    def row(name: str, old: float, new: float, form: str) -> None:
        change = f"{(new - old) / old:+.2%}" if old else ""
        table.add_row(name, format(old, form), format(new, form), change)

    row("parameters", before.total, after.total, ",")
    row("  decoder layers", before.decoder_layers, after.decoder_layers, ",")
    row("  embeddings and others", before.other, after.other, ",")
    for name, pair in result.measurements.items():
        row(name, pair["before"], pair["after"], ",.4g" if pair["before"] > 1000 else ".3f")
    out.print(table)
    gap = result.target - result.reached
    out.print(
        f"target {result.resource.written(result.target)}, met with {gap:,} to spare; sparsity of "
        f"the decoder layers {result.sparsity:.4f}; {steps_of(len(result.steps))} in "
        f"{result.seconds:.1f} s",
        soft_wrap=True,
    )


def show_plan(plan: Plan) -> None:
    """The plan of a dry run."""
    out.print(
        f"{plan.before.total:,} parameters ({plan.before.decoder_layers:,} in the decoder layers) "
        + (f"→ at most {plan.target:,} (sparsity {plan.sparsity:.4f})" if plan.sparsity is not None
           else f"of {plan.amount_before:,} {plan.resource.name} → at most {plan.target:,}"),
        soft_wrap=True,
    )  # fmt: skip
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column(plan.resource.name, justify="right")
    for i, size in enumerate(plan.amount_after_step, 1):
        table.add_row(str(i), f"{size:,}")
    out.print(table)
    memory = Table(box=None, pad_edge=False)
    memory.add_column("memory (estimate)")
    memory.add_column("MB", justify="right")
    for part, size in plan.memory_bytes.items():
        memory.add_row(part, f"{size / 1e6:,.1f}")
    memory.add_row("peak", f"{sum(plan.memory_bytes.values()) / 1e6:,.1f}")
    out.print(memory)
    minutes, seconds = divmod(round(plan.seconds), 60)
    out.print(f"time (estimate for this machine): {minutes} min {seconds} s")


class TrainingProgress(AccelListener):
    """A live bar over all tokens of a run, and a line per finished phase. Shown by the first of
    several processes. Use as a context manager."""

    def __init__(self, quiet: bool):
        first = os.environ.get("RANK", "0") == "0"
        self.is_shown, self.pruning = first and not quiet, Listener()
        self.bar = _progress(not self.is_shown, TextColumn("{task.percentage:>3.0f}%"))
        self.task = self.bar.add_task("", total=None)
        self.phase, self.phases = 0, 0

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *exc) -> None:
        self.bar.stop()

    def on_prepare(self, what: str) -> None:
        self.bar.update(self.task, description=what)

    def on_data(self, lines: list[str]) -> None:
        if self.is_shown:
            for line in lines:
                err.print(line, soft_wrap=True)

    def on_phase(self, phase: Phase, phases: tuple[Phase, ...]) -> None:
        self.phase, self.phases = phase.number, len(phases)
        where, size = f"phase {phase.number}/{len(phases)}", short(phase.parameters)
        self.bar.update(self.task, description=f"{where} · cutting to {size} parameters")

    def on_step(self, record: dict[str, Any], total_tokens: int) -> None:
        self.bar.update(
            self.task,
            total=total_tokens,
            completed=record["tokens"],
            description=f"phase {self.phase}/{self.phases} · {short(record['tokens'])} of "
            f"{short(total_tokens)} tokens · loss {record['loss']:.3f} · "
            f"{record['tokens_per_second']:,.0f} tokens/s",
        )

    def on_phase_end(self, record: dict[str, Any]) -> None:
        if self.is_shown:
            found = record["evaluation"] or {}
            measured = "".join(f" · {name} {value:.3f}" for name, value in found.items())
            err.print(
                f"phase {record['phase']}/{self.phases} · {record['parameters']:,} parameters · "
                f"{short(record['tokens_before'] + record['tokens'])} tokens{measured}",
                soft_wrap=True,
            )


def show_accel_plan(plan: AccelPlan) -> None:
    """The plan of a dry run of accel."""
    out.print(
        f"{plan.before.total:,} parameters → at most {plan.resource.written(plan.target)} in "
        f"{len(plan.phases)} phases; {plan.tokens:,} tokens in steps of {plan.tokens_per_step:,}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    columns = ("phase", "parameters", "tokens", "steps", "learning rate", "FLOPs", "GB/GPU")
    for name in columns:
        table.add_column(name, justify="right")
    for planned in plan.phases:
        first, last = planned.learning_rates
        cells = (
            str(planned.phase.number),
            f"{planned.phase.parameters:,}",
            f"{planned.tokens:,}",
            f"{planned.phase.steps:,}",
            f"{first:.1e} → {last:.1e}",
            f"{planned.flops:.2e}",
            f"{planned.memory_bytes / 1e9:.2f}",
        )
        table.add_row(*cells)
    out.print(table)
    for title, parts in (
        ("while training", plan.memory_bytes),
        ("at a cut", plan.pruning_bytes),
    ):
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        out.print(
            f"memory per device {title} (estimate, GB): {sum(parts.values()) / 1e9:.2f} = {listed}",
            soft_wrap=True,
        )
    if plan.disk_bytes:
        out.print(f"disk for the teacher's stored logits: {plan.disk_bytes / 1e9:.3g} GB")
    out.print(
        f"{plan.flops:.3g} FLOPs of training: about {plan.gpu_hours:,.2f} GPU-hours, "
        f"{plan.gpu_hours / plan.gpus:,.2f} h on {plan.gpus}",
        soft_wrap=True,
    )
