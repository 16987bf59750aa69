"""The outermost layer: names of the server, API key on every route but /health, a bound on headers,
request ids."""

from __future__ import annotations

import base64
import binascii
import hmac
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longspan.serve.config import ServeConfig
from longspan.serve.errors import ApiError, as_api_error
from longspan.serve.hosts import Hosts
from longspan.serve.logs import access
from longspan.serve.origins import Origins

MAX_HEADERS = 200
MAX_SHOWN = 200
"""Characters of a path that the log shows."""
OPEN_PATHS = frozenset({"/health"})
CHALLENGE = {"WWW-Authenticate": 'Basic realm="longspan: any name, the API key as password"'}
"""Makes a browser ask for the key, so that the playground works with one."""


class EdgeMiddleware:
    """Refuses requests by their headers alone, and gives each request an id."""

    def __init__(
        self, app: ASGIApp, config: ServeConfig, answered: Callable[[str, int], None],
    ) -> None:
        self._app, self._answered = app, answered
        self._hosts = Hosts(config)
        self._origins = Origins(self._hosts)
        self._keys = [key.encode() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started_s = uuid.uuid4().hex, time.monotonic()
        scope.setdefault("state", {})["request_id"] = request_id

        has_begun, status = False, 0

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun, status
            if message["type"] == "http.response.start":
                has_begun, status = True, message["status"]
                route = getattr(scope.get("route"), "path", "other")
                self._answered(route, message["status"])
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
                self._origins.add_headers(scope, message)
            await send(message)

        refusal = self._refusal(scope)
        app = refusal.response() if refusal else \
            self._origins.preflight(scope) or self._app
        try:
            await app(scope, receive, send_with_id)
        except Exception as error:
            if has_begun:
                raise  # the connection has to close: nothing else tells the client
            await as_api_error(error, request_id).response()(scope, receive, send_with_id)
        finally:
            client = (scope.get("client") or ("-",))[0]
            # a path is the client's own text: no line of the log may be made of it
            access(client, f"{scope['method']} {scope['path'][:MAX_SHOWN]!r}", status, request_id,
                   started_s)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if len(scope["headers"]) > MAX_HEADERS:
            return ApiError(431, f"More than {MAX_HEADERS} headers.")
        headers = Headers(scope=scope)
        refusal = self._hosts.refusal(headers)
        is_free = scope["path"] in OPEN_PATHS or self._origins.preflight(scope) is not None
        if refusal or is_free or not self._keys:
            return refusal
        given = _given_key(headers.get("authorization", ""))
        if given is None:
            return ApiError(401, "No API key: send Authorization: Bearer KEY.",
                            code="invalid_api_key", headers=CHALLENGE)
        # Every key is compared, each in constant time.
        if not any([hmac.compare_digest(given, key) for key in self._keys]):
            return ApiError(401, "This API key is not valid here.", code="invalid_api_key",
                            headers=CHALLENGE)
        return None


def _given_key(header: str) -> bytes | None:
    """Return the key of a Bearer header, or the password of a Basic one."""
    scheme, _, value = header.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None
