"""Literal flows: what each becomes, and every reason to warn of one or to refuse it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from controller import statefile
from controller.model import Ipv4, Mac, Member, Network, Prefix, Rule, Service, Vpn
from controller.ofparse import Fault, LiteralFlow, parse
from controller.ofrules import Judged, added_ports, judge, receiver
from controller.problems import Problem, Severity

EXAMPLE = Path(__file__).parents[2] / "examples" / "oo1424oo.yaml"
IP = ("eth_type", 0x0800, 0xFFFF)


def proto(number: int) -> tuple[str, int, int]:
    return ("ip_proto", number, 0xFF)


def dst(address: str) -> tuple[str, int, int]:
    return ("ipv4_dst", int(Ipv4.parse(address)), 0xFFFFFFFF)


def networks() -> tuple[Network, ...]:
    """The networks of the example document."""
    return statefile.load(EXAMPLE).state.networks


def judged(bridge: str, *flows: str, of: Sequence[Network] | None = None) -> Judged:
    return judge(networks() if of is None else of, {bridge: flows})


def codes(found: Judged, severity: Severity) -> list[str]:
    return [problem.code for problem in found.problems if problem.severity is severity]


def errors(bridge: str, *flows: str) -> list[str]:
    found = judged(bridge, *flows)
    return codes(found, Severity.ERROR)


def warnings(bridge: str, *flows: str) -> list[str]:
    """The warnings about flows that are taken."""
    found = judged(bridge, *flows)
    assert codes(found, Severity.ERROR) == [], found.problems
    return codes(found, Severity.WARNING)


def rules(bridge: str, *flows: str, of: Sequence[Network] | None = None) -> tuple[Rule, ...]:
    """The rules of flows that are taken."""
    found = judged(bridge, *flows, of=of)
    assert codes(found, Severity.ERROR) == [], found.problems
    (of_network,) = found.rules.values()
    return of_network


def one(problems: Sequence[Problem], code: str) -> Problem:
    (problem,) = [problem for problem in problems if problem.code == code]
    return problem


class TestDefectsOfTheExampleDocument:
    """What a switch would have done with the document's own flows; each has a code that stays."""

    def found(self, code: str) -> list[Problem]:
        return [problem for problem in statefile.load(EXAMPLE).problems if problem.code == code]

    def test_wireguard_interfaces_as_ports(self) -> None:
        assert [problem.path for problem in self.found("wireguard-port")] == [
            "netmaker.networks[0].bridge",
            "netmaker.networks[1].bridge",
            "wireguard.warp_tunnel.post_up",
        ]

    def test_learn_into_a_table_nobody_reads(self) -> None:
        (problem,) = self.found("dead-learn")
        assert problem.path == "openflow.bridges.vmbr0.flows[3]"
        assert "table 1" in problem.expected and "RETURN" in problem.fix

    def test_normal_floods(self) -> None:
        found = self.found("normal-floods")
        assert [problem.path for problem in found] == [
            "openflow.bridges.vmbr0.flows[3]",
            "openflow.bridges.vmbr1.flows[2]",
        ]
        assert all("mesh" in problem.fix for problem in found)

    def test_flows_of_one_priority_overlap(self) -> None:
        found = self.found("overlap")
        assert [problem.path for problem in found] == [f"openflow.bridges.vmbr0.flows[{index}]" for index in (1, 2, 3)]
        assert all("vmbr0.flows[0]" in problem.fix and "Priority 100" in problem.fix for problem in found)

    def test_vpn_replies_into_warp(self) -> None:
        (problem,) = self.found("vpn-replies-into-warp")
        assert problem.path == "openflow.bridges.vmbr0.flows[1]"
        assert "gateway" in problem.fix and "51820" in problem.fix

    def test_default_normal(self) -> None:
        assert [problem.path for problem in self.found("default-normal")] == [
            "openflow.bridges.vmbr0.flows[5]",
            "openflow.bridges.vmbr1.flows[3]",
        ]

    def test_the_cross_network_example(self) -> None:
        found = judge(
            networks(),
            {
                "vmbr1": ["priority=150,in_port=veth202,tcp,tp_dst=8080,nw_dst=10.0.0.102,actions=output:from-mgmt"],
                "vmbr0": [
                    "priority=150,in_port=from-privacy,tcp,tp_src=8080,nw_src=10.0.0.102,actions=output:to-privacy"
                ],
            },
        )
        there = [problem for problem in found.problems if ".vmbr1." in problem.path]
        assert [problem.code for problem in there] == ["needs-grant"]
        assert "privacy" in there[0].fix and "from-mgmt leads to the mesh" in there[0].fix
        back = [problem for problem in found.problems if ".vmbr0." in problem.path]
        assert [problem.code for problem in back] == ["foreign-port", "stateless-return"]
        assert "mesh-privacy" in back[0].fix
        assert "xray" in back[1].fix and "all of management" in back[1].fix and "source port 8080" in back[1].fix
        assert codes(found, Severity.WARNING) == []
        assert found.rules == {"privacy": (), "management": ()}

    def test_hijack(self) -> None:
        (problem,) = self.found("hijack")
        assert problem.path == "openflow.bridges.vmbr1.flows[0]"
        assert "mcp (tcp 9573) of mcp-server at 10.1.0.200" in problem.fix

    def test_nothing_of_it_becomes_a_rule(self) -> None:
        assert [network.rules for network in networks()] == [(), ()]


