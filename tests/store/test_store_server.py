"""The database file and its commands: made, checked, converted, saved, brought back; and a disk that is full."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.problems import BulkheadError
from controller.records import ClientRecord, GrantRecord, GrantState, TokenRecord
from controller.store import Clash, Store, Tls, Unavailable
from controller.store import server as serving
from controller.store.rows import SCHEMA
from controller.store.server import Places, passive
from controller.storecli import cluster_status
from tests.fakes.stores import Server, container, opened, wait_for
from tests.store.test_store import put

BULKHEAD = (sys.executable, "-c", "from controller.cli import main; main()")
ROOT = Path(__file__).parents[2]


class Host:
    """The commands of one host."""

    def __init__(self, directory: Path) -> None:
        self.places = Places(directory / "run", directory / "lib")
        self.env = {
            **os.environ,
            "BULKHEAD_RUN_DIR": str(self.places.run_dir),
            "BULKHEAD_STATE_DIR": str(self.places.state_dir),
            "PYTHONPATH": str(ROOT),
        }
        self.server: subprocess.Popen[str] | None = None

    def serve(self, *options: str) -> None:
        self.server = subprocess.Popen(
            [*BULKHEAD, "store", "serve", *options], env=self.env, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: self._answers() or (self.server and self.server.poll() is not None), 20)
        assert self.server.poll() is None, self.server.stderr and self.server.stderr.read()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.places.socket)) == 0

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*BULKHEAD, "store", *arguments], env=self.env, capture_output=True, text=True, timeout=60, check=False
        )

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments)
        return json.loads(done.stdout)

    def end(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.wait(10)
            assert self.server.stderr is not None
            self.server.stderr.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.end()


def grant(number: str) -> GrantRecord:
    return GrantRecord(number, "1", "2", "tcp", 80, "why", "anna", 1.0, 60, GrantState.APPROVED, "bob", 2.0, 62.0)


@pytest.mark.slow
def test_a_store_is_served_saved_and_brought_back(host: Host, tmp_path: Path) -> None:
    assert host.run("status").returncode == 1
    no_group = host.run("serve", "--group", "nobody-has-this")
    assert (no_group.returncode, "groupadd" in no_group.stderr) == (2, True)
    host.serve(*(("--group", "daemon") if os.geteuid() == 0 else ()))
    database, path = host.places.database, host.places.socket
    assert (database.stat().st_mode & 0o777, database.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert (path.stat().st_mode & 0o777, host.places.private.stat().st_mode & 0o777) == (0o660, 0o700)
    if os.geteuid() == 0:
        assert path.group() == "daemon"
    again = host.run("serve")
    assert (again.returncode, "is served already" in again.stderr) == (2, True)

    with opened(f"unix:{path}") as store:
        secret = ClientRecord("phone", "n1", "10.9.0.2", "pub", "top-secret")
        store.change(put(container(1), container(2), secret, TokenRecord("t", "ci", "digest-of-it")))
        store.change(put(grant("7"), grant("8"), TokenRecord("stolen", "stolen", "0")))
        status = host.json("status", "--json")
        assert (status["connected"], status["revision"], status["records"]["containers"]) == (True, 2, 2)
        assert status["file"]["bytes"] > 3000
        dumped = host.run("dump")
        assert [c["id"] for c in json.loads(dumped.stdout)["containers"]] == ["1", "2"]
        assert not {"top-secret", "digest-of-it"} & set(dumped.stdout.replace('"', " ").split())
        saved = tmp_path / "saved"
        assert "secrets" in host.run("backup", str(saved)).stdout
        assert saved.stat().st_mode & 0o777 == 0o600

        store.change(put(container(1, running=False), container(3)))
        store.change(put(replace(grant("7"), state=GrantState.REVOKED)))
        store.change(lambda change: [change.delete(f"{name}") for name in ("token/stolen", "grant/8")])
        before = store.records
        refused = host.run("restore", str(saved))
        assert (refused.returncode, "--force" in refused.stderr) == (2, True)
        assert store.records == before
        assert "as revision 6" in host.run("restore", "--force", str(saved)).stdout
        wait_for(lambda: store.records.revision == 6)
        # Who was shut out since then is not let in again.
        assert [one.id for one in store.records.tokens] == ["t"]
        assert [(one.id, one.state) for one in store.records.grants] == [("7", "revoked"), ("8", "revoked")]
        assert [c.id for c in store.records.containers] == ["1", "2"]
        assert store.records.containers[0].running
        assert store.records.clients[0].preshared_key == "top-secret"
        assert host.run("compact").returncode == 0

    assert host.run("convert").returncode == 0
    assert host.server is not None
    host.server.kill()
    host.server.wait()
    assert path.exists()
    host.serve()
    with opened(f"unix:{path}") as store:
        assert store.records.revision == 6
    host.end()
    assert not path.exists()
    database.unlink()
    host.serve()
    # A new store: its revision goes on after the one that was saved, or followers would take it for an old one.
    assert "as revision 3" in host.run("restore", str(saved)).stdout


def test_a_file_that_is_no_backup_is_not_restored(server: Server, tmp_path: Path) -> None:
    from controller.storecli import read_backup

    for name, data in (("none", None), ("junk", b"junk"), ("empty", b"")):
        file = tmp_path / name
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(BulkheadError, match=r"is not there|is no OVSDB database"):
            read_backup(file)


def test_an_older_schema_is_converted_and_a_newer_one_refused(tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    schema["version"] = "0.9.0"
    del schema["tables"]["Container"]["columns"]["template"]
    del schema["tables"]["Operation"]
    old = tmp_path / "old.ovsschema"
    old.write_text(json.dumps(schema))
    server = Server(tmp_path)
    server.places.database.parent.mkdir(parents=True)
    subprocess.run(["ovsdb-tool", "create", server.places.database, old], check=True)
    row = {"id": "7", "name": "x", "name_key": "x", "command": "[]", "address": "10.1.0.9"}
    insert = {"op": "insert", "table": "Container", "row": row}
    subprocess.run(
        ["ovsdb-tool", "transact", server.places.database, json.dumps(["Bulkhead", insert])],
        check=True,
        capture_output=True,
    )
    server.start()
    try:
        with opened(server.address) as store:
            assert [record.id for record in store.records.containers] == ["7"]
            store.change(put(container(8, template="debian")))
    finally:
        server.kill()
    schema = json.loads(SCHEMA.read_text())
    schema["version"] = "99.0.0"
    old.write_text(json.dumps(schema))
    subprocess.run(["ovsdb-tool", "convert", server.places.database, old], check=True)
    with pytest.raises(BulkheadError, match=r"newer version \(schema 99.0.0"):
        server.start()


def test_a_running_store_of_another_schema_is_said(tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    del schema["tables"]["Container"]["columns"]["template"]
    old = tmp_path / "old.ovsschema"
    old.write_text(json.dumps(schema))
    server = Server(tmp_path)
    server.places.database.parent.mkdir(parents=True)
    subprocess.run(["ovsdb-tool", "create", server.places.database, old], check=True)
    server.start()
    store = Store([server.address])
    try:
        with pytest.raises(Unavailable, match="of another version"):
            store.start(0.5)
        # Converted while it runs: the store comes up by itself.
        subprocess.run(["ovsdb-client", "convert", server.address, SCHEMA], check=True)
        store.start(5)
        store.change(put(container(1, template="debian")))
    finally:
        store.close()
        server.kill()


def test_a_torn_last_record_is_cut_off_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path).start()
    with opened(server.address) as store:
        for n in range(5):
            store.change(put(container(n)))
    server.kill()
    whole = server.database.read_bytes()
    last = whole.rfind(b"OVSDB JSON")
    for cut in (last + 5, last + 30, last + 80, len(whole) - 1):
        server.database.write_bytes(whole[:cut])
        assert not serving.check(server.database)
        assert server.database.read_bytes() == whole[:last]
        assert "cut short" in capsys.readouterr().err
    server.database.write_bytes(whole + b"\0" * 100)
    serving.check(server.database)
    assert server.database.read_bytes() == whole
    server.start()
    with opened(server.address) as store:
        assert store.records.revision == 5
    server.kill()


def test_damage_before_the_end_is_refused_and_the_file_left_alone(tmp_path: Path) -> None:
    server = Server(tmp_path).start()
    with opened(server.address) as store:
        for n in range(5):
            store.change(put(container(n)))
    server.kill()
    data = bytearray(server.database.read_bytes())
    data[data.rfind(b"box3")] ^= 1
    server.database.write_bytes(data)
    with pytest.raises(BulkheadError, match=r"is damaged at byte \d+ of \d+; .*restore"):
        server.start()
    assert server.database.read_bytes() == data


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    schema = {"name": "Other", "version": "1.0.0", "tables": {"T": {"columns": {"a": {"type": "string"}}}}}
    (tmp_path / "schema").write_text(json.dumps(schema))
    database = tmp_path / "db"
    subprocess.run(["ovsdb-tool", "create", database, tmp_path / "schema"], check=True)
    with pytest.raises(BulkheadError, match="a database called Other, not Bulkhead"):
        serving.prepare(database)
    database.write_text("hello")
    with pytest.raises(BulkheadError, match="no OVSDB database"):
        serving.prepare(database)


@pytest.mark.parametrize("address", ["tcp:0.0.0.0:6641", "tcp:10.0.0.1:6641", "ssl:0.0.0.0:6641"])
def test_nobody_is_let_in_without_a_certificate(address: str) -> None:
    with pytest.raises(BulkheadError, match=r"would let anybody in|needs --private-key"):
        passive(address, None)


def test_where_to_listen() -> None:
    tls = Tls(Path("k"), Path("c"), Path("a"))
    assert passive("ssl:[::]:6641", tls) == "pssl:6641:[::]"
    assert passive("tcp:127.0.0.1:6641", None) == "ptcp:6641:127.0.0.1"
    assert passive("unix:/x", None) == "punix:/x"


def test_a_directory_of_others_keeps_its_mode(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    serving.prepare(shared / "x.db")
    assert shared.stat().st_mode & 0o777 == 0o755
    assert (shared / "x.db").stat().st_mode & 0o777 == 0o600


def test_cluster_status_as_values() -> None:
    text = (
        "1f2a\nName: Bulkhead\nCluster ID: 5f1c (5f1c0000-0000)\nServer ID: 1f2a (1f2a-00)\nAddress: ssl:127.0.0.1:1\n"
        "Status: cluster member\nRole: leader\nTerm: 3\nLeader: self\nVote: self\n\nElection timer: 1000\n"
        "Log: [2, 9]\nServers:\n    1f2a (1f2a at ssl:127.0.0.1:1) (self) next_index=7 match_index=8\n"
        "    22aa (22aa at ssl:127.0.0.1:2) next_index=9 match_index=8 last msg 120 ms ago\n"
    )
    assert cluster_status(text) == {
        "role": "leader",
        "status": "cluster member",
        "leader": "self",
        "term": 3,
        "election_timer_ms": 1000,
        "members": [
            {"id": "1f2a", "address": "ssl:127.0.0.1:1", "self": True, "heard_ms": None},
            {"id": "22aa", "address": "ssl:127.0.0.1:2", "self": False, "heard_ms": 120},
        ],
    }


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a small disk")
def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    disk, run = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    run.mkdir()
    places = Places(run, disk)
    database = disk / "x.db"
    private = places.private
    private.mkdir()
    line = " ".join(serving.serve_command(places, database))
    script = f"mount -t tmpfs -o size=256k none {disk} && ovsdb-tool create {database} {SCHEMA} && exec {line}"
    process = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stderr=subprocess.DEVNULL)
    try:
        wait_for(places.socket.exists)
        with opened(f"unix:{places.socket}") as store:
            done, refused = [], 0
            for number in range(400):
                try:
                    store.change(put(container(number, template="x" * 2000)), 5)
                    done.append(str(number))
                except Unavailable as exc:
                    assert "disk" in str(exc)
                    refused += 1
                    if refused == 3:
                        break
            assert refused == 3
            assert [record.id for record in store.records.containers] == done
            with pytest.raises(Clash):
                store.change(put(container(9999, name="box0")))
            # Room again: compaction makes it.
            store_size = (Path(f"/proc/{process.pid}/root") / str(database).lstrip("/")).stat().st_size
            assert store_size <= 256 * 1024
            mounted = f"mount -o remount,size=1m {disk}"
            subprocess.run(["nsenter", "-m", "-t", str(process.pid), "sh", "-c", mounted], check=True)
            begun = time.monotonic()
            store.change(put(container(5000)))
            assert time.monotonic() - begun < 5
            done.append("5000")
            assert [record.id for record in store.records.containers] == done
        process.send_signal(signal.SIGSTOP)
        copied = tmp_path / "copy.db"
        copied.write_bytes((Path(f"/proc/{process.pid}/root") / str(database).lstrip("/")).read_bytes())
        assert not serving.check(copied)
    finally:
        process.kill()
        process.wait()
    again = Server(tmp_path / "again", database=copied).start()
    try:
        with opened(again.address) as store:
            assert [record.id for record in store.records.containers] == done
    finally:
        again.kill()
