"""Tables that other packages may add to, through entry points of the group `adapt_pruner.NAME`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from .errors import MissingExtra, shortened, shown

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Names and what they stand for: the rows of this package, then those of installed ones.

    Entry points are looked up once, when the table is first read, and loaded when their row is. A
    row of this package wins over a foreign one of the same name.
    """

    def __init__(self, name: str, rows: Mapping[str, Entry]):
        self.group = f"adapt_pruner.{name}"
        self.own = dict(rows)
        self._foreign: dict[str, EntryPoint] | None = None

    @property
    def foreign(self) -> dict[str, EntryPoint]:
        if self._foreign is None:
            found = entry_points(group=self.group)
            self._foreign = {point.name: point for point in found if point.name not in self.own}
        return self._foreign

    def __getitem__(self, name: str) -> Entry:
        if name not in self.own:
            point = self.foreign[name]
            try:
                row = point.load()
            except (Exception, SystemExit) as error:
                raise MissingExtra(
                    f"'{name}' is added by another package, as {point.value}, which cannot be "
                    f"imported: {shortened(str(error))}. Repair or remove that package."
                ) from error
            kind = type(next(iter(self.own.values())))
            if not isinstance(row, kind):
                raise MissingExtra(
                    f"'{name}' is added by another package, as {point.value}, which is no "
                    f"{kind.__name__} but {shown(row)}. Repair or remove that package."
                )
            self.own[name] = row
        return self.own[name]

    def loaded(self) -> Iterator[tuple[str, Entry]]:
        """The rows that can be had: a package that is broken stops nothing of the others."""
        for name in self:
            with contextlib.suppress(MissingExtra):
                yield name, self[name]

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.foreign

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self.own, *self.foreign])

    def __len__(self) -> int:
        return len({*self.own, *self.foreign})
