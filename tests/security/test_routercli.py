"""`bulkhead router` and `bulkhead inference`: what a state file becomes, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from controller.cli import main
from controller.security import inference, router
from controller.security.inference import Inference
from controller.security.router import Settings, Target

PEERS = "[{name: inf1, address: 10.0.0.2}, {name: inf2, address: 10.0.0.3}]"
ROUTER = f"security: {{role: router, name: router1, peers: {PEERS}, limits: {{body_bytes: 99000}}}}"


def run(monkeypatch: pytest.MonkeyPatch, tmp: Path, text: str, *words: str) -> Any:
    """What the command was about to run, or what it said."""
    seen: list[Any] = []
    file = tmp / "node.yaml"
    file.write_text(text)
    monkeypatch.setattr(router, "supervise", lambda read, ready: seen.append(read()))
    monkeypatch.setattr(inference, "serve", lambda settings, ready: seen.append(settings))
    result = CliRunner().invoke(main, [words[0], str(file), "--security-dir", "/sec", *words[1:]])
    return seen[0] if seen else (result.exit_code, result.output)


def test_a_router_asks_its_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run(monkeypatch, tmp_path, ROUTER, "router", "--run-dir", "/run/x")
    assert isinstance(found, Settings), found
    assert found.targets == (Target("inf1", address="10.0.0.2"), Target("inf2", address="10.0.0.3"))
    paths = (found.hpke, found.pki, found.metrics)
    assert paths == (Path("/sec/hpke"), Path("/sec/pki"), Path("/run/x/router.sock"))
    assert found.port == 443 and found.limits.body_bytes == 99000 and not found.client_certificates
    assert Settings.from_json(found.to_json()) == found


def test_in_dev_it_asks_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ("--no-hpke", "--port", "8443", "--on", "127.0.0.1", "--workers", "2")
    found = run(monkeypatch, tmp_path, "security: {role: dev, name: here}", "router", *words)
    assert isinstance(found, Settings), found
    assert found.targets == (Target("inference", socket=Path("/run/inference.sock"), group="router"),)
    assert (found.port, found.hpke, found.hosts, found.workers) == (8443, None, ("127.0.0.1",), 2)


INFERENCE = "security: {role: inference, name: inf1, address: 10.0.0.2, peers: [{name: router1, address: 10.0.0.1}]}"


def test_an_inference_server_has_the_address_of_its_role(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run(monkeypatch, tmp_path, INFERENCE, "inference")
    assert isinstance(found, Inference), found
    assert (found.address, found.port, found.routers, found.socket) == ("10.0.0.2", 8001, ("router1",), None)
    found = run(monkeypatch, tmp_path, "security: {role: dev, name: here}", "inference")
    assert isinstance(found, Inference), found
    assert (found.socket, found.group, found.address) == (Path("/run/inference.sock"), "router", None)


@pytest.mark.parametrize(
    "text, command",
    [
        (INFERENCE, "router"),
        ("security: {role: router, name: r}", "router"),
        (ROUTER, "inference"),
        ("networks: {}", "router"),
    ],
)
def test_a_wrong_role_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, command: str) -> None:
    code, said = run(monkeypatch, tmp_path, text, command)
    assert code in (1, 2) and "Traceback" not in said and said
