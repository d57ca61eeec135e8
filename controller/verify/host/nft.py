"""What nftables does to a packet of which only its interfaces and its target are known.

A rule is understood where it asks for interfaces, for the family or for the target; whatever else it asks for may or may
not hold. So a drop counts only if nothing before it could let the packet through, and only if nothing it asks for is
left open: doubt makes an alarm, never an "ok". `ct state established accept` is such a doubt: who sends the first packet
with a forged source makes the reply to it "established". Imports facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

from controller.verify.host.facts import IpNetwork, NftChain

_IDLE = frozenset(("counter", "log", "limit", "quota", "mangle", "notrack"))
_STEPS = 1000
"""Rules looked at for one packet; jumps nested without end end here, in doubt."""


@dataclass(frozen=True, slots=True)
class Packet:
    """Packets from one interface to another of one IP version (4 or 6), whose targets all lie in `targets`."""

    iif: str
    oif: str
    version: int
    targets: tuple[IpNetwork, ...]


def forward_dropped(chains: Iterable[NftChain], packet: Packet) -> str | None:
    """Which chain of the forward hook drops these packets whatever else they are; None if none is sure to."""
    every = tuple(chains)
    families = ("inet", "ip") if packet.version == 4 else ("inet", "ip6")
    for chain in every:
        if chain.hook == "forward" and chain.family in families and _Walk(every, packet).drops(chain):
            return chain.title
    return None


def ingress_dropped(chains: Iterable[NftChain], device: str) -> bool:
    """Whether everything that arrives at a device is dropped before the kernel sees it."""
    every = tuple(chains)
    # Nothing goes out in this hook, and the target is anybody's: only rules that ask for nothing count.
    packet = Packet(device, "", 0, ())
    return any(
        chain.hook == "ingress"
        and chain.family in ("netdev", "inet")
        and device in chain.devices
        and _Walk(every, packet).drops(chain)
        for chain in every
    )


class _Walk:
    """One packet's way through chains."""

    def __init__(self, chains: tuple[NftChain, ...], packet: Packet) -> None:
        self.chains = {(chain.family, chain.table, chain.name): chain for chain in chains}
        self.packet = packet
        self.steps = 0

    def drops(self, chain: NftChain) -> bool:
        """Whether a base chain drops the packet for sure."""
        end = self._end(chain)
        return end == "drop" or (end == "on" and chain.policy == "drop")

    def _end(self, chain: NftChain) -> str:
        """How a chain ends. `drop`: dropped for sure; `on`: no rule lets it through; `doubt`: maybe one does."""
        left = False  # whether the packet may be out of this chain already, on to what comes after it
        for rule in chain.rules:
            self.steps += 1
            if self.steps > _STEPS:
                return "doubt"
            holds, verdict = self._rule(rule)
            if holds is False or verdict is None:
                continue
            name, target = verdict
            end = {"drop": "drop", "reject": "drop", "return": "on"}.get(name, "doubt")
            if name in ("jump", "goto"):
                called = self.chains.get((chain.family, chain.table, target))
                end = "doubt" if called is None else self._end(called)
                if end == "on" and name == "jump":
                    continue
            if end == "doubt":
                return "doubt"
            if holds:
                return "on" if left else end
            left = left or end == "on"
        return "on"

    def _rule(self, rule: tuple[Mapping[str, Any], ...]) -> tuple[bool | None, tuple[str, str] | None]:
        """Whether the rule holds for the packets (None: for some, perhaps), and its verdict."""
        holds: bool | None = True
        for part in rule:
            for name, value in part.items():
                if name == "match":
                    asked = self._match(value)
                    if asked is False:
                        return False, None
                    holds = None if asked is None else holds
                elif name == "continue":
                    return holds, None
                elif name in ("drop", "reject", "accept", "return"):
                    return holds, (name, "")
                elif name in ("jump", "goto"):
                    return holds, (name, str(value.get("target")) if isinstance(value, dict) else "")
                elif name in _IDLE:
                    # A limit is a condition too.
                    holds = None if name in ("limit", "quota") else holds
                else:  # vmap, and whatever else may decide: dup, fwd, xt, flow add, tproxy, …
                    return None, (name, "")
        return holds, None

    def _match(self, match: Any) -> bool | None:
        if not isinstance(match, dict):
            return None
        left, right, op = match.get("left"), match.get("right"), match.get("op")
        if not isinstance(left, dict) or op not in ("==", "!=", "in"):
            return None
        found = self._compare(left, right)
        return found if op != "!=" or found is None else not found

    def _compare(self, left: Mapping[str, Any], right: Any) -> bool | None:
        values = right.get("set") if isinstance(right, dict) and "set" in right else [right]
        if not isinstance(values, list):
            return None
        key = left["meta"].get("key") if isinstance(left.get("meta"), dict) else None
        if key in ("iifname", "iif", "oifname", "oif"):
            name = self.packet.iif if key.startswith("iif") else self.packet.oif
            if not all(isinstance(value, str) and not value.startswith("@") for value in values):
                return None
            return any(_same_name(name, value) for value in values) if name else None
        if key == "nfproto" and self.packet.version:
            return f"ipv{self.packet.version}" in values
        payload = left.get("payload")
        if isinstance(payload, dict) and payload.get("field") == "daddr" and payload.get("protocol") in ("ip", "ip6"):
            return self._targets(values)
        return None

    def _targets(self, values: list[Any]) -> bool | None:
        """Whether every target is among the values; None where that is not sure."""
        if not self.packet.targets:
            return None
        networks = []
        for value in values:
            try:
                prefix = value.get("prefix") if isinstance(value, dict) else None
                networks.append(ip_network(f"{prefix['addr']}/{prefix['len']}" if prefix else value, strict=False))
            except (ValueError, KeyError, TypeError):
                return None
        within = (
            any(t.version == n.version and t.subnet_of(n) for n in networks)  # type: ignore[arg-type]
            for t in self.packet.targets
        )
        return True if all(within) else None


def _same_name(name: str, pattern: str) -> bool:
    # nft knows one wildcard: a star at the end.
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
