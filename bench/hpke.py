"""How many requests one core seals, opens and answers in a second, and what a refusal costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from bench.harness import Figure, spread
from controller.security.hpke import (
    HEADER,
    ClientKey,
    Config,
    Opened,
    Opener,
    Refused,
    Registry,
    RouterKeys,
    Sealed,
    Sealer,
    new_binding,
)
from controller.security.hpke.suites import SUITES

SIZES = {"1 KiB": (1024, 300), "1 MiB": (1024 * 1024, 20)}
TOKENS = 2000


def measure(rounds: int) -> Iterator[Figure]:
    """The figures, each the best of the rounds: what disturbs a round only ever makes it slower."""
    with tempfile.TemporaryDirectory() as name:
        stand = _Stand(Path(name))
        for suite in SUITES:
            for size in SIZES:
                yield from stand.requests(suite, size, rounds)
        yield from stand.others(rounds)


class _Stand:
    def __init__(self, directory: Path) -> None:
        keys = RouterKeys(directory)
        keys.ensure()
        self.registry = Registry(directory)
        self.opener = Opener(self.registry, keys, told=lambda code, count: None)
        self.binding = new_binding()
        self.sealers: dict[str, Sealer] = {}
        for number, suite in enumerate(SUITES):
            key = ClientKey.new(suite)
            self.registry.register(f"bench{number}", key.public)
            config = Config.read(self.opener.config(self.binding), time.time())
            self.sealers[suite] = Sealer(key, config)

    def seal(self, suite: str, body: bytes) -> Sealed:
        nonce = self.opener.nonce(self.binding)
        return self.sealers[suite].seal("POST", "/v1/chat", body, "application/json", nonce=nonce, now=time.time())

    def open(self, sealed: Sealed) -> Opened:
        return self.opener.open("POST", "/v1/chat", sealed.headers.items(), sealed.body, self.binding)

    def requests(self, suite: str, size: str, rounds: int) -> Iterator[Figure]:
        length, count = SIZES[size]
        body = bytes(length)
        seals: list[float] = []
        opens: list[float] = []
        answers: list[float] = []
        for _ in range(rounds):
            sealed: list[Sealed] = []
            opened: list[Opened] = []
            seals.append(_rate(range(count), lambda _, to=sealed: to.append(self.seal(suite, body))))
            opens.append(_rate(sealed, lambda each, to=opened: to.append(self.open(each))))
            answers.append(_rate(opened, lambda each: each.answer().whole(200, "application/json", body)))
        for what, rates in (("sealed", seals), ("opened", opens), ("answered", answers)):
            yield Figure(f"{suite}, {size}, {what}", max(rates), "1/s", detail=spread(rates))

    def others(self, rounds: int) -> Iterator[Figure]:
        sealed = self.seal("auth", bytes(1024))
        wrong = [(HEADER, sealed.headers[HEADER]), ("Content-Type", sealed.headers["Content-Type"])]
        garbage = [(HEADER, "v=1;" + "x" * 300)]
        cases = {
            "refused: not a header of ours": lambda _: self._refused(garbage, b""),
            "refused: altered body": lambda _: self._refused(wrong, sealed.body[:-1]),
        }
        for name, case in cases.items():
            rates = [_rate(range(300), case) for _ in range(rounds)]
            yield Figure(name, max(rates), "1/s", detail=spread(rates))
        rates = []
        for _ in range(rounds):
            answer = self.open(self.seal("auth", b"x")).answer()
            answer.begin(200, "text/event-stream")
            rates.append(_rate(range(TOKENS), lambda _, to=answer: to.chunk(b"data: token\n\n")))
        yield Figure("a token of a sealed answer", max(rates), "1/s", detail=spread(rates))

    def _refused(self, headers: list[tuple[str, str]], body: bytes) -> None:
        with suppress(Refused):
            self.opener.open("POST", "/v1/chat", headers, body, self.binding)
            raise AssertionError("it was not refused")


def _rate(items: Iterable[object], what: Callable[..., object]) -> float:
    todo = list(items)
    started = time.perf_counter()
    for item in todo:
        what(item)
    return len(todo) / (time.perf_counter() - started)
