"""The CA: what it signs is good for what it is for and for nothing else, in the eyes of OpenSSL too; and it can be undone."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from controller.cli import main
from controller.eventread import read
from controller.problems import BulkheadError
from controller.security import tls
from controller.security.pki import Holder, Pki, archive, delivery, making, report
from controller.security.pki.identity import Identity
from controller.security.pki.state import Phase
from controller.security.pki.trial import shake
from controller.wgkeys import Secret


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = dt.datetime.now(dt.UTC)

    def __call__(self) -> dt.datetime:
        return self.now

    def forward(self, **by: float) -> None:
        """Let time pass."""
        self.now += dt.timedelta(**by)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """A CA with a router, an inference server and a client."""
    found = Pki(tmp_path / "pki")
    found.init("home")
    found.issue("router1", "server", ["10.0.0.1", "fd00::1"], ["llm.example", "*.llm.example"])
    found.issue("inf1", "peer", ["10.0.0.2"])
    found.issue("caller", "client")
    return found


def openssl(pki: Pki, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    """What OpenSSL says of somebody's certificate."""
    trust = ["-CAfile", str(pki.holder.ca), "-CRLfile", str(pki.holder.crl), "-crl_check", "-x509_strict"]
    command = ["openssl", "verify", *trust, "-no-CApath", "-no-CAstore", *more, str(pki.holder.link(name) / "cert.pem")]
    return subprocess.run(command, capture_output=True, text=True)


def met(pki: Pki, server: str, client: str | None, host: str) -> str:
    """A handshake of two names."""
    one = tls.server_context(pki.directory, server, client is not None)
    return shake(one, tls.client_context(pki.directory, client), host)


@pytest.mark.parametrize(
    "name, purpose, good",
    [
        ("router1", "sslserver", True),
        ("router1", "sslclient", False),
        ("caller", "sslclient", True),
        ("caller", "sslserver", False),
        ("inf1", "sslserver", True),
        ("inf1", "sslclient", True),
    ],
)
def test_openssl_confirms_the_chain_for_what_it_is_for(pki: Pki, name: str, purpose: str, good: bool) -> None:
    assert (openssl(pki, name, "-purpose", purpose).returncode == 0) == good


def test_openssl_confirms_names(pki: Pki) -> None:
    for host in ("llm.example", "router1", "a.llm.example"):
        assert openssl(pki, "router1", "-verify_hostname", host).returncode == 0
    for address in ("10.0.0.1", "fd00::1"):
        assert openssl(pki, "router1", "-verify_ip", address).returncode == 0
    assert openssl(pki, "router1", "-verify_hostname", "inf1").returncode != 0
    assert openssl(pki, "router1", "-verify_ip", "10.0.0.2").returncode != 0


def test_a_ca_signs_no_other_ca(pki: Pki, tmp_path: Path) -> None:
    leaf = pki.holder.link("inf1")
    below = tmp_path / "below.pem"
    ca = making.certificates((leaf / "cert.pem").read_bytes(), "")[0]
    key = making.load_key((leaf / "key.pem").read_bytes(), "")
    mine = making.new_key()
    found = making.new_leaf(Identity.checked("router1", "server"), mine.public_key(), ca, key, dt.datetime.now(dt.UTC))
    below.write_bytes(making.pem_of(found))
    command = ["openssl", "verify", "-CAfile", pki.holder.ca, "-untrusted", leaf / "cert.pem", below]
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_what_is_in_a_certificate(pki: Pki) -> None:
    found = pki.holder.current("router1")
    assert found is not None
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-in", pki.holder.link("router1") / "cert.pem"],
        capture_output=True,
        text=True,
    ).stdout
    assert "prime256v1" in text and "ecdsa-with-SHA256" in text and "CA:FALSE" in text
    assert "Digital Signature" in text and "Key Encipherment" not in text
    life = found.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert dt.timedelta(days=30, hours=23) < life <= dt.timedelta(days=31)
    assert found.serial_number.bit_length() > 80
    assert {
        stat & 0o077
        for path in pki.directory.rglob("*")
        if "events" not in path.parts and not path.is_symlink()
        for stat in [path.stat().st_mode]
    } == {0}


def test_tls_13_only_and_both_ends_are_checked(pki: Pki) -> None:
    assert met(pki, "router1", "caller", "llm.example") == "TLSv1.3"
    assert met(pki, "inf1", "inf1", "10.0.0.2") == "TLSv1.3"
    with pytest.raises(ssl.SSLError, match="Hostname mismatch"):
        met(pki, "router1", "caller", "other.example")
    with pytest.raises(ssl.SSLError):  # a server's certificate is no client's
        met(pki, "inf1", "router1", "inf1")
    server = tls.server_context(pki.directory, "inf1", True)
    with pytest.raises(ssl.SSLError):
        shake(server, tls.client_context(pki.directory), "inf1")
    old = tls.client_context(pki.directory, "caller")
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake(server, old, "inf1")


