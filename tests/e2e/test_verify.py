"""`bulkhead verify` on a real host: good at first, broken one thing at a time, mended by what was printed."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from controller.verify.host.checks import CHECKS

from .conftest import STATE_FILE
from .host import ROOT, GoodHost

pytestmark = pytest.mark.skipif(shutil.which("wireguard-go") is None, reason="needs wireguard-go and wireguard-tools")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[GoodHost]]:
    """The host of this file, if there is one."""
    made: list[GoodHost] = []
    yield made
    for old in made:
        old.close()


@pytest.fixture
def host(hosts: list[GoodHost], tmp_path_factory: pytest.TempPathFactory) -> GoodHost:
    """A good host: the last test's, where that left it as it found it."""
    if not hosts or hosts[-1].checks()[0] != 0:
        hosts.append(GoodHost(tmp_path_factory.mktemp("host")).start())
    return hosts[-1]


def test_a_good_host_is_good(host: GoodHost) -> None:
    code, found = host.checks()
    assert code == 0
    assert {finding["status"] for finding in found} == {"ok"}


class Break(NamedTuple):
    """What breaks the host, the checks that turn red, and what puts back what no command of ours can. `perhaps`: kernels
    since 6.16 bind an ingress chain to a new interface of the old name, and others do not."""

    script: str
    red: frozenset[str]
    restore: str = ""
    replug: tuple[str, str] = ("", "")
    perhaps: frozenset[str] = frozenset()


def breaks(red: str, script: str, restore: str = "", *, replug: tuple[str, str] = ("", ""), perhaps: str = "") -> Break:
    return Break(script, frozenset(red.split(", ")), restore, replug, frozenset(perhaps.split(", ")))


IFB = "ip link add stray0 type ifb; ip link set stray0 up; "
NO_IFB = "ip link del stray0"
V6_ON = "sysctl -qw net/ipv6/conf/vmbr0/disable_ipv6=0 net/ipv6/conf/vmbr1/disable_ipv6=0 "
REDIRECT = "u32 match u32 0 0 action mirred egress redirect dev"
FORWARD = "nft 'add table inet t; add chain inet t c { type filter hook forward priority 0; policy drop; }'; "
ALL_DROP = 'nft \'add rule inet t c iifname "vmbr0" drop; add rule inet t c iifname "vmbr1" drop\''
NO_FORWARD = "nft delete table inet t; nft delete table inet bulkhead-mend; sysctl -qw net.ipv4.ip_forward=0"
TAP = "ip tuntap add dev stray0 mode tap; ip link set stray0 up; "
ASLEEP = FORWARD.replace("add table inet t", "add table inet t { flags dormant; }")

