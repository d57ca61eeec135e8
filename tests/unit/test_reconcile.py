"""The reconciler by itself: one switch, values in and out; and the wire side's part of it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from apps.learning import learn_return
from controller import fields
from controller.codec import FlowStats, FlowUpdate, Update
from controller.compile import CANARY_FLOW, UNDECLARED_FLOW, undeclared
from controller.diff import Plan
from controller.flow import Flow, Match, Output
from controller.model import Role
from controller.reconcile import DUMP_TIMEOUT_S, REPAIR_EVERY_S, RETRY_FIRST_S, RETRY_MOST_S, Phase, Reconciler
from controller.signals import Dump, Install
from tests.fakes.switch import learned_flow

DESIRED = undeclared("br0")
BOTH = (CANARY_FLOW, UNDECLARED_FLOW)
FOREIGN = Flow(0, 9, Match(), (Output(1),), None, 0x77)
LEARNED = learned_flow(learn_return(Role.CONTAINER), {fields.IPV4_SRC.header: 7, fields.IN_PORT_FIELD.header: 3})


def stats(*flows: Flow) -> tuple[FlowStats, ...]:
    return tuple(FlowStats(flow, 0, 0, 1.0) for flow in flows)


def steady(*more: Flow) -> Reconciler:
    """A reconciler whose switch has everything, and more."""
    found = Reconciler(1, DESIRED)
    assert found.start(0.0) == [Dump(1)]
    effects, applied = found.dumped(stats(*BOTH, *more), 0.0)
    assert effects == [] and applied is not None and found.phase is Phase.STEADY
    return found


def removed(flow: Flow) -> tuple[FlowUpdate, ...]:
    return (FlowUpdate(Update.REMOVED, flow),)


def added(flow: Flow) -> tuple[FlowUpdate, ...]:
    return (FlowUpdate(Update.ADDED, flow),)


def test_nothing_is_installed_before_the_dump() -> None:
    found = Reconciler(1, DESIRED)
    assert found.start(0.0) == [Dump(1)]
    assert found.want(DESIRED, 0.1) == ([], None)
    assert found.tick(1.0) == ([], None)
    assert found.updated(removed(CANARY_FLOW), 1.0)[0] == []
    effects, applied = found.dumped((), 1.0)
    (install,) = effects
    assert isinstance(install, Install) and set(install.plan.add) == set(BOTH) and applied is None


def test_the_picture_moves_only_when_the_switch_has_confirmed() -> None:
    found = Reconciler(1, DESIRED)
    found.start(0.0)
    (install,), _ = found.dumped(stats(UNDECLARED_FLOW), 0.0)
    assert isinstance(install, Install) and install.plan == Plan(add=(CANARY_FLOW,))
    assert CANARY_FLOW.key not in found.installed
    assert found.committed(install.token + 1, 1.0) == ([], None)
    assert CANARY_FLOW.key not in found.installed
    effects, applied = found.committed(install.token, 1.5)
    assert CANARY_FLOW.key in found.installed and not effects
    assert applied is not None and applied.first and applied.adopted == 1 and applied.took_s == 1.5
    assert found.committed(install.token, 2.0) == ([], None), "once is enough"


def test_a_refusal_pauses_longer_every_time_and_looks_again() -> None:
    found = Reconciler(1, DESIRED)
    found.start(0.0)
    now, pause = 0.0, RETRY_FIRST_S
    for _ in range(8):
        (install,), _ = found.dumped((), now)
        assert isinstance(install, Install)
        found.refused(install.token, now)
        assert found.phase is Phase.FAILED and found.tick(now + pause - 0.01) == ([], None)
        now += pause
        assert found.tick(now) == ([Dump(1)], None)
        pause = min(2 * pause, RETRY_MOST_S)
    assert pause == RETRY_MOST_S


def test_a_refusal_of_another_bundle_changes_nothing() -> None:
    found = steady()
    found.refused(5, 1.0)
    assert found.phase is Phase.STEADY


def test_a_dump_is_asked_for_again_and_a_late_one_ignored() -> None:
    found = Reconciler(1, DESIRED)
    found.start(0.0)
    assert found.tick(DUMP_TIMEOUT_S - 1) == ([], None)
    assert found.tick(DUMP_TIMEOUT_S) == ([Dump(1)], None)
    (install,), _ = found.dumped(stats(UNDECLARED_FLOW), 31.0)
    assert found.dumped(stats(*BOTH), 31.1) == ([], None), (
        "one bundle is under way; this answer is of the first request"
    )
    assert isinstance(install, Install) and found.committed(install.token, 31.2)[1] is not None


def test_a_repair_is_not_held_up_by_the_time_a_dump_may_take() -> None:
    found = steady()
    effects, _ = found.updated(removed(CANARY_FLOW), 0.1)
    assert len(effects) == 1


def test_tampering_is_sorted_from_foreign_and_learned_changes() -> None:
    found = steady()
    updates = (*added(FOREIGN), *added(LEARNED), *removed(CANARY_FLOW), FlowUpdate(Update.ABBREVIATED))
    effects, changed = found.updated(updates, 1.0)
    assert [u.flow for u in changed.foreign] == [FOREIGN]
    assert [u.flow for u in changed.learned] == [LEARNED]
    assert [u.flow for u in changed.tampered] == [CANARY_FLOW]
    (install,) = effects
    assert isinstance(install, Install) and install.plan == Plan(add=(CANARY_FLOW,))
    assert found.foreign == (FOREIGN,) and set(found.learned.values()) == {LEARNED}


def test_a_flow_put_right_by_somebody_else_is_no_tampering() -> None:
    found = steady()
    effects, changed = found.updated(added(CANARY_FLOW), 1.0)
    assert not effects and not changed.tampered


def test_a_learned_flow_in_a_place_of_ours_is_tampering() -> None:
    found = steady()
    usurper = Flow(0, 0, Match(), (Output(1),), None, LEARNED.cookie)
    effects, changed = found.updated(added(usurper), 1.0)
    assert changed.tampered and len(effects) == 1


def test_repairs_come_at_a_limited_rate() -> None:
    found = steady()
    (install,), _ = found.updated(removed(CANARY_FLOW), 1.0)
    assert isinstance(install, Install)
    found.committed(install.token, 1.0)
    assert found.updated(removed(CANARY_FLOW), 1.0 + REPAIR_EVERY_S / 2)[0] == []
    (again,), _ = found.tick(1.0 + REPAIR_EVERY_S)
    assert isinstance(again, Install)
    _, applied = found.committed(again.token, 2.0)
    assert applied is not None and applied.repair


def test_a_wish_during_a_bundle_comes_after_it() -> None:
    found = Reconciler(1, DESIRED)
    found.start(0.0)
    (first,), _ = found.dumped((), 0.0)
    assert isinstance(first, Install)
    other = undeclared("br0")
    flows = {CANARY_FLOW.key: CANARY_FLOW}
    assert found.want(type(other)(other.bridge, flows), 0.1) == ([], None)
    (second,), _ = found.committed(first.token, 0.2)
    assert isinstance(second, Install) and second.plan == Plan(delete=(UNDECLARED_FLOW,))
    assert second.token != first.token


def test_the_flow_monitor_is_asked_for_once_a_connection() -> None:
    """A switch refuses a second monitor of one number. In a process of its own, as the hub changes the whole one."""
    script = """
        from controller import hub
        from controller.link import Link
        from controller.signals import Dump

        class Wire:
            id = 1
            sent = b""
            def send(self, buf, close_socket=False):
                Wire.sent += buf
                return True
            def close(self):
                pass

        link = Link(Wire(), print)
        for _ in range(3):
            link.do(Dump(1))
        hub.sleep(0)
        kinds = []
        while Wire.sent:
            size = int.from_bytes(Wire.sent[2:4], "big")
            kinds.append(int.from_bytes(Wire.sent[8:10], "big"))
            Wire.sent = Wire.sent[size:]
        assert kinds.count(16) == 1 and kinds.count(1) == 3, kinds
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
