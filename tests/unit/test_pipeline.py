"""The tables: what they are, and that a flow they do not allow cannot be made."""

from __future__ import annotations

import pytest

from apps import MESH_APP, SOCKET_APPS
from controller import fields
from controller.fields import BY_NAME
from controller.flow import Action, Bits, Ct, DecTtl, Learn, Load, Match, Move, Output, Raw, Resubmit, SetField, whole
from controller.model import Role
from controller.pipeline import (
    ADMIT,
    CANARY,
    CROSS,
    CROSSOVER,
    DROP,
    EGRESS,
    FORWARD,
    GRANT,
    ISOLATE,
    KIND,
    LOCAL_OUT,
    MESH_TABLES,
    NEIGHBOUR,
    OUT,
    OUTPUT_GUARD,
    RETURN,
    ROLE_BITS,
    SERVICE,
    SOCKET_TABLES,
    SPOOF_GUARD,
    VIOLATION,
    Band,
    Table,
    Then,
    Violation,
    act,
    any_role,
    arp_reply,
    deliver,
    go,
    role_value,
    set_field,
    table_name,
    violation,
)
from controller.problems import PipelineError

EVERY_TABLE: list[Table] = [*SOCKET_TABLES, *MESH_TABLES]
every_table = pytest.mark.parametrize("table", EVERY_TABLE, ids=lambda table: table.name)
LEARN = Learn(RETURN.id, 100, 1, 1, 1, 1, ())


# ---------------------------------------------------------------------------------------------- what cannot be built


@pytest.mark.parametrize(
    "table, name", [(ISOLATE, "in_port"), (FORWARD, "tcp_dst"), (RETURN, "eth_type"), (CANARY, "reg0")]
)
def test_a_field_the_table_does_not_match(table: Table, name: str) -> None:
    with pytest.raises(PipelineError, match=f"{table.name} may not match {name}"):
        table.flow(Band.REST, 1, **{name: 1})


def test_a_field_nobody_knows() -> None:
    with pytest.raises(PipelineError, match="may not match tcp_port"):
        SERVICE.flow(Band.REST, 1, tcp_port=80)


@pytest.mark.parametrize("value", [1 << 32, -1, (0x0A000001, 0xFF000000), (0, 1 << 32)])
def test_a_value_that_does_not_fit(value: int | tuple[int, int]) -> None:
    with pytest.raises(PipelineError, match="ISOLATE: ipv4_dst"):
        ISOLATE.flow(Band.REST, 1, ipv4_dst=value)


def test_a_mask_on_a_field_that_has_none() -> None:
    with pytest.raises(PipelineError, match="cannot be masked"):
        ISOLATE.flow(Band.REST, 1, eth_type=(0x0800, 0xFF00))


@every_table
def test_a_next_table_that_is_not_declared(table: Table) -> None:
    for other in EVERY_TABLE:
        if other in table.next:
            assert table.flow(0, 1, go(other)).goto == other.id
        else:
            with pytest.raises(PipelineError, match=f"{table.name} may not go to {other.name}"):
                table.flow(0, 1, go(other))


def test_a_next_table_that_lies_behind() -> None:
    backwards = Table(50, "B", "", frozenset(), next=(ISOLATE,))
    with pytest.raises(PipelineError, match="B may not go to ISOLATE"):
        backwards.flow(0, 1, go(ISOLATE))


SAMPLES: tuple[Action, ...] = (
    Output(1),
    SetField(OUT.header, 1),
    Move(whole(fields.ETH_SRC), whole(fields.ETH_DST)),
    Load(1, Bits(OUT.header, 0, 16)),
    Resubmit(RETURN.id),
    LEARN,
    Ct(),
    DecTtl(),
    Raw(b""),
)
MAY: dict[Table, set[type]] = {
    ADMIT: {SetField},
    SPOOF_GUARD: {SetField},
    NEIGHBOUR: {SetField, Move, Output},
    GRANT: {Ct},
    CROSS: {SetField, Ct, DecTtl},
    ISOLATE: {SetField},
    SERVICE: {SetField, Learn, Resubmit},
    RETURN: set(),
    EGRESS: {SetField, Learn},
    FORWARD: {SetField},
    OUTPUT_GUARD: {Output, SetField},
    VIOLATION: {Output},
    CANARY: set(),
    CROSSOVER: {Output},
}


@every_table
def test_an_action_the_table_does_not_have(table: Table) -> None:
    for action in SAMPLES:
        if type(action) in MAY[table]:
            assert table.flow(0, 1, act(action)).actions == (action,)
        else:
            with pytest.raises(PipelineError, match=f"{table.name} may not {type(action).__name__.lower()}"):
                table.flow(0, 1, act(action))


@pytest.mark.parametrize("port", [fields.NORMAL, fields.FLOOD, fields.ALL])
def test_an_output_that_decides_for_itself(port: int) -> None:
    for table in (OUTPUT_GUARD, NEIGHBOUR, CROSSOVER):
        with pytest.raises(PipelineError, match="name a port"):
            table.flow(0, 1, act(Output(port)))


def test_a_resubmit_or_learn_into_any_other_table() -> None:
    with pytest.raises(PipelineError, match="may consult RETURN only, not table 90"):
        SERVICE.flow(0, 1, act(Resubmit(OUTPUT_GUARD.id)))
    with pytest.raises(PipelineError, match="may learn into RETURN only, not table 1"):
        SERVICE.flow(0, 1, act(Learn(1, 100, 1, 1, 1, 1, ())))


