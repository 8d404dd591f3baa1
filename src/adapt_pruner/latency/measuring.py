"""Measure a table of times on this machine, or take the one that was measured before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..cache import default_cache
from ..errors import LoadingError, UnsupportedModel, WritingError
from ..model.anatomy import Anatomy, find_anatomy
from ..model.axes import ATTENTION, KV_GROUPS, MLP, NEURONS, QUERY_HEADS
from .cost import Latency, check_kind, monotone
from .engines import Engine, Stopwatch
from .probes import Probe, cut_to, equal_layers, probes_of, random_model
from .table import LatencyTable, read_table, shapes_of, write_table

SECONDS = 100.0
"""That measuring a table may take, about; slow models take longer, for the fewest rounds."""
FEWEST_ROUNDS, MOST_ROUNDS = 3, 25

OnRound = Callable[[int, int], None]
_measured: dict[str, LatencyTable] = {}
"""Tables of this process by the names of their files, for a cache that cannot be written to."""


def table_for(
    model: Any,
    engine: Engine,
    on_progress: OnRound = lambda done, total: None,
    with_odd: bool = False,
) -> LatencyTable:
    """The table of a model's times on this machine: from the cache, or measured now.

    Args:
        model: on any device, `meta` included; only its configuration counts.
        on_progress: called with the widths done and their number, if they are measured.
        with_odd: whether odd widths must be in it, too, to choose a multiple by.

    Raises:
        InvalidTarget: if times of such models cannot be told apart.
        UnsupportedModel: if the engine cannot run it.
    """
    anatomy = find_anatomy(model)
    file = default_cache() / "latency" / f"{_key(anatomy, engine)}.json"
    known = _measured.get(file.name)
    if known is None:
        with contextlib.suppress(LoadingError):  # there is none, or an older version wrote it
            known = read_table(file)
    if known is None or (with_odd and not known.odd_widths_ns):
        known = measure_times(anatomy, engine, on_progress, with_odd)
        with contextlib.suppress(WritingError):
            write_table(known, file)
    _measured[file.name] = known
    return known


def _key(anatomy: Anatomy, engine: Engine) -> str:
    """What a table holds for, as the name of a file."""
    model: Any = anatomy.model
    holds_for = {
        **circumstances_of(engine),
        "shapes": shapes_of(anatomy).model_dump(),
        "widths": [max(of.get(name, 0) for of in anatomy.widths) for name in
                   ("num_attention_heads", "num_key_value_heads", "intermediate_size")],
        "attention": getattr(model.config, "_attn_implementation", None),
    }  # fmt: skip
    text = json.dumps(holds_for, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def circumstances_of(engine: Engine) -> dict[str, Any]:
    """What times that an engine measures hang on, as fields of a table."""
    return {
        "machine": machine(engine.device),
        "version": engine.version,
        "threads": engine.threads,
        "dtype": engine.dtype,
        "width_block": engine.width_block,
        **engine.settings.model_dump(),
    }


def machine(device: str) -> str:
    """What to call this machine: its processor, or its GPU, and its name."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)} in {platform.node()}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} in {platform.node()}"


def measure_times(
    anatomy: Anatomy,
    engine: Engine,
    on_progress: OnRound = lambda done, total: None,
    with_odd: bool = True,
) -> LatencyTable:
    """Time the model with all layers alike at a grid of widths, each in turns with the whole one,
    so that a machine whose speed drifts treats both alike. What one layer's width changes is the
    difference over the number of layers. Args, Raises: as `table_for`.
    """
    check_kind(anatomy)
    dtype = engine.source_dtype
    dense = random_model(equal_layers(anatomy, dtype), dtype, engine.device)
    its_anatomy = find_anatomy(dense)
    probes = probes_of(its_anatomy, with_odd)
    ratios: dict[Probe, float] = {}
    with engine.open(dense) as run_dense:
        began = time.perf_counter()
        base = [run_dense() for _ in range(3)]
        took = max((time.perf_counter() - began) / 3, 1e-6)
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / (2 * took * len(probes)))))
        for number, probe in enumerate(probes):
            on_progress(number, len(probes))
            try:
                with ExitStack() as stack:
                    smaller = stack.enter_context(cut_to(dense, probe))
                    run = stack.enter_context(engine.open(smaller))
                    pairs = _in_turns(run_dense, run, rounds)
            except UnsupportedModel:
                if probe[0] != "without":
                    raise
                continue  # the engine has no layers that lack a part
            base += [first for first, _ in pairs]
            ratios[probe] = statistics.median(other / first for first, other in pairs)
        on_progress(len(probes), len(probes))
    ns = 1e9 * statistics.median(base)
    times = {probe: ns * ratio for probe, ratio in ratios.items()}
    found = _Times(ns, times, its_anatomy).split(len(anatomy.layers))
    return LatencyTable(**circumstances_of(engine), shapes=shapes_of(anatomy), **found)


