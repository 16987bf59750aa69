"""Pages of other origins: by these answers a browser lets those that are named use this server."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import Message, Scope

from longspan.serve.hosts import Hosts

METHODS = "GET, POST, OPTIONS"
SHOWN = "X-Request-Id, X-Predicted-TTFT-Ms, Retry-After"
"""Headers of replies that pages may read."""
MAX_AGE_S = 600


class Origins:
    """Answers to preflight requests and headers of replies (CORS)."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    def preflight(self, scope: Scope) -> Response | None:
        """Return the answer to a preflight request, which browsers send without a key; None for
        any other request, and for origins that are not named."""
        headers = Headers(scope=scope)
        if scope["method"] != "OPTIONS" or "access-control-request-method" not in headers \
                or not self._origin(headers):
            return None
        wanted = headers.get("access-control-request-headers", "")
        answer = {"Access-Control-Allow-Methods": METHODS,
                  "Access-Control-Allow-Headers": wanted or "*",
                  "Access-Control-Max-Age": str(MAX_AGE_S)}
        if headers.get("access-control-request-private-network") == "true":
            answer["Access-Control-Allow-Private-Network"] = "true"
        return Response(status_code=204, headers=answer)

    def add_headers(self, scope: Scope, message: Message) -> None:
        """Let the page that asks read the reply, if its origin is named."""
        origin = self._origin(Headers(scope=scope))
        if origin:
            reply = MutableHeaders(scope=message)
            reply["Access-Control-Allow-Origin"] = origin
            reply["Access-Control-Expose-Headers"] = SHOWN
            reply.add_vary_header("Origin")

    def _origin(self, headers: Headers) -> str | None:
        origin = headers.get("origin")
        return origin if origin and self._hosts.is_allowed(origin) else None
