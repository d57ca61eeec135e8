"""Runs the host's own tools, each with a time limit. Imports resource."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from controller.agent.resource import Failed

NETNS_DIR = Path("/run/netns")
PREFIX = "bulkhead-"
"""Network namespaces of ours are called so, and everything called so is ours."""

_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_PACKAGES = {
    "wg": "wireguard-tools",
    "wireguard-go": "wireguard-go",
    "nft": "nftables",
    "dnsmasq": "dnsmasq-base",
    "lxc-start": "lxc",
    "lxc-create": "lxc",
    "lxc-info": "lxc",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "conntrack": "conntrack",
}


def inside(namespace: str | None, *command: str) -> list[str]:
    """The command line that runs `command` in a named network namespace; None is the one this process is in."""
    if namespace is None:
        return list(command)
    return ["nsenter", f"--net={NETNS_DIR / namespace}", "--", *command]


def environment() -> dict[str, str]:
    """What every tool is given: a path with the administrator's programs, and messages that can be read."""
    return {**os.environ, "PATH": _PATH, "LC_ALL": "C"}


async def call(
    *command: str, namespace: str | None = None, stdin: str | None = None, timeout_s: float = 10, secret: bool = False
) -> str:
    """Run a command and answer what it printed. Raises `Failed` with its standard error.

    Secrets go through `stdin`, never through arguments; with `secret` what it printed is left out of the message.
    """
    line = inside(namespace, *command)
    try:
        process = await asyncio.create_subprocess_exec(
            *line,
            stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(),
        )
    except FileNotFoundError as exc:
        program = Path(str(exc.filename)).name
        package = _PACKAGES.get(program, program)
        raise Failed(f"{program} is not installed; run: apt-get install {package}") from exc
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin.encode() if stdin is not None else None), timeout_s)
    except TimeoutError as exc:
        raise Failed(f"{' '.join(command)}: no answer within {timeout_s:g} s") from exc
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        said = " ".join((err or out).decode(errors="replace").split())[:400]
        raise Failed(f"{' '.join(command)}: exit {process.returncode}" + ("" if secret else f": {said}"))
    return out.decode(errors="replace")
