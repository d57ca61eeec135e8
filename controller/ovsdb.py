"""OVSDB, read only: which bridge has which datapath id, its fail mode, and whether in-band control is off.

Runs on the `ovs` library's IDL, polled from the controller's own loop. Imports signals.
"""

from __future__ import annotations

import warnings
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it probes for eventlet, which then says that it is deprecated
    from ovs.db.idl import Idl, SchemaHelper

from controller.signals import BridgeFacts

_STRING = {"type": "string"}
_OPTIONAL_STRING = {"type": {"key": "string", "min": 0, "max": 1}}
_SCHEMA: dict[str, Any] = {
    "name": "Open_vSwitch",
    "version": "8.0.0",
    "tables": {
        "Bridge": {
            "columns": {
                "name": _STRING,
                "datapath_id": _OPTIONAL_STRING,
                "fail_mode": _OPTIONAL_STRING,
                "other_config": {"type": {"key": "string", "value": "string", "min": 0, "max": "unlimited"}},
                "controller": {
                    "type": {"key": {"type": "uuid", "refTable": "Controller"}, "min": 0, "max": "unlimited"}
                },
            },
            "isRoot": True,
        },
        "Controller": {"columns": {"target": _STRING, "connection_mode": _OPTIONAL_STRING}, "isRoot": True},
    },
}


class Facts:
    """The bridges of one OVSDB server, e.g. `unix:/var/run/openvswitch/db.sock`."""

    def __init__(self, remote: str) -> None:
        helper = SchemaHelper(schema_json=_SCHEMA)
        helper.register_all()
        self._idl = Idl(remote, helper)
        self._seen = self._never = self._idl.change_seqno

    @property
    def answered(self) -> bool:
        """Whether the server has answered at all."""
        return bool(self._seen != self._never)

    def poll(self) -> tuple[BridgeFacts, ...] | None:
        """Every bridge if anything has changed since the last call, None otherwise. Does not block."""
        self._idl.run()
        if self._idl.change_seqno == self._seen:
            return None
        self._seen = self._idl.change_seqno
        return tuple(_facts(row) for row in self._idl.tables["Bridge"].rows.values())

    def close(self) -> None:
        """End the connection."""
        self._idl.close()


def _facts(row: Any) -> BridgeFacts:
    modes = [controller.connection_mode for controller in row.controller]
    # In-band is what a controller gets unless it, or the whole bridge, says otherwise; unix sockets need none.
    in_band = row.other_config.get("disable-in-band") != "true" and any(
        mode != ["out-of-band"] and not controller.target.startswith(("unix:", "punix:", "ptcp:", "pssl:"))
        for mode, controller in zip(modes, row.controller, strict=True)
    )
    return BridgeFacts(
        name=row.name,
        dpid=int(row.datapath_id[0], 16) if row.datapath_id else 0,
        fail_mode=row.fail_mode[0] if row.fail_mode else "",
        in_band=in_band,
    )
