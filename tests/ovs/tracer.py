"""An Open vSwitch that is asked and carries nothing: flows are loaded, and `ofproto/trace` tells what it would do.

Its datapath and ports are dummies, so no kernel module is needed and a thousand questions take a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ovs.unixctl.client import UnixctlClient  # type: ignore[import-untyped]

from controller.flow import Flow
from lab.ovs import PrivateOvs

_PORT = re.compile(r"^\s+(\S+) (\d+)/(none|\d+):", re.M)
_LOCAL = 0xFFFE


class Tracer(PrivateOvs):
    """Use as a context manager."""

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory, datapath="dummy")
        self._client: UnixctlClient | None = None
        self._numbers: dict[str, dict[int, tuple[str, int]]] = {}

    def bridge(self, name: str, ports: Mapping[str, int], flows: Iterable[Flow | str] = ()) -> None:
        """A bridge with ports of these numbers (LOCAL is there anyhow), in place of one of that name."""
        calls = ["--if-exists", "del-br", name, "--", "add-br", name]
        calls += ["--", "set", "bridge", name, "datapath_type=dummy", "fail_mode=secure", "protocols=OpenFlow14"]
        for port, number in ports.items():
            if number < 0xFF00:
                calls += ["--", "add-port", name, port, "--", "set", "interface", port, "type=dummy"]
                calls += [f"ofport_request={number}"]
        self.vsctl(*calls)
        self.load(name, flows)
        self.forget()

    def forget(self) -> None:
        """Ports have changed."""
        self._numbers.clear()

    def load(self, name: str, flows: Iterable[Flow | str]) -> None:
        """Have these flows and no other."""
        self.ofctl("--bundle", "replace-flows", name, "-", stdin="\n".join(map(str, flows)) + "\n")

    def ask(self, command: str, *args: str) -> str:
        """ovs-appctl on a connection that stays."""
        if self._client is None:
            error, self._client = UnixctlClient.create(str(self.ctl))
            assert not error, error
        assert self._client is not None
        code, error, answer = self._client.transact(command, list(args))
        assert not code and not error, f"{command} {args}: {error or answer}"
        return str(answer)

    def trace(self, bridge: str, packet: str, *options: str) -> str:
        """What `ofproto/trace` prints for a packet in ovs-ofctl's words."""
        return self.ask("ofproto/trace", bridge, packet, *options)

    def outputs(self, bridge: str, packet: str, *options: str) -> frozenset[tuple[str, int]]:
        """Where the packet leaves: (bridge, port number); not counting the controller."""
        answer = self.trace(bridge, packet, *options)
        found = re.search(r"^Datapath actions: (.*)$", answer, re.M)
        assert found is not None, answer
        return frozenset(self._port(number) for number in _top_level_numbers(found[1]))

    def _port(self, datapath_port: int) -> tuple[str, int]:
        if not self._numbers:
            bridge = ""
            ports: dict[int, tuple[str, int]] = {}
            for line in self.ask("dpif/show").splitlines():
                if (port := _PORT.match(line)) is not None:
                    if port[3] != "none":
                        ports[int(port[3])] = (bridge, int(port[2]))
                elif line.startswith("  ") and line.rstrip().endswith(":"):
                    bridge = line.strip().rstrip(":")
            self._numbers = {"": ports}
        return self._numbers[""][datapath_port]

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        super().close()


def _top_level_numbers(actions: str) -> list[int]:
    """Plain outputs among datapath actions: numbers that stand in no parentheses, and those in clone(…)."""
    actions = re.sub(r"\bclone\(", "(", actions)
    depth, word, out = 0, "", []
    inner = [True]
    for char in actions + ",":
        if char == "(":
            inner.append(not word and inner[-1])
            depth += 1
            word = ""
        elif char in ",)":
            if inner[-1] and word.isdecimal():
                out.append(int(word))
            word = ""
            if char == ")":
                inner.pop()
                word = "x"
        else:
            word += char
    return out
