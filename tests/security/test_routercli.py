"""`bulkhead router` and `bulkhead inference`: what a state file becomes, and how mistakes are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from controller import routercli
from controller.cli import main
from controller.security import inference, router
from controller.security.router import Limits, Settings, Target


@dataclass
class Peer:
    name: str
    address: str


@dataclass
class Profile:
    role: str = "router"
    name: str = "router1"
    address: str = "10.0.0.1"
    listen: int = 443
    peers: list[Peer] = field(default_factory=lambda: [Peer("inf1", "10.0.0.2"), Peer("inf2", "10.0.0.3")])
    socket: Path | None = None
    socket_group: str | None = "router"
    inference_port: int = 8001
    limits: Limits = field(default_factory=lambda: Limits(body_bytes=99))


def run(monkeypatch: pytest.MonkeyPatch, profile: Any, *words: str) -> Any:
    """What the command was about to run, or what it said."""
    seen: list[Any] = []
    monkeypatch.setattr(routercli, "_profile", lambda file: profile)
    monkeypatch.setattr(router, "supervise", lambda read, ready: seen.append(read()))
    monkeypatch.setattr(inference, "serve", lambda settings, ready: seen.append(settings))
    result = CliRunner().invoke(main, [words[0], "node.yaml", "--security-dir", "/sec", *words[1:]])
    return seen[0] if seen else (result.exit_code, result.output)


def test_a_router_asks_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, Profile(), "router", "--run-dir", "/run/x")
    assert isinstance(found, Settings)
    assert found.targets == (Target("inf1", address="10.0.0.2"), Target("inf2", address="10.0.0.3"))
    assert (found.port, found.hpke, found.pki, found.metrics) == (
        443,
        Path("/sec/hpke"),
        Path("/sec/pki"),
        Path("/run/x/router.sock"),
    )
    assert found.limits.body_bytes == 99 and not found.client_certificates
    assert Settings.from_json(found.to_json()) == found


def test_in_dev_it_asks_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--no-hpke", "--port", "8443", "--on", "127.0.0.1", "--workers", "2")
    found = run(monkeypatch, Profile(role="dev", peers=[]), "router", *words)
    assert found.targets == (Target("inference", socket=Path("/run/inference.sock"), group="router"),)
    assert (found.port, found.hpke, found.hosts, found.workers) == (8443, None, ("127.0.0.1",), 2)


def test_an_inference_server_has_the_address_of_its_role(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, Profile(role="inference", name="inf1", peers=[Peer("router1", "10.0.0.1")]), "inference")
    assert (found.address, found.port, found.routers, found.socket) == ("10.0.0.1", 8001, ("router1",), None)
    found = run(monkeypatch, Profile(role="dev"), "inference")
    assert (found.socket, found.group, found.address) == (Path("/run/inference.sock"), "router", None)


@pytest.mark.parametrize(
    "profile, words",
    [
        (Profile(role="inference"), ("router",)),
        (Profile(peers=[]), ("router",)),
        (Profile(role="router"), ("inference",)),
    ],
)
def test_a_wrong_role_is_told(monkeypatch: pytest.MonkeyPatch, profile: Profile, words: tuple[str, ...]) -> None:
    code, text = run(monkeypatch, profile, *words)
    assert code == 2 and "Traceback" not in text and text.startswith("bulkhead: ")
