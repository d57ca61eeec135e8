"""The node oo1424oo as a Mininet topology: two socket bridges, two mesh bridges, and everything on them.

    mn --custom mininet/oo1424oo.py --topo oo1424oo --switch ovs --controller remote,port=6653

gateway and xray are containers of the privacy network (vmbr0), mcp, api and monitoring of the management network
(vmbr1); peer_priv and peer_mgmt are other nodes' hosts across the two meshes; inet plays WARP and the internet behind
it. `--topo oo1424oo,FILE` builds the network of a JSON description instead (`python -m lab.describe STATE > FILE`).

Runs on the system's Python and imports nothing but Mininet; `mn` executes this file inside its own globals, so no name
here may be one of its. The host's own addresses on vmbr0 and vmbr1 are not set here: that is for the lab, which has a
network namespace of its own.
"""

import json

from mininet.link import Link
from mininet.node import Host
from mininet.topo import Topo

BUILT_IN = {
    "node": "oo1424oo",
    "switches": [
        {"name": "vmbr0", "dpid": "000002b37de24b58"},
        {"name": "vmbr1", "dpid": "000002d54f26bf29"},
        {"name": "mesh-privacy", "dpid": "00000267d3d4e2e9"},
        {"name": "mesh-mgmt", "dpid": "000002264e115e30"},
    ],
    "hosts": [
        {
            "name": "gateway",
            "switch": "vmbr0",
            "port": "veth100",
            "mac": "02:11:77:86:2e:78",
            "address": "10.0.0.100/24",
            "loopback": ["10.8.0.1/24"],  # the VPN server's clients
            "routes": ["default via 10.0.0.1 dev eth0 onlink"],
        },
        {
            "name": "xray",
            "switch": "vmbr0",
            "port": "veth102",
            "mac": "02:7b:e8:a2:b7:bd",
            "address": "10.0.0.102/24",
            "loopback": [],
            "routes": ["default via 10.0.0.1 dev eth0 onlink"],
        },
        {
            "name": "mcp",
            "switch": "vmbr1",
            "port": "veth200",
            "mac": "02:19:b5:e8:d4:ca",
            "address": "10.1.0.200/24",
            "loopback": [],
            "routes": ["default via 10.1.0.1 dev eth0 onlink"],
        },
        {
            "name": "api",
            "switch": "vmbr1",
            "port": "veth201",
            "mac": "02:a4:34:1e:54:ec",
            "address": "10.1.0.201/24",
            "loopback": [],
            "routes": ["default via 10.1.0.1 dev eth0 onlink"],
        },
        {
            "name": "monitoring",
            "switch": "vmbr1",
            "port": "veth202",
            "mac": "02:ca:04:9c:2f:fb",
            "address": "10.1.0.202/24",
            "loopback": [],
            "routes": ["default via 10.1.0.1 dev eth0 onlink"],
        },
        {
            "name": "peer_priv",
            "switch": "mesh-privacy",
            "port": "nm-privacy",
            "mac": "02:2f:5a:eb:91:81",
            "address": "10.0.0.50/24",
            "loopback": ["203.0.113.50/32"],  # a VPN client that another node passes on
            "routes": ["default via 10.0.0.1 dev eth0 onlink"],
        },
        {
            "name": "peer_mgmt",
            "switch": "mesh-mgmt",
            "port": "nm-mgmt",
            "mac": "02:1b:f4:57:7d:4d",
            "address": "10.1.0.50/24",
            "loopback": [],
            "routes": ["default via 10.1.0.1 dev eth0 onlink"],
        },
        {
            "name": "inet",
            "switch": "vmbr0",
            "port": "warp0",
            "mac": "02:ea:0e:5b:1d:b6",
            "address": "10.0.0.1/24",
            "loopback": ["198.51.100.10/32", "192.0.2.10/32"],
            "routes": ["10.0.0.0/24 dev eth0 src 198.51.100.10", "10.8.0.0/24 via 10.0.0.100"],
        },
    ],
    "patches": [
        {"switch1": "mesh-privacy", "port1": "to-privacy", "switch2": "vmbr0", "port2": "from-privacy"},
        {"switch1": "mesh-mgmt", "port1": "to-mgmt", "switch2": "vmbr1", "port2": "from-mgmt"},
    ],
}


class PlainLink(Link):
    """A veth pair whose ends compute checksums themselves.

    The userspace datapath takes frames as they are, and a checksum left to hardware that is not there breaks TCP.
    """

    def __init__(self, *args, **params):
        super().__init__(*args, **params)
        for intf in (self.intf1, self.intf2):
            run_in(intf.node, ["ethtool", "-K", intf.name, "tx", "off"])


class PlainHost(Host):
    """A namespace with the addresses and routes of its description, and nothing of Mininet's own choice."""

    def config(self, address=None, loopback=(), routes=(), **_params):
        """Called by Mininet when all links are there."""
        script = [
            "set -e",
            "ip link set lo up",
            # Ask for neighbours with the address of their own subnet, whatever address the packet itself comes from.
            "echo 2 > /proc/sys/net/ipv4/conf/all/arp_announce",
            f"ip address add {address} dev eth0",
            "ip link set eth0 up",
            *(f"ip address add {extra} dev lo" for extra in loopback),
            *(f"ip route replace {route}" for route in routes),
        ]
        run_in(self, ["sh", "-c", "\n".join(script)])
        return {}


def run_in(node, command):
    """Run a command in a node; what goes wrong is an error, not a line nobody reads."""
    out, err, code = node.pexec(command)
    if code:
        raise RuntimeError(f"{node.name}: {' '.join(command)}: exit {code}: {(err or out).strip()}")


class OneFourTwoFour(Topo):
    """The switches, hosts and links of a description; the built-in one where none is given."""

    def build(self, description=None):
        """`description` is a path to a JSON file or the description itself."""
        if isinstance(description, str):
            with open(description, encoding="utf-8") as file:
                description = json.load(file)
        described = description or BUILT_IN
        for switch in described["switches"]:
            self.addSwitch(
                switch["name"],
                dpid=switch["dpid"],
                datapath="user",
                failMode="secure",
                protocols="OpenFlow14",
                listenPort=None,  # `mn` would let anybody change flows through a port of its own
            )
        for host in described["hosts"]:
            self.addHost(
                host["name"],
                cls=PlainHost,
                address=host["address"],
                loopback=host["loopback"],
                routes=host["routes"],
            )
            # The host's end is made inside its namespace: there is never a second eth0 beside the real one.
            self.addLink(
                host["name"],
                host["switch"],
                cls=PlainLink,
                intfName1="eth0",
                intfName2=host["port"],
                addr1=host["mac"],
            )
        for patch in described["patches"]:
            self.addLink(
                patch["switch1"],
                patch["switch2"],
                cls=PlainLink,
                intfName1=patch["port1"],
                intfName2=patch["port2"],
            )


topos = {"oo1424oo": OneFourTwoFour}
