"""What the user wants a model to become small enough for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from .errors import AdaptPrunerError, InvalidSettings, InvalidTarget, shortened
from .figures import in_ms
from .methods import target_of
from .model.anatomy import Anatomy, find_anatomy
from .model.loading import resolve_device
from .model.resources import PARAMETERS, CacheBytes, Resource
from .precision import written_dtype
from .settings import LatencySettings, PruneSettings, make_latency_settings

if TYPE_CHECKING:
    from .latency import LatencyTable
    from .latency.engines import Engine
    from .result import PruningResult

EXAMPLES = (
    "--sparsity 0.2, or --params 350M, or --bytes 80MB, or --kv-bytes 20kB, or --speedup 1.5, or "
    "--latency 12ms"
)
LARGEST_SPEEDUP, LONGEST = 1_000, 100_000
"""The second in seconds."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A target, given in one of the ways; in none where the settings lead to a size themselves."""

    sparsity: float | None = None
    """Share of the decoder layers' parameters to remove, in [0, 1)."""
    params: int | None = None
    """Most parameters of the whole model."""
    bytes: int | None = None
    """Most bytes of the GGUF file of the whole model, stored as `quantize` says."""
    kv_bytes: int | None = None
    """Most bytes of KV cache per token, in 16-bit precision."""
    speedup: float | None = None
    """How many times as fast as it is now the model is to be."""
    latency: float | None = None
    """Most seconds per token of a decoding step, or per prompt of a prefill."""
    latency_table: str | Path | None = None
    """File of the times that `speedup` and `latency` are meant by; default: those of this machine,
    measured when they are needed first."""
    stage: str | None = None
    """Of `LatencySettings`, as the three below; default: as in the table, or the setting's own."""
    batch_size: int | None = None
    context: int | None = None
    engine: str | None = None
    quantize: str | None = None
    """How the file stores values; default: F16."""

    @property
    def targets(self) -> dict[str, Any]:
        """The targets that are given, by name."""
        named = {name: getattr(self, name) for name in TARGETS}
        return {name: value for name, value in named.items() if value is not None}

    def said(self) -> dict[str, Any]:
        """The same as recipes hold them."""
        latency = self.targets.get("latency")
        of_time = {} if latency is None else {"latency": in_ms(latency * 1e3)}
        return {**self.targets, **of_time}

    @property
    def circumstances(self) -> dict[str, Any]:
        """Of what a target in time is meant, as far as it is given, by name."""
        named = {name: getattr(self, name) for name in CIRCUMSTANCES}
        given = {name: value for name, value in named.items() if value is not None}
        return {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}

    @property
    def is_of_time(self) -> bool:
        return self.speedup is not None or self.latency is not None

    @property
    def is_of_file(self) -> bool:
        """Whether the target is about a GGUF file: its bytes, or its time in llama.cpp."""
        return self.bytes is not None or self.engine == "llama.cpp"

    def resource(
        self, tokenizer: Any = None, model: Any = None, settings: PruneSettings | None = None
    ) -> Resource:
        """What the target limits.

        Args:
            tokenizer: a file holds it, too.
            model: the dense one, for times; on any device, `meta` included.
            settings: how it is pruned, for times; None: they must be in a file.

        Raises:
            InvalidTarget: for several targets.
            InvalidSettings: for an unknown quantisation, or bytes without a tokenizer; for a table
                of another model, or of other circumstances than those asked for.
            LoadingError: if the table cannot be read.
            MissingExtra: if files of the kind asked for need a package that is not installed.
        """
        self._check_once()
        if self.circumstances and not self.is_of_time:
            raise InvalidSettings(
                f"{next(iter(self.circumstances))}: belongs to --speedup and --latency; give one "
                "of them, or leave it out."
            )
        if self.bytes is not None:
            from .export import FileBytes

            return FileBytes(self.quantize or "F16", tokenizer)
        if self.is_of_time:
            from .latency import Latency

            table = self.times(model, settings, tokenizer)
            dense = None if model is None else find_anatomy(model)
            return Latency(table, dense, self.latency_table)
        return CacheBytes() if self.kv_bytes is not None else PARAMETERS

    def times(
        self,
        model: Any,
        settings: PruneSettings | None,
        tokenizer: Any = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        with_odd: bool = False,
    ) -> LatencyTable:
        """The table that a target in time is meant by; odd widths in it are for `multiple="auto"`.
        Other args, Raises: as `resource`."""
        from .latency import read_table, table_for

        self._check_time(settings)
        asked = {k: v for k, v in self.circumstances.items() if k != "latency_table"}
        how = make_latency_settings(**asked)  # raises for values that cannot be
        if self.latency_table is not None:
            file = Path(self.latency_table)
            table = read_table(file)
            if self.quantize is not None and table.engine == "llama.cpp":
                asked["dtype"] = self.quantize
            table.check_asked(asked, file)
            return table
        if model is None or settings is None:
            raise InvalidSettings(
                "latency_table: a training, or several processes, must have one table for all of "
                "it; write one: adapt-pruner bench MODEL --latency-table FILE."
            )
        engine = self._engine(how, model, settings, tokenizer)
        return table_for(model, engine, on_progress, with_odd)

    def _check_time(self, settings: PruneSettings | None) -> None:
        """Raise now what would be raised when all is measured."""
        self._check_once()
        if self.speedup is not None:
            check_speedup(self.speedup)
        if self.latency is not None and not 0 < self.latency <= LONGEST:
            raise InvalidTarget(f"latency is a time above 0, such as 12ms; got {self.latency:g} s.")
        if self.is_of_time and settings is not None and "hidden" in settings.cut:
            from .latency.cost import hidden_is_cut

            raise hidden_is_cut()

    def _check_once(self) -> None:
        if len(self.targets) > 1:
            given = " and ".join(self.targets)
            raise InvalidTarget(f"Give the target once: {EXAMPLES}; got {given}.")

    def without_circumstances(self) -> Self:
        """The same without what only a target in time needs: times of `multiple="auto"` are known
        by now."""
        if self.is_of_time:
            return self
        gone = dict.fromkeys(CIRCUMSTANCES)
        return replace(self, **gone, quantize=self.quantize if self.bytes is not None else None)

    def _engine(
        self,
        how: LatencySettings,
        model: Any,
        settings: PruneSettings,
        tokenizer: Any,
        quantize: str | None = None,
    ) -> Engine:
        """What times are measured with."""
        from .latency.engines import make_engine

        return make_engine(
            how,
            model,
            dtype=written_dtype(settings, model),
            device=resolve_device(settings.device),
            quantize=quantize or self.quantize or "F16",
            tokenizer=tokenizer,
        )

    def time_result(self, dense: Any, result: PruningResult, tokenizer: Any) -> None:
        """Let a result say what came of a target in time, or why that was not measured: it counts
        for more than its time.

        Args:
            dense: the model before; only its configuration counts.
        """
        if not self.is_of_time:
            return
        from .latency import Latency, measured_speedup

        latency = result.resource
        assert isinstance(latency, Latency)
        table = latency.table
        try:
            how = make_latency_settings(**{name: getattr(table, name) for name in OF_TABLES})
            stored = table.dtype if table.engine == "llama.cpp" else None
            engine = self._engine(how, dense, result.settings, tokenizer, stored)
            if not table.is_of(engine):
                result.untimed = "the table is of another machine"
                return
            result.timing = measured_speedup(dense, result.model, latency, engine).as_dict()
        except (AdaptPrunerError, RuntimeError, MemoryError, OSError) as error:
            result.untimed = shortened(str(error) or type(error).__name__, 300)

    def check_quantize(self) -> None:
        """Raise InvalidSettings if `quantize` says how to store a file that is not asked for."""
        if self.quantize is not None and not self.is_of_file:
            raise InvalidSettings(
                f"quantize: says of what file `bytes` are meant; got {self.quantize} without bytes "
                "or engine llama.cpp."
            )

    def target(self, settings: PruneSettings, anatomy: Anatomy) -> int:
        """The most that the whole model may have of the anatomy's resource. Raises InvalidTarget if
        the target is missing, malformed, or above what the model has."""
        most = next((v for name, v in self.targets.items() if name != "sparsity"), None)
        if self.speedup is not None:
            most = int(anatomy.amount / self.speedup)
        if self.latency is not None:
            most = round(self.latency * 1e9)
        return target_of(settings, anatomy, self.sparsity, most)


def check_speedup(speedup: float) -> None:
    """Raise InvalidTarget for a speed-up that nothing can have."""
    if not (math.isfinite(speedup) and 1 <= speedup <= LARGEST_SPEEDUP):
        raise InvalidTarget(
            "speedup says how many times as fast as it is now the model is to be, such as 1.5; got "
            f"{speedup:g}."
        )


TARGETS = ("sparsity", "params", "bytes", "kv_bytes", "speedup", "latency")
OF_TABLES = tuple(LatencySettings.model_fields)
CIRCUMSTANCES = ("latency_table", *OF_TABLES)
GOAL_OPTIONS = {field.name for field in fields(Goal)}
