"""A grant from its request to its end, on a whole host over the API: what it opens, for whom, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .test_agent_attacks import rich
from .test_up import UpHost

XRAY, MONITORING = "102", "202"
BODY = {"source": MONITORING, "target": XRAY, "protocol": "tcp", "port": 8080, "reason": "health", "duration_s": 600}
SERVER = (
    "import socket, sys, threading\n"
    "s = socket.create_server(('', int(sys.argv[1])))\n"
    "def talk(c):\n"
    "    while data := c.recv(99): c.sendall(data)\n"
    "while True: threading.Thread(target=talk, args=(s.accept()[0],), daemon=True).start()\n"
)
ASK = (
    "import socket, sys\n"
    "try:\n"
    "    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.5); s.sendall(b'hi'); print(s.recv(9).decode())\n"
    "except OSError as exc: print(type(exc).__name__)\n"
)
TALK = (
    "import socket, sys, time\n"
    "s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 2); s.settimeout(2)\n"
    "while True:\n"
    "    s.sendall(b'x'); s.recv(9); print(time.monotonic(), flush=True); time.sleep(0.02)\n"
)


class GrantHost(UpHost):
    """A host with the API, servers in containers, and a second person who may approve."""

    with_api = True

    def client(self, token: str = "") -> httpx.Client:
        """Asks as root, or with a token."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = httpx.HTTPTransport(uds=str(self.run_dir / "api.sock"))
        return httpx.Client(transport=transport, base_url="http://localhost", timeout=60, headers=headers)

    def listen(self, container: str, port: int) -> None:
        """Have a container echo on a port."""
        command = self.machine.command(
            "ip", "netns", "exec", f"bulkhead-{container}", sys.executable, "-c", SERVER, str(port)
        )
        self._started.append(subprocess.Popen(command, text=True))
        self.until(lambda: self.asks(container, "127.0.0.1", port) == "hi", 10, "listening")

    def asks(self, container: str, address: str, port: int) -> str:
        """What a container gets from an address: `hi`, or the name of the error."""
        return self.inside(container, sys.executable, "-c", ASK, address, str(port)).strip()

    def resolves(self, container: str, name: str) -> str:
        """The address a container finds for a name, empty for none."""
        script = f"import socket\ntry: print(socket.gethostbyname({name!r}))\nexcept OSError: pass"
        return self.inside(container, sys.executable, "-c", script).strip()

    def matrix(self) -> dict[str, object]:
        """Who can reach whom, as the API proves it."""
        with self.client() as client:
            found: dict[str, object] = client.get("/api/reachability").json()
        return found


@pytest.fixture(scope="module")
def host() -> Iterator[GrantHost]:
    state = rich().replace("    host: 10.1.0.1\n", "    host: 10.1.0.1\n    dns: {}\n", 1)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        with GrantHost(Path(directory), state) as made:
            made.start("up")
            made.settle(60)
            made.until(made.answers, 20, "answering")
            for container, port in ((XRAY, 8080), (XRAY, 8081), ("100", 8080), (MONITORING, 8080), ("201", 8080)):
                made.listen(container, port)
            yield made


@pytest.fixture(scope="module")
def auditor(host: GrantHost) -> str:
    """A token of somebody who approves."""
    with host.client() as client:
        asked = {"name": "auditor", "scopes": ["read", "approve"], "expires_in_s": 3600}
        return str(client.post("/api/tokens", json=asked).raise_for_status().json()["token"])


@contextlib.contextmanager
def granted(host: GrantHost, auditor: str, **changes: object) -> Iterator[str]:
    """A grant that is open; its id."""
    with host.client() as asks, host.client(auditor) as approves:
        made = asks.post("/api/grants", json={**BODY, **changes}).raise_for_status().json()
        assert made["state"] == "requested"
        answer = approves.post(f"/api/grants/{made['id']}/approve", json={})
        assert answer.status_code == 200, answer.text
        assert answer.json()["realized"], answer.json()
        try:
            yield made["id"]
        finally:
            asks.post(f"/api/grants/{made['id']}/revoke", json={})


TABLE = [
    # from, to, port, through the grant
    (MONITORING, "10.0.0.102", 8080, True),
    (MONITORING, "10.0.0.102", 8081, False),
    (MONITORING, "10.0.0.100", 8080, False),
    ("201", "10.0.0.102", 8080, False),
    ("200", "10.0.0.102", 8080, False),
    (XRAY, "10.1.0.202", 8080, False),
    (XRAY, "10.1.0.201", 8080, False),
    ("100", "10.1.0.202", 8080, False),
]


def seen(host: GrantHost) -> dict[tuple[str, str, int], bool]:
    """What passes of the table's pairs."""
    return {(a, b, port): host.asks(a, b, port) == "hi" for a, b, port, _ in TABLE}


