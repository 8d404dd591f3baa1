"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .. import __version__
from ..figures import duration, figure
from . import charts
from .facts import Extras, FactRow, Facts, facts_of
from .found import FoundSettings, read_found
from .record import StoredRun
from .series import (
    DARK,
    IMPORTANCE_TITLE,
    LESS,
    LIGHT,
    MORE,
    TOKENS_TITLE,
    TRAINING_TITLE,
    columns_of,
    importance_of,
    training_of,
)

GENERATOR = f"adapt-pruner {__version__}"
MARK = '<meta name="generator" content="adapt-pruner'
"""By which a page of ours is known, so that only such a page is replaced without being asked."""
CHARTS = ("budget", "neurons", "groups", "training", "importance", "loss")


HEADLINE = ("parameters", "perplexity", "decode tokens/s", "weights", "KV cache per token")
"""Figures that the page shows large at its top: the first four of these that the run has."""


@dataclass
class Section:
    """What the template shows of one run."""

    id: str
    run: StoredRun
    facts: Facts
    heading: str
    headline: list[FactRow]
    charts: dict[str, Markup | None]
    extras: Extras
    found: FoundSettings | None
    """How a search found the run's settings, if one did."""


def render(runs: Sequence[StoredRun], extras: Sequence[Extras] = ()) -> str:
    """Return the page of one run, or of several with a comparison at its top.

    Args:
        extras: for each run what is made together with the page; default: nothing.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adapt_pruner.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(figure=figure, duration=duration, quoted=shlex.quote, code=_code)
    extras = extras or [Extras() for _ in runs]
    sections = [
        _section(run, f"run{i}", more)
        for i, (run, more) in enumerate(zip(runs, extras, strict=True), 1)
    ]
    return environment.get_template("page.html.jinja").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} pruned models",
        sections=sections,
        generator=GENERATOR,
        colors={"light": LIGHT, "dark": DARK},
        titles={
            "training": TRAINING_TITLE,
            "importance": IMPORTANCE_TITLE,
            "least": LESS,
            "most": MORE,
        },
        overview=_overview(sections),
    )


def _code(sentence: str) -> Markup:
    """A sentence as HTML, with what stands between backticks as code."""
    parts = sentence.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )


def _section(run: StoredRun, id: str, extras: Extras) -> Section:
    facts = facts_of(run, extras)
    measured = bool(run.record.measurements or extras.scores)
    parts = ["size", *["quality"] * measured, *["speed"] * bool(extras.speed)]
    return Section(
        id=id,
        run=run,
        facts=facts,
        heading=", ".join(parts).capitalize(),
        headline=[row for name in HEADLINE for row in facts.rows if row.name == name][:4],
        charts=_charts(run, id, facts) if run.record.steps else {},
        extras=extras,
        found=read_found(run.directory, id),
    )


def _charts(run: StoredRun, id: str, facts: Facts) -> dict[str, Markup | None]:
    record = run.record
    drawn: dict[str, Markup | None] = dict.fromkeys(CHARTS)
    units = columns_of(record.widths_before, record.widths_after)
    if neurons := units.get("intermediate_size"):
        drawn["neurons"] = charts.columns(f"{id}-neurons", neurons)
    if run.kept_groups:
        count = len(record.widths_before)
        drawn["groups"] = charts.dots(
            f"{id}-groups", "KV groups of each layer, kept and cut", run.kept_groups, count
        )
    if facts.parts:
        drawn["budget"] = charts.stack(
            f"{id}-budget",
            "Parameters by part, before and after",
            [
                (label, [(part["label"], part["parameters"][i]) for part in facts.parts])
                for i, label in enumerate(("before", "after"))
            ],
        )
    if importance := importance_of(record.steps):
        drawn["importance"] = charts.heat_map(f"{id}-importance", IMPORTANCE_TITLE, importance)
    sizes = [record.before.total, *(step.parameters for step in record.steps)]
    losses = [(size, step.loss) for size, step in zip(sizes, record.steps, strict=False)]
    if len(losses) > 2 and all(loss > 0 for _, loss in losses):
        drawn["loss"] = charts.line(
            f"{id}-loss", "Calibration loss over size", "parameters", losses,
            dotted=len(losses) <= 30, reverse=True,
        )  # fmt: skip
    if len(run.training) > 1:
        curve = training_of(run.training, run.phases)
        drawn["training"] = charts.line(
            f"{id}-training",
            TRAINING_TITLE,
            TOKENS_TITLE,
            curve.points,
            curve.cuts,
            smooth=curve.means,
        )
    return drawn


def _overview(sections: Sequence[Section]) -> Markup | None:
    """Quality over size of several runs, where they were measured on the same text alike."""
    measured = [s for s in sections if "perplexity" in s.run.record.measurements]
    protocols = {s.facts.protocol for s in measured}
    if len(measured) < 2 or len(protocols) > 1:
        return None
    points = {}
    for section in measured:
        record = section.run.record
        pair = record.measurements["perplexity"]
        points[section.id] = charts.Point(
            record.after.total, pair["after"], section.run.name, strong=True
        )
        points[section.facts.source, record.before.total] = charts.Point(
            record.before.total, pair["before"], section.facts.source
        )
    said = "; ".join(f"{p.label}: {p.x:,.0f} parameters, {figure(p.y)}" for p in points.values())
    return charts.scatter(
        "overview", "Perplexity over parameters", "parameters", list(points.values()), said,
        is_log=True,
    )  # fmt: skip
