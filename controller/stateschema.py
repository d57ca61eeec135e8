"""The shape of a state file: its keys, the notation of each value, and the problems of whatever differs.

`validate` turns plain values into frozen models, and reports each deviation as a `Problem` with its path; what the
values mean together is the business of `controller.statederive`. `json_schema` describes the same shape to editors.
Imports `model`, `problems` and `statetext`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from controller.hostmodel import Endpoint
from controller.model import Ipv4, Mac, Prefix, Protocol
from controller.problems import Problem, error
from controller.statetext import join, show

IFNAMSIZ: Final = 15
MAX_ID: Final = 999_999_999
MAX_FLOW_LENGTH: Final = 2048
MAX_FLOWS: Final = 4096
MAX_NETWORKS: Final = 64
MAX_CONTAINERS: Final = 60_000
MAX_PEERS: Final = 1024
MAX_PROBLEMS: Final = 1000
# A did-you-mean costs a comparison with every candidate; a file of nonsense gets none after this many.
_MAX_GUESSES: Final = 50

# What OpenFlow texts use as ports or actions; a port of such a name could not be written in a flow.
RESERVED_PORT_NAMES: Final = frozenset(
    ("local", "normal", "flood", "all", "in_port", "table", "controller", "any", "none", "unset", "drop", "output")
)

_DOTTED: Final = r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_ADDRESS: Final = re.compile(_DOTTED)
_CIDR: Final = re.compile(_DOTTED + r"/(?:3[0-2]|[12]?[0-9])")
_MAC: Final = re.compile(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")
_LABEL: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_ID: Final = re.compile(r"[1-9][0-9]{0,8}")
_ID_RANGE: Final = re.compile(r"([1-9][0-9]{0,8})\s*-\s*([1-9][0-9]{0,8})")
_WG_KEY: Final = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")
_ENDPOINT: Final = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):([0-9]{1,5})")
_CHECK: Final = re.compile(r"tcp|http:/[!-~]*")
_ACCOUNT: Final = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_DECIMAL: Final = re.compile(r"[0-9]{1,7}(?:\.[0-9]{1,6})?")
_DATAPATH_ID: Final = re.compile(r"[0-9A-Fa-f]{16}")
# The kernel refuses '/', ':' and white space, and expands '%'; the rest would need quoting in a flow.
_INTERFACE: Final = re.compile(r"[A-Za-z0-9_.+@~^!#$&*;<>?|{}-]+")


def _bad(code: str, expected: str, fix: str) -> PydanticCustomError:
    # Templates are fixed text: no input is ever formatted into them.
    return PydanticCustomError(code, "see context", {"expected": expected, "fix": fix})


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _bad("wrong-type", "text", "Write it in quotes.")
    return value


def _label(value: object) -> str:
    text = _text(value)
    if not _LABEL.fullmatch(text):
        expected = "1 to 63 letters, digits and inner hyphens"
        raise _bad("bad-name", expected, "Names become DNS names; choose one that can.")
    return text


def _id(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_ID:
        return str(value)
    text = _text(value)
    if not _ID.fullmatch(text):
        raise _bad("bad-id", f"a number from 1 to {MAX_ID}, without leading zeros", "Use the container's number.")
    return text


def _interface(value: object) -> str:
    text = _text(value)
    if len(text.encode(errors="replace")) > IFNAMSIZ:
        raise _bad("bad-interface-name", f"at most {IFNAMSIZ} characters", "The kernel takes no more; shorten it.")
    if not _INTERFACE.fullmatch(text) or text in (".", ".."):
        fix = "The kernel and flows take no '/', ':', '%', quotes, commas, parentheses or white space in it."
        raise _bad("bad-interface-name", "a name such as veth100", fix)
    if text.isdigit() or text.lower() in RESERVED_PORT_NAMES:
        fix = "In a flow it would be read as a port number or a reserved port; choose another."
        raise _bad("bad-interface-name", "a name such as veth100", fix)
    return text


def _address(value: object) -> Ipv4:
    text = _text(value)
    if not _ADDRESS.fullmatch(text):
        raise _bad("bad-address", "an IPv4 address such as 10.0.0.1", "Write four numbers from 0 to 255.")
    return Ipv4(int.from_bytes(bytes(map(int, text.split("."))), "big"))


def _cidr(text: str, example: str) -> tuple[Ipv4, Prefix]:
    if not _CIDR.fullmatch(text):
        raise _bad("bad-prefix", f"an IPv4 address and prefix length such as {example}", "Write both, with a slash.")
    address, _, length = text.partition("/")
    host = _address(address)
    mask = Prefix(Ipv4(0), int(length)).mask
    return host, Prefix(Ipv4(host & mask), int(length))


def _prefix(value: object) -> Prefix:
    address, prefix = _cidr(_text(value), "10.0.0.0/24")
    if address != prefix.address:
        raise _bad("bad-prefix", str(prefix), "Bits are set behind the prefix length; write the network's address.")
    return _unicast(prefix)


def _unicast(prefix: Prefix) -> Prefix:
    reserved = ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3")
    if any(Prefix.parse(text).overlaps(prefix) for text in reserved):
        raise _bad("bad-prefix", "a unicast prefix", f"It overlaps one of {', '.join(reserved)}; choose another.")
    return prefix


def _interface_address(value: object) -> tuple[Ipv4, Prefix]:
    address, prefix = _cidr(_text(value), "10.0.0.100/24")
    return address, _unicast(prefix)


def _mac(value: object) -> Mac:
    text = _text(value)
    if not _MAC.fullmatch(text):
        raise _bad("bad-mac", "a MAC address such as 02:00:00:00:00:01", "Write six pairs of hex digits.")
    mac = Mac(int(text.replace(":", ""), 16))
    if mac >> 40 & 1:
        fix = "The lowest bit of the first byte marks a group; clear it."
        raise _bad("multicast-mac", "a unicast MAC address", fix)
    if mac == 0:
        raise _bad("bad-mac", "a MAC address that is not all zeros", "Leave it out to have one derived.")
    return mac


def _id_range(value: object) -> tuple[int, int]:
    low: Any = None
    high: Any = None
    if isinstance(value, str) and (found := _ID_RANGE.fullmatch(value)):
        low, high = int(found[1]), int(found[2])
    elif isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value):
        low, high = value
    if low is None or not 0 < low <= high <= MAX_ID:
        raise _bad("bad-range", 'a range of ids such as "100-199"', "Write the lowest and the highest id.")
    return low, high


def _datapath_id(value: object) -> int:
    if not isinstance(value, str) or not _DATAPATH_ID.fullmatch(value):
        raise _bad("bad-datapath-id", "16 hex digits in quotes", 'Write all of them, as in "0000000000000001".')
    if int(value, 16) == 0:
        raise _bad("bad-datapath-id", "a datapath id that is not zero", "Choose one that no other bridge has.")
    return int(value, 16)


def _printable(value: object) -> str:
    text = _text(value)
    if len(text) > 1024 or not text.isprintable():
        raise _bad("bad-text", "up to 1024 printable characters on one line", "Shorten it, or remove line breaks.")
    return text


def _wireguard_key(value: object) -> str:
    text = _text(value)
    if not _WG_KEY.fullmatch(text):
        # What stands there may be a private key in the wrong place: it is not repeated, see `_problem`.
        raise _bad("bad-key", "a WireGuard public key: 44 characters of base64", "Print it with: wg pubkey < KEYFILE")
    return text


def _endpoint(value: object) -> Endpoint:
    text = _text(value)
    found = _ENDPOINT.fullmatch(text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise _bad("bad-endpoint", "HOST:PORT, such as 162.159.192.1:2408", "Write an address or a name, and a port.")
    return Endpoint(found[1], int(found[2]))


def _file(value: object) -> Path:
    text = _printable(value)
    if not text.startswith("/"):
        raise _bad("bad-path", "an absolute path", "Write the whole path: the agent has no directory of its own.")
    return Path(text)


def _any_address(value: object) -> tuple[Ipv4, int]:
    text = _text(value)
    address, prefix = _cidr(text if "/" in text else f"{text}/32", "172.16.0.2/32")
    return address, prefix.length


def _allowed(value: object) -> Prefix:
    return Prefix(Ipv4(0), 0) if value == "0.0.0.0/0" else _prefix(value)


def _domain(value: object) -> str:
    text = _text(value)
    if len(text) > 253 or not all(_LABEL.fullmatch(part) for part in text.split(".")):
        raise _bad("bad-name", "a domain such as privacy.internal", "Use letters, digits, hyphens and dots.")
    return text.lower()


def _check(value: object) -> str:
    text = _text(value)
    if len(text) > 256 or not _CHECK.fullmatch(text):
        raise _bad("bad-check", "tcp, or http:/PATH", "tcp opens a connection, http:/PATH asks for that path.")
    return text


def _decimal(value: object) -> float:
    # A number with a point is read as text: most of them are addresses or versions that lack quotes.
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1_000_000:
        raise _bad("out-of-range", "a number above 0 and at most 1000000", "Write it with digits, such as 600 or 0.5.")
    return float(value)


def _account(value: object) -> str:
    text = _text(value)
    if not _ACCOUNT.fullmatch(text):
        raise _bad("bad-name", "the name of a group", "Use up to 31 small letters, digits, '_' and '-'.")
    return text


def _flow(value: object) -> str:
    text = _text(value).strip()
    if len(text) > MAX_FLOW_LENGTH or not text.isascii() or not text.isprintable():
        expected = f"one flow: up to {MAX_FLOW_LENGTH} printable ASCII characters on one line"
        raise _bad("bad-flow", expected, "Write each flow as an entry of its own.")
    return text


def _notation(check: Callable[[object], Any], pattern: str | None, **more: Any) -> tuple[Any, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if pattern is not None:
        schema["pattern"] = f"^(?:{pattern})$"
    return PlainValidator(check), WithJsonSchema(more.pop("schema", schema | more))


# Unpacking in a subscript makes Annotated[Ipv4, validator, schema]; each pair is made once, here.
_ID_SCHEMA: Final = {
    "anyOf": [{"type": "string", "pattern": f"^{_ID.pattern}$"}, {"type": "integer", "minimum": 1, "maximum": MAX_ID}]
}
_DECIMAL_SCHEMA: Final = {"type": "number", "exclusiveMinimum": 0, "maximum": 1_000_000}
_RANGE_SCHEMA: Final = {
    "anyOf": [
        {"type": "string", "pattern": f"^{_ID_RANGE.pattern}$"},
        {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
    ]
}
Label = Annotated[str, *_notation(_label, _LABEL.pattern)]
ContainerId = Annotated[str, *_notation(_id, None, schema=_ID_SCHEMA)]
Interface = Annotated[str, *_notation(_interface, _INTERFACE.pattern, maxLength=IFNAMSIZ)]
Address = Annotated[Ipv4, *_notation(_address, _DOTTED)]
Cidr = Annotated[Prefix, *_notation(_prefix, _CIDR.pattern)]
InterfaceAddress = Annotated[tuple[Ipv4, Prefix], *_notation(_interface_address, _CIDR.pattern)]
MacAddress = Annotated[Mac, *_notation(_mac, _MAC.pattern)]
IdRange = Annotated[tuple[int, int], *_notation(_id_range, None, schema=_RANGE_SCHEMA)]
DatapathId = Annotated[int, *_notation(_datapath_id, _DATAPATH_ID.pattern)]
Text = Annotated[str, *_notation(_printable, None, maxLength=1024)]
FlowText = Annotated[str, *_notation(_flow, None, maxLength=MAX_FLOW_LENGTH)]
PortNumber = Annotated[int, Field(ge=1, le=65535)]


WireguardKey = Annotated[str, *_notation(_wireguard_key, _WG_KEY.pattern)]
EndpointText = Annotated[Endpoint, *_notation(_endpoint, _ENDPOINT.pattern)]
FilePath = Annotated[Path, *_notation(_file, "/.*")]
AnyAddress = Annotated[tuple[Ipv4, int], *_notation(_any_address, None)]
AllowedCidr = Annotated[Prefix, *_notation(_allowed, _CIDR.pattern)]
CheckText = Annotated[str, *_notation(_check, _CHECK.pattern, maxLength=256)]
AccountName = Annotated[str, *_notation(_account, _ACCOUNT.pattern)]
Decimal = Annotated[float, *_notation(_decimal, None, schema=_DECIMAL_SCHEMA)]
Domain = Annotated[str, *_notation(_domain, None, maxLength=253)]


class _Spec(BaseModel):
    """Unknown keys are errors, nothing is converted, nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PeerSpec(_Spec):
    """A WireGuard peer. Keys are base64; `endpoint` is HOST:PORT."""

    public_key: WireguardKey
    allowed_ips: list[AllowedCidr]
    endpoint: EndpointText | None = None
    persistent_keepalive: Annotated[int, Field(ge=0, le=65535)] = 0
    preshared_key_file: FilePath | None = None