class TestDrop:
    def test_last_resort_is_what_is_done_anyway(self) -> None:
        found = judged("vmbr0", "priority=10,in_port=veth100,actions=drop", "priority=1,actions=drop")
        assert found.problems == ()
        assert [rule.path for rule in found.rules["privacy"]] == ["openflow.bridges.vmbr0.flows[0]"]

    def test_drop_of_a_port(self) -> None:
        assert rules("vmbr0", "priority=7,in_port=veth102,actions=drop") == (
            Rule(
                "openflow.bridges.vmbr0.flows[0]",
                "priority=7,in_port=veth102,actions=drop",
                1,
                (IP,),
                "veth102",
                None,
            ),
        )

    def test_drop_of_a_match(self) -> None:
        (rule,) = rules("vmbr0", "tcp,tp_dst=25,actions=drop")
        assert (rule.match, rule.in_port, rule.output) == ((IP, proto(6), ("tcp_dst", 25, 0xFFFF)), None, None)

    def test_drop_of_everything_before_others(self) -> None:
        flows = ("priority=9,actions=drop", "priority=1,in_port=veth102,actions=drop")
        assert warnings("vmbr0", *flows) == ["drop-all"]
        assert [(rule.rank, rule.match, rule.in_port) for rule in rules("vmbr0", *flows)] == [
            (2, (IP,), None),
            (1, (IP,), "veth102"),
        ]

    def test_drop_of_another_network_is_the_isolation(self) -> None:
        assert rules("vmbr1", "ip,nw_src=10.0.0.0/24,actions=drop") == ()
        assert warnings("vmbr1", "ip,nw_src=10.0.0.0/24,actions=drop") == []

    def test_drop_from_the_egress(self) -> None:
        (rule,) = rules("vmbr0", "in_port=warp0,actions=drop")
        assert (rule.in_port, rule.output) == ("warp0", None)

    def test_no_actions_drop(self) -> None:
        (rule,) = rules("vmbr0", "in_port=veth102,actions=")
        assert rule.output is None


