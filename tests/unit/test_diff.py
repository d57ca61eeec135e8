"""What has to change in a switch."""

from __future__ import annotations

from dataclasses import replace

from controller.diff import Plan, foreign, plan
from controller.flow import Cookie, Flow, FlowKey, Match, Output

OURS, LEARNED, THEIRS = int(Cookie(1, 1)), int(Cookie(6, 1, learned=True)), 0x77


def flow(port: int, cookie: int = OURS, *, out: int = 1) -> Flow:
    return Flow(0, 100, Match.named(in_port=port), (Output(out),), None, cookie)


def held(*flows: Flow) -> dict[FlowKey, Flow]:
    return {flow.key: flow for flow in flows}


def test_nothing_to_do_is_an_empty_plan() -> None:
    same = held(flow(1), flow(2))
    assert not plan(same, dict(same)) and plan(same, held(flow(1), flow(2))) == Plan()
    assert Plan().counts == {"added": 0, "changed": 0, "deleted": 0}


def test_what_is_missing_is_added_and_what_is_left_over_deleted() -> None:
    todo = plan(held(flow(1), flow(2)), held(flow(2), flow(3)))
    assert todo == Plan(add=(flow(1),), delete=(flow(3),)) and bool(todo)
    assert todo.counts == {"added": 1, "changed": 0, "deleted": 1}


def test_what_differs_in_any_way_is_changed() -> None:
    for other in (flow(1, out=2), flow(1, int(Cookie(2, 2))), replace(flow(1), idle_s=3), replace(flow(1), goto=9)):
        assert plan(held(flow(1)), held(other)) == Plan(change=(flow(1),))


def test_flows_of_others_and_learned_ones_are_left_alone() -> None:
    installed = held(flow(5, THEIRS), flow(6, LEARNED), flow(7, 0), flow(8, 0xB01D << 48))
    assert not plan({}, installed)


def test_whoever_stands_in_our_place_is_replaced() -> None:
    for cookie in (THEIRS, LEARNED, 0):
        assert plan(held(flow(1)), held(flow(1, cookie, out=9))) == Plan(change=(flow(1),))


def test_foreign_is_what_is_neither_ours_nor_in_a_place_of_ours() -> None:
    installed = held(flow(1), flow(2, THEIRS), flow(3, LEARNED), flow(4, THEIRS))
    assert foreign(installed, held(flow(1), flow(4))) == (flow(2, THEIRS),)