class _TunnelSpec(_Spec):
    """What makes a WireGuard interface: a wg-quick style file, or the same said here."""

    config: FilePath | None = Field(default=None, description="a wg-quick style file, as wgcf writes it")
    private_key_file: FilePath | None = Field(default=None, description="mode 600; without one the agent makes a key")
    addresses: list[AnyAddress] = []
    mtu: Annotated[int, Field(ge=576, le=65535)] | None = None
    peers: list[PeerSpec] = []


class ProbeSpec(_Spec):
    """What is reached through a tunnel to see whether it works: TCP with a port, ICMP echo without."""

    address: Address
    port: PortNumber | None = None


class DnsSpec(_Spec):
    """The resolver of a network, a member of it at `address` (the subnet's .53 if left out)."""

    address: Address | None = None
    domain: Domain | None = None
    upstream: list[Address] = []


class HostSpec(_Spec):
    """The host itself: how packets are forwarded and where the world is."""

    datapath: Literal["auto", "system", "netdev"] = "auto"
    uplinks: list[Interface] = []


class FirewallSpec(_Spec):
    """Which ports of the host are open, under the names that NixOS has for it."""

    enable: bool = True
    allowedTCPPorts: list[PortNumber] = []
    allowedUDPPorts: list[PortNumber] = []
    trustedInterfaces: list[Interface] = []


