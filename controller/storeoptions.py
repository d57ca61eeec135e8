"""The options that say which node this is and where the store is, for every command that needs them. Imports the store, late."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from controller.asking import ask
from controller.problems import BulkheadError
from controller.terminal import reporting

if TYPE_CHECKING:
    from controller.statefile import Loaded
    from controller.store import Tls


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """`node` is this host's name in the store; without `addresses` there is no store. `files` are of TLS, or empty."""

    node: str
    addresses: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def tls(self) -> Tls | None:
        """For addresses that begin with ssl:."""
        from controller.store import Tls

        return Tls(*self.files) if self.files else None

    def or_running(self, run_dir: Path) -> StoreOptions:
        """These, or where none were given those of the controller that runs there, or of the store that does."""
        if self.addresses:
            return self
        with contextlib.suppress(BulkheadError):
            status = ask(run_dir, {"ask": "status"})
            return replace(self, node=str(status["node"]), addresses=tuple(status["store"]))
        path = run_dir.absolute() / SOCKET
        return replace(self, addresses=(f"unix:{path}",)) if path.exists() else self

    def load(self, file: Path) -> Loaded:
        """What a state file says, with what the store holds for this node. Raises `BulkheadError`."""
        from controller.desired import Desired
        from controller.statefile import load
        from controller.store import Store

        if not self.addresses:
            return load(file)
        store = Store(self.addresses, self.tls)
        try:
            return Desired(file, self.node, store.start(), time.time()).loaded
        finally:
            store.close()

    def words(self) -> list[str]:
        """The same as options of a command line."""
        out = ["--node", self.node]
        if self.addresses:
            out += ["--store", ",".join(self.addresses)]
        for name, path in zip(_FILES, self.files, strict=False):
            out += [f"--{name}", str(path)]
        return out


SOCKET = "store.sock"
_FILES = ("store-private-key", "store-certificate", "store-ca")


def store_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options; it gets them as `store`, a `StoreOptions`."""

    @wraps(function)
    def wrapped(*args: Any, store: str, node: str, **kwargs: Any) -> None:
        with reporting():
            given = options_of(store, node, kwargs)
        function(*args, store=given, **kwargs)

    def options_of(store: str, node: str, kwargs: dict[str, Any]) -> StoreOptions:
        files = [kwargs.pop(name.replace("-", "_")) for name in _FILES]
        if any(files) and not all(files):
            raise BulkheadError("--store-private-key, --store-certificate and --store-ca go together; give all three")
        addresses = tuple(filter(None, (part.strip() for part in store.split(","))))
        for address in addresses:
            if not address.startswith(("unix:", "tcp:", "ssl:")):
                raise BulkheadError(f"--store: {address!r}; expected unix:PATH, tcp:HOST:PORT or ssl:HOST:PORT")
            if address.startswith("ssl:") and not all(files):
                raise BulkheadError(f"--store: {address} needs --store-private-key, --store-certificate and --store-ca")
        return StoreOptions(node, addresses, tuple(files) if all(files) else ())

    options = [
        click.option(
            "--store",
            default="",
            envvar="BULKHEAD_STORE",
            help="Where the store listens, one address or those of a cluster, with commas; none: the state file alone.",
        ),
        click.option(
            "--node", default=os.uname().nodename, envvar="BULKHEAD_NODE", help="This host's name in the store."
        ),
        click.option(f"--{_FILES[0]}", type=click.Path(path_type=Path), help="For ssl: stores: our private key, PEM."),
        click.option(f"--{_FILES[1]}", type=click.Path(path_type=Path), help="For ssl: stores: our certificate, PEM."),
        click.option(f"--{_FILES[2]}", type=click.Path(path_type=Path), help="For ssl: stores: their CA, PEM."),
    ]
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped
