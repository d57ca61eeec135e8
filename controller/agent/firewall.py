"""The rules of the host, of legs, of the VPN's gateway and of bridges' ports, as text for nft. Values in, text out.

Every table drops what it does not name, and counts it. Other software's tables are not looked at: a packet has to pass
theirs and ours. Imports hostmodel and model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, collapse_addresses

from controller.hostmodel import HostState, Leg, TunnelNetwork, VpnServer
from controller.model import BridgeKind, DesiredState, Ipv4, Network, Prefix, Role

PORT = "eth0"
"""The end of a leg's or container's veth in its namespace."""
AFTER_NAT = 300
"""A priority at which a packet that leaves has the addresses it leaves with."""

_ERRORS = "destination-unreachable, time-exceeded, parameter-problem"
_NEIGHBOURS = "nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert"
_NO_IPV6 = "meta nfproto ipv6 counter drop"
_CLAMP = "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu"
"""Makes both ends of a TCP connection send what fits into the tunnel, whatever they find out about the path."""
_LOG = 'limit rate 10/minute burst 20 packets log prefix "bulkhead dropped: "'
"""Enough to see that something knocks, too little to fill a disk."""
_REPLIES = "ct state established,related accept"
_INVALID = "ct state invalid counter drop"
_ECHO = "icmp type { echo-request, " + _ERRORS + " } accept"


# --------------------------------------------------------------------------------------------------------- the host


def host_table(state: DesiredState, host: HostState, uplinks: Sequence[str]) -> str:
    """`table inet bulkhead` of the host.

    Nothing is forwarded from, to or between the networks but the VPN's packets, between the `uplinks` and the gateway;
    the networks' addresses stay on their bridges; with `host.firewall`, what reaches the host itself is as it says.
    Where no uplink is known, every interface but the bridges counts as one.
    """
    chains = [
        _chain("spoofed", "filter", "prerouting", "raw", _spoofed(state)),
        _chain("forward", "filter", "forward", "filter", _forward(state, uplinks)),
        _chain("leaving", "filter", "postrouting", str(AFTER_NAT), _leaving(state)),
    ]
    if dnat := list(_to_the_gateway(state, uplinks)):
        chains.append(_chain("to-gateway", "nat", "prerouting", "dstnat", dnat))
    if host.firewall is not None:
        if host.firewall.tunnel is not None:
            chains += _tunnel_chains(host.firewall.tunnel)
        chains.append(_chain("input", "filter", "input", "filter", _input(state, host, uplinks), policy="drop"))
    return _table("inet", chains)


def _bridges(state: DesiredState) -> list[str]:
    named = [bridge.name for bridge in state.bridges]
    for network in state.networks:
        named += [network.bridge, *((network.mesh.bridge,) if network.mesh else ())]
    return sorted(set(named))


def _uplink(state: DesiredState, uplinks: Sequence[str], key: str = "iifname") -> str:
    return f"{key} {_names(uplinks)}" if uplinks else f"{key} != {_names([*_bridges(state), 'lo'])}"


def _spoofed(state: DesiredState) -> Iterator[str]:
    """A network's addresses come from its own bridges, and from the host itself."""
    for network in state.networks:
        own = [network.bridge, "lo", *((network.mesh.bridge,) if network.mesh else ())]
        yield f"iifname != {_names(own)} ip saddr {_prefixes(network.prefixes)} counter drop"


def _forward(state: DesiredState, uplinks: Sequence[str]) -> Iterator[str]:
    for network, gateway, port in _vpns(state):
        bridge = _name(network.bridge)
        world_in, world_out = _uplink(state, uplinks), _uplink(state, uplinks, "oifname")
        # Only what to-gateway has sent there, and what answers it.
        came, goes = "ct status dnat ct direction original", "ct status dnat ct direction reply"
        yield f"{world_in} oifname {bridge} {came} ip daddr {gateway} udp dport {port} counter accept"
        yield f"iifname {bridge} {world_out} {goes} ip saddr {gateway} udp sport {port} counter accept"
        # "Too big" and its like, about those packets.
        error = f"ct state related ct status dnat icmp type {{ {_ERRORS} }} counter accept"
        yield f"{world_in} oifname {bridge} ip daddr {gateway} {error}"
        yield f"iifname {bridge} {world_out} {error}"
    if bridges := _bridges(state):
        yield f"iifname {_names(bridges)} counter drop"
        yield f"oifname {_names(bridges)} counter drop"
    if prefixes := [prefix for network in state.networks for prefix in network.prefixes]:
        yield f"ip saddr {_prefixes(prefixes)} counter drop"
        yield f"ip daddr {_prefixes(prefixes)} counter drop"


