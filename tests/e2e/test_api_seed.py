"""What the operators' document promises of containers that are created with curl, on a host that was just brought up."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .test_agent_attacks import rich
from .test_up import UpHost

# Word for word.
TOR_RELAY = """curl -X POST http://localhost:9573/api/containers/create \\
  -H "Content-Type: application/json" \\
  -d '{
    "name": "tor-relay",
    "network": "privacy",
    "services": [
      { "name": "tor-relay", "protocol": "tcp", "port": 9001 }
    ]
  }'"""
PROMETHEUS = """curl -X POST http://localhost:9573/api/containers/create \\
  -H "Content-Type: application/json" \\
  -d '{
    "name": "prometheus",
    "network": "management",
    "services": [
      { "name": "prometheus", "protocol": "tcp", "port": 9090 }
    ]
  }'"""
ASK = """
import socket, sys
from scapy.layers.dns import DNS, DNSQR
server = next(line.split()[1] for line in open('/etc/resolv.conf') if line.startswith('nameserver'))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(2)
    sock.sendto(bytes(DNS(id=7, rd=1, qd=DNSQR(qname=sys.argv[1], qtype=sys.argv[2]))), (server, 53))
    answer = DNS(sock.recv(4096))
for record in answer.an or ():
    print(f'{record.target.decode()}:{record.port}' if record.type == 33 else getattr(record.rdata, 'decode', lambda: record.rdata)())
"""


class SeedHost(UpHost):
    """A fresh host with names in both networks."""

    with_api = True

    def create(self, curl: str) -> tuple[int, dict[str, Any]]:
        """What a curl call answers: status and body."""
        out = self.machine.sh(curl.replace("curl ", "curl -sS -w '\\n%{http_code}' ", 1))
        text, _, status = out.rpartition("\n")
        return int(status), json.loads(text)

    def name(self, container: str, name: str, kind: str = "A") -> list[str]:
        """What a container finds for a name."""
        return self.inside(container, sys.executable, "-c", ASK, name, kind).split()

    def connects(self, container: str, address: str, port: int) -> bool:
        """Whether a TCP connection is made."""
        script = f"import socket; socket.create_connection(({address!r}, {port}), 2)"
        command = self.machine.command("ip", "netns", "exec", f"bulkhead-{container}", sys.executable, "-c", script)
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def host() -> Iterator[SeedHost]:
    state = rich().replace("    host: 10.1.0.1\n", "    host: 10.1.0.1\n    dns: {}\n", 1)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o711)
        with SeedHost(Path(directory), state) as made:
            made.start("up")
            made.settle(60)
            made.until(made.answers, 20, "answering")
            yield made


CASES = [
    (TOR_RELAY, "privacy", range(100, 200), "100", "200", 9001),
    (PROMETHEUS, "management", range(200, 300), "200", "100", 9090),
]


@pytest.mark.parametrize(("curl", "network", "ids", "neighbour", "stranger", "port"), CASES)
def test_a_container_is_created_as_the_document_says(
    host: SeedHost, curl: str, network: str, ids: range, neighbour: str, stranger: str, port: int
) -> None:
    status, made = host.create(curl)
    answered = time.monotonic()
    assert status == 201 and int(made["id"]) in ids and made["network"] == network and made["state"] == "ready"
    name, address = made["name"], made["address"]
    # Registered: a name, its service, and back; in its own network alone.
    assert host.name(neighbour, f"{name}.{network}.internal") == [address]
    assert time.monotonic() - answered < 5  # a second is the bar; it costs a process or two to ask
    assert host.name(neighbour, f"_{name}._tcp.{network}.internal", "SRV") == [f"{name}.{network}.internal.:{port}"]
    back = ".".join(reversed(address.split("."))) + ".in-addr.arpa"
    assert host.name(neighbour, back, "PTR") == [f"{name}.{network}.internal."]
    assert host.name(stranger, f"{name}.{network}.internal") == []
    # Attached: its service is reached from its network, not from the other.
    script = f"import socket, time; s = socket.create_server(('', {port})); time.sleep(600)"
    inside = host.machine.command("ip", "netns", "exec", f"bulkhead-{made['id']}", sys.executable, "-c", script)
    host._started.append(subprocess.Popen(inside, text=True))
    host.until(lambda: host.connects(neighbour, address, port), 10, "reached")
    assert not host.connects(stranger, address, port)
    assert not host.reaches(made["id"], {"privacy": "10.1.0.201", "management": "10.0.0.102"}[network])
    listed = host.api(f"services?network={network}")["services"]
    (service,) = (one for one in listed if one["container_id"] == made["id"])
    assert (service["fqdn"], service["port"]) == (f"{name}.{network}.internal", port)
    # And gone with it.
    host.machine.sh(f"curl -sS -f -X DELETE http://localhost:9573/api/containers/{made['id']}")
    assert host.name(neighbour, f"{name}.{network}.internal") == []
    assert host.name(neighbour, f"_{name}._tcp.{network}.internal", "SRV") == []
    assert made["id"] not in {one["container_id"] for one in host.api("services")["services"]}
