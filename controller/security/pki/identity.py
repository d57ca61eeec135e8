"""Whom a certificate is for: a name, what it is used for, and the addresses and host names it stands for. Imports
problems."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from controller.problems import BulkheadError

DAYS = 31.0
"""How long a certificate is good for."""
LONGEST_DAYS = 366.0
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_HOST = re.compile(r"(\*\.)?" + _NAME.pattern)


class Usage(StrEnum):
    """What a certificate may do: answer connections, make them, or both."""

    SERVER = "server"
    CLIENT = "client"
    PEER = "peer"

    @property
    def serves(self) -> bool:
        """Whether it may answer connections."""
        return self is not Usage.CLIENT

    @property
    def connects(self) -> bool:
        """Whether it may make them."""
        return self is not Usage.SERVER


@dataclass(frozen=True, slots=True)
class Identity:
    """Who has certificates. `name` is in each as a host name too; `days` is how long each is good for. `remote`: the
    private key is on the machine it was made on, so certificates are signed from requests only."""

    name: str
    usage: Usage
    ips: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    days: float = DAYS
    remote: bool = False

    @classmethod
    def checked(
        cls,
        name: str,
        usage: str,
        ips: Iterable[str] = (),
        dns: Iterable[str] = (),
        days: float = DAYS,
        *,
        remote: bool = False,
    ) -> Self:
        """One from what a person wrote. Raises `BulkheadError`."""
        check_name(name)
        if usage not in list(Usage):
            raise BulkheadError(f"{usage!r} is no kind of certificate; expected server, client or peer")
        if not 0 < days <= LONGEST_DAYS:
            raise BulkheadError(
                f"a certificate cannot be good for {days:g} days; expected more than 0, {LONGEST_DAYS:g} at most"
            )
        hosts = tuple(dict.fromkeys(_host(one) for one in dns if one.lower() != name))
        return cls(name, Usage(usage), tuple(dict.fromkeys(map(_address, ips))), hosts, float(days), remote)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every host name it stands for."""
        return (self.name, *self.dns)


def check_name(name: str) -> None:
    """Raise `BulkheadError` unless it can be a name: of a file, in a certificate, and of a host."""
    if len(name) > 64 or not _NAME.fullmatch(name) or name.rpartition(".")[2].isdecimal():
        raise BulkheadError(
            f"{name!r} cannot be a name; expected a host name in small letters, 64 at most, like router1"
        )


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise BulkheadError(f"{text!r} is no address; expected one like 10.0.0.2, and names with --dns") from None


def _host(text: str) -> str:
    small = text.lower().removesuffix(".")
    if len(small) > 253 or not _HOST.fullmatch(small) or small.rpartition(".")[2].isdecimal():
        raise BulkheadError(f"{text!r} is no host name; expected one like llm.example, and addresses with --ip")
    return small