def _leaving(state: DesiredState) -> Iterator[str]:
    """A network's addresses leave by its bridge or not at all."""
    for network in state.networks:
        prefixes = _prefixes(network.prefixes)
        yield f"oifname != {_names([network.bridge, 'lo'])} ip saddr {prefixes} counter drop"
        yield f"oifname != {_names([network.bridge, 'lo'])} ip daddr {prefixes} counter drop"


def _to_the_gateway(state: DesiredState, uplinks: Sequence[str]) -> Iterator[str]:
    for _, gateway, port in _vpns(state):
        yield f"{_uplink(state, uplinks)} fib daddr type local udp dport {port} dnat ip to {gateway}:{port}"


def _vpns(state: DesiredState) -> Iterator[tuple[Network, Ipv4, int]]:
    for network in state.networks:
        if network.vpn is not None:
            yield network, network.member(network.vpn.member_id).address, network.vpn.port


def _tunnel_chains(tunnel: TunnelNetwork) -> Iterator[str]:
    """What is of the network comes by its tunnels and leaves by them, or not at all, and goes to the host alone."""
    own = _names([*tunnel.interfaces, "lo"])
    tunnels = _names(tunnel.interfaces)
    yield _chain(
        "tunnel-in",
        "filter",
        "prerouting",
        "raw",
        [
            f"iifname != {own} ip saddr {tunnel.prefix} counter drop",
            f"iifname != {own} ip daddr {tunnel.prefix} counter drop",
            f"iifname {tunnels} meta nfproto ipv6 counter drop",
            f"iifname {tunnels} ip saddr != {tunnel.prefix} counter drop",
            f"iifname {tunnels} ip daddr != {tunnel.address} counter drop",
        ],
    )
    yield _chain(
        "tunnel-forward",
        "filter",
        "forward",
        "filter",
        [f"iifname {tunnels} counter drop", f"oifname {tunnels} counter drop"],
    )
    yield _chain(
        "tunnel-out",
        "filter",
        "postrouting",
        str(AFTER_NAT),
        [
            f"oifname != {own} ip saddr {tunnel.prefix} counter drop",
            f"oifname != {own} ip daddr {tunnel.prefix} counter drop",
            f"oifname {tunnels} meta nfproto ipv6 counter drop",
        ],
    )


def _input(state: DesiredState, host: HostState, uplinks: Sequence[str]) -> Iterator[str]:
    assert host.firewall is not None
    allowed = host.firewall
    private = {bridge.name for bridge in state.bridges if bridge.kind is BridgeKind.MESH}
    private |= {network.mesh.bridge for network in state.networks if network.mesh}
    private |= {network.bridge for network in state.networks if network.host is None}
    trusted = [name for name in allowed.trusted if name not in private]
    yield 'iifname "lo" accept'
    # The host takes no part in these, so not even a reply comes from there.
    if private:
        yield f"iifname {_names(sorted(private))} counter drop"
    yield _INVALID
    yield _REPLIES
    yield _ECHO
    yield "icmpv6 type { echo-request, packet-too-big, " + _ERRORS + " } accept"
    yield f"icmpv6 type {{ {_NEIGHBOURS} }} ip6 hoplimit 255 accept"
    yield "icmpv6 type { mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } accept"
    if host.security is None:
        world = _uplink(state, uplinks)
    elif host.uplinks:
        world = f"iifname {_names(host.uplinks)}"
    else:  # a role's rules are what its state file says, and not what routes there are just now
        tunnels = allowed.tunnel.interfaces if allowed.tunnel is not None else ()
        world = f"iifname != {_names(sorted({'lo', *_bridges(state), *tunnels}))}"
    yield f"{world} meta nfproto ipv4 udp sport 67 udp dport 68 accept"
    yield f"{world} ip6 saddr fe80::/10 udp sport 547 udp dport 546 accept"
    if trusted:
        yield f"iifname {_names(trusted)} accept"
    if allowed.local_tcp:
        yield f"tcp dport {_ports(allowed.local_tcp)} counter drop"
    if allowed.tunnel is not None and allowed.inner:
        ours = f"iifname {_names(allowed.tunnel.interfaces)} ip saddr {allowed.tunnel.prefix}"
        yield f"{ours} ip daddr {allowed.tunnel.address} tcp dport {_ports(allowed.inner)} accept"
    if allowed.inner:
        yield f"tcp dport {_ports(allowed.inner)} counter drop"
    if allowed.tcp:
        yield f"tcp dport {_ports(allowed.tcp)} accept"
    if allowed.udp:
        yield f"udp dport {_ports(allowed.udp)} accept"
    if allowed.log:
        yield _LOG
    yield "counter drop"