def test_a_foreign_ca_is_refused(pki: Pki, tmp_path: Path) -> None:
    other = Pki(tmp_path / "other")
    other.init("home")
    other.issue("caller", "client")
    foreign = tls.files(other.directory, "caller")
    mixed = tls.Files(pki.holder.ca, pki.holder.crl, foreign.certificate, foreign.key)
    with pytest.raises(ssl.SSLError):
        shake(
            tls.server_context(pki.directory, "inf1", True), tls.context(mixed, server=False, require_peer=True), "inf1"
        )


def test_renewal_is_due_at_two_thirds_and_spread(tmp_path: Path) -> None:
    clock = Clock()
    pki = Pki(tmp_path / "pki", clock=clock)
    pki.init("home")
    pki.issue("a", "server")
    begins = clock.now
    assert pki.needs_renewal() == []
    clock.forward(days=31 * 0.6)
    assert [one.subject for one in pki.needs_renewal() if one.subject != "crl"] == []
    clock.forward(days=31 * 0.07)
    due = next(one for one in pki.needs_renewal() if one.subject == "a")
    assert not due.alarm and due.at <= begins + dt.timedelta(days=31) * 2 / 3
    clock.forward(days=7)
    assert next(one for one in pki.needs_renewal() if one.subject == "a").alarm
    shares = {round(making.renew_share(f"name{number}"), 4) for number in range(50)}
    assert len(shares) > 40 and min(shares) >= 2 / 3 - making.JITTER and max(shares) <= 2 / 3 + 0.0001


def test_alarms_of_the_ca_and_of_old_revocations(tmp_path: Path) -> None:
    clock = Clock()
    pki = Pki(tmp_path / "pki", clock=clock)
    pki.init("home")
    clock.forward(days=4, minutes=10)
    assert [(one.subject, one.alarm) for one in pki.needs_renewal()] == [("crl", True)]
    pki.renew_due()
    assert pki.needs_renewal() == []
    clock.forward(days=366)
    assert ("ca", True) in [(one.subject, one.alarm) for one in pki.alarm()]
    pki.alarm()
    found = [one for one in read(pki.directory / "events") if one.kind == "cert_expiring" and one.object == "ca"]
    assert len(found) == 1  # told once


def test_the_old_certificate_stays_if_the_new_one_does_not_work(pki: Pki) -> None:
    before = os.readlink(pki.holder.link("router1"))
    late = Clock()
    late.forward(days=3)  # what is made is not valid yet
    with pytest.raises(BulkheadError, match="tried in a handshake"):
        Pki(pki.directory, clock=late).renew("router1")
    assert os.readlink(pki.holder.link("router1")) == before
    assert len(list((pki.directory / "issued" / "router1").iterdir())) == 1


def test_going_back(pki: Pki) -> None:
    first = pki.holder.current("router1")
    pki.renew("router1")
    assert pki.holder.current("router1") != first
    pki.back("router1")
    assert pki.holder.current("router1") == first
    for _ in range(5):
        pki.renew("router1")
    assert len(list((pki.directory / "issued" / "router1").iterdir())) == 3
    with pytest.raises(BulkheadError, match="no earlier certificate"):
        pki.back("inf1")


def test_a_name_is_revoked_with_all_its_certificates(pki: Pki) -> None:
    first = tls.client_context(pki.directory, "caller")
    pki.renew("caller")
    pki.revoke("caller")
    assert pki.revoked("caller")
    server = tls.server_context(pki.directory, "inf1", True)
    for client in (first, tls.client_context(pki.directory, "caller")):
        with pytest.raises(ssl.SSLError, match="revoked"):
            shake(server, client, "inf1")
    assert "revoked" in openssl(pki, "caller").stderr
    for again in (lambda: pki.renew("caller"), lambda: pki.issue("caller", "client"), lambda: pki.back("caller")):
        with pytest.raises(BulkheadError, match="is revoked"):
            again()
    pki.unrevoke("caller")
    with pytest.raises(ssl.SSLError, match="revoked"):
        shake(tls.server_context(pki.directory, "inf1", True), first, "inf1")
    pki.issue("caller", "client")
    assert met(pki, "inf1", "caller", "inf1") == "TLSv1.3"


