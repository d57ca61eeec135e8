"""Flows that somebody wrote by hand for two networks, with every mistake that such flows have."""

from __future__ import annotations

PRIVACY = """\
priority=100,udp,tp_dst=51820,actions=output:veth100
priority=100,in_port=veth100,actions=output:warp0
priority=100,in_port=veth102,actions=output:warp0
priority=100,in_port=warp0,actions=learn(table=1,hard_timeout=300,priority=110,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],output:NXM_OF_IN_PORT[]),output:normal
priority=90,in_port=from-privacy,actions=output:warp0
priority=10,actions=normal
"""
"""On vmbr0: VPN server veth100, proxy veth102, tunnel warp0, mesh from-privacy."""

MANAGEMENT = """\
priority=100,tcp,tp_dst=9573,actions=output:veth201
priority=100,tcp,tp_dst=9574,actions=output:veth201
priority=90,in_port=from-mgmt,actions=normal
priority=10,actions=normal
"""
"""On vmbr1: API veth201, mesh from-mgmt; the MCP server, veth200, offers 9573 too."""

CROSSING_THERE = "priority=150,in_port=veth202,tcp,tp_dst=8080,nw_dst=10.0.0.102,actions=output:from-mgmt\n"
CROSSING_BACK = "priority=150,in_port=from-privacy,tcp,tp_src=8080,nw_src=10.0.0.102,actions=output:to-privacy\n"
"""A way from monitoring to the proxy and back, told by ports alone."""