def _in_turns(first: Stopwatch, other: Stopwatch, rounds: int) -> list[tuple[float, float]]:
    other()  # to warm up
    return [(first(), other()) for _ in range(rounds)]


@dataclass(frozen=True)
class _Times:
    """Of the whole model, with all layers alike, in nanoseconds."""

    whole: float
    cut: dict[Probe, float]
    anatomy: Anatomy

    def split(self, num_layers: int) -> dict[str, Any]:
        """What of it each part of a layer takes, as fields of a table of a model of so many layers:
        with all of them whole it is the time measured."""
        count = len(self.anatomy.layers)
        sizes = {axis.kind: axis.size for axis in self.anatomy.axes}
        one = self.cut.get(("layers", 1))
        of_layer = (self.whole - one) / (count - 1) if one else self.whole / count
        of_layer = max(of_layer, 1.0)
        widths = {width: ns for (what, width), ns in self._of("mlp")} | {sizes[NEURONS]: self.whole}
        heads = {(g, h): ns for (_, g, h), ns in self._of("attention")}
        heads[sizes.get(KV_GROUPS, 1), sizes.get(QUERY_HEADS, 1)] = self.whole
        mlp = (self.whole - self._without(MLP, widths)) / count
        attention = (self.whole - self._without(ATTENTION, {g * h: t for (g, h), t in
                                                            heads.items()})) / count  # fmt: skip
        mlp, attention = max(mlp, 0.0), max(attention, 0.0)
        share = min(1.0, of_layer / max(mlp + attention, 1.0))  # noise, where there is less
        mlp, attention = share * mlp, share * attention
        points = self._points(widths, mlp)
        ascending = monotone([ns for _, ns in points])
        mlp_ns = [(width, round(ns)) for (width, _), ns in zip(points, ascending, strict=True)]
        attention_ns = [(*pair, ns) for pair, ns in self._points(heads, attention)]
        rest = of_layer - mlp - attention
        everything = self.whole + (num_layers - count) * of_layer
        in_layers = num_layers * (rest + mlp_ns[-1][1] + attention_ns[-1][2])
        absent = all(("without", kind) in self.cut for kind in (MLP, ATTENTION))
        odd = self._points({width: ns for (_, width), ns in self._of("odd")}, mlp)
        return {
            "outside_ns": round(max(everything - in_layers, 0.0)),
            "layer_ns": round(rest),
            "mlp_ns": [*([(0, 0)] if absent else []), *mlp_ns],
            "attention_ns": [*([(0, 0, 0)] if absent else []), *attention_ns],
            "odd_widths_ns": odd,
        }

    def _of(self, what: str) -> list[tuple[Probe, float]]:
        return [(probe, ns) for probe, ns in self.cut.items() if probe[0] == what]

    def _without(self, kind: str, times: dict[int, float]) -> float:
        """The time without a part of all layers: measured, or from a line through the times that
        two of its sizes take."""
        if ("without", kind) in self.cut:
            return self.cut["without", kind]
        if len(times) == 1:
            return self.whole
        (small, low), *_, (large, high) = sorted(times.items())
        return max(low - small * (high - low) / (large - small), 0.0)

    def _points(self, times: dict[Any, float], most: float) -> list[Any]:
        """What one part takes at each size, if it takes `most` of the time when it is whole."""
        count = len(self.anatomy.layers)
        taken = {size: max(0.0, most - (self.whole - ns) / count) for size, ns in times.items()}
        return [(size, round(taken[size])) for size in sorted(taken)]


@dataclass(frozen=True)
class Measured:
    """What a target in time promised, and what came of it in the same circumstances."""

    promised_speedup: float
    speedup: float
    """Median over rounds, in each of which both models take their turn."""
    dense_ms: float
    ms: float
    circumstances: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured_speedup(
    dense: Any, smaller: Any, latency: Latency, engine: Engine, rounds: int = 7
) -> Measured:
    """Time a model against the dense one that it was cut from. Only shapes count.

    Args:
        dense: on any device, `meta` included; another with its configuration is timed.
        smaller: the model itself.
        engine: what the table was measured with.

    Raises:
        AdaptPrunerError: if the engine cannot run one of them.
    """
    whole = random_model(dense.config, engine.source_dtype, engine.device)
    with engine.open(whole) as first, engine.open(smaller) as other:
        first()
        pairs = _in_turns(first, other, rounds)
    promised = [latency.of(find_anatomy(model)).total({}) for model in (dense, smaller)]
    return Measured(
        promised_speedup=promised[0] / promised[1],
        speedup=statistics.median(one / two for one, two in pairs),
        dense_ms=1e3 * statistics.median(one for one, _ in pairs),
        ms=1e3 * statistics.median(two for _, two in pairs),
        circumstances=latency.table.circumstances,
    )