BREAKS = {
    # Open vSwitch
    "fail mode": breaks("fail mode, hidden flows", "ovs-vsctl del-fail-mode vmbr0"),
    "in-band": breaks("in-band", "ovs-vsctl remove bridge mesh-mgmt other-config disable-in-band"),
    "in-band, with a controller elsewhere": breaks(
        "in-band, controllers, hidden flows",
        "ovs-vsctl set-controller vmbr0 tcp:192.0.2.7; ovs-vsctl remove bridge vmbr0 other-config disable-in-band",
        "ovs-vsctl del-controller vmbr0",
    ),
    "a foreign controller": breaks(
        "controllers", "ovs-vsctl set-controller vmbr1 tcp:192.0.2.7 tcp:127.0.0.1", "ovs-vsctl del-controller vmbr1"
    ),
    "a bridge that listens": breaks(
        "controllers", "ovs-vsctl set-controller vmbr1 ptcp:6634", "ovs-vsctl del-controller vmbr1"
    ),
    "a manager": breaks("managers", "ovs-vsctl set-manager tcp:192.0.2.7:6640"),
    "a manager among others": breaks(
        "managers", "ovs-vsctl set-manager ptcp:6640:127.0.0.1 ptcp:6641", "ovs-vsctl del-manager"
    ),
    "a remote": breaks("managers", "ovs-appctl -t $OVS_RUNDIR/ovsdb.ctl ovsdb-server/add-remote ptcp:6642"),
    "a mirror": breaks(
        "mirrors",
        "ovs-vsctl -- set bridge vmbr0 mirrors=@m -- --id=@p get port veth102 "
        "-- --id=@m create mirror name=m select-all=true output-port=@p",
    ),
    "NetFlow": breaks(
        "mirrors", "ovs-vsctl -- set bridge vmbr1 netflow=@n -- --id=@n create netflow 'targets=\"192.0.2.7:2055\"'"
    ),
    "STP": breaks("spanning tree", "ovs-vsctl set bridge vmbr0 stp_enable=true"),
    "RSTP": breaks("spanning tree", "ovs-vsctl set bridge mesh-mgmt rstp_enable=true"),
    "a port nobody declared": breaks("ports", "ovs-vsctl add-port vmbr0 stray0 -- set interface stray0 type=internal; "
                                     "sysctl -qw net/ipv6/conf/stray0/disable_ipv6=1"),
    "patch ports between the networks": breaks(
        "ports, far ends",
        "ovs-vsctl add-port vmbr0 p0 -- set interface p0 type=patch options:peer=p1 "
        "-- add-port vmbr1 p1 -- set interface p1 type=patch options:peer=p0",
    ),
    "a tunnel of Open vSwitch's own": breaks(
        "ports",
        "ovs-vsctl set interface veth102 type=vxlan options:remote_ip=192.0.2.7",
        replug=("vmbr0", "veth102"),
    ),
    "an internal port of a declared name": breaks(
        "ports",
        "ovs-vsctl del-port veth102; ip link del veth102; "
        "ovs-vsctl add-port vmbr0 veth102 -- set interface veth102 type=internal",
        replug=("vmbr0", "veth102"),
    ),
    "a layer-3 tunnel as a port": breaks(
        "ports",
        "ovs-vsctl del-port veth202; ip link del veth202; ip tuntap add dev veth202 mode tun; "
        "ovs-vsctl add-port vmbr1 veth202",
        replug=("vmbr1", "veth202"),
        perhaps="second road",
    ),
    "a kernel tunnel as a port": breaks(
        "ports",
        "ovs-vsctl del-port veth102; ip link del veth102; ip link add veth102 type vxlan id 7 dstport 4789 "
        "remote 192.0.2.7; ovs-vsctl add-port vmbr0 veth102",
        replug=("vmbr0", "veth102"),
        perhaps="second road",
    ),
    "a far end on the host": breaks(
        "far ends", "ip -n at-veth102 link set eth0 netns $$ name far0", replug=("vmbr0", "veth102")
    ),
    "a namespace in both networks": breaks(
        "far ends", "ip -n at-veth102 link set eth0 name eth1 netns at-veth200", replug=("vmbr0", "veth102")
    ),
    "a mesh joined to the other mesh": breaks(
        "far ends, ports", "ovs-vsctl del-port to-mgmt -- add-port mesh-privacy to-mgmt"
    ),
    "a flow with NORMAL": breaks(
        "hidden flows",
        "ovs-ofctl -O OpenFlow14 add-flow vmbr0 priority=1,actions=normal",
        "ovs-ofctl -O OpenFlow14 del-flows vmbr0",
    ),
    # addresses and routes
    "an address on the other bridge": breaks("addresses", "ip address add 10.0.0.1/24 dev vmbr0"),
    "an address on a port": breaks("addresses", "ip address add 192.0.2.1/24 dev veth102"),
    "a link-local address": breaks("addresses", "ip address add 169.254.7.7/16 dev mesh-mgmt"),
    "the host's address, too wide": breaks(
        "addresses", "ip address del 10.1.0.1/24 dev vmbr1; ip address add 10.1.0.1/8 dev vmbr1"
    ),
    "a route into the other network": breaks("routes", "ip route add 10.0.0.0/24 via 10.1.0.9"),
    "a default route of another table": breaks("routes", "ip route add default via 10.1.0.9 table 77"),
    "a route with two hops": breaks(
        "routes", "ip route add 10.0.0.0/25 nexthop via 10.1.0.9 nexthop via 10.1.0.8"
    ),
    "a rule": breaks("routes", "ip rule add iif vmbr0 to 10.1.0.0/24 lookup main"),
    "an address of a network elsewhere": breaks("overlaps", IFB + "ip address add 10.0.0.9/32 dev stray0", NO_IFB),
    "a route of a network elsewhere": breaks("overlaps", IFB + "ip route add 10.8.0.0/16 dev stray0", NO_IFB),
    "all addresses of a network are the host's": breaks("overlaps", "ip route add local 10.0.0.0/24 dev lo table 78"),
    # forwarding
    "forwarding": breaks("forwarding", "sysctl -qw net.ipv4.ip_forward=1", "sysctl -qw net.ipv4.ip_forward=0; "
                         "nft delete table inet bulkhead-mend"),
    "forwarding of one bridge": breaks(
        "forwarding", "sysctl -qw net/ipv4/conf/vmbr0/forwarding=1",
        "sysctl -qw net/ipv4/conf/vmbr0/forwarding=0; nft delete table inet bulkhead-mend",
    ),
    "forwarding, the drop asleep": breaks(
        "forwarding", ASLEEP + "sysctl -qw net.ipv4.ip_forward=1", NO_FORWARD
    ),
    "forwarding, replies accepted first": breaks(
        "forwarding",
        FORWARD + "nft add rule inet t c ct state established,related accept; sysctl -qw net.ipv4.ip_forward=1",
        NO_FORWARD,
    ),
    "IPv6 forwarding": breaks(
        "forwarding, IPv6", V6_ON + "net.ipv6.conf.all.forwarding=1",
        "nft delete table inet bulkhead-mend; sysctl -qw net.ipv6.conf.all.forwarding=0",
    ),
    # who else gets the packets
    "a port without its drop": breaks("second road", "nft delete chain netdev good at-veth102",
        "nft delete chain netdev bulkhead-mend drop-veth102; nft 'add chain netdev good at-veth102 "
        "{ type filter hook ingress device \"veth102\" priority -500; policy drop; }'"),
    "a macvlan": breaks("second road", "ip link add stray0 link vmbr1 type macvlan"),
    "a macvlan in another namespace": breaks(
        "second road", "ip link add stray0 link veth102 type macvlan; ip link set stray0 netns at-veth200",
        "ip -n at-veth200 link del stray0",
    ),
    "a Linux bridge over both": breaks(
        "second road",
        "ip link add br0 type bridge; ip link set vmbr0 master br0; ip link set vmbr1 master br0",
        "ip link del br0",
    ),
    "tc redirects from a port": breaks(
        "redirects",
        f"tc qdisc add dev veth102 clsact; tc filter add dev veth102 ingress {REDIRECT} veth200",
        "tc qdisc del dev veth102 clsact",
    ),
    "tc redirects to a port": breaks(
        "redirects",
        f"{IFB} tc qdisc add dev stray0 clsact; tc filter add dev stray0 egress {REDIRECT} vmbr1", NO_IFB
    ),
    "nft redirects": breaks(
        "redirects",
        'nft \'add table netdev r; add chain netdev r c { type filter hook ingress device "veth102" priority -501; };'
        ' add rule netdev r c fwd to "veth200"\'',
        "nft delete table netdev r",
    ),
    "IPv6 at a port": breaks("IPv6", "sysctl -qw net/ipv6/conf/veth102/disable_ipv6=0"),
    "proxy ARP": breaks("proxy ARP", "sysctl -qw net/ipv4/conf/vmbr0/proxy_arp=1"),
    "proxy ARP for all": breaks("proxy ARP", "sysctl -qw net/ipv4/conf/all/proxy_arp=1"),
}  # fmt: skip


