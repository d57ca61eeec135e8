"""The systemd units of every part: one user each, and no more rights than that part needs. Imports problems.

Data in `UNITS` and `CHORES`, text from `files`. `install` writes them; `scores` asks systemd-analyze what is left open.
Scores go from 0 (nothing) to 10 (everything a root process can do).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from controller.problems import BulkheadError

ANALYZE_S = 60
STATE_FILE = "/etc/bulkhead/state.yaml"
EXPOSURE_LIMITS = {
    "bulkhead-agent.service": 7.0,
    "bulkhead-chores@.service": 4.0,
    "bulkhead-wg.service": 4.0,
    "bulkhead-firewall.service": 4.0,
}
"""The worst score that is accepted. The agent makes namespaces, devices and firewalls: root's work."""
EXPOSURE_LIMIT = 2.0

# What every part is kept from. A unit may set a key otherwise; an empty value leaves the key out.
HARDENED: Mapping[str, str] = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "PrivateUsers": "yes",
    "ProtectClock": "yes",
    "ProtectControlGroups": "yes",
    "ProtectHostname": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectProc": "invisible",
    "ProcSubset": "pid",
    "LockPersonality": "yes",
    "MemoryDenyWriteExecute": "yes",
    "RemoveIPC": "yes",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "KeyringMode": "private",
    "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service\n~@privileged @resources",
    "SystemCallErrorNumber": "EPERM",
    "CapabilityBoundingSet": "none",
    "AmbientCapabilities": "none",
    "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6",
    "UMask": "0077",
    "LimitCORE": "0",
}


class Kind(StrEnum):
    """How a unit runs: until it is stopped, once when the host starts, or whenever it is called."""

    SERVICE = "service"
    BOOT = "boot"
    CALLED = "called"


@dataclass(frozen=True, slots=True)
class Unit:
    """A service: what it runs (commands, a line each) as whom, and where that differs from `HARDENED`."""

    name: str
    text: str
    command: str
    user: str
    settings: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ("network.target",)
    groups: tuple[str, ...] = ()
    kind: Kind = Kind.SERVICE
    requires: tuple[str, ...] = ()
    """What has to have started well, by its runtime directory: without its firewall a service does not start. Not systemd's
    Requires=, which stops a service that answers whenever its firewall's unit is restarted, also with a bad state file."""


@dataclass(frozen=True, slots=True)
class Chore:
    """A timer for `bulkhead chores NAME`, or another command that is run again and again."""

    name: str
    calendar: str
    text: str


_STORE = "--store unix:/run/bulkhead/store.sock"
_SECURITY = "/var/lib/bulkhead/security"
_FIREWALL = "bulkhead-firewall.service"

