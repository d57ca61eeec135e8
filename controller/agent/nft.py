"""nftables: one table of ours, loaded in one transaction, read back and compared.

nft prints a table otherwise than it was written, so what it prints right after loading is kept beside the digest of what
was wanted; later the table must still be printed so. No other table is ever named. Imports files, nftgen, resource, run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from controller.agent.files import read_or_none, write_atomically
from controller.agent.nftgen import Generation, generation
from controller.agent.resource import Change, Failed, Sign
from controller.agent.run import NETNS_DIR, call

TABLE = "bulkhead"
"""The name of every table of ours, whatever its family."""
_TRIES = 3
_ABSENT = ("No such file or directory", "does not exist")


@dataclass(frozen=True, slots=True)
class Kept:
    """What was loaded last: the digest of the wanted text, the text, and how nft printed it afterwards."""

    digest: str
    text: str
    listing: str


def text_digest(text: str) -> str:
    """A name for a wanted text."""
    return hashlib.sha256(text.encode()).hexdigest()


def transaction(family: str, text: str = "") -> str:
    """What makes nft put `text` in the place of our table of that family, as a whole or not at all; without text, the
    table goes."""
    return f"add table {family} {TABLE}\ndelete table {family} {TABLE}\n{text}"


async def listing(family: str, namespace: str | None = None) -> str | None:
    """Our table as nft prints it without counters, None if it is not there. Raises `Failed`."""
    try:
        return await call("nft", "-s", "list", "table", family, TABLE, namespace=namespace)
    except Failed as exc:
        if any(word in str(exc) for word in _ABSENT):
            return None
        raise


async def as_printed(text: str) -> str:
    """How nft prints a table `inet` of ours once it is loaded: tried in a network namespace that is gone right after.

    Raises `Failed`.
    """
    script = f"nft -f - && nft -s list table inet {TABLE}"
    return await call("unshare", "--net", "--", "sh", "-c", script, stdin=text)


class NftTable:
    """Our table of one `family`, in a named network namespace or the host's, as `text` says or answers.

    `text` is `table FAMILY bulkhead { … }`. A `text` that is asked for anew each time lets the table follow what is
    there, such as the ports of `firewall.ingress_table`.
    """

    def __init__(
        self,
        family: str,
        text: str | Callable[[], str],
        run_dir: Path,
        namespace: str | None = None,
        needs: Sequence[str] = (),
    ) -> None:
        self.family, self.namespace = family, namespace
        self.key = "/".join(filter(None, ("nft", namespace, family, TABLE)))
        self.needs = tuple(needs)
        self.watches = (namespace,) if callable(text) else ()
        self._text = text
        self._good: tuple[Generation, str] | None = None
        self._kept = kept_path(run_dir, family, namespace)

    @property
    def what(self) -> str:
        """The table, for people."""
        place = f" in {self.namespace}" if self.namespace else ""
        return f"nftables table {self.family} {TABLE}{place}"

    def wanted(self) -> str:
        """The text that is wanted now."""
        return self._text if isinstance(self._text, str) else self._text()

    def _has_place(self) -> bool:
        return self.namespace is None or (NETNS_DIR / self.namespace).exists()

    async def diff(self) -> list[Change]:
        """Load it where it is missing, was changed, or another text is wanted."""
        text = self.wanted()

        async def load() -> None:
            await self.load(text)

        if not self._has_place():
            return [Change(Sign.ADD, self.what, "missing", load)]
        # A device that goes takes its chain with it, and no new state is counted for that.
        now = generation(self.namespace) if self.family != "netdev" else None
        if now is not None and (now, text) == self._good:
            return []
        self._good = None
        found = await listing(self.family, self.namespace)
        if found is None:
            return [Change(Sign.ADD, self.what, "missing", load)]
        kept = read_kept(self._kept)
        if kept is None:
            return [Change(Sign.CHANGE, self.what, "not known to be as wanted", load)]
        if kept.digest != text_digest(text):
            return [
                Change(Sign.CHANGE, self.what, f"other rules are wanted: {first_difference(kept.text, text)}", load)
            ]
        if kept.listing != found:
            return [Change(Sign.CHANGE, self.what, f"was changed: {first_difference(found, kept.listing)}", load)]
        self._good = now and (now, text)
        return []

    async def load(self, text: str | None = None) -> None:
        """Put the wanted text in the table's place, as a whole or not at all. Raises `Failed`."""
        text = self.wanted() if text is None else text
        printed = None
        for _ in range(_TRIES):
            before = generation(self.namespace)
            await call("nft", "-f", "-", namespace=self.namespace, stdin=transaction(self.family, text))
            printed = await listing(self.family, self.namespace)
            after = generation(self.namespace)
            # What somebody else did in between must not be remembered as wanted.
            if before is None or after is None or after.number - before.number == 1:
                break
        if printed is None:
            raise Failed(f"{self.what} was loaded and is gone again; see who else manages nftables here")
        write_kept(self._kept, Kept(text_digest(text), text, printed))

    async def remove(self) -> None:
        """Take the table away, if it and its namespace are there. Raises `Failed`."""
        if self._has_place():
            await call("nft", "-f", "-", namespace=self.namespace, stdin=transaction(self.family))
        self._kept.unlink(missing_ok=True)


