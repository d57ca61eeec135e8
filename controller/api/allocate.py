"""Ids and addresses for new containers: the next free id of the network's range, the first free address of its subnet.

Pure: a state file and a snapshot of the store in, a record or a problem out. What is free by these rules is then tried by
merging it into the state, as agent and controller will.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from controller.api.models import CreateContainer
from controller.api.problem import ApiProblem, Fault, fault_of
from controller.hostmodel import HostState
from controller.model import DesiredState, Ipv4, Network, Prefix
from controller.records import ContainerRecord, Records, ServiceRecord, key
from controller.statefile import Source

TRIES = 64
"""So many ids are tried where their ports or MAC addresses are taken."""
_FIELDS = {
    "id": "id",
    "properties.name": "name",
    "properties.ipv4_address": "address",
    "network": "network",
    "driver": "driver",
    "command": "command",
    "template": "template",
    "order": "order",
    "properties.services": "services",
}
_TAKEN = {"duplicate-port", "duplicate-mac"}


@dataclass(frozen=True, slots=True)
class Declared:
    """What a state file has taken: who has which id, name and address, and which addresses are nobody's to have."""

    source: Source
    node: str
    state: DesiredState
    host: HostState
    file: str

    @classmethod
    def of(cls, source: Source, node: str) -> Declared:
        """Of a state file."""
        loaded = source.with_records(Records(), node)
        return cls(source, node, loaded.state, loaded.host, source.name)

    def network(self, name: str) -> Network:
        """The network of that name. Raises `ApiProblem`."""
        for network in self.state.networks:
            if network.name == name:
                return network
        there = ", ".join(network.name for network in self.state.networks) or "none"
        fault = Fault("network", name, f"one of: {there}", "Name one of these, or declare the network.")
        raise ApiProblem("unknown-network", f"There is no network {name}; there are: {there}.", [fault])

    def owner(self, *, id: str = "", name: str = "", address: str = "") -> str | None:
        """The declared container that has one of these, in words."""
        for network in self.state.networks:
            for member in network.members:
                if id == member.id or name.lower() == member.name.lower() or address == str(member.address):
                    return f"container {member.id} ({member.name}), declared in {self.file}"
        return None

    def reserved(self, network: Network) -> Iterator[Prefix]:
        """Prefixes within the subnet that no container gets an address of, besides those of containers."""
        subnet = network.subnet
        last = Ipv4(subnet.address | (~subnet.mask & 0xFFFFFFFF))
        for address in (subnet.address, last, network.gateway, network.host):
            if address is not None:
                yield Prefix(address, 32)
        for leg in self.host.legs:
            if leg.network != network.name:
                continue
            for peer in leg.tunnel.peers:
                yield from (prefix for prefix in peer.allowed if prefix.length > subnet.length)
            yield from (Prefix(address, 32) for address, _ in leg.tunnel.addresses)
        for prefix in network.prefixes:
            if prefix != subnet and prefix.length > subnet.length:
                yield prefix
        if network.vpn is not None:
            yield network.vpn.pool


def container(declared: Declared, records: Records, wanted: CreateContainer, who: str, now: float) -> ContainerRecord:
    """The record of a new container. Raises `ApiProblem`: a clash names the other, an exhausted range says what to do."""
    network = declared.network(wanted.network)
    node = _node(declared, records, wanted)
    _unique(declared, records, wanted)
    _allowed(declared, network, wanted.address)
    record = ContainerRecord(
        id="",
        name=wanted.name,
        network=network.name,
        node=node,
        address=wanted.address or _free_address(declared, records, network),
        services=tuple(ServiceRecord(s.name, s.protocol, s.port, s.exposed, s.check) for s in wanted.services),
        driver=wanted.driver,
        command=tuple(wanted.command),
        template=wanted.template,
        order=wanted.order,
        created_by=who,
        created_at=now,
    )
    if wanted.id is not None:
        return _tried(declared, replace(record, id=wanted.id))
    tries = 0
    for number in _free_ids(declared, records, network):
        try:
            return _tried(declared, replace(record, id=number))
        except _PortTaken as taken:
            tries += 1
            if tries == TRIES:
                raise taken from None
    low, high = network.ids
    detail = (
        f"Every id of {network.name} from {low} to {high} is taken. Delete a container of it, or widen "
        f"networks.{network.name}.ids in {declared.file}."
    )
    raise ApiProblem("ids-exhausted", detail, [Fault("network", network.name, "a network with a free id", detail)])


