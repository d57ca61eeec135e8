"""What takes long in here is tried with BULKHEAD_FULL=1 only, so that the default run stays below ten minutes on two cores."""

import os

LONG = ("test_wg.py", "test_role_firewall.py", "test_router.py", "test_router_limits.py", "test_router_reload.py")
collect_ignore = [] if os.environ.get("BULKHEAD_FULL") else list(LONG)
