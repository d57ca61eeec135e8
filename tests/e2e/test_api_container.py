"""The API on the address of its container: real namespaces, TLS, tokens alone; made anew with the container."""

from __future__ import annotations

import asyncio
import json
import ssl
import stat
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from tests.api.stand import Stand, stand
from tests.e2e.apart import apart
from tests.e2e.test_sockets import ADDRESS, container, serving, sh

ASK = """
import http.client, json, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1]) if sys.argv[1] else ssl._create_unverified_context()
try:
    if sys.argv[2] == "plain":
        connection = http.client.HTTPConnection(sys.argv[3], 9573, timeout=3)
    else:
        connection = http.client.HTTPSConnection(sys.argv[3], 9573, timeout=3, context=context)
    headers = {"Host": sys.argv[4]} if sys.argv[4] else {}
    if sys.argv[5]:
        headers["Authorization"] = "Bearer " + sys.argv[5]
    connection.request("GET", "/api/containers", headers=headers)
    answer = connection.getresponse()
    print(answer.status, json.loads(answer.read()).get("type", "good"))
except (OSError, http.client.HTTPException) as exc:
    print(type(exc).__name__)
"""


async def ask(ca: Path | None, token: str = "", *, how: str = "tls", host: str = "") -> str:
    """What somebody in the container's namespace is answered."""
    words = [str(ca or ""), how, ADDRESS, host, token]
    command = ["ip", "netns", "exec", "bulkhead-201", sys.executable, "-c", ASK, *words]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout.strip()


async def comes(ca: Path, token: str, wanted: str) -> None:
    for _ in range(100):
        if await ask(ca, token) == wanted:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(await ask(ca, token))


@apart
async def test_tokens_alone_over_tls_where_the_container_is(directory: Path) -> None:
    container()
    async with serving(directory):
        await asyncio.to_thread(_with_api, directory, asyncio.get_running_loop())


def _with_api(directory: Path, loop: asyncio.AbstractEventLoop) -> None:
    with stand(directory) as api:
        asyncio.run_coroutine_threadsafe(_ask_it(api), loop).result(50)


async def _ask_it(api: Stand) -> None:
    with api.client() as client:
        body = {"name": "t", "scopes": ["read"]}
        token = client.post("/api/tokens", json=body).raise_for_status().json()["token"]
        ca, key = api.directory / "state/certificate.pem", api.directory / "state/private_key.pem"
        await comes(ca, token, "200 good")
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        pin = sha256(ssl.PEM_cert_to_DER_cert(ca.read_text())).hexdigest()
        assert pin in (api.directory / "api.log").read_text()
        assert await ask(ca) == "401 urn:bulkhead:problem:unauthenticated"
        assert await ask(ca, host="localhost", token=token) == "421 urn:bulkhead:problem:wrong-host"
        assert await ask(ca, host="op-dbus-api:9573", token=token) == "200 good"
        assert (await ask(None, how="plain", token=token)).startswith(
            ("RemoteDisconnected", "BadStatusLine", "Connection")
        )
        # by loopback the names of the container are not ours
        assert client.get("/healthz", headers={"Host": ADDRESS}).status_code == 421
        sh("ip netns delete bulkhead-201")
        container()
        await comes(ca, token, "200 good")
        before = ca.read_bytes()
        api.stop(9)
        api.start()
        await comes(ca, token, "200 good")
        assert ca.read_bytes() == before
        events = [json.dumps(one) for one in api.audit("api_started")]
        assert sum(f"{ADDRESS}:9573" in one for one in events) == 3
        api.stop(15)


@apart
async def test_never_where_there_is_a_way_out(directory: Path) -> None:
    """The reader of state files refuses it already; so does the API itself."""
    from dataclasses import replace

    from controller.api.listener import Listener
    from controller.api.settings import Settings
    from controller.api.view import View
    from controller.hostmodel import Api
    from controller.model import Ipv4
    from tests.api.stand import EXAMPLE

    view = View(EXAMPLE, "n1")
    host = replace(view.declared.host, api=Api("102", Ipv4.parse("10.0.0.102")))
    view._declared = replace(view.declared, host=host)

    async def opened(*_: object) -> None:
        raise AssertionError

    listener = Listener(Settings(EXAMPLE, directory, directory), view, opened)  # type: ignore[arg-type]
    await listener.look()
    assert "way out" in listener.why and listener.listening is None
