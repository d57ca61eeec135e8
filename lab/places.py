"""Where the files lie that are not Python packages: in a checkout beside this one, or installed under the prefix.

Standard library only.
"""

from __future__ import annotations

import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent
_INSTALLED = Path(sys.prefix) / "share" / "bulkhead"

WORLD = Path(__file__).resolve().parent / "world.py"
OVS_LIBRARY = Path(__file__).resolve().parent / "ovs.py"
PROBE = Path(__file__).resolve().parent / "probe.py"


def data_file(name: str) -> Path:
    """The file of that name, relative to the project. Raises `FileNotFoundError`."""
    for root in (_CHECKOUT, _INSTALLED):
        path = root / name
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} is neither in {_CHECKOUT} nor in {_INSTALLED}; install Bulkhead again")


def example() -> Path:
    """The state file that the lab uses unless told otherwise."""
    return data_file("examples/oo1424oo.yaml")


def lab_program() -> Path:
    """The program that runs inside the lab's namespaces."""
    return data_file("mininet/lab.py")
