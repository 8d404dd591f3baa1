"""Charts of the report as inline SVG.

Horizontal places are percentages and vertical ones pixels, so that a chart fills a phone as well as
a wide screen while its text keeps its size. Colours are classes, which the page's style sheet fills
for light and dark screens. Every chart has a title and a description for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

from ..figures import short
from .series import LAYER, NUMBERED, Columns

MANY = 400
"""Points of a line, and cells with a tooltip of their own, at most."""


@dataclass(frozen=True)
class Point:
    """A place in a chart of single points."""

    x: float
    y: float
    label: str
    strong: bool = False


class Chart:
    """A drawing of a given height in pixels. `x` runs from 0 to 100, `y` from the top."""

    def __init__(self, name: str, height: int, title: str, description: str):
        self.height = height
        self.root = ET.Element(
            "svg", {"class": "chart", "width": "100%", "height": str(height), "role": "img"}
        )
        self.root.set("aria-labelledby", f"{name}-title {name}-desc")
        self.add("title", id=f"{name}-title").text = title
        self.add("desc", id=f"{name}-desc").text = description

    def add(self, tag: str, parent: ET.Element | None = None, **attributes: object) -> ET.Element:
        values = {
            name.strip("_").replace("_", "-"): _number(value) for name, value in attributes.items()
        }
        return ET.SubElement(self.root if parent is None else parent, tag, values)

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> ET.Element:
        return self.add(
            "rect", x=_percent(x), y=y, width=_percent(width), height=height, class_=kind
        )

    def text(self, x: float, y: float, text: str, kind: str = "", dx: int = 0) -> None:
        self.add("text", x=_percent(x), y=y, dx=dx, class_=kind).text = text

    def grid(self, ticks: Sequence[float], y_of: Callable[[float], float]) -> None:
        """Horizontal lines with their values at the left, outside of the plot."""
        for tick in ticks:
            y = y_of(tick)
            self.add("line", x1="0", x2="100%", y1=y, y2=y, class_="grid")
            self.text(0, y + 4, short(tick), "tick end", dx=-8)

    def below(self, places: Sequence[tuple[float, str]], title: str) -> None:
        """Labels and title of the horizontal axis."""
        for x, label in places:
            self.text(x, self.height - 24, label, "tick middle")
        self.text(50, self.height - 4, title, "tick middle")

    def markup(self) -> Markup:
        return Markup(ET.tostring(self.root, encoding="unicode"))


def columns(name: str, units: Columns) -> Markup:
    """What each layer had, and has left."""
    layers, plot = units.layers, 150
    count, high = len(units.before), max(old for _, old, _ in layers)
    left = sum(new for *_, new in layers) / max(sum(old for _, old, _ in layers), 1)
    chart = Chart(
        name, 20 + plot + 44, units.title,
        f"Columns for {count} layers. In all {left:.0%} stay; "
        + _extremes([(new / old, i) for i, old, new in layers if old]),
    )  # fmt: skip
    top = 20

    def y_of(value: float) -> float:
        return top + plot * (1 - value / high)

    chart.grid(ticks(0, high, 3), y_of)
    step = 100 / count
    labelled = "value middle" + (" wide" if count > 8 else "")
    for i, old, new in layers:
        for value, kind in ((old, "before"), (new, "after")):
            bar = chart.rect((i + 0.14) * step, y_of(value), 0.72 * step, plot * value / high, kind)
            chart.add("title", bar).text = f"layer {i}: {old:,} before, {new:,} after"
        if count <= NUMBERED:
            chart.text((i + 0.5) * step, y_of(new) - 5, f"{new:,}", labelled)
    chart.below(_layer_labels(count), LAYER)
    return chart.markup()


def dots(name: str, title: str, kept: dict[int, tuple[int, list[int]]], count: int) -> Markup:
    """Every KV group of every layer: full where it stayed, hollow where it went."""
    radius = min(6.0, max(1.6, 110 / count))
    most = max(units for units, _ in kept.values())
    pitch = min(2 * radius + 7, 150 / most) if most > 7 else 2 * radius + 7
    radius = min(radius, pitch / 2 - 0.8)
    plot = pitch * most
    lost = [i for i, (units, stay) in kept.items() if len(stay) < units]
    gone = sum(units - len(stay) for units, stay in kept.values())
    chart = Chart(
        name, round(20 + plot + 44), title,
        f"Dots for {count} layers, a row for each KV group. {gone} of "
        f"{sum(units for units, _ in kept.values())} are cut, in {len(lost)} layers.",
    )  # fmt: skip
    for group in range(0, most, math.ceil(most / 8)):
        chart.text(0, 20 + plot - (group + 0.5) * pitch + 4, str(group), "tick end", dx=-8)
    for layer, (units, stay) in kept.items():
        for group in range(units):
            stays = group in stay
            dot = chart.add(
                "circle", cx=_percent((layer + 0.5) * 100 / count), r=radius,
                cy=20 + plot - (group + 0.5) * pitch, class_="after" if stays else "gone",
            )  # fmt: skip
            verb = "stays" if stays else "is cut"
            chart.add("title", dot).text = f"layer {layer}, KV group {group} {verb}"
    chart.below(_layer_labels(count), LAYER)
    return chart.markup()


def heat_map(name: str, title: str, rows: Sequence[Sequence[float]]) -> Markup:
    """Layer importance in [-1, 1], a row for each step, a column for each layer (figure 1)."""
    count, pitch = len(rows[0]), min(22, max(6, 320 // len(rows)))
    mean = [sum(row[i] for row in rows) / len(rows) for i in range(count)]
    highest, lowest = mean.index(max(mean)), mean.index(min(mean))
    chart = Chart(
        name, pitch * len(rows) + 48, title,
        f"{len(rows)} steps and {count} layers. Over all steps layer {highest} changed its input "
        f"the most, layer {lowest} the least.",
    )  # fmt: skip
    tips = count * len(rows) <= 4 * MANY
    for step, row in enumerate(rows):
        if step % math.ceil(len(rows) / 12) == 0:
            chart.text(0, step * pitch + pitch / 2 + 4, str(step + 1), "tick end", dx=-8)
        for layer, value in enumerate(row):
            width = 100 / count
            kind = "warm" if value > 0 else "cool"
            cell = chart.rect(layer * width, step * pitch, width, pitch, kind)
            cell.set("fill-opacity", f"{abs(value):.2f}")
            if tips:
                chart.add("title", cell).text = f"step {step + 1}, layer {layer}: {value:+.2f}"
    frame = chart.rect(0, 0, 100, pitch * len(rows), "frame")
    frame.set("aria-hidden", "true")
    chart.below(_layer_labels(count), LAYER)
    return chart.markup()


def stack(name: str, title: str, bars: Sequence[tuple[str, Sequence[tuple[str, int]]]]) -> Markup:
    """Parameters by part, one bar above the other on one scale."""
    most = max(sum(size for _, size in parts) for _, parts in bars)
    said = "; ".join(
        f"{label}: " + ", ".join(f"{part} {size:,}" for part, size in parts)
        for label, parts in bars
    )
    chart = Chart(name, 62 * len(bars) - 8, title, said)
    for row, (label, parts) in enumerate(bars):
        x, y = 0.0, 62 * row
        chart.text(0, y + 14, label, "value")
        total = sum(size for _, size in parts)
        chart.text(100 * total / most, y + 14, f"{total:,}", "value end")
        for i, (part, size) in enumerate(parts):
            bar = chart.rect(x, y + 22, 100 * size / most, 26, f"part{i}")
            chart.add("title", bar).text = f"{part}: {size:,} parameters"
            x += 100 * size / most
    return chart.markup()


def line(
    name: str,
    title: str,
    x_title: str,
    points: Sequence[tuple[float, float]],
    marks: Sequence[tuple[float, str]] = (),
    smooth: Sequence[tuple[float, float]] = (),
    dotted: bool = False,
    reverse: bool = False,
) -> Markup:
    """A curve. `marks` are vertical lines with a label, `smooth` is drawn over the curve, and
    `reverse` lets x fall to the right."""
    low_x = min(x for x, _ in [*points, *marks])
    high_x = max(x for x, _ in points)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points), 4)
    first, last, plot, top = y_ticks[0], y_ticks[-1], 190, 26 if marks else 10
    chart = Chart(
        name, top + plot + 48, title,
        f"A curve of {len(points)} points from {points[0][1]:.3g} at {short(points[0][0])} to "
        f"{points[-1][1]:.3g} at {short(points[-1][0])} {x_title}."
        + (f" Cuts at {', '.join(short(x) for x, _ in marks)}." if marks else ""),
    )  # fmt: skip

    def x_of(value: float) -> float:
        share = (value - low_x) / ((high_x - low_x) or 1)
        return 100 * (1 - share if reverse else share)

    def y_of(value: float) -> float:
        return top + plot * (last - value) / ((last - first) or 1)

    chart.grid(y_ticks, y_of)
    _cuts(chart, [(x_of(x), label) for x, label in sorted(marks)], top, plot)
    inner = chart.add(
        "svg", width="100%", height=chart.height, viewBox=f"0 0 1000 {chart.height}",
        preserveAspectRatio="none", aria_hidden="true",
    )  # fmt: skip
    for curve, kind in ((points, "faint" if smooth else "curve"), (smooth, "curve")):
        if curve:
            path = " ".join(f"{10 * x_of(x):.1f},{y_of(y):.1f}" for x, y in thinned(curve))
            effect = "non-scaling-stroke"
            chart.add("polyline", inner, points=path, class_=kind, vector_effect=effect)
    if dotted:
        for x, y in points:
            dot = chart.add("circle", cx=_percent(x_of(x)), cy=y_of(y), r=3.5, class_="after")
            chart.add("title", dot).text = f"{short(x)}: {y:.4g}"
    inside = [tick for tick in ticks(low_x, high_x, 4) if low_x <= tick <= high_x]
    chart.below([(x_of(tick), short(tick)) for tick in inside], x_title)
    return chart.markup()


def _cuts(chart: Chart, marks: Sequence[tuple[float, str]], top: float, plot: float) -> None:
    """Vertical lines, labelled where the label before leaves room."""
    free_from = -1.0
    for x, label in marks:
        place = _percent(x)
        chart.add("line", x1=place, x2=place, y1=top, y2=top + plot, class_="cut")
        if free_from <= x < 88:
            chart.text(x, top - 6, label, "tick")
            free_from = x + 20


def scatter(
    name: str, title: str, x_title: str, points: Sequence[Point], description: str,
    *, is_log: bool = False,
) -> Markup:  # fmt: skip
    """Labelled points; the strong ones are filled. With `is_log`, equal ratios of y are equal
    distances, if all are above zero."""
    x_ticks = ticks(min(p.x for p in points), max(p.x for p in points), 4)
    low, high = min(p.y for p in points), max(p.y for p in points)
    is_log = is_log and low > 0
    y_ticks = log_ticks(low, high) if is_log else ticks(low, high, 4)
    scale = math.log if is_log else float
    bottom, span = scale(y_ticks[0]), scale(y_ticks[-1]) - scale(y_ticks[0])
    plot, top = 240, 12
    chart = Chart(name, top + plot + 48, title, description)

    def x_of(value: float) -> float:
        return 100 * (value - x_ticks[0]) / ((x_ticks[-1] - x_ticks[0]) or 1)

    def y_of(value: float) -> float:
        return top + plot * (1 - (scale(value) - bottom) / (span or 1))

    chart.grid(y_ticks, y_of)
    taken: list[tuple[float, float]] = []
    for point in points:
        x, y = x_of(point.x), y_of(point.y)
        kind = "after" if point.strong else "before"
        chart.add("circle", cx=_percent(x), cy=y, r=5, class_=kind)
        end, place = x > 60, y - 9
        while any(abs(x - x2) < 25 and abs(place - y2) < 13 for x2, y2 in taken):
            place -= 13  # above the label that is there
        taken.append((x, place))
        chart.text(x, place, point.label, "value end" if end else "value", dx=4 if end else -4)
    chart.below([(x_of(tick), short(tick)) for tick in x_ticks], x_title)
    return chart.markup()


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values from at or below `low` to at or above `high`."""
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(about).tick_values(low, high)]


def log_ticks(low: float, high: float) -> list[float]:
    """Plain numbers from at or below `low` to at or above `high`, as `pictures.use_log_scale`
    takes them; those of full decades where that is many.

    >>> log_ticks(21.7, 48.0)
    [20.0, 30.0, 50.0]
    """
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for steps in ((1, 2, 3, 5), (1,)):
        marks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        first = max(i for i, mark in enumerate(marks) if mark <= low)
        last = next(i for i, mark in enumerate(marks) if mark >= high)
        if last - first < 10:
            break
    return marks[first : last + 1]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MANY points, each the mean of as many neighbours."""
    size = math.ceil(len(points) / MANY)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _layer_labels(count: int) -> list[tuple[float, str]]:
    every = math.ceil(count / 10)
    return [((i + 0.5) * 100 / count, str(i)) for i in range(0, count, every)]


def _extremes(shares: Sequence[tuple[float, int]]) -> str:
    (low, least), (high, most) = min(shares), max(shares)
    return f"the most in layer {most} ({high:.0%}), the least in layer {least} ({low:.0%})."


def _percent(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "%"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