NO_COMMAND_KNOWS = {
    "a far end on the host",
    "a namespace in both networks",
    "a flow with NORMAL",
    "a macvlan in another namespace",
}
"""What to do here depends on what was meant."""


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_told_and_mended_as_printed(host: GoodHost, name: str) -> None:
    broken = BREAKS[name]
    run(host, broken.script)
    try:
        code, found = host.checks()
        red = {str(finding["check"]) for finding in found if finding["status"] == "BAD"}
        assert broken.red <= red <= broken.red | broken.perhaps, wrong(found)
        assert code == 1
        for finding in wrong(found):
            assert finding["mend"] or finding["advice"], finding
            run(host, "\n".join(finding["mend"]))
        if name not in NO_COMMAND_KNOWS:
            assert host.settled() == []
    finally:
        run(host, broken.restore)
        if broken.replug[0]:
            host.replug(*broken.replug)
    assert host.settled() == []


def wrong(found: list[dict[str, object]]) -> list[dict[str, object]]:
    return [finding for finding in found if finding["status"] not in ("ok", "absent")]


def run(host: GoodHost, script: str) -> None:
    host.machine.sh(f"export OVS_RUNDIR={host.ovs.directory}\n{script}")


# -- what no single command breaks or mends ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, allowed, told",
    [
        ("wgpriv", "10.0.0.0/25,10.1.0.0/24", "wgpriv in at-nm-privacy, privacy's leg, allows its peer 1 10.1.0.0/24: management"),
        ("wgmgmt", "0.0.0.0/0", "management's leg, allows its peer 1 0.0.0.0/0: everything"),
        ("wgmgmt", "10.0.0.0/8", "management's leg, allows its peer 1 10.0.0.0/8: privacy"),
        ("wgwarp", "0.0.0.0/0,10.1.0.200/32", "wgwarp in at-warp0, privacy's leg, allows its peer 1 10.1.0.200/32: management"),
    ],
)  # fmt: skip
def test_a_peer_with_another_networks_addresses(host: GoodHost, device: str, allowed: str, told: str) -> None:
    before = host.machine.sh(f"wg show {device} allowed-ips").split("\t")[1].strip().replace(" ", ",")
    host.allow(device, allowed)
    code, found = host.checks()
    host.allow(device, before)
    assert code == 1
    assert {finding["check"] for finding in wrong(found)} == {"WireGuard"}
    assert told in str(wrong(found)[0]["seen"])
    assert host.settled() == []


