"""Events over the API: three logs as one, history with filters, and a stream that goes on where a reader stopped."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from controller.eventlog import EventLog
from controller.events import Event, Kind
from tests.api.stand import Stand, stand, until


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with stand(tmp_path_factory.mktemp("api")) as found:
        yield found


@pytest.fixture(scope="module")
def log(api: Stand) -> Iterator[EventLog]:
    """The controller's log."""
    with EventLog(api.directory / "controller-events", segment_bytes=65_536, max_bytes=400_000) as log:
        for number in range(300):
            log.append(event(number))
        yield log


def event(number: int) -> Event:
    network = ("privacy", "management")[number % 2]
    return Event(Kind.PORT_UP, f"number {number}", network=network, container=f"c{number % 10}", data={"n": number})


def get(api: Stand, **params: object) -> dict[str, object]:
    with api.client() as client:
        answer = client.get("/api/events", params=params)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


def texts(found: dict[str, object], log: str = "controller") -> list[str]:
    return [one["text"] for one in found["events"] if one["log"] == log]  # type: ignore[attr-defined,index]


def test_the_newest_are_shown_in_order(api: Stand, log: EventLog) -> None:
    found = get(api, limit=20, kind="port_up")
    assert texts(found) == [f"number {n}" for n in range(280, 300)]
    both = get(api, limit=1000)
    assert {one["log"] for one in both["events"]} == {"controller", "api"}  # type: ignore[attr-defined,index]
    times = [one["time"] for one in both["events"]]  # type: ignore[attr-defined,index]
    assert times == sorted(times)


def test_filters(api: Stand, log: EventLog) -> None:
    assert texts(get(api, network="management", limit=3, kind="port_up")) == [f"number {n}" for n in (295, 297, 299)]
    assert texts(get(api, container="c7", limit=2)) == ["number 287", "number 297"]
    assert texts(get(api, kind="api_started", since="1h"), "api")
    assert get(api, since="2020-01-01T00:00:00Z", kind="port_down")["events"] == []
    with api.client() as client:
        assert client.get("/api/events", params={"since": "soon"}).status_code == 422
        assert client.get("/api/events", params={"after": "12"}).status_code == 422
        assert client.get("/api/events", params={"kind": "nonsense"}).status_code == 422


def test_pages_lose_nothing(api: Stand, log: EventLog) -> None:
    cursor, seen = "c0.a0.p0", []
    while True:
        found = get(api, after=cursor, limit=70, kind="port_up")
        if not found["events"]:
            break
        seen += texts(found)
        cursor = str(found["next"])
    assert seen[-1] == "number 299" and len(seen) == len(set(seen))
    assert [int(text.split()[1]) for text in seen] == list(range(300 - len(seen), 300))


class Following(threading.Thread):
    """A reader of the stream."""

    def __init__(self, api: Stand, **headers: str) -> None:
        super().__init__(daemon=True)
        self.api, self.headers = api, headers
        self.seen: list[dict[str, object]] = []
        self.ids: list[str] = []
        self.stop = False
        self.ready = threading.Event()
        self.start()
        assert self.ready.wait(5)

    def run(self) -> None:
        with (
            self.api.client() as client,
            client.stream("GET", "/api/events/stream", headers=self.headers, timeout=30) as answer,
        ):
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                self.ready.set()
                if line.startswith("id: "):
                    self.ids.append(line[4:])
                if line.startswith("data: "):
                    self.seen.append(json.loads(line[6:]))
                if self.stop:
                    return

    def numbers(self) -> list[int]:
        return [one["data"]["n"] for one in self.seen if one["kind"] == "port_up"]  # type: ignore[index]


def test_what_happens_comes_at_once_and_resumes(api: Stand, log: EventLog) -> None:
    reader = Following(api)
    began = time.monotonic()
    log.append(event(1000))
    until(lambda: reader.numbers() == [1000])
    assert time.monotonic() - began < 1
    reader.stop = True
    for number in range(1001, 1101):
        log.append(event(number))
    until(lambda: not reader.is_alive())
    again = Following(api, **{"Last-Event-ID": reader.ids[0]})
    until(lambda: len(again.numbers()) == 100)
    assert again.numbers() == list(range(1001, 1101))
    again.stop = True
    log.append(event(1))


def test_ten_readers_one_of_them_stalled(api: Stand, log: EventLog) -> None:
    """The others miss nothing, and the stalled one is told what it has lost."""
    stalled = socket.socket(socket.AF_UNIX)
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.connect(str(api.where))
    stalled.sendall(b"GET /api/events/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
    readers = [Following(api) for _ in range(9)]
    before = memory(api)
    total = 3000
    for number in range(2000, 2000 + total):
        log.append(Event(Kind.PORT_UP, "x" * 300, data={"n": number}))
        if number % 50 == 0:
            time.sleep(0.06)  # no faster than the others can read before it is removed
    until(lambda: all(len(reader.numbers()) == total for reader in readers), 20)
    assert all(reader.numbers() == list(range(2000, 2000 + total)) for reader in readers)
    assert memory(api) - before < 20_000
    # It reads on: what was in its pipe, then a notice of what was removed, then the rest.
    stalled.settimeout(3)
    text = b""
    while b'"n":4999' not in text:
        text += stalled.recv(1 << 16)
    stalled.close()
    events = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: ")]
    numbers = [one["data"]["n"] for one in events if one["kind"] == "port_up"]
    assert numbers == sorted(numbers) and numbers[-1] == 4999
    notices = [one for one in events if one["kind"] == "lost" and "removed before being read" in one["text"]]
    lost = sum(one["data"]["last"] - one["data"]["first"] + 1 for one in notices)
    others = [one for one in events if one["kind"] == "lost" and one not in notices]
    assert notices and len(numbers) + lost + len(others) >= total
    for reader in readers:
        reader.stop = True
    log.append(event(1))


def test_readers_are_bounded(api: Stand, log: EventLog) -> None:
    socks = []
    try:
        for _ in range(40):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(api.where))
            sock.sendall(b"GET /api/events/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
            socks.append(sock)
        answers = [sock.recv(20) for sock in socks]
        assert sum(b"200" in answer for answer in answers) <= 32
        assert sum(b"429" in answer for answer in answers) >= 8
    finally:
        for sock in socks:
            sock.close()
    with api.client() as client:
        until(lambda: streams(client))


def streams(client: httpx.Client) -> bool:
    with client.stream("GET", "/api/events/stream") as answer:
        return answer.status_code == 200


def memory(api: Stand) -> int:
    """The resident memory of the API, in KiB."""
    assert api.process is not None
    text = Path(f"/proc/{api.process.pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0])