class TestDelivery:
    def test_narrowed_to_the_containers_own_address(self) -> None:
        flow = "priority=100,tcp,tp_dst=8080,actions=output:veth102"
        assert warnings("vmbr0", flow) == ["narrowed"]
        (rule,) = rules("vmbr0", flow)
        assert rule.match == (IP, proto(6), dst("10.0.0.102"), ("tcp_dst", 8080, 0xFFFF))
        assert (rule.in_port, rule.output) == (None, "veth102")

    def test_own_address_stays(self) -> None:
        flow = "in_port=veth100,tcp,nw_dst=10.0.0.102,tp_dst=0x1f90/0xfff0,actions=veth102"
        assert warnings("vmbr0", flow) == []
        (rule,) = rules("vmbr0", flow)
        assert rule.match == (IP, proto(6), dst("10.0.0.102"), ("tcp_dst", 0x1F90, 0xFFF0))
        assert rule.in_port == "veth100"

    def test_a_prefix_around_it_is_narrowed(self) -> None:
        (rule,) = rules("vmbr0", "ip,nw_dst=10.0.0.0/24,actions=output:veth102")
        assert rule.match == (IP, dst("10.0.0.102"))

    def test_only_a_port(self) -> None:
        (rule,) = rules("vmbr0", "in_port=veth100,actions=output:veth102")
        assert (rule.match, rule.in_port) == ((IP, dst("10.0.0.102")), "veth100")

    @pytest.mark.parametrize("address", ["10.0.0.100", "10.0.0.0/30", "8.8.8.8"])
    def test_anothers_address(self, address: str) -> None:
        assert errors("vmbr0", f"ip,nw_dst={address},actions=output:veth102") == ["redirect"]

    def test_vpn_clients_are_behind_the_vpn_server(self) -> None:
        (rule,) = rules("vmbr0", "ip,nw_dst=10.8.0.0/25,actions=output:veth100")
        assert rule.match == (IP, ("ipv4_dst", int(Ipv4.parse("10.8.0.0")), 0xFFFFFF80))
        assert errors("vmbr0", "ip,nw_dst=10.8.0.0/25,actions=output:veth102") == ["redirect"]

    def test_a_declared_service_needs_no_rule(self) -> None:
        for flow in (
            "tcp,tp_dst=9574,actions=output:veth201",
            "tcp,nw_dst=10.1.0.201,tp_dst=9574,actions=output:veth201",
        ):
            assert rules("vmbr1", flow) == ()
        assert len(rules("vmbr1", "udp,tp_dst=9574,actions=output:veth201")) == 1
        assert len(rules("vmbr1", "in_port=veth202,tcp,tp_dst=9574,actions=output:veth201")) == 1
        assert len(rules("vmbr1", "tcp,tp_dst=9574,actions=output:veth202")) == 1
        assert len(rules("vmbr1", "tcp,tp_dst=9574,ip_dscp=1,actions=output:veth201")) == 1

    def test_hijack_says_whether_a_rule_is_made(self) -> None:
        done = one(judged("vmbr1", "tcp,tp_dst=9573,actions=output:veth201").problems, "hijack")
        assert "no rule is made" in done.fix
        made = one(judged("vmbr1", "tcp,tp_dst=9573,actions=output:veth202").problems, "hijack")
        assert "api (tcp 9573) of op-dbus-api" in made.fix and "no rule" not in made.fix

    def test_hijack_by_everything(self) -> None:
        found = one(judged("vmbr1", "actions=output:veth202").problems, "hijack")
        assert found.fix.count(" of ") == 3
        vpn = one(judged("vmbr0", "udp,actions=output:veth102").problems, "hijack")
        assert "vpn (udp 51820) of gateway" in vpn.fix

    def test_masked_ports_can_hijack(self) -> None:
        assert warnings("vmbr1", "tcp,tp_dst=9572/0xfffc,actions=output:veth202") == ["hijack"]
        assert warnings("vmbr1", "tcp,tp_dst=9576/0xfffc,actions=output:veth202") == ["narrowed"]

    def test_to_the_host(self) -> None:
        (rule,) = rules("vmbr1", "tcp,tp_dst=22,actions=local")
        assert (rule.output, rule.match[2]) == ("LOCAL", dst("10.1.0.1"))

    def test_the_host_must_take_part(self) -> None:
        assert errors("vmbr0", "tcp,tp_dst=22,actions=output:LOCAL") == ["no-host"]
        assert errors("vmbr0", "in_port=LOCAL,actions=drop") == ["no-host"]

    def test_the_host_reaches_exposed_services_only(self) -> None:
        assert errors("vmbr1", "in_port=LOCAL,tcp,tp_dst=22,actions=output:veth200") == ["unsupported"]

    def test_back_to_where_it_came_from(self) -> None:
        assert errors("vmbr0", "in_port=veth102,actions=output:veth102") == ["hairpin"]

    def test_to_the_mesh(self) -> None:
        (rule,) = rules("vmbr1", "in_port=veth202,tcp,nw_dst=10.1.0.77,actions=output:from-mgmt")
        assert (rule.match, rule.output) == ((IP, proto(6), dst("10.1.0.77")), "from-mgmt")
        assert errors("vmbr1", "ip,nw_dst=10.1.0.200,actions=output:from-mgmt") == ["redirect"]
        assert warnings("vmbr1", "tcp,tp_dst=9573,actions=output:from-mgmt") == ["hijack"]


