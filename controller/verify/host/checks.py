"""Judges what is known of a host: does anything beside the flows lead from one network to another? Pure.

A check says `ok` only for what it has seen; what could not be seen is `unknown`, what is not on this host is `absent`.
Imports findings, switch, kernel and tunnels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from controller.model import DesiredState
from controller.verify.host import kernel, switch, tunnels
from controller.verify.host.facts import Facts, Gap, Link, OvsBridge
from controller.verify.host.findings import Check, Finding, Status, Subject

CHECKS: tuple[Check, ...] = (
    switch.bridges,
    switch.fail_mode,
    switch.in_band,
    switch.controllers,
    switch.managers,
    switch.copies,
    switch.spanning_tree,
    switch.ports,
    switch.wires,
    switch.hidden_flows,
    kernel.addresses,
    kernel.forwarding,
    kernel.routes,
    kernel.overlaps,
    kernel.second_road,
    kernel.redirects,
    kernel.ipv6,
    kernel.proxies,
    tunnels.wireguard,
)


def judge(facts: Facts, state: DesiredState | None, controllers: Iterable[str]) -> tuple[Finding, ...]:
    """Every check's findings, in the order of `CHECKS`; at least one each."""
    subject = Subject(facts, state, tuple(controllers))
    elsewhere = _elsewhere(subject)
    if elsewhere is not None:
        # What the kernel says here is about another network namespace than the bridges'.
        facts = replace(
            facts,
            links=elsewhere,
            routes=elsewhere,
            rules=elsewhere,
            redirects=elsewhere,
            sysctls=elsewhere,
            nft=elsewhere,
        )
        subject = replace(subject, facts=facts)
    return tuple(finding for check in CHECKS for finding in check(subject))


def exit_code(findings: Iterable[Finding]) -> int:
    """0: all is ok or absent; 1: something is BAD; 2: nothing is, but something could not be found out."""
    seen = {finding.status for finding in findings}
    return 1 if Status.BAD in seen else 2 if Status.UNKNOWN in seen else 0


def _elsewhere(subject: Subject) -> Gap | None:
    if isinstance(subject.facts.links, Gap):
        return None
    away = [b.name for b in subject.bridges if b.datapath_type != "dummy" and not _here(b, subject.links.get(b.name))]
    if not away:
        return None
    return Gap(
        f"the interface of {', '.join(away)} is not in this network namespace, or ovs-vswitchd does not run",
        "run this where ovs-vswitchd runs: nsenter --net=/proc/$(pidof -s ovs-vswitchd)/ns/net bulkhead verify …",
    )


def _here(bridge: OvsBridge, link: Link | None) -> bool:
    """Whether an interface is the bridge's own, not only one of its name."""
    index = next((i.index for i in bridge.interfaces if i.name == bridge.name), 0)
    return link is not None and index in (0, link.index)
