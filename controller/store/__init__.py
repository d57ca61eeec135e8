"""The store: an OVSDB database with everything that was made while the system runs, shared by all nodes.

`Store` reads and changes it from any thread; `Link` follows it from a loop that must not block.
"""

from controller.store.errors import Clash, Unavailable
from controller.store.link import Link
from controller.store.store import Change, Store
from controller.store.wire import Tls

__all__ = ["Change", "Clash", "Link", "Store", "Tls", "Unavailable"]
