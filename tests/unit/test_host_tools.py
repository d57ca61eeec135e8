"""How the machine's own tools are asked, and what is said of one that fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from controller.verify.host import tools
from controller.verify.host.facts import Gap
from controller.verify.host.tools import Host


def test_what_a_tool_prints_is_answered() -> None:
    assert Host().run("printf", "a\\377b") == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(
    "command, why, mend, absent",
    [
        (("no-such-tool",), "no-such-tool is not installed", "install no-such-tool", True),
        (("sh", "-c", "echo no good >&2; exit 3"), "sh failed: no good", "find out why: sh -c", False),
        (("sh", "-c", "echo Operation not permitted >&2; exit 1"), "not permitted", "run this as root", False),
        (("sh", "-c", "exit 3"), "sh failed: exit 3", "find out why", False),
        (("/etc/passwd",), "/etc/passwd cannot be run", "find out why", False),
        (("/etc/passwd/x",), "/etc/passwd/x cannot be run", "find out why", False),
    ],
)
def test_a_tool_that_fails_is_a_gap(command: tuple[str, ...], why: str, mend: str, absent: bool) -> None:
    gap = Host().run(*command)
    assert isinstance(gap, Gap)
    assert why in gap.why
    assert mend in gap.mend
    assert gap.absent is absent


def test_a_tool_that_does_not_answer_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "TIMEOUT_S", 0.05)
    gap = Host().run("sleep", "30")
    assert isinstance(gap, Gap)
    assert "did not answer" in gap.why
    assert not gap.absent


def test_settings_of_the_kernel_are_read_by_pattern() -> None:
    found = Host().read("ipv4/conf/*/forwarding")
    assert found["ipv4/conf/lo/forwarding"] in ("0", "1")
    assert Host().read("ipv4/none/*/forwarding") == {}


def test_control_sockets_the_newest_first(tmp_path: Path) -> None:
    for name, age in (("ovs-vswitchd.1.ctl", 1), ("ovs-vswitchd.2.ctl", 2), ("db.sock", 3)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    assert [path.name for path in Host().sockets(tmp_path)] == ["ovs-vswitchd.2.ctl", "ovs-vswitchd.1.ctl"]
    assert Host().sockets(tmp_path / "none") == []
