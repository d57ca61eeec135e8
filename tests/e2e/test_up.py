"""`bulkhead up`: store, controller, agent and API together on a bare host."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.agent.identity import NUMBER
from lab.ovs import die_with_parent

from .agent_host import BareHost, difference, stop

CURL = "curl -sS -m 20 -H 'Content-Type: application/json'"


class UpHost(BareHost):
    """Asks the API as well."""

    with_api = True

    def api(self, what: str, body: object = None, more: str = "") -> Any:
        """GET, or POST a body, on loopback."""
        data = f"-d '{json.dumps(body)}'" if body is not None else ""
        return json.loads(self.machine.sh(f"{CURL} {more} {data} 'http://127.0.0.1:9573/api/{what}'"))

    def process(self, name: str) -> int:
        """The id of one of the processes, as it is inside."""
        words = {"store": "^ovsdb-server .*bulkhead.db"}.get(name, f"import main; main.. {name} ")
        found = self.machine.run("pgrep", "-f", words).split()
        assert len(found) == 1, (name, found)
        return int(found[0])

    def answers(self) -> bool:
        """Whether the API does."""
        try:
            return bool(self.api("containers")["containers"])
        except Exception:
            return False


@pytest.fixture
def host(tmp_path: Path) -> Iterator[UpHost]:
    with UpHost(tmp_path) as made:
        yield made


def test_all_of_it_comes_up_works_and_goes(host: UpHost) -> None:
    before = host.facts()
    state = host.state_file.read_text()
    host.state_file.write_text(
        state.replace('    container: "100"\n', '    container: "100"\n    endpoint: 192.0.2.1:51820\n', 1)
    )
    up = host.start("up")
    host.settle()
    host.until(host.answers, 15, "answering")
    assert host.machine.run("stat", "-c", "%u", f"/proc/{host.process('api')}").strip() == str(NUMBER)
    # A container, with a service that is looked at.
    body = {"name": "relay", "network": "privacy", "command": ["/usr/bin/python3", "-m", "http.server", "8080"],
            "services": [{"name": "www", "protocol": "tcp", "port": 8080, "check": "http:/"}]}  # fmt: skip
    made = host.api("containers/create", body)
    assert made["state"] == "ready", made
    host.until(lambda: host.reaches("102", made["address"]), 5, "reachable")

    def health() -> str:
        return str(next(one["health"] for one in host.api("services")["services"] if one["name"] == "www"))

    host.until(lambda: health() == "up", 10, "up")
    # A client of the VPN: the server knows it when the API says so, and no more when it says so.
    client = host.api("vpn/clients", {"name": "phone"})
    assert "PrivateKey" in client["config"]
    assert f"{client['address']}/32" in host.inside("100", "wg", "show", "wg0", "allowed-ips")
    host.machine.sh(f"{CURL} -f -X DELETE http://127.0.0.1:9573/api/vpn/clients/phone")
    assert host.inside("100", "wg", "show", "wg0", "allowed-ips").strip() == ""
    # Inside its container it answers with TLS, and only in its own network.
    asked = "curl -sk -m 3 https://10.1.0.201:9573/healthz"
    host.until(lambda: "ok" in host.machine.sh(f"ip netns exec bulkhead-200 {asked} || true"), 10, "in its container")
    assert "ok" not in host.machine.sh(f"ip netns exec bulkhead-102 {asked} || true")
    assert stop(up) == 0
    done = host.bulkhead("down", str(host.state_file), *host.options("run", "state", "ovsdb"))
    assert (done.returncode, done.stderr) == (0, "")
    assert difference(before, host.facts()) == []
    assert not host.run_dir.exists() and (host.state_dir / "store" / "bulkhead.db").exists()
    # What was made is there again.
    host.start("up")
    host.settle()
    host.until(host.answers, 15, "answering")
    host.until(lambda: host.reaches("102", made["address"]), 5, "reachable again")


def test_each_that_is_killed_comes_back(host: UpHost) -> None:
    host.start("up")
    host.settle()
    host.until(host.answers, 15, "answering")
    for name in ("store", "api", "controller", "agent"):
        pid = host.process(name)
        host.machine.run("kill", "-9", str(pid))
        host.until(lambda n=name, p=pid: _runs(host, n) not in (None, p), 10, f"{name} again")  # type: ignore[misc]
        assert host.reaches("100", "10.0.0.102")
    host.settle()
    host.until(
        lambda: host.api("containers/create", {"name": "late", "network": "privacy"})["name"] == "late", 20, "creating"
    )
    text = host.log("up")
    for name in ("store", "api", "controller", "agent"):
        assert f"the {name} has ended with exit code -9; starting it again in 1 s" in text


def _runs(host: UpHost, name: str) -> int | None:
    try:
        return host.process(name)
    except Exception:
        return None


def test_killed_as_a_whole_nothing_is_left_running_and_the_next_goes_on(host: UpHost) -> None:
    up = host.start("up")
    host.settle()
    host.until(host.answers, 15, "answering")
    inside = int(host.machine.sh("pgrep -f 'import main; main.. up '").split()[0])
    host.machine.run("kill", "-9", str(inside))
    up.wait(10)
    names = "store", "controller", "agent", "api"
    host.until(lambda: all(_runs(host, name) is None for name in names), 15, "ended")
    host.start("up")
    host.settle()
    host.until(host.answers, 15, "answering")


def test_a_state_file_that_the_api_cannot_read_is_told(host: UpHost) -> None:
    host.state_file.chmod(0o600)
    done = host.bulkhead("up", str(host.state_file), *host.options("run", "state", "events", "ovsdb"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"chgrp {NUMBER} {host.state_file}; chmod g+r {host.state_file}" in " ".join(done.stderr.split())
    assert "--no-api" in done.stderr


def test_down_stops_all_of_them(host: UpHost) -> None:
    before = host.facts()
    up = host.start("up")
    host.settle()
    host.until(host.answers, 15, "answering")
    began = time.monotonic()
    done = host.bulkhead("down", "--purge", str(host.state_file), *host.options("run", "state", "ovsdb"))
    assert (done.returncode, done.stderr) == (0, "") and up.wait(5) == 0
    assert time.monotonic() - began < 15
    assert difference(before, host.facts()) == [] and not host.state_dir.exists() and not host.run_dir.exists()


def test_what_the_api_may_and_may_not_touch(host: UpHost) -> None:
    host.start("up")
    host.settle()
    host.until(host.answers, 15, "answering")
    user = f"setpriv --reuid={NUMBER} --regid={NUMBER} --clear-groups --no-new-privs"
    for path in (
        host.state_dir / "keys",
        host.state_dir / "store",
        host.run_dir / "store",
        host.run_dir / "agent/programs",
    ):
        assert host.machine.sh(f"{user} ls {path} 2>&1 || true").endswith("Permission denied\n")
    assert "Permission denied" in host.machine.sh(f"{user} ls {host.state_dir} 2>&1 || true")
    for name in ("controller.sock", "store.sock", "agent"):
        taken = host.machine.sh(f"{user} mv {host.run_dir / name} {host.run_dir / 'x'} 2>&1 || true")
        assert "not permitted" in taken
    for log in (host.events_dir, host.state_dir / "events"):
        assert "events-" in host.machine.sh(f"{user} ls {log}")
        assert "Permission denied" in host.machine.sh(f"{user} touch {log}/x 2>&1 || true")
    assert stat.S_IMODE((host.run_dir / "agent/vpn.pub").stat().st_mode) == 0o644


def test_without_store_and_api(host: UpHost) -> None:
    process = host.start("up", None, "--no-store")
    host.settle()
    assert _runs(host, "store") is None and _runs(host, "api") is None
    assert not (host.run_dir / "store.sock").exists()
    host.machine.run("kill", f"-{int(signal.SIGHUP)}", str(host.process("up")))
    time.sleep(0.5)
    assert _runs(host, "agent") is not None
    stop(process)


def test_with_a_store_elsewhere_none_is_run(host: UpHost) -> None:
    tls = host.directory / "tls"
    tls.mkdir(mode=0o711)
    host.machine.sh(
        f"""cd {tls}; new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
        openssl req -x509 $new -subj /CN=CA -keyout ca.key -out ca.pem -days 2 2>/dev/null
        openssl req $new -subj /CN=store -keyout key.pem -out request 2>/dev/null
        openssl x509 -req -in request -CA ca.pem -CAkey ca.key -out cert.pem -days 2 2>/dev/null"""
    )
    (tls / "key.pem").chmod(0o600)
    files = ["--private-key", str(tls / "key.pem"), "--certificate", str(tls / "cert.pem")]
    elsewhere = host.directory / "elsewhere"
    words = [
        "store",
        "serve",
        "--run-dir",
        str(elsewhere),
        "--state-dir",
        str(elsewhere),
        "--listen",
        "ssl:127.0.0.1:6690",
    ]
    process = subprocess.Popen(host.command(*words, *files, "--ca", str(tls / "ca.pem")), start_new_session=True, preexec_fn=die_with_parent)  # fmt: skip
    host._started.append(process)
    mine = ["--store-private-key", files[1], "--store-certificate", files[3], "--store-ca", str(tls / "ca.pem")]
    store = ["--store", "ssl:127.0.0.1:6690", *mine]
    done = host.bulkhead("up", str(host.state_file), *host.options("run", "state", "events", "ovsdb"), *store)
    assert done.returncode == 2 and f"cannot read {files[1]}" in " ".join(done.stderr.split())
    host.machine.sh(f"chgrp {NUMBER} {files[1]}; chmod 640 {files[1]}")
    host.start("up", None, *store)
    host.settle()
    host.until(host.answers, 15, "answering")
    assert not (host.run_dir / "store.sock").exists()
    assert host.api("containers/create", {"name": "relay", "network": "privacy"})["state"] == "ready"
