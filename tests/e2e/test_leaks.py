"""Nothing of the networks is ever on the uplink in clear: in every state of node and tunnel, while everybody presses.

Kinds of packets are gathered on the node's uplink, at the internet's router and at the internet host from before the
node is built until after it is taken down. Tests run in the order of the file; the last leaves no node.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from lab.traffic import Try

from .leaks import EXIT, INET, MARK, PLACES, Watched, one_line, open_directory, until

WITHIN_S = 30.0
"""So soon is whatever was broken whole again, on a busy machine too."""
KINDS = ("tcp", "udp", "dns", "icmp", "raw")
EVERYBODY = [f"node {place}" for place in PLACES] + ["droplet -@10.0.0.50", "laptop -"]


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """The lab, watched and pressed."""
    with open_directory() as directory, Watched(directory) as made:
        made.press()
        yield made


class Pressure:
    """That everybody has pressed while something was so."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._before = watched.pressed()

    def missing(self, places: list[str]) -> set[str]:
        """Who has not sent which kind meanwhile."""
        now = self._watched.pressed()
        return {
            f"{place} {kind}"
            for place in places
            for kind in KINDS
            if (place.startswith("node") if kind == "raw" else not place.endswith("/"))
            and now.get(f"{place} {kind}", 0) < self._before.get(f"{place} {kind}", 0) + 2
        }

    def all_pressed(self, places: list[str]) -> bool:
        """Whether everybody has."""
        return not self.missing(places)


def works_again(watched: Watched) -> float:
    """Wait until new connections from everywhere reach the world; answers how long it took."""
    took = until(watched.reaches, WITHIN_S, "xray reaches the world")
    until(watched.settled, WITHIN_S, "the node is as wanted")
    return took


def assert_tight(watched: Watched) -> None:
    found = watched.leaks()
    assert not found, one_line(found)


def test_what_leaks_would_be_seen(watched: Watched) -> None:
    """Packets beside the tunnels, and packets with a private address, are seen wherever there is a tap."""
    watched.node("sh", "-c", f"echo leak | socat - UDP4-SENDTO:{INET}:{MARK}")
    forged = Try("udp", INET, MARK, spoof="10.0.0.102")
    watched.traffic.attempt("admin", forged)

    def seen() -> set[str]:
        return {line.partition(":")[0] for line in watched.leaks(marked=True)}

    until(lambda: seen() == {"uplink", "router", "inet"}, 3, f"all three taps see what is not to be: {seen()}")
    assert_tight(watched)


def test_up(watched: Watched) -> None:
    pressure = Pressure(watched)
    until(lambda: pressure.all_pressed(EVERYBODY), WITHIN_S, f"all press: {pressure.missing(EVERYBODY)}")
    for host, source in (("xray", None), ("gateway", None), ("droplet", "10.0.0.50"), ("laptop", None)):
        until(lambda host=host, source=source: watched.reaches(host, source), WITHIN_S, f"{host} reaches the world")
    assert watched.traffic.came_from("inet") == EXIT
    assert_tight(watched)
    tunnels = {each.target_port for each in watched.seen("uplink") if each.way == "out" and each.protocol == "udp"}
    assert 2408 in tunnels  # there was something to see


def test_endpoint_unreachable_is_told_and_healed(watched: Watched) -> None:
    """The kill switch: both logs tell of it, nothing passes, and new connections pass soon after it is back."""
    before = watched.events()

    def told(*kinds: str) -> bool:
        now = watched.events()
        return all(now[kind] > before[kind] for kind in kinds)

    pressure = Pressure(watched)
    with watched.endpoint_cut():
        until(lambda: told("tunnel_down", "egress_down"), WITHIN_S, "the logs tell that it is down")
        assert not watched.reaches()
        until(lambda: pressure.all_pressed(EVERYBODY), WITHIN_S, "all press")
    took = works_again(watched)
    until(lambda: told("tunnel_up", "egress_up"), WITHIN_S, "the logs tell that it is up")
    assert took < 6
    last = json.loads(watched.bulkhead("events", "--host", "--kind", "tunnel_up", "--last", "1", "--json"))
    assert last["network"] == "privacy"
    assert_tight(watched)


