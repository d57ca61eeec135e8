"""Kernel settings below /proc/sys/net, in the host's network namespace or in one of ours.

In the host's namespace the value that was there before is kept, and put back by `restore`; in ours there is nobody to
put it back for. Imports files, netns, resource, run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from controller.agent.files import read_or_none, write_atomically
from controller.agent.netns import in_namespace
from controller.agent.resource import Change, Failed, Sign
from controller.agent.run import NETNS_DIR

ROOT = Path("/proc/sys")
BEFORE = "sysctls.json"

Settings = Mapping[str, str]
"""Path below /proc/sys, with slashes (an interface's name may hold dots), to value."""


class Sysctls:
    """Settings of one network namespace. What the kernel does not have, such as those of an interface that went away or
    of IPv6 where there is none, is as wanted.

    `name` tells several apart. In the host's namespace (None) `state_dir` is where the values before are kept; without
    it they are not. A `wanted` that is asked for anew each time follows, say, the default route.
    """

    def __init__(
        self,
        wanted: Settings | Callable[[], Settings],
        namespace: str | None = None,
        *,
        name: str = "",
        state_dir: Path | None = None,
        needs: Sequence[str] = (),
    ) -> None:
        self._wanted = wanted
        self.namespace = namespace
        self.key = "/".join(filter(None, ("sysctl", namespace or "host", name)))
        self.needs = tuple(needs)
        self.watches = (namespace,)
        self._before = state_dir / BEFORE if state_dir is not None and namespace is None else None

    async def diff(self) -> list[Change]:
        """Write each that is otherwise, and put back what is wanted no longer."""
        wanted = self._wanted() if callable(self._wanted) else self._wanted
        if self.namespace is not None and not (NETNS_DIR / self.namespace).exists():
            return [self._change(path, None, value) for path, value in wanted.items()]
        found = self._there(_read_all(wanted))
        out = [self._change(path, value, wanted[path]) for path, value in found.items() if value != wanted[path]]
        kept = _kept(self._before) if self._before is not None else {}
        return out + [self._putting_back(path, value) for path, value in kept.items() if path not in wanted]

    def _change(self, path: str, value: str | None, wanted: str) -> Change:
        async def write() -> None:
            if self._before is not None and value is not None:
                _keep(self._before, path, value)
            self._there(_write(path, wanted))

        place = f" in {self.namespace}" if self.namespace else ""
        why = "not known yet" if value is None else f"is {value}"
        return Change(Sign.CHANGE, f"sysctl {path}={wanted}{place}", why, write)

    def _putting_back(self, path: str, value: str) -> Change:
        async def write() -> None:
            assert self._before is not None
            _write(path, value)()
            _forget(self._before, path)

        return Change(Sign.REMOVE, f"sysctl {path}", f"wanted no longer, it was {value} before", write)

    def _there(self, function: _Step) -> dict[str, str]:
        # Our own namespace needs no thread: these files answer at once.
        return function() if self.namespace is None else in_namespace(NETNS_DIR / self.namespace, function)


class _Step:
    """Something done with settings in whatever namespace the calling thread is in."""

    def __init__(self, paths: Iterable[str], value: str | None = None) -> None:
        self.paths, self.value = tuple(paths), value

    def __call__(self) -> dict[str, str]:
        out = {}
        for path in self.paths:
            try:
                if self.value is not None:
                    (ROOT / path).write_text(self.value)
                out[path] = " ".join((ROOT / path).read_text().split())
            except FileNotFoundError:
                continue
            except OSError as exc:
                doing = "read" if self.value is None else f"set to {self.value}"
                raise Failed(f"sysctl {path} cannot be {doing}: {exc.strerror}; run the agent as root") from exc
        return out


def _read_all(paths: Iterable[str]) -> _Step:
    return _Step(paths)


def _write(path: str, value: str) -> _Step:
    return _Step((path,), value)


# ------------------------------------------------------------------------------------------------------ putting back


def _kept(before: Path) -> dict[str, str]:
    try:
        found = json.loads(read_or_none(before) or "{}")
    except ValueError:
        return {}
    return {str(path): str(value) for path, value in found.items()} if isinstance(found, dict) else {}


def _keep(before: Path, path: str, value: str) -> None:
    kept = _kept(before)
    if path not in kept:
        write_atomically(before, json.dumps({**kept, path: value}, indent=1, sort_keys=True), 0o644)


def _forget(before: Path, path: str) -> None:
    kept = _kept(before)
    if kept.pop(path, None) is not None:
        write_atomically(before, json.dumps(kept, indent=1, sort_keys=True), 0o644)


def restore(state_dir: Path) -> list[str]:
    """Put back what the host's settings were before the first change; answers which, as `path=value`. Raises `Failed`.

    Call it in the host's network namespace, with the agent stopped: it would only set them again.
    """
    before = state_dir / BEFORE
    done = []
    for path, value in _kept(before).items():
        if _write(path, value)():
            done.append(f"{path}={value}")
    before.unlink(missing_ok=True)
    return done


# --------------------------------------------------------------------------------------------------- what is wanted


def _each(version: int, interfaces: Iterable[str], **values: int) -> dict[str, str]:
    return {
        f"net/ipv{version}/conf/{interface}/{name}": str(value)
        for interface in interfaces
        for name, value in values.items()
    }


def leg(tunnel: str, port: str = "eth0") -> dict[str, str]:
    """Of a leg's namespace: it routes IPv4 between its port and its tunnel, by asymmetric ways, and has no IPv6.

    Turning forwarding on resets other settings, so it comes first. Each interface has its own port's and tunnel's
    addresses to answer for, and no other's.
    """
    quiet = {"accept_redirects": 0, "secure_redirects": 0, "send_redirects": 0, "accept_source_route": 0}
    return {
        "net/ipv4/ip_forward": "1",
        **_each(6, ("all", "default", "lo", port, tunnel), disable_ipv6=1),
        **_each(4, ("all", "default", port, tunnel), rp_filter=0, arp_announce=2, arp_ignore=1, **quiet),
    }


def container(*, forwards: bool = False) -> dict[str, str]:
    """Of a container's namespace: no IPv6; only the VPN's gateway forwards."""
    return {
        "net/ipv4/ip_forward": str(int(forwards)),
        "net/ipv4/ip_unprivileged_port_start": "0",  # its programs need not be root's to listen
        # Each by itself as well: "all" that is 1 already is not written again.
        **_each(6, ("all", "default", "lo", "eth0"), disable_ipv6=1),
        **(_each(4, ("all", "default"), accept_redirects=0, send_redirects=0) if forwards else {}),
    }


def bridges(names: Iterable[str]) -> dict[str, str]:
    """Of bridges' own interfaces on the host: nothing that comes up there is forwarded, and there is no IPv6."""
    names = tuple(names)
    return {
        **_each(4, names, forwarding=0, accept_redirects=0, send_redirects=0),
        **_each(6, names, disable_ipv6=1),
    }


def ports(names: Iterable[str]) -> dict[str, str]:
    """Of bridges' ports on the host (veth ends): the kernel says nothing there by itself."""
    return _each(6, names, disable_ipv6=1)


def host_vpn(uplinks: Iterable[str], bridge: str) -> dict[str, str]:
    """Of a host with a VPN server: its packets are forwarded between the uplinks and its bridge.

    The kernel asks the interface a packet arrives at; the switch for all interfaces stays as it is. Goes after
    `bridges`: `{**bridges(…), **host_vpn(…)}`.
    """
    return _each(4, (*uplinks, bridge), forwarding=1)