def test_a_thief_who_has_renewed_is_revoked_too(pki: Pki, tmp_path: Path) -> None:
    there = Holder(tmp_path / "there")
    who = Identity.checked("inf2", "peer", ["10.0.0.3"])
    request = there.request(who)
    there.accept(pki.sign(request, who))
    thief = Holder(tmp_path / "thief")
    thief.accept(pki.sign(thief.request(who)))
    pki.revoke("inf2")
    server = tls.server_context(pki.directory, "inf1", True)
    for holder in (there, thief):
        with pytest.raises(ssl.SSLError, match="revoked"):
            shake(server, tls.client_context(holder.directory, "inf2"), "inf1")
    with pytest.raises(BulkheadError, match="is revoked"):
        pki.sign(thief.request(who))
    pki.unrevoke("inf2")
    with pytest.raises(BulkheadError, match="key that was revoked"):
        pki.sign(request)


def test_everything_is_replaced_and_what_was_before_is_revoked(pki: Pki, tmp_path: Path) -> None:
    there, who = Holder(tmp_path / "there"), Identity.checked("inf2", "peer")
    there.accept(pki.sign(there.request(who), who))
    before = tls.client_context(pki.directory, "caller")
    done, elsewhere = pki.replace_all(settle_s=0)
    assert [one.name for one in done] == ["caller", "inf1", "router1"] and elsewhere == ["inf2"]
    assert met(pki, "inf1", "caller", "inf1") and met(pki, "router1", "caller", "llm.example")
    with pytest.raises(ssl.SSLError, match="revoked"):
        shake(tls.server_context(pki.directory, "inf1", True), before, "inf1")
    with pytest.raises(BulkheadError, match="no earlier certificate"):
        pki.back("caller")
    there.accept(pki.sign(there.request(who)))
    pki.revoke_earlier("inf2")
    there.accept(pki.bundle(None))
    assert shake(tls.server_context(there.directory, "inf2", True), tls.client_context(pki.directory, "caller"), "inf2")


def test_an_open_connection_is_known_to_be_revoked(pki: Pki) -> None:
    found = tls.Revocations(pki.directory)
    serial = pki.holder.current("caller")
    assert serial is not None and serial.serial_number not in found.serials
    pki.revoke("caller")
    assert serial.serial_number in found.serials


def test_what_a_request_may_have_is_said_by_the_ca(pki: Pki, tmp_path: Path) -> None:
    there = Holder(tmp_path / "there")
    greedy = Identity.checked("inf2", "peer", ["10.0.0.1"], ["llm.example"])
    with pytest.raises(BulkheadError, match="not known here"):
        pki.sign(there.request(greedy))
    with pytest.raises(BulkheadError, match=r"asks for 10\.0\.0\.1, llm\.example too"):
        pki.sign(there.request(greedy), Identity.checked("inf2", "peer"))
    with pytest.raises(BulkheadError, match="belongs to router1"):
        pki.sign(there.request(greedy), greedy)
    with pytest.raises(BulkheadError, match="is of inf2, not inf3"):
        pki.sign(there.request(Identity.checked("inf2", "peer")), Identity.checked("inf3", "peer"), name="inf3")
    with pytest.raises(BulkheadError, match="no request"):
        pki.sign(b"nonsense")


def test_a_bundle_of_another_ca_or_an_older_one_is_refused(pki: Pki, tmp_path: Path) -> None:
    there, who = Holder(tmp_path / "there"), Identity.checked("inf2", "peer")
    first = pki.sign(there.request(who), who)
    there.accept(first)
    pki.revoke("caller")
    there.accept(pki.bundle(None))
    with pytest.raises(BulkheadError, match="older than the one here"):
        there.accept(first)
    other = Pki(tmp_path / "other")
    other.init("evil")
    with pytest.raises(BulkheadError, match="another CA"):
        there.accept(other.bundle(None))
    with pytest.raises(BulkheadError, match="a key that is not here"):
        there.accept(pki.bundle("inf1"))
    assert b"PRIVATE" not in pki.bundle("inf1")


