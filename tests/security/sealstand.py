"""Seals in a network and a mount namespace of their own, where `test_incident` starts this; each function is a case.

A child does the change and is killed at its n-th step; then the same is completed, for every n that there is.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from controller.problems import BulkheadError
from controller.security.incident import Collection, Seals, Source, Target
from controller.security.incident.evidence import host_sources

PEER = ("10.0.0.2/32",)
TARGETS = [Target("server", "inf1", PEER), Target("network", "guests", ("192.0.2.0/24", "fd00:1::/64"))]


def run(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def tunnel() -> Iterator[str]:
    """A WireGuard interface with a peer to be sealed, with a shared key, and one that stays."""
    go = subprocess.Popen(["wireguard-go", "-f", "wgs"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not Path("/var/run/wireguard/wgs.sock").exists():
            time.sleep(0.01)
        run("wg", "set", "wgs", "private-key", "/dev/stdin", text=run("wg", "genkey"))
        first, other = (run("wg", "pubkey", text=run("wg", "genkey")).strip() for _ in range(2))
        words = ["allowed-ips", PEER[0], "endpoint", "198.51.100.7:51820", "persistent-keepalive", "25"]
        run("wg", "set", "wgs", "peer", first, *words, "preshared-key", "/dev/stdin", text=run("wg", "genpsk"))
        run("wg", "set", "wgs", "peer", other, "allowed-ips", "10.0.0.3/32")
        yield first
    finally:
        go.kill()
        go.wait()


def state() -> tuple[list[str], str]:
    """The peers, with all they are told, and the rules."""
    said = [
        run("wg", "show", "wgs", what)
        for what in ("allowed-ips", "preshared-keys", "endpoints", "persistent-keepalive")
    ]
    lines = sorted(line for text in said for line in text.splitlines())
    return lines, run("nft", "list", "ruleset")


def _late() -> bytes:
    time.sleep(2)
    return b"late"


def quick() -> Collection:
    return Collection((Source("one.txt", lambda: b"seen"), Source("broken.txt", lambda: 1 // 0)))  # type: ignore[arg-type, return-value]


def killed(change: Callable[[Callable[[str], None]], object], at: int) -> bool:
    """Whether a child was killed at that step; it ended before otherwise."""
    child = os.fork()
    if child == 0:
        count = 0

        def step(_what: str) -> None:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            change(step)
        except BaseException as exc:
            print(f"child: {exc!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, code = os.waitpid(child, 0)
    assert os.WIFSIGNALED(code) or os.WEXITSTATUS(code) == 0
    return os.WIFSIGNALED(code)


def is_cut(directory: Path) -> bool:
    return not Seals(directory).not_enforced() and "drop" in run("nft", "list", "ruleset")


def case_killed_at_every_step() -> None:
    """Sealing and unsealing, killed anywhere, are completed by the same command; all is as before in the end."""
    with tunnel() as key:
        before = state()
        at = 0
        while True:
            at += 1
            directory = Path(tempfile.mkdtemp(prefix="seals-"))
            if not killed(lambda step, d=directory: Seals(d, step=step).seal(TARGETS, "test", quick()), at):  # type: ignore[misc]
                break
            begun = Seals(directory).all()
            if begun:
                done = Seals(directory).resume(begun[0].id, quick())
                assert done.phase == "sealed" and is_cut(directory), at
                assert key not in run("wg", "show", "wgs", "peers"), at
                assert (directory / done.id / "evidence.tar.gz").is_file(), at
                Seals(directory).unseal(done.id)
            assert state() == before, at
            shutil.rmtree(directory)
        print("seal:", at - 1, "steps")
        assert at > 8
        # The last one ran to its end.
        (made,) = Seals(directory).all()
        assert made.phase == "sealed" and is_cut(directory)
        kept = Path(tempfile.mkdtemp(prefix="seals-"))
        shutil.copytree(directory, kept, dirs_exist_ok=True)
        at = 0
        while True:
            at += 1
            shutil.rmtree(directory)
            shutil.copytree(kept, directory)
            Seals(directory).enforce()
            subprocess.run(["wg", "set", "wgs", "peer", key, "remove"], check=True)
            if not killed(lambda step, d=directory: Seals(d, step=step).unseal(made.id), at):  # type: ignore[misc]
                break
            if Seals(directory).get(made.id).phase == "sealed":
                assert is_cut(directory), at
            assert Seals(directory).unseal(made.id).phase == "unsealed"
            assert state() == before, at
        print("unseal:", at - 1, "steps")
        assert at > 4 and state() == before


def case_evidence() -> None:
    """One archive of mode 600 with a manifest, without keys; slow evidence does not keep the cut waiting."""
    directory = Path(tempfile.mkdtemp(prefix="seals-"))
    security = Path(tempfile.mkdtemp(prefix="security-"))
    (security / "pki/current/me").mkdir(parents=True)
    (security / "pki/current/me/cert.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    (security / "pki/current/me/key.pem").write_text("-----BEGIN PRIVATE KEY-----\nhidden\n")
    (security / "pki/both.pem").write_text("-----BEGIN PRIVATE KEY-----\nhidden\n")
    slow = Source("slow.txt", _late)
    with tunnel():
        collection = Collection((*host_sources(None, security, []), slow))
        made = Seals(directory).seal(TARGETS, "test", collection)
        assert made.cut_after_s is not None and made.cut_after_s < 1.0, made.cut_after_s
        path = directory / made.id / "evidence.tar.gz"
        for file in (directory / made.id).iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        data = path.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        manifest = {row["name"]: row for row in json.loads(files["manifest.json"])}
        assert manifest["slow.txt"]["before_the_cut"] is False and manifest["addresses.txt"]["before_the_cut"] is True
        assert any(name.endswith("cert.pem") for name in files) and b"hidden\n-" not in b"".join(files.values())
        assert not any(b"PRIVATE KEY" in one for one in files.values())
        assert b"10.0.0.2/32" in files["wireguard.txt"]
        shared = json.loads((directory / made.id / "shared-keys.json").read_text())
        assert shared and not any(value.encode() in one for value in shared.values() for one in files.values())
        try:
            Seals(directory).unseal(made.id[:-1])
        except BulkheadError as exc:
            assert "no seal" in str(exc)
        else:
            raise AssertionError("unsealed with half an id")
        assert is_cut(directory)
        run("nft", "delete", "table", "inet", "bulkhead_seal")
        assert Seals(directory).not_enforced()
        Seals(directory).resume(made.id, quick())
        assert is_cut(directory)
        print("cut after", made.cut_after_s, "s")


def case_packets() -> None:
    """What is sealed gets no packet, not even in a connection that is open; what is not, does. Another seal stays."""
    directory = Path(tempfile.mkdtemp(prefix="seals-"))
    holder = subprocess.Popen(["unshare", "--net", "sleep", "60"])
    try:
        inside = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.01)
        run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", str(holder.pid))
        for prefix, name, address in (
            ([], "v0", "203.0.113.1/24"),
            (inside, "v1", "203.0.113.2/24"),
            (inside, "v1", "203.0.113.3/24"),
        ):
            run(*prefix, "ip", "address", "add", address, "dev", name)
            run(*prefix, "ip", "link", "set", name, "up")

        def pings(address: str) -> bool:
            return subprocess.run(["ping", "-c1", "-W0.3", address], capture_output=True).returncode == 0

        end = time.monotonic() + 5
        while not pings("203.0.113.2") and time.monotonic() < end:
            pass
        assert pings("203.0.113.2") and pings("203.0.113.3")
        asked: list[tuple[str, bool]] = []
        seals = Seals(directory, ports=lambda network, _id, closed: asked.append((network, closed)) or "")  # type: ignore[func-returns-value]
        one = seals.seal([Target("server", "a", ("203.0.113.2/32",))], "t", quick())
        assert not pings("203.0.113.2") and pings("203.0.113.3")
        two, again = (seals.seal([Target("network", "b", ("203.0.113.2/31",))], "t", quick()) for _ in range(2))
        assert not pings("203.0.113.3")
        seals.unseal(one.id)
        assert not pings("203.0.113.2")
        seals.unseal(two.id)
        assert not pings("203.0.113.2") and ("b", False) not in asked  # its ports, too, stay closed
        seals.unseal(again.id)
        assert pings("203.0.113.2") and pings("203.0.113.3") and asked == [("b", True), ("b", True), ("b", False)]
    finally:
        holder.kill()
        holder.wait()


if __name__ == "__main__":
    run("ip", "link", "set", "lo", "up")
    globals()[f"case_{sys.argv[1]}"]()
