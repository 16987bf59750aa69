"""Server-sent events: headers at once, signs of life while it is silent, progress, text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from longspan.engine.request import Event, TokenEvent
from longspan.serve.admission import Gate, Ticket
from longspan.serve.body import Disconnect
from longspan.serve.errors import ClientGone, as_api_error
from longspan.serve.format import Delta, Format, Json
from longspan.serve.generation import Generation, millis

PING = b": ping\n"
"""A comment between events, without a blank line: to simple readers that would be an event."""
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """How one stream is written."""

    request_id: str = ""
    include_usage: bool = False
    continuous_usage: bool = False
    return_progress: bool = False
    ping_interval_s: float = 5.0
    send_timeout_s: float = 120.0


class EventWriter:
    """Writes the bytes of one stream, from the moment its preparation has begun."""

    def __init__(
        self, generation: Generation, format: Format, options: StreamOptions, gate: Gate,
        ticket: Ticket,
    ) -> None:
        self._generation, self._format, self._options = generation, format, options
        self._gate, self._ticket = gate, ticket
        self._opened = set[int]()

    async def pieces(self, prepared: asyncio.Task[None]) -> AsyncGenerator[bytes]:
        """Yield everything up to the end or the error, which is written as an event."""
        try:
            while not prepared.done():
                await asyncio.wait((prepared,), timeout=self._options.ping_interval_s)
                if not prepared.done():
                    yield PING
            prepared.result()
            async for piece in self._run():
                yield piece
        except Exception as error:
            if isinstance(error, ClientGone):
                raise
            yield _event(as_api_error(error, self._options.request_id).body)
            return
        yield DONE

    async def _run(self) -> AsyncGenerator[bytes]:
        while not self._generation.is_finished:
            events = await self._generation.next_events(self._options.ping_interval_s)
            if not events:
                yield PING
            for piece in self._chunks(events):
                yield piece
        usage = self._generation.usage
        last = {"usage": usage.as_dict()} if self._options.include_usage else {}
        if last or self._options.return_progress:
            yield _event(self._format.bare_chunk(**last, timings=usage.timings()))

    def _chunks(self, events: list[tuple[int, Event]]) -> list[bytes]:
        """Build one chunk for each completion with new text, after one for the prefill."""
        deltas = dict[int, Delta]()
        has_progress = not events
        for index, event in events:
            if isinstance(event, TokenEvent):
                deltas.setdefault(index, Delta(index)).add(event)
            else:
                has_progress = True
        chunks = list[Json]()
        if has_progress and self._options.return_progress and not self._opened:
            chunks.append(self._progress())
        for index, delta in deltas.items():
            if index not in self._opened:
                self._opened.add(index)
                chunks += self._format.opening([index])
            if delta.text or delta.logprobs or delta.finish_reason:
                chunks.append(self._format.chunk(delta))
        if self._options.continuous_usage:
            usage = self._generation.usage.as_dict()
            chunks = [{**chunk, "usage": usage} for chunk in chunks]
        return [_event(chunk) for chunk in chunks]

    def _progress(self) -> Json:
        """Build llama.cpp's object, with the predicted time to first token beside it."""
        total, cached, done = self._generation.progress
        return self._format.bare_chunk(
            prompt_progress={"total": total, "cache": cached, "processed": done,
                             "time_ms": millis(self._ticket.elapsed_s)},
            predicted_ttft_ms=millis(self._gate.predict_ttft_s(self._ticket)))


class EventStreamResponse(Response):
    """Sends an `EventWriter`'s bytes; a client that hangs up or does not read ends everything.

    Args:
        cleanup: closed at the end, whatever happens.
    """

    media_type = "text/event-stream"

    def __init__(
        self, pieces: AsyncGenerator[bytes], watcher: Disconnect, cleanup: AsyncExitStack,
        send_timeout_s: float, headers: dict[str, str],
    ) -> None:
        super().__init__(headers={
            "Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._pieces, self._watcher, self._cleanup = pieces, watcher, cleanup
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with suppress(ClientGone):  # the headers are out: no reply can follow
            async with self._cleanup:
                await self._watcher.race(self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                try:
                    async with asyncio.timeout(self._send_timeout_s):
                        await send(
                            {"type": "http.response.body", "body": piece, "more_body": True})
                except TimeoutError:
                    raise ClientGone from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(value: Json) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text}\n\n".encode()
