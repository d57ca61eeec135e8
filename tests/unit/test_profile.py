"""The section `security` of a state file: what it means, the firewall that follows, and every reason to refuse one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from controller import statefile
from controller.hostmodel import Endpoint, Firewall, Limits, Profile, SecurityRole, TunnelNetwork
from controller.model import Ipv4, Prefix
from controller.problems import BulkheadError, InvalidInput
from controller.security.profile import load_profile

EXAMPLE = yaml.safe_load((Path(__file__).parents[2] / "examples" / "oo1424oo.yaml").read_text())
KEYS = ("A" * 42 + "E=", "B" * 42 + "E=")


def loaded(text: str) -> statefile.Loaded:
    return statefile.loads(f"security: {text}", "test.yaml")


def refused(text: str, **more: object) -> dict[str, str]:
    """Codes by path."""
    tree = {**more, "security": yaml.safe_load(text)}
    with pytest.raises(InvalidInput) as caught:
        statefile.loads(yaml.safe_dump(tree), "test.yaml")
    return {problem.path: problem.code for problem in caught.value.problems if problem.severity == "error"}


def test_a_file_of_this_section_alone_is_valid() -> None:
    found = loaded("{role: router}")
    assert found.state.networks == () and found.problems == ()
    expected = Profile(SecurityRole.ROUTER, "router", Prefix.parse("10.0.0.0/24"), Ipv4.parse("10.0.0.1"))
    assert found.host.security == expected
    assert expected.limits == Limits() and expected.listen == 443 and expected.inference_port == 8001


def test_everything_that_can_be_said() -> None:
    text = f"""{{role: inference, name: inf1, network: 10.77.0.0/16, address: 10.77.3.4, names: [LLM.example], log_dropped: true,
      peers: [{{name: r, address: 10.77.0.1, endpoint: "192.0.2.7:51820", public_key: "{KEYS[0]}"}}],
      inference: {{socket: /run/x.sock, group: people, port: 9001}},
      limits: {{body_bytes: 5, request_s: 1.5, idle_s: 2, concurrency: 3, per_client_per_s: 0.5}}}}"""
    profile = loaded(text).host.security
    assert profile is not None
    assert (profile.name, str(profile.network), str(profile.address)) == ("inf1", "10.77.0.0/16", "10.77.3.4")
    assert profile.names == ("llm.example",) and profile.socket == Path("/run/x.sock")
    assert (profile.socket_group, profile.inference_port, profile.log_dropped) == ("people", 9001, True)
    assert profile.limits == Limits(5, 1.5, 2.0, 3, 0.5)
    assert profile.peers[0].endpoint == Endpoint("192.0.2.7", 51820) and profile.peers[0].public_key == KEYS[0]


@pytest.mark.parametrize(
    "text, tcp, udp, inner",
    [
        ("{role: dev}", (22, 443), (), ()),
        ("{role: router, listen: 8443}", (22, 8443), (51820,), ()),
        ("{role: inference, address: 10.0.0.2}", (22,), (51820,), (8001,)),
    ],
)
def test_the_firewall_follows_from_the_role(
    text: str, tcp: tuple[int, ...], udp: tuple[int, ...], inner: tuple[int, ...]
) -> None:
    found = loaded(text).host
    assert found.security is not None
    names = ("bulkhead-wg0", "bulkhead-wg1")
    tunnel = TunnelNetwork(found.security.network, found.security.address, names) if udp else None
    assert found.firewall == Firewall(tcp, udp, tunnel=tunnel, inner=inner)


@pytest.mark.parametrize(
    "text, path, code",
    [
        ("{}", "security.role", "missing-key"),
        ("{role: x}", "security.role", "bad-value"),
        ("{role: inference}", "security.address", "missing-key"),
        ("{role: router, network: 10.0.0.0/31}", "security.network", "bad-prefix"),
        ("{role: router, address: 10.1.0.1}", "security.address", "address-outside"),
        ("{role: router, address: 10.0.0.255}", "security.address", "address-outside"),
        ("{role: router, peers: [{name: a, address: 10.0.0.1}]}", "security.peers[0].address", "duplicate-address"),
        ("{role: router, peers: [{name: Router, address: 10.0.0.2}]}", "security.peers[0].name", "duplicate-name"),
        ("{role: router, listen: 8001}", "security.listen", "service-clash"),
        ("{role: inference, address: 10.0.0.2, inference: {port: 22}}", "security.inference.port", "service-clash"),
        ("{role: router, inference: {group: 'a b'}}", "security.inference.group", "bad-name"),
        ("{role: router, limits: {body_bytes: 0}}", "security.limits.body_bytes", "out-of-range"),
        ("{role: router, limits: {request_s: .nan}}", "security.limits.request_s", "out-of-range"),
        ("{role: router, limits: {idle_s: 'x'}}", "security.limits.idle_s", "out-of-range"),
        ("{role: router, colour: red}", "security.colour", "unknown-key"),
    ],
)
def test_what_is_wrong_is_told_at_its_path(text: str, path: str, code: str) -> None:
    assert refused(text).get(path) == code


def test_a_key_is_of_one_peer() -> None:
    peers = ", ".join(f'{{name: p{n}, address: 10.0.0.{n}, public_key: "{KEYS[0]}"}}' for n in (2, 3))
    assert refused(f"{{role: router, peers: [{peers}]}}") == {"security.peers[1].public_key": "duplicate-key"}


def test_the_default_network_is_refused_where_another_has_it() -> None:
    networks = {"networks": {"a": {"bridge": "br0", "subnet": "10.0.0.128/25", "ids": "1-9"}}}
    assert refused("{role: router}", **networks) == {"security.network": "overlapping-prefixes"}
    with pytest.raises(InvalidInput) as caught:
        statefile.loads(yaml.safe_dump({**networks, "security": {"role": "router"}}), "t")
    problem = caught.value.problems[0]
    assert problem.found == "10.0.0.0/24, the default" and "networks.a.subnet has 10.0.0.128/25" in problem.fix
    for good in ("{role: dev}", "{role: router, network: 10.77.0.0/24}"):
        statefile.loads(yaml.safe_dump({**networks, "security": yaml.safe_load(good)}), "t")
    assert refused("{role: dev, network: 10.0.0.0/16}", **networks) == {"security.network": "overlapping-prefixes"}


def test_beside_a_whole_node() -> None:
    found = refused("{role: router}", **EXAMPLE)
    assert found["security.network"] == "overlapping-prefixes"
    assert found["wireguard.vpn_server.listen_port"] == "service-clash"
    two = refused("{role: dev}", networking={"firewall": {"enable": True}})
    assert two == {"networking.firewall": "two-firewalls"}
    loaded("{role: dev}\nnetworking: {firewall: {enable: false}}")


def test_a_misshapen_section_hides_nothing_else() -> None:
    found = refused("{role: router, listen: 0}", lxc={"containers": [{"id": "0"}]})
    assert "security.listen" in found and any(path.startswith("lxc.") for path in found)


def test_a_file_without_it_has_no_profile(tmp_path: Path) -> None:
    file = tmp_path / "none.yaml"
    file.write_text("networks: {}\n")
    with pytest.raises(BulkheadError, match="has no section security"):
        load_profile(file)
