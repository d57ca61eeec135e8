"""The commands against the API's own process and a real store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.ovs import die_with_parent
from tests.api.stand import ROOT, Stand, stand, until
from tests.api.test_mcp import free_port

PROGRAM = [sys.executable, "-c", "from controller.cli import main; main()"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with stand(tmp_path_factory.mktemp("commands"), port=free_port()) as found:
        yield found


def command(api: Stand, *words: str) -> list[str]:
    return [*PROGRAM, *words, "--run-dir", str(api.directory)]


def started(api: Stand, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(api, *words),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )


def run(api: Stand, *words: str, code: int = 0) -> str:
    """What a command prints; what it says to standard error where it does not end well."""
    process = started(api, *words)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, f"{process.returncode}: {out}{err}"
    return err if code else out


def test_the_life_of_a_container(api: Stand) -> None:
    said = run(api, "container", "create", "web", "--network", "privacy", "--service", "http:tcp:80:check=tcp")
    assert said.startswith("container web (101) is ready: 10.0.0.")
    assert "name web already" in run(api, "container", "create", "web", "--network", "privacy", code=1)
    assert "container web (101) is stopped" in run(api, "container", "stop", "web")
    assert json.loads(run(api, "container", "show", "101", "--json"))["state"] == "stopped"
    assert "container web (101) runs" in run(api, "container", "start", "web")
    assert "tcp/80" in run(api, "service", "list", "--network", "privacy")
    assert run(api, "container", "delete", "101") == "container web (101) is deleted\n"
    assert "web" in run(api, "container", "show", "web", code=1)


def test_a_declared_container_stays(api: Stand) -> None:
    said = run(api, "container", "delete", "xray", code=1)
    assert "declared in" in said and "Change it there" in said


def test_what_the_node_refuses_is_told_and_gone(api: Stand) -> None:
    api.realizer.refuses["bad"] = "there is no template none"
    assert "there is no template none" in run(api, "container", "create", "bad", "--network", "privacy", code=1)
    run(api, "container", "show", "bad", code=1)


def test_what_takes_too_long_is_taken_back(api: Stand) -> None:
    api.realizer.holds["never"] = "its flows"
    began = time.monotonic()
    said = run(api, "container", "create", "never", "--network", "privacy", "--timeout", "1", code=1)
    assert "its flows" in said and "taken back" in said and time.monotonic() - began < 10


def test_a_change_that_is_only_begun(api: Stand) -> None:
    made = json.loads(run(api, "container", "create", "later", "--network", "privacy", "--no-wait", "--json"))
    assert run(api, "operation", made["id"], "--wait").endswith(": done\n")
    run(api, "container", "delete", "later")


def test_what_is_no_operation_is_told_in_words(api: Stand) -> None:
    said = run(api, "operation", "nothing", code=1)
    assert "expected 16 characters of 0-9 and a-f" in said and "--no-wait" in said and "^[" not in said


def test_the_same_key_changes_nothing_twice(api: Stand) -> None:
    words = ("container", "create", "once", "--network", "privacy", "--idempotency-key", "k1", "--json")
    assert run(api, *words) == run(api, *words)
    run(api, "container", "delete", "once")


def test_an_api_that_is_killed_meanwhile_carries_it_out_once(api: Stand) -> None:
    """The command sends the same again until the next one answers."""
    api.realizer.holds["slow"] = "its flows"
    process = started(api, "container", "create", "slow", "--network", "privacy", "--json")
    with api.client() as client:
        until(lambda: client.get("/api/containers/slow").status_code == 200)
    api.stop(signal.SIGKILL)
    api.start()
    del api.realizer.holds["slow"]
    api.realizer.publish()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert json.loads(out)["state"] == "ready"
    found = json.loads(run(api, "container", "list", "--json"))["containers"]
    assert [c["name"] for c in found].count("slow") == 1
    run(api, "container", "delete", "slow")


def test_a_token_may_what_its_scopes_say(api: Stand, tmp_path: Path) -> None:
    file = tmp_path / "token"
    run(api, "token", "create", "reader", "--output", str(file))
    there = ("--api", f"http://127.0.0.1:{api.port}", "--token-file", str(file))
    assert "xray" in run(api, "container", "list", *there)
    assert "scope operate" in run(api, "container", "create", "x", "--network", "privacy", *there, code=2)
    assert "scope approve" in run(api, "token", "create", "more", "--scope", "approve", *there, code=2)
    number = next(t["id"] for t in json.loads(run(api, "token", "list", "--json"))["tokens"] if t["name"] == "reader")
    run(api, "token", "revoke", number)
    assert "revoked" in run(api, "container", "list", *there, code=2)
    assert file.read_text().strip() not in (api.directory / "api.log").read_text()


def test_a_grant_is_asked_for_by_one_and_approved_by_another(api: Stand, tmp_path: Path) -> None:
    file = tmp_path / "token"
    run(api, "token", "create", "asker", "--scope", "read", "--scope", "operate", "--output", str(file))
    asked = run(
        api, "grant", "request", "monitoring", "xray", "8080", "--reason", "to see", "--for", "1h", "--json",
        "--api", f"http://127.0.0.1:{api.port}", "--token-file", str(file),
    )  # fmt: skip
    number = json.loads(asked)["id"]
    assert run(api, "grant", "approve", number).startswith(f"grant {number} is open after ")
    rows = [line.split() for line in run(api, "grant", "list", "--state", "approved").splitlines()]
    assert rows[1][:8] == [number, "monitoring", "(202)", "xray", "(102)", "tcp/8080", "approved", "open"]
    run(api, "grant", "revoke", number)
    assert "shut" in run(api, "grant", "show", number)
    run(api, "grant", "show", "999", code=1)


def test_nobody_approves_what_they_asked_for(api: Stand) -> None:
    words = ("--reason", "to see", "--for", "1h", "--json")
    number = json.loads(run(api, "grant", "request", "monitoring", "xray", "tcp/8080", *words))["id"]
    assert "somebody else" in run(api, "grant", "approve", number, code=1)
    assert run(api, "grant", "deny", number) == f"grant {number} is denied\n"


def test_events_are_followed_across_a_restart_of_the_api(api: Stand) -> None:
    follower = started(api, "events", "--all", "--follow", "--last", "1", "--json")
    assert follower.stdout is not None
    assert json.loads(follower.stdout.readline())["log"] == "api"
    run(api, "container", "create", "seen", "--network", "privacy")
    api.stop()
    api.start()
    run(api, "container", "delete", "seen")
    numbers, kinds = [], []
    while len(kinds) < 4:
        event = json.loads(follower.stdout.readline())
        numbers.append(event["seq"])
        kinds.append(event["kind"])
    follower.kill()
    follower.communicate()
    assert kinds == ["api_change", "api_stopped", "api_started", "api_change"]
    assert numbers == list(range(numbers[0], numbers[0] + 4))
    lines = run(api, "events", "--all").splitlines()
    assert len(lines) >= 5 and all(line.startswith("api ") for line in lines)


def test_no_permission_is_told(api: Stand) -> None:
    script = "import os; os.setgid(65534); os.setuid(65534); from controller.cli import main; main()"
    line = [sys.executable, "-c", script, "container", "list", "--api", f"http://127.0.0.1:{api.port}"]
    done = subprocess.run(line, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 2 and "bulkhead token create" in done.stderr, done.stderr