UNITS: tuple[Unit, ...] = (
    Unit(
        "firewall",
        "Bulkhead's firewall of this host, from its start on",
        # A seal that cannot be read must not keep the firewall away: the chores of the minute tell of it.
        f"-bulkhead incident enforce\nbulkhead firewall apply {STATE_FILE} --at-boot",
        "root",
        {
            "PrivateUsers": "no",
            "CapabilityBoundingSet": "CAP_NET_ADMIN CAP_SYS_ADMIN",  # a table is tried in a network namespace first
            "AmbientCapabilities": "",
            "RestrictNamespaces": "net",
            "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
            "ReadWritePaths": "/run",
            "StateDirectory": "bulkhead/security",
            "StateDirectoryMode": "0700",
            "RuntimeDirectory": "bulkhead-firewall",
        },
        after=("local-fs.target",),
        groups=("bulkhead",),  # root without its right to everything writes in /run/bulkhead as its group
        kind=Kind.BOOT,
    ),
    Unit(
        "router",
        "Bulkhead's TLS 1.3 router",
        f"bulkhead router {STATE_FILE}",
        "router",
        {
            "CapabilityBoundingSet": "CAP_NET_BIND_SERVICE",
            "AmbientCapabilities": "CAP_NET_BIND_SERVICE",
            "PrivateUsers": "no",  # a port below 1024 is bound with a capability of the machine's own user namespace
            "StateDirectory": "bulkhead/router",
            "StateDirectoryMode": "0700",
            "RuntimeDirectory": "bulkhead-router",
            # Its own certificates and clients, delivered there: bulkhead pki export NAME --to DIRECTORY --owner router
            "Environment": "BULKHEAD_RUN_DIR=/run/bulkhead-router BULKHEAD_SECURITY_DIR=/var/lib/bulkhead/router",
        },
        after=("network.target", _FIREWALL, "bulkhead-wg.service"),
        groups=("inference",),
        requires=(_FIREWALL,),
    ),
    Unit(
        "inference",
        "Inference server",
        f"bulkhead inference {STATE_FILE}",
        "inference",
        {
            "PrivateUsers": "no",  # its socket is given to another group
            "SystemCallFilter": "@system-service\n~@privileged @resources\n@chown",
            "StateDirectory": "bulkhead/inference",
            "StateDirectoryMode": "0700",
            "RuntimeDirectory": "bulkhead-inference",
            "RuntimeDirectoryMode": "0750",
            "Environment": "BULKHEAD_SECURITY_DIR=/var/lib/bulkhead/inference",
        },
        after=("network.target", "bulkhead-agent.service", _FIREWALL, "bulkhead-wg.service"),
        groups=("router",),
        requires=(_FIREWALL,),
    ),
    Unit(
        "controller",
        "Bulkhead's OpenFlow controller",
        f"bulkhead controller {STATE_FILE} {_STORE} --socket-group bulkhead",
        "bulkhead",
        {
            "UMask": "0027",  # the API reads the events
            "SystemCallFilter": "@system-service\n~@privileged @resources\n@chown",  # its socket is its group's
            "StateDirectory": "bulkhead/events",
            "StateDirectoryMode": "0750",
            "ReadWritePaths": "/run/bulkhead",
        },
        after=("network.target", "bulkhead-store.service"),
    ),
    Unit(
        "agent",
        "Bulkhead's agent: makes this host what the state file says",
        f"bulkhead agent {STATE_FILE} {_STORE} --api-user bulkhead-api",
        "root",
        {
            "Group": "bulkhead",  # the API reads its events
            # Its containers, tunnels and name servers are other programs' children: they outlive a restart.
            "KillMode": "process",
            "Delegate": "yes",
            "PrivateUsers": "no",
            "PrivateDevices": "no",
            "PrivateTmp": "no",
            "ProtectControlGroups": "no",
            "ProtectHostname": "no",
            "ProtectKernelTunables": "no",
            "ProtectProc": "default",
            "ProcSubset": "all",
            # No setting that gives it mounts of its own: namespaces that it makes have to be there for `ip netns`, and for
            # itself after a restart.
            "ProtectSystem": "",
            "ProtectHome": "",
            "ProtectKernelModules": "",
            "ProtectKernelLogs": "",
            "RestrictNamespaces": "no",
            "DevicePolicy": "closed",
            "DeviceAllow": "/dev/net/tun rw",
            "SystemCallFilter": "@system-service @mount @setuid @privileged\n~@clock @cpu-emulation @debug @obsolete "
            "@raw-io @reboot @swap",
            "CapabilityBoundingSet": "CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BIND_SERVICE CAP_SYS_ADMIN CAP_SYS_CHROOT "
            "CAP_SYS_PTRACE CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_KILL CAP_MKNOD",
            "AmbientCapabilities": "",
            "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_PACKET",
            "StateDirectory": "bulkhead/agent",
        },
        after=("network.target", "ovsdb-server.service", "bulkhead-store.service"),
    ),
    Unit(
        "wg",
        "Bulkhead's WireGuard network between servers",
        f"bulkhead wg run {STATE_FILE}",
        "root",
        {
            "KillMode": "process",  # wireguard-go outlives a restart, and no packet is lost
            "PrivateUsers": "no",
            "PrivateDevices": "no",
            "DevicePolicy": "closed",
            "DeviceAllow": "/dev/net/tun rw",
            "ProtectKernelTunables": "no",  # answers may take another interface
            "ProtectProc": "default",
            "ProcSubset": "all",
            "CapabilityBoundingSet": "CAP_NET_ADMIN",
            "AmbientCapabilities": "",
            "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
            "RuntimeDirectory": "bulkhead-wg wireguard",
            "RuntimeDirectoryPreserve": "yes",
            "Environment": "BULKHEAD_RUN_DIR=/run/bulkhead-wg",
            "ReadWritePaths": f"-{_SECURITY}",
        },
        after=("network.target", _FIREWALL),
        requires=(_FIREWALL,),
    ),
    Unit(
        "api",
        "Bulkhead's HTTP API",
        f"bulkhead api {STATE_FILE} {_STORE} --state-dir /var/lib/bulkhead/api",
        "bulkhead-api",
        {
            "PrivateUsers": "no",  # it checks who answers on a socket: all are nobody in a user namespace
            "SystemCallFilter": "@system-service\n~@privileged @resources\n@chown",  # its socket is its group's
            "StateDirectory": "bulkhead/api",
            "ReadWritePaths": "-/run/bulkhead",
        },
        after=("network.target", "bulkhead-store.service"),
        groups=("bulkhead",),
    ),
    Unit(
        "store",
        "Bulkhead's store",
        "bulkhead store serve --db /var/lib/bulkhead/store/bulkhead.db --group bulkhead",
        "bulkhead",
        {
            "StateDirectory": "bulkhead/store",
            "ReadWritePaths": "/run/bulkhead",
        },
    ),
    Unit(
        "chores@",
        "Bulkhead's %i chores",
        f"bulkhead chores %i {STATE_FILE}",
        "root",
        {
            # Reads every part's keys and the kernel's firewall, and probes ports from a namespace of its own.
            "CapabilityBoundingSet": "CAP_NET_ADMIN CAP_NET_RAW CAP_SYS_ADMIN CAP_DAC_READ_SEARCH CAP_DAC_OVERRIDE "
            "CAP_SYS_PTRACE CAP_CHOWN CAP_FOWNER CAP_SETUID CAP_SETGID",
            "AmbientCapabilities": "",
            "PrivateUsers": "no",
            "ProtectProc": "default",
            "ProcSubset": "all",
            "RestrictNamespaces": "net",
            "SystemCallFilter": "@system-service",
            "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
            # Certificates are delivered to other users' directories, as these users.
            "ReadWritePaths": f"-{_SECURITY} -/var/lib/bulkhead/router -/var/lib/bulkhead/inference",
        },
        kind=Kind.CALLED,
    ),
)
CHORES: tuple[Chore, ...] = (
    Chore("weekly", "Mon *-*-* 04:10:00", "access review, health, expiry and firewall audit"),
    Chore("monthly", "*-*-02 04:40:00", "the weekly chores, renewal and the rehearsal of disaster recovery"),
    Chore("hourly", "*-*-* *:25:00", "renewal of certificates and lists of revocations, where the CA is"),
    Chore("minute", "*-*-* *:*:00", "the check of the network's configuration"),
)

