"""The datapath's flow cache does not grow with connections: one cached flow serves all of a pair's."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tests.ovs.node import Endpoint, Node


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """A thousand connections have two thousand ends, all in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def cached(node: Node) -> int:
    """Flows in the datapath's cache."""
    return len([line for line in node.ovs.appctl("dpctl/dump-flows").splitlines() if "actions:" in line])


def connect_all(source: Endpoint, target: Endpoint, port: int, count: int) -> int:
    """So many TCP connections one after the other in time, all open together; answers how many came about."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(target.socket())
        server.bind((target.address, port))
        server.listen(2048)
        clients = {}
        for _ in range(count):
            client = stack.enter_context(source.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.connect_ex((target.address, port))
            clients[client.fileno()] = client
            with contextlib.suppress(BlockingIOError):
                while True:
                    stack.enter_context(server.accept()[0])
        poll = select.poll()
        for fd in clients:
            poll.register(fd, select.POLLOUT)
        done = 0
        deadline = time.monotonic() + 10
        while clients and time.monotonic() < deadline:
            for fd, _ in poll.poll(500):
                poll.unregister(fd)
                done += not clients.pop(fd).getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return done


@pytest.mark.parametrize(
    ("source", "target"),
    [("xray", "inet"), ("gateway", "inet"), ("xray", "gateway"), ("mcp", "api"), ("peer_priv", "inet")],
)
def test_a_thousand_connections_need_no_more_cached_flows_than_a_hundred(node: Node, source: str, target: str) -> None:
    sizes = []
    for count in (100, 1000):
        node.ovs.appctl("revalidator/purge")
        assert connect_all(node[source], node[target], 8443, count) == count
        sizes.append(cached(node))
    print(f"{source} > {target}: {sizes}")
    few, many = sizes
    assert many <= few + 10
    assert few < 40
