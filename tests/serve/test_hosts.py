"""Which names a server answers to: a page whose name leads to this machine must get nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from longspan.errors import LongspanError
from longspan.serve.config import ServeConfig
from tests.serve.fake import Running, running

ROUTES = ("/", "/health", "/metrics", "/v1/models", "/openapi.json", "/nothing")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(allowed_hosts=("Box.Example", "fe80::7")) as server:
        yield server


def status(server: Running, **headers: str) -> int:
    return httpx.get(server.url + "/health", headers=headers, timeout=5).status_code


@pytest.mark.parametrize(("host", "expected"), [
    ("localhost", 200), ("localhost:8000", 200), ("LocalHost:1", 200), ("localhost.", 200),
    ("localhost.:80", 200), ("127.0.0.1", 200), ("127.0.0.1:65000", 200), ("127.8.8.8", 200),
    ("[::1]", 200), ("[::1]:8000", 200), ("[0:0:0:0:0:0:0:1]:1", 200), ("box.example", 200),
    ("BOX.example.:443", 200), ("[FE80::7]", 200),
    ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403),
    ("evil-localhost", 403), ("127.0.0.1.evil.example", 403), ("192.168.1.7", 403),
    ("[::2]:8000", 403), ("::1", 403), ("localhost..", 403), ("localhost:80:80", 403),
    ("x@localhost", 403), ("localhost/x", 403), ("[localhost]", 403), ("", 403), (":8000", 403),
    ("a.box.example", 403)])
def test_hosts(server: Running, host: str, expected: int) -> None:
    assert status(server, Host=host) == expected


@pytest.mark.parametrize(("origin", "expected"), [
    ("http://localhost:3000", 200), ("http://127.0.0.1:8000", 200), ("https://[::1]", 200),
    ("https://BOX.example", 200), ("http://evil.example", 403), ("https://evil.example:8000", 403),
    ("null", 403), ("", 403), ("localhost", 403), ("file://", 403),
    ("http://localhost@evil.example", 403), ("http://evil.example/localhost", 403)])
def test_origins(server: Running, origin: str, expected: int) -> None:
    assert status(server, Origin=origin) == expected


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "evil.example", "Origin": "http://evil.example"},
    {"Origin": "http://evil.example"}])
def test_every_route_refuses_in_the_apis_shape(server: Running, headers: dict[str, str]) -> None:
    ask = {"prompt": "hi", "max_tokens": 2}
    replies = [httpx.get(server.url + route, headers=headers) for route in ROUTES]
    replies += [httpx.post(server.url + route, headers=headers, json=ask)
                for route in ("/v1/completions", "/v1/chat/completions", "/tokenize")]
    for reply in replies:
        assert reply.status_code == 403
        error = reply.json()["error"]
        assert error["type"] == "permission_error" and "evil.example" in error["message"]
        assert re.search("--allowed-(host|origin)", error["message"])
        assert "x-request-id" in reply.headers
    assert not server.engine.requests


def test_a_request_without_host(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        reply = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b" 403 " in head and "none at all" in json.loads(body)["error"]["message"]


def test_the_playgrounds_own_requests(server: Running) -> None:
    assert httpx.get(server.url + "/").status_code == 200
    reply = httpx.post(server.url + "/v1/completions", json={"prompt": "hi", "max_tokens": 2},
                       headers={"Origin": server.url})
    assert reply.status_code == 200


@pytest.mark.parametrize(("options", "host", "expected"), [
    ({"host": "::1"}, "evil.example", 403), ({"host": "localhost"}, "evil.example", 403),
    ({"host": "127.0.0.2"}, "evil.example", 403),
    ({"host": "0.0.0.0"}, "any.example", 200),
    ({"host": "0.0.0.0", "allowed_hosts": ("box.example",)}, "any.example", 403),
    ({"host": "0.0.0.0", "allowed_hosts": ("box.example",)}, "box.example:8000", 200),
    ({"host": "0.0.0.0", "allowed_hosts": ("box.example",)}, "localhost", 200),
    ({"host": "10.0.0.7", "allowed_hosts": ("box.example",)}, "10.0.0.7:80", 200)])
def test_public_servers_take_any_name_unless_some_are_named(
    options: dict[str, Any], host: str, expected: int,
) -> None:
    with running(**options) as server:
        assert status(server, Host=host) == expected


@pytest.mark.parametrize("name", [
    "http://box.example", "box.example:80", "[::1]:80", "", "*", "box example", "box.example/"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(LongspanError, match="allowed host"):
        ServeConfig(allowed_hosts=(name,))


@pytest.mark.parametrize("origin", [
    "app.example.org", "https://app.example.org/", "https://", "HTTPS://x y", ""])
def test_origins_that_are_none(origin: str) -> None:
    with pytest.raises(LongspanError, match="allowed origin"):
        ServeConfig(allowed_origins=(origin,))


PREFLIGHT = {"Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os"}


@pytest.mark.parametrize("allowed", ["https://app.example.org", "*"])
def test_a_page_elsewhere(allowed: str) -> None:
    origin = {"Origin": "https://app.example.org"}
    with running(allowed_origins=(allowed,), api_keys=("secret",)) as server, \
            httpx.Client(base_url=server.url) as client:
        asked = client.options("/v1/chat/completions", headers={**origin, **PREFLIGHT})
        assert asked.status_code == 204  # without a key, for browsers send none
        assert asked.headers["access-control-allow-origin"] == origin["Origin"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert client.get("/v1/models", headers=origin).status_code == 401
        models = client.get("/v1/models", headers={**origin, "Authorization": "Bearer secret"})
        assert models.status_code == 200 and "Origin" in models.headers["vary"]
        assert models.headers["access-control-allow-origin"] == origin["Origin"]
        assert "X-Request-Id" in models.headers["access-control-expose-headers"]
        if allowed != "*":
            other = {"Origin": "https://evil.example"}
            asked = client.options("/v1/models", headers={**other, **PREFLIGHT})
            assert asked.status_code == 403
            assert "access-control-allow-origin" not in asked.headers
        assert "access-control-allow-origin" not in client.get("/health").headers


def test_no_page_elsewhere_unless_it_is_named(server: Running) -> None:
    asked = httpx.options(server.url + "/v1/models", headers={
        "Origin": "https://app.example.org", **PREFLIGHT})
    assert asked.status_code == 403 and "access-control-allow-origin" not in asked.headers
