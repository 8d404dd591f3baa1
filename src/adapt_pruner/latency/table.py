"""The times of a model's parts, as they are kept in a small JSON file.

    decoding one token, or reading one prompt
        = outside + for every layer:  layer + attention(KV groups, heads per group) + mlp(width)

`layer` is what a layer takes besides its two parts. Times between the widths of a table lie on
straight lines, and below the smallest width nothing more is saved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Len
from pydantic import AllowInfNan, BaseModel, ConfigDict, ValidationError, model_validator

from ..errors import InvalidSettings, LoadingError
from ..files import read_json, write_json_atomically
from ..limits import BatchSize, Name, NumTokens, Width, first_problem
from ..model.anatomy import Anatomy
from ..model.axes import WIDTH_NAMES

Nanoseconds = Annotated[float, Ge(0), Le(1e15), AllowInfNan(False)]
WidthTimed = Annotated[int, Ge(0), Le(1_000_000)]
MOST_TIMES = 1_000


class LayerShapes(BaseModel):
    """Of the model that was measured. Times hold for others that differ in nothing of this."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: Name
    hidden_size: Width
    head_dim: Width
    vocabulary: Annotated[int, Ge(1), Le(100_000_000)]
    layers: Annotated[int, Ge(1), Le(10_000)]
    """Of the dense model; one cut from it has fewer."""


class LatencyTable(BaseModel):
    """Times in nanoseconds, of one token of a decoding step or one prompt of a prefill, for all
    sequences of the batch together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    machine: Name
    engine: Name
    """Such as torch or llama.cpp."""
    version: str = ""
    """Of the engine."""
    threads: Annotated[int, Ge(0), Le(100_000)] = 0
    """0: not said."""
    dtype: Name
    """Of the weights: float32, or as the GGUF file stores them, such as Q8_0."""
    stage: Literal["decode", "prefill"]
    batch_size: BatchSize = 1
    context: NumTokens
    """Tokens in the cache, or of the prompt."""
    shapes: LayerShapes
    width_block: Width = 1
    """MLP widths are filled up to multiples of this."""
    outside_ns: Nanoseconds
    """Embeddings, head, and what else is there once."""
    layer_ns: Nanoseconds
    mlp_ns: Annotated[list[tuple[WidthTimed, Nanoseconds]], Len(1, MOST_TIMES)]
    """Width, time. Width 0 stands for a layer without MLP, if such a layer was measured."""
    attention_ns: Annotated[list[tuple[WidthTimed, WidthTimed, Nanoseconds]], Len(1, MOST_TIMES)]
    """KV groups, query heads of each, time. 0, 0 stands for a layer without attention."""
    odd_widths_ns: Annotated[list[tuple[WidthTimed, Nanoseconds]], Len(0, MOST_TIMES)] = []
    """Of MLPs whose widths are multiples of 1, 2, 4, ... and no more: see `multiples`."""

    @model_validator(mode="after")
    def _is_a_grid(self) -> LatencyTable:
        widths = [width for width, _ in self.mlp_ns]
        if widths != sorted(set(widths)) or not widths[-1]:
            raise ValueError("mlp_ns must have ascending widths, from a small one to the largest")
        pairs = [(groups, heads) for groups, heads, _ in self.attention_ns]
        whole = {pair for pair in pairs if pair != (0, 0)}
        grid = {(groups, heads) for groups, _ in whole for _, heads in whole}
        if len(set(pairs)) < len(pairs) or not whole or whole != grid or any(0 in p for p in whole):
            raise ValueError(
                "attention_ns must have every number of KV groups with every number of heads once"
            )
        if any(ns for *sizes, ns in (*self.mlp_ns, *self.attention_ns) if not any(sizes)):
            raise ValueError("a layer without MLP or attention takes 0 ns for it")
        return self

    @property
    def has_absence(self) -> bool:
        """Whether it says what a layer takes without its MLP, or its attention."""
        return not self.mlp_ns[0][0] and any(not groups for groups, *_ in self.attention_ns)

    @property
    def unit(self) -> str:
        """What its times are of."""
        return "token in decode" if self.stage == "decode" else "prompt in prefill"

    @property
    def circumstances(self) -> str:
        """All that a time hangs on, in words."""
        tokens = "tokens in the cache" if self.stage == "decode" else "tokens of a prompt"
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.threads else ""
        kind = re.sub(r" in \S+$", "", self.machine)  # its name is nobody's business
        return (
            f"{self.stage}, {self.engine} {self.dtype}, batch {self.batch_size}, {self.context:,} "
            f"{tokens}{threads}, {kind}"
        )

    def is_of(self, engine: Any) -> bool:
        """Whether it was measured on this machine, with the same engine and as many threads."""
        from .measuring import circumstances_of

        there = circumstances_of(engine)
        return all(getattr(self, name) == value for name, value in there.items()
                   if name != "version")  # fmt: skip

    def check_asked(self, asked: Mapping[str, Any], file: Path) -> None:
        """Raise InvalidSettings if circumstances that are asked for are not those of the table."""
        for name, value in asked.items():
            has = getattr(self, name)
            if value != has:
                raise InvalidSettings(
                    f"{name}: the table '{file}' is of {has}; got {value}. Leave it out, or name "
                    "another table."
                )

    def check_fits(self, anatomy: Anatomy) -> None:
        """Raise InvalidSettings if the table is of another model."""
        for name, value in shapes_of(anatomy).model_dump().items():
            has = getattr(self.shapes, name)
            if value > has if name == "layers" else value != has:
                raise _other_model(name, has, value)
        widest = {
            "intermediate_size": self.mlp_ns[-1][0],
            "num_key_value_heads": max(groups for groups, *_ in self.attention_ns),
        }
        for name, most in widest.items():
            there = max((widths.get(name, 0) for widths in anatomy.widths), default=0)
            if there > most:
                raise _other_model(name, most, there)
        most = max(heads for _, heads, _ in self.attention_ns)
        if (there := max(map(heads_per_group, anatomy.widths), default=0)) > most:
            raise _other_model("heads per KV group", most, there)


def _other_model(name: str, has: Any, value: Any) -> InvalidSettings:
    return InvalidSettings(
        f"latency_table: it is of a model with {name} {has}, and this one has {value}. Measure "
        "this one: adapt-pruner bench MODEL --latency-table FILE."
    )


def heads_per_group(widths: Mapping[str, int]) -> int:
    """Query heads of each KV group of a layer; 0 where it does not attend."""
    heads, groups = (widths.get(name, 0) for name in WIDTH_NAMES[:2])
    return heads // groups if groups else 0


def shapes_of(anatomy: Anatomy) -> LayerShapes:
    """What a table of the model is valid for."""
    model: Any = anatomy.model
    config = model.config
    return LayerShapes(
        model_type=config.model_type,
        hidden_size=anatomy.hidden_size,
        head_dim=getattr(config, "head_dim", None)
        or anatomy.hidden_size // config.num_attention_heads,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        layers=len(anatomy.layers),
    )


def read_table(file: str | Path) -> LatencyTable:
    """Read a table. Raises LoadingError, saying what is wrong with the file."""
    file = Path(file).expanduser()
    content = read_json(file)
    try:
        return LatencyTable.model_validate(content)
    except ValidationError as error:
        raise LoadingError(
            f"'{file}' is no table of times: {first_problem(error)}. Write one: "
            "adapt-pruner bench MODEL --latency-table FILE."
        ) from error


def write_table(table: LatencyTable, file: Path) -> None:
    """Write a table, whole or not at all. Raises WritingError."""
    write_json_atomically(file, table.model_dump(mode="json"))