SYSUSERS = """\
# Made by bulkhead units. One user for each part; nobody logs in as them.
u router       - "Bulkhead's router"     /var/lib/bulkhead/router    /usr/sbin/nologin
u inference    - "Inference server"      /var/lib/bulkhead/inference /usr/sbin/nologin
u bulkhead     - "Bulkhead's controller" /var/lib/bulkhead           /usr/sbin/nologin
u bulkhead-api - "Bulkhead's API"        /var/lib/bulkhead/api       /usr/sbin/nologin
m bulkhead-api bulkhead
m inference router
m router inference
"""

TMPFILES = """\
# Made by bulkhead units. The guide's path leads to a directory that belongs to the inference server; in the state file:
# security: {inference: {socket: /run/bulkhead-inference/inference.sock, group: router}}
# Sockets of several users are in /run/bulkhead: the sticky bit keeps them from moving away each other's and root's. Not a
# RuntimeDirectory= of units: systemd would give the controller's user all that root has put there before.
d /run/bulkhead 1770 bulkhead bulkhead -
L /run/inference.sock - - - - bulkhead-inference/inference.sock
"""


def service_name(unit: Unit) -> str:
    """The file of a unit."""
    return f"bulkhead-{unit.name}.service"


def find_program() -> str:
    """Where `bulkhead` is, for ExecStart, which wants a full path."""
    return shutil.which("bulkhead") or "/usr/bin/bulkhead"


