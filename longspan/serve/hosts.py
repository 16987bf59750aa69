"""Names by which a server may be called: after DNS rebinding a hostile page's own name leads to
this machine, page and server are of one origin, and the browser lets the page ask and read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers

from longspan.serve.config import ServeConfig, is_loopback, plain_name
from longspan.serve.errors import ApiError

AUTHORITY = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^\[\]:/?#@\s]+)(?::[0-9]*)?")
ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?P<authority>.+)")
REMEDY = "if it should, start it with --allowed-host and that name"
ORIGIN_REMEDY = "if it should, start it with --allowed-origin and that origin"


class Hosts:
    """Checks the Host of every request, and the Origin of those that have one.

    Names of this machine's loopback interface are always right: nobody else can own them. Others
    must be named by ``allowed_hosts``; a server on a public address that names none takes all.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._is_open = config.is_public and not config.allowed_hosts
        self._origins = frozenset(config.allowed_origins)
        self._names = {plain_name(name) for name in (*config.allowed_hosts, config.host)}

    def refusal(self, headers: Headers) -> ApiError | None:
        """Return 403 in the API's shape; None for a request that is welcome."""
        if self._is_open:
            return None
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_known(hosts[0]):
            return ApiError(403, f"This server does not answer to Host {_shown(hosts)}; {REMEDY}.",
                            code="host_not_allowed")
        for origin in headers.getlist("origin"):
            if self.is_allowed(origin):
                continue
            found = ORIGIN.fullmatch(origin)
            if found is None or not self._is_known(found["authority"]):
                return ApiError(403, f"This server takes no requests of pages from "
                                f"{_shown([origin])}; {ORIGIN_REMEDY}.", code="origin_not_allowed")
        return None

    def is_allowed(self, origin: str) -> bool:
        """Return whether pages of this origin were named as ones that may use the server."""
        return origin in self._origins or "*" in self._origins

    def _is_known(self, authority: str) -> bool:
        found = AUTHORITY.fullmatch(authority)
        if found is None:
            return False
        name = plain_name(found["name"])
        return name in self._names or is_loopback(name)


def _shown(values: Sequence[str]) -> str:
    return ", ".join(repr(value[:100]) for value in values[:2]) or "none at all"