class TestEgress:
    def test_from_members_and_mesh_it_is_done_anyway(self) -> None:
        flows = ("in_port=veth102,actions=output:warp0", "in_port=from-privacy,actions=output:warp0")
        assert (rules("vmbr0", *flows), warnings("vmbr0", *flows)) == ((), [])

    def test_some_of_it_is_wider_than_written(self) -> None:
        assert warnings("vmbr0", "in_port=veth102,tcp,tp_dst=443,actions=output:warp0") == ["egress-wider"]

    @pytest.mark.parametrize(
        ("match", "expected"),
        [
            ("in_port=veth100", ["vpn-replies-into-warp"]),
            ("priority=3", ["vpn-replies-into-warp"]),
            ("in_port=veth100,udp,tp_src=51820", ["vpn-replies-into-warp", "egress-wider"]),
            ("in_port=veth100,udp,tp_src=53", ["egress-wider"]),
            ("in_port=veth100,tcp", ["egress-wider"]),
            ("in_port=veth102", []),
        ],
    )
    def test_vpn_replies(self, match: str, expected: list[str]) -> None:
        assert warnings("vmbr0", f"{match},actions=output:warp0") == expected

    @pytest.mark.parametrize("address", ["10.0.0.102", "10.0.0.0/24", "10.8.0.7"])
    def test_own_addresses_are_not_the_world(self, address: str) -> None:
        assert errors("vmbr0", f"in_port=veth100,ip,nw_dst={address},actions=output:warp0") == ["redirect"]

    def test_unsolicited(self) -> None:
        assert errors("vmbr0", "in_port=warp0,tcp,tp_dst=80,actions=output:veth102") == ["unsolicited"]
        assert errors("vmbr0", "in_port=warp0,actions=normal") == ["unsolicited"]

    def test_unsolicited_with_learn_is_a_warning(self) -> None:
        flow = "in_port=warp0,actions=learn(table=1,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[]),output:veth102"
        assert warnings("vmbr0", flow) == ["dead-learn", "unsolicited"]
        assert rules("vmbr0", flow) == ()


class TestLearn:
    def test_elsewhere_the_rest_of_the_flow_is_kept(self) -> None:
        flow = "in_port=veth100,actions=learn(table=9,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[]),output:veth102"
        assert warnings("vmbr0", flow) == ["dead-learn", "narrowed"]
        assert len(rules("vmbr0", flow)) == 1

    @pytest.mark.parametrize("consults", ["resubmit(,9)", "goto_table:9", "ct(table=9)"])
    def test_a_table_that_is_read(self, consults: str) -> None:
        found = judged("vmbr0", "in_port=veth100,actions=learn(table=9)", f"in_port=veth102,actions={consults}")
        assert codes(found, Severity.WARNING) == []
        assert [problem.code for problem in found.problems] == ["unsupported", "unsupported"]

    def test_table_0_is_always_read(self) -> None:
        assert errors("vmbr0", "in_port=veth100,actions=learn(table=0)") == ["unsupported"]

    def test_the_default_is_table_1(self) -> None:
        found = judged("vmbr0", "in_port=veth100,actions=learn(NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[])")
        assert "table 1" in one(found.problems, "dead-learn").expected


class TestPorts:
    @pytest.mark.parametrize("flow", ["in_port=veth10,actions=drop", "actions=output:veth10", "actions=veth10"])
    def test_unknown(self, flow: str) -> None:
        found = judged("vmbr0", flow)
        assert [problem.code for problem in found.problems] == ["unknown-port"]
        assert "Did you mean veth10" in found.problems[0].fix

    def test_misspelt_action(self) -> None:
        assert "Did you mean normal?" in one(judged("vmbr0", "actions=nromal").problems, "unknown-port").fix

    @pytest.mark.parametrize(
        "flow", ["in_port=3,actions=drop", "actions=output:3", "actions=0x3", 'in_port="3",actions=drop']
    )
    def test_numbers(self, flow: str) -> None:
        assert errors("vmbr0", flow) == ["numeric-port"]

    def test_of_another_network(self) -> None:
        assert errors("vmbr0", "in_port=veth102,actions=output:veth202") == ["foreign-port", "needs-grant"]
        assert errors("vmbr0", "in_port=veth202,actions=output:veth102") == ["foreign-port", "needs-grant"]

    def test_of_the_mesh_bridge(self) -> None:
        assert errors("vmbr0", "in_port=nm-privacy,actions=output:veth102") == ["foreign-port"]

    def test_every_bad_port_is_told(self) -> None:
        assert errors("vmbr0", "in_port=nobody,actions=output:nowhere") == ["unknown-port", "unknown-port"]

    def test_quoted_names(self) -> None:
        (rule,) = rules("vmbr0", 'in_port="veth100",actions=output:"veth102"')
        assert (rule.in_port, rule.output) == ("veth100", "veth102")

    def test_of_no_bridge(self) -> None:
        found = judged("vmbr", "actions=drop")
        assert [(p.code, p.path) for p in found.problems] == [("unknown-bridge", "openflow.bridges.vmbr")]
        assert "Did you mean vmbr" in found.problems[0].fix