class EgressSpec(_Spec):
    """The port a network's traffic leaves by, and the MAC of the leg's far end (the gateway's if left out)."""

    port: Interface
    mac: MacAddress | None = None


class MeshSpec(_Spec):
    """A network's way to other nodes: the mesh bridge, and the ports on either side of it."""

    bridge: Interface
    port: Interface = Field(description="the veth end on the socket bridge")
    far_port: Interface = Field(description="the veth end on the mesh bridge")
    leg_port: Interface = Field(description="the leg on the mesh bridge")
    mac: MacAddress | None = None
    prefixes: list[Cidr] | None = Field(
        default=None, description="where peers are; the network's own subnet if left out"
    )


class NetworkSpec(_Spec):
    """One isolated network. What is left out is derived; `egress: null` and `mesh: null` say there is none."""

    bridge: Interface | None = None
    subnet: Cidr | None = None
    gateway: Address | None = None
    gateway_mac: MacAddress | None = None
    ids: IdRange | None = None
    egress: EgressSpec | None = None
    mesh: MeshSpec | None = None
    host: Address | None = Field(default=None, description="the host's own address, if it takes part")
    dns: DnsSpec | None = Field(default=None, description="a resolver for the network's names")
    refuse: bool = Field(default=False, description="answer blocked connections instead of dropping them silently")


