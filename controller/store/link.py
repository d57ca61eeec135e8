"""The store as a copy that is kept up to date by polling: for a loop that must not block, and without a thread.

Imports rows, snapshot and wire.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from controller.problems import BulkheadError
from controller.records import Records, ServiceRecord, key
from controller.store import rows
from controller.store.snapshot import Snapshot
from controller.store.wire import Session, Tls

_LOG = logging.getLogger(__name__)
RETRY_S = 1.0
"""Between attempts at writing progress where the server refuses, for want of disk space for example."""
_PROGRESS = frozenset(("agent_revision", "agent_waiting", "controller_revision", "controller_waiting", "health"))


class Link:
    """Follows a store. `remotes` are OVSDB addresses, of one server or of all of a cluster; any will do, or with
    `leader_only` the leader."""

    def __init__(self, remotes: Sequence[str], tls: Tls | None = None, *, leader_only: bool = False) -> None:
        self.session = Session(remotes, tls, rows.DATABASE, rows.tables(), self._heard, leader_only=leader_only)
        self._rows: dict[str, dict[str, rows.Row]] = {}
        self._service_of: dict[str, str] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        self.uuids: dict[str, str] = {}
        """The row of each record, by key."""
        self.root: str | None = None
        """The row with the revision."""
        self.snapshot = Snapshot()
        self._changed = False
        self._not_before = 0.0
        self._cluster = ""
        self._wanted: dict[str, dict[str, Any]] = {}
        self._sent: dict[str, dict[str, Any]] = {}
        self.records = Records()

    @property
    def connected(self) -> bool:
        """Whether the store answers, so that `records` is what it holds."""
        return self.session.up

    @property
    def why(self) -> str:
        """What stands in the way of being connected."""
        return self.session.why

    def poll(self) -> Records | None:
        """A new snapshot if anything has changed since the last call. Does not block."""
        self.session.run()
        self._publish()
        if not self._changed:
            return None
        self._changed = False
        records = self.snapshot.records()
        if records == self.records:
            return None
        self.records = records
        return records

    def publish(self, node: str, **columns: Any) -> None:
        """Set columns of a node's progress. The newest wins; sent as soon as that can be done, again until written."""
        if unknown := set(columns) - _PROGRESS:
            raise BulkheadError(f"a node publishes {', '.join(sorted(_PROGRESS))}, not {', '.join(sorted(unknown))}")
        wanted = self._wanted.setdefault(node, {})
        for name, value in columns.items():
            texts = isinstance(value, Mapping)
            wanted[name] = {rows.clean(k): rows.clean(v) for k, v in value.items()} if texts else value
        self._publish()

    @property
    def unpublished(self) -> bool:
        """Whether anything published has not been written yet."""
        return bool(self._wanted or self._sent)

    def close(self) -> None:
        """End the connection."""
        self.session.close()

    # progress

    def _publish(self) -> None:
        if not self._wanted or self._sent or not self.session.up or time.monotonic() < self._not_before:
            return
        operations: list[dict[str, Any]] = []
        for node, columns in self._wanted.items():
            known = self.snapshot.nodes.get(node)
            if known is not None:
                columns = {name: value for name, value in columns.items() if getattr(known, name) != value}
                if not columns:
                    continue
            row = rows.encode_node(columns)
            if known is not None:
                where = [["name", "==", node]]
                operations.append({"op": "update", "table": "Node", "where": where, "row": row})
            else:
                operations.append({"op": "insert", "table": "Node", "row": {"name": node, **row}})
        wanted, self._wanted = self._wanted, {}
        if not operations:
            return
        self._sent = wanted
        self.session.transact(operations, self._published)

    def _published(self, results: list[Any] | None) -> None:
        sent, self._sent = self._sent, {}
        error = failure(results)
        if error is None:
            # Updated rows that are not there any more: somebody deleted the node.
            if results and all(result.get("count", 1) for result in results):
                return
        elif results is not None and error.get("error") not in ("constraint violation", "timed out"):
            _LOG.warning("progress could not be written to the store: %s", error["error"])
            self._not_before = time.monotonic() + RETRY_S
        for node, columns in sent.items():
            self._wanted[node] = columns | self._wanted.get(node, {})

    # the copy

    def _heard(self, updates: dict[str, Any], whole: bool) -> bool:
        if whole:
            if self._behind(updates):
                return False
            self._rows = {table: {} for table in rows.tables()}
            self._service_of.clear()
            self._keys.clear()
            self.uuids.clear()
            self.root = None
            fresh = Snapshot()
            self.snapshot = fresh
        self._changed = True
        touched: dict[str, set[str]] = {"Container": set()}
        for uuid in self._absorb("Service", updates):
            if uuid in self._service_of:
                touched["Container"].add(self._service_of[uuid])
            if uuid not in self._rows["Service"]:
                self._service_of.pop(uuid, None)
        for table in rows.TYPE:
            touched.setdefault(table, set()).update(self._absorb(table, updates))
            # First all that goes, then what comes: a name may have passed from one to the other.
            for uuid in touched[table]:
                if uuid in self._keys:
                    self.snapshot.delete(table, self._keys[uuid][1])
                    self.uuids.pop(self._keys.pop(uuid)[1], None)
            for uuid in touched[table]:
                if uuid in self._rows[table]:
                    self._add(table, uuid)
        if nodes := self._absorb("Node", updates):
            self._nodes(nodes)
        for uuid in self._absorb("Bulkhead", updates):
            row = self._rows["Bulkhead"].get(uuid)
            self.root = uuid if row is not None else None
            self.snapshot.put_revision(row["revision"] if row is not None else 0)
        return True

    def _behind(self, updates: Mapping[str, Any]) -> bool:
        """Whether this server of a cluster does not know yet what another one has told us."""
        rows_now = updates.get("Bulkhead", {}).values()
        revision = max((update["new"]["revision"] for update in rows_now), default=0)
        same = bool(self.session.cluster) and self.session.cluster == self._cluster
        self._cluster = self.session.cluster
        return same and revision < self.snapshot.revision

    def _absorb(self, table: str, updates: Mapping[str, Any]) -> list[str]:
        """Take over the rows of a table; answers which."""
        mine = self._rows[table]
        for uuid, update in updates.get(table, {}).items():
            if (new := update.get("new")) is not None:
                mine[uuid] = new
            else:
                mine.pop(uuid, None)
        return list(updates.get(table, ()))

    def _add(self, table: str, uuid: str) -> None:
        row = self._rows[table][uuid]
        services: tuple[ServiceRecord, ...] = ()
        if table == "Container":
            refs = rows.references(row["services"])
            for ref in refs:
                self._service_of[ref] = uuid
            found = [rows.decode_service(self._rows["Service"][ref]) for ref in refs if ref in self._rows["Service"]]
            services = tuple(service for _, service in sorted(found, key=lambda pair: pair[0]))
        try:
            record = rows.decode(table, row, services)
        except (ValueError, KeyError, TypeError) as exc:
            # Somebody wrote it by hand. The rest goes on.
            _LOG.warning("row %s of %s in the store cannot be read: %s", uuid, table, type(exc).__name__)
            return
        name = key(record)
        self._keys[uuid] = (table, name)
        self.uuids[name] = uuid
        self.snapshot.put(record)

    def _nodes(self, touched: Iterable[str]) -> None:
        every = self._rows["Node"].values()
        self.snapshot.put_nodes({row["name"]: rows.decode_node(row) for row in every})


def failure(results: list[Any] | None) -> dict[str, Any] | None:
    """The first error among the results of a transaction's operations; None where all went well."""
    if results is None:
        return {"error": "connection lost"}
    return next((result for result in results if isinstance(result, dict) and result.get("error")), None)