class TestCrossing:
    @pytest.mark.parametrize(
        "match",
        ["nw_dst=10.1.0.201", "nw_src=10.1.0.0/24", "nw_dst=10.1.0.128/25", "nw_src=10.1.0.1/255.255.255.1"],
    )
    def test_addresses_of_another_network(self, match: str) -> None:
        assert errors("vmbr0", f"tcp,{match},actions=output:veth102") == ["needs-grant"]

    def test_vpn_clients_are_of_the_network(self) -> None:
        assert errors("vmbr1", "ip,nw_src=10.8.0.9,actions=output:veth200") == ["needs-grant"]

    def test_wider_than_another_network_is_not_about_it(self) -> None:
        assert errors("vmbr0", "ip,nw_src=0.0.0.0/0,actions=output:veth102") == []
        assert errors("vmbr0", "ip,nw_src=10.0.0.0/8,actions=output:veth102") == []

    def test_stateless_return(self) -> None:
        found = judged("vmbr0", "in_port=veth102,tcp,tp_src=443,nw_dst=10.1.0.202,actions=output:from-privacy")
        assert [problem.code for problem in found.problems] == ["needs-grant", "stateless-return"]
        assert "any sender reach all of management" in one(found.problems, "stateless-return").fix

    def test_a_destination_port_closes_it(self) -> None:
        flow = "in_port=veth102,tcp,tp_src=443,tp_dst=80,nw_dst=10.1.0.202,actions=output:from-privacy"
        assert errors("vmbr0", flow) == ["needs-grant"]

    def test_within_a_network_it_is_nothing_to_shout_about(self) -> None:
        assert errors("vmbr0", "in_port=veth100,tcp,tp_src=443,actions=output:veth102") == []


class TestOverlap:
    def test_same_action(self) -> None:
        flows = ("priority=5,tcp,tp_dst=80,actions=output:veth102", "priority=5,tcp,tp_dst=81,actions=output:veth102")
        assert "overlap" not in warnings("vmbr0", *flows)
        assert [rule.rank for rule in rules("vmbr0", *flows)] == [1, 1]

    def test_disjoint(self) -> None:
        assert warnings("vmbr0", "in_port=veth100,actions=drop", "in_port=veth102,actions=normal") == ["normal-floods"]

    @pytest.mark.parametrize(
        ("one_match", "other_match", "meets"),
        [
            ("tcp,tp_dst=80", "tcp,tp_dst=81", False),
            ("tcp,tp_dst=80", "udp,tp_dst=80", False),
            ("tcp,tp_dst=80", "tcp,tp_dst=80/0xfff0", True),
            ("tcp,tp_dst=80", "in_port=veth100", True),
            ("tcp,tp_dst=80", "icmp", False),
            ("ip,nw_src=10.0.0.0/25", "ip,nw_src=10.0.0.128/25", False),
            ("ip,nw_src=10.0.0.0/24", "ip,nw_src=10.0.0.128/25", True),
            ("ip,nw_src=10.0.0.1/255.0.0.255", "ip,nw_src=10.9.9.1", True),
            ("ip,nw_tos=184", "ip,ip_dscp=46", True),
        ],
    )
    def test_meeting(self, one_match: str, other_match: str, meets: bool) -> None:
        flows = (f"{one_match},actions=drop", f"{other_match},in_port=veth102,actions=normal")
        if "in_port" in other_match:
            flows = (flows[0], f"{other_match},actions=normal")
        assert ("overlap" in warnings("vmbr0", *flows)) == meets

    def test_other_priorities_do_not(self) -> None:
        assert warnings("vmbr0", "priority=2,ip,actions=drop", "priority=3,ip,in_port=veth100,actions=normal") == [
            "normal-floods"
        ]

    def test_rules_that_still_meet_are_refused(self) -> None:
        flows = (
            "priority=5,in_port=veth100,tcp,actions=drop",
            "priority=5,tcp,tp_dst=80,actions=output:veth102",
        )
        found = judged("vmbr0", *flows)
        assert codes(found, Severity.ERROR) == ["overlap"]
        assert "overlap" not in codes(found, Severity.WARNING)
        problem = one(found.problems, "overlap")
        assert problem.path.endswith("vmbr0.flows[1]") and "vmbr0.flows[0]" in problem.fix

    def test_narrowing_can_settle_it(self) -> None:
        flows = ("priority=5,tcp,tp_dst=80,actions=output:veth100", "priority=5,tcp,tp_dst=80,actions=output:veth102")
        assert "overlap" in warnings("vmbr0", *flows)
        assert len(rules("vmbr0", *flows)) == 2

    def test_rules_that_say_nothing_new_go(self) -> None:
        flows = (
            "priority=5,tcp,tp_dst=80,actions=output:veth102",
            "priority=5,tcp,tp_dst=80,actions=output:veth102",
            "priority=5,tcp,actions=output:veth102",
        )
        (rule,) = rules("vmbr0", *flows)
        assert rule.match == (IP, proto(6), dst("10.0.0.102"))

    def test_rules_that_meet_in_part_are_refused(self) -> None:
        flows = (
            "priority=5,in_port=veth100,tcp,actions=output:veth102",
            "priority=5,tcp,tp_dst=80,actions=output:veth102",
        )
        assert errors("vmbr0", *flows) == ["overlap"]