def test_a_grant_opens_one_cell_and_nothing_else(host: GrantHost, auditor: str) -> None:
    assert not any(seen(host).values())
    before = host.matrix()
    ports = host.ovs.vsctl("list-ports", "vmbr0").split()
    with granted(host, auditor):
        assert seen(host) == {(a, b, port): good for a, b, port, good in TABLE}
        assert host.matrix() != before
        assert host.resolves(MONITORING, "xray.privacy.internal") == "10.0.0.102"
        assert host.resolves(MONITORING, "gateway.privacy.internal") == ""
        assert host.resolves(XRAY, "monitoring.management.internal") == ""
        assert len(set(host.ovs.vsctl("list-ports", "vmbr0").split()) - set(ports)) == 1
    assert not any(seen(host).values())
    assert host.matrix() == before
    assert host.ovs.vsctl("list-ports", "vmbr0").split() == ports
    assert host.resolves(MONITORING, "xray.privacy.internal") == ""
    assert "zone=" not in host.ovs.appctl("dpctl/dump-conntrack")


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_live_connections_end_with_the_grant(host: GrantHost, auditor: str, end: str) -> None:
    with granted(host, auditor, duration_s=600 if end == "revoked" else 4) as grant, host.client() as client:
        command = host.machine.command(
            "ip", "netns", "exec", f"bulkhead-{MONITORING}", sys.executable, "-c", TALK, "10.0.0.102", "8080"
        )
        talker = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert talker.stdout is not None
        talked = [float(talker.stdout.readline())]
        began = time.monotonic()
        while talked[-1] <= began:  # it does talk when the end comes
            talked.append(float(talker.stdout.readline()))
        if end == "revoked":
            assert client.post(f"/api/grants/{grant}/revoke", json={}).status_code == 200
        else:
            host.until(lambda: client.get(f"/api/grants/{grant}").json()["state"] == "expired", 10, "expired")
        ended = time.monotonic()
        talked += [float(line) for line in talker.communicate(timeout=20)[0].split()]
        assert began < talked[-1] < ended + 2.0
        assert host.asks(MONITORING, "10.0.0.102", 8080) != "hi"
        host.until(lambda: "zone=" not in host.ovs.appctl("dpctl/dump-conntrack"), 5, "forgotten")


def test_nobody_approves_what_he_has_asked_for(host: GrantHost, auditor: str) -> None:
    with host.client() as asks:
        made = asks.post("/api/grants", json=BODY).json()
        answer = asks.post(f"/api/grants/{made['id']}/approve", json={})
        assert answer.status_code == 403 and answer.headers["content-type"] == "application/problem+json"
        assert host.asks(MONITORING, "10.0.0.102", 8080) != "hi"
        with host.client(auditor) as approves:
            assert approves.post(f"/api/grants/{made['id']}/deny", json={}).status_code == 200
            assert approves.post(f"/api/grants/{made['id']}/approve", json={}).status_code == 409
            assert approves.post("/api/grants", json=BODY).status_code == 403


def test_two_grants_in_both_directions_and_one_ends(host: GrantHost, auditor: str) -> None:
    with granted(host, auditor):
        with granted(host, auditor, source=XRAY, target="201"):
            assert host.asks(MONITORING, "10.0.0.102", 8080) == "hi"
            assert host.asks(XRAY, "10.1.0.201", 8080) == "hi"
            assert host.asks(XRAY, "10.1.0.202", 8080) != "hi"
        assert host.asks(MONITORING, "10.0.0.102", 8080) == "hi"
        assert host.asks(XRAY, "10.1.0.201", 8080) != "hi"


def test_commands_know_what_was_granted_and_created(host: GrantHost, auditor: str) -> None:
    """`plan` finds nothing to do, `why` and `verify` take what the store holds for declared."""
    run = host.options("run")
    made = host.api("containers/create", {"name": "relay", "network": "privacy"})
    with granted(host, auditor):
        done = host.bulkhead("why", "relay", "gateway", *run)
        assert done.returncode == 0, done.stderr
        assert host.bulkhead("why", "monitoring", "relay", *run).returncode == 1
        plan = host.bulkhead("plan", str(host.state_file), *host.options("run", "state", "ovsdb"))
        assert (plan.returncode, plan.stderr) == (0, ""), plan.stdout
        verdict = host.bulkhead("verify", str(host.state_file), *host.options("run", "ovsdb"), "--json")
        bad = [line for line in json.loads(verdict.stdout)["checks"] if line["status"] == "bad"]
        assert not bad
    host.machine.sh(f"curl -sS -f -X DELETE http://127.0.0.1:9573/api/containers/{made['id']}")
