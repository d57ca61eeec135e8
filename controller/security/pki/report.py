"""How a directory of certificates is: as values, as metrics, and checked name by name. Changes nothing. Imports the rest."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from controller.problems import BulkheadError
from controller.security.pki import making, trial
from controller.security.pki.authority import Due, Pki, lists_due, utc_now
from controller.security.pki.delivery import Deliveries
from controller.security.pki.holder import Holder
from controller.security.pki.identity import Usage

OPENSSL_S = 10


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: whether it is good, what was seen, what to do if it is not."""

    what: str
    good: bool
    seen: str
    fix: str = ""


def due(directory: Path, now: dt.datetime | None = None) -> list[Due]:
    """What wants doing in a directory, the CA's or one that was given its certificates. Raises `BulkheadError`."""
    when = now or utc_now()
    if (directory / "state.json").exists():
        return Pki(directory, clock=lambda: when).needs_renewal()
    holder, now = Holder(directory), when
    if not holder.authorities():
        raise BulkheadError(
            f"there are no certificates in {directory}; make a CA: bulkhead pki init NAME, or take up what "
            "one has sent: bulkhead pki accept FILE"
        )
    found = []
    for name in holder.names():
        one = holder.current(name)
        if one is None or now < making.renew_at(one):
            continue
        at, ends = making.renew_at(one), one.not_valid_after_utc
        why = "its certificate has ended" if now >= ends else "its certificate is past two thirds of its life"
        fix = f"bulkhead pki request {name}, and have it signed where the CA is"
        found.append(Due(name, why, fix, at, ends, now >= at + (ends - at) / 2))
    for export in Deliveries(holder).behind():
        fix = f"accept it again: bulkhead pki accept FILE, or bulkhead pki export --forget {export.directory}"
        found.append(Due(export.directory, f"what {export.name} uses there is behind", fix, now, now, True))
    return found + lists_due(holder, now)


def status(directory: Path) -> dict[str, Any]:
    """Everything there is to know, as plain JSON values. Raises `BulkheadError`."""
    holder = Holder(directory)
    wanting = [
        {"subject": one.subject, "why": one.why, "fix": one.fix, "ends": _time(one.ends), "alarm": one.alarm}
        for one in due(directory)
    ]
    lists = [
        {"ca": _ca_name(one.issuer), "next_update": _time(making.crl_due(one)), "revoked": len(list(one))}
        for one in holder.revocations()
    ]
    found: dict[str, Any] = {"directory": str(directory), "ca": None, "certificates": [], "crl": lists, "due": wanting}
    if not (directory / "state.json").exists():
        found["certificates"] = [_in_use(name, one) for name in holder.names() if (one := holder.current(name))]
        return found
    pki = Pki(directory)
    state = pki.state
    found["ca"] = {
        "name": state.name,
        "phase": state.phase.value,
        "next": pki.next_step(state),
        "revoked": sorted(state.revoked),
        "authorities": [
            {
                "id": one.id,
                "role": one.role.value,
                "subject": making.name_of(ca := pki.authority(one.id)),
                "replace_at": _time(making.half_life(ca)),
                "not_after": _time(ca.not_valid_after_utc),
            }
            for one in state.authorities
        ],
    }
    for identity in state.identities:
        entry = pki.in_use(identity.name, state)
        ends = dt.datetime.fromtimestamp(entry.not_after, dt.UTC) if entry else None
        begins = entry.not_before if entry else 0.0
        share = making.renew_share(identity.name)
        at = dt.datetime.fromtimestamp(begins + (entry.not_after - begins) * share, dt.UTC) if entry else None
        found["certificates"].append(
            {
                "name": identity.name,
                "kind": identity.usage.value,
                "names": [*identity.hosts, *identity.ips],
                "serial": entry.serial if entry else None,
                "ca": entry.authority if entry else None,
                "renew_at": _time(at) if at else None,
                "not_after": _time(ends) if ends else None,
                "revoked": identity.name in state.revoked,
                "key_is_here": not identity.remote,
            }
        )
    return found