def test_the_egress_may_have_the_world_in_two_halves(host: GoodHost) -> None:
    host.allow("wgwarp", "0.0.0.0/1,128.0.0.0/1")
    code, found = host.checks()
    host.allow("wgwarp", "0.0.0.0/0")
    assert (code, wrong(found)) == (0, [])


NFT_DROPS = {
    "interfaces": 'iifname "vmbr0" oifname "vmbr1" drop; {r} iifname "vmbr1" drop; {r} iifname "mesh-*" drop; {r} '
    'oifname "mesh-*" drop',
    "a named set": "iifname @ours oifname @ours drop",
    "a verdict map": "iifname . oifname vmap @pairs; {r} oifname @mesh drop; {r} iifname @mesh drop",
    "a chain jumped to": 'iifname vmap { "lo" : accept, "vmbr*" : jump ours, "mesh-*" : goto ours }',
    "the family": "meta nfproto ipv4 iifname @ours jump ours; {r} meta nfproto ipv6 drop",
}
NFT_SETS = (
    'add table inet t; add set inet t ours { type ifname; elements = { "vmbr0", "vmbr1", "mesh-privacy", "mesh-mgmt" }; };'
    'add set inet t mesh { type ifname; elements = { "mesh-privacy", "mesh-mgmt" }; };'
    'add map inet t pairs { type ifname . ifname : verdict; elements = { "vmbr0" . "vmbr1" : drop, "vmbr1" . "vmbr0" :'
    " drop }; }; add chain inet t ours; add rule inet t ours oifname @ours drop;"
    "add chain inet t c { type filter hook forward priority 0; };"
)


@pytest.mark.parametrize("how", NFT_DROPS)
def test_a_drop_is_seen_however_it_is_written(host: GoodHost, how: str) -> None:
    rule = "add rule inet t c"
    text = f"{NFT_SETS} {rule} {NFT_DROPS[how].replace('{r}', rule)}"
    run(host, f"nft '{text}'\nsysctl -qw net.ipv4.ip_forward=1")
    try:
        assert host.settled() == []
        run(host, "nft 'insert rule inet t c ip saddr 10.0.0.0/8 accept'")
        code, found = host.checks()
        assert code == 1
        assert [finding["check"] for finding in wrong(found)] == ["forwarding"]
    finally:
        run(host, "nft delete table inet t; sysctl -qw net.ipv4.ip_forward=0")