class BridgeSpec(_Spec):
    """What is pinned about a bridge; which bridges there are follows from the networks."""

    datapath_id: DatapathId | None = None
    kind: Literal["socket", "mesh"] | None = None


class NetmakerNetwork(_TunnelSpec):
    """A mesh this node is in: by Netmaker's client (`server` and `token_file`), or by `peers` written here."""

    name: Label
    mode: Literal["client", "server"] = "client"
    interface: Interface
    bridge: Interface
    server: Text | None = None
    token_file: FilePath | None = None
    listen_port: PortNumber | None = None


class Netmaker(_Spec):
    """The meshes of this node."""

    networks: list[NetmakerNetwork] = []


class VethPeer(_Spec):
    """One end of a veth pair and the bridge it is a port of."""

    name: Interface
    bridge: Interface


class VethPair(_Spec):
    """A veth pair between two bridges."""

    peer1: VethPeer
    peer2: VethPeer


class Networking(_Spec):
    """Links between bridges."""

    veth_pairs: dict[Text, VethPair] = {}
    firewall: FirewallSpec | None = None


class WarpTunnel(_TunnelSpec):
    """The tunnel to the world. Its commands are read for what they mean, and never run."""

    interface: Interface
    enabled: bool = True
    probe: ProbeSpec | None = None
    post_up: Text | None = None
    pre_down: Text | None = None


