"""The host's own nftables table as a resource. Imports files, firewall, nft, resource, trial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from controller.agent.files import read_or_none
from controller.agent.firewall import host_table
from controller.agent.nft import NftTable, text_digest
from controller.agent.resource import Change, Failed, Sign
from controller.agent.trial import FAMILY, end_trial, locked, pending, read_trial, rejected, roll_back
from controller.hostmodel import HostState
from controller.model import DesiredState

_UP, _REJECT = 0x1, 0x200  # RTF_UP, RTF_REJECT


def default_uplinks() -> tuple[str, ...]:
    """The interfaces that a default route of the main table leads to, of either family, sorted."""
    found = set()
    for line in (read_or_none(Path("/proc/net/route")) or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == fields[7] == "0" * 8 and _leads(fields[3]):
            found.add(fields[0])
    for line in (read_or_none(Path("/proc/net/ipv6_route")) or "").splitlines():
        fields = line.split()
        if len(fields) > 9 and fields[0] == "0" * 32 and fields[1] == "00" and _leads(fields[8]):
            found.add(fields[9])
    return tuple(sorted(found - {"lo"}))


def _leads(flags: str) -> bool:
    return int(flags, 16) & (_UP | _REJECT) == _UP


def wanted_host_table(state: DesiredState, host: HostState) -> str:
    """The host's table, with the uplinks that are declared, else those that default routes lead to now."""
    return host_table(state, host, host.uplinks or default_uplinks())


class HostTable(NftTable):
    """`table inet bulkhead` of the host. `run_dir` is the agent's own.

    While a table is on trial it is left alone.
    """

    def __init__(self, state: DesiredState, host: HostState, run_dir: Path, needs: Sequence[str] = ()) -> None:
        # Asked for each time: the default route may come later, and move.
        super().__init__(FAMILY, lambda: wanted_host_table(state, host), run_dir, None, needs)
        self.run_dir = run_dir

    async def diff(self) -> list[Change]:
        """As for any table. Raises `Failed` where the wanted one was tried and not confirmed."""
        trial = read_trial(self.run_dir)
        if trial is not None:
            return [self._late(trial.mark)] if trial.overdue else []
        if rejected(self.run_dir) == text_digest(self.wanted()):
            raise Failed(
                f"{self.what} stays as it was: what the state file wants was tried and not confirmed. Change the file, "
                "or load it all the same: bulkhead firewall apply FILE"
            )
        return await super().diff()

    def _late(self, mark: str) -> Change:
        async def back() -> None:
            await roll_back(self.run_dir, mark)

        return Change(Sign.CHANGE, self.what, "was on trial, and nobody has confirmed it", back)

    async def load(self, text: str | None = None) -> None:
        """Load it, unless a trial has begun since it was looked at. Raises `Failed`."""
        async with locked(self.run_dir):
            if not pending(self.run_dir):
                await super().load(text)

    async def remove(self) -> None:
        """Take it away; a trial ends with it. Raises `Failed`."""
        async with locked(self.run_dir):
            end_trial(self.run_dir)
            await super().remove()
