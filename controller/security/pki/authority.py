"""The CA: it signs, renews, revokes, and is replaced. Imports the rest of the package.

Every change is decided by one file, `state.json`; what follows from it is made again from there if a process died before.
A certificate is written down before it exists, so that none can escape a revocation, and is tried before it is used.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from cryptography import x509

from controller.eventfiles import EventLogError
from controller.eventlog import EventLog
from controller.events import Event, Kind
from controller.problems import BulkheadError
from controller.security.pki import delivery, making
from controller.security.pki.disk import Disk, locked, read
from controller.security.pki.holder import Holder
from controller.security.pki.identity import DAYS, Identity, check_name
from controller.security.pki.state import Authority, Entry, Export, Phase, Role, State
from controller.wgkeys import Secret

LOG = logging.getLogger("bulkhead.pki")
SETTLE_S = 5.0
"""Between the steps of a CA's replacement: so long may running programs take to read what the last step has changed."""
CRL_AGE = dt.timedelta(days=1)
"""Lists of revocations are written anew when they are older, although they are good for a week."""
CRL_ALARM = dt.timedelta(days=3)
"""Something keeps a list from being written anew if less of its life is left."""


class Move(StrEnum):
    """A step of the CA's replacement."""

    PREPARE = "prepare"
    SWITCH = "switch"
    FINISH = "finish"
    BACK = "back"


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate in use. `directory` has the pair; servers use `current`, a link that follows renewals."""

    name: str
    serial: str
    directory: Path
    current: Path
    not_after: dt.datetime
    renew_at: dt.datetime


@dataclass(frozen=True, slots=True)
class Due:
    """Something that wants doing. `alarm`: soon it stops working, or has stopped. `subject` is a name, `ca` or `crl`."""

    subject: str
    why: str
    fix: str
    at: dt.datetime
    ends: dt.datetime
    alarm: bool


def utc_now() -> dt.datetime:
    """The time."""
    return dt.datetime.now(dt.UTC)


class Pki:
    """A CA in a directory. Changes are made by one process at a time; questions need no lock.

    `passphrase` is for the CA's key, where that is encrypted. Methods raise `BulkheadError`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        passphrase: Secret | None = None,
        disk: Disk | None = None,
        clock: Callable[[], dt.datetime] = utc_now,
    ) -> None:
        self.directory = directory
        self.holder = Holder(directory, disk)
        self._disk, self._passphrase, self._clock = self.holder.disk, passphrase, clock

    # - questions

    @property
    def is_ca(self) -> bool:
        """Whether there is a CA in its directory."""
        return (self.directory / "state.json").exists()

    @property
    def state(self) -> State:
        """What it knows. Raises `BulkheadError` if there is no CA here."""
        path = self.directory / "state.json"
        text = read(path)
        if text is None:
            raise BulkheadError(f"there is no CA in {self.directory}; make one: bulkhead pki init NAME")
        return State.from_json(text, str(path))

    def revoked(self, identity: str) -> bool:
        """Whether that name is revoked."""
        return identity in self.state.revoked

    def authority(self, name: str) -> x509.Certificate:
        """A CA's certificate."""
        path = self.directory / "ca" / name / "cert.pem"
        return making.certificates(read(path) or b"", str(path))[0]

    def in_use(self, name: str, state: State | None = None) -> Entry | None:
        """The certificate of a name that is in use: here, or as far as known on the machine that has the key."""
        state = state or self.state
        identity = state.identity(name)
        if identity is None or identity.remote:
            return state.newest(name)
        found = self.holder.current(name)
        if found is None:
            return None
        serial = making.serial_text(found.serial_number)
        return next((one for one in state.entries if one.serial == serial), None)

    def needs_renewal(self) -> list[Due]:
        """What wants doing now: certificates to renew, a CA past half its life, revocations that grow old. Changes nothing."""
        state, now = self.state, self._clock()
        found = [due for one in state.identities if (due := self._leaf_due(state, one, now))]
        for name in state.trusted:
            ca = self.authority(name)
            half = making.half_life(ca)
            if name == state.active and state.phase is not Phase.PREPARED and now >= half:
                fix = "replace it: bulkhead pki rotate-ca prepare"
                found.append(Due("ca", "the CA is past half its life", fix, half, ca.not_valid_after_utc, True))
        for export in state.exports:
            if not delivery.up_to_date(export, self.holder):
                fix = f"bulkhead pki renew --due, or bulkhead pki export --forget {export.directory}"
                found.append(Due(export.directory, f"what {export.name} uses there is behind", fix, now, now, True))
        return found + lists_due(self.holder, now)

    def _leaf_due(self, state: State, identity: Identity, now: dt.datetime) -> Due | None:
        if identity.name in state.revoked:
            return None
        entry = self.in_use(identity.name, state)
        if identity.remote:
            fix = f"on its machine: bulkhead pki request {identity.name}; here: bulkhead pki sign FILE"
        else:
            fix = f"bulkhead pki renew {identity.name}"
        if entry is None:
            return Due(identity.name, "it has no certificate", fix, now, now, True)
        ends = dt.datetime.fromtimestamp(entry.not_after, dt.UTC)
        at = _renew_at(entry)
        alarm = now >= at + (ends - at) / 2
        if now >= ends:
            return Due(identity.name, "its certificate has ended", fix, at, ends, True)
        if entry.revoked_at is not None:
            return Due(identity.name, "its certificate is revoked, its name is not any more", fix, now, ends, True)
        if entry.authority != state.active:
            why = "its certificate is of the CA that goes" if state.phase is Phase.SWITCHED else "it is of another CA"
            return Due(identity.name, why, fix, now, ends, alarm)
        return (
            Due(identity.name, "its certificate is past two thirds of its life", fix, at, ends, alarm)
            if now >= at
            else None
        )

    # - changes

    def init(self, name: str) -> str:
        """Make a CA; its identifier. Does nothing but mend if there is one of that name already."""
        check_name(name)
        self._disk.directory(self.directory)
        with locked(self.directory):
            if (self.directory / "state.json").exists():
                state = self.state
                if state.name != name:
                    raise BulkheadError(
                        f"there is a CA called {state.name} in {self.directory} already; name another directory"
                    )
                self._settle(state)
                return state.active
            self._disk.sweep(self.directory)
            made = self._new_authority(name)
            state = State(name, (Authority(made, Role.ACTIVE),))
            self._save(state)
            self._settle(state)
            return made

    def mend(self) -> None:
        """Complete what an interrupted command left, and write lists of revocations anew that are a day old."""
        with self._changing():
            pass

    def issue(
        self,
        name: str,
        kind: str,
        ips: Sequence[str] = (),
        dns: Sequence[str] = (),
        days: float = DAYS,
    ) -> Issued:
        """Make a key and a certificate for a name, which may have had others before; use it if it works."""
        identity = Identity.checked(name, kind, ips, dns, days)
        with self._changing() as state:
            state = self._granted(state, identity)
            found = self._issue(state, identity)
            self._tell(Kind.CERT_RENEWED, f"{name} has a certificate until {found.not_after:%Y-%m-%d %H:%M} UTC.", name)
            return found

    def renew(self, name: str) -> Issued:
        """Make a new key and certificate for a name that has one; use it if it works."""
        with self._changing() as state:
            identity = self._known(state, name)
            if identity.remote:
                raise BulkheadError(
                    f"the key of {name} is on its own machine; there: bulkhead pki request {name}; here: bulkhead pki sign FILE"
                )
            self._check_not_revoked(state, name)
            found = self._issue(state, identity)
            self._tell(
                Kind.CERT_RENEWED, f"{name} has a new certificate until {found.not_after:%Y-%m-%d %H:%M} UTC.", name
            )
            return found

    def renew_due(self) -> list[Issued]:
        """Renew whatever is due and has its key here; write revocations anew; alarm about the rest."""
        names = [due.subject for due in self.needs_renewal()]
        state = self.state
        here = [one.name for one in state.identities if not one.remote and one.name in names]
        done = [self.renew(name) for name in here]
        self.mend()
        self.alarm()
        return done

    def replace_all(self, *, settle_s: float = SETTLE_S) -> tuple[list[Issued], list[str]]:
        """Renew everything, wait until running programs use it, then revoke every certificate from before.

        Answers what was issued, and names whose keys are elsewhere: revoke those, or sign new requests of theirs and then call
        `revoke_earlier`. For when keys may have been stolen. If it is interrupted, run it again.
        """
        state = self.state
        names = [one.name for one in state.identities if one.name not in state.revoked]
        elsewhere = [one.name for one in state.identities if one.remote and one.name in names]
        done = [self.renew(name) for name in names if name not in elsewhere]
        time.sleep(self.unsettled_s(settle_s))
        for one in done:
            self.revoke_earlier(one.name)
        return done, elsewhere

    def revoke_earlier(self, name: str) -> None:
        """Revoke every certificate of a name but the last one."""
        with self._changing() as state:
            self._known(state, name)
            moved = state.with_earlier_revoked(name, self._clock().timestamp())
            if moved == state:
                return
            last, used = moved.newest(name), self.in_use(name, state)
            if used is not None and used != last:
                raise BulkheadError(f"{name} uses an earlier certificate; renew it first: bulkhead pki renew {name}")
            self._save(moved)
            self._publish(moved)
            self._tell(Kind.CERT_REVOKED, f"The certificates that {name} had before its last one are revoked.", name)

    def back(self, name: str) -> None:
        """Use the certificate again that a name had before."""
        with self._changing() as state:
            self._check_not_revoked(state, name)
            self._known(state, name)
            self.holder.back(name)

    def sign(self, request: bytes, granted: Identity | None = None, *, name: str | None = None) -> bytes:
        """Sign what a machine asks for with a key of its own; the bundle to send back.

        A name that is not known yet needs `granted`: what may be in its certificate is said here, not there.
        """
        found, key = making.read_request(request, "the request")
        asked, name = name, making.name_of(found)
        check_name(name)
        if asked not in (None, name):
            raise BulkheadError(f"the request is of {name}, not {asked}; ask who has sent it")
        with self._changing() as state:
            identity = granted or state.identity(name)
            if identity is None:
                raise BulkheadError(f"{name} is not known here; say what it may have: --kind, --ip, --dns")
            if identity.name != name:
                raise BulkheadError(f"the request is of {name}, not {identity.name}; ask who has sent it")
            addresses, hosts = making.names_in(found)
            extra = sorted((set(addresses) - set(identity.ips)) | (set(hosts) - set(identity.hosts)))
            if extra:
                raise BulkheadError(
                    f"{name} asks for {', '.join(extra)} too; if it may have that, say so with --ip and --dns"
                )
            self._check_key(state, making.key_hash(key), name)
            identity = replace(identity, remote=True)
            state = self._granted(state, identity)
            certificate, _ = self._sign(state, identity, key)
            self._tell(
                Kind.CERT_RENEWED,
                f"{name} was signed a certificate until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC.",
                name,
            )
            return making.pem_of(certificate) + self._trust()

    def revoke(self, identity: str) -> None:
        """Revoke every certificate of a name, and let it have none until `unrevoke`."""
        check_name(identity)
        with self._changing() as state:
            if state.identity(identity) is None and state.newest(identity) is None:
                raise BulkheadError(f"{identity} has no certificates here; known are {self._names(state)}")
            if identity in state.revoked:
                return
            state = state.with_revoked(identity, self._clock().timestamp())
            self._save(state)
            self._publish(state)
            self._tell(Kind.CERT_REVOKED, f"{identity} is revoked, with every certificate it had.", identity)

    def unrevoke(self, identity: str) -> None:
        """Let a name have certificates again. Those that it had stay revoked; issue a new one."""
        with self._changing() as state:
            if identity not in state.revoked:
                raise BulkheadError(f"{identity} is not revoked")
            left = {name: when for name, when in state.revoked.items() if name != identity}
            self._save(replace(state, revoked=left))
            self._tell(
                Kind.CERT_REVOKED, f"{identity} may have certificates again; those before stay revoked.", identity
            )

    def rotate_ca(self, phase: str, *, settle_s: float = SETTLE_S) -> State:
        """Go one step in the replacement of the CA: `prepare`, `switch`, `finish`, or `back` from where it is.

        A step that was interrupted is completed by the same step again. `settle_s` must have passed since trust changed
        last; see `unsettled_s`.
        """
        try:
            move = Move(phase)
        except ValueError:
            raise BulkheadError(f"{phase!r} is no step; expected prepare, switch, finish or back") from None
        with self._changing() as state:
            if move is not Move.PREPARE and (left := self.unsettled_s(settle_s)) > 0:
                raise BulkheadError(f"running programs may not have read yet what changed last; wait {left:.0f} s")
            moved = {
                Move.PREPARE: self._prepare,
                Move.SWITCH: self._switch,
                Move.FINISH: self._finish,
                Move.BACK: self._back,
            }[move](state)
            if moved != state:
                self._tell(
                    Kind.CA_ROTATED, f"{move}: the CA's replacement is {moved.phase} now. {self.next_step(moved)}", "ca"
                )
            return moved

    def unsettled_s(self, settle_s: float = SETTLE_S) -> float:
        """How long to wait before the next step, in seconds."""
        try:
            changed = max(path.stat().st_mtime for path in (self.holder.ca, self.directory / "state.json"))
        except OSError:
            return 0.0
        return max(0.0, min(settle_s, changed + settle_s - time.time()))

    def next_step(self, state: State) -> str:
        """What to do next in the CA's replacement."""
        behind = ", ".join(self.behind(state))
        if state.phase is Phase.PREPARED:
            if behind:
                return f"Going back is not complete: bulkhead pki rotate-ca back (still of the new CA: {behind})."
            return "Give every machine the new bundle (export), then: bulkhead pki rotate-ca switch; or back."
        if state.phase is Phase.SWITCHED:
            if behind:
                return f"Still of the old CA: {behind}. Run: bulkhead pki rotate-ca switch, and sign requests of other machines."
            return "When all is well: bulkhead pki rotate-ca finish; or back."
        if state.of_role(Role.RETIRED):
            return "The old CA is kept to go back to until the next replacement: bulkhead pki rotate-ca back."
        return "Nothing; a replacement begins with: bulkhead pki rotate-ca prepare."

    def behind(self, state: State) -> list[str]:
        """Names whose certificate in use is not of the CA that signs."""
        found = {one.name: self.in_use(one.name, state) for one in state.identities if one.name not in state.revoked}
        return [name for name, entry in found.items() if entry is not None and entry.authority != state.active]

    def alarm(self) -> list[Due]:
        """Write an event about each thing that is due and was not told of yet; what is due."""
        found = self.needs_renewal()
        with self._changing() as state:
            marks = {f"{due.subject} {due.ends.timestamp():.0f} {due.alarm}": due for due in found}
            for mark, due in marks.items():
                if mark not in state.alarmed:
                    self._tell(
                        Kind.CERT_EXPIRING,
                        f"{due.subject}: {due.why}, ends {due.ends:%Y-%m-%d %H:%M} UTC; {due.fix}.",
                        due.subject,
                    )
            if tuple(marks) != state.alarmed:
                self._save(replace(state, alarmed=tuple(marks)))
        return found

    def bundle(self, name: str | None, *, key: bool = False) -> bytes:
        """What a machine needs, PEM: trust, revocations, and the certificate (and key) of a name. Never the CA's key."""
        with self._changing() as state:
            if name is None:
                return self._trust()
            self._known(state, name)
            return self._bundle(name, key=key)

    def _bundle(self, name: str, *, key: bool) -> bytes:
        pair = self.holder.link(name)
        certificate = read(pair / "cert.pem")
        if certificate is None:
            raise BulkheadError(f"{name} has no certificate here; issue one, or sign its request")
        private = (read(pair / "key.pem") or b"") if key else b""
        return certificate + self._trust() + private

    def export(self, name: str, to: Path, owner: int | None = None) -> None:
        """Have a directory for the programs that use a name, and keep it up to date with every change from now on.

        It never has the CA's key. `owner` is the number of the user they run as.
        """
        with self._changing() as state:
            self._known(state, name)
            export = Export(str(to), name, owner)
            delivery.deliver(export, self.holder)
            others = tuple(one for one in state.exports if one.directory != export.directory)
            if (*others, export) != state.exports:
                self._save(replace(state, exports=(*others, export)))

    def forget_export(self, to: Path) -> None:
        """Keep a directory up to date no more. What is in it stays."""
        with self._changing() as state:
            left = tuple(one for one in state.exports if one.directory != str(to))
            if left == state.exports:
                known = ", ".join(one.directory for one in state.exports) or "none"
                raise BulkheadError(f"{to} is not kept up to date; these are: {known}")
            self._save(replace(state, exports=left))

    def _deliver(self, state: State) -> None:
        """Bring every exported directory up to date. One that cannot be is told by `needs_renewal`."""
        for export in state.exports:
            if delivery.up_to_date(export, self.holder):
                continue
            try:
                delivery.deliver(export, self.holder)
            except BulkheadError as exc:
                LOG.warning("%s is not up to date: %s", export.directory, exc)

    # - steps of the CA's replacement

    def _prepare(self, state: State) -> State:
        if state.phase is Phase.PREPARED:
            return state
        if state.phase is Phase.SWITCHED:
            raise BulkheadError(f"a replacement is under way. {self.next_step(state)}")
        new = self._new_authority(state.name)
        state = state.with_roles({Role.RETIRED: None})
        state = replace(state, authorities=(*state.authorities, Authority(new, Role.NEXT)))
        self._save(state)
        self._publish(state)
        self._clear(state)
        return state

    def _switch(self, state: State) -> State:
        if state.phase is Phase.STEADY:
            raise BulkheadError("no replacement is prepared; begin with: bulkhead pki rotate-ca prepare")
        if state.phase is Phase.PREPARED:
            state = state.with_roles({Role.ACTIVE: Role.OLD, Role.NEXT: Role.ACTIVE})
            self._save(state)
            self._publish(state)
        return self._follow(state)

    def _finish(self, state: State) -> State:
        if state.phase is Phase.STEADY and state.of_role(Role.RETIRED):
            return state
        if state.phase is not Phase.SWITCHED:
            raise BulkheadError(f"there is nothing to finish. {self.next_step(state)}")
        if self.behind(state):
            raise BulkheadError(f"it cannot be finished yet. {self.next_step(state)}")
        state = state.with_roles({Role.OLD: Role.RETIRED})
        self._save(state)
        self._publish(state)
        return state

    def _back(self, state: State) -> State:
        if state.phase is Phase.SWITCHED:
            state = state.with_roles({Role.ACTIVE: Role.NEXT, Role.OLD: Role.ACTIVE})
            self._save(state)
            self._publish(state)
            return self._follow(state)
        if state.phase is Phase.PREPARED:
            if self.behind(state):  # the step before was interrupted, or waits for requests of other machines
                state = self._follow(state)
                if self.behind(state):
                    raise BulkheadError(self.next_step(state))
                return state
            state = state.with_roles({Role.NEXT: None})
            self._save(state)
            self._publish(state)
            self._clear(state)
            return state
        if not state.of_role(Role.RETIRED):
            return state
        state = state.with_roles({Role.RETIRED: Role.OLD})
        self._save(state)
        self._publish(state)
        return state

    def _follow(self, state: State) -> State:
        """Give every name with its key here a certificate of the CA that signs."""
        for name in self.behind(state):
            identity = self._known(state, name)
            if not identity.remote:
                self._issue(state, identity)
                state = self.state
        return state

    # - pieces

    @contextmanager
    def _changing(self) -> Iterator[State]:
        """Be the only one, and begin with everything as the state says, whatever died before."""
        with locked(self.directory):
            state = self.state
            self._settle(state)
            yield state
            self._deliver(self.state)

    def _settle(self, state: State) -> None:
        self._disk.sweep(self.directory)
        self._publish(state)
        self._clear(state)

    def _new_authority(self, name: str) -> str:
        key = making.new_key()
        certificate = making.new_ca(name, key, self._clock())
        made = making.serial_text(certificate.serial_number)[:16]
        place = self.directory / "ca" / made
        self._disk.directory(place)
        self._disk.write(place / "key.pem", making.key_pem(key, self._passphrase))
        self._disk.write(place / "cert.pem", making.pem_of(certificate))
        return made

    def _clear(self, state: State) -> None:
        """Remove CAs that the state does not know: made and never used, or gone."""
        known = {one.id for one in state.authorities}
        for path in (self.directory / "ca").iterdir():
            if path.name not in known:
                self._disk.remove(path)

    def _authority_key(self, name: str) -> making.Key:
        path = self.directory / "ca" / name / "key.pem"
        pem = read(path)
        if pem is None:
            raise BulkheadError(
                f"the CA's key {path} is missing; restore a back-up: bulkhead pki restore FILE --replace"
            )
        return making.load_key(pem, f"the CA's key {path}", self._passphrase)

    def _save(self, state: State) -> None:
        self._disk.write(self.directory / "state.json", state.to_json())

    def _publish(self, state: State) -> None:
        """Make trust and revocations as the state says. A list of revocations stays while it is young and right."""
        now = self._clock()
        old = {one.issuer: one for one in self._old_lists()}
        lists = []
        for one in state.authorities:
            ca = self.authority(one.id)
            wanted = {
                serial: dt.datetime.fromtimestamp(when, dt.UTC)
                for serial, when in state.serials_revoked(one.id).items()
            }
            found = old.get(ca.subject)
            if found is None or not _still_good(found, ca, wanted.keys(), now):
                found = making.new_crl(ca, self._authority_key(one.id), wanted, now)
            lists.append(making.pem_of(found))
        trusted = b"".join(making.pem_of(self.authority(name)) for name in state.trusted)
        self.holder.publish(trusted, b"".join(lists))

    def _old_lists(self) -> list[x509.CertificateRevocationList]:
        try:
            return self.holder.revocations()
        except BulkheadError:
            return []  # damaged: all are made anew

    def _trust(self) -> bytes:
        return (read(self.holder.ca) or b"") + (read(self.holder.crl) or b"")

    def _granted(self, state: State, identity: Identity) -> State:
        """Remember whom a name stands for. Nobody may be called like somebody else."""
        self._check_not_revoked(state, identity.name)
        for other in state.identities:
            if other.name != identity.name and (both := sorted(set(other.hosts) & set(identity.hosts))):
                raise BulkheadError(f"{', '.join(both)} belongs to {other.name}; give {identity.name} other names")
        if state.identity(identity.name) != identity:
            state = state.with_identity(identity)
            self._save(state)
        return state

    def _issue(self, state: State, identity: Identity) -> Issued:
        key = making.new_key()
        certificate, _ = self._sign(state, identity, key.public_key())
        pair = self.holder.stage(certificate, key)
        try:
            self.holder.use(pair)
        except BulkheadError:
            self._disk.remove(pair)
            raise
        self.holder.prune(identity.name)
        return Issued(
            identity.name,
            making.serial_text(certificate.serial_number),
            pair,
            self.holder.link(identity.name),
            certificate.not_valid_after_utc,
            making.renew_at(certificate),
        )

    def _sign(self, state: State, identity: Identity, key: making.PublicKey) -> tuple[x509.Certificate, State]:
        """Sign, and write it down before anybody has it."""
        ca, ca_key = self.authority(state.active), self._authority_key(state.active)
        if not making.same_key(ca, ca_key):
            raise BulkheadError(
                "the CA's key is not of its certificate; restore a back-up: bulkhead pki restore FILE --replace"
            )
        made = making.new_leaf(identity, key, ca, ca_key, self._clock())
        entry = Entry(
            making.serial_text(made.serial_number),
            identity.name,
            state.active,
            making.key_hash(key),
            made.not_valid_before_utc.timestamp(),
            made.not_valid_after_utc.timestamp(),
        )
        state = state.with_entry(entry)
        self._save(state)
        return made, state

    def _known(self, state: State, name: str) -> Identity:
        found = state.identity(name)
        if found is None:
            raise BulkheadError(
                f"{name} is not known here; known are {self._names(state)}. Issue it a certificate first"
            )
        return found

    def _names(self, state: State) -> str:
        return ", ".join(one.name for one in state.identities) or "none"

    def _check_not_revoked(self, state: State, name: str) -> None:
        if name in state.revoked:
            raise BulkheadError(
                f"{name} is revoked; if it may have certificates again: bulkhead pki revoke {name} --undo"
            )

    def _check_key(self, state: State, key: str, name: str) -> None:
        for one in state.entries:
            if one.key == key and one.revoked_at is not None:
                raise BulkheadError(f"{name} asks for a certificate of a key that was revoked; it needs a new key")
            if one.key == key and one.name != name:
                raise BulkheadError(
                    f"{name} asks for a certificate of the key of {one.name}; it needs a key of its own"
                )

    def _tell(self, kind: Kind, text: str, subject: str) -> None:
        try:
            with EventLog(self.directory / "events") as log:
                log.append(Event(kind, text, object=subject))
        except EventLogError as exc:  # what was done is done; it must not look as if it were not
            LOG.warning("%s (not recorded: %s)", text, exc)


