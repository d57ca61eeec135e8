"""Passages: the patch ports that grants need, and what connection tracking has kept of grants that are over.

Grants end in an order: the controller takes the flows away, and only then are connections forgotten here, or the last
packets would bring them back. Imports ovs, gate and resource.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from controller.agent.gate import Controller
from controller.agent.ovs import MARK, BridgeRow, Ovsdb, drop_ports, find_row
from controller.agent.resource import Change, Failed, Sign, Step, Waiting
from controller.agent.run import call
from controller.grants import ZONES, Opening, Passage
from controller.problems import BulkheadError

RETRY_S = 0.05
AWAY_RETRY_S = 0.5
RUN_DIR = Path("/var/run/openvswitch")
_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}


class Passages:
    """Every pair of patch ports is there, and no other of ours is. Ours are told by their external ids."""

    period = 1.0
    key = "ports/passages"

    def __init__(self, ovsdb: Ovsdb, wanted: tuple[Passage, ...], bridges: tuple[str, ...]) -> None:
        self._ovsdb = ovsdb
        self._wanted: dict[tuple[str, str], str] = {}
        for bridge, port, peer_bridge, peer_port in wanted:
            self._wanted |= {(bridge, port): peer_port, (peer_bridge, peer_port): port}
        self.needs = tuple(f"bridge/{bridge}" for bridge in bridges)

    async def diff(self) -> list[Change]:
        out: list[Change] = []
        missing: dict[tuple[str, str], str] = {}
        rows = await self._ovsdb.bridges()
        drop: dict[str, list[str]] = {}
        for end, peer in self._wanted.items():
            holder = next((row for row in rows.values() if end[1] in row.ports), None)
            if holder is None or holder.name != end[0] or not _leads(holder, end[1], peer):
                missing[end] = peer
            if holder is not None and end in missing:
                if not holder.ports[end[1]].ours:
                    raise Failed(
                        f"port {end[1]} of {holder.name} is not ours; ovs-vsctl del-port {holder.name} {end[1]}"
                    )
                drop.setdefault(holder.name, []).append(end[1])
        for row in rows.values():
            strays = [p.name for p in row.ports.values() if p.ours and p.type == "patch"]
            for name in strays:
                if (row.name, name) not in self._wanted and name not in drop.get(row.name, ()):
                    drop.setdefault(row.name, []).append(name)
        for bridge, names in drop.items():
            what = f"passage {' '.join(names)} of {bridge}"
            out.append(Change(Sign.REMOVE, what, "no grant needs it", self._dropping(bridge, names)))
        if missing:
            what = f"passage {' '.join(name for _, name in missing)}"
            out.append(Change(Sign.ADD, what, "missing", self._adding(missing)))
        return out

    def _adding(self, missing: Mapping[tuple[str, str], str]) -> Step:
        def work(tables: Any, insert: Any) -> None:
            for (name, port_name), peer in missing.items():
                bridge = find_row(tables, "Bridge", name)
                if bridge is None:
                    raise Failed(f"bridge {name} has gone away")
                if any(port.name == port_name for port in bridge.ports):
                    continue
                interface, port = insert(tables["Interface"]), insert(tables["Port"])
                interface.name = port.name = port_name
                interface.type = "patch"
                interface.options = {"peer": peer}
                port.interfaces = [interface]
                port.external_ids = {MARK: "made"}
                bridge.addvalue("ports", port)

        async def do() -> None:
            await self._ovsdb.change("passages", work)

        return do

    def _dropping(self, bridge: str, names: list[str]) -> Step:
        async def do() -> None:
            await drop_ports(self._ovsdb, bridge, names)

        return do


def _leads(row: BridgeRow, port: str, peer: str) -> bool:
    found = row.ports[port]
    return found.ours and found.type == "patch" and found.peer == peer and not found.error and found.number >= 0


class Kept(NamedTuple):
    """Connections that the datapath knows: of a zone, from an address to a port of another."""

    zone: int
    protocol: str
    source: str
    target: str
    port: int


_ENTRY = re.compile(r"^(\w+),orig=\(src=([0-9.]+),dst=([0-9.]+)((?:,\w+=\w+)*)\)")
_ZONE = re.compile(r",zone=(\d+)")
_PORT = re.compile(r",dport=(\d+)")


def read_entries(text: str) -> Counter[Kept]:
    """What `dpctl/dump-conntrack` prints of the zones that are ours: how many there are of each."""
    out: Counter[Kept] = Counter()
    for line in text.splitlines():
        entry, zone = _ENTRY.match(line), _ZONE.search(line)
        if entry is not None and zone is not None and int(zone[1]) in ZONES:
            port = _PORT.search(entry[4])
            out[Kept(int(zone[1]), entry[1], entry[2], entry[3], int(port[1]) if port else 0)] += 1
    return out


class Tracker:
    """The datapath's connection tracking, asked through ovs-vswitchd. `datapath` is `system` or `netdev`."""

    def __init__(self, ovsdb: str, datapath: str) -> None:
        scheme, _, path = ovsdb.partition(":")
        self._run_dir = Path(path).parent if scheme == "unix" else RUN_DIR
        self._datapath = f"{datapath}@ovs-{datapath}"

    async def entries(self, zones: Iterable[int]) -> Counter[Kept]:
        """All connections in these zones. Raises `Failed`."""
        out: Counter[Kept] = Counter()
        for zone in zones:
            out += read_entries(await self._ask("dpctl/dump-conntrack", self._datapath, f"zone={zone}"))
        return out

    async def forget(self, kept: Kept) -> None:
        """Forget connections; all of their zone where these alone cannot be. What is open begins anew by itself then."""
        protocol = _PROTOCOLS.get(kept.protocol)
        what = f"ct_nw_src={kept.source},ct_nw_dst={kept.target},ct_nw_proto={protocol},ct_tp_dst={kept.port}"
        try:
            if protocol is None:
                raise Failed(f"{kept.protocol} has no ports")
            await self._flush(f"zone={kept.zone}", what)
        except Failed:  # before 3.1 Open vSwitch takes no part of a tuple
            await self.forget_all(kept.zone)

    async def forget_all(self, zone: int) -> None:
        """Forget all connections of a zone."""
        await self._flush(f"zone={zone}")

    async def _flush(self, *what: str) -> None:
        try:
            await self._ask("dpctl/flush-conntrack", *what)
        except Failed:  # the datapath is named only where there is more than one: Open vSwitch 3.1.0 misreads its name
            await self._ask("dpctl/flush-conntrack", self._datapath, *what)

    async def _ask(self, *command: str) -> str:
        try:
            return await call("ovs-appctl", "-t", str(self._daemon()), *command)
        except Failed as exc:
            if "No such device" in str(exc) or "not found" in str(exc):  # no bridge of that datapath: nothing is kept
                return ""
            raise

    def _daemon(self) -> Path:
        pid = self._run_dir / "ovs-vswitchd.pid"
        try:
            return self._run_dir / f"ovs-vswitchd.{int(pid.read_text())}.ctl"
        except (OSError, ValueError):
            found = next(iter(sorted(self._run_dir.glob("*vswitchd*.ctl"))), None)
            if found is None:
                raise Waiting(
                    f"ovs-vswitchd is not running in {self._run_dir}; start it: systemctl start openvswitch-switch"
                ) from None
            return found


