"""Reads nftables' ruleset, and iptables-legacy's in the same terms. Imports facts."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from controller.verify.host.facts import NftChain, NftRule

_Key = tuple[str, str, str]


def read_nft(ruleset: str, text: str) -> tuple[NftChain, ...]:
    """The chains of `nft -j list ruleset`; `text` is what `nft list ruleset` prints for people.

    Raises any of `ValueError`, `KeyError`, `TypeError`, `AttributeError` and `IndexError` for what is not nft's.
    """
    devices, dormant = _told_in_text(text)
    items = json.loads(ruleset)["nftables"]
    sets = {f"{s['family']} {s['table']} @{s['name']}": s for item in items for s in _of(item, "set", "map")}
    chains: dict[_Key, dict[str, Any]] = {}
    rules: dict[_Key, list[NftRule]] = {}
    for item in items:
        for chain in _of(item, "chain"):
            chains[chain["family"], chain["table"], chain["name"]] = chain
        for rule in _of(item, "rule"):
            prefix = f"{rule['family']} {rule['table']} "
            parts = tuple(_written_out(_expression(part), prefix, sets) for part in rule["expr"])
            key = (rule["family"], rule["table"], rule["chain"])
            rules.setdefault(key, []).append(NftRule(parts, int(rule.get("handle", 0))))
    out = []
    for key, chain in chains.items():
        family, table, name = map(str, key)
        told = chain.get("dev", ())
        on = (told,) if isinstance(told, str) else tuple(map(str, told)) or devices.get(key, ())
        hook = "" if (family, table) in dormant else str(chain.get("hook", ""))
        out.append(
            NftChain(family, table, name, hook, str(chain.get("policy", "accept")), on, tuple(rules.get(key, ())))
        )
    return tuple(out)


def _of(item: Mapping[str, Any], *kinds: str) -> Iterator[dict[str, Any]]:
    yield from (item[kind] for kind in kinds if kind in item)


def _expression(part: Any) -> Mapping[str, Any]:
    """One expression of a rule. nft prints some, like `counter`, as a bare word."""
    if isinstance(part, str):
        return {part: None}
    if not isinstance(part, dict) or not part:
        raise ValueError("not an expression")
    return part


def _written_out(part: Mapping[str, Any], prefix: str, sets: Mapping[str, Any]) -> Mapping[str, Any]:
    """A match or verdict map with the elements of the set it names; as it is if they come and go by themselves."""
    for kind, place in (("match", "right"), ("vmap", "data")):
        asked = part.get(kind)
        if not isinstance(asked, dict):
            continue
        found = sets.get(f"{prefix}{asked.get(place)}")
        if found is not None and set(found.get("flags", ())) <= {"interval", "constant"}:
            return {kind: {**asked, place: {"set": list(found.get("elem", ()))}}}
    return part


def _told_in_text(text: str) -> tuple[dict[_Key, tuple[str, ...]], set[tuple[str, str]]]:
    """The devices of ingress and egress chains, and the tables that are asleep."""
    devices: dict[_Key, tuple[str, ...]] = {}
    dormant = set()
    family = table = chain = ""
    for line in map(str.strip, text.splitlines()):
        if found := re.match(r"table (\S+) (\S+) \{", line):
            family, table = found.groups()
        elif found := re.match(r"chain (\S+) \{", line):
            chain = found[1]
        elif re.match(r"flags .*\bdormant\b", line):
            dormant.add((family, table))
        elif found := re.search(r"hook (?:in|e)gress devices? (?:= )?(\{[^}]*\}|\S+)", line):
            devices[family, table, chain] = tuple(name.strip(' "') for name in found[1].strip("{}").split(","))
    return devices, dormant


# ---------------------------------------------------------------------------------------------------------- the old one

_ASKS = {
    "-i": {"meta": {"key": "iifname"}},
    "-o": {"meta": {"key": "oifname"}},
    "-d": {"payload": {"protocol": "ip", "field": "daddr"}},
}
_UNKNOWN: Mapping[str, Any] = {"match": {}}
_VERDICTS = {"DROP": "drop", "REJECT": "reject", "ACCEPT": "accept", "RETURN": "return", "LOG": "log"}


def read_legacy(saved: str, family: str) -> tuple[NftChain, ...]:
    """The chains of `iptables-legacy-save -t filter`. What a rule asks for beside interfaces and target may or may not
    hold; a target that is not known may do anything. Raises `ValueError` for what is not iptables'."""
    policies: dict[str, str] = {}
    rules: dict[str, list[NftRule]] = {}
    for line in saved.splitlines():
        if line.startswith(":"):
            name, policy = line[1:].split()[:2]
            policies[name] = policy
        elif line.startswith("-A "):
            _, name, *words = shlex.split(line)
            rules.setdefault(name, []).append(NftRule(tuple(_legacy_parts(words, policies))))
    return tuple(
        NftChain(
            family,
            "iptables-legacy",
            name,
            "forward" if name == "FORWARD" else "",
            "drop" if policy == "DROP" else "accept",
            (),
            tuple(rules.get(name, ())),
        )
        for name, policy in policies.items()
    )


def _legacy_parts(words: list[str], chains: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    op = "=="
    for number, word in enumerate(words):
        if word == "!":
            op = "!="
            continue
        value = words[number + 1] if number + 1 < len(words) else ""
        if word in _ASKS:
            name = f"{value[:-1]}*" if value.endswith("+") else value
            yield {"match": {"op": op, "left": _ASKS[word], "right": name}}
        elif word in ("-j", "-g"):
            if value in chains:
                yield {"jump" if word == "-j" else "goto": {"target": value}}
            else:
                yield {_VERDICTS.get(value, "unknown"): None}
            return
        elif word.startswith("-"):
            yield _UNKNOWN
        op = "=="
