"""What nftables does to a packet of which only its interfaces and its target are known.

A rule is understood where it asks for interfaces, for the family or for the target; whatever else it asks for may or may
not hold. So a drop counts only if nothing before it could let the packet through, and only if nothing it asks for is
left open: doubt makes an alarm, never an "ok". `ct state established accept` is such a doubt: who sends the first packet
with a forged source makes the reply to it "established". Imports facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network, summarize_address_range
from typing import Any

from controller.verify.host.facts import IpNetwork, NftChain, NftRule

_IDLE = frozenset(("counter", "log", "limit", "quota", "mangle", "notrack"))
_VERDICTS = frozenset(("accept", "drop", "reject", "return", "continue", "jump", "goto"))
_STEPS = 20_000
"""Rules looked at for one packet; more than that ends in doubt."""
_DEPTH = 16
"""Chains jumped into within one another: the kernel's own limit."""

_Verdict = tuple[str, str]
_DOUBT: _Verdict = ("doubt", "")


@dataclass(frozen=True, slots=True)
class Packet:
    """Packets from one interface to another of one IP version (4 or 6); where `targets` says anything, all their targets
    lie in it. An interface that is not known is empty."""

    iif: str
    oif: str
    version: int
    targets: tuple[IpNetwork, ...]


def forward_dropped(chains: Iterable[NftChain], packet: Packet) -> str | None:
    """Which chain of the forward hook drops these packets whatever else they are; None if none is sure to."""
    every = tuple(chains)
    if any(_rewrites_target(rule) for chain in every for rule in chain.rules):
        packet = replace(packet, targets=())
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


def redirected(chains: Iterable[NftChain], devices: Iterable[str]) -> list[tuple[NftChain, NftRule]]:
    """Rules that hand packets of these devices, or packets to them, over past everything (fwd, dup)."""
    ours = frozenset(devices)
    every = tuple(chains)
    out = []
    for chain in every:
        # A chain that is jumped to may be any hooked one's of its table.
        hooked = [c for c in every if (c.family, c.table) == (chain.family, chain.table) and c.hook]
        reach = {device for c in hooked for device in c.devices}
        for rule in chain.rules if hooked else ():
            told = [value for part in rule.parts for name, value in part.items() if name in ("fwd", "dup")]
            if told and (reach & ours or any(ours & set(_words(value)) for value in told)):
                out.append((chain, rule))
    return out


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _words(inner)


def _rewrites_target(rule: NftRule) -> bool:
    for part in rule.parts:
        mangle = part.get("mangle")
        if isinstance(mangle, dict) and not (
            isinstance(mangle.get("key"), dict) and mangle["key"].keys() & {"meta", "ct"}
        ):
            return True
    return False