def _in_use(name: str, one: x509.Certificate) -> dict[str, Any]:
    addresses, hosts = making.names_in(one)
    return {
        "name": name,
        "kind": making.usage_of(one).value,
        "names": [*hosts, *addresses],
        "serial": making.serial_text(one.serial_number),
        "ca": _ca_name(one.issuer),
        "renew_at": _time(making.renew_at(one)),
        "not_after": _time(one.not_valid_after_utc),
        "revoked": False,
        "key_is_here": True,
    }


def metrics(directory: Path) -> str:
    """The same for Prometheus, in its text format."""
    found = status(directory)
    ca = found["ca"] or {"authorities": [], "phase": "steady", "revoked": []}
    ends = {one["name"]: one["not_after"] for one in found["certificates"] if one["not_after"] and not one["revoked"]}
    renewals = {one["name"]: one["renew_at"] for one in found["certificates"] if one["renew_at"] and not one["revoked"]}
    lines = [
        *_metric("certificate_expiry_seconds", "When a certificate ends.", "name", ends),
        *_metric("certificate_renewal_seconds", "When a certificate is to be replaced.", "name", renewals),
        *_metric(
            "ca_expiry_seconds", "When a CA ends.", "ca", {one["id"]: one["not_after"] for one in ca["authorities"]}
        ),
        *_metric(
            "crl_next_update_seconds",
            "When a list of revocations has to have been replaced.",
            "ca",
            {one["ca"]: one["next_update"] for one in found["crl"]},
        ),
        *_number(
            "ca_replacement_phase",
            "0 steady, 1 prepared, 2 switched.",
            ["steady", "prepared", "switched"].index(ca["phase"]),
        ),
        *_number("identities_revoked", "Names that are revoked.", len(ca["revoked"])),
        *_number("renewals_due", "What wants doing now.", len(found["due"])),
        *_number("alarms", "What stops working soon, or has stopped.", sum(one["alarm"] for one in found["due"])),
    ]
    return "".join(f"{line}\n" for line in lines)


def _metric(name: str, text: str, label: str, values: dict[str, str]) -> Iterator[str]:
    yield f"# HELP bulkhead_pki_{name} {text}"
    yield f"# TYPE bulkhead_pki_{name} gauge"
    for key, when in values.items():
        quoted = key.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        yield f'bulkhead_pki_{name}{{{label}="{quoted}"}} {dt.datetime.fromisoformat(when).timestamp():.0f}'


def _number(name: str, text: str, value: int) -> Iterator[str]:
    yield from (
        f"# HELP bulkhead_pki_{name} {text}",
        f"# TYPE bulkhead_pki_{name} gauge",
        f"bulkhead_pki_{name} {value}",
    )


def checks(directory: Path, name: str, hosts: tuple[str, ...] = (), now: dt.datetime | None = None) -> list[Check]:
    """Look at everything about the certificate that a name uses. Raises `BulkheadError` if it has none."""
    holder, now = Holder(directory), now or utc_now()
    found = holder.current(name)
    if found is None:
        raise BulkheadError(
            f"{name} has no certificate in {directory}; known are {', '.join(holder.names()) or 'none'}"
        )
    again = f"bulkhead pki renew {name}"
    pair, ca = Path(os.path.realpath(holder.link(name))), making.issued_by(found, holder.authorities())
    names = {one for part in making.names_in(found) for one in part}
    missing = [one for one in hosts if one not in names]
    left = found.not_valid_after_utc - now
    checked = [
        _private(directory, pair),
        _fits(found, pair),
        Check(
            "validity",
            found.not_valid_before_utc <= now < found.not_valid_after_utc,
            f"{found.not_valid_before_utc:%Y-%m-%d %H:%M} to {found.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, "
            f"{max(left, dt.timedelta()).total_seconds() / 86400:.1f} days left",
            again,
        ),
        Check(
            "renewal",
            now < making.renew_at(found),
            f"to be replaced {making.renew_at(found):%Y-%m-%d %H:%M} UTC",
            again,
        ),
        Check(
            "chain",
            ca is not None,
            f"signed by {making.name_of(ca)}" if ca else "signed by no CA that is trusted here",
            again,
        ),
        Check(
            "names",
            not missing,
            ", ".join(sorted(names)) + (f"; lacks {', '.join(missing)}" if missing else ""),
            f"bulkhead pki issue {name} with --ip and --dns",
        ),
        _revocation(holder, found, ca, now),
        _handshake(holder, pair),
    ]
    if shutil.which("openssl"):
        checked.append(_openssl(holder, pair, making.usage_of(found)))
    return checked


