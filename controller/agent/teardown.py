"""What is ours and nobody wants any more: found by its marks, and taken away.

Nothing else is touched: bridges and ports are ours by their external ids, links by their group, namespaces by their
names. Imports the resources.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from controller.agent.build import Parts, build
from controller.agent.etc import NETNS_ETC, our_directories, remove_directory
from controller.agent.gate import Controller
from controller.agent.hosttable import HostTable
from controller.agent.links import our_links, our_namespaces, remove_link, remove_namespace
from controller.agent.lxc import Lxc
from controller.agent.netlink import Nets
from controller.agent.nft import TABLE, NftTable, listing
from controller.agent.ovs import Ovsdb, choose_datapath, drop_ports, give_back
from controller.agent.process import Programs
from controller.agent.reconciler import plan
from controller.agent.resource import Change, Resource, Sign, Step
from controller.agent.settings import Settings
from controller.agent.sysctls import restore
from controller.desired import Desired
from controller.hostmodel import HostState
from controller.model import DesiredState
from controller.problems import BulkheadError
from controller.statefile import Loaded, load
from controller.store import Store, Tls


class Leftover:
    """Something of ours that is not wanted. As wanted once it is gone. Its key names it: `leftover/namespace/NAME`."""

    period = 3600.0

    def __init__(self, key: str, what: str, parts: Parts, step: Step) -> None:
        self.key = f"leftover/{key}"
        self.needs: tuple[str, ...] = ()
        self._what, self._step = what, step
        self._gone = False

    async def diff(self) -> list[Change]:
        if self._gone:
            return []

        async def do() -> None:
            await self._step()
            self._gone = True

        return [Change(Sign.REMOVE, self._what, "not in the state file any more", do)]


async def leftovers(parts: Parts, wanted: Sequence[Resource], *, keep: bool = False) -> list[Resource]:
    """What is there of ours beside `wanted`, in the order in which it goes. With `keep` the files of LXC containers
    stay."""
    keys = {key for resource in wanted for key in (resource.key, *getattr(resource, "keeps", ()))}
    out: list[Resource] = []
    for name, bridge in (await parts.ovsdb.bridges()).items():
        if bridge.mark and f"bridge/{name}" not in keys:
            out.append(Leftover(f"bridge/{name}", f"bridge {name}", parts, _giving(parts, name)))
        elif not bridge.mark:
            ours = [port.name for port in bridge.ports.values() if port.ours]
            if ours:
                what = f"ports {' '.join(ours)} of {name}"
                out.append(Leftover(f"ports/{name}", what, parts, _dropping(parts.ovsdb, name, ours)))
    running = {f"process/{name}" for name in parts.programs.names()}
    for key in sorted(running - keys):
        name = key.removeprefix("process/")
        device = name.removeprefix("wireguard-")
        if {
            f"wireguard/{device}",
            f"names/{name.removeprefix('names-')}",
            f"netclient/{name.removeprefix('netclient-')}",
        } & keys:
            continue
        out.append(Leftover(key, f"process {name}", parts, _stopping(parts, name)))
    ends = {key.removeprefix("veth/") for key in keys if key.startswith("veth/")}
    ends |= {end for resource in wanted for end in getattr(resource, "host_ends", ())}
    for link in await our_links(parts.nets):
        if link not in ends:
            out.append(Leftover(f"link/{link}", f"interface {link}", parts, _unlinking(parts, link)))
    for family in ("netdev", "inet"):
        if f"nft/{family}/{TABLE}" not in keys and await listing(family) is not None:
            table = HostTable(DesiredState(), HostState(), parts.settings.own_dir)
            step = table.remove if family == "inet" else NftTable(family, "", parts.settings.own_dir).remove
            out.append(Leftover(f"nft/{family}", f"nftables table {family} {TABLE}", parts, step))
    for container in parts.lxc.ids():
        if f"lxc/{container}" not in keys and not (keep and await parts.lxc.init(container) is None):
            what = f"LXC container {container}"
            out.append(Leftover(f"lxc/{container}", what, parts, _unmaking(parts, container, keep=keep)))
    for name in our_directories():
        if f"file/{NETNS_ETC / name / 'resolv.conf'}" not in keys:
            out.append(Leftover(f"file/{name}", f"directory {NETNS_ETC / name}", parts, _clearing(name)))
    for name in our_namespaces():
        if f"namespace/{name}" not in keys:
            out.append(Leftover(f"namespace/{name}", f"network namespace {name}", parts, _removing(parts, name)))
    return out


def _giving(parts: Parts, name: str) -> Step:
    async def do() -> None:
        await give_back(parts.ovsdb, parts.nets, name)

    return do


def _dropping(ovsdb: Ovsdb, bridge: str, names: list[str]) -> Step:
    async def do() -> None:
        await drop_ports(ovsdb, bridge, names)

    return do


def _stopping(parts: Parts, name: str) -> Step:
    async def do() -> None:
        await parts.programs.stop(name)

    return do


def _unmaking(parts: Parts, container: str, *, keep: bool) -> Step:
    async def do() -> None:
        await (parts.lxc.stop if keep else parts.lxc.remove)(container)

    return do


def _clearing(name: str) -> Step:
    async def do() -> None:
        remove_directory(name)

    return do


def _unlinking(parts: Parts, name: str) -> Step:
    async def do() -> None:
        await remove_link(parts.nets, None, name)

    return do


def _removing(parts: Parts, name: str) -> Step:
    async def do() -> None:
        await remove_namespace(parts.nets, name)

    return do


@contextlib.asynccontextmanager
async def _parts(settings: Settings, wanted_datapath: str = "auto") -> AsyncIterator[Parts]:
    nets = Nets()
    ovsdb = Ovsdb(settings.ovsdb)
    try:
        datapath = await choose_datapath(wanted_datapath, ovsdb)
        programs = Programs(settings.own_dir / "programs")
        lxc = Lxc(settings.state_dir / "lxc", settings.own_dir / "lxc")
        yield Parts(settings, nets, ovsdb, Controller(settings.run_dir), programs, lxc, datapath)
    finally:
        nets.close()
        await asyncio.to_thread(ovsdb.close)


def _desired(settings: Settings) -> Loaded:
    """What the file says, and the store if there is one. Raises `BulkheadError`: half of it would look like much to remove."""
    if not settings.store:
        return load(settings.state_file)
    store = Store(settings.store, Tls(*settings.store_tls) if settings.store_tls else None)
    try:
        return Desired(settings.state_file, settings.node, store.start(), time.time()).loaded
    finally:
        store.close()


async def plan_all(settings: Settings) -> list[dict[str, str]]:
    """Everything the agent would do for a state file now. Changes nothing."""
    loaded = await asyncio.to_thread(_desired, settings)
    async with _parts(settings, loaded.host.datapath) as parts:
        resources = build(loaded.state, loaded.host, parts).resources
        rows = []
        for key, found in await plan([*await leftovers(parts, resources), *resources]):
            if isinstance(found, Change):
                rows.append({"key": key, "sign": str(found.sign), "what": found.what, "why": found.why})
            else:
                rows.append({"key": key, "sign": "?", "what": key, "why": found})
        return rows


async def take_down(settings: Settings, told: Callable[[str], None], *, purge: bool = False) -> list[str]:
    """Take everything of ours away. Answers what could not be."""
    failures = []
    async with _parts(settings, "netdev") as parts:
        for resource in await leftovers(parts, (), keep=not purge):
            for change in await resource.diff():
                try:
                    await change.do()
                    told(f"{change.sign} {change.what}")
                except (BulkheadError, OSError) as exc:
                    failures.append(f"{change.what}: {exc}")
        try:
            for text in restore(settings.state_dir):
                told(f"~ {text}, as it was")
        except BulkheadError as exc:
            failures.append(str(exc))
    if failures:  # what is there tells the next attempt what is left
        return failures
    shutil.rmtree(settings.own_dir, ignore_errors=True)
    _clear_run_dir(settings.run_dir)
    if purge:
        shutil.rmtree(settings.state_dir, ignore_errors=True)
    with contextlib.suppress(OSError):  # the controller may have files there
        settings.run_dir.rmdir()
    return failures


def _clear_run_dir(run_dir: Path) -> None:
    """Take away what `bulkhead up` and its processes have left there, if they were killed."""
    for name in ("api.sock", "controller.sock", "store.sock"):
        path = run_dir / name
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
    if not (run_dir / "store.sock").exists():
        shutil.rmtree(run_dir / "store", ignore_errors=True)
