"""`bulkhead lab guide` where it cannot work."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from lab import cli, guide
from lab.ovs import LabError


def test_what_does_not_come_up_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_self: guide.Guide) -> None:
        raise LabError("no network namespace; is this root?")

    monkeypatch.setattr(guide.Guide, "start", start)
    monkeypatch.setattr(cli, "_catch_signals", lambda: None)
    done = CliRunner().invoke(cli.lab, ["guide"])
    assert (done.exit_code, done.stderr) == (2, "bulkhead: no network namespace; is this root?\n")
