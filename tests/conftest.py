"""Laws are tried however busy the machine is: how long an example takes says nothing about the law.

Tests start programs of ours many hundred times, which find their modules compiled: also where the environment has
Python keep nothing.
"""

import gc
import os
import sys

from hypothesis import HealthCheck, settings

settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
gc.set_threshold(50_000)
