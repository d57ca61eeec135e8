"""The matrix of who reaches whom: held against the table measured on the wire, and against packets one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings

from controller.cli import main
from controller.model import DesiredState, Ipv4, Role
from controller.problems import BulkheadError
from controller.proofcli import _fitting
from controller.statefile import load
from controller.verify.endpoints import SOMEBODY, NotFound, endpoints, find, packet, services, vpn_port
from controller.verify.node import Node
from controller.verify.reach import Cell, Matrix, inside, kinds_of, whole
from tests.fakes.states import management, member, privacy, state_of, states, two_networks
from tests.ovs.test_policy import SERVICES, TABLE

EXAMPLE = Path(__file__).parents[2] / "examples" / "oo1424oo.yaml"
NAMES = {
    "mcp": "mcp-server",
    "api": "op-dbus-api",
    "peer_priv": "privacy/mesh",
    "peer_mgmt": "management/mesh",
    "inet": "privacy/egress",
    "host0": "privacy/host",
    "host1": "management/host",
}


@pytest.fixture(scope="module")
def state() -> DesiredState:
    return load(EXAMPLE).state


@pytest.fixture(scope="module")
def matrix(state: DesiredState) -> Matrix:
    return whole(state)


@pytest.mark.parametrize("pair", TABLE, ids=lambda pair: "-".join(pair))
def test_a_cell_says_what_was_measured(pair: tuple[str, str], state: DesiredState, matrix: Matrix) -> None:
    source, target = (NAMES.get(name, name) for name in pair)
    cell, word = matrix.cells[source, target], TABLE[pair]
    if word == "all":
        assert cell.text == "all"
    elif word in ("service", "vpn"):
        endpoint = find(state, target)
        named = {name: f"{p}/{n}" for (p, n), name in services(endpoint, vpn_port(state, endpoint)).items()}
        assert {named[label] for label in cell.open} == SERVICES[pair[1]]
    else:
        assert not cell.open


def test_the_measured_table_has_every_cell_but_those_of_the_host_with_itself(matrix: Matrix) -> None:
    measured = {tuple(NAMES.get(name, name) for name in pair) for pair in TABLE}
    assert set(matrix.cells) - measured == {("privacy/host", "management/host"), ("management/host", "privacy/host")}
    assert not any(matrix.cells[pair].open for pair in set(matrix.cells) - measured)


def test_nothing_that_crosses_is_even_an_answer(state: DesiredState, matrix: Matrix) -> None:
    network = {e.name: e.network for e in endpoints(state)}
    crossing = [cell for (a, b), cell in matrix.cells.items() if network[a] != network[b]]
    assert len(crossing) == 50 and not [cell for cell in crossing if cell.open or cell.answers]


# ----------------------------------------------------------------------------------------------------------------- laws


@settings(max_examples=40, deadline=None)
@given(states())
def test_no_cell_between_two_networks_is_open(state: DesiredState) -> None:
    network = {e.name: e.network for e in endpoints(state)}
    opened = {pair: c for pair, c in whole(state).cells.items() if c.open and network[pair[0]] != network[pair[1]]}
    assert not opened


@settings(max_examples=40, deadline=None)
@given(states(max_networks=2))
def test_what_one_packet_does_the_cell_says(state: DesiredState) -> None:
    node, everybody, cells = Node.declared(state), endpoints(state), whole(state).cells
    for source in everybody:
        arrivals = list(node.arrivals(source.end, taught=True))
        for target in everybody:
            if source == target:
                continue
            offered = services(target, vpn_port(state, target))
            kinds = kinds_of([a for a in arrivals if a.end == target.end], offered)
            assert tuple(kind.label for kind in kinds) == cells[source.name, target.name].kinds
            for service in (("tcp", 80), ("udp", 53), ("icmp", 0), *offered):
                header = packet(source, target, *service)
                legs = node.follow(source.end, header)
                if any((leg.bridge, port) == target.end for leg in legs for port, _ in leg.sent):
                    labels = [k.label for k in kinds if inside_one(header, k.cube, k.but)]
                    assert len(labels) == 1, "kinds are to be all there is, once"
                    assert labels[0] in cells[source.name, target.name].open


def inside_one(header: int, cube: tuple[int, int], but: tuple[tuple[int, int], ...]) -> bool:
    """Whether a packet is in a cube and in none of others."""
    return header & cube[1] == cube[0] and not any(header & mask == value for value, mask in but)


@settings(max_examples=30, deadline=None)
@given(states(max_networks=1))
def test_an_open_cell_has_a_packet_that_arrives(state: DesiredState) -> None:
    node, by_name = Node.declared(state), {e.name: e for e in endpoints(state)}
    for source in by_name.values():
        for arrival in node.arrivals(source.end):
            if arrival.doubt or arrival.end[1] in {p for link in node.links for p in (link[1],)}:
                continue
            for kind in kinds_of([arrival], {}):
                header = inside(arrival.region, kind)
                if header is not None:
                    sent = {(leg.bridge, port) for leg in node.follow(source.end, header) for port, _ in leg.sent}
                    assert arrival.end in sent


# ---------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell(("tcp", "udp")), "no"),
        (Cell(("tcp", "udp"), answers=("tcp",)), "answers"),
        (Cell(("tcp", "udp"), open=("tcp", "udp")), "all"),
        (Cell(("tcp", "udp", "frames"), open=("tcp", "udp", "frames")), "all frames"),
        (Cell(("tcp", "udp", "frames"), open=("frames",)), "frames"),
        (Cell(("web", "tcp/*", "udp"), open=("web",)), "web"),
        (Cell(("web", "a", "b", "c"), open=("a", "b", "c")), "all but web"),
        (Cell(("tcp", "udp"), open=("tcp",), doubt=True), "tcp?"),
    ],
)
def test_a_cell_in_a_word(cell: Cell, text: str) -> None:
    assert cell.text == text


def test_columns_stand_beside_each_other_as_far_as_they_fit() -> None:
    assert _fitting([10, 10, 10], 24) == [[0, 1], [2]]
    assert _fitting([99, 5], 24) == [[0], [1]]
    assert _fitting([], 24) == []


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("xray", "xray"),
        ("102", "xray"),
        ("veth102", "xray"),
        ("vmbr0:veth102", "xray"),
        ("privacy/xray", "xray"),
        ("10.0.0.102", "xray"),
        ("10.8.0.7", "gateway"),
        ("10.0.0.77", "privacy/mesh"),
        ("internet", "privacy/egress"),
        ("8.8.8.8", "privacy/egress"),
        ("vmbr1:LOCAL", "management/host"),
        ("10.1.0.1", "management/host"),
    ],
)
def test_everybody_has_several_names(word: str, name: str, state: DesiredState) -> None:
    assert find(state, word).name == name


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("host", "privacy/host or management/host"),
        ("mcp", "did you mean mcp-server?"),
        ("xrai", "did you mean xray?"),
        ("", "nobody is called ''"),
        ("10.0.0.300", "nobody"),
        ("x" * 9999, "nobody"),
    ],
)
def test_who_is_not_there_is_said_with_who_is(word: str, says: str, state: DesiredState) -> None:
    with pytest.raises(NotFound) as caught:
        find(state, word)
    assert says in str(caught.value) and len(str(caught.value)) < 400


def test_an_address_of_the_world_is_kept(state: DesiredState) -> None:
    assert find(state, "8.8.8.8").address == Ipv4.parse("8.8.8.8")
    assert find(state, "internet").address == SOMEBODY


def test_containers_of_one_name_are_told_apart_by_their_network() -> None:
    one = replace(member("privacy", 102, "10.0.0.102"), name="web")
    other = replace(member("management", 202, "10.1.0.202"), name="web")
    state = state_of(privacy(one), management(other))
    assert [e.name for e in endpoints(state) if e.role is Role.CONTAINER] == ["privacy/web", "management/web"]
    assert find(state, "privacy/web").end == ("vmbr0", "veth102")
    with pytest.raises(BulkheadError, match="say privacy/web or management/web"):
        find(state, "web")


def test_a_network_with_nothing_but_containers() -> None:
    bare = replace(management(), mesh=None, host=None)
    names = [e.name for e in endpoints(state_of(bare))]
    assert names == ["c200", "c201", "management/host"]
    found = whole(state_of(bare))
    assert not found.cells["management/host", "c200"].open
    with pytest.raises(BulkheadError, match="nobody is called 'internet'"):
        find(state_of(bare), "internet")


# ---------------------------------------------------------------------------------------------------------- the command


def reach(*args: str, columns: int | None = None) -> Result:
    return CliRunner().invoke(main, ["reach", *args], env={"COLUMNS": str(columns)} if columns else {})


def test_the_table_has_a_line_for_everybody_and_does_not_wrap(state: DesiredState) -> None:
    done = reach(str(EXAMPLE))
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and len(lines) == 1 + len(endpoints(state))
    assert lines[0].startswith("FROM \\ TO") and len({len(line) for line in lines}) == 1


def test_a_piped_table_of_many_does_not_wrap(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text()
    block = lines[lines.index('    - id: "102"') : lines.index("    # Management network")]
    more = [
        block.replace('"102"', f'"{n}"').replace("veth102", f"veth{n}").replace("xray", f"a-name-of-length-{n}")
        .replace("10.0.0.102", f"10.0.0.{n}")
        for n in range(110, 135)
    ]  # fmt: skip
    file = tmp_path / "many.yaml"
    file.write_text(lines.replace(block, block + "".join(more)))
    done = reach(str(file), "--from", "xray", "--from", "mcp-server")
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 3 and len(done.stdout.splitlines()[0]) > 500


def test_rows_and_columns_can_be_chosen() -> None:
    done = reach(str(EXAMPLE), "--from", "management/host", "--to", "mcp-server", "--json")
    found = json.loads(done.stdout)
    assert [(c["from"], c["to"], c["text"]) for c in found["cells"]] == [("management/host", "mcp-server", "mcp")]
    assert {e["name"]: e["role"] for e in found["endpoints"]} == {"management/host": "host", "mcp-server": "container"}


def test_against_shows_the_one_cell_that_an_exposed_service_adds(tmp_path: Path) -> None:
    service = (
        "        network: management\n        services: [{name: metrics, protocol: tcp, port: 9090, exposed: true}]\n"
    )
    head, found, tail = EXAMPLE.read_text().rpartition("        network: management\n")
    new = tmp_path / "new.yaml"
    new.write_text(head + service + tail)
    done = reach(str(new), "--against", str(EXAMPLE), "--json")
    changes = json.loads(done.stdout)["changes"]
    assert found and done.exit_code == 1
    opened = [
        (c["from"], c["to"]) for c in changes if c["new"]["open"] != c["old"]["open"] and c["from"].endswith("/host")
    ]
    assert opened == [("management/host", "monitoring")]
    # Whoever is asked for something may answer; nothing else is new.
    assert {(c["from"], c["to"], c["new"]["text"]) for c in changes} == {
        ("management/host", "monitoring", "metrics"),
        ("monitoring", "management/host", "answers"),
    }
    text = reach(str(new), "--against", str(EXAMPLE))
    assert text.exit_code == 1 and "metrics" in text.stdout


def test_against_itself_nothing_differs() -> None:
    done = reach(str(EXAMPLE), "--against", str(EXAMPLE))
    assert (done.exit_code, "everybody reaches the same" in done.stdout) == (0, True)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("/nowhere.yaml",), 1, "no such file"),
        (("/",), 1, "a directory"),
        ((str(EXAMPLE), "--against", "/nowhere.yaml"), 1, "no such file"),
        ((str(EXAMPLE), "--from", "nobody"), 2, "nobody is called 'nobody'"),
        ((str(EXAMPLE), "--to", "host"), 2, "more than one"),
        ((), 2, "Missing argument"),
    ],
)
def test_what_cannot_be_asked_says_why(args: tuple[str, ...], code: int, says: str) -> None:
    done = reach(*args)
    assert done.exit_code == code and says in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [b"", b"\x8a\x00\xff" * 99, b"\0", b"[]", b"networks: 5", b"{" * 5000], ids=repr)
def test_garbage_is_no_state_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "state.yaml"
    file.write_bytes(content)
    done = reach(str(file))
    assert done.exit_code == 1 and "expected" in done.stderr and "Traceback" not in done.stderr


def test_two_networks_of_the_fakes_are_as_the_example(matrix: Matrix) -> None:
    found: dict[tuple[str, str], Cell] = dict(whole(two_networks()).cells)
    assert found["c100", "c102"].text == matrix.cells["gateway", "xray"].text == "all"
    assert found["management/host", "c201"].open == (), "neither of its services is exposed"