def lists_due(holder: Holder, now: dt.datetime) -> list[Due]:
    """What is wrong with the age of a directory's revocations. When a list ends, every certificate is refused."""
    found = []
    for ca in holder.authorities():
        ends = min((making.crl_due(one) for one in holder.revocations() if making.signed_by(one, ca)), default=None)
        fix = "bulkhead pki renew --due where the CA is, then export it"
        if ends is None:
            found.append(Due("crl", f"there is no list of revocations of {making.name_of(ca)}", fix, now, now, True))
        elif now >= ends - CRL_ALARM:
            why = (
                "the list of revocations has ended: every certificate is refused"
                if now >= ends
                else "the list of revocations grows old"
            )
            found.append(Due("crl", why, fix, ends - CRL_ALARM, ends, True))
    return found


def _still_good(found: x509.CertificateRevocationList, ca: x509.Certificate, wanted: object, now: dt.datetime) -> bool:
    age = now - found.last_update_utc
    return making.signed_by(found, ca) and making.crl_serials(found) == wanted and dt.timedelta(0) <= age < CRL_AGE


def _renew_at(entry: Entry) -> dt.datetime:
    life = entry.not_after - entry.not_before
    return dt.datetime.fromtimestamp(entry.not_before + life * making.renew_share(entry.name), dt.UTC)