class TestRank:
    def test_dense_over_the_bridge(self) -> None:
        flows = (
            "priority=65535,in_port=veth100,actions=drop",
            "priority=7,in_port=veth102,actions=drop",
            "in_port=from-privacy,actions=drop",
            "priority=7,in_port=warp0,actions=drop",
            "priority=1,actions=normal",
        )
        assert [rule.rank for rule in rules("vmbr0", *flows)] == [4, 2, 3, 2]


class TestMesh:
    CROSSOVER = (
        "priority=100,in_port=nm-mgmt,actions=output:to-mgmt",
        "priority=100,in_port=to-mgmt,actions=output:nm-mgmt",
        "priority=1,actions=drop",
    )

    def test_crossover(self) -> None:
        found = judged("mesh-mgmt", *self.CROSSOVER)
        assert (found.problems, found.rules) == ((), {})

    @pytest.mark.parametrize(
        "flow",
        [
            "actions=normal",
            "in_port=nm-mgmt,actions=normal",
            "in_port=nm-mgmt,tcp,actions=output:to-mgmt",
            "in_port=nm-mgmt,actions=output:nm-mgmt",
            "in_port=nm-mgmt,actions=drop",
            "actions=output:to-mgmt",
            "in_port=nm-mgmt,actions=output:to-mgmt,output:to-mgmt",
            "in_port=nm-mgmt,actions=set_field:1->ip_dscp,output:to-mgmt",
            "in_port=LOCAL,actions=output:to-mgmt",
        ],
    )
    def test_anything_else(self, flow: str) -> None:
        assert errors("mesh-mgmt", flow) == ["mesh-flow"]

    def test_ports(self) -> None:
        assert errors("mesh-mgmt", "in_port=nm-mgmt,actions=output:from-mgmt") == ["foreign-port"]
        assert errors("mesh-mgmt", "in_port=nm-mgmt,actions=output:to-mgt") == ["unknown-port"]
        assert errors("mesh-mgmt", "in_port=1,actions=output:to-mgmt") == ["numeric-port"]


class TestUnsupported:
    @pytest.mark.parametrize(
        ("flow", "named"),
        [
            ("ip,actions=set_field:10.0.0.9->nw_dst,output:veth102", "set_field"),
            ("ip,actions=mod_nw_dst:10.0.0.9,output:veth102", "mod_nw_dst"),
            ("ip,actions=resubmit(,2)", "resubmit"),
            ("ip,actions=goto_table:2", "goto_table"),
            ("tcp,actions=ct(commit)", "ct"),
            ("ip,actions=group:1", "group"),
            ("ip,actions=meter:1,output:veth102", "meter"),
            ("ip,actions=controller", "CONTROLLER"),
            ("ip,actions=controller:65535", "controller"),
            ("ip,actions=in_port", "in_port"),
            ("ip,actions=output:NXM_NX_REG0[]", "NXM_NX_REG0"),
            ("ip,actions=output(port=veth102,max_len=64)", "output"),
            ("ip,actions=output:veth100,output:veth102", "one output"),
            ("ip,actions=normal,output:veth102", "one output"),
            ("arp,actions=drop", "arp"),
            ("ipv6,actions=drop", "ipv6"),
            ("dl_type=0x0806,actions=drop", "IPv4"),
            ("dl_src=02:00:00:00:00:01,actions=drop", "dl_src"),
            ("dl_vlan=5,actions=drop", "dl_vlan"),
            ("ip,nw_frag=later,actions=drop", "nw_frag"),
            ("tcp,tcp_flags=+syn,actions=drop", "tcp_flags"),
            ("tcp,ct_state=+new,actions=drop", "ct_state"),
            ("table=1,ip,actions=drop", "table"),
            ("cookie=7,ip,actions=drop", "cookie"),
            ("idle_timeout=7,ip,actions=drop", "idle_timeout"),
            ("send_flow_rem,ip,actions=drop", "send_flow_rem"),
        ],
    )
    def test_named(self, flow: str, named: str) -> None:
        found = judged("vmbr0", flow)
        assert [problem.code for problem in found.problems] == ["unsupported"], found.problems
        assert named in found.problems[0].expected
        assert found.problems[0].fix

    def test_every_one_is_named(self) -> None:
        assert errors("vmbr0", "dl_vlan=5,tcp,tcp_flags=+syn,actions=drop") == ["unsupported", "unsupported"]