def kept_path(run_dir: Path, family: str, namespace: str | None = None) -> Path:
    """Where the last loading of a table is remembered. No interface's or namespace's name has a comma."""
    parts = filter(None, (namespace, family, TABLE))
    return run_dir / "nft" / (",".join(part.replace("/", ",") for part in parts) + ".json")


def read_kept(path: Path) -> Kept | None:
    """What was kept there, None if nothing that can be read."""
    text = read_or_none(path)
    if text is None:
        return None
    try:
        found = json.loads(text)
        return Kept(str(found["digest"]), str(found["text"]), str(found["listing"]))
    except (ValueError, KeyError, TypeError):
        return None


def write_kept(path: Path, kept: Kept) -> None:
    """Remember it."""
    write_atomically(path, json.dumps({"digest": kept.digest, "text": kept.text, "listing": kept.listing}))


def first_difference(found: str, expected: str) -> str:
    """The first line of two texts that differs, in words."""
    pairs = zip_longest(_lines(found), _lines(expected))
    for here, there in pairs:
        if here != there:
            return f"found {_shown(here)}, expected {_shown(there)}"
    return "the same but for white space"


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line]


def _shown(line: str | None) -> str:
    return "the end" if line is None else repr(line)


def rule_differences(found: str | None, wanted: str) -> tuple[str, ...]:
    """Every rule that differs between two tables as nft prints them, in words; `found` is None where there is none."""
    if found is None:
        return (f"there is no table inet {TABLE}: no rule is loaded",)
    here, there = _chains(found), _chains(wanted)
    out = []
    for chain in dict.fromkeys((*there, *here)):
        if chain not in here:
            out.append(f"chain {chain} is missing, with its {len(there[chain])} lines")
        elif chain not in there:
            out.append(f"chain {chain} is nobody's: {'; '.join(here[chain])}")
        else:
            out += _rule_changes(chain, here[chain], there[chain])
    return tuple(out)


def _chains(text: str) -> dict[str, list[str]]:
    """The lines of every block of a table, by its name ("input", or "set names")."""
    out: dict[str, list[str]] = {}
    name = ""
    for line in _lines(text):
        if line.endswith("{") and not line.startswith("table "):
            name = line.removesuffix("{").strip().removeprefix("chain ")
            out[name] = []
        elif line == "}":
            name = ""
        elif name:
            out[name].append(line)
        elif not line.startswith("table "):
            out.setdefault("table", []).append(line)
    return out


def _rule_changes(chain: str, here: list[str], there: list[str]) -> list[str]:
    matcher = difflib.SequenceMatcher(a=there, b=here, autojunk=False)
    out = []
    for what, a, b, c, d in matcher.get_opcodes():
        if what == "equal":
            continue
        out += [f"chain {chain}, line {n + 1}: missing: {there[n]}" for n in range(a, b)]
        out += [f"chain {chain}, line {n + 1}: not wanted: {here[n]}" for n in range(c, d)]
    return out
