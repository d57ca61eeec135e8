"""Return paths: learned when traffic goes out, looked up when it comes back."""

from __future__ import annotations

from collections.abc import Iterator

from apps.base import App
from apps.learning import APP_ID
from controller.flow import Flow, Resubmit
from controller.frame import Frame
from controller.pipeline import EGRESS, RETURN, SERVICE, Band, Then


class ReturnPath(App):
    """SERVICE's rest, RETURN.

    SERVICE: 100 everything no service claimed consults RETURN and goes on to EGRESS. RETURN holds learned flows only
    (priority 100), made by EGRESS for packets that leave through the tunnel and by SERVICE for VPN clients and the host.
    """

    id = APP_ID
    name = "return_path"
    tables = (SERVICE, RETURN)

    def shared(self, frame: Frame) -> Iterator[Flow]:
        yield SERVICE.flow(Band.REST, self.own_network(frame), Then((Resubmit(RETURN.id),), EGRESS))
