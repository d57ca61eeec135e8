"""The profile of this machine, for the rest of the security guide. Imports hostmodel, problems and the state file."""

from __future__ import annotations

from pathlib import Path

from controller.hostmodel import (
    SSH_PORT,
    WG_INTERFACE,
    WG_INTERFACES,
    WG_PORT,
    WG_SPARE,
    Limits,
    Profile,
    SecurityPeer,
    SecurityRole,
)
from controller.problems import BulkheadError
from controller.statefile import load

__all__ = [
    "SSH_PORT",
    "WG_INTERFACE",
    "WG_INTERFACES",
    "WG_PORT",
    "WG_SPARE",
    "Limits",
    "Profile",
    "SecurityPeer",
    "SecurityRole",
    "load_profile",
]


def load_profile(file: Path) -> Profile:
    """The profile in a state file. Raises `InvalidInput` where the file is not valid, `BulkheadError` where it has none."""
    profile = load(file).host.security
    if profile is None:
        raise BulkheadError(f"{file} has no section security; add one, such as: security: {{role: router}}")
    return profile
