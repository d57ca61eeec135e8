"""An Open vSwitch that is asked and carries nothing: flows are loaded, and `ofproto/trace` tells what it would do.

Its datapath and ports are dummies, so no kernel module is needed and a thousand questions take a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ovs.unixctl.client import UnixctlClient  # type: ignore[import-untyped]

from controller.flow import Flow
from controller.ovsctl import Traced, datapath_ports, parse_trace
from lab.ovs import PrivateOvs


class Tracer(PrivateOvs):
    """Use as a context manager."""

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory, datapath="dummy")
        self._client: UnixctlClient | None = None
        self._ports: dict[int, tuple[str, int]] = {}

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
        self._ports.clear()

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

    def traced(self, bridge: str, packet: str, *options: str) -> Traced:
        """What `ofproto/trace` says, taken apart."""
        if not self._ports:
            self._ports = datapath_ports(self.ask("dpif/show"))
        return parse_trace(self.trace(bridge, packet, *options), self._ports)

    def outputs(self, bridge: str, packet: str, *options: str) -> frozenset[tuple[str, int]]:
        """Where the packet leaves: (bridge, port number); not counting the controller."""
        return self.traced(bridge, packet, *options).sent

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
        super().close()
