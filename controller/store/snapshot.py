"""All records at one moment, kept in order and by what has to be unique, cheap to change and to copy.

Imports records and rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

from controller.records import NodeRecord, Record, Records, key
from controller.store.rows import INDEXES, TABLE

Order = tuple[int, str]


class Kind:
    """The records of one table."""

    __slots__ = ("_order", "_owners", "_table", "_tuple", "records")

    def __init__(self, table: str) -> None:
        self._table = table
        self.records: dict[str, Any] = {}
        self._order: list[tuple[int, str]] = []
        self._owners: dict[tuple[str, ...], str] = {}
        self._tuple: tuple[Any, ...] | None = ()

    def copy(self) -> Kind:
        """One of its own."""
        other = Kind(self._table)
        other.records, other._order, other._owners = self.records.copy(), self._order.copy(), self._owners.copy()
        other._tuple = self._tuple
        return other

    def put(self, name: str, record: Any) -> list[tuple[tuple[str, ...], str]]:
        """Add or replace; answers what others seem to have already, and who."""
        old = self.records.get(name)
        if old is None:
            insort(self._order, _order(name))
        else:
            self._forget(name, old)
        self.records[name] = record
        self._tuple = None
        taken = []
        for index in INDEXES[self._table](record):
            owner = self._owners.get(index)
            if owner is not None:
                taken.append((index, owner))
            self._owners[index] = name
        return taken

    def delete(self, name: str) -> None:
        """Take away, if it is there."""
        old = self.records.pop(name, None)
        if old is None:
            return
        self._forget(name, old)
        del self._order[bisect_left(self._order, _order(name))]
        self._tuple = None

    def _forget(self, name: str, record: Any) -> None:
        for index in INDEXES[self._table](record):
            if self._owners.get(index) == name:
                del self._owners[index]

    def holds(self, name: str, index: tuple[str, ...]) -> bool:
        """Whether a record has that unique value."""
        record = self.records.get(name)
        return record is not None and index in INDEXES[self._table](record)

    def all(self) -> tuple[Any, ...]:
        """Every record in order."""
        if self._tuple is None:
            self._tuple = tuple(self.records[name] for _, name in self._order)
        return self._tuple


def _order(name: str) -> Order:
    """103 comes after 20."""
    return len(name), name


class Snapshot:
    """Records of every kind. A copy shares the kinds that neither has changed since."""

    def __init__(self) -> None:
        self.revision = 0
        self.kinds = {table: Kind(table) for table in TABLE.values()}
        self._own = set(self.kinds)
        self.nodes: dict[str, NodeRecord] = {}
        self._records: Records | None = None

    def copy(self) -> Snapshot:
        """One that can be changed without changing this one."""
        other = Snapshot.__new__(Snapshot)
        other.revision, other.kinds, other._own = self.revision, dict(self.kinds), set()
        other.nodes, other._records = self.nodes, self._records
        self._own = set()
        return other

    def put(self, record: Record) -> list[tuple[tuple[str, ...], str]]:
        """Add or replace a record; answers what others seem to have already, and who."""
        self._records = None
        return self._kind(TABLE[type(record)]).put(key(record), record)

    def delete(self, table: str, name: str) -> None:
        """Take a record away, if it is there."""
        self._records = None
        self._kind(table).delete(name)

    def get(self, name: str) -> Record | None:
        """A record by its key."""
        kind = self.kinds.get(table_of(name))
        return kind.records.get(name) if kind is not None else None

    def put_nodes(self, nodes: dict[str, NodeRecord]) -> None:
        """What is known of the nodes."""
        self.nodes, self._records = nodes, None

    def put_revision(self, revision: int) -> None:
        """Which revision this is."""
        self.revision, self._records = revision, None

    def records(self) -> Records:
        """All of it, as a value."""
        if self._records is None:
            every = {table: kind.all() for table, kind in self.kinds.items()}
            self._records = Records(
                self.revision,
                every["Container"],
                every["Client"],
                every["Grant"],
                every["Token"],
                every["Operation"],
                tuple(self.nodes[name] for name in sorted(self.nodes)),
            )
        return self._records

    def _kind(self, table: str) -> Kind:
        if table not in self._own:
            self.kinds[table] = self.kinds[table].copy()
            self._own.add(table)
        return self.kinds[table]

    def __iter__(self) -> Iterator[tuple[str, Record]]:
        for kind in self.kinds.values():
            yield from kind.records.items()


def table_of(name: str) -> str:
    """The table a key belongs to, empty if to none."""
    return name.partition("/")[0].capitalize()