class VpnServer(_Spec):
    """A WireGuard server in a container; `container` is its id."""

    interface: Interface
    listen_port: PortNumber = 51820
    ip_pool: Cidr
    auto_provision: bool = False
    container: ContainerId | None = None
    private_key_file: FilePath | None = None
    endpoint: EndpointText | None = Field(default=None, description="HOST:PORT that clients dial")
    dns: list[Address] = []
    post_up: Text | None = None
    pre_down: Text | None = None


class Wireguard(_Spec):
    """WireGuard tunnels."""

    warp_tunnel: WarpTunnel | None = None
    vpn_server: VpnServer | None = None


class BridgeFlows(_Spec):
    """The literal flows of one bridge, in ovs-ofctl's syntax."""

    flows: list[FlowText] = Field(default=[], max_length=MAX_FLOWS)


class Openflow(_Spec):
    """Literal flows by bridge."""

    bridges: dict[Interface, BridgeFlows] = {}


class ServiceSpec(_Spec):
    """A name, protocol and port that a container offers."""

    name: Label
    protocol: Protocol = "tcp"
    port: PortNumber
    exposed: bool = False
    check: CheckText | None = Field(default=None, description="how its health is found out")


class Properties(_Spec):
    """What a container is on its network."""

    name: Label
    ipv4_address: InterfaceAddress
    gateway: Address | None = None
    network: Label | None = None
    mac: MacAddress | None = None
    services: list[ServiceSpec] = []


class ContainerSpec(_Spec):
    """A container. Its port is `veth<id>` on its network's bridge unless it says otherwise."""

    id: ContainerId
    veth: Interface | None = None
    bridge: Interface | None = None
    running: bool = True
    driver: Literal["netns", "lxc"] | None = None
    command: list[Text] = Field(default=[], description="netns: the program to run and keep running")
    template: Label | None = Field(default=None, description="lxc: the template it is made from")
    rootfs: FilePath | None = Field(default=None, description="lxc: a root file system that is there")
    order: Annotated[int, Field(ge=0, le=1_000_000)] = Field(default=0, description="smaller starts earlier")
    properties: Properties

    @property
    def port(self) -> str:
        """The name of its port."""
        return self.veth if self.veth is not None else f"veth{self.id}"


class Lxc(_Spec):
    """Containers."""

    containers: list[ContainerSpec] = Field(default=[], max_length=MAX_CONTAINERS)


class ApiSpec(_Spec):
    """The HTTP API: which container it listens in as well, and who may approve."""

    container: ContainerId | None = Field(default=None, description="of a network without egress; null for none")
    port: PortNumber = 9573
    self_approval: bool = Field(default=False, description="whoever asks for a grant may approve it too")
    certificate: FilePath | None = Field(default=None, description="PEM, with the chain; without one it makes its own")
    private_key: FilePath | None = None


class SecurityPeerSpec(_Spec):
    """Another server of the WireGuard network; endpoint and key may come from what it has handed over instead."""

    name: Label
    address: Address
    endpoint: EndpointText | None = None
    public_key: WireguardKey | None = None


class InferenceSpec(_Spec):
    """Where the inference server is: a unix socket on a development machine, else a port of the WireGuard network."""

    socket: FilePath = Path("/run/inference.sock")
    group: AccountName = "router"
    port: PortNumber = 8001


class LimitsSpec(_Spec):
    """What the router takes, and for how long."""

    body_bytes: Annotated[int, Field(gt=0, le=1 << 40)] = 1 << 20
    request_s: Decimal = 600.0
    idle_s: Decimal = 60.0
    concurrency: Annotated[int, Field(gt=0, le=1_000_000)] = 256
    per_client_per_s: Decimal = 20.0


