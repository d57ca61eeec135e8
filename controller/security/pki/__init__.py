"""Certificates: an own CA, what it signs, renewal, revocation and the CA's replacement. `Pki` is the way in.

Imports problems, events, eventlog and `controller.security.tls`.
"""

from controller.security.pki.authority import Issued, Pki
from controller.security.pki.holder import Holder
from controller.security.pki.identity import Usage

__all__ = ["Holder", "Issued", "Pki", "Usage"]
