"""The store's records on top of a state file, and what is declared against what is stored."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.desired import Desired
from controller.problems import InvalidInput
from controller.records import ContainerRecord, GrantRecord, GrantState, Records, ServiceRecord
from controller.statefile import load, read

FILE = Path(__file__).parents[2] / "examples/oo1424oo.yaml"
TOR = ContainerRecord(
    "103", "tor-relay", "privacy", "n1", "10.0.0.2", (ServiceRecord("tor-relay", "tcp", 9001),), revision=1
)


def test_a_stored_container_is_a_member_like_a_declared_one() -> None:
    base = load(FILE)
    loaded = read(FILE).with_records(Records(1, (TOR,)), "n1")
    member = loaded.state.network("privacy").member("103")
    assert (member.name, str(member.address), member.port) == ("tor-relay", "10.0.0.2", "veth103")
    assert [service.port for service in member.services] == [9001]
    assert loaded.host.container("103").running
    assert loaded.stored == {"container/103"} and not loaded.refused
    assert loaded.state.digest != base.state.digest
    others = [one for one in loaded.state.network("privacy").members if one.id != "103"]
    assert tuple(others) == base.state.network("privacy").members


def test_another_nodes_container_is_not_here() -> None:
    assert read(FILE).with_records(Records(1, (TOR,)), "n2").state == load(FILE).state


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"id": "102"}, "duplicate-id"),
        ({"name": "Xray"}, "duplicate-name"),
        ({"address": "10.0.0.102"}, "duplicate-address"),
        ({"address": "10.0.0.1"}, "reserved-address"),
        ({"address": "10.1.0.7"}, "address-outside"),
        ({"address": "nonsense"}, "bad-prefix"),
        ({"network": "nowhere"}, "unknown-network"),
        ({"id": "203"}, "id-outside"),
        ({"name": "a b"}, "bad-name"),
        ({"services": (ServiceRecord("a", "tcp", 0),)}, "out-of-range"),
        ({"services": (ServiceRecord("a", "tcp", 5), ServiceRecord("b", "tcp", 5))}, "service-clash"),
        ({"command": ("sleep",), "driver": "lxc"}, "driver-mismatch"),
    ],
)
def test_declared_state_wins_and_the_clash_names_the_record(changes: dict[str, object], code: str) -> None:
    bad = replace(TOR, **changes)  # type: ignore[arg-type]
    good = ContainerRecord("104", "other", "privacy", "n1", "10.0.0.3")
    loaded = read(FILE).with_records(Records(1, (bad, good)), "n1")
    assert [(name, problem.code) for name, problem in loaded.refused] == [(f"container/{bad.id}", code)]
    assert loaded.stored == {"container/104"}
    assert {one.id for one in loaded.state.network("privacy").members} == {"100", "102", "104"}


def test_two_stored_ones_that_clash_leave_the_first() -> None:
    loaded = read(FILE).with_records(Records(1, (TOR, replace(TOR, id="104", address="10.0.0.3"))), "n1")
    assert loaded.stored == {"container/103"}
    (refused,) = loaded.refused
    assert refused[0] == "container/104" and "103" in refused[1].fix


_RECORDS = st.builds(
    ContainerRecord,
    id=st.integers(98, 104).map(str),
    name=st.sampled_from(["a", "b", "xray", "gateway", "-", ""]),
    network=st.sampled_from(["privacy", "management", "x"]),
    node=st.sampled_from(["n1", "n2"]),
    address=st.integers(0, 260).map(lambda n: f"10.0.0.{n}"),
    services=st.lists(st.builds(ServiceRecord, st.sampled_from("ab"), st.just("tcp"), st.integers(0, 3))).map(tuple),
)


@given(st.lists(_RECORDS, max_size=6, unique_by=lambda record: record.id))
def test_whatever_is_stored_the_declared_ones_stay_as_they_are(records: list[ContainerRecord]) -> None:
    base, source = load(FILE), read(FILE)
    loaded = source.with_records(Records(1, tuple(records)), "n1")
    for network in base.state.networks:
        members = loaded.state.network(network.name).members
        assert [one for one in members if one.id in {m.id for m in network.members}] == list(network.members)
        assert replace(loaded.state.network(network.name), members=()) == replace(network, members=())
        assert len({one.address for one in members}) == len(members)


def _write(path: Path, text: str, at: int) -> None:
    path.write_text(text)
    os.utime(path, (at, at))


def test_file_and_store_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    _write(path, FILE.read_text(), 1)
    desired = Desired(path, "n1")
    assert not desired.look()
    assert desired.look(Records(1, (TOR,))) and "container/103" in desired.loaded.stored
    assert not desired.look(Records(1, (TOR,)))
    _write(path, FILE.read_text().replace('"102"', '"103"').replace("veth102", "veth103"), 2)
    assert not desired.look()  # it may be written still
    assert desired.look()
    assert [name for name, _ in desired.loaded.refused] == ["container/103"]
    before = desired.loaded
    for at, text in enumerate(("networks: [", "networks: {}"), 3):
        _write(path, text, at)
        assert not desired.look()
        with pytest.raises(InvalidInput):
            desired.look()
        assert not desired.look() and desired.loaded is before
    assert desired.look(Records(2))
    assert not desired.loaded.refused


def _grant(**changes: Any) -> GrantRecord:
    base = GrantRecord(
        "7", "202", "102", "tcp", 8080, "health", "a", 1.0, 60, GrantState.APPROVED, "b", 10.0, 70.0, 1, "n1"
    )
    return replace(base, **changes)


def test_a_grant_is_there_from_its_approval_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    _write(path, FILE.read_text(), 1)
    desired = Desired(path, "n1", Records(1, grants=(_grant(state=GrantState.REQUESTED),)), 20.0)
    assert desired.loaded.state.grants == () and desired.loaded.until is None
    assert desired.look(Records(2, grants=(_grant(),)), 20.0)
    assert [(one.source, one.target, one.port) for one in desired.loaded.state.grants] == [("202", "102", 8080)]
    assert desired.loaded.until == 70.0 and "grant/7" in desired.loaded.stored
    before = desired.loaded.state.digest
    assert not desired.look(None, 69.9)
    assert desired.look(None, 70.0)
    assert desired.loaded.state.grants == () and desired.loaded.state.digest != before
    assert not desired.look(None, 71.0)


@pytest.mark.parametrize(
    ("changes", "code"), [({"source": "299"}, "stray-grant"), ({"target": "201"}, "needless-grant")]
)
def test_a_grant_that_cannot_be_is_refused(changes: dict[str, str], code: str) -> None:
    loaded = read(FILE).with_records(Records(1, grants=(_grant(**changes),)), "n1", 20.0)
    assert [(name, problem.code) for name, problem in loaded.refused] == [("grant/7", code)]
    assert loaded.state.grants == ()


def test_grants_of_other_nodes_are_not_ours() -> None:
    loaded = read(FILE).with_records(Records(1, grants=(_grant(node="n2"),)), "n1", 20.0)
    assert loaded.refused == () and loaded.state.grants == ()
