"""Bridges and their ports, in OVSDB. Runs on ovsdbapp, whose thread keeps the copy of the database.

Bridges and ports of ours carry `external_ids:bulkhead`. A bridge that was there before us is taken over: what we change
about it is kept in `external_ids:bulkhead-before`, and put back when we leave. Imports resource, run and links.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import warnings
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["EVENTLET_NO_GREENDNS"] = "yes"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the library probes for an eventlet that this process does not use
    from ovs.db.idl import Idl, SchemaHelper
    from ovsdbapp.backend.ovs_idl import connection, idlutils
    from ovsdbapp.backend.ovs_idl.command import BaseCommand
    from ovsdbapp.schema.open_vswitch.impl_idl import OvsdbIdl

from controller.agent.netlink import Nets, explained
from controller.agent.resource import Change, Failed, Sign, Step, Waiting
from controller.agent.run import call

MARK = "bulkhead"
BEFORE = "bulkhead-before"
INDEX = "bulkhead-ifindex"
"""The number of the interface that a port was made for. An interface that is deleted and made again has another one,
and the userspace datapath goes on listening to the old one."""
Links = Callable[[], Awaitable[list[str]]]
"""Answers which of the host's interfaces are ours."""
TIMEOUT_S = 4
"""Nothing else is healed meanwhile."""
_COLUMNS = {
    "Open_vSwitch": ["bridges", "datapath_types", "cur_cfg", "next_cfg"],
    "Bridge": [
        "name", "datapath_type", "datapath_id", "fail_mode", "protocols", "other_config", "external_ids", "controller", "ports",
    ],
    "Port": ["name", "interfaces", "external_ids"],
    "Interface": ["name", "type", "ofport", "error", "options"],
    "Controller": ["target", "connection_mode", "is_connected"],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PortRow:
    """A port as OVSDB has it; `peer` is a patch port's. `number` is 0 until ovs-vswitchd has given one, negative if it could not."""

    name: str
    number: int
    error: str
    ours: bool
    made_for: int
    type: str
    peer: str = ""


@dataclass(frozen=True, slots=True)
class BridgeRow:
    """A bridge as OVSDB has it. `mark` is ours: `made`, `taken` (over), or empty."""

    name: str
    datapath: str
    datapath_id: str
    fail_mode: str
    protocols: frozenset[str]
    other_config: Mapping[str, str]
    controllers: tuple[tuple[str, str], ...]
    mark: str
    ports: Mapping[str, PortRow] = field(default_factory=dict)


class Ovsdb:
    """One ovsdb-server, by its address. `changed` is called, in the loop's thread, when anything has changed."""

    def __init__(self, remote: str, changed: Callable[[], None] = lambda: None) -> None:
        self._remote = remote
        self._changed = changed
        self._connection: Any = None
        self._api: Any = None
        self._read: tuple[int, dict[str, BridgeRow]] | None = None

    async def connect(self) -> None:
        """Connect, if it is not yet. Raises `Waiting` while nobody answers."""
        if self._api is None:
            await asyncio.to_thread(self._connect, asyncio.get_running_loop())

    def _connect(self, loop: asyncio.AbstractEventLoop) -> None:
        scheme, _, path = self._remote.partition(":")
        why = f"Open vSwitch does not answer at {self._remote}; start it (systemctl start openvswitch-switch), or say with --ovsdb"
        if scheme == "unix" and not Path(path).exists():
            raise Waiting(f"{why} where it is")
        try:
            helper = idlutils.get_schema_helper(self._remote, "Open_vSwitch")
            for table, columns in _COLUMNS.items():
                helper.register_columns(table, columns)
            idl = _Idl(self._remote, helper, lambda: _tell(loop, self._changed))
            self._connection = connection.Connection(idl=idl, timeout=TIMEOUT_S)
            self._api = OvsdbIdl(self._connection)
        except Exception as exc:  # the library raises what it likes, down to Exception itself
            raise Waiting(f"{why} where it is ({str(exc) or type(exc).__name__})") from exc

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.stop(timeout=2)
            self._connection = self._api = self._read = None

    async def bridges(self) -> dict[str, BridgeRow]:
        """Every bridge by name, from the copy of the database."""
        await self.connect()
        with self._connection.lock:
            idl = self._connection.idl
            if self._read is None or self._read[0] != idl.change_seqno:
                self._read = idl.change_seqno, {row.name: _bridge(row) for row in idl.tables["Bridge"].rows.values()}
            return self._read[1]

    async def datapath_types(self) -> set[str]:
        """What ovs-vswitchd says it can do; empty until it runs."""
        await self.connect()
        with self._connection.lock:
            rows = list(self._connection.idl.tables["Open_vSwitch"].rows.values())
            return set(rows[0].datapath_types) if rows else set()

    async def change(self, what: str, function: Callable[[Any, Any], None]) -> None:
        """Run `function(tables, insert)` as one transaction. Raises `Failed` if the database refuses it, `Waiting` while
        it does not answer."""
        await self.connect()
        api = self._api
        if not self._connection.idl._session.is_connected():  # the library would wait, and everything else with it
            raise Waiting(
                f"Open vSwitch does not answer at {self._remote}; start it: systemctl start openvswitch-switch"
            )

        def work() -> None:
            try:
                _Command(api, function).execute(check_error=True, log_errors=False)
            except Failed:
                raise
            except Exception as exc:
                raise Failed(f"{what}: OVSDB refuses it: {str(exc) or type(exc).__name__}") from exc

        await asyncio.to_thread(work)


def _tell(loop: asyncio.AbstractEventLoop, told: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(told)


class _Idl(Idl):  # type: ignore[misc]
    """A replica that tells about every change."""

    def __init__(self, remote: str, helper: SchemaHelper, told: Callable[[], None]) -> None:
        super().__init__(remote, helper)
        self._told = told

    def notify(self, event: Any, row: Any, updates: Any = None) -> None:
        """Called by the library for every row that changed."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._told()


class _Command(BaseCommand):  # type: ignore[misc]
    """One transaction made of plain changes of rows."""

    def __init__(self, api: Any, function: Callable[[Any, Any], None]) -> None:
        super().__init__(api)
        self._function = function

    def run_idl(self, txn: Any) -> None:
        """Called by the library, in its own thread."""
        self._function(self.api.idl.tables, txn.insert)


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else "" if isinstance(value, list) else value


def _bridge(row: Any) -> BridgeRow:
    return BridgeRow(
        name=row.name,
        datapath=row.datapath_type,
        datapath_id=_one(row.datapath_id),
        fail_mode=_one(row.fail_mode),
        protocols=frozenset(row.protocols),
        other_config=dict(row.other_config),
        controllers=tuple(sorted((one.target, _one(one.connection_mode)) for one in row.controller)),
        mark=row.external_ids.get(MARK, ""),
        ports={port.name: _port(port) for port in row.ports},
    )


def _port(row: Any) -> PortRow:
    interface = row.interfaces[0] if row.interfaces else None
    return PortRow(
        name=row.name,
        number=_one(interface.ofport) or 0 if interface is not None else 0,
        error=_one(interface.error) if interface is not None else "",
        ours=MARK in row.external_ids,
        made_for=int(row.external_ids.get(INDEX, 0)),
        type=interface.type if interface is not None else "",
        peer=interface.options.get("peer", "") if interface is not None else "",
    )


def find_row(tables: Any, table: str, name: str) -> Any:
    """A row by its name, None where there is none."""
    return next((row for row in tables[table].rows.values() if row.name == name), None)


class Bridge:
    """A bridge that is shut from its first moment: secure, out of band, OpenFlow 1.4, with its datapath id pinned."""

    period = 2.0

    def __init__(self, ovsdb: Ovsdb, nets: Nets, name: str, datapath: str, datapath_id: int, controller: str) -> None:
        self._ovsdb, self._nets = ovsdb, nets
        self.name = name
        self._datapath = datapath
        self._datapath_id = f"{datapath_id:016x}"
        self._controller = controller
        self.key = f"bridge/{name}"
        self.needs: tuple[str, ...] = ()
        self.watches: tuple[str | None, ...] = ()

    async def diff(self) -> list[Change]:
        row = (await self._ovsdb.bridges()).get(self.name)
        what = f"bridge {self.name}"
        if row is None:
            return [Change(Sign.ADD, f"{what} ({self._datapath})", "missing", self._apply)]
        if (row.datapath or "system") != self._datapath and row.mark != "made":
            raise Failed(
                f"{what} has datapath type {row.datapath or 'system'}, not {self._datapath}; say so under host.datapath "
                f"in the state file, or: ovs-vsctl set bridge {self.name} datapath_type={self._datapath}"
            )
        return [Change(Sign.CHANGE, what, why, self._apply) for why in [self._differs(row)] if why]

    def _differs(self, row: BridgeRow) -> str:
        found = []
        if (row.datapath or "system") != self._datapath:
            found.append(f"datapath type is {row.datapath or 'system'}, not {self._datapath}")
        if row.fail_mode != "secure":
            found.append(f"fail mode is {row.fail_mode or 'standalone'}, not secure")
        if row.other_config.get("datapath-id") != self._datapath_id:
            found.append(f"datapath id is not pinned to {self._datapath_id}")
        if row.other_config.get("disable-in-band") != "true":
            found.append("in-band control is allowed")
        if "OpenFlow14" not in row.protocols:
            found.append("OpenFlow 1.4 is off")
        if row.controllers != ((self._controller, "out-of-band"),):
            there = ", ".join(target for target, _ in row.controllers) or "none"
            found.append(f"controller is {there}, not {self._controller} out of band")
        if not row.mark:
            found.append("it was not ours")
        return "; ".join(found)

    async def _apply(self) -> None:
        link = await self._kernel()

        def work(tables: Any, insert: Any) -> None:
            bridge = find_row(tables, "Bridge", self.name)
            if bridge is None:
                bridge = self._insert(tables, insert)
            elif MARK not in bridge.external_ids and self._looks_made(bridge):
                bridge.setkey("external_ids", MARK, "made")
            elif MARK not in bridge.external_ids:
                bridge.setkey("external_ids", BEFORE, json.dumps(_before(bridge) | link))
                bridge.setkey("external_ids", MARK, "taken")
            # Secure comes first and the controller last; set again what is so already, and Open vSwitch clears the flows.
            if bridge.external_ids.get(MARK) == "made" and (bridge.datapath_type or "system") != self._datapath:
                bridge.datapath_type = self._datapath
            if _one(bridge.fail_mode) != "secure":
                bridge.fail_mode = ["secure"]
            bridge.setkey("other_config", "datapath-id", self._datapath_id)
            bridge.setkey("other_config", "disable-in-band", "true")
            if "OpenFlow14" not in bridge.protocols:
                bridge.protocols = sorted({*bridge.protocols, "OpenFlow14"})
            have = [(one.target, _one(one.connection_mode)) for one in bridge.controller]
            if have != [(self._controller, "out-of-band")]:
                kept = [one for one in bridge.controller if one.target == self._controller][:1]
                row = kept[0] if kept else insert(tables["Controller"])
                if not kept:
                    row.target = self._controller
                row.connection_mode = ["out-of-band"]
                bridge.controller = [row]

        await self._ovsdb.change(f"bridge {self.name}", work)

    async def _kernel(self) -> dict[str, Any]:
        """How the bridge's own interface is: whether it is up, its addresses and routes."""
        net = await self._nets.get(None)
        link = await net.link(self.name)
        if link is None:
            return {}
        addresses, routes = await net.addresses(link.index), await net.routes(link.index)
        return {"up": link.up, "addresses": sorted(addresses), "routes": sorted(route.prefix for route in routes)}

    def _looks_made(self, bridge: Any) -> bool:
        """Whether only our mark is missing: set up as by us, and nobody else's ports on it."""
        only_ours = all(port.name == self.name or MARK in port.external_ids for port in bridge.ports)
        return only_ours and not self._differs(replace(_bridge(bridge), mark="made"))

    def _insert(self, tables: Any, insert: Any) -> Any:
        interface, port, bridge = (insert(tables[table]) for table in ("Interface", "Port", "Bridge"))
        interface.name = port.name = bridge.name = self.name
        interface.type = "internal"
        port.interfaces = [interface]
        bridge.datapath_type = self._datapath
        bridge.fail_mode = ["secure"]
        bridge.protocols = ["OpenFlow14"]
        bridge.external_ids = {MARK: "made"}
        bridge.other_config = {"datapath-id": self._datapath_id, "disable-in-band": "true"}
        bridge.ports = [port]
        bridge.controller = []
        root = next(iter(tables["Open_vSwitch"].rows.values()))
        root.addvalue("bridges", bridge)
        return bridge


def _before(bridge: Any) -> dict[str, Any]:
    return {
        "fail_mode": _one(bridge.fail_mode),
        "other_config": {key: bridge.other_config.get(key) for key in ("datapath-id", "disable-in-band")},
        "protocols": list(bridge.protocols),
        "controllers": [[one.target, _one(one.connection_mode)] for one in bridge.controller],
    }


class Ports:
    """The ports of one bridge that are ours: those wanted are on it, others of ours are not. One transaction for all."""

    period = 1.0

    def __init__(self, ovsdb: Ovsdb, bridge: str, wanted: tuple[str, ...], links: Links) -> None:
        self._ovsdb, self._links = ovsdb, links
        self._bridge = bridge
        self._wanted = wanted
        self.key = f"ports/{bridge}"
        self.needs = (f"bridge/{bridge}",)
        self.watches: tuple[str | None, ...] = (None,)

    async def diff(self) -> list[Change]:
        bridges = await self._ovsdb.bridges()
        row = bridges.get(self._bridge)
        have = row.ports if row is not None else {}
        elsewhere = {port: name for name, other in bridges.items() if name != self._bridge for port in other.ports}
        out: list[Change] = []
        missing, stale, unmarked = [], [], []
        odd = [name for name in self._wanted if name in elsewhere or (name in have and not have[name].ours)]
        # What carries our interface is ours, whoever has put it there.
        ours = await self._links() if odd else []
        for name in self._wanted:
            port = have.get(name)
            if name in elsewhere:
                other = elsewhere[name]
                if not bridges[other].ports[name].ours and name not in ours:
                    raise Failed(f"port {name} is on bridge {other}, and not ours; ovs-vsctl del-port {other} {name}")
                what = f"port {name} of {other}"
                out.append(Change(Sign.REMOVE, what, "it is on the wrong bridge", self._dropping(other, [name])))
            if port is None:
                if _index(name):
                    missing.append(name)
            elif port.type not in ("", "system"):
                if not port.ours:
                    raise Failed(
                        f"port {name} of {self._bridge} is {port.type}, not an interface of the kernel; remove it"
                    )
                stale.append(name)
            elif port.error or port.number < 0 or (port.made_for and port.made_for != _index(name)):
                # In one transaction nothing would happen: Open vSwitch sees only the difference.
                stale.append(name)
            elif name in odd and name in ours:
                unmarked.append(name)
        # Patch ports of ours are for `controller.agent.passages` to look after.
        strays = [n for n, port in have.items() if port.ours and port.type != "patch" and n not in self._wanted]
        for name in strays:
            what = f"port {name} of {self._bridge}"
            out.append(Change(Sign.REMOVE, what, "nobody wants it", self._dropping(self._bridge, [name])))
        if stale:
            what = f"ports {' '.join(stale)} of {self._bridge}"
            out.append(
                Change(Sign.REMOVE, what, "they do not lead to the interfaces", self._dropping(self._bridge, stale))
            )
        if unmarked:
            what = f"ports {' '.join(unmarked)} of {self._bridge}"
            out.append(Change(Sign.CHANGE, what, "not marked as ours", self._marking(unmarked)))
        if missing or stale:
            names = [*missing, *stale]
            out.append(Change(Sign.ADD, f"ports {' '.join(names)} of {self._bridge}", "missing", self._adding(names)))
        return out

    def _adding(self, names: list[str]) -> Step:
        def work(tables: Any, insert: Any) -> None:
            bridge = find_row(tables, "Bridge", self._bridge)
            if bridge is None:
                raise Failed(f"bridge {self._bridge} has gone away")
            have = {port.name for port in bridge.ports}
            for name in names:
                if name in have:
                    continue
                interface, port = insert(tables["Interface"]), insert(tables["Port"])
                interface.name = port.name = name
                port.interfaces = [interface]
                port.external_ids = {MARK: "made", INDEX: str(_index(name))}
                bridge.addvalue("ports", port)

        return self._changing(work)

    def _marking(self, names: list[str]) -> Step:
        def work(tables: Any, _insert: Any) -> None:
            for name in names:
                if (port := find_row(tables, "Port", name)) is not None:
                    port.setkey("external_ids", MARK, "made")
                    port.setkey("external_ids", INDEX, str(_index(name)))

        return self._changing(work)

    def _changing(self, work: Callable[[Any, Any], None]) -> Step:
        async def do() -> None:
            await self._ovsdb.change(f"ports of {self._bridge}", work)

        return do

    def _dropping(self, bridge: str, names: list[str]) -> Step:
        async def do() -> None:
            await drop_ports(self._ovsdb, bridge, names)

        return do


def _index(name: str) -> int:
    """The number of an interface of the host's namespace, 0 if there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


async def drop_ports(ovsdb: Ovsdb, bridge: str, names: list[str]) -> None:
    """Take ports off a bridge."""

    def work(tables: Any, _insert: Any) -> None:
        row = find_row(tables, "Bridge", bridge)
        for port in list(row.ports) if row is not None else ():
            if port.name in names:
                row.delvalue("ports", port)

    await ovsdb.change(f"ports of {bridge}", work)


async def give_back(ovsdb: Ovsdb, nets: Nets, name: str) -> None:
    """Take away a bridge that we made; give one that we took over its own settings back, and its interface."""
    before: dict[str, Any] = {}

    def work(tables: Any, insert: Any) -> None:
        row = find_row(tables, "Bridge", name)
        if row is None:
            return
        if row.external_ids.get(MARK) == "made":
            for root in tables["Open_vSwitch"].rows.values():
                root.delvalue("bridges", row)
            return
        for port in list(row.ports):
            if MARK in port.external_ids:
                row.delvalue("ports", port)
        before.update(json.loads(row.external_ids.get(BEFORE, "{}")))
        row.fail_mode = [before["fail_mode"]] if before.get("fail_mode") else []
        for key, value in before.get("other_config", {}).items():
            if value is None:
                row.delkey("other_config", key)
            else:
                row.setkey("other_config", key, value)
        row.protocols = before.get("protocols", [])
        controllers = []
        for target, mode in before.get("controllers", ()):
            one = insert(tables["Controller"])
            one.target = target
            one.connection_mode = [mode] if mode else []
            controllers.append(one)
        row.controller = controllers
        row.delkey("external_ids", MARK)
        row.delkey("external_ids", BEFORE)

    await ovsdb.change(f"bridge {name}", work)
    net = await nets.get(None)
    link = await net.link(name)
    if link is None or "up" not in before:
        return
    lost = f"{name} cannot be given back as it was"
    for route in list(await net.routes(link.index)):
        if route.prefix not in before["routes"]:
            scope = {} if route.via is not None else {"scope": 253}  # on the link
            with explained(lost):
                await net.rtnl.route("del", family=socket.AF_INET, dst=route.prefix, oif=link.index, **scope)
    for text in await net.addresses(link.index) - set(before["addresses"]):
        address, _, length = text.partition("/")
        with explained(lost):
            await net.rtnl.addr("del", index=link.index, address=address, prefixlen=int(length))
    if not before["up"]:
        with explained(lost):
            await net.rtnl.link("set", index=link.index, state="down")


async def choose_datapath(wanted: str, ovsdb: Ovsdb) -> str:
    """`system` or `netdev`: what was asked for, or with `auto` the kernel's module where there is one."""
    if wanted != "auto":
        return wanted
    for _ in range(50):
        if types := await ovsdb.datapath_types():
            break
        await asyncio.sleep(0.1)
    else:
        raise Waiting("ovs-vswitchd is not running yet; start it: systemctl start openvswitch-switch")
    if "system" not in types:
        return "netdev"
    module = Path("/sys/module/openvswitch")
    if not module.exists():
        with contextlib.suppress(Failed):
            await call("modprobe", "openvswitch")
    return "system" if module.exists() else "netdev"
