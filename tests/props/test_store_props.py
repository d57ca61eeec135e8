"""Laws of the store: a record comes back as it was put, and what is kept up to date is what a fresh look finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.records import (
    ClientRecord,
    ContainerRecord,
    GrantRecord,
    GrantState,
    OperationRecord,
    Record,
    Records,
    Scope,
    ServiceRecord,
    TokenRecord,
    key,
)
from controller.store import Change, Clash, Link, Store, rows
from controller.store.snapshot import Snapshot, table_of
from tests.fakes.stores import Server, opened, served, wait_for

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
name = st.text("abCD-é", min_size=1, max_size=3)
time = st.floats(0, 4e9)
port = st.integers(0, 65535)
protocol = st.sampled_from(["tcp", "udp", "sctp"])
whole = st.integers(-(2**53), 2**53)
services = st.lists(st.builds(ServiceRecord, text, protocol, port, st.booleans(), text), max_size=3).map(tuple)
texts = st.lists(text, max_size=3).map(tuple)
scopes = st.lists(st.sampled_from(Scope), unique=True).map(tuple)
state = st.sampled_from(["running", "done", "failed"])
records = st.one_of(
    st.builds(
        ContainerRecord, name, name, text, text, name, services, text, texts, text, whole, st.booleans(), text, time
    ),
    st.builds(ClientRecord, name, name, name, text, text, text, time),
    st.builds(
        GrantRecord,
        name,
        text,
        text,
        protocol,
        port,
        text,
        text,
        time,
        whole,
        st.sampled_from(GrantState),
        text,
        time,
        time,
    ),
    st.builds(TokenRecord, name, text, text, scopes, text, time, time),
    st.builds(OperationRecord, name, text, text, text, name, time, state, whole, text, name | st.just(""), text),
)


@given(records, st.integers(0, 2**53))
def test_a_row_is_its_record(record: Record, revision: int) -> None:
    record = rows.normal(record, revision)
    assert rows.normal(record, revision) == record
    row = json.loads(json.dumps(rows.encode(record)))
    found = ()
    if isinstance(record, ContainerRecord):
        decoded = [rows.decode_service(service) for service in json.loads(json.dumps(rows.encode_services(record)))]
        found = tuple(service for _, service in sorted(decoded, key=lambda pair: pair[0], reverse=True)[::-1])
    assert rows.decode(rows.TABLE[type(record)], row, found) == record
    # What is unique for a record and what is for its row are the same thing.
    columns = set(rows.tables()[rows.TABLE[type(record)]])
    assert {field.name for field in fields(record)} <= columns and set(row) <= columns


steps = st.lists(st.tuples(st.booleans(), records), max_size=25)


@given(steps)
def test_a_snapshot_is_what_was_put_and_a_copy_is_its_own(done: list[tuple[bool, Record]]) -> None:
    snapshot, model = Snapshot(), dict[str, Record]()
    kept: list[tuple[Snapshot, dict[str, Record]]] = []
    for deleting, record in done:
        kept.append((snapshot, dict(model)))
        snapshot = snapshot.copy()
        if deleting:
            snapshot.delete(table_of(key(record)), key(record))
            model.pop(key(record), None)
        else:
            snapshot.put(record)
            model[key(record)] = record
    for held, expected in [*kept, (snapshot, model)]:
        assert {key(record): record for record in held.records()} == expected
        assert all(held.get(name) == record for name, record in expected.items())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if shutil.which("ovsdb-server", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip("needs ovsdb-server")
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def store(server: Server) -> Iterator[Store]:
    with opened(server.address) as running:
        yield running


@pytest.fixture(scope="module")
def link(server: Server) -> Iterator[Link]:
    following = Link([server.address])
    yield following
    following.close()


def clashes(held: list[Record]) -> bool:
    """What the schema's indexes refuse, said once more."""
    seen: set[tuple[str, ...]] = set()
    for record in held:
        mine = []
        if isinstance(record, ContainerRecord):
            mine = [("container", record.name.lower()), ("address", record.address)]
        elif isinstance(record, ClientRecord):
            mine = [("client", record.node, record.name.lower()), ("client address", record.node, record.address)]
        elif isinstance(record, OperationRecord) and record.idempotency_key:
            mine = [("once", record.who, record.idempotency_key)]
        if seen & set(mine):
            return True
        seen |= set(mine)
    return False


@settings(max_examples=40)
@given(st.lists(st.lists(st.tuples(st.booleans(), records), max_size=4), max_size=4))
def test_any_history_is_what_a_fresh_look_finds(
    server: Server, store: Store, link: Link, history: list[list[tuple[bool, Record]]]
) -> None:
    store.change(lambda change: [change.delete(key(record)) for record in change.records])
    model: dict[str, Record] = {}
    for step in history:
        wanted = dict(model)

        def fn(change: Change, step: list[tuple[bool, Record]] = step) -> None:
            for deleting, record in step:
                change.delete(key(record)) if deleting else change.put(record)

        for deleting, record in step:
            wanted.pop(key(record), None) if deleting else wanted.update({key(record): record})
        if clashes(list(wanted.values())):
            with pytest.raises(Clash):
                store.change(fn)
        else:
            store.change(fn)
            model = wanted
    found = {key(record): record for record in store.records}
    assert found == {name: rows.normal(record, found[name].revision) for name, record in model.items()}

    def same() -> bool:
        link.poll()
        return link.records == store.records

    wait_for(same)
    with opened(server.address) as fresh:
        assert fresh.records == replace(store.records, nodes=fresh.records.nodes)
        assert isinstance(fresh.records, Records)