# --------------------------------------------------------------------------------------------------------- a leg


def leg_table(leg: Leg, network: Network, *, tunnel_addresses: Sequence[Ipv4] = ()) -> str:
    """`table inet bulkhead` in a leg's namespace, between `eth0` and the tunnel. IPv4 alone.

    An egress leg lets the network out and answers back in, under the tunnel's address. A mesh leg joins the network
    with its peers, and passes on VPN clients that came in at a peer. The leg itself speaks through its tunnel only.
    """
    tunnel = _name(leg.tunnel.interface)
    chains = [
        _chain("early", "filter", "prerouting", "raw", [_NO_IPV6]),
        _chain("input", "filter", "input", "filter", _leg_input(network, tunnel), policy="drop"),
        _chain("output", "filter", "output", "filter", _leg_output(tunnel), policy="drop"),
        _chain("forward", "filter", "forward", "filter", _leg_forward(leg, network, tunnel), policy="drop"),
    ]
    if leg.role is Role.EGRESS:
        only = tunnel_addresses[0] if len(tunnel_addresses) == 1 else None
        target = "masquerade" if only is None else f"snat ip to {only}"
        rule = f"meta nfproto ipv4 oifname {tunnel} {target}"
        chains.append(_chain("postrouting", "nat", "postrouting", "srcnat", [rule]))
    return _table("inet", chains)


def _leg_input(network: Network, tunnel: str) -> Iterator[str]:
    yield 'iifname "lo" accept'
    yield _INVALID
    yield _REPLIES
    yield f'iifname "{PORT}" ip saddr {_prefixes(network.prefixes)} {_ECHO}'
    yield f"iifname {tunnel} icmp type {{ {_ERRORS} }} accept"
    yield "counter drop"


def _leg_output(tunnel: str) -> Iterator[str]:
    yield _NO_IPV6
    yield 'oifname "lo" accept'
    yield f"icmp type {{ {_ERRORS} }} accept"
    yield f"oifname {tunnel} accept"
    yield _REPLIES
    yield "counter drop"


def _leg_forward(leg: Leg, network: Network, tunnel: str) -> Iterator[str]:
    inside, outside = f'iifname "{PORT}" oifname {tunnel}', f'iifname {tunnel} oifname "{PORT}"'
    yield _INVALID
    yield f"{inside} {_CLAMP}"
    yield f"{outside} {_CLAMP}"
    if leg.role is Role.EGRESS:
        # What has lost its way home must not be told to the tunnel's other end.
        yield f"oifname {tunnel} ip daddr {_prefixes(network.prefixes)} counter drop"
        yield f"{inside} ip saddr {_prefixes(network.prefixes)} counter accept"
    else:
        yield from _mesh_forward(network, inside, outside)
    yield f"{inside} {_REPLIES}"
    yield f"{outside} {_REPLIES}"
    yield "counter drop"


