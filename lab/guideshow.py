"""`bulkhead lab guide`: what the security guide promises, tried on its machines in the lab. Imports `guide`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from lab.guide import CA_FILE, INFERENCE, ROUTER, STATE_FILE, Guide, tokens

_WORDS = "each word comes as it is said"
_ANSWER_KEYS = {True: "answers", False: "refused"}


@dataclass(frozen=True, slots=True)
class Promise:
    """One line: what was tried, what has to come of it, and what did."""

    title: str
    expected: str
    seen: str

    @property
    def kept(self) -> bool:
        """Whether it is as it has to be."""
        return self.seen == self.expected

    def as_dict(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self) | {"as_expected": self.kept}


def _asked(guide: Guide, *words: str) -> str:
    done = guide.ask("--json", f'{{"prompt": "{_WORDS}"}}', "--stream", *words)
    if done.returncode:
        return "refused"
    found = list(tokens(done.stdout))
    streamed = [word for word, _at in found] == _WORDS.split() and found[-1][1] > found[0][1]
    return "streamed" if streamed else "answered, but not word by word"


def _exit(command: list[str]) -> str:
    return _ANSWER_KEYS[subprocess.run(command, capture_output=True, timeout=60).returncode == 0]


def _verified(guide: Guide, name: str) -> str:
    lines = guide.verify(guide.machines[name]).items()
    red = [check for check, line in lines if line["status"] == "BAD"]
    return ", ".join(red) or ("green" if all(line["status"] == "ok" for _check, line in lines) else "unknown")


def play(guide: Guide) -> Iterator[Promise]:
    """Try one after the other."""
    stranger = str(guide.directory / "stranger.key")
    guide.home("client", "keygen", stranger)
    inside = guide.router.command
    curl = ("curl", "-s", "-m", "3", "-o", "/dev/null")
    ca = str(guide.directory / "home/pki/ca.pem")
    tries: list[tuple[str, str, Callable[[], str]]] = [
        ("a registered client asks: TLS 1.3, HPKE, WireGuard, mutual TLS", "streamed", lambda: _asked(guide)),
        ("a client that is not registered asks", "refused", lambda: _asked(guide, "--key", stranger)),
        (
            "the router is asked by TLS 1.2",
            "refused",
            lambda: _exit(
                guide.client.command(*curl, "--tls-max", "1.2", "--cacert", ca, f"https://{ROUTER.address}/")
            ),
        ),
        (
            "the inference server is asked from the internet",
            "refused",
            lambda: _exit(guide.neighbour.command(*curl, "-k", f"https://{INFERENCE.address}:8001/health")),
        ),
        (
            "the inference server is asked through the tunnel without a certificate",
            "refused",
            lambda: _exit(inside(*curl, "--cacert", CA_FILE, "https://10.0.0.2:8001/health")),
        ),
        ("verify-network-config on router1", "green", lambda: _verified(guide, "router1")),
        ("verify-network-config on inf1", "green", lambda: _verified(guide, "inf1")),
        ("somebody opens port 8001 in inf1's firewall: what is red is", "firewall rules", lambda: _opened(guide)),
        ("the plug of both is pulled; they are switched on again", "streamed", lambda: _rebooted(guide)),
        ("inf1 is sealed", "refused", lambda: _sealed(guide)),
        ("inf1 is unsealed", "streamed", lambda: _unsealed(guide)),
    ]
    for title, expected, attempt in tries:
        yield Promise(title, expected, attempt())


def _opened(guide: Guide) -> str:
    guide.inference.run("nft", "insert", "rule", "inet", "bulkhead", "input", "tcp", "dport", "8001", "accept")
    seen = _verified(guide, "inf1")
    guide.bulkhead(guide.inference, "firewall", "apply", STATE_FILE)
    return seen


def _rebooted(guide: Guide) -> str:
    for server in (ROUTER, INFERENCE):
        guide.reboot(server)
    guide.wait()
    return _asked(guide)


def _sealed(guide: Guide) -> str:
    guide.bulkhead(guide.router, "incident", "seal", "--server", "inf1", "--reason", "rehearsal")
    return _asked(guide)


def _unsealed(guide: Guide) -> str:
    for line in guide.bulkhead(guide.router, "incident", "status").splitlines():
        if " sealed " in line:
            guide.bulkhead(guide.router, "incident", "unseal", line.split()[0])
    guide.wait()
    return _asked(guide)