def _private(directory: Path, pair: Path) -> Check:
    places = [
        path for path in (directory, *directory.rglob("*")) if "events" not in path.parts and not path.is_symlink()
    ]
    open_to = [path for path in places if stat.S_IMODE(path.stat().st_mode) & 0o077]
    seen = (
        ", ".join(f"{path} {stat.S_IMODE(path.stat().st_mode):o}" for path in open_to)
        or f"{pair} and the rest are 600, 700"
    )
    return Check("private", not open_to, seen, f"chmod -R go= {directory}, and replace keys that others may have read")


def _fits(found: x509.Certificate, pair: Path) -> Check:
    fix = f"bulkhead pki renew {making.name_of(found)}, or renew --back"
    try:
        good = making.same_key(found, making.load_key((pair / "key.pem").read_bytes(), str(pair / "key.pem")))
    except (OSError, BulkheadError) as exc:
        return Check("key", False, str(exc), fix)
    return Check("key", good, "the certificate's" if good else "another than the certificate's", fix)


def _revocation(holder: Holder, found: x509.Certificate, ca: x509.Certificate | None, now: dt.datetime) -> Check:
    fix = "bulkhead pki renew --due where the CA is, then export; a revoked name needs bulkhead pki revoke NAME --undo"
    mine = [one for one in holder.revocations() if ca is not None and making.signed_by(one, ca)]
    if not mine:
        return Check("revocation", False, "there is no list of its CA", fix)
    ends = making.crl_due(mine[0])
    revoked = found.serial_number in making.crl_serials(mine[0])
    seen = f"{'revoked' if revoked else 'not revoked'}; the list is good until {ends:%Y-%m-%d %H:%M} UTC"
    return Check("revocation", not revoked and now < ends, seen, fix)


def _handshake(holder: Holder, pair: Path) -> Check:
    try:
        trial.try_pair(pair, holder.ca, holder.crl)
    except BulkheadError as exc:
        return Check("handshake", False, str(exc), f"bulkhead pki renew {pair.parent.name}")
    return Check("handshake", True, "TLS 1.3 works, with every name")


def _openssl(holder: Holder, pair: Path, usage: Usage) -> Check:
    purposes = (["sslserver"] if usage.serves else []) + (["sslclient"] if usage.connects else [])
    for purpose in purposes:
        command = ["openssl", "verify", "-CAfile", str(holder.ca), "-CRLfile", str(holder.crl), "-crl_check"]
        command += ["-x509_strict", "-no-CApath", "-no-CAstore", "-purpose", purpose, str(pair / "cert.pem")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=OPENSSL_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as exc:
            return Check("openssl", False, f"openssl verify: {exc}", "look at the installed openssl")
        if done.returncode:
            seen = " ".join(done.stderr.split()) or f"exit {done.returncode}"
            return Check("openssl", False, seen, f"bulkhead pki renew {pair.parent.name}")
    return Check("openssl", True, f"openssl verify with revocations, as {' and '.join(purposes)}")


def _time(when: dt.datetime) -> str:
    return when.astimezone(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _ca_name(issuer: x509.Name) -> str:
    found = issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(found[0].value) if found else issuer.rfc4514_string()
