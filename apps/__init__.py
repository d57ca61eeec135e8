"""The apps: one per concern of the pipeline, each a pure function from a snapshot to flows.

An app yields flows for the network as a whole (`shared`), for each member (`member`), for each rule of the state
file (`rule`), for each passage (`passage`) and for what grants open for a member (`crossing`). It sees nothing else, keeps nothing, and talks to no switch. Apps import the pipeline, `base` and `learning`,
never each other and never os-ken.
"""

from apps.admission import Admission
from apps.base import App
from apps.crossover import Crossover
from apps.egress import Egress
from apps.forwarding import Forwarding
from apps.grants import Grants
from apps.isolation import Isolation
from apps.neighbour import Neighbour
from apps.output_guard import OutputGuard
from apps.packet_in import PacketIn
from apps.return_path import ReturnPath
from apps.services import Services
from apps.spoof_guard import SpoofGuard

SOCKET_APPS: tuple[App, ...] = (
    Admission(),
    SpoofGuard(),
    Neighbour(),
    Grants(),
    Isolation(),
    Services(),
    ReturnPath(),
    Egress(),
    Forwarding(),
    OutputGuard(),
    PacketIn(),
)
"""The apps of a socket bridge, in the order of their tables."""

MESH_APP = Crossover()
"""The app of a mesh bridge."""

APP_NAMES: dict[int, str] = {**{app.id: app.name for app in SOCKET_APPS}, MESH_APP.id: MESH_APP.name}
"""App id, as cookies hold it, to name."""

__all__ = ["APP_NAMES", "MESH_APP", "SOCKET_APPS", "App", "Crossover"]
