"""Clients that are known by a public key, and requests that are sealed to the router: HPKE (RFC 9180) over HTTP.

`docs/hpke.md` tells the protocol. The router uses `Registry`, `RouterKeys` and `Opener`; clients use `Sealer`, or
`controller.security.hpke.client`. Everything but the files of registry and keys is values in, values out.
"""

from controller.security.hpke.answers import AnswerOpener, AnswerSealer, BadAnswer
from controller.security.hpke.keys import ClientKey, PublicKey
from controller.security.hpke.opener import Opened, Opener, Refused, new_binding
from controller.security.hpke.registry import Client, Registry
from controller.security.hpke.routerkeys import RouterKeys
from controller.security.hpke.sealer import Config, Sealed, Sealer
from controller.security.hpke.wire import HEADER, MEDIA_TYPE, NEXT_NONCE

__all__ = [
    "HEADER",
    "MEDIA_TYPE",
    "NEXT_NONCE",
    "AnswerOpener",
    "AnswerSealer",
    "BadAnswer",
    "Client",
    "ClientKey",
    "Config",
    "Opened",
    "Opener",
    "PublicKey",
    "Refused",
    "Registry",
    "RouterKeys",
    "Sealed",
    "Sealer",
    "new_binding",
]
