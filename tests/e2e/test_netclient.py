"""Netmaker's client as the agent runs it, with a program in its place that writes down how it was called."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path

import pytest

from controller.agent import run
from controller.agent.netclient import Netclient, daemon_command, home_of, read_token
from controller.agent.resource import Failed
from controller.hostmodel import Leg, Tunnel
from controller.hostmodel import Netclient as Client
from controller.model import Role

from .apart import apart
from .test_names import Running, realize

SECRET = "S3CRETVALUE"
FAKE = """#!/bin/sh
{
    echo "args $1 $2"; echo "netns $(readlink /proc/self/ns/net)"
    echo "links $(ls /sys/class/net | tr '\\n' ' ')"; echo "run $(ls /run | tr '\\n' ' ')"
    echo "parent $(tr '\\0' ' ' < /proc/$PPID/cmdline)"
} >> /etc/netclient/calls
case $1 in
    join) echo "{\\"nm\\": {\\"API\\": \\"api.example.org:443\\"}}" > /etc/netclient/servers.json
        echo "$3" | md5sum > /etc/netclient/got; echo changed >> /etc/hosts;;
    daemon) exec sleep 1000;;
esac
"""


def token(server: str = "api.example.org:443") -> str:
    return base64.b64encode(json.dumps({"server": server, "value": SECRET}).encode()).decode()


def set_up(directory: Path) -> tuple[Leg, Netclient, Running]:
    """A leg's namespace, a token and the program."""
    program = directory / "bin" / "netclient"
    program.parent.mkdir()
    program.write_text(FAKE)
    program.chmod(0o755)
    run._PATH = f"{program.parent}:{run._PATH}"
    key = directory / "key"
    key.write_text(token() + "\n")
    key.chmod(0o600)
    subprocess.run(["ip", "netns", "add", "bulkhead-nm-mgmt"], check=True)
    leg = Leg("management", Role.MESH, "mesh-mgmt", "nm-mgmt", Tunnel("netmaker"), Client("api.example.org", key))
    runner = Running(daemon_command(leg, directory / "state", directory / "run"), "bulkhead-nm-mgmt")
    return leg, Netclient(leg, directory / "state", directory / "run", runner), runner


@apart
async def test_the_client_joins_and_runs_in_its_leg(directory: Path) -> None:
    hosts = Path("/etc/hosts").read_text()
    leg, client, runner = set_up(directory)
    done = await realize(client)
    assert done == [
        "+ nm-mgmt in the mesh of api.example.org: not joined",
        "+ netclient of nm-mgmt: it does not run",
    ]
    home = home_of(directory / "state", leg)
    for _ in range(100):
        calls = (home / "calls").read_text()
        if "args daemon" in calls and "parent" in calls.partition("args daemon")[2]:
            break
        subprocess.run(["sleep", "0.02"], check=True)
    assert "args join -t" in calls and "args daemon" in calls
    inode = os.stat("/run/netns/bulkhead-nm-mgmt").st_ino
    assert calls.count(f"netns net:[{inode}]") == 2
    assert SECRET not in calls and token() not in calls, "not in a command line of ours"
    assert "netns" not in calls.partition("run ")[2].splitlines()[0], "a /run of its own"
    sum_ = subprocess.run(["md5sum"], input=f"{token()}\n", capture_output=True, text=True, check=True).stdout
    assert (home / "got").read_text() == sum_
    assert Path("/etc/hosts").read_text() == hosts and home.stat().st_mode & 0o777 == 0o700
    # It died: only that is healed.
    assert runner.process is not None
    runner.process.kill()
    runner.process.wait()
    assert await realize(client) == ["+ netclient of nm-mgmt: it does not run"]
    await runner.stop()


@apart
async def test_what_keeps_it_from_joining_is_said(directory: Path) -> None:
    _, client, _ = set_up(directory)
    (directory / "bin/netclient").write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(Failed, match=r"has not joined api.example.org; is the server reachable") as caught:
        await realize(client)
    (directory / "bin/netclient").write_text(f"#!/bin/sh\necho {token()} >&2\nexit 1\n")
    with pytest.raises(Failed, match="cannot join") as caught:
        await realize(client)
    assert token() not in repr(caught.value) + str(caught.value.__cause__)
    (directory / "bin/netclient").unlink()
    with pytest.raises(Failed, match="netclient is not installed"):
        await realize(client)


def test_a_token_file_is_only_root_s(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(Failed, match="cannot be read: No such file"):
        read_token(path, "api.example.org")
    path.write_text(token())
    path.chmod(0o644)
    with pytest.raises(Failed, match=r"can be read by others; run: chown root .* chmod 600"):
        read_token(path, "api.example.org")
    path.chmod(0o600)
    assert read_token(path, "api.example.org") == token()
    with pytest.raises(Failed, match=r"is for api.example.org:443, not for api.example.com"):
        read_token(path, "api.example.com")
    for wrong in ("", SECRET, "e30=", "bnVsbA=="):
        path.write_text(wrong)
        with pytest.raises(Failed, match="holds no enrolment key") as caught:
            read_token(path, "api.example.org")
        assert SECRET not in str(caught.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(Failed, match="not a regular file"):
        read_token(path, "api.example.org")