@pytest.mark.skipif(shutil.which("iptables-legacy") is None, reason="needs iptables-legacy")
def test_a_drop_of_iptables_legacy_counts(host: GoodHost) -> None:
    run(host, "sysctl -qw net.ipv4.ip_forward=1; iptables-legacy -P FORWARD DROP")
    try:
        assert host.settled() == []
        run(host, "iptables-legacy -A FORWARD -i vmbr0 -p tcp -j ACCEPT")
        assert [finding["check"] for finding in wrong(host.checks()[1])] == ["forwarding"]
    finally:
        run(host, "iptables-legacy -F FORWARD; iptables-legacy -P FORWARD ACCEPT; sysctl -qw net.ipv4.ip_forward=0")


def test_a_name_whose_namespace_is_gone_is_no_namespace(host: GoodHost) -> None:
    run(host, "touch /run/netns/stale")
    code, found = host.checks()
    run(host, "rm /run/netns/stale")
    assert (code, wrong(found)) == (0, [])


def test_a_name_cannot_move_the_cursor(host: GoodHost) -> None:
    run(host, "ip link add \"$(printf 'x\\033[2Jy')\" link veth102 type macvlan")
    answer = host.verify()
    run(host, "ip link del \"$(printf 'x\\033[2Jy')\"")
    assert answer.code == 1
    assert "\x1b" not in answer.out
    assert "[2Jy" in answer.out


def test_nothing_is_changed(host: GoodHost) -> None:
    asked = (
        "ip -d address; ip route show table all; ip -6 route show table all; ip rule; tc qdisc; nft list ruleset; "
        "ovs-vsctl show; ovs-ofctl -O OpenFlow14 --no-stats dump-flows vmbr0; sysctl -a 2>/dev/null | grep ^net"
    )
    before = host.machine.sh(f"export OVS_RUNDIR={host.ovs.directory}; {asked}")
    host.checks()
    assert host.machine.sh(f"export OVS_RUNDIR={host.ovs.directory}; {asked}") == before


# -- could not find out -----------------------------------------------------------------------------------------------


def without(host: GoodHost, *tools: str, file: Path | None = STATE_FILE) -> tuple[int, list[dict[str, object]]]:
    """The findings where these tools are not installed: they are covered by an empty place."""
    hide = "; ".join(f"rm -f /usr/bin/{tool} /usr/sbin/{tool}" for tool in tools)
    overlay = "".join(
        f"mkdir -p $own/{n} $own/{n}w; mount -t overlay o -o lowerdir={d},upperdir=$own/{n},workdir=$own/{n}w {d}; "
        for n, d in enumerate(("/usr/bin", "/usr/sbin"))
    )
    verify = [sys.executable, "-m", "controller", "verify", "--json", "--ovsdb", host.ovs.db]
    script = f"own=$(mktemp -d); mount -t tmpfs own $own; {overlay} {hide}; exec {' '.join(verify)} {file or ''}"
    done = subprocess.run(
        host.machine.command("unshare", "--mount", "sh", "-ec", script),
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)["checks"]


@pytest.mark.parametrize(
    "tool, checks",
    [
        ("nft", {"second road"}),
        ("ip", {"ports", "far ends", "addresses", "routes", "overlaps", "second road", "redirects", "WireGuard"}),
        ("tc", {"redirects"}),
        ("wg", {"WireGuard"}),
        ("nsenter", {"far ends", "WireGuard"}),
        ("ovs-appctl", {"managers", "hidden flows"}),
    ],
)
def test_a_tool_that_is_missing_is_told(host: GoodHost, tool: str, checks: set[str]) -> None:
    code, found = without(host, tool)
    assert code == 2
    assert {finding["check"] for finding in wrong(found)} == checks, wrong(found)
    assert all("install" in str(finding["advice"]) for finding in wrong(found)), wrong(found)


def test_open_vswitch_that_cannot_be_asked(host: GoodHost) -> None:
    code, found = without(host, "ovs-vsctl")
    assert code == 2
    assert {finding["status"] for finding in found} == {"ok", "unknown"}
    code, found = without(host, "ovs-vsctl", file=None)
    assert code == 2, "it is there, whether or not anybody declared it"


def test_a_host_that_has_nothing(host: GoodHost) -> None:
    nothing = ["--ovsdb", f"unix:{host.ovs.directory}/none.sock"]
    code, found = host.checks(*nothing, file=None)
    assert (code, wrong(found)) == (0, [])
    code, found = host.checks(*nothing)
    assert code == 2, "what a state FILE needs has to be there"
    assert "bridges" in {finding["check"] for finding in wrong(found)}