def _mesh_forward(network: Network, inside: str, outside: str) -> Iterator[str]:
    peers = network.mesh.prefixes if network.mesh else ()
    if peers:
        yield f"{inside} ip saddr {_prefixes(network.prefixes)} ip daddr {_prefixes(peers)} counter accept"
        yield f"{outside} ip saddr {_prefixes(peers)} counter accept"
    if network.vpn is not None:
        gateway, port = network.member(network.vpn.member_id).address, network.vpn.port
        yield f"{outside} ip daddr {gateway} udp dport {port} counter accept"
        yield f"{inside} ip saddr {gateway} udp sport {port} counter accept"


# ------------------------------------------------------------------------------------------- gateway and ports


def gateway_table(vpn: VpnServer) -> str:
    """`table inet bulkhead` in the VPN server's container: clients go out by `eth0` under their own addresses, and only
    answers come back. No client reaches another."""
    tunnel, pool = _name(vpn.tunnel.interface), str(vpn.pool)
    inside, outside = f'iifname {tunnel} oifname "{PORT}"', f'iifname "{PORT}" oifname {tunnel}'
    forward = [
        _INVALID,
        f"{inside} {_CLAMP}",
        f"{outside} {_CLAMP}",
        f"{inside} ip saddr {pool} counter accept",
        f"{outside} ip daddr {pool} {_REPLIES}",
        "counter drop",
    ]
    # A client has an address of the pool; another of the network's would pass for a member's.
    spoofed = [f'iifname != "lo" {_NO_IPV6}', f"iifname {tunnel} ip saddr != {pool} counter drop"]
    return _table(
        "inet",
        [
            _chain("early", "filter", "prerouting", "raw", spoofed),
            _chain("forward", "filter", "forward", "filter", forward, policy="drop"),
            _chain("output", "filter", "output", "filter", [f'oifname != "lo" {_NO_IPV6}']),
        ],
    )


def ingress_table(ports: Iterable[str]) -> str:
    """`table netdev bulkhead` of the host: what arrives at a bridge's port is Open vSwitch's alone.

    For the userspace datapath only. It reads a port beside the kernel, before this hook, and the kernel would take what
    is addressed to the port's own MAC to any of the host's addresses. The kernel datapath comes *after* this hook. Every
    port has to exist, and bridges' own interfaces must not be among them: there the host takes part.
    """
    return _table("netdev", [_ingress(name) for name in sorted(set(ports))])


def _ingress(port: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9-]", lambda odd: f"_{ord(odd[0]):02x}", port)
    hook = f"type filter hook ingress device {_device(port)} priority -500; policy drop;"
    return f"\tchain port-{safe} {{\n\t\t{hook}\n\t\tcounter\n\t}}\n"


# ------------------------------------------------------------------------------------------------------------ text


def _table(family: str, chains: Iterable[str]) -> str:
    return f"table {family} bulkhead {{\n" + "\n".join(chains) + "}\n"


def _chain(name: str, kind: str, hook: str, priority: str, rules: Iterable[str], *, policy: str = "accept") -> str:
    head = f"type {kind} hook {hook} priority {priority}; policy {policy};"
    return f"\tchain {name} {{\n\t\t{head}\n" + "".join(f"\t\t{rule}\n" for rule in rules) + "\t}\n"


def _name(interface: str) -> str:
    # nft takes a star at the end for "anything", unless it is told not to.
    return f'"{interface[:-1]}\\*"' if interface.endswith("*") else _device(interface)


def _device(interface: str) -> str:
    if not interface or re.search(r'["\\\s/]', interface):
        raise ValueError(f"{interface!r} is not the name of an interface")
    return f'"{interface}"'


def _names(interfaces: Iterable[str]) -> str:
    return _several(_name(name) for name in dict.fromkeys(interfaces))


def _prefixes(prefixes: Iterable[Prefix]) -> str:
    """As a set; one that lies in another is left out, since nft takes no overlaps."""
    return _several(map(str, collapse_addresses(IPv4Network(str(prefix)) for prefix in prefixes)))


def _ports(ports: Iterable[int]) -> str:
    return _several(str(port) for port in sorted(set(ports)))


def _several(values: Iterable[str]) -> str:
    found = list(values)
    return found[0] if len(found) == 1 else "{ " + ", ".join(found) + " }"
