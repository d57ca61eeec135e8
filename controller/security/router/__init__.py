"""The router: TLS 1.3 from clients, a streaming reverse proxy to inference servers. `docs/router.md` tells how it behaves.

`supervise` is the way in. One process keeps sockets, events and figures; workers, which it starts and replaces, do the
rest. Imports problems, events, eventlog, `controller.security.tls` and `controller.security.hpke`.
"""

from controller.security.router.settings import Limits, Settings, Target
from controller.security.router.supervisor import supervise

__all__ = ["Limits", "Settings", "Target", "supervise"]
