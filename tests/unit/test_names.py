"""The files of a resolver: what is in them, and what can never be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.agent.names import dnsmasq_conf, dnsmasq_hosts, reverse_zones
from controller.hostmodel import Container, HostState, Zone
from controller.model import DesiredState, Ipv4, Mac, Member, Network, Prefix, Service

HOSTS_DIR = Path("/run/bulkhead/agent/names/privacy.hosts")


def member(number: int, name: str, *services: Service) -> Member:
    return Member(str(number), name, f"veth{number}", Mac(number), Ipv4.parse(f"10.0.0.{number}"), services)


def network(name: str, subnet: str, *members: Member) -> Network:
    prefix = Prefix.parse(subnet)
    return Network(name, f"{name}-br", prefix, Ipv4(prefix.address + 1), Mac(1), (100, 199), members=members)


HTTP = Service("http", "tcp", 80)
PRIVACY = network("privacy", "10.0.0.0/24", member(100, "Web", HTTP), member(101, "proxy", HTTP))
MANAGEMENT = network("management", "10.1.0.0/24", member(200, "db", Service("sql", "tcp", 5432)))
STATE = DesiredState((PRIVACY, MANAGEMENT))
ZONE = Zone("privacy", "dns-privacy", "privacy.internal", Ipv4.parse("10.0.0.53"))
OTHER = Zone("management", "dns-management", "management.internal", Ipv4.parse("10.1.0.53"))
HOST = HostState(zones=(ZONE, OTHER))


def conf(state: DesiredState = STATE, host: HostState = HOST, zone: Zone = ZONE) -> list[str]:
    return dnsmasq_conf(state, host, zone, HOSTS_DIR).splitlines()


def test_the_hosts_file() -> None:
    assert dnsmasq_hosts(STATE, HOST, ZONE).splitlines() == [
        "10.0.0.100 web.privacy.internal web",
        "10.0.0.101 proxy.privacy.internal proxy",
        "10.0.0.100 http.privacy.internal",
        "10.0.0.101 http.privacy.internal",
        "10.0.0.1 gateway.privacy.internal",
    ]


def test_a_name_is_a_container_s_first() -> None:
    taken = network("privacy", "10.0.0.0/24", member(100, "gateway", HTTP), member(101, "HTTP"))
    assert dnsmasq_hosts(DesiredState((taken,)), HOST, ZONE).splitlines() == [
        "10.0.0.100 gateway.privacy.internal gateway",
        "10.0.0.101 http.privacy.internal http",
    ]


def test_what_is_stopped_on_purpose_offers_nothing() -> None:
    host = replace(HOST, containers=(Container("100", running=False), Container("101")))
    lines = dnsmasq_hosts(STATE, host, ZONE).splitlines()
    assert "10.0.0.100 web.privacy.internal web" in lines
    assert [line for line in lines if "http" in line] == ["10.0.0.101 http.privacy.internal"]
    assert not [line for line in conf(host=host) if line.startswith("srv-host=") and "web" in line]


def test_nothing_goes_out_that_has_no_business_there() -> None:
    lines = conf()
    for domain in ("privacy.internal", "management.internal", "0.0.10.in-addr.arpa", "0.1.10.in-addr.arpa"):
        assert f"local=/{domain}/" in lines
    assert "address=/#/" in lines and not [line for line in lines if line.startswith("server=")]
    upstream = replace(ZONE, upstream=(Ipv4.parse("9.9.9.9"),))
    lines = conf(zone=upstream)
    assert "server=9.9.9.9" in lines and "address=/#/" not in lines
    forbidden = ("add-mac", "add-subnet", "add-cpe-id", "dhcp", "conf-dir", "resolv-file", "enable-dbus", "log-queries")
    assert not [line for line in lines if line.startswith(forbidden)]
    assert not [line for line in lines if "db" in line or "10.1.0.200" in line]


def test_what_is_too_long_for_dns_keeps_nothing_from_starting() -> None:
    long = network("privacy", "10.0.0.0/24", member(100, "web", Service("s" * 63, "tcp", 80)))
    lines = conf(DesiredState((long,)))
    assert not [line for line in lines if line.startswith("srv-host=")]
    domain = ".".join(["d" * 62] * 4)
    assert dnsmasq_hosts(STATE, HOST, replace(ZONE, domain=domain)).splitlines()[0] == "10.0.0.100 web"


@pytest.mark.parametrize(
    "prefix, zones",
    [
        ("10.0.0.0/8", ["10.in-addr.arpa"]),
        ("10.20.30.0/24", ["30.20.10.in-addr.arpa"]),
        ("10.0.2.0/23", ["2.0.10.in-addr.arpa", "3.0.10.in-addr.arpa"]),
        ("10.0.0.254/31", ["254.0.0.10.in-addr.arpa", "255.0.0.10.in-addr.arpa"]),
        ("10.0.0.7/32", ["7.0.0.10.in-addr.arpa"]),
    ],
)
def test_reverse_zones(prefix: str, zones: list[str]) -> None:
    assert reverse_zones(Prefix.parse(prefix)) == zones


@given(st.integers(0, (1 << 32) - 1), st.integers(1, 32))
def test_reverse_zones_cover_a_prefix_exactly(address: int, length: int) -> None:
    prefix = Prefix.parse(f"{Ipv4(address)}/{length}")
    zones = reverse_zones(prefix)
    assert len(set(zones)) == len(zones) <= 128
    covered = 0
    for zone in zones:
        octets = [int(label) for label in reversed(zone.removesuffix(".in-addr.arpa").split("."))]
        first = int.from_bytes(bytes(octets + [0] * (4 - len(octets))), "big")
        assert first in prefix
        covered += 1 << (32 - 8 * len(octets))
    assert covered == 1 << (32 - length)
