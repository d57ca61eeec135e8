"""`bulkhead why`: the answer is the proof's, the reason is the rule that decides, and the advice is one that works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from controller.cli import main
from controller.problems import BulkheadError
from controller.statefile import load
from controller.verify.endpoints import endpoints
from controller.verify.reach import whole
from controller.verify.why import Verdict, read_service, why

EXAMPLE = Path(__file__).parents[2] / "examples" / "oo1424oo.yaml"
DROP = "        # VPN clients to the gateway\n"


def ask(*args: str, file: Path = EXAMPLE) -> Result:
    return CliRunner().invoke(main, ["why", *args, "--state", str(file)])


def changed(tmp_path: Path, *pairs: tuple[str, str]) -> Path:
    """The example with texts replaced."""
    text = EXAMPLE.read_text()
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = tmp_path / "state.yaml"
    file.write_text(text)
    return file


QUESTIONS = {
    "xray mcp-server tcp/9573": (1, "No: no packet", "ISOLATE", "grant from xray (privacy) to mcp-server (management)"),
    "mcp-server xray": (1, "No: no packet", "ISOLATE", "nothing in a state file joins two networks"),
    "management/mesh xray": (1, "No: no packet", "ISOLATE", "so not from management/mesh"),
    "privacy/mesh management/mesh": (1, "No: no packet", "ISOLATE", "grant"),
    "management/host mcp-server 22": (1, "No: no packet", "SERVICE", "tcp port 22 among the services of mcp-server"),
    "management/host monitoring": (1, "No: no packet", "SERVICE", "exposed: true"),
    "management/host mcp-server icmp": (1, "No: no packet", "SERVICE", "icmp has no port"),
    "management/host mcp-server mcp": (0, "Yes: the host of management can reach mcp-server by tcp port 9573", "SERVICE", ""),
    "management/host xray": (1, "No: no packet", "ISOLATE", "grant"),
    "privacy/host gateway vpn": (0, "Yes: the host of privacy can reach gateway by udp port 51820", "", ""),
    "privacy/host gateway": (0, "Yes", "", ""),
    "privacy/host gateway tcp/80": (1, "No", "SPOOF_GUARD", "Declare networks.privacy.host, and tcp port 80"),
    "internet xray tcp/80": (1, "Only with answers", "EGRESS", "answers only, to whoever sent something out before"),
    "internet gateway vpn": (1, "Only with answers", "EGRESS", "answers only"),
    "internet mcp-server": (1, "No: no packet", "ISOLATE", "answers only"),
    "mcp-server internet": (1, "No: no packet", "EGRESS", "networks.management.egress"),
    "mcp-server 8.8.8.8 udp/53": (1, "gets to 8.8.8.8", "EGRESS", "networks.management.egress"),
    "xray 8.8.8.8 udp/53": (0, "Yes: xray can reach 8.8.8.8", "EGRESS", ""),
    "privacy/mesh xray tcp/443": (0, "Yes: the mesh of privacy can reach xray", "FORWARD", ""),
    "privacy/mesh internet": (0, "Yes", "EGRESS", ""),
    "mcp-server management/mesh": (0, "Yes", "CROSSOVER", ""),
    "mcp-server management/host 22": (1, "Only with answers", "FORWARD", "Put the service into a container"),
    "monitoring management/host": (1, "No: no packet", "FORWARD", "the host offers its networks nothing"),
    "xray privacy/host": (1, "No: no packet", "FORWARD", "the host offers its networks nothing"),
    "xray management/host": (1, "No: no packet", "ISOLATE", "the host offers its networks nothing"),
}  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_the_rule_and_the_mend(question: str) -> None:
    code, answer, table, mend = QUESTIONS[question]
    done = ask(*question.split())
    assert done.exit_code == code, done.output
    head, _, _ = done.stdout.partition("A packet of this kind")
    assert answer in head and mend in head
    decided = next(line for line in head.splitlines() if line.startswith("Decided by"))
    assert table in decided
    assert ("What would change that" in head) == bool(code)


def test_the_verdict_is_the_cell_of_the_matrix() -> None:
    state = load(EXAMPLE).state
    cells = whole(state).cells
    for source in endpoints(state):
        for target in endpoints(state):
            if source != target:
                found = why(state, source, target)
                cell = cells[source.name, target.name]
                wanted = Verdict.YES if cell.open else Verdict.ANSWERS if cell.answers else Verdict.NO
                assert found.verdict == wanted, (source.name, target.name)
                assert found.told[-1].delivered == (wanted is Verdict.YES), "the packet shows what is said"
                assert found.decided_by and bool(found.needed) == (wanted is not Verdict.YES)


def test_the_usual_packet_of_a_vpn_client_is_shown() -> None:
    assert "nw_src=198.51.100.10" in ask("privacy/host", "gateway", "vpn").stdout


def test_a_literal_drop_is_named(tmp_path: Path) -> None:
    flow = "        - priority=200,in_port=veth102,tcp,tp_dst=443,actions=drop\n"
    file = changed(tmp_path, (DROP, flow + DROP))
    for target in ("internet", "gateway", "8.8.8.8"):
        done = ask("xray", target, "443", file=file)
        assert done.exit_code == 1 and "change or remove openflow.bridges.vmbr0.flows[0]" in done.stdout, done.output
        assert ask("xray", target, file=file).exit_code == 0, "other ports still go"


def test_one_address_of_the_world_is_asked_about_by_itself(tmp_path: Path) -> None:
    flow = "        - priority=200,in_port=veth102,ip,nw_dst=8.8.8.8,actions=drop\n"
    file = changed(tmp_path, (DROP, flow + DROP))
    done = ask("xray", "8.8.8.8", "udp/53", file=file)
    assert done.exit_code == 1 and "openflow.bridges.vmbr0.flows[0]" in done.stdout and "nw_dst=8.8.8.8" in done.stdout
    assert ask("xray", "1.1.1.1", "udp/53", file=file).exit_code == 0
    assert ask("xray", "internet", file=file).exit_code == 0


def test_a_service_that_is_only_not_exposed_needs_only_that(tmp_path: Path) -> None:
    shut = changed(
        tmp_path,
        ("{name: api-alt, protocol: tcp, port: 9574, exposed: true}", "{name: api-alt, protocol: tcp, port: 9574}"),
    )
    done = ask("management/host", "op-dbus-api", "api-alt", file=shut)
    assert done.exit_code == 1 and "exposed: true at the service api-alt of op-dbus-api" in done.stdout


def test_what_is_advised_works(tmp_path: Path) -> None:
    """Declare networks.privacy.host, and the port among the services with exposed: true."""
    file = changed(
        tmp_path,
        ("    egress: {port: warp0}\n", "    egress: {port: warp0}\n    host: 10.0.0.1\n"),
        ("        ipv4_address: 10.0.0.102/24\n",
         "        ipv4_address: 10.0.0.102/24\n        services: [{name: web, protocol: tcp, port: 80, exposed: true}]\n"),
    )  # fmt: skip
    assert ask("privacy/host", "xray", "tcp/80").exit_code == 1
    assert ask("privacy/host", "xray", "web", file=file).exit_code == 0


def test_a_network_with_its_own_egress_is_sent_there(tmp_path: Path) -> None:
    file = changed(tmp_path, ("    host: 10.1.0.1\n", "    host: 10.1.0.1\n    egress: {port: warp1}\n"))
    done = ask("mcp-server", "privacy/egress", file=file)
    assert done.exit_code == 1 and "Ask about management/egress" in done.stdout, done.output
    assert ask("mcp-server", "management/egress", file=file).exit_code == 0


def test_json_says_the_same() -> None:
    done = ask("xray", "mcp-server", "tcp/9573", "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    assert (done.exit_code, found["verdict"], found["from"], found["to"]) == (1, "no", "xray", "mcp-server")
    assert found["way"][-1]["decided_by"]["table_name"] == "ISOLATE" and "grant" in found["needed"]


@pytest.mark.parametrize(
    "text", ["", "0", "tcp/0", "tcp/65536", "99999999999", "²", "١٢", "foo/80", "tcp/", "/", "-1", "mcp"]
)
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(BulkheadError, match="is not a port; expected tcp/9573"):
        read_service(text, {("tcp", 9573): "api"})


@pytest.mark.parametrize(
    ("text", "service"),
    [
        ("9573", ("tcp", 9573)),
        ("UDP/53", ("udp", 53)),
        ("icmp", ("icmp", 0)),
        ("api", ("tcp", 9573)),
        ("sctp/1", ("sctp", 1)),
    ],
)
def test_what_is_a_port(text: str, service: tuple[str, int]) -> None:
    assert read_service(text, {("tcp", 9573): "api"}) == service


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("nobody", "xray"), "nobody is called 'nobody'"),
        (("xray", "host"), "privacy/host or management/host"),
        (("xray", "102"), "are both xray; name two"),
        (("internet", "8.8.8.8"), "are both privacy/egress; name two"),
        (("xray", "gateway", "70000"), "is not a port"),
        (("x" * 100_000, "gateway"), "nobody is called"),
        (("xray",), "Missing argument"),
    ],
)
def test_what_cannot_be_asked_says_why(args: tuple[str, ...], says: str) -> None:
    done = ask(*args)
    assert done.exit_code == 2 and says in done.stderr and not done.stdout and len(done.stderr) < 500


def test_without_a_state_file_and_a_controller_it_says_what_to_name(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["why", "xray", "gateway", "--run-dir", str(tmp_path)])
    assert done.exit_code == 2 and "--state FILE" in done.stderr and "no controller answers" in done.stderr