def test_the_ca_is_replaced_with_a_way_back_at_each_step(pki: Pki) -> None:
    def move(step: str) -> Phase:
        phase = pki.rotate_ca(step, settle_s=0).phase
        for server, client, host in (("router1", "caller", "llm.example"), ("inf1", "inf1", "10.0.0.2")):
            assert met(pki, server, client, host) == "TLSv1.3"
            assert openssl(pki, server, "-purpose", "sslserver").returncode == 0
        return phase

    first = pki.state.active
    before = tls.client_context(pki.directory, "caller")
    assert [move("prepare"), move("back"), move("prepare"), move("switch")] == [
        Phase.PREPARED,
        Phase.STEADY,
        Phase.PREPARED,
        Phase.SWITCHED,
    ]
    assert pki.state.active != first
    assert [move("back"), pki.state.active == first, move("switch"), move("finish")] == [
        Phase.PREPARED,
        True,
        Phase.SWITCHED,
        Phase.STEADY,
    ]
    with pytest.raises(ssl.SSLError):
        shake(tls.server_context(pki.directory, "inf1", True), before, "inf1")
    assert [move("back"), move("back"), move("back")] == [Phase.SWITCHED, Phase.PREPARED, Phase.STEADY]
    assert pki.state.active == first
    assert shake(tls.server_context(pki.directory, "inf1", True), before, "inf1") == "TLSv1.3"


def test_the_ca_is_not_gone_while_somebody_needs_it(pki: Pki, tmp_path: Path) -> None:
    there, who = Holder(tmp_path / "there"), Identity.checked("inf2", "peer")
    there.accept(pki.sign(there.request(who), who))
    with pytest.raises(BulkheadError, match="no replacement is prepared"):
        pki.rotate_ca("switch", settle_s=0)
    pki.rotate_ca("prepare")
    with pytest.raises(BulkheadError, match="wait"):
        pki.rotate_ca("switch")
    there.accept(pki.bundle(None))
    pki.rotate_ca("switch", settle_s=0)
    with pytest.raises(BulkheadError, match="inf2"):
        pki.rotate_ca("finish", settle_s=0)
    there.accept(pki.sign(there.request(who)))
    pki.rotate_ca("finish", settle_s=0)
    assert shake(tls.server_context(there.directory, "inf2", True), tls.client_context(pki.directory, "caller"), "inf2")


def test_an_encrypted_ca_key(tmp_path: Path) -> None:
    secret = Secret("correct horse")
    pki = Pki(tmp_path / "pki", passphrase=secret)
    pki.init("home")
    pki.issue("a", "server")
    for wrong, why in ((None, "is encrypted"), (Secret("battery"), "passphrase is wrong")):
        with pytest.raises(BulkheadError, match=why) as caught:
            Pki(pki.directory, passphrase=wrong).renew("a")
        assert "battery" not in str(caught.value)
    everything = b"".join(path.read_bytes() for path in (pki.directory / "ca").rglob("key.pem"))
    assert b"ENCRYPTED" in everything
    assert "horse" not in repr(vars(pki))


def test_back_up_and_restore(pki: Pki, tmp_path: Path) -> None:
    file, secret = tmp_path / "backup", Secret("correct horse")
    archive.backup(pki.directory, file, secret)
    assert file.stat().st_mode & 0o777 == 0o600 and b"PRIVATE" not in file.read_bytes()
    with pytest.raises(BulkheadError, match="is encrypted"):
        archive.restore(file, tmp_path / "new")
    with pytest.raises(BulkheadError, match="passphrase is wrong"):
        archive.restore(file, tmp_path / "new", Secret("x"))
    with pytest.raises(BulkheadError, match="not empty"):
        archive.restore(file, pki.directory, secret)
    archive.restore(file, tmp_path / "new", secret)
    assert Pki(tmp_path / "new").state == pki.state
    pki.issue("late", "client")
    pki.revoke("late")
    pki.revoke("caller")
    kept = archive.restore(file, pki.directory, secret, over=True)
    assert kept is not None and kept.is_dir()
    pki.mend()
    assert pki.revoked("caller") and pki.revoked("late")
    assert "revoked" in openssl(pki, "caller").stderr
    assert met(pki, "inf1", "inf1", "inf1")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BulkheadError, match="damaged"):
        archive.restore(file, tmp_path / "third", secret)
    assert not (tmp_path / "third").exists()


def test_damage_is_told(pki: Pki) -> None:
    def bad(name: str, *hosts: str, now: dt.datetime | None = None) -> set[str]:
        return {one.what for one in report.checks(pki.directory, name, hosts, now) if not one.good}

    assert bad("router1", "llm.example") == set()
    assert bad("router1", "other.example") == {"names"}
    late = dt.datetime.now(dt.UTC) + dt.timedelta(days=32)
    assert bad("router1", now=late) == {"validity", "renewal", "revocation"}
    key = pki.holder.link("router1") / "key.pem"
    key.chmod(0o640)
    assert bad("router1") == {"private"}
    key.chmod(0o600)
    key.write_bytes((pki.holder.link("inf1") / "key.pem").read_bytes())
    assert bad("router1") == {"key", "handshake"}
    (pki.directory / "state.json").write_text("{")
    with pytest.raises(BulkheadError, match="is damaged"):
        pki.renew("inf1")