def service(unit: Unit, program: str) -> str:
    """The text of a service."""
    lines = ["# Made by bulkhead units; changes belong in a drop-in.", "[Unit]", f"Description={unit.text}"]
    lines.append(f"After={' '.join(unit.after)}")
    if unit.requires:
        lines.append(f"Wants={' '.join(unit.requires)}")
        lines += [f"AssertPathExists=/run/{name.removesuffix('.service')}" for name in unit.requires]
    if unit.kind is Kind.BOOT:  # as early as Debian's own nftables.service: before there is any network
        lines += ["DefaultDependencies=no", "Wants=network-pre.target", "Before=network-pre.target shutdown.target"]
        lines.append("Conflicts=shutdown.target")
    lines += ["", "[Service]", f"Type={'exec' if unit.kind is Kind.SERVICE else 'oneshot'}"]
    lines += [f"ExecStart={line.replace('bulkhead', program, 1)}" for line in unit.command.split("\n")]
    lines.append(f"User={unit.user}")
    if unit.kind is Kind.SERVICE:
        lines += ["ExecReload=/bin/kill -HUP $MAINPID", "Restart=on-failure", "RestartSec=1"]
    elif unit.kind is Kind.BOOT:
        lines += [f"ExecReload={line.replace('bulkhead', program, 1)}" for line in unit.command.split("\n")]
        lines.append("RemainAfterExit=yes")
    else:  # the answer no is told by events, not as a failed unit
        lines += ["SuccessExitStatus=1", "TimeoutStartSec=10min"]
    if unit.groups:
        lines.append(f"SupplementaryGroups={' '.join(unit.groups)}")
    for key, value in {**HARDENED, **unit.settings}.items():
        if value == "none":
            lines.append(f"{key}=")
        elif value:
            lines += [f"{key}={part}" for part in value.split("\n")]
    if unit.kind is not Kind.CALLED:
        lines += ["", "[Install]", "WantedBy=multi-user.target"]
    return "\n".join(lines) + "\n"


def timer(chore: Chore) -> str:
    """The text of a timer."""
    delay = "5s" if chore.name == "minute" else "20min"
    return (
        f"# Made by bulkhead units; changes belong in a drop-in.\n[Unit]\nDescription={chore.text[0].upper()}"
        f"{chore.text[1:]}\n\n[Timer]\nOnCalendar={chore.calendar}\nPersistent={'no' if delay == '5s' else 'yes'}\n"
        f"RandomizedDelaySec={delay}\nUnit=bulkhead-chores@{chore.name}.service\n\n[Install]\nWantedBy=timers.target\n"
    )


def files(program: str | None = None) -> dict[str, str]:
    """Every file below the root directory with its text."""
    program = program or find_program()
    units = {f"etc/systemd/system/{service_name(u)}": service(u, program) for u in UNITS}
    timers = {f"etc/systemd/system/bulkhead-{c.name}.timer": timer(c) for c in CHORES}
    return {**units, **timers, "etc/sysusers.d/bulkhead.conf": SYSUSERS, "etc/tmpfiles.d/bulkhead.conf": TMPFILES}


def install(root: Path, program: str | None = None) -> list[Path]:
    """Write what differs below `root`, each file at once; the files that were written. Raises `BulkheadError`."""
    written = []
    for name, text in files(program).items():
        path = root / name
        try:
            if path.is_file() and path.read_text() == text:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            fd, temp = tempfile.mkstemp(dir=path.parent, prefix=".bulkhead-")
            try:
                with os.fdopen(fd, "w") as file:
                    file.write(text)
                    os.fchmod(file.fileno(), 0o644)
                os.replace(temp, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temp)
                raise
        except OSError as exc:
            raise BulkheadError(f"{path} cannot be written: {exc.strerror}; run this as root, or name --root") from exc
        written.append(path)
    return written


def limit(name: str) -> float:
    """The worst score that a unit may have."""
    return EXPOSURE_LIMITS.get(name, EXPOSURE_LIMIT)


def scores(paths: Iterable[Path]) -> dict[str, float]:
    """The exposure of unit files by their name, as systemd-analyze sees it without a running systemd.

    Raises `BulkheadError` where it is missing or does not understand a file.
    """
    found = {}
    for path in paths:
        # The template is judged as one of its units: systemd-analyze takes no template.
        judged = path
        with tempfile.TemporaryDirectory(prefix="bulkhead-units-") as temp:
            if path.name.endswith("@.service"):
                judged = Path(temp, path.name.replace("@.", "@x."))
                shutil.copyfile(path, judged)
            found[path.name] = _score(judged)
    return found


def _score(path: Path) -> float:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANALYZE_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise BulkheadError(f"systemd-analyze cannot be run ({exc}); install systemd") from exc
    match = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
    if match is None:
        raise BulkheadError(f"systemd-analyze does not judge {path.name}: {(done.stderr or done.stdout).strip()[:300]}")
    return float(match[1])
