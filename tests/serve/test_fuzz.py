"""An API fuzzer driven by the OpenAPI schema: no 5xx, no hang, every answer as documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from longspan.engine.front.client import AsyncEngine
from longspan.serve.app import create_app
from longspan.serve.config import ServeConfig
from tests.serve.fake import FakeEngine, Running, running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance,
          response_schema_conformance, negative_data_rejection, unsupported_method]
schema = schemathesis.openapi.from_dict(
    create_app(cast(AsyncEngine, FakeEngine()), ServeConfig()).openapi())


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Short answers: what nobody limits ends after eight tokens."""
    with running(FakeEngine(), default_max_tokens=8, max_body_bytes=1 << 24) as server:
        yield server


@schema.parametrize()
@hypothesis.settings(
    max_examples=25, deadline=3000, derandomize=True, database=None,
    suppress_health_check=list(hypothesis.HealthCheck))
def test_api(case: schemathesis.Case, server: Running) -> None:
    reply = case.call(base_url=server.url, timeout=5)
    case.validate_response(reply, checks=CHECKS)


def test_the_schema_is_complete():
    paths = schema.raw_schema["paths"]
    assert set(paths) == {
        "/", "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}",
        "/tokenize", "/detokenize", "/sources", "/health", "/metrics"}
    for path, methods in paths.items():
        for operation in methods.values():
            assert operation["description"] or operation["summary"], path
            assert operation["responses"]["200"]["content"], path
    body = schema.raw_schema["components"]["schemas"]["ChatRequest"]
    assert body["additionalProperties"] is False
    assert body["required"] == ["messages"]