def test_connections_are_looked_up_on_the_way_into_cross_alone() -> None:
    assert GRANT.flow(0, 1, act(Ct(7, CROSS.id))).actions == (Ct(7, CROSS.id),)
    with pytest.raises(PipelineError, match="GRANT may not go to table 90"):
        GRANT.flow(0, 1, act(Ct(7, OUTPUT_GUARD.id)))
    with pytest.raises(PipelineError, match="CROSS may not go to table 40"):
        CROSS.flow(0, 1, act(Ct(7, ISOLATE.id)))


@pytest.mark.parametrize("priority", [-1, Band.FRAME_DENY + 51, Band.RULE, 0xFFFF])
def test_a_priority_outside_the_bands(priority: int) -> None:
    with pytest.raises(PipelineError, match=f"ISOLATE has no priority {priority}"):
        ISOLATE.flow(priority, 1)


def test_rules_have_room_above_the_bands_in_service_alone() -> None:
    assert SERVICE.flow(0xFFFF, 1).priority == 0xFFFF
    with pytest.raises(PipelineError):
        SERVICE.flow(0x10000, 1)
    assert [table.name for table in EVERY_TABLE if table.max_priority >= Band.RULE] == ["SERVICE"]


# --------------------------------------------------------------------------------------------------- what can be built


def test_a_flow_without_an_outcome_drops() -> None:
    flow = ISOLATE.flow(Band.DENY, 7, eth_type=0x0800, ipv4_dst=(0x0A000000, 0xFF000000))
    assert (flow.table, flow.priority, flow.cookie, flow.actions, flow.goto) == (ISOLATE.id, 400, 7, (), None)
    assert flow.match == Match.named(eth_type=0x0800, ipv4_dst=(0x0A000000, 0xFF000000))
    assert ISOLATE.flow(0, 1, DROP).effect == ((), None)


def test_the_tables_are_in_order_and_only_lead_on() -> None:
    groups: tuple[tuple[Table, ...], ...] = (SOCKET_TABLES, MESH_TABLES)
    for tables in groups:
        assert len({table.id for table in tables}) == len({table.name for table in tables}) == len(tables)
        assert len({table.name for table in tables}) == len(tables)
        for table in tables:
            assert all(other.id > table.id and other in tables for other in table.next)


def test_every_road_to_a_port_leads_through_the_guard() -> None:
    """Only these tables output: the guard, VIOLATION (to the controller) and NEIGHBOUR (back where it came from)."""
    may_output = {table.name for table in SOCKET_TABLES if Output in table.actions}
    assert may_output == {"NEIGHBOUR", "OUTPUT_GUARD", "VIOLATION"}
    assert ISOLATE.next == (SERVICE, VIOLATION) and GRANT.next == (CROSS, ISOLATE)
    assert CROSS.next == (OUTPUT_GUARD, VIOLATION) and [t.name for t in SOCKET_TABLES if CROSS in t.next] == ["GRANT"]
    into_service = [table.name for table in SOCKET_TABLES if SERVICE in table.next]
    assert into_service == ["ISOLATE"], "nothing goes round ISOLATE"
    assert [table.name for table in SOCKET_TABLES if ISOLATE in table.next] == ["GRANT"]
    assert [table.name for table in SOCKET_TABLES if GRANT in table.next] == ["SPOOF_GUARD"]


def test_apps_make_flows_of_their_tables_only_and_have_names_and_ids_of_their_own() -> None:
    ids = [*[app.id for app in SOCKET_APPS], MESH_APP.id]
    names = [*[app.name for app in SOCKET_APPS], MESH_APP.name]
    assert len(set(ids)) == len(set(names)) == len(ids)
    assert {table for app in SOCKET_APPS for table in app.tables} == set(SOCKET_TABLES) - {CANARY}
    assert all(0 < number < 128 for number in ids)


# ----------------------------------------------------------------------------------------------------------- registers


@pytest.mark.parametrize(
    "allowed", [set(), {Role.HOST}, {Role.CONTAINER, Role.MESH}, set(Role)], ids=lambda roles: "-".join(sorted(roles))
)
def test_any_role_is_true_for_these_roles_and_no_other(allowed: set[Role]) -> None:
    value, mask = any_role(*allowed)
    assert {role for role in Role if role_value(role) & mask == value} == allowed
    assert 0 & mask != value, "a packet that nobody gave a role"
    for role in Role:
        assert ROLE_BITS[role] & mask != value, "nor one without the bit that says it was given"


def test_two_roles_at_once_are_none() -> None:
    value, mask = any_role(Role.CONTAINER)
    both = role_value(Role.CONTAINER) | role_value(Role.EGRESS)
    assert both & mask != value


def test_deliver_names_port_and_mac() -> None:
    assert deliver(7) == Then((set_field(OUT, 7),), OUTPUT_GUARD)
    assert deliver(7, 9).actions == (set_field(OUT, 7), set_field(fields.ETH_DST, 9))
    assert deliver(fields.LOCAL).actions == (set_field(OUT, LOCAL_OUT),)


def test_a_violation_says_its_kind() -> None:
    for kind in Violation:
        assert violation(kind) == Then((set_field(KIND, kind),), VIOLATION) and kind.words


def test_then_after_puts_actions_first() -> None:
    assert deliver(7).after(LEARN).actions == (LEARN, set_field(OUT, 7))


def test_an_arp_reply_goes_back_by_the_port_the_request_came_by() -> None:
    outputs = [action for action in arp_reply(5).actions if isinstance(action, Output)]
    assert outputs == [Output(fields.IN_PORT)] and arp_reply(5).goto is None


def test_table_names() -> None:
    assert table_name(0) == "ADMIT" and table_name(0, mesh=True) == "CROSSOVER"
    assert table_name(250) == table_name(250, mesh=True) == "CANARY" and table_name(77) == "77"
    assert set(MAY) == set(EVERY_TABLE) and "in_port" in BY_NAME