class _Walk:
    """One packet's way through chains."""

    def __init__(self, chains: tuple[NftChain, ...], packet: Packet) -> None:
        self.chains = {(chain.family, chain.table, chain.name): chain for chain in chains}
        self.packet = packet
        self.steps = 0

    def drops(self, chain: NftChain) -> bool:
        """Whether a base chain drops the packet for sure."""
        try:
            end = self._end(chain, 0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False  # not as nft writes it
        return end == "drop" or (end == "on" and chain.policy == "drop")

    def _end(self, chain: NftChain, depth: int) -> str:
        """How a chain ends. `drop`: dropped for sure; `on`: no rule lets it through; `doubt`: maybe one does."""
        left = False  # whether the packet may be out of this chain already, on to what comes after it
        for rule in chain.rules:
            self.steps += 1
            if self.steps > _STEPS or depth > _DEPTH:
                return "doubt"
            for holds, (name, target) in self._outcomes(rule):
                if name == "continue":
                    if holds:
                        break
                    continue
                end = {"drop": "drop", "reject": "drop", "return": "on"}.get(name, "doubt")
                if name in ("jump", "goto"):
                    called = self.chains.get((chain.family, chain.table, target))
                    end = "doubt" if called is None else self._end(called, depth + 1)
                    if end == "on" and name == "jump":
                        if holds:
                            break
                        continue
                if end == "doubt":
                    return "doubt"
                if holds:
                    return "on" if left else end
                left = left or end == "on"
        return "on"

    def _outcomes(self, rule: NftRule) -> Iterator[tuple[bool, _Verdict]]:
        """The verdicts a rule may come to, in order, and whether it comes to it for sure, should it get that far."""
        sure = True
        for part in rule.parts:
            for name, value in part.items():
                if name == "match":
                    asked = self._match(value)
                    if asked is False:
                        return
                    sure = sure and asked is True
                elif name in _VERDICTS:
                    yield sure, _verdict(name, value)
                    return
                elif name == "vmap":
                    yield from self._mapped(value, sure)
                elif name == "xt" and isinstance(value, dict) and value.get("type") == "match":
                    sure = False
                elif name in _IDLE:
                    # A limit is a condition too.
                    sure = sure and name not in ("limit", "quota")
                else:  # whatever else may decide: dup, fwd, queue, flow add, tproxy, a target of iptables, …
                    yield False, _DOUBT
                    return

    def _mapped(self, vmap: Mapping[str, Any], sure: bool) -> Iterator[tuple[bool, _Verdict]]:
        data = vmap["data"]
        if not isinstance(data, dict):  # a map that comes and goes
            yield False, _DOUBT
            return
        for key, verdict in data["set"]:
            holds = self._compare(vmap["key"], [key])
            if holds is not False:
                for name, value in verdict.items():
                    yield sure and holds is True, _verdict(name, value)

    def _match(self, match: Mapping[str, Any]) -> bool | None:
        left, right, op = match.get("left"), match.get("right"), match.get("op")
        if not isinstance(left, dict) or op not in ("==", "!=", "in"):
            return None
        values = right["set"] if isinstance(right, dict) and "set" in right else [right]
        found = self._compare(left, values)
        return found if op != "!=" or found is None else not found

    def _compare(self, left: Mapping[str, Any], values: list[Any]) -> bool | None:
        """Whether the packets have one of the values; None for some of them, perhaps."""
        payload = left.get("payload")
        if isinstance(payload, dict) and payload.get("field") == "daddr" and payload.get("protocol") in ("ip", "ip6"):
            return self._targets(values)
        found = [self._one(left, value) for value in values]
        return True if True in found else None if None in found else False

    def _one(self, left: Mapping[str, Any], value: Any) -> bool | None:
        if isinstance(value, dict) and "elem" in value:  # an element with a counter, or with a time to live
            wrapped = value["elem"]
            return self._one(left, wrapped["val"]) if not wrapped.keys() & {"timeout", "expires"} else None
        if "concat" in left:
            if not isinstance(value, dict) or "concat" not in value:
                return None
            found = [self._compare(part, [item]) for part, item in zip(left["concat"], value["concat"], strict=True)]
            return False if False in found else None if None in found else True
        meta = left.get("meta")
        key = meta.get("key") if isinstance(meta, dict) else None
        if not isinstance(value, str) or value.startswith("@") or value == "*":
            return None
        if key in ("iifname", "iif", "oifname", "oif"):
            name = self.packet.iif if key.startswith("iif") else self.packet.oif
            return _same_name(name, value) if name else None
        if key in ("nfproto", "protocol") and self.packet.version:
            return (
                value
                == {"nfproto": f"ipv{self.packet.version}", "protocol": "ip6" if self.packet.version == 6 else "ip"}[
                    key
                ]
            )
        return None

    def _targets(self, values: list[Any]) -> bool | None:
        """Whether every target is among the values; None where that is not sure."""
        networks: list[IpNetwork] = []
        for value in values:
            read = _networks(value)
            if read is None:
                return None
            networks += read
        if not self.packet.targets:
            return None
        within = (
            any(t.version == n.version and t.subnet_of(n) for n in networks)  # type: ignore[arg-type]
            for t in self.packet.targets
        )
        if all(within):
            return True
        apart = all(not t.overlaps(n) for n in networks for t in self.packet.targets if t.version == n.version)
        return False if apart else None


def _verdict(name: str, value: Any) -> _Verdict:
    return name, str(value.get("target")) if isinstance(value, dict) else ""


def _networks(value: Any) -> list[IpNetwork] | None:
    """An address, a prefix or a range as nft writes them."""
    try:
        if isinstance(value, dict) and "prefix" in value:
            return [ip_network(f"{value['prefix']['addr']}/{value['prefix']['len']}", strict=False)]
        if isinstance(value, dict) and "range" in value:
            first, last = map(ip_address, value["range"])
            return list(summarize_address_range(first, last))
        return [ip_network(value, strict=False)] if isinstance(value, str) else None
    except (ValueError, KeyError, TypeError):
        return None


def _same_name(name: str, pattern: str) -> bool:
    # nft knows one wildcard: a star at the end.
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
