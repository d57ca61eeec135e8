"""A whole host whose API is used against it: by who may make containers, by files and stores that change underneath."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_agent_attacks import rich
from .test_api_grants import BODY, MONITORING, XRAY, GrantHost

TRY = """
import os, json, socket, subprocess
def tried(*command):
    return subprocess.run(command, capture_output=True).returncode
print(json.dumps({
    "uid": os.getuid(), "shadow": os.access("/etc/shadow", os.R_OK),
    "leave": tried("nsenter", "--net=/proc/1/ns/net", "true"), "link": tried("ip", "link", "set", "eth0", "down"),
    "store": [str(p) for p in (%r, %r) if os.access(p, os.R_OK | os.W_OK)],
    "environment": sorted(os.environ),
}), flush=True)
s = socket.create_server(("", 80))
while True:
    c, _ = s.accept(); c.recv(9); c.sendall(b"hi"); c.close()
"""


@pytest.fixture(scope="module")
def host() -> Iterator[GrantHost]:
    state = rich().replace("    host: 10.1.0.1\n", "    host: 10.1.0.1\n    dns: {}\n", 1)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        with GrantHost(Path(directory), state) as made:
            made.start("up")
            made.settle(60)
            made.until(made.answers, 20, "answering")
            yield made


@contextlib.contextmanager
def container(host: GrantHost, **body: object) -> Iterator[dict[str, object]]:
    """A container that was made by the API."""
    with host.client() as client:
        answer = client.post("/api/containers/create", json={"network": "privacy", **body})
        assert answer.status_code == 201, answer.text
        try:
            yield answer.json()
        finally:
            client.delete(f"/api/containers/{answer.json()['id']}")


def test_who_makes_containers_is_not_root_for_that(host: GrantHost) -> None:
    script = host.state_file.parent / "try.py"
    script.write_text(TRY % (f"{host.run_dir}/store.sock", f"{host.run_dir}/api.sock"))
    with container(host, name="trial", command=["/usr/bin/python3", str(script)]) as made:
        address, number = str(made["address"]), str(made["id"])
        host.until(lambda: host.asks(XRAY, address, 80) == "hi", 10, "listening on a low port")
        (log,) = Path(host.run_dir).rglob(f"container-{number}.log")
        said = json.loads(log.read_text().splitlines()[0])
        assert said["uid"] > 1 << 29 and not said["shadow"] and said["leave"] != 0 and said["link"] != 0
        assert said["store"] == [] and not [name for name in said["environment"] if "BULKHEAD" in name]


def test_a_grant_ends_in_time_though_the_controller_hangs(host: GrantHost) -> None:
    """The agent takes the passage away, which nothing needs any more."""
    with host.client() as client:
        body = {"name": "auditor", "scopes": ["approve", "read"]}
        token = client.post("/api/tokens", json=body).raise_for_status().json()["token"]
        host.listen(XRAY, 8080)
        number = client.post("/api/grants", json={**BODY, "duration_s": 3}).raise_for_status().json()["id"]
        with host.client(token) as auditor:
            assert auditor.post(f"/api/grants/{number}/approve", json={}).status_code == 200
        end = time.monotonic() + 3
        assert host.asks(MONITORING, "10.0.0.102", 8080) == "hi"
        controller = str(host.process("controller"))
        host.machine.run("kill", "-STOP", controller)
        try:
            host.until(lambda: host.asks(MONITORING, "10.0.0.102", 8080) != "hi", 10, "shut")
            assert time.monotonic() < end + 2 + 1.5  # what ASK itself may take to find out
        finally:
            host.machine.run("kill", "-CONT", controller)
        host.until(lambda: client.get(f"/api/grants/{number}").json()["realized"], 10, "realized")
        assert "zone=" not in host.ovs.appctl("dpctl/dump-conntrack")
