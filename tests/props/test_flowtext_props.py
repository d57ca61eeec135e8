"""Reading flows: whatever a flow is, its text says it; whatever a text is, it is read or refused."""

from __future__ import annotations

import random
import string

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from controller.compile import BridgeCompiler, planned_ports
from controller.flow import Flow
from controller.flowtext import names_in, read_flow, read_flows
from controller.model import DesiredState
from controller.problems import InvalidInput
from controller.statefile import load
from tests.fakes.flows import LINES, PORTS, flows
from tests.fakes.states import states


def lawful(examples: int) -> settings:
    """So many examples, however long each takes."""
    return settings(deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck))


def compiled(state: DesiredState) -> list[Flow]:
    """Every flow of every bridge."""
    return [
        flow
        for bridge in state.bridges
        for flow in BridgeCompiler().compile(state, bridge, planned_ports(state, bridge)).flows.values()
    ]


def check_read_back(wanted: list[Flow]) -> None:
    """Their text, read, is the same flows."""
    read = read_flows("\n".join(map(str, wanted)), {})
    assert list(read.flows) == wanted
    assert not read.problems


@lawful(300)
@given(flows())
def test_any_flow_is_read_back_from_its_text(flow: Flow) -> None:
    assert read_flow(str(flow), {}) == flow


@lawful(20)
@given(states())
def test_the_flows_of_any_state_are_read_back(state: DesiredState) -> None:
    check_read_back(compiled(state))


def test_the_flows_of_the_example_are_read_back() -> None:
    check_read_back(compiled(load("examples/oo1424oo.yaml").state))


def tried(text: str) -> None:
    """Read, or refused with reasons; nothing else. A flow that is read can be written and read again."""
    names_in(text)
    try:
        read = read_flows(text, PORTS)
    except InvalidInput as refused:
        assert refused.problems
        return
    for flow in read.flows:
        try:
            assert read_flow(str(flow), PORTS).actions == flow.actions, str(flow)
        except InvalidInput as refused:
            # What a dump may say and a file may not.
            assert all("VLAN" in p.expected or "priority" in p.found for p in refused.problems), str(flow)


ALPHABET = string.ascii_lowercase + string.digits + ',=():[]"->./|+#\\ \n\0²é'


@lawful(300)
@given(st.text(alphabet=ALPHABET, max_size=200))
@example('actions="')
@example('in_port="\\",actions=drop')
@example("actions=" + '"\\' * 5000)
@example("actions=" + "clone(" * 5000)
@example('"' * 20000 + "#")
@example("(" * 20000 + "actions=drop")
@example("actions=" + "(" * 20000)
@example("reg0=" + "9" * 5000 + ",actions=drop")
@example("actions=note:" + "1." * 20000 + "x")
@example("actions=1,write_actions(output:1),write_metadata:5,goto_table:6")
@example("actions=1,clear_actions,write_metadata:5,write_actions(output:1),goto_table:6")
def test_any_text_is_read_or_refused(text: str) -> None:
    tried(text)


WORDS = [
    "nw_src=10.0.0.1",
    "tcp",
    "actions=",
    "drop",
    "clone(",
    ")",
    "learn(",
    "->",
    "[",
    "]",
    "/",
    "0x",
    "reg0",
    "set_field:",
]


@lawful(400)
@given(st.sampled_from(LINES), st.integers(0, 2**32))
def test_any_damaged_line_is_read_or_refused(line: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(rng.randrange(1, 5)):
        at, to = sorted(rng.randrange(len(line) + 1) for _ in range(2))
        line = rng.choice(
            (
                line[:at] + line[at + 1 :],
                line[:at] + rng.choice(ALPHABET) + line[at:],
                line[:at] + rng.choice(WORDS) + line[at:],
                line[:to] + line[at:],
                line[:at] + line[to:],
            )
        )
    tried(line)
