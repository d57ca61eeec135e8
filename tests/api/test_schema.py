"""The OpenAPI document against the API: whatever schemathesis makes of it is answered as documented, and nothing is changed by
whoever has not the scope."""

from __future__ import annotations

import collections
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from controller.records import Records
from tests.api.stand import Stand, good, stand

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to ask as other users")
STRANGER = 12345
ENDLESS = {"/api/events/stream", "/mcp"}
schemathesis.checks.load_all_checks()
CHECKS = schemathesis.checks.CHECKS.get_by_names(
    [
        *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
        *("response_headers_conformance", "allow_header_conformance"),
    ]
)
EXAMPLES = int(os.environ.get("BULKHEAD_EXAMPLES", "6"))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with stand(tmp_path_factory.mktemp("api"), port=port) as found:
        yield found


@pytest.fixture(scope="module")
def document(api: Stand) -> dict[str, Any]:
    with api.client() as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
    return found


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Sockets that are made meanwhile are that user's."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def fuzz(api: Stand, document: dict[str, Any], headers: dict[str, str], uid: int = 0) -> list[int]:
    """Send whatever comes to mind to every route. Answers the statuses that came back."""
    schema = schemathesis.openapi.from_dict(document)
    base = f"http://127.0.0.1:{api.port}"
    statuses: list[int] = []
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in ENDLESS:
            continue
        either = st.one_of(
            operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE),
            operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
        )

        @seed(1)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.generate),
        )
        @given(case=either)
        def attempt(case: Any) -> None:
            case.headers = {**(case.headers or {}), **headers}
            with as_user(uid), requests.Session() as session:
                answer = case.call(base_url=base, session=session, timeout=20)
            statuses.append(answer.status_code)
            case.validate_response(answer, checks=CHECKS)

        attempt()
    print(sorted(collections.Counter(statuses).items()), len(statuses))
    return statuses


def bare(records: Records) -> Records:
    """What a change would change."""
    return replace(records, revision=0, nodes=(), operations=())


def test_the_document_is_whole(document: dict[str, Any]) -> None:
    from jsonschema import Draft202012Validator

    assert document["openapi"].startswith("3.1")
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, ways in document["paths"].items():
        for way in ways.values():
            assert way["summary"] and "security" in way, path
            for status, answer in way["responses"].items():
                kind = "application/problem+json"
                assert int(status) < 400 or answer["content"][kind]["schema"]["$ref"].endswith("ProblemOut")
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_root_is_answered_as_documented(api: Stand, document: dict[str, Any]) -> None:
    statuses = fuzz(api, document, {})
    assert not [status for status in statuses if status >= 500]
    assert {200, 422} <= set(statuses) and 401 not in statuses


def test_a_stranger_changes_and_sees_nothing(api: Stand, document: dict[str, Any]) -> None:
    before = bare(api.realizer.records)
    statuses = fuzz(api, document, {}, STRANGER)
    # A path that no route has is nobody's: 404 whoever asks.
    assert (
        set(statuses) <= {200, 304, 400, 401, 404, 408, 413, 415, 422, 429} and statuses.count(200) < len(statuses) / 4
    )
    assert bare(api.realizer.records) == before


def test_who_may_only_read_changes_nothing(api: Stand, document: dict[str, Any]) -> None:
    with api.client() as client:
        body = {"name": "reader", "scopes": ["read"], "expires_in_s": 600}
        token = good(client.post("/api/tokens", json=body))["token"]
    before = bare(api.realizer.records)
    statuses = fuzz(api, document, {"Authorization": f"Bearer {token}"}, STRANGER)
    assert not [status for status in statuses if status >= 500] and 403 in statuses
    assert bare(api.realizer.records) == before
