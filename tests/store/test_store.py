"""Changes, snapshots and progress on a real database server, which is killed now and then."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from controller.problems import BulkheadError
from controller.records import (
    ClientRecord,
    ContainerRecord,
    GrantRecord,
    GrantState,
    OperationRecord,
    Records,
    Scope,
    TokenRecord,
)
from controller.store import Change, Clash, Link, Store, Unavailable
from tests.fakes.stores import Server, container, opened, wait_for

ROOT = Path(__file__).parents[2]


def put(*records: object) -> Callable[[Change], None]:
    def fn(change: Change) -> None:
        for record in records:
            change.put(record)  # type: ignore[arg-type]

    return fn


def allocate(who: str) -> Callable[[Change], str]:
    """Take the lowest free id, as the API does."""

    def fn(change: Change) -> str:
        taken = {record.id for record in change.records.containers}
        number = next(n for n in range(100, 10_000) if str(n) not in taken)
        change.put(container(number, created_by=who))
        return str(number)

    return fn


def followed(link: Link, store: Store) -> Records:
    def same() -> bool:
        link.poll()
        return link.records == store.records

    wait_for(same)
    return link.records


def test_everything_comes_back_as_it_was_put(server: Server, store: Store) -> None:
    records = [
        container(102),
        container(9, services=(), running=False),
        ClientRecord("phone", "n1", "10.9.0.2", "pub=", "psk=", "root", 12.5),
        GrantRecord(
            "1",
            "102",
            "9",
            "tcp",
            5432,
            "because é \U0001f600",
            "anna",
            1.25,
            600,
            GrantState.APPROVED,
            "bob",
            2.0,
            602.5,
        ),
        TokenRecord("t1", "ci", "00ff", (Scope.READ, Scope.APPROVE), "root", 1.0, 99.0),
        OperationRecord("o1", "create", "container/102", "n1", "anna", 3.0, "done", 201, '{"a": 1}', "key-1", "ab"),
        OperationRecord("o2", "create", "container/9", "n1", "anna", 3.0),
        OperationRecord("o3", "create", "container/9", "n1", "anna", 3.0),
    ]
    answer, revision = store.change(lambda change: put(*records)(change) or "yes")  # type: ignore[func-returns-value]
    assert (answer, revision) == ("yes", 1)
    assert sorted(map(repr, store.records)) == sorted(repr(replace(record, revision=1)) for record in records)
    assert [record.id for record in store.records.containers] == ["9", "102"]
    with opened(server.address) as other:
        assert other.records == store.records


def test_a_change_sees_what_it_has_put_and_what_it_took_away(store: Store) -> None:
    store.change(put(container(1), container(2)))

    def fn(change: Change) -> list[str]:
        change.put(container(3))
        change.delete("container/1")
        change.delete("container/77")
        change.put(container(2, running=False, services=()))
        return [record.id for record in change.records.containers]

    answer, revision = store.change(fn)
    assert answer == ["2", "3"]
    assert revision == 2
    assert store.records.containers == (container(2, running=False, services=(), revision=2), container(3, revision=2))


def test_a_function_that_raises_writes_nothing(store: Store) -> None:
    def fn(change: Change) -> None:
        change.put(container(1))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        store.change(fn)
    assert store.change(lambda change: len(change.records.containers)) == (0, 0)


def test_a_change_that_changes_nothing_makes_no_revision(store: Store) -> None:
    store.change(put(container(1)))
    assert store.change(put(container(1))) == (None, 1)
    assert store.change(lambda change: change.delete("container/5")) == (None, 1)
    assert store.records.containers[0].revision == 1


@pytest.mark.parametrize(
    "other, said",
    [
        (container(2, name="BOX1"), "container/2 cannot have the name box1: container/1 has it"),
        (container(2, address="10.0.0.2"), "container/2 cannot have the address 10.0.0.2: container/1 has it"),
        (ClientRecord("PHONE", "n1", "10.9.0.3", "k"), "client/n1/PHONE cannot have the name phone: client/n1/phone"),
        (ClientRecord("pad", "n1", "10.9.0.2", "k"), "client/n1/pad cannot have the address 10.9.0.2: client/n1/phone"),
        (
            OperationRecord("o2", "x", "y", "n1", "anna", 1, idempotency_key="k"),
            "cannot have the idempotency key k: operation/o1",
        ),
    ],
)
def test_what_only_one_may_have_is_refused_and_named(store: Store, other: ContainerRecord, said: str) -> None:
    phone = ClientRecord("phone", "n1", "10.9.0.2", "k")
    store.change(put(container(1), phone, OperationRecord("o1", "x", "y", "n1", "anna", 1, idempotency_key="k")))
    with pytest.raises(Clash, match=said):
        store.change(put(other))
    assert sum(1 for _ in store.records) == 3
    # On another node, and for somebody else, it is free.
    store.change(put(replace(phone, node="n2"), OperationRecord("o2", "x", "y", "n1", "bob", 1, idempotency_key="k")))


def test_two_records_may_swap_their_addresses(store: Store) -> None:
    one, two = container(1), container(2)
    store.change(put(one, two))
    store.change(put(replace(one, address=two.address), replace(two, address=one.address)))
    assert [record.address for record in store.records.containers] == [two.address, one.address]


def test_a_name_passes_from_one_deleted_to_another(server: Server, store: Store) -> None:
    link = Link([server.address])
    store.change(put(container(1)))

    def fn(change: Change) -> None:
        change.delete("container/1")
        change.put(container(2, name="box1", address=container(1).address))

    store.change(fn)
    assert [record.id for record in followed(link, store).containers] == ["2"]
    with pytest.raises(Clash):
        store.change(put(container(1)))


@pytest.mark.parametrize(
    "record, said",
    [
        (container(1, name="a\0b"), "name has a character that cannot be stored"),
        (container(1, command=("\ud800",)), "command has a character"),
        (container(1, created_at=float("nan")), "created_at is nan, not a time"),
    ],
)
def test_what_cannot_be_stored_is_said(store: Store, record: ContainerRecord, said: str) -> None:
    with pytest.raises(BulkheadError, match=said):
        store.change(put(record))


def test_neighbours_of_a_bad_change_are_not_hurt(store: Store) -> None:
    store.change(put(container(5000)))

    def work(number: int) -> bool:
        try:
            store.change(put(container(number, **({"name": "box5000"} if number % 3 == 0 else {}))))
        except Clash:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        done = list(pool.map(work, range(90)))
    assert done == [number % 3 != 0 for number in range(90)]
    assert len(store.records.containers) == 61


def test_200_changes_of_32_threads_are_all_made(store: Store) -> None:
    with ThreadPoolExecutor(32) as pool:
        ids = list(pool.map(lambda n: store.change(allocate(str(n)))[0], range(200)))
    assert sorted(map(int, ids)) == list(range(100, 300))


@pytest.mark.parametrize("lock", [False, True])
def test_stores_that_race_take_different_ids(server: Server, lock: bool) -> None:
    with opened(server.address, lock=lock) as one, opened(server.address, lock=lock) as two:
        with ThreadPoolExecutor(8) as pool:
            done = list(pool.map(lambda n: (one, two)[n % 2].change(allocate(str(n))), range(120)))
        assert sorted(int(number) for number, _ in done) == list(range(100, 220))
        by_id = {number: (str(n), revision) for n, (number, revision) in enumerate(done)}
        wait_for(lambda: one.records == two.records)
        assert {r.id: (r.created_by, r.revision) for r in one.records.containers} == by_id


def test_an_idle_store_does_not_keep_the_lock(server: Server) -> None:
    with opened(server.address, lock=True) as one, opened(server.address, lock=True) as two:
        one.change(put(container(1)))
        begun = time.monotonic()
        two.change(put(container(2)))
        one.change(put(container(3)))
        assert time.monotonic() - begun < 1


def test_a_node_that_hangs_with_the_lock_is_said(server: Server) -> None:
    script = (
        "import sys, os, signal\nfrom controller.store import Store\nfrom tests.fakes.stores import container\n"
        "store = Store([sys.argv[1]], lock=True); store.start()\n"
        "def fn(change):\n    print('held', flush=True)\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    change.put(container(9))\n"
        "store.change(fn, 60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, server.address], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with opened(server.address, lock=True) as store:
            with pytest.raises(Unavailable, match="another node keeps changing the store") as caught:
                store.change(put(container(1)), 0.5)
            assert not caught.value.doubtful
            os.kill(other.pid, signal.SIGCONT)
            store.change(put(container(1)))
            assert other.wait(10) == 0
            wait_for(lambda: len(store.records.containers) == 2)
    finally:
        other.kill()
        other.wait()


def test_who_subscribes_sees_every_revision_in_order(server: Server, store: Store) -> None:
    seen: list[int] = []
    store.subscribe(lambda records: seen.append(records.revision))
    store.subscribe(lambda _records: 1 / 0)
    for number in range(20):
        store.change(put(container(number)))
    assert seen == list(range(1, 21))


def test_a_subscriber_cannot_change_the_store(store: Store) -> None:
    caught: list[BaseException] = []

    def callback(_records: Records) -> None:
        try:
            store.change(put(container(2)))
        except BulkheadError as exc:
            caught.append(exc)

    store.subscribe(callback)
    store.change(put(container(1)))
    assert [str(exc) for exc in caught] == ["a subscriber of the store cannot change it; do that from another thread"]


def test_progress_is_published_and_the_newest_wins(server: Server, store: Store) -> None:
    link = Link([server.address])
    wait_for(lambda: link.poll() is not None or link.connected)
    for revision in range(50):
        link.publish("n1", controller_revision=revision, controller_waiting={"grant/7": "refused: no \0"})
        store.publish("n1", agent_revision=revision, health={"102/web": "up"})
        store.publish("n2", agent_revision=revision)
    wait_for(lambda: (link.poll(), store.records.node("n1").controller_revision)[1] == 49)
    wait_for(lambda: store.records.node("n1").agent_revision == store.records.node("n2").agent_revision == 49)
    assert store.records.node("n1").controller_waiting == {"grant/7": "refused: no "}
    assert store.records.node("n1").health == {"102/web": "up"}
    assert store.records.revision == 0
    assert followed(link, store).node("n1").agent_revision == 49
    with pytest.raises(BulkheadError, match="not colour"):
        link.publish("n1", colour="red")
    link.close()


def test_progress_that_was_published_while_the_server_was_away_arrives(server: Server, store: Store) -> None:
    link = Link([server.address])
    server.kill()
    link.publish("n1", controller_revision=3)
    store.publish("n1", agent_revision=4)
    assert link.poll() is None
    server.start()
    wait_for(lambda: (link.poll(), store.records.node("n1").controller_revision)[1] == 3)
    wait_for(lambda: store.records.node("n1").agent_revision == 4)
    link.close()


def test_a_new_snapshot_of_200_containers_takes_less_than_2_ms(server: Server, store: Store) -> None:
    store.change(put(*(container(n) for n in range(200))))
    link = Link([server.address])
    followed(link, store)
    spent = []
    for order in range(1, 30):
        store.change(put(container(7, order=order)))
        wait_for(lambda: not _quiet(link))
        begun = time.perf_counter()
        assert link.poll() is not None
        spent.append(time.perf_counter() - begun)
        assert link.records == store.records
    assert sorted(spent)[len(spent) // 2] < 0.002
    link.close()


def _quiet(link: Link) -> bool:
    import select

    poller = select.poll()
    poller.register(link.session.fileno(), select.POLLIN)
    return not poller.poll(0)


def test_nobody_there_is_said_at_once(tmp_path: Path) -> None:
    store = Store([f"unix:{tmp_path}/none.sock"])
    with pytest.raises(Unavailable, match=r"none.sock: No such file.*bulkhead store serve"):
        store.start(0.2)
    with pytest.raises(Unavailable) as caught:
        store.change(put(container(1)), 0.2)
    assert not caught.value.doubtful
    store.close()


@pytest.mark.parametrize("address", ["", "unix:", "tcp:host:1", "tcp:1.2.3.4", "ssl:1.2.3.4:99999", "pssl:6641", "/x"])
def test_a_wrong_address_is_said(address: str) -> None:
    with pytest.raises(BulkheadError, match="no address of a store"):
        Store([address])
    with pytest.raises(BulkheadError, match="no address of a store"):
        Store([])


def test_a_store_that_is_closed_refuses_what_waits(server: Server) -> None:
    server.kill()
    store = Store([server.address])
    with pytest.raises(Unavailable):
        store.start(0.1)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            store.change(put(container(1)), 30)
        except Unavailable as exc:
            caught.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.1)
    store.close()
    thread.join(5)
    assert [str(exc) for exc in caught] == ["the store was closed"]


def test_a_server_that_is_killed_under_load_loses_nothing_that_was_acknowledged(server: Server, store: Store) -> None:
    done: dict[str, tuple[str, int]] = {}
    lost: dict[str, bool] = {}
    stop = threading.Event()

    def work(worker: int) -> None:
        for n in range(10_000):
            if stop.is_set():
                return
            who = f"{worker}-{n}"
            try:
                done[who] = store.change(allocate(who), 5)
            except Unavailable as exc:
                lost[who] = exc.doubtful

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        time.sleep(0.3)
        server.kill()
        time.sleep(0.05)
        server.start()
        mark = len(done)
        wait_for(lambda mark=mark: len(done) > mark, 5)  # type: ignore[misc]
    stop.set()
    for thread in threads:
        thread.join(20)
    with opened(server.address) as other:
        held = {record.created_by: (record.id, record.revision) for record in other.records.containers}
        assert len(held) == len(other.records.containers), "a change was carried out twice"
        assert {who: held.get(who) for who in done} == done
        assert all(lost[who] for who in lost if who in held)
        assert set(held) <= set(done) | set(lost)


def test_a_change_whose_answer_was_lost_is_found_and_not_made_twice(server: Server, store: Store) -> None:
    """The server is stopped before it reads the change, and the answer never arrives: a proxy swallows it."""
    with _Proxy(server.places.socket) as proxy, opened(f"unix:{proxy.path}") as through:
        proxy.deaf = True
        result: list[tuple[str, int]] = []
        thread = threading.Thread(target=lambda: result.append(through.change(allocate("once"))))
        thread.start()
        wait_for(lambda: store.records.containers)
        store.change(allocate("later"))
        proxy.cut()
        proxy.deaf = False
        thread.join(10)
        assert result == [("100", 1)]
    wait_for(lambda: [record.created_by for record in store.records.containers] == ["once", "later"])


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_change_that_never_arrived_is_made_once(server: Server, store: Store, meanwhile: bool) -> None:
    with _Proxy(server.places.socket) as proxy, opened(f"unix:{proxy.path}") as through:
        proxy.dumb = True
        result: list[tuple[str, int]] = []
        thread = threading.Thread(target=lambda: result.append(through.change(allocate("once"))))
        thread.start()
        wait_for(lambda: proxy.swallowed)
        if meanwhile:
            store.change(allocate("before"))
        proxy.cut()
        proxy.dumb = False
        thread.join(10)
        assert result == [("101", 2) if meanwhile else ("100", 1)]
    there = (["before"] if meanwhile else []) + ["once"]
    wait_for(lambda: [record.created_by for record in store.records.containers] == there)


def test_a_server_of_a_cluster_that_is_behind_is_left_for_another(server: Server) -> None:
    def whole(revision: int) -> dict[str, object]:
        return {"Bulkhead": {"b1": {"new": {"revision": revision}}}}

    link = Link([server.address])
    link.session.cluster = "one"
    assert link._heard(whole(5), True)
    assert not link._heard(whole(4), True)
    assert link.snapshot.revision == 5
    link.session.cluster = "another"
    assert link._heard(whole(3), True)
    assert link.snapshot.revision == 3


class _Proxy:
    """Between a store and its server; can swallow what the server says, or hears, and cut all connections."""

    def __init__(self, target: Path) -> None:
        import socket

        self.deaf = self.dumb = self.swallowed = False
        self.path = target.parent / "proxy.sock"
        self._target = target
        self._pairs: list[socket.socket] = []
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> _Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        import contextlib
        import socket

        for sock in self._pairs:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def _accept(self) -> None:
        import contextlib
        import socket

        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._target))
                self._pairs += [near, far]
                threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: object, sink: object, answers: bool) -> None:
        import contextlib

        with contextlib.suppress(OSError):
            while data := source.recv(65536):  # type: ignore[attr-defined]
                if self.deaf if answers else self.dumb:
                    self.swallowed = True
                else:
                    sink.sendall(data)  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            sink.close()  # type: ignore[attr-defined]


def test_rows_that_somebody_wrote_by_hand_do_not_stop_it(server: Server, store: Store) -> None:
    bad = '["Bulkhead",{"op":"insert","table":"Container","row":{"id":"1","name_key":"x","command":"not json"}}]'
    subprocess.run(["ovsdb-client", "transact", server.address, bad], check=True, capture_output=True)
    store.change(put(container(2)))
    assert [record.id for record in store.records.containers] == ["2"]


def test_no_secret_is_logged_or_in_an_error(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "c2VjcmV0LXNlY3JldA=="
    client = ClientRecord("phone", "n1", "10.9.0.2", "pub", secret)
    with opened(server.address) as store:
        store.change(put(client))
        with pytest.raises(Clash) as caught:
            store.change(put(replace(client, name="pad")))
        server.kill()
        with pytest.raises(Unavailable) as gone:
            store.change(put(replace(client, address="10.9.0.3")), 0.3)
        said = f"{caplog.text}{caught.value}{gone.value}{store.records!r}"
    assert secret not in said


@pytest.mark.slow
def test_a_link_works_in_eventlets_loop(server: Server, store: Store) -> None:
    follow_in_eventlet(server.address, store, ())


def follow_in_eventlet(address: str, store: Store, tls: tuple[Path, ...]) -> None:
    script = (
        "import eventlet; eventlet.monkey_patch()\nimport sys, time\nfrom controller.store import Link\n"
        "from controller.store import Tls\n"
        "link = Link([sys.argv[1]], Tls(*sys.argv[2:]) if sys.argv[2:] else None)\nticks = 0\n"
        "def tick():\n    global ticks\n    while True:\n        ticks += 1; time.sleep(0.01)\n"
        "eventlet.spawn(tick)\nprint('on', flush=True)\n"
        "while not link.records.containers:\n    link.poll(); time.sleep(0.005)\n"
        "link.publish('n1', controller_revision=link.records.revision)\n"
        "while link.records.node('n1').controller_revision != 1:\n    link.poll(); time.sleep(0.005)\n"
        "assert ticks > 3\nprint('done')"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, address, *tls], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        time.sleep(0.1)
        store.change(put(container(1)))
        assert process.communicate(timeout=10)[0] == b"done\n"
    finally:
        process.kill()
        process.wait()
    assert store.records.node("n1").controller_revision == 1
