"""What a host has to be made of for a `DesiredState` to work: tunnels, legs, containers, names, the host's firewall.

Frozen values, as in `controller.model`. The controller needs none of them; the agent builds them. Files with secrets are
named here and never read. Imports model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from controller.model import Ipv4, Prefix, Role

MTU_DEFAULT = 1420
"""Of a WireGuard interface over IPv4 or IPv6 on a path of 1,500 bytes (80 bytes of overhead at most)."""
WARP_MTU = 1280
"""Of a WARP tunnel, as its profiles say."""


class Datapath(StrEnum):
    """Where packets are forwarded: `system` in the kernel's module, `netdev` in ovs-vswitchd, `auto` as the host can."""

    AUTO = "auto"
    SYSTEM = "system"
    NETDEV = "netdev"


class Driver(StrEnum):
    """What a container is: `netns` a network namespace with at most one command, `lxc` a real LXC container."""

    NETNS = "netns"
    LXC = "lxc"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a WireGuard peer listens. `host` is an address, or a name that is resolved outside the tunnel."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Peer:
    """A WireGuard peer. `allowed` are the prefixes that live behind it; `keepalive` is in seconds, 0 for none."""

    public_key: str
    allowed: tuple[Prefix, ...]
    endpoint: Endpoint | None = None
    keepalive: int = 0
    preshared_key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A WireGuard interface.

    With `config`, a wg-quick style file that only root reads, the rest is taken from there where it is not given here.
    `addresses` have prefix lengths. Without `private_key_file` and `config` the agent makes a key and keeps it.
    """

    interface: str
    config: Path | None = None
    private_key_file: Path | None = None
    addresses: tuple[tuple[Ipv4, int], ...] = ()
    listen_port: int | None = None
    mtu: int | None = None
    peers: tuple[Peer, ...] = ()


@dataclass(frozen=True, slots=True)
class Netclient:
    """Netmaker's client, instead of static peers: it joins `server` with the token in `token_file`."""

    server: str
    token_file: Path


@dataclass(frozen=True, slots=True)
class Probe:
    """How a tunnel is tried: a TCP connection to `port` of `address` through it, or ICMP echo where there is no port."""

    address: Ipv4
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Leg:
    """A port made of a tunnel: a veth from bridge `bridge` into a namespace that holds the WireGuard interface too.

    `role` is `egress` or `mesh`; the bridge's end of the veth is called `port`.
    """

    network: str
    role: Role
    bridge: str
    port: str
    tunnel: Tunnel
    netclient: Netclient | None = None
    probe: Probe | None = None
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class VethEnd:
    """One end of a veth pair between two bridges."""

    name: str
    bridge: str


@dataclass(frozen=True, slots=True)
class Container:
    """How a member of a network is run. `id` is the member's.

    `command` is the program of a `netns` container, restarted when it ends; `template` or `rootfs` make a `lxc` one.
    Containers start in rising `order`, then by id. `dns` are its resolvers. A `confined` one was not declared by root: its
    program has no rights on the host.
    """

    id: str
    driver: Driver = Driver.NETNS
    running: bool = True
    command: tuple[str, ...] = ()
    template: str | None = None
    rootfs: Path | None = None
    order: int = 0
    dns: tuple[Ipv4, ...] = ()
    confined: bool = False


@dataclass(frozen=True, slots=True)
class VpnServer:
    """The WireGuard server inside container `container_id`.

    Clients dial `endpoint` and ask `dns` for names.
    """

    container_id: str
    tunnel: Tunnel
    pool: Prefix
    endpoint: Endpoint | None = None
    dns: tuple[Ipv4, ...] = ()


@dataclass(frozen=True, slots=True)
class Zone:
    """The names of one network, answered by a resolver that is a member of it (id `member_id`).

    `domain` is the suffix, `<container>.<domain>`; `upstream` is asked for everything else, through the network's own
    egress; without it nothing else resolves.
    """

    network: str
    member_id: str
    domain: str
    address: Ipv4
    upstream: tuple[Ipv4, ...] = ()


@dataclass(frozen=True, slots=True)
class TunnelNetwork:
    """A network that is reached through tunnels of the host itself: its prefix, the host's own address, and the
    tunnels' interfaces."""

    prefix: Prefix
    address: Ipv4
    interfaces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Firewall:
    """What of the host itself can be reached. `tcp` and `udp` from anywhere; `local_tcp` from loopback and `trusted`
    interfaces alone; `inner` TCP ports by the tunnel alone; what comes in by a trusted interface is accepted. Some of
    what is dropped is logged if `log` says so.

    What is of the network `tunnel` travels through its interfaces alone, and is not forwarded.
    """

    tcp: tuple[int, ...] = ()
    udp: tuple[int, ...] = ()
    local_tcp: tuple[int, ...] = ()
    trusted: tuple[str, ...] = ()
    tunnel: TunnelNetwork | None = None
    inner: tuple[int, ...] = ()
    log: bool = False


