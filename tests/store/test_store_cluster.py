"""Three servers that talk TLS: what is acknowledged stays, whoever dies; writers work again within five seconds."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from controller.problems import BulkheadError
from controller.records import Records
from controller.store import Link, Store, Tls, Unavailable
from controller.store import server as serving
from controller.store.server import Cluster
from controller.storecli import cluster_status, leave
from tests.fakes.stores import Server, container, opened, wait_for
from tests.store.test_store import allocate, follow_in_eventlet, put

pytestmark = pytest.mark.slow
WITHIN_S = 5.0


def authority(directory: Path, name: str) -> Tls:
    """A CA, and a key with a certificate of it."""
    key, certificate = directory / f"{name}-key.pem", directory / f"{name}.pem"
    ca_key, ca = directory / f"{name}-ca-key.pem", directory / f"{name}-ca.pem"
    request = directory / f"{name}.csr"
    elliptic = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    _openssl("req", "-x509", *elliptic, "-subj", f"/CN={name} CA", "-keyout", ca_key, "-out", ca, "-days", "2")
    _openssl("req", *elliptic, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
    _openssl(
        "x509",
        "-req",
        "-in",
        request,
        "-CA",
        ca,
        "-CAkey",
        ca_key,
        "-CAcreateserial",
        "-out",
        certificate,
        "-days",
        "2",
    )
    return Tls(key, certificate, ca)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


class Three:
    """A cluster of three."""

    def __init__(self, directory: Path) -> None:
        self.tls = authority(directory, "bulkhead")
        ports = free_ports(6)
        self.addresses = [f"ssl:127.0.0.1:{port}" for port in ports[:3]]
        raft = [f"ssl:127.0.0.1:{port}" for port in ports[3:]]
        self.servers = []
        for n in range(3):
            cluster = Cluster(raft[n], (raft[0],) if n else ())
            self.servers.append(Server(directory / str(n), [self.addresses[n]], self.tls, cluster))

    def start(self) -> Three:
        for server in self.servers:
            server.start()
        wait_for(lambda: all(self.status(server)["status"] == "cluster member" for server in self.servers), 20)
        return self

    def status(self, server: Server) -> dict[str, object]:
        try:
            return cluster_status(serving.control(server.places, "cluster/status", "Bulkhead"))
        except BulkheadError:
            return {"status": "", "role": ""}

    def leader(self) -> Server:
        found: list[Server] = []

        def looked() -> list[Server]:
            found[:] = [s for s in self.servers if s.running and self.status(s)["role"] == "leader"]
            return found

        wait_for(looked)
        return found[0]

    def stop(self) -> None:
        for server in self.servers:
            server.kill()


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Three]:
    made = Three(tmp_path)
    try:
        yield made.start()
    finally:
        made.stop()


class Load:
    """Threads that allocate ids until they are told to stop."""

    def __init__(self, stores: Sequence[Store], workers: int = 6) -> None:
        self.done: dict[str, tuple[str, int]] = {}
        self.lost: dict[str, bool] = {}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(stores[n % len(stores)], n)) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    def _work(self, store: Store, worker: int) -> None:
        for n in range(10_000):
            if self._stop.is_set():
                return
            who = f"{worker}-{n}"
            try:
                self.done[who] = store.change(allocate(who), 20)
            except Unavailable as exc:
                self.lost[who] = exc.doubtful
            time.sleep(0.002)

    def wait_for_more(self) -> float:
        """Until something more has been written; after how many seconds."""
        mark, begun = len(self.done), time.monotonic()
        wait_for(lambda: len(self.done) > mark + 1, 30)
        return time.monotonic() - begun

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def check(self, records: Records) -> None:
        """What was acknowledged is there, once, and what was refused is not."""
        held = {record.created_by: (record.id, record.revision) for record in records.containers}
        assert len(held) == len(records.containers), "a change was carried out twice"
        assert {who: held.get(who) for who in self.done} == self.done
        assert all(self.lost[who] for who in self.lost if who in held)
        assert set(held) <= set(self.done) | set(self.lost)


@pytest.mark.parametrize("lock", [False, True])
def test_the_leader_is_killed_under_load(three: Three, lock: bool) -> None:
    with (
        opened(*three.addresses, tls=three.tls, lock=lock) as one,
        opened(*three.addresses, tls=three.tls, lock=lock) as two,
    ):
        follower = Link(three.addresses, three.tls)
        load = Load([one, two])
        load.wait_for_more()
        for _ in range(2):
            leader = three.leader()
            leader.kill()
            assert load.wait_for_more() < WITHIN_S
            leader.start()
            wait_for(lambda leader=leader: three.status(leader)["role"] == "follower", 20)  # type: ignore[misc]
        load.stop()
        assert not load.lost
        load.check(one.records)
        wait_for(lambda: (follower.poll(), follower.records == one.records == two.records)[1])
        follower.publish("n1", controller_revision=7)
        wait_for(lambda: (follower.poll(), one.records.node("n1").controller_revision)[1] == 7)
        follower.close()
    for server in three.servers:
        link = Link([server.address])

        def whole(link: Link = link) -> bool:
            link.poll()
            return len(link.records.containers) == len(load.done)

        wait_for(whole)
        load.check(link.records)
        link.close()


def test_a_leader_that_hangs_is_left(three: Three) -> None:
    import os
    import signal

    with opened(*three.addresses, tls=three.tls) as store:
        store.change(put(container(1)))
        leader = three.leader()
        os.kill(leader.pid, signal.SIGSTOP)
        begun = time.monotonic()
        store.change(put(container(2)), 20)
        took = time.monotonic() - begun
        os.kill(leader.pid, signal.SIGCONT)
        store.change(put(container(3)), 20)
        assert [record.id for record in store.records.containers] == ["1", "2", "3"]
        assert took < 10


def test_without_a_majority_nothing_is_written_and_that_is_said(three: Three) -> None:
    with opened(*three.addresses, tls=three.tls) as store:
        store.change(put(container(1)))
        leader = three.leader()
        others = [server for server in three.servers if server is not leader]
        for server in others:
            server.kill()
        with pytest.raises(Unavailable, match="store"):
            store.change(put(container(2)), 3)
        for server in others:
            server.start()
        store.change(put(container(3)), 20)
        assert {"1", "3"} <= {record.id for record in store.records.containers}


def test_a_link_works_in_eventlets_loop_with_tls(tmp_path: Path) -> None:
    tls = authority(tmp_path, "bulkhead")
    address = f"ssl:127.0.0.1:{free_ports(1)[0]}"
    server = Server(tmp_path, [address], tls).start()
    try:
        with opened(address, tls=tls) as store:
            follow_in_eventlet(address, store, tls)
    finally:
        server.kill()


def test_who_has_no_certificate_of_ours_is_not_let_in(three: Three, tmp_path: Path) -> None:
    stranger = authority(tmp_path, "stranger")
    for tls in (stranger, stranger._replace(ca=three.tls.ca)):
        store = Store(three.addresses, tls)
        with pytest.raises(Unavailable):
            store.start(1)
        store.close()
    with pytest.raises(BulkheadError, match="cannot use"):
        Store(three.addresses, three.tls._replace(private_key=stranger.private_key))
    with pytest.raises(BulkheadError, match="needs --private-key"):
        Store(three.addresses)
    with pytest.raises(BulkheadError, match="would let anybody in"):
        serving.passive("tcp:10.0.0.1:1", None)


def test_a_server_leaves_and_the_rest_goes_on(three: Three) -> None:
    with opened(*three.addresses, tls=three.tls) as store:
        store.change(put(container(1)))
        leader = three.leader()
        done = CliRunner().invoke(leave, ["--run-dir", str(leader.places.run_dir)])
        assert (done.exit_code, done.output) == (0, "left the cluster; stop the server now\n")
        leader.kill()
        store.change(put(container(2)), 20)
        assert len(store.records.containers) == 2