class TestBadFlows:
    @pytest.mark.parametrize(
        "flow",
        [
            "",
            "ip",
            "drop",
            "priority=,actions=drop",
            "priority=x,actions=drop",
            "priority=65536,actions=drop",
            "priority=-1,actions=drop",
            "tcp,tp_dst=65536,actions=drop",
            "tcp,tp_dst=-1,actions=drop",
            "tcp,tp_dst=http,actions=drop",
            "tcp,tp_dst=80/,actions=drop",
            "ip,nw_dst=10.0.0,actions=drop",
            "ip,nw_dst=10.0.0.256,actions=drop",
            "ip,nw_dst=10.0.0.0/33,actions=drop",
            "ip,nw_dst=fe80::1,actions=drop",
            "ip,nw_dst=any,actions=drop",
            "ip,nw_dst=10.0.0.1,nw_dst=10.0.0.2,actions=drop",
            "ip,nw_dst=10.0.0.1,ip_dst=10.0.0.2,actions=drop",
            "tcp,udp,actions=drop",
            "IP,actions=drop",
            "fancy,actions=drop",
            "fancy=1,actions=drop",
            "ip=1,actions=drop",
            "ip,ip_dscp=64,actions=drop",
            "icmp,icmp_type=256,actions=drop",
            "actions=drop,output:veth102",
            "actions=output:veth102,actions=drop",
            "actions=fancy(1)",
            "actions=ct(",
            "actions=" + "clone(" * 200 + ")" * 200,
        ],
    )
    def test_refused(self, flow: str) -> None:
        found = errors("vmbr0", flow)
        assert found and set(found) <= {"bad-flow", "unsupported"}

    @pytest.mark.parametrize(
        ("flow", "needs"),
        [
            ("tp_dst=80,actions=drop", "tcp"),
            ("ip,tp_dst=80,actions=drop", "tcp"),
            ("nw_dst=10.0.0.1,actions=drop", "ip"),
            ("nw_proto=6,actions=drop", "ip"),
            ("ip,tcp_dst=80,actions=drop", "tcp"),
            ("udp,tcp_dst=80,actions=drop", "tcp"),
            ("tcp,icmp_type=8,actions=drop", "icmp"),
        ],
    )
    def test_what_a_switch_would_ignore(self, flow: str, needs: str) -> None:
        found = judged("vmbr0", flow)
        assert {problem.code for problem in found.problems} == {"prerequisite"}
        assert needs in found.problems[0].expected

    def test_did_you_mean(self) -> None:
        assert "nw_dst" in one(judged("vmbr0", "ip,nw_dts=10.0.0.1,actions=drop").problems, "bad-flow").fix

    def test_bad_flows_do_not_hide_good_ones(self) -> None:
        found = judged("vmbr0", "nonsense", "in_port=veth102,actions=drop")
        assert [rule.path for rule in found.rules["privacy"]] == ["openflow.bridges.vmbr0.flows[1]"]