class Connections:
    """The datapath keeps no connection in a zone of ours but those of grants that are open.

    Nothing is forgotten before the controller has said that no flow of another grant is left. Once that is so, and what
    was kept of these is gone, nothing can be kept again until something else is granted: it is not looked at any more.
    """

    period = 3600.0
    key = "connections"

    def __init__(
        self,
        tracker: Tracker,
        controller: Controller,
        openings: tuple[Opening, ...],
        zones: Mapping[str, int],
        ovsdb: Ovsdb,
        *,
        before: bool = False,
    ) -> None:
        """`before` says that there were grants before, which may have flows still."""
        self._tracker, self._controller, self._zones = tracker, controller, dict(zones)
        self._ovsdb, self._before = ovsdb, before
        self._ids = frozenset(opening.grant for opening in openings)
        self._open = {
            Kept(zone, o.protocol, str(o.source.address), str(o.target.address), o.port)
            for o in openings
            for zone in (zones[o.source_bridge], zones[o.target_bridge])
        }
        self._clean = False
        self.needs: tuple[str, ...] = ()

    async def diff(self) -> list[Change]:
        if self._clean:
            return []
        bridges = await self._ovsdb.bridges()
        zones = [zone for name, zone in self._zones.items() if name in bridges]
        entries = await self._tracker.entries(zones)
        patched = any(port.ours and port.type == "patch" for row in bridges.values() for port in row.ports.values())
        if entries or self._ids or self._before or patched:
            await self._wait_for_flows()
            entries = await self._tracker.entries(zones)
        stale = {kept: count for kept, count in entries.items() if kept not in self._open}
        if not stale:
            self._clean = True
            return []
        what = f"{sum(stale.values())} connections of grants that are over"

        async def do() -> None:
            used = {kept.zone for kept in entries if kept in self._open}
            for kept in stale:
                await (self._tracker.forget(kept) if kept.zone in used else self._tracker.forget_all(kept.zone))

        return [Change(Sign.REMOVE, what, "they are still known to the datapath", do)]

    async def _wait_for_flows(self) -> None:
        try:
            rows = (await self._controller.ask({"ask": "status"}))["bridges"]
        except BulkheadError as exc:
            raise Waiting(f"the controller has to say first which grants it has shut: {exc}", AWAY_RETRY_S) from exc
        bridges = {row["name"]: row for row in rows}
        for name in self._zones:
            row = bridges.get(name, {})
            if row.get("phase") != "steady":
                raise Waiting(f"the flows of {name} are not confirmed yet", RETRY_S)
            if over := set(row.get("grants", ())) - self._ids:
                raise Waiting(f"{name} still has flows of grant {', '.join(sorted(over))}", RETRY_S)
