"""The API is killed under load, again and again: what was acknowledged is there, what was not is there as a whole or gone."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import httpx

from tests.api.stand import Stand, stand, until

ROUNDS = int(os.environ.get("BULKHEAD_ROUNDS", "5"))


class Load(threading.Thread):
    """Creates and deletes its own containers, and knows which of them must be there, and which must not."""

    def __init__(self, api: Stand, number: int) -> None:
        super().__init__(daemon=True)
        self.api, self.number = api, number
        self.there: set[str] = set()
        self.gone: set[str] = set()
        self.failures: list[str] = []
        self.stop = False
        self.random = random.Random(number)

    def run(self) -> None:
        count = 0
        with self.api.client() as client:
            while not self.stop:
                count += 1
                try:
                    if self.there and self.random.random() < 0.4:
                        self._remove(client, self.random.choice(sorted(self.there)))
                    else:
                        self._create(client, f"w{self.number}-{count}")
                except httpx.HTTPError:
                    time.sleep(0.05)  # nobody knows: neither there nor gone may be said of it

    def _create(self, client: httpx.Client, name: str) -> None:
        network = self.random.choice(["privacy", "management"])
        answer = client.post("/api/containers/create", json={"name": name, "network": network})
        if answer.status_code == 201:
            self.there.add(name)
        elif answer.status_code in (409, 503):
            self.gone.add(name)
        else:
            self.failures.append(answer.text)

    def _remove(self, client: httpx.Client, name: str) -> None:
        self.there.discard(name)  # from now on nobody knows
        try:
            answer = client.delete(f"/api/containers/{name}")
        except httpx.ConnectError:
            self.there.add(name)
            raise
        if answer.status_code in (200, 404):
            self.gone.add(name)
        elif answer.status_code not in (202, 409, 503):
            self.failures.append(answer.text)


def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    dice = random.Random(7)
    with stand(tmp_path) as api:
        workers = [Load(api, number) for number in range(6)]
        for worker in workers:
            worker.start()
        for _ in range(ROUNDS):
            time.sleep(dice.uniform(0.1, 0.5))
            api.stop(9)
            api.start()
        time.sleep(0.2)
        for worker in workers:
            worker.stop = True
        for worker in workers:
            worker.join(40)
        records = lambda: api.realizer.records  # noqa: E731
        until(lambda: not [one for one in records().operations if one.state == "running"], 40)
        names = {one.name for one in records().containers}
        for worker in workers:
            assert not worker.failures
            assert worker.there <= names, worker.there - names
            assert not worker.gone & names
        assert sum(len(worker.there) for worker in workers) > ROUNDS
        with api.client() as client:
            found = client.get("/api/containers").json()["containers"]
        assert {one["name"] for one in found if one["origin"] == "stored"} == names
        assert all(one["state"] == "ready" for one in found)
