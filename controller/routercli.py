"""`bulkhead router` and `bulkhead inference`: the two ends of a security profile that answer requests."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from controller.problems import BulkheadError
from controller.terminal import file_argument, guarded, run_dir_option, say, security_dir_option

if TYPE_CHECKING:
    from controller.security.profile import Profile
    from controller.security.router import Settings


def _profile(file: Path) -> Profile:
    from controller.security.profile import load_profile

    return load_profile(file)


def _everywhere() -> tuple[str, ...]:
    return ("0.0.0.0", "::") if Path("/proc/net/if_inet6").exists() else ("0.0.0.0",)


@click.command()
@file_argument
@click.option("--on", "hosts", multiple=True, metavar="ADDRESS", help="Listen here only [default: 0.0.0.0 and ::].")
@click.option("--port", type=click.IntRange(1, 65535), help="Instead of the file's port.")
@click.option("--hpke/--no-hpke", default=True, show_default=True, help="Whether requests must be sealed by a client.")
@click.option("--client-certificates", is_flag=True, help="Clients must show a certificate of our CA.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that answer.")
@click.option("-v", "--verbose", is_flag=True, help="A line for each request: client, status, sizes, time. No content.")
@run_dir_option
@security_dir_option
@guarded
def router(
    file: Path,
    hosts: tuple[str, ...],
    port: int | None,
    hpke: bool,
    client_certificates: bool,
    workers: int,
    verbose: bool,
    run_dir: Path,
    security_dir: Path,
) -> None:
    """Answer clients with TLS 1.3, and ask the inference servers of a state FILE's security profile for them.

    In the foreground. SIGHUP makes it read FILE again, and SIGTERM stops it; neither drops an answer. Changed certificates
    are taken up by themselves. Figures: curl --unix-socket RUN-DIR/router.sock http://localhost/metrics
    """
    from controller.security.router import supervise

    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def read() -> Settings:
        from controller.security.router.settings import Settings, limits, targets

        profile = _profile(file)
        return Settings(
            name=profile.name,
            hosts=hosts or _everywhere(),
            port=port or profile.listen,
            pki=security_dir.absolute() / "pki",
            targets=targets(profile),
            limits=limits(profile),
            hpke=security_dir.absolute() / "hpke" if hpke else None,
            client_certificates=client_certificates,
            metrics=run_dir.absolute() / "router.sock",
            events=security_dir.absolute() / "events",
            workers=workers,
            access=verbose,
        )

    supervise(read, lambda: say(f"bulkhead: the router answers on port {port or _profile(file).listen}"))


@click.command()
@file_argument
@click.option("--token-ms", type=click.FloatRange(min=0), default=20, show_default=True, help="Between two words.")
@security_dir_option
@guarded
def inference(file: Path, token_ms: float, security_dir: Path) -> None:
    """Run a small inference server, to try a router with: it streams back the words it is given.

    In the role dev it listens on the profile's socket, as inference on the WireGuard address, with mutual TLS: only the
    peers that the profile names may ask. In the foreground; SIGTERM stops it.
    """
    from controller.security.inference import Inference, serve

    profile = _profile(file)
    role = str(profile.role)
    if role == "dev":
        given = Inference(profile.name, socket=profile.socket, group=profile.socket_group, token_s=token_ms / 1000)
        where = str(profile.socket)
    elif role == "inference":
        names = tuple(peer.name for peer in profile.peers)
        given = Inference(
            profile.name,
            address=str(profile.address),
            port=profile.inference_port,
            pki=security_dir.absolute() / "pki",
            routers=names,
            token_s=token_ms / 1000,
        )
        where = f"{profile.address} port {profile.inference_port}"
    else:
        raise BulkheadError(f"security.role of {file} is {role}; an inference server runs where it is dev or inference")
    serve(given, lambda: say(f"bulkhead: the inference server answers on {where}"))
    sys.exit(0)