def test_device_deleted(watched: Watched) -> None:
    """The leg has no tunnel any more, and what is routed there goes nowhere."""
    pressure = Pressure(watched)
    watched.node("ip", "netns", "exec", "bulkhead-warp0", "ip", "link", "delete", "wg-warp0")
    works_again(watched)
    until(lambda: pressure.all_pressed(EVERYBODY), WITHIN_S, "all press")
    assert_tight(watched)


def test_userspace_wireguard_killed(watched: Watched) -> None:
    pressure = Pressure(watched)
    before = watched.program("wireguard-wg-warp0")
    watched.node("kill", "-9", str(before))
    until(lambda: watched.program("wireguard-wg-warp0") not in (0, before), WITHIN_S, "it is started again")
    works_again(watched)
    until(lambda: pressure.all_pressed(EVERYBODY), WITHIN_S, "all press")
    assert_tight(watched)


@pytest.mark.parametrize("which", ["agent", "controller"])
def test_killed(watched: Watched, which: str) -> None:
    """What is built stays, and so does what is open; the next one takes it over."""
    pressure = Pressure(watched)
    before = watched.pids(which, str(watched.state_file))
    watched.kill(which, str(watched.state_file))
    assert watched.reaches() or works_again(watched) < WITHIN_S
    until(lambda: watched.pids(which, str(watched.state_file)) not in ([], before), WITHIN_S, "it is started again")
    until(lambda: pressure.all_pressed(EVERYBODY), WITHIN_S, "all press")
    works_again(watched)
    assert_tight(watched)


def test_switch_killed(watched: Watched) -> None:
    """No switch, no flows: nothing is forwarded, not even by the kernel. A new one is shut until it has its flows."""
    pressure = Pressure(watched)
    db, ctl = f"unix:{watched.node_dir}/ovs/db.sock", f"{watched.node_dir}/ovs/vswitchd.ctl"
    watched.kill("ovs-vswitchd", db)
    until(lambda: pressure.all_pressed(EVERYBODY), WITHIN_S, "all press")
    assert not watched.reaches()
    watched.node("rm", "-f", ctl)
    log = f"--log-file={watched.node_dir}/ovs/again.log"
    watched.start("ovs-vswitchd", db, "--disable-system", f"--unixctl={ctl}", "-vconsole:off", log)
    works_again(watched)
    assert_tight(watched)


def test_restart(watched: Watched) -> None:
    """SIGTERM to `bulkhead up`, and up again: connections that are open stay so, and new ones come through meanwhile."""
    pressure = Pressure(watched)
    (pid,) = watched.pids("up", str(watched.state_file))
    watched.node("kill", str(pid))
    until(lambda: not watched.pids("up", str(watched.state_file)), WITHIN_S, "it ends")
    assert watched.reaches()
    watched.start_node()
    until(lambda: bool(watched.pids("agent", str(watched.state_file))), WITHIN_S, "there is an agent")
    until(lambda: pressure.all_pressed(EVERYBODY), WITHIN_S, "all press")
    works_again(watched)
    assert_tight(watched)


def test_down_and_up(watched: Watched) -> None:
    """While it is taken down, while there is none, and from its very first moment."""
    watched.bulkhead("down", str(watched.state_file))
    assert not watched.pids("agent", str(watched.state_file))
    outsiders = [place for place in EVERYBODY if not place.startswith("node")]
    pressure = Pressure(watched)
    until(lambda: pressure.all_pressed(outsiders), WITHIN_S, "those outside press")
    assert_tight(watched)
    pressure = Pressure(watched)
    watched.start_node()
    works_again(watched)
    until(lambda: pressure.all_pressed(EVERYBODY), WITHIN_S, "all press")
    assert_tight(watched)


def test_endpoint_unreachable_from_the_beginning(watched: Watched) -> None:
    """A node that starts while its tunnel leads nowhere."""
    watched.bulkhead("down", str(watched.state_file))
    pressure = Pressure(watched)
    with watched.endpoint_cut():
        watched.start_node()
        until(lambda: pressure.all_pressed(EVERYBODY), 2 * WITHIN_S, "all press")
        assert not watched.reaches()
    works_again(watched)
    watched.bulkhead("down", str(watched.state_file))
    time.sleep(0.3)
    assert_tight(watched)


def test_taps_have_missed_nothing(watched: Watched) -> None:
    """Every packet was looked at."""
    for tap in watched.taps.values():
        tap.close()
        told = tap.lines()[-1]
        assert told["packets"] > 0 and told["lost"] == 0, (tap.out.name, told)
