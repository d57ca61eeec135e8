"""What there is: the state file, the records on top of it, and how far the nodes are, as answers.

Answers are kept encoded until something changes, so that reading costs next to nothing. Imports models,
allocate, and what the state is made of.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from controller.api import models
from controller.api.allocate import Declared
from controller.api.models import rfc3339
from controller.api.problem import ApiProblem
from controller.desired import Desired
from controller.model import Ipv4, Mac, Member, Network
from controller.problems import InvalidInput
from controller.realized import Realized, realized
from controller.records import ContainerRecord, GrantRecord, GrantState, Records, key
from controller.statefile import Loaded

LOG = logging.getLogger("bulkhead.api")
CACHED = 256
"""So many different answers are kept."""


class View:
    """Everything that is read. Belongs to the event loop. Raises `InvalidInput` where the state file is damaged at first."""

    def __init__(self, path: Path, node: str, records: Records | None = None) -> None:
        self.node = node
        self.path = path
        self._desired = Desired(path, node, records)
        self._declared = Declared.of(self._desired.source, node)
        self.records = self._desired.records
        self.problem: str | None = None
        self.version = 0
        self._boot = secrets.token_hex(4)
        self._cache: dict[str, tuple[bytes, str]] = {}

    @property
    def declared(self) -> Declared:
        """The state file by itself."""
        return self._declared

    @property
    def loaded(self) -> Loaded:
        """State file and records together, for this node."""
        if self._desired.records.revision != self.records.revision:
            self._desired.look(self.records)
        return self._desired.loaded

    def follow(self, records: Records) -> None:
        """The store has changed, or how far a node is."""
        self.records = records
        self._changed()

    def look(self, *, again: bool = False) -> bool:
        """Read the state file if it has changed; a damaged one leaves everything as it was. Answers whether it has."""
        try:
            changed = self._desired.look(again=again)
        except InvalidInput as exc:
            self.problem = str(exc)
            LOG.warning("the state file is not good; going on with the last one: %s", exc)
            return False
        if changed:
            self.problem = None
            self._declared = Declared.of(self._desired.source, self.node)
            self._changed()
        return changed

    def _changed(self) -> None:
        self.version += 1
        self._cache.clear()

    def cached(self, name: str, make: Callable[[], BaseModel]) -> tuple[bytes, str]:
        """An answer, encoded, and its ETag. Raises what `make` raises."""
        found = self._cache.get(name)
        if found is None:
            found = encoded(make()), f'"{self._boot}-{self.version}"'
            if len(self._cache) < CACHED:
                self._cache[name] = found
        return found

    # ------------------------------------------------------------------------------------------------------ containers

    def containers(self, network: str | None = None, node: str | None = None) -> models.Containers:
        """Every container, or those of a network or a node."""
        found = [
            *(self._declared_one(net, member) for net in self._declared.state.networks for member in net.members),
            *(self._stored_one(record) for record in self.records.containers),
        ]
        wanted = [c for c in found if network in (None, c.network) and node in (None, c.node)]
        wanted.sort(key=lambda c: (not c.id.isdigit(), len(c.id), c.id))
        return models.Containers(containers=wanted)

    def container(self, ref: str) -> models.Container:
        """A container by id or name. Raises `ApiProblem`."""
        for record in self.records.containers:
            if ref == record.id:
                return self._stored_one(record)
        for network, member in self._members():
            if ref == member.id:
                return self._declared_one(network, member)
        for record in self.records.containers:
            if ref.lower() == record.name.lower():
                return self._stored_one(record)
        for network, member in self._members():
            if ref.lower() == member.name.lower():
                return self._declared_one(network, member)
        raise ApiProblem("not-found", f"There is no container {ref!r}. See which there are: GET /api/containers.")

    def container_of(self, record: ContainerRecord) -> models.Container:
        """A stored container as it goes out."""
        return self._stored_one(record)

    def container_by_key(self, name: str) -> models.Container:
        """A stored container by its key. Raises `ApiProblem`."""
        for record in self.records.containers:
            if key(record) == name:
                return self._stored_one(record)
        raise ApiProblem("conflict", f"{name} was deleted by somebody else meanwhile. See GET /api/containers.")

    def _members(self) -> list[tuple[Network, Member]]:
        return [(network, member) for network in self._declared.state.networks for member in network.members]

    def _declared_one(self, network: Network, member: Member) -> models.Container:
        host = next((one for one in self._declared.host.containers if one.id == member.id), None)
        running = host.running if host is not None else True
        found = realized(self.records.node(self.node), 0, (f"container/{member.id}", f"network/{network.name}"))
        checks = {one.service: one.check for one in self._declared.host.checks if one.container_id == member.id}
        return models.Container(
            id=member.id,
            name=member.name,
            network=network.name,
            node=self.node,
            address=str(member.address),
            mac=str(member.mac),
            port=member.port,
            origin="declared",
            running=running,
            state=_state(found, running),
            why=found.why,
            services=[
                self._service(self.node, member.id, s.name, s.protocol, s.port, s.exposed, checks.get(s.name, ""))
                for s in member.services
            ],
            driver=str(host.driver) if host is not None else "netns",
            created_by="",
            created_at=None,
            revision=0,
        )

    def _stored_one(self, record: ContainerRecord) -> models.Container:
        keys = (key(record), f"network/{record.network}")
        found = realized(self.records.node(record.node), record.revision, keys)
        return models.Container(
            id=record.id,
            name=record.name,
            network=record.network,
            node=record.node,
            address=record.address,
            mac=str(Mac.derive(record.network, "container", record.id)),
            port=f"veth{record.id}",
            origin="stored",
            running=record.running,
            state=_state(found, record.running),
            why=found.why,
            services=[
                self._service(record.node, record.id, s.name, s.protocol, s.port, s.exposed, s.check)
                for s in record.services
            ],
            driver=record.driver,
            created_by=record.created_by,
            created_at=rfc3339(record.created_at),
            revision=record.revision,
        )

    def _service(
        self, node: str, container: str, name: str, protocol: models.Protocol, port: int, exposed: bool, check: str
    ) -> models.ContainerService:
        health = self.records.node(node).health.get(f"{container}/{name}", "unknown")
        return models.ContainerService(
            name=name, protocol=protocol, port=port, exposed=exposed, check=check, health=health
        )

    # -------------------------------------------------------------------------------------------------------- services

    def services(self, network: str | None = None) -> models.Services:
        """Every service, or those of a network."""
        domains = {zone.network: zone.domain for zone in self._declared.host.zones}
        return models.Services(
            services=[
                models.Service(
                    name=service.name,
                    protocol=service.protocol,
                    port=service.port,
                    network=one.network,
                    container=one.name,
                    container_id=one.id,
                    address=one.address,
                    fqdn=f"{one.name}.{domains[one.network]}".lower() if one.network in domains else None,
                    exposed=service.exposed,
                    origin=one.origin,
                    health=service.health,
                )
                for one in self.containers(network).containers
                for service in one.services
            ]
        )

    # -------------------------------------------------------------------------------------------------------- networks

    def networks(self) -> models.Networks:
        """Every network."""
        return models.Networks(networks=[self._network(network) for network in self._declared.state.networks])

    def network(self, name: str) -> models.Network:
        """A network by its name. Raises `ApiProblem`."""
        for network in self._declared.state.networks:
            if network.name == name:
                return self._network(network)
        there = ", ".join(network.name for network in self._declared.state.networks)
        raise ApiProblem("not-found", f"There is no network {name!r}; there are: {there}.")

    def _network(self, network: Network) -> models.Network:
        zone = next((zone for zone in self._declared.host.zones if zone.network == network.name), None)
        stored = [record for record in self.records.containers if record.network == network.name]
        low, high = network.ids
        ids = {*(one.id for one in network.members), *(one.id for one in stored)}
        taken = {int(member.address) for member in network.members}
        taken |= {int(Ipv4.parse(record.address)) for record in stored}
        for prefix in self._declared.reserved(network):
            start = max(int(prefix.address), int(network.subnet.address))
            size = min(1 << (32 - prefix.length), 1 << (32 - network.subnet.length))
            taken |= {address for address in range(start, start + min(size, 65_536)) if Ipv4(address) in network.subnet}
        return models.Network(
            name=network.name,
            bridge=network.bridge,
            subnet=str(network.subnet),
            gateway=str(network.gateway),
            host=str(network.host) if network.host is not None else None,
            ids=f"{low}-{high}",
            egress=network.egress.port if network.egress is not None else None,
            mesh=network.mesh.bridge if network.mesh is not None else None,
            domain=zone.domain if zone is not None else None,
            resolver=str(zone.address) if zone is not None else None,
            containers=len(network.members) + len(stored),
            free_ids=sum(str(number) not in ids for number in range(low, min(high, low + 65_536) + 1)),
            free_addresses=max(0, (1 << (32 - network.subnet.length)) - len(taken)),
        )

    # ---------------------------------------------------------------------------------------------------------- grants

    def grant(self, record: GrantRecord, now: float | None = None) -> models.Grant:
        """A grant as it goes out."""
        now = time.time() if now is None else now
        state = record.state
        if state is GrantState.APPROVED and not record.open_at(now):
            state = GrantState.EXPIRED
        found = realized(self.records.node(record.node), record.revision, (key(record),))
        idle = state in (GrantState.REQUESTED, GrantState.DENIED)
        return models.Grant(
            id=record.id,
            source=record.source,
            target=record.target,
            protocol=record.protocol,
            port=record.port,
            reason=record.reason,
            requested_by=record.requested_by,
            requested_at=rfc3339(record.requested_at),
            duration_s=record.duration_s,
            state=state,
            decided_by=record.decided_by,
            decided_at=rfc3339(record.decided_at) if record.decided_at else None,
            expires_at=rfc3339(record.expires_at) if record.expires_at else None,
            node=record.node,
            revision=record.revision,
            realized=idle or found.done,
            why="" if idle else found.why,
        )


def _state(found: Realized, running: bool) -> Literal["ready", "pending", "failed", "stopped"]:
    if found.done:
        return "ready" if running else "stopped"
    return "failed" if found.refused else "pending"


def encoded(value: BaseModel | Mapping[str, Any]) -> bytes:
    """A value as JSON, as it is sent."""
    if isinstance(value, BaseModel):
        return value.model_dump_json(by_alias=True).encode()
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def plain(value: BaseModel) -> dict[str, Any]:
    """A value as JSON would have it, decoded."""
    found: dict[str, Any] = value.model_dump(mode="json", by_alias=True)
    return found
