"""The firewalls' texts, where no kernel is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from controller.agent import firewall, sysctls, trial
from controller.agent.files import write_atomically
from controller.agent.nft import Kept, first_difference, kept_path, read_kept, write_kept
from controller.hostmodel import Firewall, HostState
from controller.model import Prefix
from controller.statefile import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "oo1424oo.yaml"
LOADED = load(EXAMPLE)
STATE = LOADED.state


def host(**allowed: tuple[int, ...] | tuple[str, ...]) -> HostState:
    """The example's host with a firewall."""
    return replace(LOADED.host, firewall=Firewall(**allowed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, written", [("eth0", '"eth0"'), ("a$;{#", '"a$;{#"'), ("a*", '"a\\*"'), ("a*b", '"a*b"'), ("*", '"\\*"')]
)
def test_a_star_at_the_end_is_no_wildcard(name: str, written: str) -> None:
    assert f"iifname {written} fib daddr" in firewall.host_table(STATE, host(), (name,))


@pytest.mark.parametrize("name", ["", 'a"b', "a b", "a\nb", "a\\", "a/b"])
def test_what_is_no_name_does_not_get_into_a_text(name: str) -> None:
    with pytest.raises(ValueError, match="not the name"):
        firewall.host_table(STATE, host(), (name,))
    with pytest.raises(ValueError, match="not the name"):
        firewall.ingress_table([name])


def test_ports_with_odd_names_have_chains_of_their_own() -> None:
    text = firewall.ingress_table(["a.b", "a_2eb", "a-b", "b"])
    chains = [line.split()[1] for line in text.splitlines() if line.strip().startswith("chain")]
    assert len(set(chains)) == 4


def test_privacy_is_never_trusted_nor_a_mesh_bridge() -> None:
    text = firewall.host_table(STATE, host(trusted=("vmbr0", "mesh-mgmt", "vmbr1")), ("eth0",))
    assert 'iifname "vmbr1" accept' in text
    lines = [line.strip() for line in text.split("chain input")[1].splitlines()]
    assert lines.index('iifname { "mesh-mgmt", "mesh-privacy", "vmbr0" } counter drop') < lines.index(
        "ct state established,related accept"
    )


def test_a_prefix_in_another_is_left_out() -> None:
    network = STATE.network("privacy")
    assert network.mesh is not None
    wide = replace(network, mesh=replace(network.mesh, prefixes=(Prefix.parse("10.0.0.0/16"),)))
    state = replace(STATE, networks=tuple(wide if n.name == "privacy" else n for n in STATE.networks))
    text = firewall.host_table(state, host(), ("eth0",))
    assert "{ 10.0.0.0/16, 10.8.0.0/24 }" in text and "10.0.0.0/24" not in text


def test_the_same_state_makes_the_same_text() -> None:
    ports = host(tcp=(443, 22), trusted=("vmbr1",))
    again = host(tcp=(22, 443), trusted=("vmbr1",))
    assert firewall.host_table(STATE, ports, ("eth0",)) == firewall.host_table(STATE, again, ("eth0",))


def test_a_host_without_a_vpn_forwards_nothing() -> None:
    state = replace(STATE, networks=tuple(replace(network, vpn=None) for network in STATE.networks))
    text = firewall.host_table(state, host(), ("eth0",))
    assert (
        "dnat" not in text and "accept" not in text.split("chain forward")[1].split("}")[0].split("policy accept;")[1]
    )


def test_without_networks_there_is_a_table_all_the_same() -> None:
    assert "policy accept" in firewall.host_table(replace(STATE, networks=(), bridges=()), HostState(), ())


def test_only_the_vpn_turns_forwarding_on_and_never_everywhere() -> None:
    wanted = {**sysctls.bridges(["vmbr0", "vmbr1"]), **sysctls.host_vpn(["eth0.5"], "vmbr0")}
    on = {path for path, value in wanted.items() if path.endswith("/forwarding") and value == "1"}
    assert on == {"net/ipv4/conf/vmbr0/forwarding", "net/ipv4/conf/eth0.5/forwarding"}
    assert wanted["net/ipv4/conf/vmbr1/forwarding"] == "0"


def test_the_first_difference_is_told() -> None:
    assert first_difference("a\n\tb\n", "a\nc\n") == "found 'b', expected 'c'"
    assert first_difference("a\n", "a\nc\n") == "found the end, expected 'c'"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mark": 1}', '{"digest": 1}'])
def test_a_file_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / trial.TRIAL).write_text(text)
    assert trial.read_trial(tmp_path) is None and not trial.pending(tmp_path)
    assert read_kept(tmp_path / trial.TRIAL) is None


def test_what_is_kept_is_read_again_and_for_root_alone(tmp_path: Path) -> None:
    path = kept_path(tmp_path, "inet", "bulkhead-warp0")
    write_kept(path, Kept("d", "t", "l"))
    assert read_kept(path) == Kept("d", "t", "l")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [one.name for one in path.parent.iterdir()] == ["bulkhead-warp0,inet,bulkhead.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, json.dumps(1))
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\udc80")
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]
