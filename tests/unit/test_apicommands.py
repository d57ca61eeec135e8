"""Commands that ask the API: what they send, what they print, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result

from controller.cli import COMMANDS, main
from controller.containercli import service
from controller.problems import BulkheadError
from tests.fakes.api import Answer, Asked, FakeApi, problem

WEB = {
    "id": "103",
    "name": "web",
    "network": "privacy",
    "node": "n1",
    "address": "10.0.0.103",
    "mac": "02:00:00:00:00:67",
    "port": "veth103",
    "origin": "stored",
    "running": True,
    "state": "ready",
    "why": "",
    "services": [{"name": "http", "protocol": "tcp", "port": 80, "exposed": False, "check": "", "health": "up"}],
    "driver": "netns",
    "created_by": "uid:0",
    "created_at": "2026-11-25T15:00:00.000Z",
    "revision": 7,
}
GRANT = {
    "id": "7",
    "source": "202",
    "target": "103",
    "protocol": "tcp",
    "port": 80,
    "reason": "look at it",
    "requested_by": "uid:0",
    "requested_at": "2026-11-25T15:00:00.000Z",
    "duration_s": 3600,
    "state": "requested",
    "decided_by": "",
    "decided_at": None,
    "expires_at": None,
    "revision": 8,
    "realized": False,
    "why": "",
}
OPERATION = {
    "id": "ab12",
    "kind": "create",
    "object": "container/103",
    "state": "running",
    "created_at": "2026-11-25T15:00:00.000Z",
    "result": None,
}
SECRET = "bh_0123456789_secretsecretsecret"


class Told:
    """The API as these tests want it: answers by method and path."""

    def __init__(self, directory: Path) -> None:
        self.answers: dict[tuple[str, str], Answer] = {}
        self.directory = directory
        self.api = FakeApi(directory, self._answer)

    def _answer(self, asked: Asked) -> Answer:
        return self.answers.get((asked.method, asked.path), problem(404, "not-found", "There is none."))

    def run(self, *words: str, **more: Any) -> Result:
        return CliRunner().invoke(main, [*words[:2], "--run-dir", str(self.directory), *words[2:]], **more)

    @property
    def sent(self) -> Asked:
        return self.api.asked[-1]


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    found = Told(tmp_path)
    with found.api:
        yield found


def test_containers_are_listed_in_a_table(told: Told) -> None:
    told.answers["GET", "/api/containers"] = 200, {
        "containers": [WEB, WEB | {"id": "104", "name": "b[red]", "state": "pending", "why": "its\x1b flows", "services": []}]
    }  # fmt: skip
    done = told.run("container", "list", "--network", "privacy")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["ID", "NAME", "NETWORK", "ADDRESS", "PORT", "NODE", "STATE", "ORIGIN", "SERVICES"]
    assert lines[1] == ["103", "web", "privacy", "10.0.0.103", "veth103", "n1", "ready", "stored", "http", "tcp/80"]
    assert lines[2][1] == "b[red]" and done.stdout.endswith("b[red]: its\\x1b flows\n")
    assert told.sent.query == "network=privacy"
    assert done.exit_code == 0


def test_json_is_what_the_api_said(told: Told) -> None:
    told.answers["GET", "/api/containers/web"] = 200, WEB
    assert json.loads(told.run("container", "show", "web", "--json").stdout) == WEB
    shown = told.run("container", "show", "web").stdout
    assert "address  10.0.0.103" in shown and "http" in shown and "up" in shown


def test_a_container_is_created(told: Told) -> None:
    told.answers["POST", "/api/containers/create"] = 201, WEB
    done = told.run(
        "container", "create", "web", "--network", "privacy", "--service", "http:tcp:80:exposed:check=http:/a:b",
        "--timeout", "5", "--idempotency-key", "k", "--", "python3", "-m", "http.server", "--json",
    )  # fmt: skip
    assert done.stdout == "container web (103) is ready: 10.0.0.103 on privacy, port veth103\n", done.stderr
    assert told.sent.body == {
        "name": "web",
        "network": "privacy",
        "services": [{"name": "http", "protocol": "tcp", "port": 80, "exposed": True, "check": "http:/a:b"}],
        "command": ["python3", "-m", "http.server", "--json"],
    }
    assert told.sent.query == "timeout=5" and told.sent.headers["idempotency-key"] == "k"


def test_a_command_may_be_one_text(told: Told) -> None:
    told.answers["POST", "/api/containers/create"] = 201, WEB
    told.run("container", "create", "web", "--network", "privacy", "--command", "sh -c 'sleep 1'")
    assert told.sent.body["command"] == ["sh", "-c", "sleep 1"]
    done = told.run("container", "create", "web", "--network", "privacy", "--command", "sh 'x")
    assert done.exit_code == 2 and "after -- instead" in done.stderr


def test_what_is_only_begun_says_how_to_ask_for_it(told: Told) -> None:
    told.answers["POST", "/api/containers/create"] = 202, OPERATION
    told.answers["GET", "/api/operations/ab12"] = 200, OPERATION | {"state": "done", "result": WEB}
    done = told.run("container", "create", "web", "--network", "privacy", "--no-wait")
    assert done.stdout == "create of container/103 is running; see: bulkhead operation ab12\n"
    assert told.sent.query == "wait=false"
    done = CliRunner().invoke(main, ["operation", "ab12", "--wait", "--run-dir", str(told.directory)])
    assert (done.stdout, done.exit_code) == ("create of container/103: done\n", 0)


@pytest.mark.parametrize("state, code", [("failed", 1), ("running", 2)])
def test_an_operation_that_is_not_done(told: Told, state: str, code: int) -> None:
    told.answers["GET", "/api/operations/ab12"] = (
        200,
        OPERATION | {"state": state, "result": {"detail": "No id is free."}},
    )
    done = CliRunner().invoke(main, ["operation", "ab12", "--run-dir", str(told.directory)])
    assert done.exit_code == code
    assert ("No id is free." in done.stdout) == (state == "failed")


@pytest.mark.parametrize("status, code", [(409, 1), (404, 1), (403, 2), (503, 2)])
def test_a_no_of_the_api_ends_with_its_words(told: Told, status: int, code: int) -> None:
    told.answers["GET", "/api/containers/web"] = problem(status, "declared", "It stands in node.yaml; change it there.")
    done = told.run("container", "show", "web")
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr == "bulkhead: It stands in node.yaml; change it there.\n"
    assert json.loads(told.run("container", "show", "web", "--json").stdout)["type"].endswith(":declared")


def test_no_api_is_not_found_out(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["container", "list", "--run-dir", str(tmp_path)])
    assert done.exit_code == 2 and "Start one with: bulkhead up FILE" in done.stderr


def test_deleting_asks_on_a_terminal_only(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    told.answers["GET", "/api/containers/web"] = 200, WEB
    told.answers["DELETE", "/api/containers/103"] = 200, WEB
    assert told.run("container", "delete", "web").stdout == "container web (103) is deleted\n"
    monkeypatch.setattr("controller.apiterm.on_terminal", lambda: True)
    done = told.run("container", "delete", "web", input="n\n")
    assert done.exit_code == 1 and told.sent.method == "GET" and "Delete container web (103)" in done.stderr
    assert told.run("container", "delete", "web", input="y\n").exit_code == 0
    assert told.run("container", "delete", "web", "--yes").exit_code == 0


@pytest.mark.parametrize("verb, said", [("start", "runs"), ("stop", "is stopped")])
def test_start_and_stop(told: Told, verb: str, said: str) -> None:
    told.answers["POST", f"/api/containers/web/{verb}"] = 200, WEB
    assert told.run("container", verb, "web").stdout == f"container web (103) {said}\n"


@pytest.mark.parametrize("text", ["", "a", "a:tcp", "a:icmp:1", "a:tcp:0", "a:tcp:x", "a:tcp:1:open", ":tcp:1"])
def test_a_service_that_is_none(text: str) -> None:
    with pytest.raises(BulkheadError, match="expected"):
        service(text)


# -------------------------------------------------------------------------------------------------------------- grants


def test_a_grant_is_asked_for_by_names_and_by_a_services_name(told: Told) -> None:
    told.answers["GET", "/api/containers/monitoring"] = 200, WEB | {"id": "202", "name": "monitoring", "services": []}
    told.answers["GET", "/api/containers/web"] = 200, WEB
    told.answers["POST", "/api/grants"] = 201, GRANT
    done = told.run("grant", "request", "monitoring", "web", "http", "--reason", "look at it", "--for", "1h30m")
    assert told.sent.body == {
        "source": "202", "target": "103", "protocol": "tcp", "port": 80, "reason": "look at it", "duration_s": 5400
    }  # fmt: skip
    assert "bulkhead grant approve 7" in done.stdout
    told.run("grant", "request", "monitoring", "web", "udp/53", "--reason", "x", "--for", "10m")
    assert (told.sent.body["protocol"], told.sent.body["port"]) == ("udp", 53)
    done = told.run("grant", "request", "monitoring", "web", "ssh", "--reason", "x", "--for", "10m")
    assert done.exit_code == 2 and "it has http" in done.stderr
    done = told.run("grant", "request", "monitoring", "web", "http", "--reason", "x", "--for", "soon")
    assert done.exit_code == 2 and "expected a time such as 30m" in done.stderr


@pytest.mark.parametrize("verb", ["approve", "deny", "revoke"])
def test_a_grant_is_decided(told: Told, verb: str) -> None:
    told.answers["POST", f"/api/grants/7/{verb}"] = 200, GRANT | {"expires_at": "2026-11-25T16:00:00.000Z"}
    done = told.run("grant", verb, "7")
    assert done.exit_code == 0 and done.stdout.startswith("grant 7 is "), done.stderr


def test_grants_are_listed_by_state(told: Told) -> None:
    told.answers["GET", "/api/containers"] = 200, {"containers": [WEB]}
    told.answers["GET", "/api/grants"] = 200, {"grants": [GRANT, GRANT | {"id": "8", "state": "denied"}]}
    assert "look at it" in told.run("grant", "list").stdout
    found = json.loads(told.run("grant", "list", "--state", "denied", "--json").stdout)
    assert [grant["id"] for grant in found["grants"]] == ["8"]


@pytest.mark.parametrize(
    "state, realized, said",
    [
        ("requested", True, "shut"),
        ("approved", False, "not open yet: its flows"),
        ("approved", True, "open"),
        ("revoked", False, "may still be open: its flows"),
        ("expired", True, "shut"),
    ],
)
def test_whether_the_flow_of_a_grant_is_open(told: Told, state: str, realized: bool, said: str) -> None:
    why = "" if realized else "its flows"
    told.answers["GET", "/api/containers"] = 200, {"containers": [WEB]}
    told.answers["GET", "/api/grants/7"] = 200, GRANT | {"state": state, "realized": realized, "why": why}
    lines = told.run("grant", "show", "7").stdout.splitlines()
    assert lines[-1].split(maxsplit=1) == ["flow", said]
    assert lines[2].split(maxsplit=1) == ["to", "web (103) tcp/80"]


# -------------------------------------------------------------------------------------------------- tokens, VPN clients


def test_a_token_is_alone_on_standard_output(told: Told) -> None:
    made = {"id": "ab", "name": "ci", "scopes": ["read"], "expires_at": "2026-12-25T15:00:00Z", "token": SECRET}
    told.answers["POST", "/api/tokens"] = 201, made
    done = told.run("token", "create", "ci", "--expires-in", "30d")
    assert done.stdout == f"{SECRET}\n" and "until 2026-12-25 15:00:00" in done.stderr
    assert told.sent.body == {"name": "ci", "scopes": ["read"], "expires_in_s": 2592000}


def test_a_token_goes_to_a_file_of_its_owner(told: Told, tmp_path: Path) -> None:
    told.answers["POST", "/api/tokens"] = 201, {"id": "ab", "name": "ci", "scopes": ["read"], "token": SECRET}
    file = tmp_path / "token"
    done = told.run("token", "create", "ci", "--output", str(file), "--json")
    assert SECRET not in done.output
    assert file.read_text() == f"{SECRET}\n" and file.stat().st_mode & 0o777 == 0o600
    done = told.run("token", "create", "ci", "--output", str(file))
    assert done.exit_code == 2 and "name a new file" in done.stderr
    told.answers["POST", "/api/tokens"] = problem(409, "duplicate-name", "There is one.")
    assert told.run("token", "create", "ci", "--output", str(tmp_path / "other")).exit_code == 1
    assert not (tmp_path / "other").exists()


def test_a_vpn_client_is_added_with_a_code_for_phones(told: Told) -> None:
    config = "[Interface]\nPrivateKey = x\n\n[Peer]\nEndpoint = vpn.example.org:51820\n"
    told.answers["POST", "/api/vpn/clients"] = 201, {"name": "phone", "address": "10.8.0.2", "config": config}
    done = told.run("vpn", "add", "phone")
    assert done.stdout == config + "\n" and "address 10.8.0.2" in done.stderr
    done = told.run("vpn", "add", "phone", "--qr", "--endpoint", "192.0.2.1:443")
    assert "█" in done.stdout and told.sent.body == {"name": "phone", "endpoint": "192.0.2.1:443"}
    told.answers["DELETE", "/api/vpn/clients/phone"] = 200, {"name": "phone"}
    assert told.run("vpn", "remove", "phone").stdout == "client phone is removed\n"


# ------------------------------------------------------------------------------------------------------------ completion


def completed(*words: str) -> list[str]:
    found = BashComplete(main, {}, "bulkhead", "_BULKHEAD_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found]


def test_names_are_completed_by_what_there_is(told: Told) -> None:
    told.answers["GET", "/api/containers"] = 200, {"containers": [WEB, WEB | {"name": "mail"}]}
    told.answers["GET", "/api/networks"] = 200, {"networks": [{"name": "privacy", "subnet": "10.0.0.0/24"}]}
    told.answers["GET", "/api/grants"] = 200, {"grants": [GRANT]}
    there = ["--run-dir", str(told.directory)]
    assert completed("container", "delete", *there, "w") == ["web"]
    assert completed("container", "list", *there, "--network", "") == ["privacy"]
    assert completed("grant", "approve", *there, "") == ["7"]
    told.answers.clear()
    assert completed("container", "delete", *there, "w") == []


def test_completion_is_silent_where_no_api_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert completed("container", "delete", "--run-dir", str(tmp_path), "w") == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_every_shell(shell: str) -> None:
    assert "_BULKHEAD_COMPLETE" in CliRunner().invoke(main, ["completion", shell]).stdout


def test_every_command_that_prints_takes_json() -> None:
    def leaves(group: click.Group) -> Iterator[click.Command]:
        for command in group.commands.values():
            yield from leaves(command) if isinstance(command, click.Group) else [command]

    for name in ("container", "grant", "token", "service", "network", "vpn"):
        group = main.get_command(click.Context(main), name)
        assert isinstance(group, click.Group)
        for command in leaves(group):
            assert "as_json" in {param.name for param in command.params}, command.name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_found_by_its_name(name: str) -> None:
    found = main.get_command(click.Context(main), name)
    assert found is not None and found.name == name and found.get_short_help_str()


def test_a_command_that_is_not_there_is_said() -> None:
    answer = CliRunner().invoke(main, ["nothing"])
    assert answer.exit_code == 2 and "No such command 'nothing'" in answer.stderr


def test_asking_the_api_imports_nothing_of_what_serves_it() -> None:
    script = (
        "import sys; sys.argv[1:] = ['status', '--help']; from controller.cli import main; main(standalone_mode=False); "
        "assert not {'fastapi', 'os_ken', 'mcp', 'pyroute2', 'pydantic', 'ovs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