def test_two_at_once_both_succeed(pki: Pki) -> None:
    threads = [threading.Thread(target=pki.issue, args=(f"c{number}", "client")) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {f"c{number}" for number in range(6)} <= {one.name for one in pki.state.identities}
    assert len(pki.state.entries) == 9


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a b", "10.0.0.1", "-a", "a" * 65, "a\n"])
def test_names_that_cannot_be(pki: Pki, name: str) -> None:
    with pytest.raises(BulkheadError, match="cannot be a name"):
        pki.issue(name, "client")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_directory_for_another_user_is_kept_up_to_date(pki: Pki) -> None:
    """By that user: a link that leads out of it gets nobody's rights but theirs."""
    nobody = delivery.find_user("nobody").pw_uid
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o711)
        there = Path(place) / "router"
        pki.export("inf1", there, nobody)
        assert {path.lstat().st_uid for path in (there, *there.rglob("*"))} == {nobody}
        assert not [path for path in there.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
        follows = tls.Reloading(there, "inf1", server=True, require_client=True, clock=lambda: 0.0)
        pki.revoke("caller")
        assert follows.look()
        with pytest.raises(ssl.SSLError, match="revoked"):
            shake(follows.current, tls.client_context(pki.directory, "caller"), "inf1")
        pki.renew("inf1")
        for step in ("prepare", "switch", "finish"):
            pki.rotate_ca(step, settle_s=0)
            assert follows.look()
            assert shake(follows.current, tls.client_context(pki.directory, "inf1"), "inf1")
        pki.revoke("inf1")  # it still has to refuse others
        assert Holder(there).crl.read_bytes() == pki.holder.crl.read_bytes()
        pki.unrevoke("inf1")
        pki.issue("inf1", "peer")
        assert Holder(there).current("inf1") == pki.holder.current("inf1")
        shutil.rmtree(there / "issued")
        out = Path(place) / "outside"
        out.mkdir(0o700)
        (there / "issued").symlink_to(out)
        pki.renew("inf1")
        assert not list(out.iterdir())
        assert [one.subject for one in pki.needs_renewal()] == [str(there)]
        pki.forget_export(there)
        assert pki.needs_renewal() == []


# --- commands


@pytest.fixture
def run(tmp_path: Path) -> Iterator[object]:
    """Run a command on a directory of the test's own."""

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["pki", *arguments], env={"BULKHEAD_SECURITY_DIR": str(tmp_path / "security")})

    yield call


def test_the_commands(run: object, tmp_path: Path) -> None:
    def good(*arguments: str, code: int = 0) -> str:
        result = run(*arguments)  # type: ignore[operator]
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return str(result.output)

    assert "make a CA" in good("status", code=2)
    good("needs-renewal", code=2)
    good("init", "home")
    good("issue", "router1", "--kind", "server", "--ip", "10.0.0.1")
    good("issue", "caller", "--kind", "client", "--json")
    assert json.loads(good("status", "--json"))["due"] == []
    good("needs-renewal")
    good("verify", "router1", "--host", "10.0.0.1")
    good("verify", "router1", "--host", "10.0.0.9", code=1)
    good("verify", "nobody", code=2)
    assert 'certificate_expiry_seconds{name="router1"}' in good("status", "--metrics")
    good("revoke", "caller")
    assert "is revoked" in good("renew", "caller", code=2)
    good("rotate-ca", "prepare")
    good("rotate-ca", "switch", "--now")
    good("rotate-ca", "finish", "--now")
    request, bundle = str(tmp_path / "request"), str(tmp_path / "bundle")
    there = ("--security-dir", str(tmp_path / "there"))
    good("request", "inf1", "--ip", "10.0.0.2", "-o", request, *there)
    good("sign", request, "--name", "inf1", "--kind", "peer", "--ip", "10.0.0.2", "-o", bundle)
    good("accept", bundle, *there)
    good("verify", "inf1", "--host", "10.0.0.2", *there)
    good("needs-renewal", *there)
    good("export", "router1", "--to", str(tmp_path / "for-router"))
    assert tls.server_context(tmp_path / "for-router", "router1", True)
    assert not list((tmp_path / "for-router").rglob("ca"))
    readable = tmp_path / "passphrase"
    readable.write_text("x\n")
    readable.chmod(0o644)
    assert "may be read by others" in good("renew", "router1", "--passphrase-file", str(readable), code=2)
