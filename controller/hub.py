"""Chooses the thread hub. Import this before anything of os-ken.

os-ken 4 runs native threads unless told otherwise; there, an exception ends an app's loop silently. We run eventlet,
with the standard library made cooperative, and use of the hub only `spawn`, `spawn_after`, `sleep` and `Queue`.
"""

from __future__ import annotations

import os
import warnings

os.environ["OSKEN_HUB_TYPE"] = "eventlet"
os.environ["EVENTLET_NO_GREENDNS"] = "yes"  # its resolver takes 0.1 s to import, and addresses are numbers here

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # eventlet says that it is deprecated; os-ken needs it all the same
    import eventlet

    # os-ken's own `hub.patch` would make threads cooperative and leave sockets and TLS blocking.
    eventlet.monkey_patch(socket=True, select=True, time=True)
    from os_ken.lib import hub

Queue = hub.Queue
sleep = hub.sleep
spawn = hub.spawn
spawn_after = hub.spawn_after

__all__ = ["Queue", "sleep", "spawn", "spawn_after"]