class SecuritySpec(_Spec):
    """This machine's part in the security guide."""

    role: Literal["dev", "router", "inference"]
    name: Label | None = Field(default=None, description="in certificates and among peers; the role if left out")
    network: Cidr | None = Field(default=None, description="WireGuard's; 10.0.0.0/24 if left out")
    address: Address | None = Field(default=None, description="its own there; the network's first for a router")
    listen: PortNumber = Field(default=443, description="the router's TLS port")
    names: list[Domain] = Field(default=[], description="DNS names of the router")
    peers: list[SecurityPeerSpec] = Field(default=[], max_length=MAX_PEERS)
    inference: InferenceSpec = InferenceSpec()
    limits: LimitsSpec = LimitsSpec()
    log_dropped: bool = Field(default=False, description="log some of the packets that the firewall drops")


class StateSpec(_Spec):
    """Everything a state file can say."""

    networks: dict[Label, NetworkSpec] = Field(default={}, max_length=MAX_NETWORKS)
    bridges: dict[Interface, BridgeSpec] = {}
    host: HostSpec = HostSpec()
    netmaker: Netmaker = Netmaker()
    networking: Networking = Networking()
    wireguard: Wireguard = Wireguard()
    openflow: Openflow = Openflow()
    lxc: Lxc = Lxc()
    api: ApiSpec = ApiSpec()
    security: SecuritySpec | None = None


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a state file, for editors and other tools."""
    schema = StateSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Bulkhead state file"}


@dataclass(frozen=True, slots=True)
class Checked:
    """What of an input has the right shape.

    `spec` is the input without its misshapen parts, None if nothing can be made of the rest. `positions` are the
    places the containers of `spec` have in the input; `damaged` names the top-level keys something was left out of.
    """

    spec: StateSpec | None
    problems: tuple[Problem, ...]
    positions: tuple[int, ...] = ()
    damaged: frozenset[str] = frozenset()


def validate(tree: dict[str, Any]) -> Checked:
    """Check the shape of an input, as much of it as can be checked."""
    try:
        spec = StateSpec.model_validate(tree)
    except ValidationError as exc:
        if exc.error_count() > MAX_PROBLEMS:
            return Checked(None, _first_problems(exc))
        return _salvage(tree, exc.errors(include_url=False))
    return Checked(spec, (), tuple(range(len(spec.lxc.containers))))


def _first_problems(exc: ValidationError) -> tuple[Problem, ...]:
    details = exc.errors(include_url=False)
    rest = error(
        "too-many-problems",
        "(top level)",
        f"{len(details) - MAX_PROBLEMS} more problems",
        "a state file",
        "Mend these first, or check that this is the right file.",
    )
    guesses = _Guesses()
    return (*(_problem(detail, guesses) for detail in details[:MAX_PROBLEMS]), rest)


def first_problem(exc: ValidationError, where: str) -> Problem:
    """What is wrong first with a part that is no file's; `where` names the part."""
    found = _problem(exc.errors(include_url=False)[0], _Guesses())
    return replace(found, path=f"{where}.{found.path}")


# Parts that are understood one by one: one misshapen container does not hide what is wrong with the others.
_UNITS: Final[dict[tuple[str | int, ...], int]] = {
    ("lxc", "containers"): 3,
    ("networking", "veth_pairs"): 3,
    ("openflow", "bridges"): 3,
    ("netmaker", "networks"): 3,
    ("networks",): 2,
    ("bridges",): 2,
    ("wireguard",): 2,
}
_SECRET: Final = frozenset(("bad-key",))
_Trie = dict[str | int, Any]