class SecurityRole(StrEnum):
    """What a machine is to the security guide: both services on one machine, the router, or a server behind it."""

    DEV = "dev"
    ROUTER = "router"
    INFERENCE = "inference"


@dataclass(frozen=True, slots=True)
class SecurityPeer:
    """Another server of the WireGuard network. `endpoint` is where it listens, `public_key` its key; both may come from
    what it has handed over instead (`bulkhead wg add`)."""

    name: str
    address: Ipv4
    endpoint: Endpoint | None = None
    public_key: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the router takes: bytes of a request's body, seconds for a whole request and without a byte, requests at a
    time, and requests of one client per second."""

    body_bytes: int = 1 << 20
    request_s: float = 600.0
    idle_s: float = 60.0
    concurrency: int = 256
    per_client_per_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Profile:
    """The section `security`: this machine's part in the security guide.

    `name` is what it is called in certificates and by its peers, `names` what clients call the router. `network` is that
    of WireGuard and `address` its own there; in the role `dev` there is no WireGuard, and nothing uses them. `listen` is
    the router's port. The inference server is at `socket` for members of `socket_group` in the role `dev`, else at
    `inference_port` of the peers.
    """

    role: SecurityRole
    name: str
    network: Prefix
    address: Ipv4
    listen: int = 443
    names: tuple[str, ...] = ()
    peers: tuple[SecurityPeer, ...] = ()
    socket: Path = Path("/run/inference.sock")
    socket_group: str = "router"
    inference_port: int = 8001
    limits: Limits = Limits()
    log_dropped: bool = False

    @property
    def routes(self) -> bool:
        """Whether the router runs here."""
        return self.role is not SecurityRole.INFERENCE

    @property
    def has_wireguard(self) -> bool:
        """Whether the machine is in the WireGuard network."""
        return self.role is not SecurityRole.DEV

    @property
    def tcp(self) -> tuple[int, ...]:
        """TCP ports that anybody may reach."""
        return (SSH_PORT, self.listen) if self.routes else (SSH_PORT,)

    @property
    def udp(self) -> tuple[int, ...]:
        """UDP ports that anybody may reach."""
        return (WG_PORT,) if self.has_wireguard else ()


SSH_PORT, WG_PORT = 22, 51820
WG_INTERFACE, WG_SPARE = "bulkhead-wg0", "bulkhead-wg1"
"""Of the WireGuard network between servers. The spare one is there while a key is replaced."""
WG_INTERFACES = (WG_INTERFACE, WG_SPARE)


@dataclass(frozen=True, slots=True)
class Check:
    """How the health of a service is found out: `check` is `tcp`, a connection, or `http:/PATH`, an answer below 400."""

    container_id: str
    service: str
    address: Ipv4
    port: int
    check: str

    @property
    def key(self) -> str:
        """`102/xray`."""
        return f"{self.container_id}/{self.service}"


@dataclass(frozen=True, slots=True)
class Api:
    """The HTTP API. It listens on `port` of container `container_id`, at `address`, as well; nowhere but on the host
    itself without a container. `certificate` and `private_key` are PEM files for there.

    With `self_approval` whoever has asked for a grant may approve it too.
    """

    container_id: str | None = None
    address: Ipv4 | None = None
    port: int = 9573
    self_approval: bool = False
    certificate: Path | None = None
    private_key: Path | None = None


@dataclass(frozen=True, slots=True)
class HostState:
    """Everything the agent builds on this host, beside the bridges that `DesiredState` names.

    `uplinks` are the interfaces to the world, empty where the default route says which. Without `firewall` the host's
    input is left as it is; what is forwarded between the networks is dropped in any case.
    """

    datapath: Datapath = Datapath.AUTO
    uplinks: tuple[str, ...] = ()
    legs: tuple[Leg, ...] = ()
    veths: tuple[tuple[VethEnd, VethEnd], ...] = ()
    containers: tuple[Container, ...] = ()
    vpn: VpnServer | None = None
    zones: tuple[Zone, ...] = ()
    firewall: Firewall | None = None
    api: Api = Api()
    checks: tuple[Check, ...] = ()
    security: Profile | None = None

    def container(self, member_id: str) -> Container:
        """The container that is that member. Raises `KeyError`."""
        for container in self.containers:
            if container.id == member_id:
                return container
        raise KeyError(member_id)
