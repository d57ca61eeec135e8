"""What a remark shows really happens: the same flows in a real Open vSwitch, the same packet, the same port."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from controller.flowtext import names_in, read_flows
from controller.verify.lint import lint
from controller.verify.node import LOCAL, Held
from tests.fakes.literal import CROSSING_BACK, CROSSING_THERE, MANAGEMENT, PRIVACY
from tests.ovs.tracer import Tracer


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer() as running:
        yield running


@pytest.mark.parametrize("text", [PRIVACY, MANAGEMENT, CROSSING_THERE, CROSSING_BACK])
def test_open_vswitch_does_what_an_example_says(tracer: Tracer, text: str) -> None:
    numbers = {name: number for number, name in enumerate(names_in(text), start=1)}
    flows = read_flows(text, numbers).flows
    tracer.bridge("br0", numbers, flows)
    shown = 0
    for remark in lint(Held.of("br0", numbers | {"LOCAL": LOCAL}, flows)):
        packet, _, says = remark.example.partition(" ")
        answer = tracer.traced("br0", packet) if packet else None
        if answer is None:
            continue
        left = {port for _, port in answer.sent}
        if found := re.match(r"(?:leaves by|goes to) ([\w-]+)", says):
            assert left == {numbers[found[1]]}, f"{remark.example}\n{answer.text}"
        elif says.startswith("may leave by any"):
            assert "NORMAL" in answer.text and len(left) > 1, answer.text
        elif says.startswith("teaches table"):
            assert "learn(" in answer.text, answer.text
        else:
            assert says == "matches both"
        shown += 1
    assert shown or text == CROSSING_THERE