class _PortTaken(ApiProblem):
    """The id will not do, another may."""


def _node(declared: Declared, records: Records, wanted: CreateContainer) -> str:
    node = wanted.node or declared.node
    known = {declared.node, *(one.name for one in records.nodes)}
    if node in known:
        return node
    there = ", ".join(sorted(known))
    fault = Fault("node", node, f"one of: {there}", "Name a node that runs, or leave it out for this one.")
    raise ApiProblem("unknown-node", f"No node {node} has ever reported; there are: {there}.", [fault])


def _unique(declared: Declared, records: Records, wanted: CreateContainer) -> None:
    """That name, id and address are nobody's."""
    for field, value in (("name", wanted.name), ("id", wanted.id), ("address", wanted.address)):
        if value is None:
            continue
        other = declared.owner(**{field: value})
        for record in records.containers:
            if str(getattr(record, field)).lower() == value.lower():
                other = f"container {record.id} ({record.name}) on {record.node}, made by {record.created_by}"
        if other is not None:
            fix = "Choose another, or leave it out to have one chosen." if field != "name" else "Choose another."
            fault = Fault(field, value, f"{'an' if field[0] in 'ai' else 'a'} {field} of its own", fix)
            raise ApiProblem(f"duplicate-{field}", f"{other} has the {field} {value} already. {fix}", [fault])


def _allowed(declared: Declared, network: Network, address: str | None) -> None:
    """That an address that was asked for is not set aside."""
    if address is None:
        return
    inside = next((prefix for prefix in declared.reserved(network) if Ipv4.parse(address) in prefix), None)
    if inside is not None:
        fix = "Choose another, or leave it out to have one chosen."
        fault = Fault("address", address, f"an address of {network.subnet} that is not set aside", fix)
        raise ApiProblem("invalid", f"{address} is set aside in {network.name} ({inside}). {fix}", [fault])


def _free_address(declared: Declared, records: Records, network: Network) -> str:
    taken = {int(member.address) for member in network.members}
    for record in records.containers:
        taken.add(int(Ipv4.parse(record.address)))
    reserved = sorted(declared.reserved(network), key=lambda prefix: prefix.address)
    subnet = network.subnet
    address, last = int(subnet.address), int(subnet.address) | (~subnet.mask & 0xFFFFFFFF)
    while address <= last:
        inside = next((prefix for prefix in reserved if Ipv4(address) in prefix), None)
        if inside is not None:
            address = int(inside.address) + (1 << (32 - inside.length))
        elif address in taken:
            address += 1
        else:
            return str(Ipv4(address))
    detail = (
        f"Every address of {subnet} of {network.name} is taken or reserved. Delete a container of it, or declare a "
        f"larger subnet in {declared.file}."
    )
    fault = Fault("network", network.name, "a network with a free address", detail)
    raise ApiProblem("addresses-exhausted", detail, [fault])


def _free_ids(declared: Declared, records: Records, network: Network) -> Iterator[str]:
    low, high = network.ids
    taken = {member.id for one in declared.state.networks for member in one.members}
    taken |= {record.id for record in records.containers}
    return (str(number) for number in range(low, high + 1) if str(number) not in taken)


def _tried(declared: Declared, record: ContainerRecord) -> ContainerRecord:
    """The record, if the state takes it. Raises `ApiProblem`, or `_PortTaken`."""
    loaded = declared.source.with_records(Records(containers=(record,)), record.node)
    if not loaded.refused:
        return record
    problem = loaded.refused[0][1]
    path = problem.path.removeprefix(f"{key(record)}.")
    field = next((mine for theirs, mine in _FIELDS.items() if path.startswith(theirs)), "")
    field += path.removeprefix("properties.services") if path.startswith("properties.services") else ""
    fault = fault_of(problem, field or path)
    kind = _PortTaken if problem.code in _TAKEN else ApiProblem
    raise kind("invalid", f"{fault.found}: expected {fault.expected}. {fault.fix}", [fault])
