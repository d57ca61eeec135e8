"""The whole guide on machines with a systemd of their own: what it says works, and each single damage is told by its own line."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guide import Guide, tokens

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    with Guide(tmp_path_factory.mktemp("guide")) as made:
        made.start()
        yield made


def bad(guide: Guide, name: str) -> dict[str, str]:
    """The lines of a machine that are not good."""
    lines = guide.verify(guide.machines[name])
    return {check: f"{line['status']}: {line['seen']}" for check, line in lines.items() if line["status"] != "ok"}


def test_a_streamed_answer_by_tls_hpke_wireguard_and_mutual_tls(guide: Guide) -> None:
    done = guide.ask("--json", '{"prompt": "alpha beta gamma delta epsilon"}', "--stream")
    assert done.returncode == 0, done.stderr
    words, times = zip(*tokens(done.stdout), strict=True)
    assert words == ("alpha", "beta", "gamma", "delta", "epsilon")
    assert all(later > earlier for earlier, later in itertools.pairwise(times))


def test_both_machines_are_green(guide: Guide) -> None:
    assert bad(guide, "router1") == {}
    assert bad(guide, "inf1") == {}