def test_a_switch_that_is_dead_or_does_not_answer(tmp_path: Path) -> None:
    host = GoodHost(tmp_path)
    try:
        host.start()
        pid = host.machine.sh("pidof ovs-vswitchd").strip()
        run(host, f"kill -STOP {pid}")
        code, found = host.checks()
        assert code == 2
        assert {finding["check"] for finding in wrong(found)} == {"hidden flows"}
        run(host, f"kill -KILL {pid}")
        code, found = host.checks()
        assert code == 2
        assert "hidden flows" in {finding["check"] for finding in wrong(found)}
    finally:
        host.close()


def test_another_network_namespace_than_the_bridges(host: GoodHost) -> None:
    verify = [sys.executable, "-m", "controller", "verify", "--ovsdb", host.ovs.db, str(STATE_FILE)]
    # Interfaces of the same names do not make it the right one.
    script = "for name in vmbr0 vmbr1 mesh-privacy mesh-mgmt; do ip link add $name type ifb; done"
    done = subprocess.run(
        host.machine.command("unshare", "--net", "sh", "-ec", f"{script}; exec {' '.join(verify)}"),
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert "nsenter --net=" in done.stdout
    assert done.stdout.count("nsenter --net=") == 1, "the reason is one, so it is said once"


# -- what it prints ---------------------------------------------------------------------------------------------------


def test_a_bad_state_file_is_refused_with_its_problems(host: GoodHost, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(STATE_FILE.read_text().replace("subnet: 10.1.0.0/24", "subnet: 10.0.0.0/24"))
    answer = host.verify(file=bad)
    assert (answer.code, answer.out) == (1, "")
    assert "expected" in answer.err
    assert "Traceback" not in answer.err
    answer = host.verify(file=tmp_path / "none.yaml")
    assert answer.code in (1, 2)
    assert "none.yaml" in answer.err


def test_the_json_is_as_promised(host: GoodHost) -> None:
    answer = host.verify("--json")
    told = json.loads(answer.out)
    assert list(told) == ["exit_code", "checks"]
    for finding in told["checks"]:
        assert list(finding) == ["check", "status", "seen", "mend", "advice"]
        assert finding["status"] in ("ok", "BAD", "unknown", "absent")
        assert all(isinstance(command, str) for command in finding["mend"])
    assert len({finding["check"] for finding in told["checks"]}) == len(CHECKS)


def on_terminal(host: GoodHost, width: int, *arguments: str) -> list[str]:
    """The lines that a terminal of that width gets."""
    size = f"stty cols {width} rows 50; exec {sys.executable} -m controller verify {' '.join(arguments)}"
    main, side = pty.openpty()
    shown = subprocess.Popen(
        host.machine.command("sh", "-c", f"unset COLUMNS; {size}"),
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": "1"}, stdin=side, stdout=side, stderr=side,
    )  # fmt: skip
    os.close(side)
    text = b""
    try:
        while chunk := os.read(main, 65536):
            text += chunk
    except OSError:  # the other end is closed
        pass
    shown.wait()
    os.close(main)
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text.decode())
    return [line.rstrip() for line in plain.splitlines()]


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_lines_up_and_commands_stay_whole(host: GoodHost, width: int) -> None:
    run(host, "sysctl -qw net/ipv6/conf/veth102/disable_ipv6=0 net/ipv4/conf/vmbr0/forwarding=1")
    try:
        lines = on_terminal(host, width, str(STATE_FILE), "--ovsdb", host.ovs.db)
        found = host.checks()[1]
        piped = host.verify().out
    finally:
        run(host, "sysctl -qw net/ipv6/conf/veth102/disable_ipv6=1 net/ipv4/conf/vmbr0/forwarding=0")
    table = lines[: lines.index("")]
    seen = table[0].index("SEEN")
    assert all(len(line) <= width for line in table)
    assert all(line[seen - 1] == " " and line[seen] != " " for line in table if len(line) > seen)
    said = " ".join(" ".join(line[seen:] for line in table).split())
    for finding in found:
        assert finding["seen"] in said
        assert finding["seen"] in piped
        assert all(f"    {command}" in lines for command in finding["mend"])
        assert all(f"    {command}\n" in piped for command in finding["mend"])