class TestNotation:
    """What ovs-ofctl accepts and its dump never prints."""

    @pytest.mark.parametrize(
        "text",
        [
            "priority=5,in_port=a,tcp,tp_dst=80,actions=output:b",
            "priority=5 in_port=a tcp tp_dst=80 actions=output:b",
            "  priority=5 ,\tin_port=a,, tcp, tp_dst=80  action=b ",
            'table=0,tcp,tcp_dst=0x50,in_port="a",priority=0x5,actions= output:b',
            "priority=5,in_port=a,dl_type=0x800,nw_proto=6,tp_dst=80/0xffff,actions=output(port=b)",
        ],
    )
    def test_one_flow_in_many_ways(self, text: str) -> None:
        flow = parse(text)
        assert isinstance(flow, LiteralFlow), flow
        assert (flow.priority, flow.in_port) == (5, "a")
        assert flow.match == (IP, proto(6), ("tcp_dst", 80, 0xFFFF))
        assert [action.port for action in flow.actions] == ["b"]

    def test_a_mask_is_a_mask_and_no_host_mask(self) -> None:
        flow = parse("ip,nw_src=10.0.0.7/0.0.0.255,actions=drop")
        assert isinstance(flow, LiteralFlow) and flow.cube("ipv4_src") == (7, 0xFF)

    def test_a_mask_of_nothing_matches_everything(self) -> None:
        flow = parse("nw_src=0.0.0.0/0,actions=drop")
        assert isinstance(flow, LiteralFlow) and flow.catches_all

    def test_icmp_and_tos(self) -> None:
        flow = parse("icmp,icmp_type=8,icmp_code=0,nw_tos=184,actions=drop")
        assert isinstance(flow, LiteralFlow)
        assert flow.match == (
            IP,
            proto(1),
            ("icmpv4_type", 8, 0xFF),
            ("icmpv4_code", 0, 0xFF),
            ("ip_dscp", 46, 0x3F),
        )
        assert parse("icmp,tp_src=8,actions=drop") == replace(
            parse_good("icmp,icmp_type=8,actions=drop"), text="icmp,tp_src=8,actions=drop"
        )

    def test_sctp(self) -> None:
        assert parse_good("sctp,tp_src=1,actions=drop").match == (IP, proto(132), ("sctp_src", 1, 0xFFFF))

    def test_a_fault_says_what_to_do(self) -> None:
        (fault,) = parse_bad("ip,nw_dst=10.0.0.1")
        assert fault.code == "bad-flow" and "actions=" in fault.fix

    @pytest.mark.skipif(shutil.which("ovs-ofctl") is None, reason="needs ovs-ofctl")
    @pytest.mark.parametrize(
        "text",
        [
            "priority=5,tcp,tp_dst=80,actions=drop",
            "priority=5 tcp tp_dst=80 actions=drop",
            "tcp,,tp_dst=0x50/0xfff0,actions=normal",
            "ip,nw_src=10.0.0.7/0.0.0.255,actions=drop",
            "ip,nw_src=10.0.0.7/24,action=drop",
            "icmp,icmp_type=8,actions=drop",
            "ip,nw_tos=184,actions=drop",
            "priority=0x10,actions=drop",
        ],
    )
    def test_the_switchs_own_tool_reads_the_same(self, text: str) -> None:
        command = ["ovs-ofctl", "-O", "OpenFlow14", "parse-flow", text]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        canonical = said.split("ADD ")[1].strip().replace(" actions=", ",actions=").replace("NORMAL", "normal")
        theirs, ours = parse_good(canonical), parse_good(text)
        assert (theirs.priority, theirs.match, theirs.actions) == (ours.priority, ours.match, ours.actions)


def parse_good(text: str) -> LiteralFlow:
    flow = parse(text)
    assert isinstance(flow, LiteralFlow), flow
    return flow


def parse_bad(text: str) -> tuple[Fault, ...]:
    found = parse(text)
    assert isinstance(found, tuple)
    return found


class TestHelpers:
    def test_receiver(self) -> None:
        flows = ["nonsense", "udp,tp_dst=53,actions=output:a", "udp,tp_dst=51820,actions=normal"]
        assert receiver(flows, "udp", 51820) is None
        assert receiver([*flows, "priority=3,udp,tp_dst=51820,actions=output:b"], "udp", 51820) == "b"

    @pytest.mark.parametrize(
        ("command", "expected"),
        [
            ("ovs-vsctl add-port vmbr0 warp0", [("vmbr0", "warp0")]),
            ("ovs-vsctl --may-exist add-port vmbr0 %i -- set interface %i mtu_request=1280", [("vmbr0", "warp0")]),
            ("ip link set %i up; ovs-vsctl add-port a b && ovs-vsctl add-port c d", [("a", "b"), ("c", "d")]),
            ("ovs-vsctl del-port vmbr0 warp0", []),
            ("echo add-port a b", []),
        ],
    )
    def test_added_ports(self, command: str, expected: list[tuple[str, str]]) -> None:
        assert added_ports(command, "warp0") == expected

    def test_a_network_without_egress_mesh_host_or_vpn(self) -> None:
        member = Member("300", "redis", "veth300", Mac(2 << 40), Ipv4.parse("10.2.0.9"), (Service("r", "tcp", 6379),))
        lone = Network(
            "data",
            "vmbr2",
            Prefix.parse("10.2.0.0/24"),
            Ipv4.parse("10.2.0.1"),
            Mac(2 << 40 | 1),
            (300, 399),
            members=(member,),
        )
        assert rules("vmbr2", "tcp,tp_dst=6379,actions=output:veth300", of=(lone,)) == ()
        (rule,) = rules("vmbr2", "udp,tp_dst=51820,actions=output:veth300", of=(lone,))
        assert rule.output == "veth300"
        with_vpn = replace(lone, vpn=Vpn("300", 51820, Prefix.parse("10.9.0.0/24")))
        assert rules("vmbr2", "udp,tp_dst=51820,actions=output:veth300", of=(with_vpn,)) == ()
