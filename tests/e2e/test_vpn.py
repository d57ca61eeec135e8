"""`bulkhead vpn` on a host that has been built: clients come, connect, and go."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lab.ovs import LabError, die_with_parent

from .agent_host import BareHost
from .conftest import STATE_FILE
from .host import _SERVE, ROOT, Answer

HOST, LAPTOP, SERVER = "192.0.2.1", "192.0.2.2", "10.8.0.1"
POOL = "10.8.0.0/29"
WORLD = f"""
ip netns add laptop; ip link add up0 type veth peer name up0 netns laptop
ip address add {HOST}/24 dev up0; ip link set up0 up; ip route add default via {LAPTOP}
ip -n laptop address add {LAPTOP}/24 dev up0; ip -n laptop link set up0 up; ip -n laptop link set lo up
"""


class VpnHost(BareHost):
    """The example's host, with an uplink to a laptop."""

    def __init__(self, directory: Path) -> None:
        tree = yaml.safe_load(STATE_FILE.read_text())
        self.secrets = {"warp": _new("genkey"), "shared": _new("genpsk")}
        for name, secret in self.secrets.items():
            (directory / name).write_text(secret)
            (directory / name).chmod(0o600)
        tree["wireguard"]["warp_tunnel"] |= {
            "private_key_file": str(directory / "warp"),
            "addresses": ["172.16.0.2/32"],
            "peers": [
                {
                    "public_key": _new("pubkey", _new("genkey")),
                    "preshared_key_file": str(directory / "shared"),
                    "allowed_ips": ["0.0.0.0/0"],
                    "endpoint": f"{LAPTOP}:2408",
                }
            ],
        }
        tree["wireguard"]["vpn_server"] |= {"endpoint": f"{HOST}:51820", "ip_pool": POOL}
        super().__init__(directory, yaml.safe_dump(tree, sort_keys=False))
        self._asked: subprocess.Popen[str] | None = None

    def vpn(self, what: str, *arguments: str, file: Path | None = None) -> Answer:
        """`bulkhead vpn`, in one process for all: starting Python takes longer than what is tested."""
        if self._asked is None:
            self._asked = subprocess.Popen(
                self.machine.command(sys.executable, "-c", _SERVE),
                env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            self._started.append(self._asked)
        assert self._asked.stdin is not None and self._asked.stdout is not None
        told = ["vpn", what, *self.options("state"), "--file", str(file or self.state_file), *arguments]
        self._asked.stdin.write(json.dumps(told) + "\n")
        self._asked.stdin.flush()
        code, out, err, exception = json.loads(self._asked.stdout.readline())
        assert exception == "None" or exception.startswith("SystemExit("), exception
        return Answer(code, out, err)

    def vpn_alone(self, what: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The same, in a process of its own."""
        return self.bulkhead("vpn", what, *self.options("state"), "--file", str(self.state_file), *arguments)

    def add(self, name: str) -> str:
        done = self.vpn("add", name)
        assert done.code == 0, done.err
        return done.out

    def remove(self, name: str) -> None:
        done = self.vpn("remove", name)
        assert (done.code, done.out) == (0, f"client {name} is removed and cut off\n"), done.err

    def seen(self, name: str) -> dict[str, object]:
        (row,) = (row for row in json.loads(self.vpn("list", "--json").out) if row["name"] == name)
        return dict(row)

    def dial(self, configuration: str) -> None:
        """Be the client that the file is for, in the laptop."""
        wg, address = [], ""
        for line in configuration.splitlines():
            key = line.partition(" = ")[0]
            if key == "Address":
                address = line.partition(" = ")[2]
            elif key not in ("DNS", "MTU"):
                wg.append(line)
        mtu = re.search(r"^MTU = (\d+)$", configuration, re.MULTILINE)
        assert mtu is not None
        (self.directory / "laptop.conf").write_text("\n".join(wg))
        self.machine.sh(
            f"""
            ip -n laptop link show wg1 >/dev/null 2>&1 || {{ ip netns exec laptop wireguard-go wg1 >/dev/null 2>&1; }}
            wg setconf wg1 {self.directory}/laptop.conf
            ip -n laptop address flush dev wg1
            ip -n laptop address add {address} dev wg1; ip -n laptop link set wg1 mtu {mtu[1]} up
            ip -n laptop route replace 10.8.0.0/24 dev wg1"""
        )

    def hears(self, address: str = SERVER, wait_s: float = 1) -> bool:
        """Whether the laptop gets an answer through the tunnel."""
        try:
            self.machine.sh(f"ip netns exec laptop ping -n -q -c1 -W{wait_s} {address} >/dev/null")
        except LabError:
            return False
        return True


def _new(what: str, given: str | None = None) -> str:
    return subprocess.run(["wg", what], input=given, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VpnHost]:
    with VpnHost(tmp_path_factory.mktemp("vpn")) as built:
        built.machine.sh(WORLD)
        built.start("up")
        built.settle()
        yield built


def test_a_client_connects_is_seen_and_is_cut_off(host: VpnHost) -> None:
    configuration = host.add("laptop")
    row = host.seen("laptop")
    assert (row["connected"], row["handshake_age_s"], row["address"]) == (False, None, "10.8.0.2")
    host.dial(configuration)
    took = host.until(host.hears, 20, "connected")
    print(f"connected {took:.2f} s after it dialled")
    row = host.seen("laptop")
    assert row["connected"] and float(str(row["handshake_age_s"])) < 30 and str(row["endpoint"]).startswith(LAPTOP)
    assert int(str(row["received"])) > 0 and int(str(row["sent"])) > 0
    text = host.vpn("list").out
    assert re.search(r"laptop +10\.8\.0\.2 +\d+ s ago +[\d.]+ K?i?B +[\d.]+ K?i?B +192\.0\.2\.2:\d+", text), text
    assert host.hears()
    began = time.monotonic()
    host.remove("laptop")
    while host.hears(wait_s=0.3):
        assert time.monotonic() - began < 2, "a client that was removed is still connected"
    print(f"cut off {time.monotonic() - began:.2f} s after it was removed")
    assert not host.hears()
    # Another one takes over its address, and not its key.
    again = host.add("tablet")
    assert "Address = 10.8.0.2/32" in again
    assert not host.hears()
    host.dial(again)
    host.until(host.hears, 20, "connected")
    host.remove("tablet")


def test_many_names_and_no_more_than_the_pool_has(host: VpnHost) -> None:
    names = [f"many{n}" for n in range(5)]
    addresses = [str(json.loads(host.vpn("add", name, "--json").out)["address"]) for name in names]
    assert addresses == [f"10.8.0.{n}" for n in range(2, 7)]
    done = host.vpn("add", "toomany")
    assert (done.code, done.out) == (1, "")
    assert f"all 5 addresses of {POOL} are taken; remove a client, or widen the pool" in done.err
    host.remove("many2")
    assert "Address = 10.8.0.4/32" in host.add("many2b")
    for name in (*names[:2], "many2b", *names[3:]):
        host.remove(name)
    assert json.loads(host.vpn("list", "--json").out) == []


def test_added_at_once(host: VpnHost) -> None:
    done: list[subprocess.CompletedProcess[str]] = []
    names = ["one", "two", "three", "same", "same"]
    threads = [
        threading.Thread(target=lambda n=name: done.append(host.vpn_alone("add", n, "--json"))) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = [json.loads(one.stdout) for one in done if one.returncode == 0]
    assert sorted(one.returncode for one in done) == [0, 0, 0, 0, 1]
    assert sorted(one["name"] for one in good) == ["one", "same", "three", "two"]
    assert len({one["address"] for one in good}) == 4
    for one in good:
        host.remove(one["name"])


def test_what_is_refused(host: VpnHost) -> None:
    host.add("Laptop")
    done = host.vpn("add", "lapTop")
    assert (done.code, done.out) == (1, "") and "there is a client lapTop already" in done.err
    done = host.vpn("remove", "nobody")
    assert done.code == 1 and "there is no client 'nobody'; there are: laptop" in done.err
    for name in ("", "-a", "a b", "a/../b", "../../etc/passwd", "a" * 64, "ä", "a\nb"):
        done = host.vpn("add", "--", name)
        assert done.code == 1 and "is no name for a client" in done.err, name
        done = host.vpn("remove", "--", name)
        assert done.code == 1 and "there is no client" in done.err, name
    for endpoint in (
        "",
        "host",
        ":1",
        "host:0",
        "host:65536",
        "host:²",
        "host:1\nPostUp = x:1",
        "h" * 5 + ":" + "9" * 5000,
    ):
        done = host.vpn("add", "phone", "--endpoint", endpoint)
        assert done.code == 2 and "is not HOST:PORT" in done.err, endpoint
    host.remove("laptop")


def test_a_file_without_vpn_or_endpoint(host: VpnHost, tmp_path: Path) -> None:
    tree = yaml.safe_load(host.state_file.read_text())
    del tree["wireguard"]["vpn_server"]["endpoint"]
    file = tmp_path / "node.yaml"
    file.write_text(yaml.safe_dump(tree))
    done = host.vpn("add", "phone", file=file)
    assert done.code == 2 and "give --endpoint HOST:PORT, or write it in the file" in done.err
    done = host.vpn("add", "phone", "--endpoint", "vpn.example.org:443", file=file)
    assert done.code == 0 and "Endpoint = vpn.example.org:443\n" in done.out
    host.remove("phone")
    del tree["wireguard"]["vpn_server"]
    file.write_text(yaml.safe_dump(tree))
    for what in (("add", "phone"), ("list",), ("remove", "phone")):
        done = host.vpn(*what, file=file)
        assert done.code == 2 and "has no VPN server; declare one under wireguard.vpn_server" in done.err
    done = host.vpn("list", file=tmp_path / "missing.yaml")
    assert done.code == 1 and "no such file" in done.err


def test_not_root(host: VpnHost) -> None:
    script = "import os; os.setuid(65534); from controller.cli import main; main()"
    command = host.command("vpn", "list", "--file", str(host.state_file))
    command[command.index("-c") + 1] = script
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 2 and "only root may read; run it with sudo" in done.stderr, done.stderr


def test_a_qr_code(host: VpnHost) -> None:
    done = host.vpn("add", "phone", "--qr")
    assert done.code == 0
    configuration, _, code = done.out.partition("PersistentKeepalive = 25\n")
    assert "PrivateKey = " in configuration and code.count("█") > 200
    assert "█" not in host.add("other")
    host.remove("phone")
    host.remove("other")


def test_files_are_private(host: VpnHost) -> None:
    host.add("phone")
    for directory in (host.state_dir / "vpn", host.state_dir / "keys"):
        assert directory.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    host.remove("phone")


def test_a_damaged_file_of_a_client_is_told_and_harms_no_other(host: VpnHost) -> None:
    host.dial(host.add("good"))
    host.add("bad")
    host.until(host.hears, 20, "connected")
    (host.state_dir / "vpn" / "bad.json").write_text("{")
    rows = lambda: {row["key"]: row["why"] for row in host.status()["resources"] if row["phase"] == "error"}  # noqa: E731
    host.until(lambda: "bad.json is not a VPN client's file any more" in str(rows()), 5, "told")
    assert host.hears()
    done = host.vpn("list")
    assert done.code == 2 and "bad.json" in done.err
    host.remove("good")
    host.until(lambda: not host.hears(wait_s=0.3), 3, "cut off")
    host.remove("bad")
    host.settle(10)


def test_nothing_is_made_that_cannot_be_shown(host: VpnHost, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("no key")
    key.chmod(0o600)
    tree = yaml.safe_load(host.state_file.read_text())
    tree["wireguard"]["vpn_server"]["private_key_file"] = str(key)
    file = tmp_path / "node.yaml"
    file.write_text(yaml.safe_dump(tree))
    done = host.vpn("add", "phone", file=file)
    assert done.code == 2 and "holds no WireGuard key" in done.err
    assert json.loads(host.vpn("list", "--json").out) == []


def test_the_list_without_a_server(host: VpnHost, tmp_path: Path) -> None:
    tree = yaml.safe_load(host.state_file.read_text())
    tree["wireguard"]["vpn_server"]["interface"] = "wg9"
    file = tmp_path / "node.yaml"
    file.write_text(yaml.safe_dump(tree))
    host.add("phone")
    done = host.vpn("list", file=file)
    assert done.code == 0 and "the VPN server does not run" in done.err and "never" in done.out
    host.remove("phone")


def test_secrets_are_told_to_nobody(host: VpnHost) -> None:
    before = {*host.secrets.values()}
    configuration = host.add("phone")
    private = re.findall(r"(?:PrivateKey|PresharedKey) = (.*)", configuration)
    host.dial(configuration)
    host.until(host.hears, 20, "connected")
    host.machine.sh(
        "wg set wg-warp0 peer $(wg show wg-warp0 peers) remove; wg genkey | wg set wg0 private-key /dev/stdin"
    )
    time.sleep(0.1)
    host.settle(10)
    host.until(host.hears, 40, "connected")
    server = [path.read_text().strip() for path in (host.state_dir / "keys").glob("*.key")]
    secrets = [*before, *private, *server]
    assert len(secrets) >= 5
    host.remove("phone")
    texts = [host.log("up"), json.dumps(host.status()), host.machine.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")]
    texts += [host.vpn("list", "--json").out, repr(host.events("host_healed"))]
    others = [host.run_dir, host.events_dir, host.state_dir / "events"]
    texts += [path.read_text(errors="replace") for top in others for path in top.rglob("*") if path.is_file()]
    for secret in secrets:
        assert not [text for text in texts if secret[:20] in text]
    # What the client alone may know is nowhere at all.
    assert private[0] not in "".join(
        path.read_text(errors="replace") for path in host.state_dir.rglob("*") if path.is_file()
    )
    assert any("healed" in text and "wg-warp0" in text for text in texts)
