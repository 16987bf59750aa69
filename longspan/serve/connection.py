"""One connection below ASGI: time limit on a request's head, refusals in the API's shape."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from longspan.serve.errors import ApiError
from longspan.serve.logs import Seldom

logger = logging.getLogger("longspan.serve")
MAX_HEAD_BYTES = 65_536
REFUSAL = f"This is not a valid HTTP/1.1 request, or its head is above {MAX_HEAD_BYTES} bytes."


class Limit:
    """Bounds the connections of a server: beyond, the one that has been idle for longest makes
    room, and where none is idle the new one is refused.

    Args:
        most: connections at once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._reports = Seldom()

    def make_room(self, new: Connection, others: set[Any]) -> None:
        """Close a connection if there are too many."""
        if len(others) <= self.most:
            return
        idle = min((other for other in others if other.is_idle and other is not new),
                   key=lambda other: other.idle_since, default=None)
        if idle is not None:
            idle.transport.abort()
            others.discard(idle)
        else:
            new.refuse(ApiError(503, f"{self.most} connections are open, the limit of this server.",
                                code="too_many_connections", retry_after_s=1.0))
        self._reports.warn(logger, "%d connections are open, the limit of this server: "
                           "idle ones are closed, others refused", self.most)


class Connection(H11Protocol):
    """uvicorn's connection with a time limit: its own waits forever for an incomplete head.

    Args:
        head_timeout_s: longest time without a request being served, from the connection's
            beginning or from the next request's first byte until its head is whole.
    """

    def __init__(
        self, *args: Any, head_timeout_s: float, limit: Limit | None = None, **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._head_timeout_s, self._limit = head_timeout_s, limit
        self._timer: asyncio.TimerHandle | None = None
        self.idle_since = 0.0
        """Time of the event loop at which something last happened."""

    @property
    def is_idle(self) -> bool:
        """Nobody waits for anything here."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Handle the event loop's call."""
        super().connection_made(transport)
        self._watch()
        if self._limit is not None:
            self._limit.make_room(self, self.connections)

    def data_received(self, data: bytes) -> None:
        """Handle the event loop's call."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Handle the end of a reply."""
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the event loop's call."""
        super().connection_lost(exc)
        self._stop_watching()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not a request, in the shape of every other error."""
        self.refuse(ApiError(400, REFUSAL))

    def _watch(self) -> None:
        self.idle_since = self.loop.time()
        if not self.is_idle or self.transport.is_closing():
            self._stop_watching()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._head_timeout_s, self._give_up)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        has_begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if has_begun:
            self.refuse(ApiError(408, "The request's head did not arrive within "
                                  f"{self._head_timeout_s:g} s."))
        else:
            self.transport.close()

    def refuse(self, error: ApiError) -> None:
        """Send a last reply where the protocol still allows one, and close the connection; its
        running request sees that the client is gone."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reply = error.response()
            reply.headers["connection"] = "close"
            for event in (h11.Response(status_code=error.status, headers=reply.raw_headers),
                          h11.Data(data=bytes(reply.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