def _salvage(tree: dict[str, Any], details: Sequence[ErrorDetails]) -> Checked:
    """Leave out every unknown key and every misshapen unit, and check the rest again."""
    guesses = _Guesses()
    problems = tuple(_problem(detail, guesses) for detail in details)
    if not all(detail["loc"] for detail in details):
        return Checked(None, problems)
    cuts: _Trie = {}
    damaged: set[str] = set()
    lost: set[int] = set()
    for detail in details:
        unit = detail["loc"] if detail["type"] == "extra_forbidden" else _unit(detail["loc"])
        if detail["type"] != "extra_forbidden":
            damaged.add(str(unit[0]))
            if unit[:2] == ("lxc", "containers") and len(unit) == 3:
                lost.add(int(unit[2]))
        _cut(cuts, unit)
    try:
        spec = StateSpec.model_validate(_prune(tree, cuts))
    except ValidationError:
        return Checked(None, problems)
    places = range(len(spec.lxc.containers) + len(lost))
    return Checked(spec, problems, tuple(i for i in places if i not in lost), frozenset(damaged))


def _unit(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    length = _UNITS.get(loc[:2]) or _UNITS.get(loc[:1]) or 1
    return loc[:length]


def _cut(cuts: _Trie, path: tuple[str | int, ...]) -> None:
    for part in path[:-1]:
        below = cuts.setdefault(part, {})
        if below is None:  # something around it goes already
            return
        cuts = below
    cuts[path[-1]] = None


def _prune(value: Any, cuts: _Trie) -> Any:
    """A copy without the cut parts; what is not touched is shared, never changed."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    kept = [
        (key, item if key not in cuts else _prune(item, cuts[key]))
        for key, item in items
        if key not in cuts or cuts[key] is not None
    ]
    return dict(kept) if isinstance(value, dict) else [item for _, item in kept]


_TYPES: Final = {
    "string_type": "text",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}


@dataclass(slots=True)
class _Guesses:
    """Close matches for misspelt words, and a limit on how many are looked for."""

    left: int = _MAX_GUESSES

    def fix(self, word: str, known: Sequence[str], otherwise: str) -> str:
        """What to do about the word."""
        if self.left > 0 and len(word) <= 64:
            self.left -= 1
            close = difflib.get_close_matches(word, known, n=1)
            if close:
                return f"Did you mean {close[0]}?"
        return otherwise


def _problem(detail: ErrorDetails, guesses: _Guesses) -> Problem:
    """What pydantic found, in our words."""
    loc = detail["loc"]
    if loc and loc[-1] == "[key]":
        loc = loc[:-1]
    path, found, kind, context = join(loc), show(detail["input"]), detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        keys = sorted(_model_at(loc[:-1]).model_fields)
        fix = guesses.fix(str(loc[-1]), keys, "Remove it.")
        return error("unknown-key", path, f"unknown key {show(str(loc[-1]))}", f"one of {', '.join(keys)}", fix)
    if kind == "missing":
        return error("missing-key", path, "nothing", f"the key {loc[-1]}", "Add it.")
    if kind == "literal_error":
        return error("bad-value", path, found, str(context["expected"]), "Choose one of them.")
    if kind == "greater_than":
        return error("out-of-range", path, found, "a number above 0", "Choose one in that range.")
    if kind in ("greater_than_equal", "less_than_equal"):
        low, high = context.get("ge"), context.get("le")
        limit = f"a number of at least {low}" if high is None else f"a number of at most {high}"
        if low == 1 or high == 65535:
            limit = "a number from 1 to 65535"
        return error("out-of-range", path, found, limit, "Choose one in that range.")
    if kind == "too_long":
        expected = f"at most {context['max_length']} entries"
        return error("too-many", path, f"{context['actual_length']} entries", expected, "Remove or split some.")
    if kind in _SECRET:
        found = "something else"
    if "fix" in context:
        return error(kind, path, found, str(context["expected"]), str(context["fix"]))
    expected = _TYPES.get(kind, detail["msg"])
    return error("wrong-type", path, found, expected, f"Write {expected} there.")


def _model_at(loc: Sequence[str | int]) -> type[BaseModel]:
    """The model of the mapping at a path that pydantic reported."""
    here: Any = StateSpec
    for part in loc:
        here = _inner(here)
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[str(part)].annotation
        else:  # a list or a mapping of anything
            here = typing.get_args(here)[-1]
    model: type[BaseModel] = _inner(here)
    return model


def _inner(annotation: Any) -> Any:
    """`X` of `X | None`."""
    if isinstance(annotation, types.UnionType):
        return next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return annotation
