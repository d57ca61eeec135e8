"""Problem documents (RFC 9457): what an answer says where it is no. Imports problems only.

A problem has a stable code, a title, a detail that says what to do, and where a field is at fault, which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from controller.problems import BulkheadError, Problem

MEDIA_TYPE = "application/problem+json"
URN = "urn:bulkhead:problem:"

# Every code, with its status and title. A client may rely on both.
CODES: dict[str, tuple[int, str]] = {
    "bad-request": (400, "The request cannot be understood"),
    "unauthenticated": (401, "Nobody known"),
    "forbidden": (403, "Not allowed"),
    "foreign-origin": (403, "Asked for by another site"),
    "self-approval": (403, "Somebody else has to approve"),
    "not-found": (404, "Not there"),
    "method-not-allowed": (405, "Not with this method"),
    "too-slow": (408, "The request came too slowly"),
    "conflict": (409, "Something else has it already"),
    "duplicate-name": (409, "The name is taken"),
    "duplicate-id": (409, "The id is taken"),
    "duplicate-address": (409, "The address is taken"),
    "declared": (409, "Declared in the state file"),
    "refused": (409, "The node refuses it"),
    "not-realized": (409, "It was not made in time"),
    "ids-exhausted": (409, "No id is free"),
    "addresses-exhausted": (409, "No address is free"),
    "wrong-state": (409, "Not in its present state"),
    "in-progress": (409, "The same request is being carried out"),
    "shown-once": (409, "A secret is shown once"),
    "no-vpn-server": (409, "No VPN server"),
    "too-large": (413, "The body is too large"),
    "unsupported-media-type": (415, "Not JSON"),
    "wrong-host": (421, "Not the name of this API"),
    "invalid": (422, "The request says something impossible"),
    "unknown-network": (422, "No such network"),
    "unknown-node": (422, "No such node"),
    "unknown-container": (422, "No such container"),
    "key-reused": (422, "The idempotency key is another request's"),
    "too-many-requests": (429, "Too many requests"),
    "headers-too-large": (431, "The headers are too large"),
    "internal": (500, "A defect of the API was caught"),
    "unavailable": (503, "Not now"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one field of a request."""

    field: str
    found: str
    expected: str
    fix: str

    def as_dict(self) -> dict[str, str]:
        """The fault as JSON values."""
        return {"field": self.field, "found": self.found, "expected": self.expected, "fix": self.fix}


class ApiProblem(BulkheadError):
    """The answer is no. `detail` says what to do; `headers` go with the answer."""

    def __init__(
        self, code: str, detail: str, errors: Iterable[Fault] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})

    @property
    def status(self) -> int:
        """The HTTP status."""
        return CODES[self.code][0]

    def as_dict(self) -> dict[str, Any]:
        """The problem document."""
        status, title = CODES[self.code]
        return {
            "type": URN + self.code,
            "title": title,
            "status": status,
            "detail": self.detail,
            "errors": [fault.as_dict() for fault in self.errors],
        }

    def body(self) -> bytes:
        """The problem document as it is sent."""
        return json.dumps(self.as_dict(), ensure_ascii=False).encode()


def fault_of(problem: Problem, field: str | None = None) -> Fault:
    """What the reader of state files found, as a fault of a request."""
    return Fault(field if field is not None else problem.path, problem.found, problem.expected, problem.fix)
